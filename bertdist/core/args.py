"""Command line and YAML file -> checked config, or every problem with them at once.

    config = read_config(["--config", "run.yaml", "--learning_rate", "1e-5"])   # flags win

flags.py makes an argparse parser of the config; this module adds the YAML file (same names), "did
you mean" for unknown names, what to write instead of flags of other programs (other_flags.py), and
the checks of values that depend on each other. Nothing here imports torch or transformers.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import yaml

from bertdist.core import other_flags
from bertdist.core.atomic_io import read_json_object
from bertdist.core.config import (
    DURATION,
    BatchConfig,
    DataConfig,
    EvaluateConfig,
    FileConfig,
    LabelledConfig,
    ModelConfig,
    OptimConfig,
    PredictConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    freeze_depth,
    share_of,
)
from bertdist.core.errors import BertdistError, ConfigError, nearest_name
from bertdist.core.flags import (
    create_parser,
    flag_name,
    help_of_flag,
    help_request,
    help_text,
)
from bertdist.core.hub import hub_name_problem, model_folder
from bertdist.core.output_files import (
    STATUS,
    STDOUT,
    check_evaluation_folder,
    check_outputs,
    output_format,
)
from bertdist.core.terminal import (
    escape_unencodable,
    exit_with_error,
    print_to_stderr,
    process_rank,
)
from bertdist.core.thresholds import parse_threshold, parse_threshold_score

C = TypeVar("C")

EXIT_USAGE = 2  # of --help with a word that is no flag

_MODELS = ("model_name_or_path", "model", "tokenizer_name")
TRAIN_SECTIONS = [ModelConfig, DataConfig, TaskConfig, BatchConfig, OptimConfig, RunConfig]
_TRAIN_NAMES = {x.name for section in TRAIN_SECTIONS for x in dataclasses.fields(section)}
_TRAIN_ABOUT = """Fine-tune a BERT-family classifier; the same command resumes it after a stop.

  bertdist train --model_name_or_path google-bert/bert-base-uncased \\
      --train_file train.tsv --validation_file dev.tsv --output_dir out"""
_PREDICT_ABOUT = """Predict labels and probabilities with a trained model.

  bertdist predict --model out --text "A film to remember."
  bertdist predict --model out --input reviews.csv --output predictions.jsonl"""
_EVALUATE_ABOUT = """Evaluate a trained model on labelled rows: scores, intervals, errors.

  bertdist evaluate --model out --input test.tsv
  bertdist evaluate --model out --input test.tsv --metrics accuracy ece \\
      --output_dir test_scores"""
_WEIGHTS = (1e-10, 1e10)  # of labels: float32 holds the losses and the squares of gradients
_SURE = 0.7  # similarity of a flag that is suggested: below it, deepspeed resembles seed
_INPUTS = ("train_file", "validation_file", "test_file", "input", "config", *_MODELS)
_MAY_BE_EMPTY = ("text", "text_pair")  # an empty text is a text
_MOST_SEEDS = 100
IS_EMPTY = "has an empty value: give one, or leave the flag out (is a shell variable unset?)."
DROPPED = ".dropped.jsonl"  # after the name of the file of check's --fix
_NOT_A_FOLDER = ("latest", "last", "newest", "auto", "best", "true", "false", "yes", "no", "none")
_VALUE_HINTS = {  # for a value of another type
    "--warmup_steps": "--warmup_ratio 0.1 is the warmup as a share of all steps.",
    "--train_batch_size": "It is rows per step over all devices.",
    "--mixed_precision": "It takes no, bf16, fp16 or auto.",
}

_FREEZE_HINTS = dict.fromkeys(  # of --freeze
    ("all", "backbone", "base", "base_model", "bert", "body", "model", "true", "yes"), "encoder"
)
_NOT_FROZEN = ("0", "none", "no", "false", "head", "classifier")

_Bounds = Mapping[str, tuple[float, float | None]]  # setting -> (lowest, highest)
_BOUNDS: list[tuple[str, _Bounds]] = [  # by section of TrainConfig
    ("model", {"max_length": (3, None), "dropout": (0, 1)}),
    ("task", {"label_smoothing_factor": (0, 1)}),
    ("batch", {"train_batch_size": (1, None), "tokens_per_micro_batch": (1, None)}),
    ("batch", {"dataloader_num_workers": (0, None)}),
    ("optim", {"learning_rate": (0, None), "weight_decay": (0, None)}),
    ("optim", {"adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_epsilon": (0, None)}),
    ("optim", {"max_grad_norm": (0, None), "warmup_ratio": (0, 1), "warmup_steps": (0, None)}),
    ("optim", {"layerwise_lr_decay": (0, 1)}),
    ("run", {"seed": (0, 2**32 - 1), "max_train_steps": (1, None)}),
    ("run", {"save_total_limit": (2, None), "early_stopping_patience": (1, None)}),
    ("run", {"early_stopping_threshold": (0, None), "stop_before_time_limit": (0, None)}),
    ("run", {"rank_timeout": (1, None), "max_nan_steps": (0, None)}),
]


def parse_arguments(
    program: str,
    sections: list[Any],
    arguments: Sequence[str],
    about: str = "",
    lists: Mapping[str, list[str]] = MappingProxyType({}),
) -> tuple[Any, ...]:
    """Arguments, and the YAML file of --config among them -> one instance of each section.

    sections: dataclasses of `setting` fields. program, about: for --help, which prints and exits.
    lists: settings of several values, which win over the file. Raises ConfigError.
    """
    if request := help_request(arguments):
        _show_help(request, program, about, sections)
    parser = create_parser(sections, _VALUE_HINTS)
    names = [flag_name(field) for section in sections for field in dataclasses.fields(section)]
    file = parser.parse_known_args(list(arguments))[0].config
    if file == "":
        raise ConfigError(f"--config {IS_EMPTY}")
    file = file and os.path.expanduser(file)
    types: dict[str, Any] = {x.dest: x.type or str for x in parser._actions if x.nargs == "+"}
    sources = {"": dict(lists)}
    if file:
        scalars, from_file = _read_yaml(Path(file), names, set(types))
        arguments = [*scalars, *arguments]
        sources = {f"--config {file}: ": from_file} | sources
    # As defaults: as arguments, items that begin with a dash would be read as flags.
    for source, given in sources.items():
        for name, items in given.items():
            if name not in types:
                takes = "one value" if name in names else ""
                problem = (
                    f"--{name} takes {takes}, not a list."
                    if takes
                    else unknown_setting(f"--{name}", names)
                )
                raise ConfigError(f"{source}{problem}")
            try:
                parser.set_defaults(**{name: list(map(types[name], items))})
            except ValueError:
                problem = f"--{name} is {' '.join(items)!r}; expected numbers"
                raise ConfigError(f"{source}{problem}.") from None
    found, rest = parser.parse_known_args(list(arguments))
    values = []
    for section in sections:
        fields = dataclasses.fields(section)
        values.append(section(**{field.name: getattr(found, flag_name(field)) for field in fields}))
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    unknown = [unknown_setting(flag, names) for flag in flags]
    if rest and not unknown:
        unknown = [f"Unexpected argument {rest[0]!r}: every value follows its flag."]
    if problems := [*unknown, *_not_utf8(values), *_empty(values)]:
        raise ConfigError("\n".join(problems))
    values = [_with_model_folders(section) for section in values]
    _check_paths(values, file)
    return tuple(values)


def with_first_words(words: Sequence[str], name: str) -> list[str]:
    """`out out2 --explain 3` -> `--runs out out2 --explain 3`. Raises ConfigError."""
    number = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if number and any(word.split("=")[0] == f"--{name}" for word in words[number:]):
        raise ConfigError(f"{words[0]!r} stands before --{name}: give all of them in one place.")
    return [f"--{name}"] * bool(number) + list(words)


def _show_help(request: str, program: str, about: str, sections: list[Any]) -> NoReturn:
    """request: of `help_request`. Exits with 0, or 2 for a name that is no flag."""
    if request in ("usual", "all"):
        print(help_text(program, about, sections, request == "all"), flush=True)
        sys.exit(0)
    if text := help_of_flag(sections, request):
        print(text, flush=True)
        sys.exit(0)
    names = [flag_name(field) for section in sections for field in dataclasses.fields(section)]
    near = nearest_name(request.replace("-", "_"), names)
    hint = f" Did you mean {near!r}?" if near else ""
    print_to_stderr(
        f"bertdist: --help {request}: there is no such flag.{hint} Known: {program} --help, "
        "--help all, and --help with the name of a flag."
    )
    sys.exit(EXIT_USAGE)


def parse_or_exit(
    read: Callable[[Sequence[str]], C],
    check: Callable[[C], None],
    arguments: Sequence[str] | None = None,
) -> C:
    """The config of a command, or its mistakes on the terminal and exit code 1.

    read: `read_config` and the like. check: `data.preflight.check_evaluate` and the like; raises
    BertdistError. arguments: by default those of the command line.
    """
    escape_unencodable()
    try:
        _check_current_folder()
        config = read(sys.argv[1:] if arguments is None else arguments)
        check(config)
        return config
    except BertdistError as error:
        exit_with_error(error)


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError:  # torch's libraries need it too
        raise ConfigError("The current folder was deleted: change to another one (cd).") from None


def _check_paths(sections: list[Any], config_file: str | None) -> None:
    """Raise ConfigError for outputs that cannot be written or would replace an input."""
    given = {name: value for section in sections for name, value in vars(section).items()}
    given["config"] = config_file
    outputs = {
        f"--{name}": given[name]
        for name in ("output", "fix")
        if given.get(name) is not None and given[name] != STDOUT
    }
    if fix := given.get("fix"):
        outputs["the .dropped.jsonl of --fix"] = f"{fix}{DROPPED}"
    inputs = []
    for name in _INPUTS:
        files = given.get(name) or []
        inputs += [(f"--{name}", x) for x in ([files] if isinstance(files, str) else files)]
    for section in sections:
        if isinstance(section, EvaluateConfig) and section.output_dir is not None:
            check_evaluation_folder(Path(section.output_dir))
    check_outputs(outputs, inputs, given.get("output_dir"))
    present = [file for file in (fix, f"{fix}{DROPPED}") if os.path.isfile(file)] if fix else []
    if len(present) == 1:  # it writes both, and replaces both
        raise ConfigError(
            f"--fix {fix} would replace {present[0]}, which it did not write: name another file, "
            "or remove that one."
        )


def _with_model_folders(section: Any) -> Any:
    """The section with best/ for the folder of a run, which is said."""
    found = {}
    for name in _MODELS:
        given = getattr(section, name, None)
        if given and (folder := model_folder(given)) != given:
            found[name] = folder
            if process_rank() == 0:
                print_to_stderr(
                    f"--{name} {given} is the folder of a run: using {folder}{_progress_of(given)}."
                )
    return dataclasses.replace(section, **found)


def _progress_of(run: str) -> str:
    """Of a run that has not finished: of which step its best/ is."""
    folder = Path(run).expanduser()
    status = read_json_object(folder / STATUS)
    if status.get("state") in (None, "finished"):
        return ""
    metadata = read_json_object(folder / "best" / "config.json").get("bertdist")
    step = metadata.get("step") if isinstance(metadata, dict) else None
    of = f" of step {step}" if type(step) is int else ""
    return f"{of}; the run has not finished"


def _not_utf8(sections: Sequence[Any]) -> Iterable[str]:
    """Bytes of the command line that are not UTF-8 are lone surrogates in Python, which Arrow,
    safetensors and tokenizers refuse, each in its own way.
    """
    for section in sections:
        for name, value in vars(section).items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and re.search("[\ud800-\udfff]", item):
                    yield f"--{name} {item!a} is not UTF-8: rename it, or use a UTF-8 locale."


def _empty(sections: Sequence[Any]) -> Iterable[str]:
    """A path "" would be the current folder, and other settings would be as if not given."""
    for section in sections:
        for name, value in vars(section).items():
            is_given = value != getattr(type(section), name) and name not in _MAY_BE_EMPTY
            if is_given and "" in (value if isinstance(value, list) else [value]):
                yield f"--{name} {IS_EMPTY}"


def given_setting_names(arguments: Sequence[str]) -> set[str]:
    """Names of the settings in the arguments and in the file of --config, before they are parsed.

    A file that cannot be read gives none; `parse_arguments` says why.
    """
    names, file = set(), None
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--"):
            flag, _, value = argument.removeprefix("--").partition("=")
            names.add(flag.replace("-", "_"))
            file = (value or following) if flag == "config" else file
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8") if file is not None else ""
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return names
    entries = node.value if isinstance(node, yaml.MappingNode) else ()
    return names | {_name(key) for key, value in entries if not _is_null(value)}


def _name(key: Any) -> str:
    return str(key.value).lstrip("-").replace("-", "_")


def _is_null(node: Any) -> bool:
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return is_plain and node.value in ("", "null", "~")


def unknown_setting(given: str, names: list[str], where: str = "") -> str:
    """The message about it. given: a flag as it was typed, `--max-lenght`, or a name of a file,
    `max_lenght`.
    """
    is_flag = given.startswith("--")
    name, shown = given.lstrip("-").replace("-", "_"), given if is_flag else repr(given)
    if found := other_flags.answer(name, names, _TRAIN_NAMES):
        return f"{where}Unknown setting {shown}: {found}."
    near = nearest_name(name, names, _SURE)
    nearest = f"--{near}" if is_flag else repr(near)
    hint = f"Did you mean {nearest}?" if near else "--help lists them."
    return f"{where}Unknown setting {shown}. {hint}"


def _read_yaml(
    path: Path, names: list[str], list_names: set[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """A YAML file -> the flags that mean the same, and the lists by name.

    Scalars stay text: `no` is not False, and `1e-4` is a number.
    """
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
    flags: list[str] = []
    lists: dict[str, list[str]] = {}
    problems, seen = [], set()
    for key, value in node.value:
        name, where = _name(key), f"{path} line {key.start_mark.line + 1}: "
        items = value.value if isinstance(value, yaml.SequenceNode) else None
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{where}expected the name of a setting, not a list or mapping.")
        elif name not in names:
            problems.append(unknown_setting(name, names, where))
        elif name in seen:
            problems.append(f"{where}{name!r} is given a second time.")
        elif isinstance(value, yaml.ScalarNode):
            flags += [] if _is_null(value) else [f"--{name}={value.value}"]
        elif items is not None and name not in list_names:
            problems.append(f"{where}{name!r} takes one value, not a list.")
        elif items is not None and all(isinstance(item, yaml.ScalarNode) for item in items):
            lists |= {name: [item.value for item in items]} if items else {}
        else:
            problems.append(f"{where}{name!r} must be one value or a list of values.")
        seen.add(name)
    if problems:
        raise ConfigError("\n".join(problems))
    return flags, lists


def read_settings(settings: Mapping[str, Any]) -> TrainConfig:
    """Settings by name, as Python values -> a checked TrainConfig, as `read_config` from flags.

    None is the default. Raises ConfigError with one line per problem.
    """
    return read_config(*_as_arguments(settings))


def read_evaluate_settings(settings: Mapping[str, Any]) -> EvaluateConfig:
    """As `read_settings`, for `bertdist evaluate`."""
    return read_evaluate_config(*_as_arguments(settings))


def _as_arguments(settings: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Flags with one value, and the settings of several. Raises ConfigError."""
    arguments: list[str] = []
    lists: dict[str, list[str]] = {}
    for name, value in settings.items():
        if hasattr(value, "tolist"):  # numpy, pandas
            value = value.tolist()
        if name == "threshold" and isinstance(value, Mapping):
            value = [f"{label}={number}" for label, number in value.items()]
        if isinstance(value, set | frozenset | Mapping):
            kind = type(value).__name__
            raise ConfigError(f"--{name} is a {kind}; expected one value or a list.")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # for settings of whole numbers
        if isinstance(value, list | tuple):
            lists |= {name: list(map(str, value))} if value else {}
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments, lists


def read_config(
    arguments: Sequence[str], lists: Mapping[str, list[str]] = MappingProxyType({})
) -> TrainConfig:
    """`--config run.yaml --learning_rate 1e-5 ...` -> a checked TrainConfig; flags win.

    lists: settings of several values, by name, which win over the file too.
    Raises ConfigError with one line per problem.
    """
    values = parse_arguments("bertdist train", TRAIN_SECTIONS, arguments, _TRAIN_ABOUT, lists)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**dict(zip(names, values, strict=True)))
    if problems := list(config_problems(config)):
        raise ConfigError("\n".join(problems))
    return config


def read_predict_config(arguments: Sequence[str]) -> PredictConfig:
    """The arguments of `bertdist predict`. Raises ConfigError."""
    (config,) = parse_arguments("bertdist predict", [PredictConfig], arguments, _PREDICT_ABOUT)
    assert isinstance(config, PredictConfig)
    problems, num_texts = [], len(config.text or [])
    if not config.model:
        problems.append("--model is missing: the folder of a trained classifier, such as out/best.")
    if (config.text is None) == (config.input is None):
        problems.append("Give the texts with either --text or --input.")
    if config.input is None:
        for name in _changed(config, "output", "output_format", "keep_columns"):
            problems.append(f"--{name} needs --input; predictions for --text are printed.")
        for name in _changed(config, *(field.name for field in dataclasses.fields(FileConfig))):
            problems.append(f"--{name} is for the files of --input.")
    if output_format(config.output, config.output_format) is None:
        problems.append(
            f"--output {config.output}: expected the ending .jsonl, .csv, .tsv or .parquet, of "
            "text also .gz after it, or the format as --output_format."
        )
    if config.top_k is not None and config.top_k != "all":
        if not (config.top_k.isdecimal() and int(config.top_k)):
            problems.append(f"--top_k is {config.top_k}; expected a number from 1, or all.")
    elif config.top_k == "all" and config.threshold is not None:
        problems.append("--threshold cannot take effect where --top_k all gives every label.")
    if config.text_pair is not None and len(config.text_pair) != num_texts:
        problems.append(
            f"--text_pair has {len(config.text_pair)} texts and --text has {num_texts}; "
            "expected as many."
        )
    problems += _out_of_bounds(
        config,
        {"tokens_per_micro_batch": (1, None), "max_length": (3, None)},
    )
    problems += _problem_of(parse_threshold, config.threshold)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def read_evaluate_config(
    arguments: Sequence[str], lists: Mapping[str, list[str]] = MappingProxyType({})
) -> EvaluateConfig:
    """The arguments of `bertdist evaluate`. lists: see `read_config`. Raises ConfigError."""
    sections = [EvaluateConfig]
    (config,) = parse_arguments("bertdist evaluate", sections, arguments, _EVALUATE_ABOUT, lists)
    assert isinstance(config, EvaluateConfig)
    problems = []
    if not config.model:
        problems.append("--model is missing: the folder of a trained classifier, such as out.")
    hub = [f"--{x}" for x in ("dataset_name", "task_name") if getattr(config, x)]
    if not config.input and not hub:
        problems.append("No rows to evaluate: give --input, or --dataset_name and --split.")
    if config.input and hub:
        problems.append(f"--input and {hub[0]} both name rows; give one.")
    if hub and not config.split:
        problems.append(f"{hub[0]} needs --split, such as test.")
    if config.split and not hub:
        problems.append("--split is for data of the hub: give --dataset_name.")
    names = config.label_names or []
    if len(set(names)) < len(names):
        problems.append(f"--label_names repeats a name: {' '.join(names)}.")
    problems += _label_problems(config)
    problems += _problem_of(parse_threshold, config.threshold)
    bounds: _Bounds = {
        "tokens_per_micro_batch": (1, None),
        "max_eval_samples": (1, None),
        "max_length": (3, None),
        "max_bad_rows": (0, None),
    }
    problems += _out_of_bounds(config, bounds)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _problem_of(parse: Callable[[Any], Any], given: Any) -> list[str]:
    """What a parser says against a value."""
    try:
        parse(given)
    except ConfigError as error:
        return [str(error)]
    return []


def _out_of_bounds(section: Any, bounds: _Bounds) -> Iterable[str]:
    for name, (low, high) in bounds.items():
        value = getattr(section, name)
        # Not a number, and infinity, are out of bounds too.
        if value is not None and not low <= value <= (high or sys.float_info.max):
            expected = f"at least {low}" if high is None else f"from {low} to {high}"
            # 0 and -1 mean "no limit" elsewhere.
            is_unset = value <= 0 and getattr(type(section), name) is None
            hint = " Leave the flag out for its default." if is_unset and low == 1 else ""
            yield f"--{name} is {value}; expected {expected}.{hint}"


def _changed(section: Any, *names: str) -> list[str]:
    """The names whose values are not the defaults."""
    return [name for name in names if getattr(section, name) != getattr(type(section), name)]


def data_problems(data: DataConfig) -> Iterable[str]:
    """What is wrong with the settings of the rows, one line per problem."""
    sources = [f"--{x}" for x in ("train_file", "dataset_name", "task_name") if getattr(data, x)]
    if not sources:
        yield "No training rows: give --train_file, --dataset_name or --task_name."
    if "--train_file" in sources and len(sources) > 1:
        yield f"{' and '.join(sources)} both name training rows; give one."
    yield from _stream_problems(data)
    yield from _split_problems(data)
    if data.validation_file and not data.train_file:
        yield "--validation_file needs --train_file; for hub data give --validation_split."
    if data.test_file and not data.train_file:
        yield "--test_file needs --train_file; for hub data give --test_split."
    yield from _label_problems(data)
    scored = ("validation_file", "validation_split", "test_file", "test_split")
    if data.slice_column and data.train_file and not any(getattr(data, x) for x in scored):
        yield (
            "--slice_column divides rows to evaluate: give --validation_file, or a share as "
            "--validation_split."
        )
    yield from _out_of_bounds(
        data,
        {"max_train_samples": (1, None), "max_eval_samples": (1, None), "max_bad_rows": (0, None)},
    )
    yield from _out_of_bounds(data, {"split_seed": (0, 2**32 - 1)})
    if data.split_seed is not None and not (
        data.train_file and (data.validation_split or data.test_split)
    ):
        yield "--split_seed needs a share to hold out: --validation_split or --test_split."


def _label_problems(data: LabelledConfig) -> Iterable[str]:
    if data.label_columns and len(set(data.label_columns)) < len(data.label_columns):
        yield f"--label_columns repeats a name: {' '.join(data.label_columns)}."
    if data.label_columns and (data.label_column or data.label_delimiter):
        yield "--label_columns replaces --label_column and --label_delimiter; give one of them."
    if _changed(data, "max_bad_rows") and data.on_bad_row == "fail":
        yield "--max_bad_rows needs --on_bad_row skip."


def _split_problems(data: DataConfig) -> Iterable[str]:
    """--validation_split and --test_split: shares of files, names of splits of hub data."""
    shares = {}
    for name in ("validation_split", "test_split"):
        given = getattr(data, name)
        if given is None:
            continue
        share = shares[name] = share_of(given)
        if not data.train_file:
            if share is not None:
                yield (
                    f"--{name} {given}: a share is for --train_file; of hub data name a split, "
                    "such as 'train[90%:]' beside --train_split 'train[:90%]'."
                )
        elif share is None or not 0 < share < 1:
            yield (
                f"--{name} is {given!r}, and --train_file is a file; expected the share of its "
                "rows to hold out, above 0 and below 1, such as 0.1."
            )
        other = name.replace("_split", "_file")
        if data.train_file and getattr(data, other, None):
            yield f"--{name} and --{other} both name rows; give one."
    given_shares = [share or 0.0 for share in shares.values()]
    if all(0 < share < 1 for share in given_shares) and sum(given_shares) >= 1:
        yield "--validation_split and --test_split leave no training rows; expected less than 1."


def _stream_problems(data: DataConfig) -> Iterable[str]:
    yield from _out_of_bounds(data, {"stream_window": (1, None)})
    weights, num_files = data.train_weights, len(data.train_file or ())
    by_file = data.stream_sharding == "by_file"
    if not data.streaming:
        for name in _changed(data, "stream_window", "stream_sharding"):
            yield f"--{name} needs --streaming."
    if by_file and data.max_train_samples:
        yield (
            "--max_train_samples takes the first rows of all files, and with --stream_sharding "
            "by_file each rank reads other files: remove one of them."
        )
    if weights is None:
        return
    if len(weights) != num_files:
        yield f"--train_weights has {len(weights)} numbers for {num_files} --train_file; one each."
    if not all(0 < weight < float("inf") for weight in weights):
        yield f"--train_weights is {' '.join(map(str, weights))}; expected numbers above 0."
    if by_file:
        yield (
            "--train_weights needs --stream_sharding by_row: with by_file each rank reads other "
            "files."
        )
    if data.streaming and data.max_train_samples:
        yield (
            "--max_train_samples takes the first rows of all files, and --train_weights mixes "
            "them: remove one of them."
        )


def config_problems(config: TrainConfig) -> Iterable[str]:
    """What is wrong with the values and their combinations, one line per problem."""
    data, run, optim, task = config.data, config.run, config.optim, config.task
    if not config.model.model_name_or_path:
        yield (
            "--model_name_or_path is missing: a model folder, or a name on the hub such as "
            "google-bert/bert-base-uncased."
        )
    if not run.output_dir:
        yield "--output_dir is missing: the folder that the run writes to."
    yield from data_problems(data)
    yield from _freeze_problems(config.model)
    for section, bounds in _BOUNDS:
        yield from _out_of_bounds(getattr(config, section), bounds)
    if _changed(run, "max_nan_steps") and run.on_nan == "stop":
        yield "--max_nan_steps needs --on_nan skip."
    if run.detect_anomaly and run.cuda_graphs:
        yield "--detect_anomaly cannot see operations that --cuda_graphs replays: remove one."
    if not 0 < run.num_train_epochs <= sys.float_info.max:
        yield (
            f"--num_train_epochs is {run.num_train_epochs:g}; expected more than 0. "
            "--max_train_steps sets the length in steps."
        )
    resume = run.resume_from_checkpoint
    if resume is not None and resume.lower() in _NOT_A_FOLDER and not Path(resume).exists():
        yield (
            f"--resume_from_checkpoint is {resume!r}; it takes a folder. Without the flag the "
            "newest checkpoint of --output_dir is resumed, if there is one."
        )
    if optim.warmup_steps is not None and optim.warmup_ratio:
        yield "--warmup_steps and --warmup_ratio both name the warmup; give one."
    if optim.lr_scheduler_type == "constant" and (optim.warmup_ratio or optim.warmup_steps):
        yield "--lr_scheduler_type constant has no warmup; use constant_with_warmup."
    for name in ("eval_every", "save_every", "log_every"):
        value = getattr(run, name).strip()
        if problem := _duration_problem(value):
            yield f"--{name} is {value!r}; {problem}"
    below_one = {"adam_beta1": optim.adam_beta1, "adam_beta2": optim.adam_beta2}
    below_one |= {"dropout": config.model.dropout or 0.0}
    below_one |= {"label_smoothing_factor": task.label_smoothing_factor}
    for name, given in below_one.items():
        if given == 1:  # of the last two, nothing would be learned
            yield f"--{name} is 1; expected less than 1."
    if run.seeds is not None:
        yield from _seed_problems(config)
    if run.folds is None:
        yield from _without_effect(config)
    else:
        yield from _cross_validation_problems(config)
    if run.push_to_hub and (problem := hub_name_problem(run.push_to_hub)):
        yield f"--push_to_hub is {run.push_to_hub!r}; {problem}"
    elif run.push_to_hub and (run.folds or run.seeds):
        several = "--folds" if run.folds else "--seeds"
        yield f"--push_to_hub uploads one model, and {several} trains several: remove it."
    if run.early_stopping_patience and run.eval_every.strip() == "never":
        yield "--early_stopping_patience needs evaluations, and --eval_every is 'never'."
    yield from _problem_of(parse_threshold_score, task.threshold_for)
    if _changed(task, "threshold_for") and not task.tune_thresholds:
        yield "--threshold_for needs --tune_thresholds."
    weights = task.class_weights or ["balanced"]
    if weights != ["balanced"] and not all(map(_is_weight, weights)):
        yield (
            f"--class_weights is {' '.join(weights)!r}; expected 'balanced' or one number per "
            f"label: 0, or from {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}."
        )
    elif weights != ["balanced"] and not any(map(float, weights)):
        yield f"--class_weights is {' '.join(weights)!r}; without one above 0 nothing is learned."


def _freeze_problems(model: ModelConfig) -> Iterable[str]:
    for word in model.freeze or ():
        if freeze_depth(word) is None:
            near = _FREEZE_HINTS.get(word.lower()) or nearest_name(word, ["embeddings", "encoder"])
            hint = f" Did you mean {near!r}?" if near else ""
            if word.lower() in _NOT_FROZEN:
                hint = " The head is always trained; without the flag all weights are."
            yield (
                f"--freeze is {word!r}; expected embeddings, encoder (all but the head), or the "
                f"number of the first layers to freeze, from 1.{hint}"
            )


def _duration_problem(value: str) -> str:
    """What is wrong with a duration; "" if nothing is."""
    if value in ("never", "auto"):
        return ""
    found = DURATION.fullmatch(value)
    if found is None:
        return f"it {other_flags.INTERVAL}.{_duration_hint(value)}"
    number, unit = float(found[1]), found[2]
    if number == 0:
        return "expected more than 0, or 'never'."
    return "expected whole steps." if unit.startswith("step") and number % 1 else ""


def _duration_hint(value: str) -> str:
    """For `epoch`, `no` and `500`, as other programs have them."""
    if value.lower() in ("no", "none", "false", "off"):
        return " Did you mean 'never'?"
    meant = f"{value} steps" if value.isdigit() else f"1 {value}"
    return f" Did you mean {meant!r}?" if DURATION.fullmatch(meant) else ""


def fold_problems(folds: int) -> Iterable[str]:
    """What is wrong with --folds."""
    if folds < 2:
        yield f"--folds is {folds}; expected at least 2."


def _seed_problems(config: TrainConfig) -> Iterable[str]:
    """What is wrong with --seeds."""
    data, run = config.data, config.run
    seeds, given = run.seed_list, " ".join(map(str, run.seeds or []))
    if len(run.seeds or []) == 1:
        if not 2 <= int(given) <= _MOST_SEEDS:
            yield (
                f"--seeds is {given}; expected how many, from 2 to {_MOST_SEEDS}, or several "
                "seeds. A single run: --seed."
            )
    elif _changed(run, "seed"):
        yield f"--seed has no effect: --seeds {given} names the seeds; remove it."
    elif len(set(seeds)) < len(seeds):
        yield f"--seeds repeats a seed: {given}."
    if not all(0 <= seed < 2**32 for seed in seeds):
        yield f"--seeds is {given}: expected seeds from 0 to {2**32 - 1}."
    if run.folds is not None:
        yield "--seeds and --folds both name several runs; give one."
    scored = (data.validation_file, data.validation_split, data.test_file, data.test_split)
    if data.train_file and not any(scored):
        yield (
            "--seeds needs rows to compare the runs on: give --validation_file, or a share as "
            "--validation_split."
        )
    if run.resume_from_checkpoint:
        yield (
            "--resume_from_checkpoint is for one run; the run of each seed resumes its own newest "
            "checkpoint."
        )
    if run.dry_run:
        yield "--dry_run shows the plan of one run; give it the same flags without --seeds."


def _cross_validation_problems(config: TrainConfig) -> Iterable[str]:
    """Settings that have no effect on the runs of --folds."""
    data, run = config.data, config.run
    assert run.folds is not None
    yield from fold_problems(run.folds)
    names = _changed(data, "validation_file", "validation_split", "test_file", "test_split")
    for name in [*names, *_changed(data, "max_eval_samples", "slice_column")]:
        yield f"--{name} has no effect with --folds: each fold is scored in turn; remove it."
    once = "each fold is scored once, after the last step; remove it."
    names = _changed(run, "eval_every", "early_stopping_patience", "early_stopping_threshold")
    for name in [*names, *_changed(config.task, "metric_for_best_model")]:
        yield f"--{name} has no effect with --folds: {once}"
    for name in _changed(config.task, "calibrate", "tune_thresholds"):
        yield f"--{name} would be fitted on the rows that --folds scores: give it to a run."
    for name in _changed(data, "streaming", "train_weights"):
        yield f"--{name} has no effect with --folds: all rows are held in memory; remove it."
    if run.resume_from_checkpoint:
        yield (
            "--resume_from_checkpoint is for one run; each fold resumes its own newest checkpoint."
        )
    if run.dry_run:
        yield "--dry_run shows the plan of one run; give it the same flags without --folds."


def _without_effect(config: TrainConfig) -> Iterable[str]:
    """Settings that are given and cannot take effect."""
    data, run = config.data, config.run
    if data.train_file:
        if not (data.validation_file or data.validation_split):
            names = _changed(run, "early_stopping_patience", "eval_every")
            names += _changed(config.task, "metric_for_best_model")
            names += _changed(config.task, "calibrate", "tune_thresholds")
            names += _changed(data, "max_eval_samples")
            if not (data.test_file or data.test_split):
                names += _changed(config.task, "metrics", "positive_label")
            for name in names:
                yield (
                    f"--{name} needs rows to evaluate on: give --validation_file, or a share as "
                    "--validation_split."
                )
        for name in _changed(data, "dataset_config_name", "train_split"):
            yield f"--{name} is for data of the hub, and --train_file is a file."
    if run.early_stopping_threshold and not run.early_stopping_patience:
        yield "--early_stopping_threshold needs --early_stopping_patience."


def _is_weight(text: str) -> bool:
    try:
        return float(text) == 0 or _WEIGHTS[0] <= float(text) <= _WEIGHTS[1]
    except ValueError:
        return False
