"""Rows that are read front to back, some at a time: what every such source gives, whatever stands behind it.

A source is a file or a data set of the hub; `stream.py` lays sources one behind the other and cuts them into windows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import pyarrow as pa

Column: TypeAlias = "pa.ChunkedArray | list[Any]"
Place: TypeAlias = dict[str, Any]  # JSON-able; where a reading can begin again


class BadRow(NamedTuple):
    """A row that was left out."""

    file: str
    line: int | None
    reason: str
    text: str


class Piece(NamedTuple):
    """Some whole rows of a source, in its order."""

    columns: dict[str, Column]  # the columns that were asked for, each `rows` long
    rows: int
    place: Place  # reading again from here begins with exactly this piece, bit for bit
    where: Callable[[int], str]  # row of this piece, from 0 -> "dev.tsv line 12"
    bad: tuple[BadRow, ...] = ()  # rows that stood among these and were left out (--on_bad_row skip)


class RowSource(Protocol):
    """Rows in one fixed order that can be read from front to back, and again from any place that a piece gave.

    It can be pickled, and opens nothing until it is read.
    """

    @property
    def name(self) -> str:
        """Short, for messages."""

    @property
    def has_header(self) -> bool:
        """Whether the first line holds the names of the columns."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data change; cheap, without reading the whole."""

    @property
    def bytes(self) -> int | None:
        """Size as stored, where it is known: for dealing files to ranks."""

    @property
    def features(self) -> Any:
        """datasets.Features of a data set of the hub, else None."""

    def column_names(self) -> list[str]:
        """The names of the columns."""

    def pieces(self, wanted: Sequence[str], place: Place | None = None) -> Iterator[Piece]:
        """The rows from a place on, else from the first."""
