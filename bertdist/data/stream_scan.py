"""A first pass over a stream that counts its labels and rows, for stats.py.

Each rank reads some of the files. The result is the same on all ranks, and stored in the run folder
(survey.json), so that a resumed run need not read again. A stop request takes effect within half a
second, and writes no file.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from accelerate import Accelerator

from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import BertdistError, DataError
from bertdist.data.bad_rows import BadRow, BadRows, validated
from bertdist.data.records import Records, check_same_kind
from bertdist.data.streaming import Stream
from bertdist.distributed.collectives import (
    all_reduce_sum,
    broadcast_from_rank0,
    gather_from_all_ranks,
    host_group,
    raise_on_all_ranks,
)
from bertdist.distributed.preemption import StopSignal
from bertdist.tasks.labels import LabelKind, LabelValue, is_number, non_numeric_labels

# Reading time between two collectives about stopping; a chunk takes some 10 ms.
SECONDS_BETWEEN_CHECKS = 0.5
MOST_LOCATIONS = 1_000  # labels whose first row is remembered, and labels of a file
MOST_NUMBERS = 100  # the same of numbers


@dataclass
class StreamScan:
    """The result of a pass over some rows. The fields are the keys of survey.json."""

    rows: dict[int, int] = field(default_factory=dict)  # index of a source -> number of rows
    kind: LabelKind | None = None
    labels: dict[LabelValue, int] = field(default_factory=dict)  # label -> rows
    # Label -> file and line of its first row, for messages; of numbers only the first ones.
    first: dict[LabelValue, str] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    numbers_only: bool = False  # see columns.LabelRules
    # Index of a source -> its distinct labels; not with --max_train_samples.
    of_file: dict[int, list[LabelValue]] = field(default_factory=dict)

    def add(self, source: int, records: Records) -> None:
        """Count some rows of a source. Raises DataError if kinds of labels are mixed."""
        assert records.label_indices is not None
        if self.kind is not None:
            check_same_kind(self.kind, records.label_kind, str(records.location(0)))
        self.kind = records.label_kind
        counts = np.bincount(records.label_indices, minlength=len(records.label_values)).tolist()
        for code, (value, count) in enumerate(zip(records.label_values, counts, strict=True)):
            if not count:  # of a row that --max_train_samples leaves out, or that is held out
                if records.all_labels:
                    self.labels.setdefault(value, 0)
                continue
            is_name = isinstance(value, tuple) or not is_number(value)
            is_shown = is_name or len(self.labels) < MOST_NUMBERS
            if is_shown and value not in self.labels and len(self.first) < MOST_LOCATIONS:
                row = int(np.argmax(records.label_indices == code))
                self.first[value] = str(records.location(row))
            self.labels[value] = self.labels.get(value, 0) + count
        self.rows[source] = self.rows.get(source, 0) + len(records)

    def merge(self, other: "StreamScan") -> None:
        """Add the result of another rank."""
        if other.kind is not None and self.kind is not None:
            check_same_kind(self.kind, other.kind, "another file")
        self.kind = self.kind or other.kind
        for value, count in other.labels.items():
            self.labels[value] = self.labels.get(value, 0) + count
        self.first = {**other.first, **self.first}
        self.rows |= other.rows
        self.of_file |= other.of_file
        self.bad += other.bad


def scan_stream(
    stream: Stream,
    accelerator: Accelerator,
    path: Path,
    stop: StopSignal | None = None,
    undecided: bool = False,
) -> StreamScan | None:
    """The scan of a stream: from `path` if it is there, else by reading.

    undecided: where nearly all labels are numbers, read again, and skip the rows of the others.
    A collective. Returns None on all ranks if `stop` was requested. Raises DataError on all ranks.
    """
    stored, fingerprint = None, ""
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            settings = (stream.on_bad_row, stream.rules, undecided)
            fingerprint = f"{stream.fingerprint} {settings}"
            stored = _read_scan(path, fingerprint)
    stored = broadcast_from_rank0(accelerator, stored)
    if stored is not None:
        return stored
    total = _read_stream(stream, accelerator, stop)
    if (
        total is not None
        and undecided
        and total.kind == "text"
        and non_numeric_labels(total.labels)
    ):
        stream = replace(stream, rules=stream.rules._replace(numbers_only=True))
        total = _read_stream(stream, accelerator, stop)
    if total is None:
        return None
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            content = {"fingerprint": fingerprint, **asdict(total)}
            content["labels"] = list(total.labels.items())
            content["first"] = list(total.first.items())
            atomic_write(path, json.dumps(content, indent=1).encode())
    return total


def _read_stream(
    stream: Stream, accelerator: Accelerator, stop: StopSignal | None
) -> StreamScan | None:
    """The scan of a stream by reading; see `scan_stream`."""
    own = StreamScan()
    with raise_on_all_ranks(accelerator):
        chunks = _scan_chunks(stream, own, accelerator.process_index, accelerator.num_processes)
        if not _run_on_all_ranks(chunks, accelerator, stop):
            return None
    total = StreamScan()
    scans = gather_from_all_ranks(accelerator, [own])
    with raise_on_all_ranks(accelerator):
        for scan in scans:
            total.merge(scan)
        if not sum(total.rows.values()):
            raise DataError(f"{stream.name} has no rows.")
    total.numbers_only = stream.rules.numbers_only
    return total


def _scan_chunks(stream: Stream, scan: StreamScan, rank: int, ranks: int) -> Iterator[None]:
    """Read this rank's files into `scan`, one chunk per iteration."""
    bad_rows = BadRows(stream.on_bad_row, stream.max_bad_rows)
    if stream.limit is not None:
        for window in stream.windows() if rank == 0 else ():
            bad_rows.add(window.bad_rows)
            if len(window.records):
                scan.add(0, window.records)
            yield
    else:
        for number, source in list(enumerate(stream.sources))[rank::ranks]:
            scan.rows[number] = 0
            for _, records in stream.chunks(source):
                bad_rows.add(records.bad_rows)
                if len(records):
                    scan.add(number, records)
                    known = scan.of_file.get(number, [])
                    labels = list(dict.fromkeys((*known, *records.label_values)))
                    scan.of_file[number] = labels[:MOST_LOCATIONS]
                yield
    scan.bad = bad_rows.rows


def _run_on_all_ranks(
    chunks: Iterator[None], accelerator: Accelerator, stop: StopSignal | None
) -> bool:
    """Whether all ranks read their chunks to the end, not stopped. Raises this rank's error."""
    group, reading = host_group(accelerator), True
    end = object()
    error: BertdistError | None = None

    def stop_requested() -> bool:
        return stop is not None and stop.requested_locally()

    while True:
        until = time.monotonic() + SECONDS_BETWEEN_CHECKS
        try:
            while reading and not stop_requested() and time.monotonic() < until:
                reading = next(chunks, end) is None
        except BertdistError as raised:
            error = raised
        flags = [int(stop_requested()), int(error is not None), int(reading)]
        stops, errors, still_reading = all_reduce_sum(accelerator, flags, group)
        if error is not None:
            raise error
        if stops or errors or not still_reading:
            return not stops


def _read_scan(path: Path, fingerprint: str) -> StreamScan | None:
    """The stored scan of the same data, if there is one."""
    try:
        content = json.loads(path.read_text())
        if content["fingerprint"] != fingerprint or content["kind"] not in get_args(LabelKind):
            return None
        return StreamScan(
            rows={int(source): int(count) for source, count in content["rows"].items()},
            kind=content["kind"],
            labels={_as_label(value): int(count) for value, count in content["labels"]},
            first={_as_label(value): str(location) for value, location in content["first"]},
            bad=[validated(BadRow(*row)) for row in content["bad"]],
            numbers_only=bool(content["numbers_only"]),
            of_file={
                int(source): list(map(_as_label, labels))
                for source, labels in content["of_file"].items()
            },
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


def _as_label(value: Any) -> LabelValue:
    """A label, as read from JSON. Raises TypeError if it is none, as in an older file."""
    if isinstance(value, str):
        return value
    return tuple(map(str, value))
