"""Every setting: its flag and YAML name, type, default and one sentence of help.

Names are those of `run_glue_no_trainer.py` and `TrainingArguments` where they mean the same. One
dataclass per concern: a function receives its section, or the TrainConfig if it needs several.
core/args.py fills them from the command line and a YAML file, and checks their values together.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml


def setting(default: Any, help: str, brief: str = "") -> Any:
    """A field of a config: its default, and its sentences in `--help all`.

    brief: its line in the short --help, of 46 characters at most; "" for a flag that is not there.
    """
    return dataclasses.field(default=default, metadata={"help": help, "brief": brief})


PATHS = (
    *("model_name_or_path", "model", "tokenizer_name", "dataset_name", "resume_from_checkpoint"),
    *("train_file", "validation_file", "test_file", "input", "output", "fix", "output_dir"),
)


class Section:
    """Settings whose paths may begin with ~, which YAML does not expand, nor some shells."""

    def __post_init__(self) -> None:
        for name in PATHS:
            given = getattr(self, name, None)
            if isinstance(given, list | tuple):
                object.__setattr__(self, name, list(map(os.path.expanduser, given)))
            elif given:
                object.__setattr__(self, name, os.path.expanduser(given))


ALL_LAYERS = sys.maxsize  # of --freeze encoder


def freeze_depth(word: str) -> int | None:
    """A word of --freeze as the number of frozen layers, 0 for the embeddings alone; None if it is
    none.
    """
    named = {"embeddings": 0, "encoder": ALL_LAYERS}
    return named.get(word, int(word) if word.isdecimal() and int(word) else None)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model, its tokenizer and dropout."""

    _argument_group_name = "model"

    model_name_or_path: str = setting(
        "",
        "Model to start from: a folder, or a name on the Hugging Face Hub. Required.",
        brief="Model to start from: a folder or a hub name",
    )
    model_revision: str = setting("main", "Branch, tag or commit of a model on the hub.")
    tokenizer_name: str | None = setting(None, "Tokenizer, if it is not the model's own.")
    max_length: int = setting(
        128,
        "Maximum length of a text in tokens, special tokens included; longer texts are truncated. "
        "Shorter texts cost nothing: there is no padding.",
        brief="Longer texts are truncated, default 128 tokens",
    )
    dropout: float | None = setting(
        None, "Hidden, attention and classifier dropout. Default: the model's configuration."
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: less memory, about a third more time, same "
        "result.",
    )
    freeze: list[str] | None = setting(
        None,
        "Weights that training leaves as they are: 'embeddings'; a number N, the embeddings and "
        "the first N layers; or 'encoder', all but the head (a pooler belongs to the head). They "
        "have no gradient and no AdamW state, and the backward pass ends above them. Dropout stays "
        "on in frozen layers.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.freeze
        words = list(map(str, given if isinstance(given, list | tuple) else [given]))
        if given is not None and words:
            depths = [freeze_depth(word) for word in words]
            if None not in depths:  # else config_problems says what is wrong
                words = [max(words, key=lambda word: freeze_depth(word) or 0)]
            object.__setattr__(self, "freeze", words)

    @property
    def frozen_layers(self) -> int | None:
        """0: the embeddings, N: these and the first N layers, ALL_LAYERS: all but the head; None:
        nothing.
        """
        depths = [freeze_depth(word) for word in self.freeze or ()]
        return max((depth for depth in depths if depth is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class FileConfig(Section):
    """How files of rows are written, and the columns of their texts: the same in all commands."""

    text_column: list[str] | None = setting(
        None,
        "Column of the text; several are joined with a space. Default: text, else a known pair "
        "(sentence1 and sentence2, ...), else the first of: sentence, question, premise, review, "
        "tweet, content; in prediction that of the training.",
        brief="Column of the text, if not a usual name",
    )
    text_pair_column: str | None = setting(
        None,
        "Column of the second text, for tasks on text pairs. Default in prediction: that of the "
        "training.",
    )
    file_format: Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "txt"] = setting(
        "auto",
        "Format of the files; txt is one text per line. Default: by the name and the start of each "
        "file; a message says where they differ.",
    )
    json_field: str | None = setting(
        None, "Key of the list of rows in a .json file that has several lists."
    )
    column_names: list[str] | None = setting(
        None,
        "Names of the columns, for tables without a header; a column named _ is not read.",
    )
    delimiter: str | None = setting(
        None,
        "Field delimiter. Default: a comma for .csv and a tab for .tsv, unless the start of the "
        "file shows another one. 'tab' means a tab.",
    )
    quoting: Literal["auto", "none", "double"] = setting(
        "auto",
        "Whether fields may be in double quotes: auto is 'double' for .csv and 'none' for .tsv, "
        "unless the start of the file makes sense only with quotes.",
    )
    encoding: str | None = setting(
        None,
        "Encoding of text files. Default: utf-8, unless the start of the file proves another one. "
        "An invalid byte is an error, never replaced.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text_column, str):  # in Python, one name may come without its list
            object.__setattr__(self, "text_column", [self.text_column])


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(FileConfig):
    """Where labelled rows are, and the columns of their labels: the same in all commands."""

    dataset_name: str | None = setting(None, "Data set on the hub, instead of files.")
    dataset_config_name: str | None = setting(None, "Configuration of the data set on the hub.")
    task_name: str | None = setting(
        None,
        "GLUE task (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli): short for the data set "
        "nyu-mll/glue with its columns and metrics.",
    )
    label_column: str | None = setting(
        None,
        "Column of the label. Default: the first of: label, labels, score, target, class.",
        brief="Column of the label, if not a usual name",
    )
    label_columns: list[str] | None = setting(
        None, "Several 0/1 columns, one per label: a multi-label task."
    )
    label_delimiter: str | None = setting(
        None,
        "Delimiter between the labels of a row in the label column: a multi-label task. 'tab' "
        "means a tab, 'space' a space.",
    )
    slice_column: str | None = setting(
        None,
        "Column that divides the rows to evaluate, such as language or source: the report has the "
        "scores of each of its values. It changes nothing that is learned.",
    )
    on_bad_row: Literal["fail", "skip"] = setting(
        "fail",
        "What to do with a row that cannot be read, or lacks text or label (an empty text is a "
        "text): fail, or skip it and list it in bad_rows.jsonl.",
    )
    max_bad_rows: int = setting(100, "Maximum number of rows to skip; more end the run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {"tab": "\t", "\\t": "\t", "space": " "}
        delimiter = named.get(self.label_delimiter or "", self.label_delimiter)
        object.__setattr__(self, "label_delimiter", delimiter)


@dataclass(frozen=True, kw_only=True)
class DataConfig(LabelledConfig):
    """Training and validation rows, and their columns."""

    _argument_group_name = "data"

    train_file: list[str] | None = setting(
        None,
        "Training rows: files, globs or URLs (https://, s3://, gs://, hf://) of .csv, .tsv, "
        ".jsonl, .json or .parquet, also as .gz or .zst, or a folder with one folder of .txt files "
        "per label.",
        brief="Training rows: csv, tsv, jsonl, parquet",
    )
    train_weights: list[float] | None = setting(
        None,
        "Share of each --train_file in the training rows, such as 0.7 0.3; small files are "
        "repeated. Default: every row once per epoch.",
    )
    validation_file: str | None = setting(
        None,
        "Rows to evaluate on after training and every --eval_every.",
        brief="Rows to evaluate on",
    )
    test_file: str | None = setting(
        None,
        "Rows to evaluate once, with the best weights, at the end of training; they change nothing "
        "that is learned.",
        brief="Rows to evaluate at the end, once",
    )
    streaming: bool = setting(
        False,
        "Read training rows when they are needed, never all at once; rows are shuffled within "
        "--stream_window.",
    )
    stream_window: int = setting(
        16_384,
        "With --streaming: shuffle buffer size in rows; rounded up to full steps.",
    )
    stream_sharding: Literal["by_row", "by_file"] = setting(
        "by_row",
        "With --streaming: by_row: every rank reads all rows and tokenizes its share; steps do not "
        "depend on the number of ranks. by_file: each rank reads only its own files, for many "
        "files on many ranks.",
    )
    train_split: str = setting("train", "Split of the hub data set to train on.")
    validation_split: str | None = setting(
        None,
        "Share of the rows of --train_file to evaluate on instead of training on them, such as "
        "0.1: chosen by --seed and the text, so that rows added later move no row, and equal texts "
        "stay together. Of a hub data set: the name of a split. Default there: 'validation' if it "
        "exists.",
        brief="Share of the training rows to evaluate on: 0.1",
    )
    test_split: str | None = setting(
        None,
        "Share of the rows of --train_file to score once, after training, on the best weights; "
        "chosen like --validation_split. Of a hub data set: the name of a split.",
    )
    split_seed: int | None = setting(
        None,
        "Seed of the rows that --validation_split and --test_split hold out of files. Default: "
        "--seed; the runs of --seeds hold out the same rows.",
    )
    max_train_samples: int | None = setting(None, "Train on the first N rows only.")
    max_eval_samples: int | None = setting(None, "Evaluate on the first N rows only.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Labels, loss and metrics."""

    _argument_group_name = "task"

    problem_type: Literal[
        "auto", "single_label_classification", "multi_label_classification", "regression"
    ] = setting("auto", "Kind of task; auto infers it from the labels and prints it.")
    label_names: list[str] | None = setting(
        None,
        "Label names in output order; 0=negative 1=positive names the codes of the files. Default: "
        "sorted (integers by value, other labels by code point).",
    )
    class_weights: list[str] | None = setting(
        None,
        "'balanced' (rows / (labels x rows of the label)) or one number per label, in output "
        "order.",
    )
    label_smoothing_factor: float = setting(
        0.0, "Share of the target that is spread evenly over all labels; single-label tasks only."
    )
    metrics: list[str] | None = setting(
        None,
        "Metrics to compute, such as accuracy, f1, f1_macro, roc_auc, pearson (all names: "
        "docs/guides/imbalance.md); the path of a Hugging Face `evaluate` metric script, or "
        "hub:NAME. Default: the usual metrics of the task.",
        brief="Scores to compute, such as accuracy f1_macro",
    )
    positive_label: str | None = setting(
        None,
        "Of two labels, the positive one: that of f1, precision, recall and average_precision. "
        "Default: the second.",
    )
    metric_for_best_model: str | None = setting(
        None, "Metric that selects the best weights, or 'loss'. Default: the first of --metrics."
    )
    calibrate: bool = setting(
        False,
        "At the end, fit a temperature to the logits of the validation rows (temperature scaling) "
        "and fold it into the output layer of best/, so that probabilities are those of being "
        "right; the answers stay. A finished run can be calibrated later.",
        brief="Fit a temperature: honest probabilities",
    )
    tune_thresholds: bool = setting(
        False,
        "At the end, find the probability above which each label is given (multi-label), or the "
        "positive one of two labels, for the highest --threshold_for on the validation rows. "
        "bertdist predict and evaluate use them; pipeline does not.",
    )
    threshold_for: str = setting(
        "f1",
        "Score that --tune_thresholds maximises: f1, balanced_accuracy, matthews_correlation, "
        "precision_at_recall=0.9 (the highest precision at a recall of at least 0.9) or "
        "recall_at_precision=0.9; of two labels also accuracy; of several per text also f1_macro "
        "(the same as f1) and f1_micro.",
    )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of steps and micro-batches."""

    _argument_group_name = "batches"

    train_batch_size: int = setting(
        32,
        "Global batch size: rows per optimizer step over all devices; independent of hardware.",
        brief="Rows per step over all devices, default 32",
    )
    tokens_per_micro_batch: int | None = setting(
        None,
        "Maximum number of tokens a device computes at once; a step is split accordingly. "
        "Default: measured from free memory; halved when memory runs out. It affects memory and "
        "speed, not the gradient of a step.",
    )
    dataloader_num_workers: int | None = setting(
        None,
        "Processes per rank that tokenize ahead. Default: 1, or 0 if a rank has less than 2 cores.",
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate schedule."""

    _argument_group_name = "optimizer"

    learning_rate: float = setting(
        5e-5, "Peak learning rate of AdamW.", brief="Peak learning rate of AdamW, default 5e-5"
    )
    weight_decay: float = setting(0.01, "Weight decay; not applied to biases and norm weights.")
    adam_beta1: float = setting(0.9, "AdamW's beta1.")
    adam_beta2: float = setting(0.999, "AdamW's beta2.")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = setting(1.0, "Clip the global gradient norm; 0 disables clipping.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = setting("linear", "Learning rate schedule after the warmup.")
    warmup_ratio: float = setting(0.0, "Share of all steps with linear learning rate warmup.")
    warmup_steps: int | None = setting(None, "Warmup in steps, instead of --warmup_ratio.")
    layerwise_lr_decay: float = setting(
        1.0, "Factor on the learning rate from each layer to the one below it; 1 disables it."
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Length, output, precision and interruptions of a run."""

    _argument_group_name = "run"

    output_dir: str = setting(
        "",
        "Folder of the run; the same command with the same folder resumes an interrupted run. "
        "Required.",
        brief="Folder of the run; the same one resumes it",
    )
    seed: int = setting(42, "Seed of the row order, the new head's weights and dropout.")
    seeds: list[int] | None = setting(
        None,
        "Train one model per seed and compare: mean and standard deviation of every score, and the "
        "best. One number is how many, from --seed on (--seeds 5: 42 to 46); several are the seeds "
        "(--seeds 1 2 3). The runs are in --output_dir/seeds, the scores in seeds.json.",
        brief="Number of runs with other seeds: mean, spread",
    )
    folds: int | None = setting(
        None,
        "Cross-validation: train one model per fold of the training rows, on the rows of the "
        "others, and score (or check) each fold with the model that has not seen it. The runs are "
        "in --output_dir/folds, the scores in cross_validation.json.",
    )
    dry_run: bool = setting(
        False,
        "Check the data, print the plan (steps, tokens, work per rank, memory) and exit, without "
        "loading weights.",
        brief="Check data and settings, print the plan, exit",
    )
    num_train_epochs: float = setting(
        3.0, "Passes over the training rows.", brief="Passes over the training rows, default 3"
    )
    max_train_steps: int | None = setting(None, "Optimizer steps, instead of --num_train_epochs.")
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] | None = setting(
        None,
        "Precision of matrix products. Default: accelerate's setting, else no (float32). Weights "
        "stay float32. On a CPU bf16 needs AMX or AVX512_BF16, else float32 is used. auto: bf16 if "
        "all ranks have units for it (a GPU with bf16, a CPU with AMX), else no; chosen at the "
        "first start and kept when the run resumes. Not the default: what a model learns would "
        "depend on the machine.",
        brief="Precision: no, bf16, fp16 or auto, default no",
    )
    ddp_comm_hook: Literal["no", "bf16"] = setting(
        "no",
        "What ranks exchange: gradients as they are (no), or rounded to bf16, half the bytes, for "
        "networks that are slower than the computing. The weights stay float32; what is learned "
        "then depends on the number of ranks, to bf16 rounding.",
    )
    use_cpu: bool = setting(
        False,
        "Train on the CPU even if there is a GPU.",
        brief="Train on the CPU even if there is a GPU",
    )
    torch_compile: bool = setting(
        False,
        "Compile the layers with torch.compile: same losses to rounding; if it fails, the run "
        "logs a warning and falls back to eager.",
    )
    cuda_graphs: bool = setting(
        False,
        "Replay steps as a CUDA graph, padded to a fixed size: for small models on one GPU in "
        "bf16; if it fails, the run logs a warning and falls back to eager.",
    )
    eval_every: str = setting(
        "auto",
        "Evaluation interval: '200 steps', '0.5 epochs', '10%' of the run, or 'never'; always "
        "after the last step. auto: 1 epoch, or 10% of the run for a stream whose length is not "
        "known.",
        brief="Such as '200 steps', default '1 epoch'",
    )
    save_every: str = setting(
        "auto",
        "Checkpoint interval, same format as --eval_every; always after the last step.",
    )
    log_every: str = setting(
        "auto",
        "Interval of lines in metrics.jsonl, same format as --eval_every. auto: 2% of the run, at "
        "most 50 steps.",
    )
    verbose: bool = setting(
        False,
        "Show more figures: gradient norm, padding, floating-point rates, micro-batch size. They "
        "are always in metrics.jsonl.",
    )
    save_total_limit: int = setting(2, "Number of newest checkpoints to keep; at least 2.")
    resume_from_checkpoint: str | None = setting(
        None, "Checkpoint folder to resume from, instead of the newest one in --output_dir."
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after this number of consecutive evaluations without improvement.",
        brief="Stop after N evaluations without improvement",
    )
    early_stopping_threshold: float = setting(
        0.0, "Minimum improvement of the metric that counts for early stopping."
    )
    stop_before_time_limit: float = setting(
        120.0, "In a SLURM job: save and stop this number of seconds before its time limit."
    )
    rank_timeout: float = setting(
        600.0,
        "Abort when no rank has made progress for this many seconds, with the stack of every "
        "rank; also the time for all ranks to start.",
    )
    accept_changed_data: bool = setting(
        False,
        "Resume although the training rows have changed since the checkpoint: the current epoch "
        "may then repeat or miss rows.",
    )
    on_nan: Literal["stop", "skip"] = setting(
        "stop",
        "What to do with a step whose loss or gradient is NaN or infinite: stop the run, or skip "
        "the step. Its rows are written to nan_rows.jsonl, and no weight changes.",
    )
    max_nan_steps: int = setting(
        10, "With --on_nan skip: maximum number of consecutive such steps; one more ends the run."
    )
    detect_anomaly: bool = setting(
        False,
        "For debugging: recompute a NaN or infinite step in torch.autograd's anomaly mode, and "
        "name the operation that caused it; its stack is written to stacks/.",
    )
    report: bool = setting(
        True,
        "Write report.html when the run has finished: scores, curves, confusions, calibration and "
        "mistakes on one page. `bertdist report` writes it later too.",
    )
    report_to: list[str] | None = setting(
        None,
        "Trackers to log to as well: tensorboard, mlflow, trackio, wandb, comet_ml, aim, clearml, "
        "swanlab, dvclive, or all that are installed. A resumed run continues its curves there; "
        "metrics.jsonl is always written.",
    )
    project: str | None = setting(
        None,
        "Project of the trackers; MLflow: experiment. Default: the tracker's variable, such as "
        "WANDB_PROJECT, else bertdist. TensorBoard has none.",
    )
    run_name: str | None = setting(
        None,
        "Name of the run in the trackers. Default: the tracker's variable, such as WANDB_NAME, "
        "else the name of --output_dir. Runs of --folds are a group of this name.",
    )
    push_to_hub: str | None = setting(
        None,
        "Upload best/ after the run: the repository on the Hugging Face Hub, owner/name, private "
        "if it is new. `bertdist push` does it later, also as public.",
    )

    @property
    def seed_list(self) -> list[int]:
        """The seeds of --seeds; empty without it."""
        seeds = self.seeds or []
        return seeds if len(seeds) != 1 else list(range(self.seed, self.seed + seeds[0]))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run."""

    model: ModelConfig
    data: DataConfig
    task: TaskConfig
    batch: BatchConfig
    optim: OptimConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class PredictConfig(FileConfig):
    """The settings of `bertdist predict`."""

    _argument_group_name = "prediction"

    model: str = setting(
        "",
        "Folder of a trained classifier, such as out/best. Required.",
        brief="Trained classifier, such as out",
    )
    text: list[str] | None = setting(
        None,
        "Texts to classify, each quoted for the shell.",
        brief="Texts to classify, each quoted",
    )
    text_pair: list[str] | None = setting(
        None,
        "Second texts, one per --text, for models trained on text pairs.",
        brief="Second texts, for models of text pairs",
    )
    input: list[str] | None = setting(
        None,
        "Texts: files, globs or URLs as in training, a .txt with one text per line, a folder of "
        ".txt files, or - for standard input.",
        brief="Texts: files (csv, jsonl, txt, ...), or -",
    )
    output: str | None = setting(
        None,
        "File to write, one row per text, in their order; .jsonl, .csv, .tsv (also as .gz) or "
        ".parquet by its ending. Default: -, standard output. After a stop or a kill the same "
        "command continues.",
        brief="File to write: jsonl, csv, tsv, parquet",
    )
    output_format: Literal["auto", "jsonl", "csv", "tsv", "parquet"] = setting(
        "auto", "Format of the output, where its ending does not say it. Default: JSON lines."
    )
    keep_columns: list[str] | None = setting(
        None,
        "Columns of the input to write too: their names, or all.",
        brief="Input columns to write too, or all",
    )
    top_k: str | None = setting(
        None,
        "Write the k most probable labels with their probabilities: a number, or all.",
        brief="Labels per text: a number, or all",
    )
    threshold: list[str] | None = setting(
        None,
        "Minimum probability. Multi-label: every label above it is given (default 0.5, or the "
        "thresholds of --tune_thresholds); joy=0.2 anger=0.4 for some labels. One label per text: "
        "where it is below, the label is null, empty in a table; positive=0.3: that one of two "
        "labels is the answer above it.",
    )
    max_length: int | None = setting(
        None, "Maximum length of a text in tokens. Default: that of the training."
    )
    tokens_per_micro_batch: int | None = setting(
        None,
        "Maximum number of tokens a device computes at once. Default: measured from free memory; "
        "halved when memory runs out.",
    )
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] | None = setting(
        None,
        "Precision of matrix products. Default: accelerate's setting, else no. auto: bf16 if all "
        "ranks have units for it (a GPU with bf16, a CPU with AMX), else no.",
    )
    use_cpu: bool = setting(
        False, "Use the CPU even if there is a GPU.", brief="Use the CPU even if there is a GPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input", "keep_columns", "threshold"):  # in Python, one may be no list
            if isinstance(value := getattr(self, name), str | float | int):
                object.__setattr__(self, name, [str(value)])

    @property
    def answers(self) -> int | None:
        """--top_k as a number; all is larger than any."""
        return (
            None if self.top_k is None else sys.maxsize if self.top_k == "all" else int(self.top_k)
        )


def share_of(split: str | None) -> float | None:
    """`--validation_split 0.1` as a number; None for the name of a split."""
    try:
        return None if split is None else float(split)
    except ValueError:
        return None


MOST_LOGGED_STEPS = 50  # of --log_every auto


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LabelledConfig):
    """The settings of `bertdist evaluate`."""

    _argument_group_name = "evaluation"

    model: str = setting(
        "",
        "Trained classifier: a folder of Hugging Face files, such as out/best, or that of a run. "
        "Required.",
        brief="Trained classifier, such as out",
    )
    input: str | None = setting(
        None,
        "Labelled rows: a file, glob or URL as in training, or a folder per label.",
        brief="File of labelled rows: csv, tsv, jsonl, parquet",
    )
    split: str | None = setting(None, "Split of the hub data set (--dataset_name), such as test.")
    output_dir: str | None = setting(
        None,
        "Folder to write evaluation.json, predictions.jsonl and errors.jsonl into. Default: the "
        "scores are shown only.",
        brief="Folder for scores, predictions, errors",
    )
    report: bool = setting(
        True, "With --output_dir: write report.html too, the page of this evaluation."
    )
    metrics: list[str] | None = setting(
        None,
        "Metrics to compute, as in training. Default: the usual metrics of the task.",
        brief="Metrics, default: the usual ones",
    )
    positive_label: str | None = setting(
        None,
        "Of two labels, the positive one: that of f1, precision, recall and average_precision. "
        "Default: the second.",
        brief="The positive one of two labels",
    )
    threshold: list[str] | None = setting(
        None,
        "Multi-label: the probability above which every label is given, default 0.5 or the "
        "thresholds of --tune_thresholds; joy=0.2 anger=0.4 for some labels. Of two labels: "
        "positive=0.3, that one is the answer above it.",
    )
    label_names: list[str] | None = setting(
        None,
        "Names of the model's outputs in their order, as the file has them; or 1=positive "
        "0=negative, the codes of the file for the model's labels. Default: the model's.",
    )
    max_eval_samples: int | None = setting(None, "Evaluate on the first N rows only.")
    max_length: int | None = setting(
        None, "Maximum length of a text in tokens. Default: that of the training."
    )
    tokens_per_micro_batch: int | None = setting(
        None,
        "Maximum number of tokens a device computes at once. Default: 8,192; halved when memory "
        "runs out.",
    )
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] | None = setting(
        None,
        "Precision of matrix products. Default: accelerate's setting, else no. auto: bf16 if all "
        "ranks have units for it (a GPU with bf16, a CPU with AMX), else no.",
    )
    use_cpu: bool = setting(
        False, "Use the CPU even if there is a GPU.", brief="Use the CPU even if there is a GPU"
    )


DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*")


def count_steps(run: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the entire run."""
    return run.max_train_steps or max(1, math.ceil(run.num_train_epochs * steps_per_epoch))


def duration_in_steps(duration: str, steps_per_epoch: int, total_steps: int) -> int:
    """`'200 steps'`, `'0.5 epochs'`, `'10%'` of the run -> steps, at least 1; `'never'` -> 0.

    `'auto'` is one epoch, or 10% of the run where steps_per_epoch is 0, for a stream that was not
    counted.
    """
    if duration.strip() == "never":
        return 0
    if duration.strip() == "auto":
        duration = "1 epoch" if steps_per_epoch else "10%"
    match = DURATION.fullmatch(duration)
    assert match, duration  # read_config has checked it
    number, unit = float(match[1]), match[2]
    return max(1, round(number * {"s": 1, "e": steps_per_epoch, "%": total_steps / 100}[unit[0]]))


def log_interval(duration: str, steps_per_epoch: int, total_steps: int) -> int:
    """`duration_in_steps` of --log_every, where `'auto'` is 2% of the run, at most 50 steps."""
    if duration.strip() == "auto":
        return max(1, min(MOST_LOGGED_STEPS, math.ceil(total_steps / 50)))
    return duration_in_steps(duration, steps_per_epoch, total_steps)


def plain_duration(duration: Any) -> Any:
    """One form of the durations that mean the same: `'3steps'` and `'3.0 steps'` -> `'3 steps'`."""
    match = DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None:
        return duration.strip() if isinstance(duration, str) else duration
    number = f"{float(match[1]):.15g}"
    unit = match[2].rstrip("s") + "s" * (number != "1")
    return f"{number}%" if match[2] == "%" else f"{number} {unit}"


def config_to_yaml(config: TrainConfig | EvaluateConfig) -> str:
    """All values that are not None, as YAML that `--config` reads back."""
    given = dataclasses.asdict(config)
    sections = given.values() if isinstance(config, TrainConfig) else [given]
    return as_yaml({k: v for section in sections for k, v in section.items() if v is not None})


def as_yaml(values: Mapping[str, Any]) -> str:
    """As YAML that reads back the same."""
    text = str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
    # U+0085 unescaped is read as a blank (PyYAML 6.0).
    return text if "\x85" not in text else str(yaml.safe_dump(dict(values), sort_keys=False))


def finished_yaml(file: Path, config: TrainConfig) -> str:
    """The config.yaml of a finished run, with what may be added to one: rows to test on, slices,
    and fits of temperature and thresholds. Other settings that are given now have had no effect.
    `config_to_yaml` where there is none that can be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        saved = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return config_to_yaml(config)
    if not isinstance(saved, dict):
        return config_to_yaml(config)
    values, task = dict(saved), config.task
    tests = {name: getattr(config.data, name) for name in ("test_file", "test_split")}
    if given := {name: value for name, value in tests.items() if value is not None}:
        values = {name: value for name, value in saved.items() if name not in tests} | given
    if config.data.slice_column is not None:
        values["slice_column"] = config.data.slice_column
    if task.calibrate:
        values["calibrate"] = True
    if task.tune_thresholds:
        values |= {"tune_thresholds": True, "threshold_for": task.threshold_for}
    if values == saved:
        return text
    return as_yaml(values)


def saved_setting(file: Path, name: str) -> Any:
    """A setting of a config.yaml that a run wrote; None where it has none or cannot be read."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return values.get(name) if isinstance(values, dict) else None
