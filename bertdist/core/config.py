"""The user's whole vocabulary on one page: words of a command line and of a YAML file -> frozen dataclasses.

Names are those of `run_glue_no_trainer.py` and `TrainingArguments` where they mean the same. One dataclass per concern; a
module receives its section, never the whole. How words are read is in `words.py`, what values go together in `command_line.py`.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

import yaml
from transformers.hf_argparser import HfArg


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    _argument_group_name = "model"

    model_name_or_path: str = HfArg(
        default="",
        help="Model to start from: a folder, or a name on the Hugging Face hub. Required.",
    )
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of a model on the hub.")
    tokenizer_name: str | None = HfArg(
        default=None, help="Tokenizer, where it is not the model's own."
    )
    max_length: int = HfArg(
        default=128,
        help="Longest text in tokens, special tokens counted; what is longer is truncated. Shorter texts cost nothing: there is no padding.",
    )
    dropout: float | None = HfArg(
        default=None,
        help="Replaces the model's hidden, attention and classifier dropout; None keeps the model's own.",
    )
    gradient_checkpointing: bool = HfArg(
        default=False,
        help="Compute activations again in the backward pass: less memory, about a third more time, same result.",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    _argument_group_name = "data"

    train_file: list[str] | None = HfArg(
        default=None,
        help="Rows to learn from: one or several files, globs or addresses (https://, s3://, gs://, hf://) of .csv, .tsv, .jsonl or .parquet, also .gz and .zst; any other ending is a table with --delimiter.",
    )
    train_weights: list[float] | None = HfArg(
        default=None,
        help="Share of each --train_file in what is learned, such as 0.7 0.3; small ones are repeated. None takes every row once an epoch.",
    )
    validation_file: str | None = HfArg(
        default=None, help="Rows to score after training and every --eval_every."
    )
    streaming: bool = HfArg(
        default=False,
        help="Read the training rows as they are needed, never all at once; they are shuffled within --stream_window rows.",
    )
    stream_window: int = HfArg(
        default=16_384,
        help="With --streaming: rows that are held and shuffled together; rounded up to whole steps.",
    )
    stream_sharding: Literal["by_row", "by_file"] = HfArg(
        default="by_row",
        help="With --streaming: by_row: every rank reads all rows and tokenizes its share; steps do not depend on the number of ranks. by_file: each rank reads only its own files, for sources of many files on many ranks.",
    )
    dataset_name: str | None = HfArg(default=None, help="Data set on the hub, instead of files.")
    dataset_config_name: str | None = HfArg(
        default=None, help="Configuration of the data set on the hub."
    )
    task_name: str | None = HfArg(
        default=None,
        help="GLUE task (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli): short for the data set nyu-mll/glue with its columns and metrics.",
    )
    train_split: str = HfArg(default="train", help="Split of the hub data set to learn from.")
    validation_split: str | None = HfArg(
        default=None,
        help="Split of the hub data set to score; None takes 'validation' where there is one.",
    )
    text_column: str | None = HfArg(
        default=None,
        help="Column of the text; None takes text, else a known pair (sentence1 and sentence2, ...), else the first of: sentence, question, premise, review, tweet, content.",
    )
    text_pair_column: str | None = HfArg(
        default=None, help="Column of the second text, for tasks on pairs."
    )
    label_column: str | None = HfArg(
        default=None,
        help="Column of the label; None takes the first of: label, labels, score, target, class.",
    )
    label_columns: list[str] | None = HfArg(
        default=None, help="Several 0/1 columns, one for each label: a multi-label task."
    )
    label_delimiter: str | None = HfArg(
        default=None,
        help="What stands between the labels of a row in the label column: a multi-label task.",
    )
    column_names: list[str] | None = HfArg(
        default=None,
        help="Names of the columns, for csv and tsv files without a header; a column named _ is not read.",
    )
    delimiter: str | None = HfArg(
        default=None,
        help="Field delimiter; None is a comma for .csv and a tab for .tsv, unless the file's beginning says otherwise. 'tab' means a tab.",
    )
    quoting: Literal["auto", "none", "double"] = HfArg(
        default="auto",
        help="Whether fields may stand in double quotes: auto is 'double' for .csv and 'none' for .tsv, unless only quotes make sense of the file's beginning.",
    )
    encoding: str | None = HfArg(
        default=None,
        help="Encoding of csv, tsv, jsonl and txt files; None is utf-8, or what the file's beginning is without doubt. A byte that does not fit is an error, never replaced.",
    )
    on_bad_row: Literal["fail", "skip"] = HfArg(
        default="fail",
        help="What to do with a row that cannot be read, or whose text or label is none: fail, or leave it out and tell it in bad_rows.jsonl.",
    )
    max_bad_rows: int = HfArg(default=100, help="Most rows to leave out; more end the run.")
    max_train_samples: int | None = HfArg(
        default=None, help="Learn from the first so many rows only."
    )
    max_eval_samples: int | None = HfArg(default=None, help="Score the first so many rows only.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    _argument_group_name = "task"

    problem_type: Literal[
        "auto", "single_label_classification", "multi_label_classification", "regression"
    ] = HfArg(
        default="auto", help="Kind of task; auto reads it from the labels and says what it took."
    )
    label_names: list[str] | None = HfArg(
        default=None,
        help="Names of the labels in the order of the outputs; None sorts them (whole numbers by value, other labels by code point).",
    )
    class_weights: list[str] | None = HfArg(
        default=None,
        help="'balanced' (rows / (labels x rows of the label)) or one number a label in the order of the outputs.",
    )
    label_smoothing_factor: float = HfArg(
        default=0.0, help="Share of the target spread evenly over all labels; single-label tasks."
    )
    metrics: list[str] | None = HfArg(
        default=None,
        help="Scores to compute: names of bertdist.scores, a path of an evaluate metric, or hub:NAME; None takes the task's usual ones.",
    )
    metric_for_best_model: str | None = HfArg(
        default=None,
        help="Score that picks the best weights, or 'loss'; None takes the first metric.",
    )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    _argument_group_name = "batches"

    train_batch_size: int = HfArg(
        default=32,
        help="Rows of one optimizer step over all devices; never changes with the hardware.",
    )
    tokens_per_micro_batch: int | None = HfArg(
        default=None,
        help="Most tokens a device computes at once; a step is cut by it. None finds it from free memory. Halved where memory runs out. It does not change a step's gradient, only memory and speed.",
    )
    dataloader_num_workers: int | None = HfArg(
        default=None,
        help="Processes a rank that tokenize ahead; None takes 1, or 0 where a rank has less than 2 cores.",
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    _argument_group_name = "optimizer"

    learning_rate: float = HfArg(default=5e-5, help="Highest learning rate of AdamW.")
    weight_decay: float = HfArg(
        default=0.01, help="Weight decay; biases and norm weights never decay."
    )
    adam_beta1: float = HfArg(default=0.9, help="AdamW's beta1.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW's beta2.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW's epsilon.")
    max_grad_norm: float = HfArg(
        default=1.0, help="Longest gradient, as 2-norm over all parameters; 0 does not clip."
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = HfArg(default="linear", help="How the learning rate moves after the warmup.")
    warmup_ratio: float = HfArg(
        default=0.0, help="Share of all steps in which the learning rate rises from 0."
    )
    warmup_steps: int | None = HfArg(
        default=None,
        help="Steps in which the learning rate rises from 0; instead of --warmup_ratio.",
    )
    layerwise_lr_decay: float = HfArg(
        default=1.0,
        help="Factor on the learning rate from each layer to the one below it; 1 is off.",
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    _argument_group_name = "run"

    output_dir: str = HfArg(
        default="",
        help="Folder of the run; the same command with the same folder goes on where it stopped. Required.",
    )
    seed: int = HfArg(
        default=42, help="Decides the order of rows, the new head's weights and dropout."
    )
    dry_run: bool = HfArg(
        default=False,
        help="Train nothing: look at the data, say the plan (steps, tokens, what each rank gets, memory), and leave. Loads no weights.",
    )
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the training rows.")
    max_train_steps: int | None = HfArg(
        default=None, help="Optimizer steps, instead of --num_train_epochs."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = HfArg(
        default=None,
        help="Precision of matrix products; None takes what `accelerate launch` says, else 'no'. Weights stay float32.",
    )
    use_cpu: bool = HfArg(default=False, help="Train on the CPU even where there is a GPU.")
    torch_compile: bool = HfArg(
        default=False,
        help="Compile the layers with torch.compile: same losses to rounding; where it cannot be done the run says so and goes on.",
    )
    cuda_graphs: bool = HfArg(
        default=False,
        help="Replay whole steps as a CUDA graph, filled up to a fixed size: for small models on one GPU in bf16; where it cannot be done the run says so and goes on.",
    )
    eval_every: str = HfArg(
        default="1 epoch",
        help="When to score: '200 steps', '0.5 epochs', '10%%' of the run, or 'never'; the last step is always scored.",
    )
    save_every: str = HfArg(
        default="1 epoch",
        help="When to write a checkpoint: same words; the last step always writes one.",
    )
    log_every: str = HfArg(
        default="50 steps", help="When to write a line to metrics.jsonl: same words."
    )
    save_total_limit: int = HfArg(default=2, help="Newest checkpoints to keep; at least 2.")
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="Checkpoint folder to go on from, instead of the newest whole one of --output_dir.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after so many evaluations in a row without a better score."
    )
    early_stopping_threshold: float = HfArg(
        default=0.0, help="How much better a score must be to count as better for early stopping."
    )
    stop_before_time_limit: float = HfArg(
        default=120.0,
        help="Inside a SLURM job: save and stop so many seconds before its time limit.",
    )
    rank_timeout: float = HfArg(
        default=600.0,
        help="Seconds after which ranks that all wait end the run, with every rank's stack, and in which all ranks must have arrived at the start.",
    )
    accept_changed_data: bool = HfArg(
        default=False,
        help="Go on from a checkpoint although the training rows have changed since: the epoch that was begun may then see rows twice or not at all.",
    )
    on_nan: Literal["stop", "skip"] = HfArg(
        default="stop",
        help="What to do with a step whose loss or gradient is NaN or infinite; its rows are written to nan_rows.jsonl, and no weight changes by it: stop the run, or skip the step.",
    )
    max_nan_steps: int = HfArg(
        default=10, help="With --on_nan skip: most such steps in a row; one more ends the run."
    )
    detect_anomaly: bool = HfArg(
        default=False,
        help="For debugging: compute a step that is NaN or infinite again, in anomaly mode of torch.autograd, and name the operation that made it; its stack goes to stacks/.",
    )
    report_to: list[str] | None = HfArg(
        default=None,
        help="Trackers of accelerate to send metrics to (tensorboard, wandb, ...); metrics.jsonl is always written.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training run."""

    model: ModelConfig
    data: DataConfig
    task: TaskConfig
    batch: BatchConfig
    optim: OptimConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    _argument_group_name = "prediction"

    model: str = HfArg(
        default="", help="Folder of a trained classifier, such as out/best. Required."
    )
    text: list[str] | None = HfArg(
        default=None, help="Texts to classify, each one word to the shell."
    )
    text_pair: list[str] | None = HfArg(
        default=None, help="Second texts, one for each --text, for models trained on pairs."
    )
    input: str | None = HfArg(
        default=None,
        help="File of texts: .csv, .tsv, .jsonl, .parquet, or .txt with one text a line.",
    )
    output: str | None = HfArg(
        default=None,
        help="Where to write one JSON line a row, in the order of the rows; None prints them.",
    )
    max_length: int | None = HfArg(
        default=None, help="Longest text in tokens; None takes what the model was trained with."
    )
    tokens_per_micro_batch: int | None = HfArg(
        default=None,
        help="Most tokens a device computes at once; None finds it from free memory. Halved where memory runs out.",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = HfArg(
        default=None,
        help="Precision of matrix products; None takes what `accelerate launch` says, else 'no'.",
    )
    use_cpu: bool = HfArg(default=False, help="Use the CPU even where there is a GPU.")
    text_column: str | None = HfArg(
        default=None, help="Column of the text; None takes the name the model was trained with."
    )
    text_pair_column: str | None = HfArg(
        default=None,
        help="Column of the second text; None takes the name the model was trained with.",
    )
    column_names: list[str] | None = HfArg(
        default=None, help="Names of the columns, for csv and tsv files without a header."
    )
    delimiter: str | None = HfArg(
        default=None,
        help="Field delimiter; None is a comma for .csv and a tab for .tsv, unless the file's beginning says otherwise.",
    )
    quoting: Literal["auto", "none", "double"] = HfArg(
        default="auto",
        help="Whether fields may stand in double quotes: auto is 'double' for .csv and 'none' for .tsv, unless only quotes make sense of the file's beginning.",
    )
    encoding: str | None = HfArg(
        default=None,
        help="Encoding of csv, tsv, jsonl and txt files; None is utf-8, or what the file's beginning is without doubt.",
    )


DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*")


def duration_in_steps(duration: str, steps_per_epoch: int, total_steps: int) -> int:
    """`'200 steps'`, `'0.5 epochs'`, `'10%'` of the run -> steps, at least 1; `'never'` -> 0."""
    if duration.strip() == "never":
        return 0
    match = DURATION.fullmatch(duration)
    assert match, duration  # read_config has checked it
    number, unit = float(match[1]), match[2]
    return max(1, round(number * {"s": 1, "e": steps_per_epoch, "%": total_steps / 100}[unit[0]]))


def config_to_yaml(config: TrainConfig) -> str:
    """Every value as YAML that `--config` reads back; unset ones are left out."""
    values = {
        name: value
        for section in dataclasses.asdict(config).values()
        for name, value in section.items()
        if value is not None
    }
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
