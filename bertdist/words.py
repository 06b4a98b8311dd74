"""Words of a command line and of a YAML file -> values for the fields of dataclasses.

transformers' HfArgumentParser reads the words; this module adds the YAML file (same names, flags win over it), "did you mean" for
words that are not known, and what to write instead of words that users bring from elsewhere.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from bertdist.errors import ConfigError, did_you_mean

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
    "test_file": "python -m bertdist.predict --model out/best --input test.tsv answers rows without labels",
    "do_predict": "python -m bertdist.predict --model out/best --input test.tsv answers rows without labels",
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = re.sub(
            r"^argument (--\w+)\S*: ", r"\1: ", message
        )  # without the spelling with hyphens
        raise ConfigError(f"{message}. --help says what each flag takes.")


def read_words(program: str, sections: list[Any], words: Sequence[str]) -> tuple[Any, ...]:
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


def names_in(words: Sequence[str]) -> set[str]:
    """The settings that words give, in the file of --config too; of one that cannot be read none, since `read_words` says why."""
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
