"""The user's whole vocabulary on one page: words of a command line and of a YAML file -> frozen dataclasses.

Names are those of `run_glue_no_trainer.py` and `TrainingArguments` where they mean the same. One dataclass per concern; a
module receives its section, never the whole. How words are read is in `words.py`; here are also the checks that see all values
together and tell every problem at once.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from transformers.hf_argparser import HfArg

from bertdist.errors import ConfigError
from bertdist.words import read_words


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    _argument_group_name = "model"

    model_name_or_path: str = HfArg(default="", help="Model to start from: a folder, or a name on the Hugging Face hub. Required.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of a model on the hub.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, where it is not the model's own.")
    max_length: int = HfArg(default=128, help="Longest text in tokens, special tokens counted; what is longer is truncated. Shorter texts cost nothing: there is no padding.")
    dropout: float | None = HfArg(default=None, help="Replaces the model's hidden, attention and classifier dropout; None keeps the model's own.")
    gradient_checkpointing: bool = HfArg(default=False, help="Compute activations again in the backward pass: less memory, about a third more time, same result.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    _argument_group_name = "data"

    train_file: str | None = HfArg(default=None, help="Rows to learn from: .csv, .tsv, .jsonl or .parquet; any other ending is a table with --delimiter.")
    validation_file: str | None = HfArg(default=None, help="Rows to score after training and every --eval_every.")
    dataset_name: str | None = HfArg(default=None, help="Data set on the hub, instead of files.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set on the hub.")
    task_name: str | None = HfArg(default=None, help="GLUE task (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli): short for the data set nyu-mll/glue with its columns and metrics.")
    train_split: str = HfArg(default="train", help="Split of the hub data set to learn from.")
    validation_split: str | None = HfArg(default=None, help="Split of the hub data set to score; None takes 'validation' where there is one.")
    text_column: str | None = HfArg(default=None, help="Column of the text; None takes text, else a known pair (sentence1 and sentence2, ...), else the first of: sentence, question, premise, review, tweet, content.")
    text_pair_column: str | None = HfArg(default=None, help="Column of the second text, for tasks on pairs.")
    label_column: str | None = HfArg(default=None, help="Column of the label; None takes the first of: label, labels, score, target, class.")
    label_columns: list[str] | None = HfArg(default=None, help="Several 0/1 columns, one for each label: a multi-label task.")
    label_delimiter: str | None = HfArg(default=None, help="What stands between the labels of a row in the label column: a multi-label task.")
    column_names: list[str] | None = HfArg(default=None, help="Names of the columns, for csv and tsv files without a header; a column named _ is not read.")
    delimiter: str | None = HfArg(default=None, help="Field delimiter; None is a comma for .csv and a tab for .tsv. 'tab' means a tab.")
    quoting: Literal["auto", "none", "double"] = HfArg(default="auto", help="Whether fields may stand in double quotes: auto is 'double' for .csv and 'none' for .tsv.")
    encoding: str = HfArg(default="utf-8", help="Encoding of csv, tsv, jsonl and txt files; a byte that does not fit is an error, never replaced.")
    max_train_samples: int | None = HfArg(default=None, help="Learn from the first so many rows only.")
    max_eval_samples: int | None = HfArg(default=None, help="Score the first so many rows only.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    _argument_group_name = "task"

    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = HfArg(
        default="auto", help="Kind of task; auto reads it from the labels and says what it took."
    )
    label_names: list[str] | None = HfArg(default=None, help="Names of the labels in the order of the outputs; None sorts them (whole numbers by value, other labels by code point).")
    class_weights: list[str] | None = HfArg(default=None, help="'balanced' (rows / (labels x rows of the label)) or one number a label in the order of the outputs.")
    label_smoothing_factor: float = HfArg(default=0.0, help="Share of the target spread evenly over all labels; single-label tasks.")
    metrics: list[str] | None = HfArg(default=None, help="Scores to compute: names of bertdist.scores, a path of an evaluate metric, or hub:NAME; None takes the task's usual ones.")
    metric_for_best_model: str | None = HfArg(default=None, help="Score that picks the best weights, or 'loss'; None takes the first metric.")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    _argument_group_name = "batches"

    train_batch_size: int = HfArg(default=32, help="Rows of one optimizer step over all devices; never changes with the hardware.")
    tokens_per_micro_batch: int | None = HfArg(default=None, help="Most tokens a device computes at once; a step is cut by it. None finds it from free memory. Halved where memory runs out. It does not change a step's gradient, only memory and speed.")
    dataloader_num_workers: int | None = HfArg(default=None, help="Processes a rank that tokenize ahead; None takes 1, or 0 where a rank has less than 2 cores.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    _argument_group_name = "optimizer"

    learning_rate: float = HfArg(default=5e-5, help="Highest learning rate of AdamW.")
    weight_decay: float = HfArg(default=0.01, help="Weight decay; biases and norm weights never decay.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW's beta1.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW's beta2.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW's epsilon.")
    max_grad_norm: float = HfArg(default=1.0, help="Longest gradient, as 2-norm over all parameters; 0 does not clip.")
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"] = HfArg(
        default="linear", help="How the learning rate moves after the warmup."
    )
    warmup_ratio: float = HfArg(default=0.0, help="Share of all steps in which the learning rate rises from 0.")
    warmup_steps: int | None = HfArg(default=None, help="Steps in which the learning rate rises from 0; instead of --warmup_ratio.")
    layerwise_lr_decay: float = HfArg(default=1.0, help="Factor on the learning rate from each layer to the one below it; 1 is off.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    _argument_group_name = "run"

    output_dir: str = HfArg(default="", help="Folder of the run; the same command with the same folder goes on where it stopped. Required.")
    seed: int = HfArg(default=42, help="Decides the order of rows, the new head's weights and dropout.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the training rows.")
    max_train_steps: int | None = HfArg(default=None, help="Optimizer steps, instead of --num_train_epochs.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = HfArg(default=None, help="Precision of matrix products; None takes what `accelerate launch` says, else 'no'. Weights stay float32.")
    use_cpu: bool = HfArg(default=False, help="Train on the CPU even where there is a GPU.")
    torch_compile: bool = HfArg(default=False, help="Compile the layers with torch.compile: same losses to rounding; where it cannot be done the run says so and goes on.")
    cuda_graphs: bool = HfArg(default=False, help="Replay whole steps as a CUDA graph, filled up to a fixed size: for small models on one GPU in bf16; where it cannot be done the run says so and goes on.")
    eval_every: str = HfArg(default="1 epoch", help="When to score: '200 steps', '0.5 epochs', '10%%' of the run, or 'never'; the last step is always scored.")
    save_every: str = HfArg(default="1 epoch", help="When to write a checkpoint: same words; the last step always writes one.")
    log_every: str = HfArg(default="50 steps", help="When to write a line to metrics.jsonl: same words.")
    save_total_limit: int = HfArg(default=2, help="Newest checkpoints to keep; at least 2.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="Checkpoint folder to go on from, instead of the newest whole one of --output_dir.")
    early_stopping_patience: int | None = HfArg(default=None, help="Stop after so many evaluations in a row without a better score.")
    early_stopping_threshold: float = HfArg(default=0.0, help="How much better a score must be to count as better for early stopping.")
    stop_before_time_limit: float = HfArg(default=120.0, help="Inside a SLURM job: save and stop so many seconds before its time limit.")
    report_to: list[str] | None = HfArg(default=None, help="Trackers of accelerate to send metrics to (tensorboard, wandb, ...); metrics.jsonl is always written.")


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

    model: str = HfArg(default="", help="Folder of a trained classifier, such as out/best. Required.")
    text: list[str] | None = HfArg(default=None, help="Texts to classify, each one word to the shell.")
    text_pair: list[str] | None = HfArg(default=None, help="Second texts, one for each --text, for models trained on pairs.")
    input: str | None = HfArg(default=None, help="File of texts: .csv, .tsv, .jsonl, .parquet, or .txt with one text a line.")
    output: str | None = HfArg(default=None, help="Where to write one JSON line a row, in the order of the rows; None prints them.")
    max_length: int | None = HfArg(default=None, help="Longest text in tokens; None takes what the model was trained with.")
    tokens_per_micro_batch: int | None = HfArg(default=None, help="Most tokens a device computes at once; None finds it from free memory. Halved where memory runs out.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = HfArg(default=None, help="Precision of matrix products; None takes what `accelerate launch` says, else 'no'.")
    use_cpu: bool = HfArg(default=False, help="Use the CPU even where there is a GPU.")
    text_column: str | None = HfArg(default=None, help="Column of the text; None takes the name the model was trained with.")
    text_pair_column: str | None = HfArg(default=None, help="Column of the second text; None takes the name the model was trained with.")
    column_names: list[str] | None = HfArg(default=None, help="Names of the columns, for csv and tsv files without a header.")
    delimiter: str | None = HfArg(default=None, help="Field delimiter; None is a comma for .csv and a tab for .tsv.")
    quoting: Literal["auto", "none", "double"] = HfArg(default="auto", help="Whether fields may stand in double quotes: auto is 'double' for .csv and 'none' for .tsv.")
    encoding: str = HfArg(default="utf-8", help="Encoding of csv, tsv, jsonl and txt files.")


_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*")


def steps_of(duration: str, steps_per_epoch: int, total_steps: int) -> int:
    """`'200 steps'`, `'0.5 epochs'`, `'10%'` of the run -> steps, at least 1; `'never'` -> 0."""
    if duration.strip() == "never":
        return 0
    match = _DURATION.fullmatch(duration)
    assert match, duration  # read_config has checked it
    number, unit = float(match[1]), match[2]
    return max(1, round(number * {"s": 1, "e": steps_per_epoch, "%": total_steps / 100}[unit[0]]))


def read_config(words: Sequence[str]) -> TrainConfig:
    """`--config run.yaml --learning_rate 1e-5 ...` -> a checked TrainConfig; flags win over the file.

    Raises ConfigError with one line a problem: unknown words, values of the wrong kind, settings that contradict each other.
    """
    sections = [ModelConfig, DataConfig, TaskConfig, BatchConfig, OptimConfig, RunConfig]
    config = TrainConfig(**dict(zip(("model", "data", "task", "batch", "optim", "run"), read_words("train.py", sections, words), strict=True)))
    if problems := list(_problems(config)):
        raise ConfigError("\n".join(problems))
    return config


def read_predict_config(words: Sequence[str]) -> PredictConfig:
    """The words of `python -m bertdist.predict`; raises ConfigError."""
    (config,) = read_words("python -m bertdist.predict", [PredictConfig], words)
    assert isinstance(config, PredictConfig)
    problems = []
    if not config.model:
        problems.append("--model is missing: the folder of a trained classifier, such as out/best.")
    if (config.text is None) == (config.input is None):
        problems.append("Give the texts with --text or with --input, one of the two.")
    if config.output is not None and config.input is None:
        problems.append("--output goes with --input; answers to --text are printed.")
    if config.text_pair is not None and len(config.text_pair) != len(config.text or []):
        problems.append(f"--text_pair has {len(config.text_pair)} texts and --text has {len(config.text or [])}; they go together.")
    problems += _out_of_range(config, {"tokens_per_micro_batch": (1, None), "max_length": (3, None)})
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def write_config(config: TrainConfig) -> str:
    """Every value as YAML that `--config` reads back; unset ones are left out."""
    values = {name: value for section in dataclasses.asdict(config).values() for name, value in section.items() if value is not None}
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _out_of_range(section: Any, bounds: dict[str, tuple[float, float | None]]) -> Iterable[str]:
    for name, (low, high) in bounds.items():
        value = getattr(section, name)
        if value is not None and not (low <= value <= (sys.float_info.max if high is None else high)):
            expected = f"at least {low}" if high is None else f"from {low} to {high}"
            yield f"--{name} is {value}; expected {expected}."


def _problems(config: TrainConfig) -> Iterable[str]:
    data, run, optim, task = config.data, config.run, config.optim, config.task
    if not config.model.model_name_or_path:
        yield "--model_name_or_path is missing: a model folder, or a name on the hub such as google-bert/bert-base-uncased."
    if not run.output_dir:
        yield "--output_dir is missing: the folder that the run writes to."
    sources = [f"--{name}" for name in ("train_file", "dataset_name", "task_name") if getattr(data, name)]
    if not sources:
        yield "No training rows: give --train_file, or --dataset_name, or --task_name."
    if "--train_file" in sources and len(sources) > 1:
        yield f"{' and '.join(sources)} both name training rows; give one."
    if data.validation_file and not data.train_file:
        yield "--validation_file goes with --train_file; for hub data give --validation_split."
    if data.label_columns and len(set(data.label_columns)) < len(data.label_columns):
        yield f"--label_columns repeats a name: {' '.join(data.label_columns)}."
    if data.label_columns and (data.label_column or data.label_delimiter):
        yield "--label_columns stands instead of --label_column and --label_delimiter."
    yield from _out_of_range(config.model, {"max_length": (3, None), "dropout": (0, 1)})
    yield from _out_of_range(data, {"max_train_samples": (1, None), "max_eval_samples": (1, None)})
    yield from _out_of_range(task, {"label_smoothing_factor": (0, 1)})
    yield from _out_of_range(config.batch, {"train_batch_size": (1, None), "tokens_per_micro_batch": (1, None), "dataloader_num_workers": (0, None)})
    yield from _out_of_range(optim, {"learning_rate": (0, None), "weight_decay": (0, None), "adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_epsilon": (0, None)})
    yield from _out_of_range(optim, {"max_grad_norm": (0, None), "warmup_ratio": (0, 1), "warmup_steps": (0, None), "layerwise_lr_decay": (0, 1)})
    yield from _out_of_range(run, {"seed": (0, 2**32 - 1), "num_train_epochs": (0, None), "max_train_steps": (1, None), "save_total_limit": (2, None)})
    yield from _out_of_range(run, {"early_stopping_patience": (1, None), "early_stopping_threshold": (0, None), "stop_before_time_limit": (0, None)})
    if run.num_train_epochs == 0:
        yield "--num_train_epochs is 0; expected more than 0."
    if optim.warmup_steps is not None and optim.warmup_ratio:
        yield "--warmup_steps and --warmup_ratio both name the warmup; give one."
    if optim.lr_scheduler_type == "constant" and (optim.warmup_ratio or optim.warmup_steps):
        yield "--lr_scheduler_type constant has no warmup; take constant_with_warmup."
    for name in ("eval_every", "save_every", "log_every"):
        value = getattr(run, name)
        if value.strip() != "never" and not _DURATION.fullmatch(value):
            hint = f" Did you mean '{value.strip()} steps'?" if value.strip().isdigit() else ""
            yield f"--{name} is {value!r}; expected words such as '200 steps', '0.5 epochs', '10%' or 'never'.{hint}"
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(optim, name) == 1:
            yield f"--{name} is 1; expected less than 1."
    yield from _idle(config)
    if run.early_stopping_patience and run.eval_every.strip() == "never":
        yield "--early_stopping_patience needs evaluations, and --eval_every is 'never'."
    if task.class_weights and task.class_weights != ["balanced"] and not all(_is_weight(word) for word in task.class_weights):
        yield f"--class_weights is {' '.join(task.class_weights)!r}; expected 'balanced' or one number of at least 0 a label."


def _idle(config: TrainConfig) -> Iterable[str]:
    """Settings that were given and cannot take effect."""
    data, run, task = config.data, config.run, config.task
    given = {
        "early_stopping_patience": run.early_stopping_patience,
        "metrics": task.metrics,
        "metric_for_best_model": task.metric_for_best_model,
        "max_eval_samples": data.max_eval_samples,
        "eval_every": run.eval_every != RunConfig.eval_every,
    }
    if data.train_file and not data.validation_file:
        yield from (f"--{name} needs rows to score: give --validation_file." for name, value in given.items() if value)
    hub = {name: getattr(data, name) != getattr(DataConfig, name) for name in ("dataset_config_name", "train_split", "validation_split")}
    if data.train_file:
        yield from (f"--{name} is for data of the hub, and --train_file is a file." for name, value in hub.items() if value)
    if run.early_stopping_threshold and not run.early_stopping_patience:
        yield "--early_stopping_threshold goes with --early_stopping_patience."


def _is_weight(word: str) -> bool:
    try:
        return 0 <= float(word) < float("inf")
    except ValueError:
        return False


