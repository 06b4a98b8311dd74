"""Errors that a user can cause and fix; our own mistakes stay assertions.

BertdistError
  ConfigError       an unknown flag, an impossible value, contradicting settings, a wrong launch
  DataError         a missing file or column, an unknown label, invalid bytes, an empty split
    RowError          one row, which --on_bad_row skip would leave out
    NoLabelsError     rows without labels, which training and evaluation need
    NoRowsError       a file without a row: an error of training, an empty answer of prediction
  ModelError        a model folder or name that cannot be loaded, or does not fit the task
  CheckpointError   nothing complete to resume from, or a checkpoint of another run
  RankLost          another rank has died, or all ranks wait for each other
  NonFiniteError    a loss or gradient that is NaN or infinite

A message is one line per problem: what is wrong, where (file, line), what was expected, what to do.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import NamedTuple

MOST_LISTED = 8  # names in a message


class BertdistError(Exception):
    """Printed without a traceback, as `bertdist: <message>`; the exit code is 1."""

    on_all_ranks = False  # True: every rank raises it, and only rank 0 prints it
    already_printed = False  # True: another rank has printed it


class ConfigError(BertdistError):
    """The flags, the config file or the launch do not make a run."""

    on_all_ranks = True  # all ranks read the same flags


class DataError(BertdistError):
    """Rows cannot be read as described."""


class RowError(DataError):
    """One row cannot be read as described; --on_bad_row skip would leave it out."""


class NoLabelsError(DataError):
    """Rows have no labels, and training or evaluation needs them."""


class NoRowsError(DataError):
    """A file has no rows."""


class RowLocation(NamedTuple):
    """A row's file and line. str: `dev.tsv line 12`, or `x.parquet row 7` without lines."""

    file: str
    line: int | None = None  # where the row starts, from 1
    row: int | None = None  # from 0, where there are no lines

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.file} row {self.row}"
        return f"{self.file} line {self.line}"


class ModelError(BertdistError):
    """A model or its tokenizer cannot be loaded, or does not fit the task."""


class CheckpointError(BertdistError):
    """A checkpoint is damaged, missing, or belongs to another run."""


class RankLost(BertdistError):
    """Another rank has died, or does not reach the collective that the others wait in."""


class NonFiniteError(BertdistError):
    """A step's loss or gradient is NaN or infinite, and --on_nan does not allow it."""


def nearest_name(name: str, candidates: list[str], cutoff: float = 0.6) -> str | None:
    """The candidate that an unknown name most resembles, None if it resembles none.

    cutoff: least similarity, of 1 for equal names.
    """
    near = get_close_matches(name, candidates, n=1, cutoff=cutoff)
    near = near or get_close_matches(name.lower(), candidates, n=1, cutoff=cutoff)
    return near[0] if near else None


def nearest_first(name: str, candidates: Iterable[str]) -> list[str]:
    """The candidates, those that resemble the name most first."""

    def similarity(candidate: str) -> float:
        return SequenceMatcher(None, name.lower(), candidate.lower()).ratio()

    return sorted(candidates, key=similarity, reverse=True)


def listed(items: Sequence[str], most: int = MOST_LISTED) -> str:
    """The first items with commas between them, and "..." where there are more."""
    return ", ".join([*items[:most], *(["..."] if len(items) > most else [])])


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest candidate, else some of them, of
    many the nearest ones.

    Long names are shown in part, but for paths.
    """
    most = 4096 if "/" in name else 60
    shown = (name if len(name) <= most else f"{name[:most]}..." for name in candidates)
    names = list(dict.fromkeys(shown))
    if near := nearest_name(name[:most], names):
        return f" Did you mean {near!r}?"
    if len(names) > MOST_LISTED:
        names = nearest_first(name[:most], names)
    return f" Known: {listed(list(map(repr, names)))}." if names else ""


def did_you_mean_path(path: str, is_folder: bool = False) -> str:
    """The end of a message about a missing path: the one that it resembles; "" if none does.

    The first part of it that does not exist is compared with the names beside it. is_folder: only
    a folder can be meant.
    """
    given = Path(path)
    part = next((x for x in (*reversed(given.parents), given) if not x.exists()), None)
    if part is None:
        return ""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(x for x in os.listdir(part.parent) if x[0] != "." or part.name[0] == ".")
    if is_folder or part != given:
        names = [name for name in names if (part.parent / name).is_dir()]
    elif part.suffix:
        names = [name for name in names if not (part.parent / name).is_dir()]
    if not (near := nearest_name(part.name, names)):
        return ""
    found = part.parent / near
    whole = found / given.relative_to(part)
    return f" Did you mean {str(whole if whole.exists() else found)!r}?"
