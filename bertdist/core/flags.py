"""Config dataclasses -> flags of a command line, and their help.

    parser = create_parser([ModelConfig, DataConfig])    # argparse; its errors are ConfigErrors
    print(help_text("bertdist train", about, sections))  # the usual flags, or all of them

Only the standard library is imported: `--help` and mistakes are answered before torch is loaded.
"""

import argparse
import dataclasses
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, Union

from bertdist.core.errors import ConfigError

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_HELP_WIDTH = 100  # columns at most: longer lines are hard to read
_INDENT = 6  # of a flag's sentences
# What stands for a value in help: by the end of the flag's name, else by its type.
_VALUES_BY_NAME = {
    "_file": "FILE",
    "input": "FILE",
    "output": "FILE",
    "fix": "FILE",
    "config": "FILE",
    "_dir": "FOLDER",
    "folder": "FOLDER",
    "folders": "FOLDER",
    "model": "FOLDER",
    "_column": "COLUMN",
    "_columns": "COLUMN",
    "_path": "NAME",
}
_VALUES_BY_TYPE = {int: "N", float: "X", str: "TEXT"}
CONFIG_HELP = "YAML file with the same names as the flags; flags win over it."


class Flag(NamedTuple):
    """A field of a config, as a flag."""

    name: str
    type: Any  # of one value
    many: bool  # takes one value or more
    choices: tuple[str, ...]
    default: Any
    help: str
    brief: str

    @property
    def value(self) -> str:
        """What stands for its value in help."""
        if self.type is bool:
            return ""
        found = [x for end, x in _VALUES_BY_NAME.items() if self.name.endswith(end)]
        one = [*found, _VALUES_BY_TYPE[self.type]][0]
        one = "|".join(self.choices) if 0 < len("|".join(self.choices)) < 16 else one
        return f"{one} ..." if self.many else one


def flag_name(field: dataclasses.Field[Any]) -> str:
    """The name of its flag, and in YAML: `try` of the field try_, a word that Python reserves."""
    return field.name.rstrip("_")


def flags_of(section: Any) -> list[Flag]:
    """The flags of a config dataclass: fields of bool, int, float, str, Literal, lists, or None."""
    hints, flags = typing.get_type_hints(section), []
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if typing.get_origin(hint) in (Union, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        many = typing.get_origin(hint) is list
        if many:
            (hint,) = typing.get_args(hint)
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        texts = field.metadata["help"], field.metadata["brief"]
        kind = str if choices else hint
        flags.append(Flag(flag_name(field), kind, many, choices, field.default, *texts))
    return flags


class FlagParser(argparse.ArgumentParser):
    """Its errors are ConfigErrors."""

    hints: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        # "argument --max_length/--max-length: ..." -> "--max_length: ..."
        message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        hint = self.hints.get(message.split(":")[0], "--help says what each flag takes.")
        raise ConfigError(f"{message}. {hint}")


def create_parser(
    sections: Iterable[Any], hints: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """A parser of all fields of the sections, and --config.

    hints: flag -> what follows the message about a value of another type. Its errors are
    ConfigErrors.
    """
    parser = FlagParser(allow_abbrev=False, add_help=False)
    parser.hints = hints or {}
    for section in sections:
        group = parser.add_argument_group(section._argument_group_name)
        for flag in flags_of(section):
            names = dict.fromkeys([f"--{flag.name}", f"--{flag.name.replace('_', '-')}"])
            options: dict[str, Any] = {
                "default": flag.default,
                "help": flag.help.replace("%", "%%"),
            }
            options["type"] = _to_bool if flag.type is bool else flag.type
            if flag.type is bool:  # --use_cpu, --use_cpu no
                options |= {"nargs": "?", "const": True}
            if flag.choices:
                options["choices"] = flag.choices
            if flag.many:
                options["nargs"] = "+"
            group.add_argument(*names, **options)
    parser.add_argument("--config", help=CONFIG_HELP)
    return parser


def _to_bool(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"expected yes or no, got {text}")
    return text.lower() in _TRUE


def help_request(arguments: Sequence[str]) -> str | None:
    """None, "usual", "all", or a word that should be a flag: what --help (-h) asks for."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word in ("-h", "--help"):
            return "usual" if following in ("", "-h", "--help") else _topic(following)
        if word.startswith("--help="):
            return _topic(word.removeprefix("--help="))
    return None


def _topic(word: str) -> str:
    return "usual" if word.startswith("-") else word


def help_of_flag(sections: Iterable[Any], name: str) -> str:
    """`learning_rate` -> its sentences, as wide as the terminal; "" where there is no such flag."""
    name = name.replace("-", "_")
    flags = (flag for section in sections for flag in flags_of(section) if flag.name == name)
    return "\n".join(line for flag in flags for line in _full(flag, _width()))


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _HELP_WIDTH)


def help_text(program: str, about: str, sections: Sequence[Any], everything: bool) -> str:
    """The help of a command, as wide as the terminal."""
    width = _width()
    groups = {section._argument_group_name: _own_first(section) for section in sections}
    config = Flag(
        "config", str, False, (), None, CONFIG_HELP, "YAML file with flags as name: value"
    )
    groups["settings from a file"] = [config]
    number = sum(map(len, groups.values()))
    lines = [*_wrapped(about, width), ""]
    if everything:
        for group, flags in groups.items():
            lines += [f"{group}:", *(line for flag in flags for line in _full(flag, width)), ""]
        return "\n".join(lines[:-1])
    usual = [flag for flags in groups.values() for flag in flags if flag.brief]
    column = max(len(_head(flag)) for flag in usual) + 2
    lines += [f"{_head(flag):{column}}{flag.brief}" for flag in usual]
    if len(usual) < number:
        lines += ["", f"{program} --help all lists all {number} flags and their defaults;"]
        lines += ["--help NAME explains one of them."]
    return "\n".join(lines)


def _own_first(section: Any) -> list[Flag]:
    """The flags of a section, those that it shares with others last: the model and the rows, then
    the columns.
    """
    bases = filter(dataclasses.is_dataclass, section.__mro__[1:])
    shared = {field.name for base in bases for field in dataclasses.fields(base)}
    return sorted(flags_of(section), key=lambda flag: flag.name in shared)


def _head(flag: Flag) -> str:
    return f"  --{flag.name} {flag.value}".rstrip()


def _full(flag: Flag, width: int) -> list[str]:
    sentences = [flag.help]
    if flag.choices and "|".join(flag.choices) not in flag.value:
        sentences.append(f"One of: {', '.join(flag.choices)}.")
    if flag.default not in (None, "", False) and "Default:" not in flag.help:
        sentences.append(f"Default: {flag.default}.")
    text = " ".join(sentences)
    indent = " " * _INDENT
    return [
        _head(flag),
        *textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        ),
    ]


def _wrapped(about: str, width: int) -> list[str]:
    """Paragraphs; lines that begin with a blank (commands) stay as they are."""
    lines = []
    for line in about.split("\n"):
        lines += [line] if line[:1] in ("", " ") else textwrap.wrap(line, width)
    return lines
