"""A first pass over a stream, for what must be known before the first step: its labels, and how many rows it has.

In: a Stream. Out: a Survey, the same on all ranks, each of which reads some of the files. It is kept in the run's folder, so that going
on costs nothing; --label_names and --max_train_steps make it needless. A stop is answered within half a second, and leaves nothing.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from bertdist.columns import LabelKind, LabelValue
from bertdist.console import write_whole
from bertdist.errors import BertdistError, DataError
from bertdist.joined import as_kind, common_kind
from bertdist.pieces import BadRow, BadRows, checked
from bertdist.ranks import from_main, host_group, summed, together
from bertdist.records import Records
from bertdist.slurm import StopRequest
from bertdist.stream import Stream

SECONDS_BETWEEN = (
    0.5  # of reading, until the ranks ask each other whether to go on; a piece takes some 10 ms
)
END = object()


@dataclass
class Survey:
    """What one pass over some rows has found."""

    rows: dict[int, int] = field(default_factory=dict)  # number of the source -> its rows
    kind: LabelKind | None = None
    labels: dict[LabelValue, int] = field(default_factory=dict)  # label -> rows
    bad: list[BadRow] = field(default_factory=list)  # rows that were left out

    def add(self, source: int, found: Records) -> None:
        """Count some rows of a source. Raises DataError where their labels are of another kind than those before."""
        assert found.label_codes is not None
        counts = np.bincount(found.label_codes, minlength=len(found.label_values)).tolist()
        self._merge(
            found.label_kind, dict(zip(found.label_values, counts, strict=True)), found.where(0)
        )
        self.rows[source] = self.rows.get(source, 0) + len(found)

    def join(self, other: "Survey") -> None:
        """Add what another rank has found."""
        if other.kind is not None:
            self._merge(other.kind, other.labels, "another file")
        self.rows |= other.rows
        self.bad += other.bad

    def _merge(self, kind: LabelKind | None, labels: dict[LabelValue, int], where: str) -> None:
        common = (
            kind if self.kind is None else common_kind(self.kind, self.labels, kind, labels, where)
        )
        held: dict[LabelValue, int] = {}
        if common == self.kind:
            held, self.labels = self.labels, {}
        for value, count in [*self.labels.items(), *labels.items()]:
            value = as_kind(common, value)
            held[value] = held.get(value, 0) + count
        self.kind, self.labels = common, held


def survey(
    stream: Stream, accelerator: Accelerator, kept: Path, stop: StopRequest | None = None
) -> Survey | None:
    """Of the whole stream: what an earlier start has kept, else by reading; None on all ranks where `stop` was asked for meanwhile.

    A collective. Raises DataError on all ranks.
    """
    known, fingerprint = None, ""
    with together(accelerator):
        if accelerator.is_main_process:
            fingerprint = stream.fingerprint
            known = _read(kept, fingerprint)
    known = from_main(accelerator, known)
    if known is not None:
        return known
    mine = Survey()
    with together(accelerator):
        if not _read_on(
            _pieces(stream, mine, accelerator.process_index, accelerator.num_processes),
            accelerator,
            stop,
        ):
            return None
    whole = Survey()
    with_all: list[Survey] = [mine] if accelerator.num_processes == 1 else gather_object([mine])
    with together(accelerator):
        for found in with_all:
            whole.join(found)
        if not sum(whole.rows.values()):
            raise DataError(f"{stream.name} has no rows.")
        if accelerator.is_main_process:
            text = {
                "fingerprint": fingerprint,
                **asdict(whole),
                "labels": list(whole.labels.items()),
            }
            write_whole(kept, json.dumps(text, indent=1).encode())
    return whole


def _pieces(stream: Stream, mine: Survey, rank: int, ranks: int) -> Iterator[None]:
    """Read this rank's share, a piece at a time."""
    left_out = BadRows(stream.on_bad_row, stream.max_bad_rows)
    if stream.limit is not None:
        for window in stream.windows() if rank == 0 else ():
            left_out.add(window.bad)
            if len(window.records):
                mine.add(0, window.records)
            yield
    else:
        for number, source in enumerate(stream.sources[rank::ranks]):
            mine.rows[rank + number * ranks] = 0
            for _, records, bad in stream.records(source):
                left_out.add(bad)
                if len(records):
                    mine.add(rank + number * ranks, records)
                yield
    mine.bad = left_out.rows


def _read_on(pieces: Iterator[None], accelerator: Accelerator, stop: StopRequest | None) -> bool:
    """Whether all ranks came to their end; the ranks ask each other every half second. Raises the error of this rank's reading, if any."""
    group, going = host_group(accelerator), True
    error: BertdistError | None = None

    def asked() -> bool:
        return stop is not None and stop.asked()

    while True:
        until = time.monotonic() + SECONDS_BETWEEN
        try:
            while going and not asked() and time.monotonic() < until:
                going = next(pieces, END) is None
        except BertdistError as found:
            error = found
        stops, errors, still = summed(
            accelerator, [int(asked()), int(error is not None), int(going)], group
        )
        if error is not None:
            raise error
        if stops or errors or not still:
            return not stops


def _read(kept: Path, fingerprint: str) -> Survey | None:
    """What an earlier start has found of the same data."""
    try:
        text = json.loads(kept.read_text())
        if text["fingerprint"] != fingerprint:
            return None
        labels = {
            tuple(value) if isinstance(value, list) else value: int(count)
            for value, count in text["labels"]
        }
        rows = {int(source): int(count) for source, count in text["rows"].items()}
        if text["kind"] not in get_args(LabelKind):
            return None
        return Survey(
            rows=rows,
            kind=text["kind"],
            labels=labels,
            bad=[checked(BadRow(*row)) for row in text["bad"]],
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ):
        return None
