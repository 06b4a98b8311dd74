"""Words of a command line and of a YAML file -> values for the fields of dataclasses.

transformers' HfArgumentParser reads the words; this module adds the YAML file (same names, flags win over it), "did you mean" for
words that are not known, and what to write instead of words that users bring from elsewhere.

The words of a command line and of its --config file -> a checked config, or every problem with it at once.

In: words. Out: frozen dataclasses of `config`, whose values go together. One module, because these checks see all values together.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from bertdist.core.config import (
    DURATION,
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PredictConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from bertdist.core.errors import ConfigError, did_you_mean

# Words that users bring from elsewhere and that are not here under another spelling: what to write instead.
_ELSEWHERE = {
    "per_device_train_batch_size": "--train_batch_size counts the rows of a step over all devices",
    "per_device_eval_batch_size": "scores do not depend on a batch size; --tokens_per_micro_batch bounds the memory",
    "gradient_accumulation_steps": "--train_batch_size is the whole step; --tokens_per_micro_batch cuts it to what fits",
    "pad_to_max_length": "nothing is padded; --max_length truncates",
    "max_seq_length": "the name is --max_length",
    "max_steps": "the name is --max_train_steps",
    "num_warmup_steps": "the name is --warmup_steps",
    "evaluation_strategy": "--eval_every takes '200 steps', '0.5 epochs', '10%' or 'never'",
    "eval_strategy": "--eval_every takes '200 steps', '0.5 epochs', '10%' or 'never'",
    "eval_steps": "--eval_every takes '200 steps'",
    "save_strategy": "--save_every takes '200 steps', '0.5 epochs', '10%' or 'never'",
    "save_steps": "--save_every takes '200 steps'",
    "checkpointing_steps": "--save_every takes '200 steps'",
    "logging_steps": "--log_every takes '50 steps'",
    "load_best_model_at_end": "the best weights are always in best/",
    "group_by_length": "nothing is padded, so there is nothing to group",
    "fp16": "--mixed_precision fp16",
    "bf16": "--mixed_precision bf16",
    "no_cuda": "the name is --use_cpu",
    "with_tracking": "--report_to names the trackers",
    "do_train": "train.py trains; python -m bertdist.predict predicts",
    "do_eval": "rows of --validation_file are always scored",
    "overwrite_output_dir": "choose another --output_dir, or remove the folder",
    "label_column_name": "the name is --label_column",
    "text_column_names": "the names are --text_column and --text_pair_column",
    "metric_name": "the name is --metrics",
    "lr": "the name is --learning_rate",
    "epochs": "the name is --num_train_epochs",
    "batch_size": "the name is --train_batch_size",
    "model": "the name is --model_name_or_path",
    "stream_split": "the name is --stream_sharding, by_row (was rows) or by_file (was files)",
    "test_file": "python -m bertdist.predict --model out/best --input test.tsv answers rows without labels",
    "do_predict": "python -m bertdist.predict --model out/best --input test.tsv answers rows without labels",
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = re.sub(
            r"^argument (--\w+)\S*: ", r"\1: ", message
        )  # without the spelling with hyphens
        raise ConfigError(f"{message}. --help says what each flag takes.")


def parse_arguments(program: str, sections: list[Any], words: Sequence[str]) -> tuple[Any, ...]:
    """Words -> one instance of each section, a dataclass with HfArg fields; `--config run.yaml` among them. Raises ConfigError."""
    parser = _Parser(sections, prog=program, allow_abbrev=False)
    parser.add_argument(
        "--config", help="YAML file with the same names as the flags; flags win over it."
    )
    known = [field.name for section in sections for field in dataclasses.fields(section)]
    file = parser.parse_known_args(list(words))[0].config
    if file:
        kinds: dict[str, Any] = {
            action.dest: action.type or str for action in parser._actions if action.nargs == "+"
        }
        scalars, lists = _words_of_file(Path(file), known, set(kinds))
        words = [*scalars, *words]
        for (
            name,
            items,
        ) in lists.items():  # as words, items that begin with a dash would be taken for flags
            try:
                parser.set_defaults(**{name: list(map(kinds[name], items))})
            except ValueError:
                raise ConfigError(
                    f"--config {file}: --{name} is {' '.join(items)!r}; expected numbers."
                ) from None
    *values, _, rest = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    unknown = [
        _unknown_word(word.split("=")[0].lstrip("-").replace("-", "_"), known)
        for word in rest
        if word.startswith("--")
    ]
    if rest and not unknown:
        unknown = [f"Unexpected word {rest[0]!r}: every value follows its flag."]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return tuple(values)


def names_given(words: Sequence[str]) -> set[str]:
    """The settings that words give, in the file of --config too; of one that cannot be read none, since `parse_arguments` says why."""
    given = [word.removeprefix("--").partition("=") for word in words]
    names = {
        name.replace("-", "_")
        for word, (name, _, _) in zip(words, given, strict=True)
        if word.startswith("--")
    }
    files = [
        value or word
        for (name, _, value), word in zip(given, [*words, ""][1:], strict=True)
        if name == "config"
    ]
    try:
        node = (
            yaml.compose(Path(files[-1]).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            if files
            else None
        )
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        node = None
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        names |= set() if _is_nothing(value) else {_name_of(key)}
    return names


def _name_of(key: Any) -> str:
    return str(key.value).lstrip("-").replace("-", "_")


def _is_nothing(value: Any) -> bool:
    return (
        isinstance(value, yaml.ScalarNode)
        and value.style is None
        and value.value in ("", "null", "~")
    )


def _unknown_word(name: str, known: Iterable[str], where: str = "") -> str:
    if name in _ELSEWHERE:
        return f"{where}Unknown setting {name!r}: {_ELSEWHERE[name]}."
    hint = did_you_mean(name, known)
    return f"{where}Unknown setting {name!r}.{hint if 'Did' in hint else ' --help lists them.'}"


def _words_of_file(
    path: Path, known: list[str], many: set[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """YAML -> the words that would say the same, and the lists by name. Scalars stay text: `no` is not False, `1e-4` is a number."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error}).") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return [], {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"--config {path}: expected lines of `name: value`.")
    words: list[str] = []
    lists: dict[str, list[str]] = {}
    problems, seen = [], set()
    for key, value in node.value:
        name, where = _name_of(key), f"{path} line {key.start_mark.line + 1}: "
        if name not in known:
            problems.append(_unknown_word(name, known, where))
        elif name in seen:
            problems.append(f"{where}{name!r} stands here a second time.")
        elif isinstance(value, yaml.ScalarNode):
            words += [] if _is_nothing(value) else [f"--{name}={value.value}"]
        elif isinstance(value, yaml.SequenceNode) and name not in many:
            problems.append(f"{where}{name!r} takes one value, not a list.")
        elif isinstance(value, yaml.SequenceNode) and all(
            isinstance(item, yaml.ScalarNode) for item in value.value
        ):
            lists |= {name: [item.value for item in value.value]} if value.value else {}
        else:
            problems.append(f"{where}{name!r} must be one value or a list of values.")
        seen.add(name)
    if problems:
        raise ConfigError("\n".join(problems))
    return words, lists


def read_config(words: Sequence[str]) -> TrainConfig:
    """`--config run.yaml --learning_rate 1e-5 ...` -> a checked TrainConfig; flags win over the file.

    Raises ConfigError with one line a problem: unknown words, values of the wrong kind, settings that contradict each other.
    """
    sections = [ModelConfig, DataConfig, TaskConfig, BatchConfig, OptimConfig, RunConfig]
    config = TrainConfig(
        **dict(
            zip(
                ("model", "data", "task", "batch", "optim", "run"),
                parse_arguments("train.py", sections, words),
                strict=True,
            )
        )
    )
    if problems := list(config_problems(config)):
        raise ConfigError("\n".join(problems))
    return config


def read_predict_config(words: Sequence[str]) -> PredictConfig:
    """The words of `python -m bertdist.predict`; raises ConfigError."""
    (config,) = parse_arguments("python -m bertdist.predict", [PredictConfig], words)
    assert isinstance(config, PredictConfig)
    problems = []
    if not config.model:
        problems.append("--model is missing: the folder of a trained classifier, such as out/best.")
    if (config.text is None) == (config.input is None):
        problems.append("Give the texts with --text or with --input, one of the two.")
    if config.output is not None and config.input is None:
        problems.append("--output goes with --input; answers to --text are printed.")
    if config.text_pair is not None and len(config.text_pair) != len(config.text or []):
        problems.append(
            f"--text_pair has {len(config.text_pair)} texts and --text has {len(config.text or [])}; they go together."
        )
    problems += _out_of_range(
        config, {"tokens_per_micro_batch": (1, None), "max_length": (3, None)}
    )
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _out_of_range(section: Any, bounds: dict[str, tuple[float, float | None]]) -> Iterable[str]:
    for name, (low, high) in bounds.items():
        value = getattr(section, name)
        if value is not None and not (
            low <= value <= (sys.float_info.max if high is None else high)
        ):
            expected = f"at least {low}" if high is None else f"from {low} to {high}"
            yield f"--{name} is {value}; expected {expected}."


def data_problems(data: DataConfig) -> Iterable[str]:
    """What is wrong with the words that name the rows, one line each."""
    sources = [
        f"--{name}" for name in ("train_file", "dataset_name", "task_name") if getattr(data, name)
    ]
    if not sources:
        yield "No training rows: give --train_file, or --dataset_name, or --task_name."
    if "--train_file" in sources and len(sources) > 1:
        yield f"{' and '.join(sources)} both name training rows; give one."
    yield from _stream_problems(data)
    if data.validation_file and not data.train_file:
        yield "--validation_file goes with --train_file; for hub data give --validation_split."
    if data.label_columns and len(set(data.label_columns)) < len(data.label_columns):
        yield f"--label_columns repeats a name: {' '.join(data.label_columns)}."
    if data.label_columns and (data.label_column or data.label_delimiter):
        yield "--label_columns stands instead of --label_column and --label_delimiter."
    yield from _out_of_range(
        data,
        {"max_train_samples": (1, None), "max_eval_samples": (1, None), "max_bad_rows": (0, None)},
    )
    if data.max_bad_rows != DataConfig.max_bad_rows and data.on_bad_row == "fail":
        yield "--max_bad_rows goes with --on_bad_row skip."


def config_problems(config: TrainConfig) -> Iterable[str]:
    """What the values do together that cannot be, one line each."""
    data, run, optim, task = config.data, config.run, config.optim, config.task
    if not config.model.model_name_or_path:
        yield "--model_name_or_path is missing: a model folder, or a name on the hub such as google-bert/bert-base-uncased."
    if not run.output_dir:
        yield "--output_dir is missing: the folder that the run writes to."
    yield from data_problems(data)
    yield from _out_of_range(config.model, {"max_length": (3, None), "dropout": (0, 1)})
    yield from _out_of_range(task, {"label_smoothing_factor": (0, 1)})
    yield from _out_of_range(
        config.batch,
        {
            "train_batch_size": (1, None),
            "tokens_per_micro_batch": (1, None),
            "dataloader_num_workers": (0, None),
        },
    )
    yield from _out_of_range(
        optim,
        {
            "learning_rate": (0, None),
            "weight_decay": (0, None),
            "adam_beta1": (0, 1),
            "adam_beta2": (0, 1),
            "adam_epsilon": (0, None),
        },
    )
    yield from _out_of_range(
        optim,
        {
            "max_grad_norm": (0, None),
            "warmup_ratio": (0, 1),
            "warmup_steps": (0, None),
            "layerwise_lr_decay": (0, 1),
        },
    )
    yield from _out_of_range(
        run,
        {
            "seed": (0, 2**32 - 1),
            "num_train_epochs": (0, None),
            "max_train_steps": (1, None),
            "save_total_limit": (2, None),
        },
    )
    yield from _out_of_range(
        run,
        {
            "early_stopping_patience": (1, None),
            "early_stopping_threshold": (0, None),
            "stop_before_time_limit": (0, None),
        },
    )
    yield from _out_of_range(run, {"rank_timeout": (1, None)})
    yield from _out_of_range(run, {"max_nan_steps": (0, None)})
    if run.max_nan_steps != RunConfig.max_nan_steps and run.on_nan == "stop":
        yield "--max_nan_steps goes with --on_nan skip."
    if run.detect_anomaly and run.cuda_graphs:
        yield "--detect_anomaly looks at every operation, and --cuda_graphs replays them unseen: leave one out."
    if run.num_train_epochs == 0:
        yield "--num_train_epochs is 0; expected more than 0."
    if optim.warmup_steps is not None and optim.warmup_ratio:
        yield "--warmup_steps and --warmup_ratio both name the warmup; give one."
    if optim.lr_scheduler_type == "constant" and (optim.warmup_ratio or optim.warmup_steps):
        yield "--lr_scheduler_type constant has no warmup; take constant_with_warmup."
    for name in ("eval_every", "save_every", "log_every"):
        value = getattr(run, name)
        if value.strip() != "never" and not DURATION.fullmatch(value):
            hint = f" Did you mean '{value.strip()} steps'?" if value.strip().isdigit() else ""
            yield f"--{name} is {value!r}; expected words such as '200 steps', '0.5 epochs', '10%' or 'never'.{hint}"
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(optim, name) == 1:
            yield f"--{name} is 1; expected less than 1."
    yield from _idle(config)
    if run.early_stopping_patience and run.eval_every.strip() == "never":
        yield "--early_stopping_patience needs evaluations, and --eval_every is 'never'."
    if (
        task.class_weights
        and task.class_weights != ["balanced"]
        and not all(_is_weight(word) for word in task.class_weights)
    ):
        yield f"--class_weights is {' '.join(task.class_weights)!r}; expected 'balanced' or one number of at least 0 a label."


def _stream_problems(data: DataConfig) -> Iterable[str]:
    yield from _out_of_range(data, {"stream_window": (1, None)})
    if not data.streaming:
        given = {
            name: getattr(data, name) != getattr(DataConfig, name)
            for name in ("stream_window", "stream_sharding")
        }
        yield from (
            f"--{name} goes with --streaming." for name, is_given in given.items() if is_given
        )
    if data.stream_sharding == "by_file" and data.max_train_samples:
        yield "--max_train_samples takes the first rows of all, and with --stream_sharding by_file each rank has other files: leave one out."
    if data.train_weights is None:
        return
    if len(data.train_weights) != len(data.train_file or ()):
        yield f"--train_weights has {len(data.train_weights)} numbers for {len(data.train_file or ())} --train_file; one each."
    if not all(0 < weight < float("inf") for weight in data.train_weights):
        yield f"--train_weights is {' '.join(map(str, data.train_weights))}; expected numbers above 0."
    if data.stream_sharding == "by_file":
        yield "--train_weights goes with --stream_sharding by_row: with files each rank has other files."
    if data.streaming and data.max_train_samples:
        yield "--max_train_samples takes the first rows of all, and --train_weights mixes: leave one out."


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
        yield from (
            f"--{name} needs rows to score: give --validation_file."
            for name, value in given.items()
            if value
        )
    hub = {
        name: getattr(data, name) != getattr(DataConfig, name)
        for name in ("dataset_config_name", "train_split", "validation_split")
    }
    if data.train_file:
        yield from (
            f"--{name} is for data of the hub, and --train_file is a file."
            for name, value in hub.items()
            if value
        )
    if run.early_stopping_threshold and not run.early_stopping_patience:
        yield "--early_stopping_threshold goes with --early_stopping_patience."


def _is_weight(word: str) -> bool:
    try:
        return 0 <= float(word) < float("inf")
    except ValueError:
        return False
