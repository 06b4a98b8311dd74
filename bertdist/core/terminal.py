"""Lines, errors and tables on the terminal, printed with rich as plain text.

Text from data or files is never read as markup, and control characters are replaced, so that no
data file can send escape codes to a terminal. By convention only rank 0 prints: `process_rank()`.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias
from unicodedata import east_asian_width

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bertdist.core.errors import BertdistError

Cell: TypeAlias = "str | Sequence[tuple[str, str]]"  # text, or (text, rich style) pairs

EXCERPT_COLUMNS = 100

_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def process_rank() -> int:
    """The rank that the launcher gave this process, also before there is an Accelerator; else 0."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def print_error(error: BertdistError) -> None:
    """Print an error to standard error, each line as `bertdist: <line>`."""
    print_to_stderr(*(f"bertdist: {line}" for line in str(error).splitlines()))


def print_to_stderr(*lines: str) -> None:
    """Print lines to standard error, not wrapped."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(plain_text(line))


def show(*lines: str) -> None:
    """Print lines to standard output, wrapped to the terminal."""
    console = Console(highlight=False)
    for line in lines:
        console.print(plain_text(line))


def show_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    right: Collection[int] = (),
    lines: bool = False,
) -> None:
    """Print a table to standard output.

    right: indices of right-aligned columns; lines: a rule between rows.
    """
    columns = [
        Column(plain_text(name), justify="right" if i in right else "left", overflow="fold")
        for i, name in enumerate(header)
    ]
    table = Table(
        *columns,
        title=plain_text(title),
        title_justify="left",
        box=HORIZONTALS,
        show_lines=lines,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(*map(_styled, row))
    Console(highlight=False).print(table)


def _styled(cell: Cell) -> Text:
    parts = [(cell, "")] if isinstance(cell, str) else cell
    return Text.assemble(*((strip_control_characters(text), style) for text, style in parts))


def strip_control_characters(text: str) -> str:
    """The text with U+FFFD for each control character except newline and tab."""
    return text.translate(_CONTROL)


def plain_text(text: str) -> Text:
    """Text for rich without markup and without control characters."""
    return Text(strip_control_characters(text))


def excerpt(text: str, columns: int = EXCERPT_COLUMNS) -> str:
    """The beginning of a text as one printable line, other characters as Python escapes (`\\n`).

    columns: its width on a terminal, where a wide (East Asian) character takes two; "..." follows
    a text that was cut.
    """
    shown: list[str] = []
    for character in text:
        columns -= 2 if east_asian_width(character) in "WF" else 1
        if columns < 0:
            return "".join(shown) + "..."
        shown.append(character if character.isprintable() else repr(character)[1:-1])
    return "".join(shown)
