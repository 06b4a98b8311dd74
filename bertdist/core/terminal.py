"""What a person sees, and the same numbers in files: metrics.jsonl, status.json. Rank 0 talks, the others are silent.

Everything goes to the screen through rich, as plain text: what comes from data or files is never read as markup.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bertdist.core.errors import BertdistError

Cell: TypeAlias = "str | Sequence[tuple[str, str]]"  # text, or parts of (text, style)

GROWING = ("metrics.jsonl", "bad_rows.jsonl")

_COMMANDS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def print_error(error: BertdistError) -> None:
    """Print an error's lines as a user should read them."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in str(error).splitlines():
        console.print(_plain(f"bertdist: {line}"))


def warn(line: str) -> None:
    """Print a line to standard error, from whatever process."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(_plain(line))


def show(*lines: str) -> None:
    """Print lines to standard output, wrapped to the terminal."""
    console = Console(highlight=False)
    for line in lines:
        console.print(_plain(line))


def show_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    right: Collection[int] = (),
    lines: bool = False,
) -> None:
    """Print a table to standard output. right: columns that are aligned to the right; lines: a rule between rows.

    A cell is text, or parts of text with a rich style each.
    """
    columns = [
        Column(_plain(name), justify="right" if at in right else "left", overflow="fold")
        for at, name in enumerate(header)
    ]
    table = Table(
        *columns,
        title=_plain(title),
        title_justify="left",
        box=HORIZONTALS,
        show_lines=lines,
        pad_edge=False,
    )
    for row in rows:
        cells = [[(cell, "")] if isinstance(cell, str) else cell for cell in row]
        table.add_row(
            *(
                Text.assemble(*((_plain(text).plain, style) for text, style in cell))
                for cell in cells
            )
        )
    Console(highlight=False).print(table)


def strip_control_characters(text: str) -> str:
    """The text, with a box in place of what a terminal would obey."""
    return text.translate(_COMMANDS)


def _plain(text: str) -> Text:
    """Text as it is: no markup, and what a terminal would obey (escape codes of a data file, say) is shown as a box."""
    return Text(strip_control_characters(text))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)
