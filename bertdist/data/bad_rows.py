"""Rows that cannot be read as described (--on_bad_row, --max_bad_rows, bad_rows.jsonl).

A reader, or data/columns.py, finds a `BadRow`; `BadRows` raises an error at the first, or collects
those that --on_bad_row skip leaves out.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from bertdist.core.atomic_io import atomic_write
from bertdist.core.config import TrainConfig
from bertdist.core.errors import DataError, RowError, RowLocation

if TYPE_CHECKING:  # readers are imported before torch: core/args.py
    from accelerate import Accelerator

EXCERPT_CHARACTERS = 200

OnBadRow = Literal["fail", "skip"]


class BadRow(NamedTuple):
    """A row that cannot be read as described: a line of bad_rows.jsonl."""

    file: str  # or its location, for a row without line
    line: int | None  # where it starts, from 1; in parquet its row, from 0
    reason: str  # without the location: "3 fields, expected 2 as in the header; ..."
    text: str  # its first EXCERPT_CHARACTERS; what is not text is written as \\x81 or \\ud800

    @property
    def location(self) -> str:
        """`dev.tsv line 12`; `x.parquet row 7`."""
        if self.line is None:
            return self.file
        if self.file.endswith(".parquet"):
            return str(RowLocation(self.file, row=self.line))
        return str(RowLocation(self.file, self.line))

    @property
    def message(self) -> str:
        """The location and the reason, as a sentence."""
        end = "" if self.reason.endswith((".", "?")) else "."
        return f"{self.location}: {self.reason}{end}"


def escaped_excerpt(text: str) -> str:
    """The beginning of a row, with control characters and lone surrogates as escapes."""
    shown = text[:EXCERPT_CHARACTERS].rstrip("\r\n")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


@contextmanager
def suggest_skipping() -> Iterator[None]:
    """Add --on_bad_row skip to the message about a row; for training and checks."""
    try:
        yield
    except RowError as error:
        raise RowError(f"{error} --on_bad_row skip leaves such rows out.") from None


class BadRows:
    """Collects bad rows, each once even if read again, and fails when there are too many.

    on_bad_row "fail": a DataError at the first row; "skip": when there are more than
    `max_bad_rows`, after writing `path`, if given.
    """

    def __init__(
        self, on_bad_row: OnBadRow = "fail", max_bad_rows: int = 100, path: Path | None = None
    ) -> None:
        self.on_bad_row, self.max_bad_rows, self.path = on_bad_row, max_bad_rows, path
        # The text too: files of several folders may share a name.
        self._rows: dict[tuple[str, int | None, str], BadRow] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[BadRow]:
        """In the order in which they were added."""
        return list(self._rows.values())

    def add(self, rows: Iterable[BadRow]) -> None:
        """Raises DataError as described above."""
        for row in rows:
            if self.on_bad_row == "fail":
                raise DataError(row.message)
            self._rows.setdefault((row.file, row.line, row.text), row)
        if len(self._rows) > self.max_bad_rows:
            details = f"The last of them: {self.rows[self.max_bad_rows].message}"
            if self.path is not None:
                self.write()
                details = f"Their reasons are in {self.path}."
            raise DataError(
                f"More than {self.max_bad_rows} rows cannot be read (--max_bad_rows). {details}"
            )

    def add_and_write(self, rows: Sequence[BadRow]) -> None:
        """`add`, and `write` if there are any. Raises DataError, CheckpointError."""
        if rows:
            self.add(rows)
            self.write()

    def write(self) -> None:
        """Add the rows to `path` as JSON lines, atomically. Raises CheckpointError."""
        if self.path is None or not self._rows:
            return
        rows = {(row.file, row.line, row.text): row for row in read_bad_rows(self.path)}
        lines = [
            json.dumps(row._asdict(), ensure_ascii=False) for row in (rows | self._rows).values()
        ]
        atomic_write(self.path, "".join(f"{line}\n" for line in lines).encode())


def read_bad_rows(path: Path) -> list[BadRow]:
    """The rows of a bad_rows.jsonl, other lines ignored; empty if there is no such file."""
    rows: list[BadRow] = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                rows.append(validated(BadRow(**json.loads(line))))
    return rows


def validated(row: BadRow) -> BadRow:
    """The row, as read from a file. Raises TypeError if a field has another type."""
    are_texts = all(isinstance(value, str) for value in (row.file, row.reason, row.text))
    if not are_texts or not (row.line is None or type(row.line) is int):
        raise TypeError(f"not a bad row: {row!r}")
    return row


def collect_bad_rows(
    rows: Sequence[BadRow], config: TrainConfig, accelerator: "Accelerator"
) -> BadRows:
    """These rows of both splits and those of an earlier start; rank 0 writes them to
    bad_rows.jsonl.

    A file of a run without a checkpoint is removed: its rows are read again. Raises DataError if
    there are more than --max_bad_rows.
    """
    path = Path(config.run.output_dir) / "bad_rows.jsonl"
    own_path = path if accelerator.is_main_process else None
    bad_rows = BadRows(config.data.on_bad_row, config.data.max_bad_rows, own_path)
    resumes = any(path.parent.glob("checkpoints/step_*"))
    if own_path is not None and not resumes:
        path.unlink(missing_ok=True)
    if config.data.on_bad_row == "skip" and resumes:
        bad_rows.add(read_bad_rows(path))
    bad_rows.add_and_write(rows)
    return bad_rows


def record_bad_rows(bad_rows: BadRows, rows: Sequence[BadRow], accelerator: "Accelerator") -> None:
    """Add a stream's rows skipped before a step. Raises DataError on all ranks."""
    if rows:
        from bertdist.distributed.collectives import raise_on_all_ranks

        with raise_on_all_ranks(accelerator):
            bad_rows.add_and_write(rows)
