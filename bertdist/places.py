"""Where rows stand, in words: `dev.tsv line 12`, through all that joins, cuts and leaves out rows."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Named(Protocol):
    """What rows come from."""

    @property
    def name(self) -> str: ...
    @property
    def has_header(self) -> bool: ...


class Source(Named, Protocol):
    """Where rows come from, in words."""

    def where(self, row: int) -> str: ...


@dataclass(frozen=True)
class Split:
    """A split of a data set of the hub."""

    name: str
    has_header: bool = False

    def where(self, row: int) -> str:
        return f"{self.name} row {row}"


@dataclass(frozen=True)
class Placed:
    """Rows of one source or of several, one behind the other, each where it stood."""

    name: str
    has_header: bool
    runs: tuple[
        tuple[int, Callable[[int], str], int], ...
    ]  # (its first row here, where, its first row there), in order
    form: Any = None  # of one whole file: how it is written (text_files.Form)

    def where(self, row: int) -> str:
        first, where, there = self.runs[bisect_right(self.runs, row, key=lambda run: run[0]) - 1]
        return where(row - first + there)


@dataclass(frozen=True)
class Kept:
    """Where rows stand from which some were left out."""

    before: Callable[[int], str]
    rows: npt.NDArray[np.int64]  # (rows that are left,) their numbers before

    def __call__(self, row: int) -> str:
        return self.before(int(self.rows[row]))
