"""A stream in steps: every row once an epoch, the same steps for all ranks, workers and micro-batches, and going on from any step."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import MemoryRows

from bertdist.core.config import DataConfig
from bertdist.core.errors import BertdistError, CheckpointError, ConfigError, DataError
from bertdist.data import streaming
from bertdist.data.bad_rows import BadRow
from bertdist.data.batch import RankStep
from bertdist.data.loader import create_train_loader
from bertdist.data.records import ColumnNames
from bertdist.data.sharding import WorkerItem
from bertdist.data.source import ReaderState
from bertdist.data.stats import DatasetStats
from bertdist.data.streaming import (
    AgreeOnStep,
    Stream,
    StreamLoader,
    agree_on_steps,
    assign_files_to_ranks,
)
from bertdist.tasks.labels import LabelStats
from bertdist.tasks.tasks import SingleLabel

pytestmark = [
    # Loader workers are forked, also where a test before this one has started threads (Python 3.12 warns of it).
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # Two workers on a machine with one core are slow, and that is all.
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
]
QUICK = settings(max_examples=25)
EPOCHS = 2
LENGTHS = (2, 5, 1, 1, 9, 3, 1, 4)  # words of the rows, which come again and again


class Words:
    """A tokenizer for texts such as `17 x x`: the first id of a row is its number in the data."""

    truncation_side = "right"

    def __call__(self, texts: Sequence[str], pairs: None, **settings: Any) -> dict[str, Any]:
        return {
            "input_ids": [
                [int(word) if word.isdigit() else 0 for word in text.split()][
                    : settings["max_length"]
                ]
                for text in texts
            ]
        }


def files_of(
    sizes: Sequence[int], pieces: tuple[int, ...] = (3, 0, 5), **changes: Any
) -> list[MemoryRows]:
    """Files of so many rows; all rows are numbered through."""
    files, first = [], 0
    for at, size in enumerate(sizes):
        rows = [
            {"text": f"{row}{' x' * (LENGTHS[row % 8] - 1)}", "label": ("no", "yes")[row % 2]}
            for row in range(first, first + size)
        ]
        files.append(MemoryRows(f"file {at}", rows, pieces, bytes=size, **changes))
        first += size
    return files


def batches_of(
    files: Sequence[MemoryRows],
    rank: int = 0,
    ranks: int = 1,
    *,
    size: int = 4,
    window: int = 8,
    split: str = "by_row",
    **changes: Any,
) -> StreamLoader:
    """What a run would make of the files. changes: of the StreamLoader."""
    config: Any = SimpleNamespace(
        batch=SimpleNamespace(
            train_batch_size=size, dataloader_num_workers=0, tokens_per_micro_batch=None
        ),
        run=SimpleNamespace(seed=5),
        model=SimpleNamespace(max_length=8),
        data=replace(DataConfig(), stream_sharding=split),
    )
    accelerator: Any = SimpleNamespace(
        process_index=rank, num_processes=ranks, device=SimpleNamespace(type="cpu")
    )
    asked = ColumnNames("text", None, "label", None)
    told: dict[str, Any] = {"label_delimiter": None, "on_bad_row": "skip", "max_bad_rows": 99}
    read = Stream(
        name="rows", source_groups=[files], columns=asked, window_rows=window, seed=5, **told
    )
    known = DatasetStats(
        LabelStats("text", ["no", "yes"], [1, 1], None, "label"), [len(file.rows) for file in files]
    )
    found = create_train_loader(
        read, known, Words(), SingleLabel(("no", "yes")), config, accelerator
    )  # type: ignore[arg-type]
    assert isinstance(found, StreamLoader)
    return replace(found, **changes)


def rows_of(step: RankStep) -> list[list[int]]:
    """The rows of each micro-batch by their numbers in the data; of an idle rank none."""
    batches = [
        [int(batch.ids[start]) for start in batch.cu_seqlens[:-1]] for batch in step.micro_batches
    ]
    counted = [[weight > 0 for weight in batch.weights] for batch in step.micro_batches]
    assert all(all(of) != step.idle for of in counted) and all(
        (batch.row_numbers < 0).all() == step.idle for batch in step.micro_batches
    )
    return [] if step.idle else batches


def content(step: RankStep) -> Any:
    """All that a run does with a step."""
    return (
        step.number,
        step.rows,
        step.idle,
        [
            (batch.ids.tolist(), batch.targets.tolist(), batch.row_numbers.tolist())
            for batch in step.micro_batches
        ],
        step.next_reader_state,
    )


def by_json(place: ReaderState | None) -> ReaderState | None:
    """A place as a checkpoint keeps it."""
    found: ReaderState | None = json.loads(json.dumps(place))
    return found


# ---- Loader workers without processes

_here = threading.local()


def as_the_loader_does(
    shares: Any, workers: int, pin: bool, *, lose: int | None = None
) -> Iterator[RankStep]:
    """`iterate_loader` with workers in this thread: torch's loader takes a message of each in turn, and passes over those that ended.

    lose: a message that does not arrive.
    """

    def told(iterator: Iterator[WorkerItem], worker: int) -> WorkerItem | None:
        _here.worker = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        try:
            return next(iterator, None)
        finally:
            _here.worker = None

    running = [(iter(shares), worker) for worker in range(workers or 1)]
    number = 0
    while running:
        for entry in list(running):
            message = told(*entry)
            if message is None:
                running.remove(entry)
                continue
            number += 1
            for step in message if number - 1 != lose else ():
                if isinstance(step, BertdistError):
                    raise step
                yield step


@contextmanager
def emulated(per_item: int = 1, lose: int | None = None) -> Iterator[None]:
    """Workers that are none, which send so many steps at once."""
    with (
        mock.patch.object(
            streaming, "iterate_loader", lambda *args: as_the_loader_does(*args, lose=lose)
        ),
        mock.patch.object(streaming, "get_worker_info", lambda: getattr(_here, "worker", None)),
        mock.patch.object(streaming, "steps_per_item", lambda *args: per_item),
    ):
        yield


# ---- Ranks that agree, without processes


class Agreement:
    """`agree_on_steps` among threads."""

    def __init__(self, ranks: int) -> None:
        self.told: list[RankStep | BertdistError | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=20)

    def of(self, rank: int) -> AgreeOnStep:
        def agree(step: RankStep | BertdistError | None) -> tuple[int, tuple[BadRow, ...]]:
            self.told[rank] = step
            self.barrier.wait()
            told = list(self.told)
            self.barrier.wait()  # nobody writes before all have read
            for found in told:
                if isinstance(found, BertdistError):
                    raise found
            steps = [found for found in told if isinstance(found, RankStep)]
            return sum(found.rows for found in steps), tuple(
                row for found in steps for row in found.bad_rows
            )

        return agree


def on_ranks(
    all_batches: Sequence[StreamLoader],
    start: int,
    stop: int,
    places: Sequence[ReaderState | None] | None = None,
) -> tuple[list[list[RankStep]], list[str]]:
    """The steps of each rank that reads files of its own, in lockstep; and what each rank ended with."""
    agreement = Agreement(len(all_batches))
    steps: list[list[RankStep]] = [[] for _ in all_batches]
    errors = [""] * len(all_batches)

    def run(rank: int) -> None:
        batches = replace(all_batches[rank], agree=agreement.of(rank))
        try:
            for step in batches.steps(start, stop, places[rank] if places else None):
                steps[rank].append(step)
        except Exception as error:
            errors[rank] = f"{type(error).__name__}: {error}"
            if not isinstance(error, BertdistError):
                agreement.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(all_batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return steps, errors


# ---- What is promised


def steps_of(by_rank: Sequence[Sequence[RankStep]]) -> list[list[int]]:
    """The rows of each step over all ranks, sorted; a row that came twice stands there twice."""
    assert len(set(map(len, by_rank))) == 1, [len(steps) for steps in by_rank]
    found = []
    for steps in zip(*by_rank, strict=True):
        rows = sorted(row for step in steps for batch in rows_of(step) for row in batch)
        assert {(step.number, step.rows) for step in steps} == {(steps[0].number, len(rows))}
        found.append(rows)
    return found


def assert_every_row_once(steps: Sequence[Sequence[int]], per_epoch: int, rows: int) -> None:
    assert len(steps) == per_epoch * EPOCHS
    for epoch in range(EPOCHS):
        assert sorted(
            row for step in steps[per_epoch * epoch : per_epoch * (epoch + 1)] for row in step
        ) == list(range(rows))


def assert_within(steps: Sequence[RankStep], tokens: int) -> None:
    assert all(
        sum(batch.lengths) <= tokens or len(batch.lengths) == 1
        for step in steps
        for batch in step.micro_batches
    )


SIZES = st.lists(st.integers(0, 28), min_size=1, max_size=7)  # rows of the files: 196 at most
PIECES = st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any).map(tuple)
GIVEN: dict[str, Any] = {
    "sizes": SIZES,
    "pieces": PIECES,
    "ranks": st.integers(1, 7),
    "workers": st.integers(0, 3),
    "per_item": st.integers(1, 4),
    "tokens": st.integers(1, 40),
    "size": st.integers(1, 20),
    "window": st.integers(1, 70),
    "data": st.data(),
}


# ---- --stream_sharding by_row


@QUICK
@given(**GIVEN)
def test_every_row_once_in_steps_that_know_neither_ranks_nor_workers(
    sizes: Any,
    pieces: Any,
    ranks: int,
    workers: int,
    per_item: int,
    tokens: int,
    size: int,
    window: int,
    data: st.DataObject,
) -> None:
    files, rows = files_of(sizes, pieces), sum(sizes)
    if not rows:
        with pytest.raises(DataError, match=r"^rows has no rows but"):
            batches_of(files)
        return
    alone = batches_of(files, size=size, window=window)
    per_epoch = alone.steps_per_epoch
    assert per_epoch == -(-rows // size)
    expected = steps_of([list(alone.steps(0, EPOCHS * per_epoch))])
    assert_every_row_once(expected, per_epoch, rows)
    assert [len(step) for step in expected[:per_epoch]] == [size] * (per_epoch - 1) + [
        rows - size * (per_epoch - 1)
    ]
    start = data.draw(st.integers(0, EPOCHS * per_epoch), "steps before the restart")
    other_workers = data.draw(st.integers(0, 3), "workers after it")
    with emulated(per_item):
        by_rank = []
        for rank in range(ranks):
            of_rank = batches_of(
                files,
                rank,
                ranks,
                size=size,
                window=window,
                tokens_per_micro_batch=tokens,
                workers=workers,
            )
            by_rank.append(list(of_rank.steps(0, EPOCHS * per_epoch)))
            assert_within(by_rank[-1], tokens)
            place = by_rank[-1][start - 1].next_reader_state if start else None
            again = replace(of_rank, workers=other_workers).steps(
                start, EPOCHS * per_epoch, by_json(place)
            )
            assert list(map(content, again)) == list(map(content, by_rank[-1][start:]))
    assert steps_of(by_rank) == expected
    assert all(
        [step.next_reader_state for step in steps]
        == [step.next_reader_state for step in by_rank[0]]
        for steps in by_rank
    ), "any rank's place is that of all"


def test_going_on_from_every_step_and_to_every_step() -> None:
    read = batches_of(files_of([7, 0, 11, 5]), size=4, window=8)
    steps = list(read.steps(0, 13))  # 6 an epoch
    for start in range(13):
        again = read.steps(
            start, 13, by_json(steps[start - 1].next_reader_state) if start else None
        )
        assert list(map(content, again)) == list(map(content, steps[start:]))
        assert list(map(content, read.steps(0, start))) == list(map(content, steps[:start]))
    assert list(read.steps(4, 4, steps[3].next_reader_state)) == []


def test_each_window_of_each_epoch_has_its_own_order() -> None:
    first_halves = steps_of([list(batches_of(files_of([32]), size=4, window=8).steps(0, 16))])[::2]
    assert [{row // 8 for row in half} for half in first_halves] == [
        {window} for window in (0, 1, 2, 3)
    ] * 2
    assert len({tuple(row % 8 for row in half) for half in first_halves}) > 4


def test_going_on_with_other_ranks_takes_the_same_rows() -> None:
    files = files_of([7, 11, 5])
    first = [list(batches_of(files, rank, 3).steps(0, 4)) for rank in range(3)]
    second = [
        list(batches_of(files, rank, 2).steps(4, 12, by_json(first[0][3].next_reader_state)))
        for rank in range(2)
    ]
    assert steps_of(first) + steps_of(second) == steps_of([list(batches_of(files).steps(0, 12))])


def test_a_place_that_skips_a_window_is_seen() -> None:
    read = batches_of(files_of([23]), size=4, window=8)
    steps = list(read.steps(0, 12))
    place = by_json(steps[1].next_reader_state)
    assert place is not None and place["window"]["window"] == 1 and place["step"] == 0
    assert steps_of([[*steps[:2], *read.steps(2, 12, place)]]) == steps_of([steps])
    skipped = {"window": next(iter(read.stream.windows(place["window"]))).next_state, "step": 0}
    with pytest.raises(AssertionError):
        assert_every_row_once(steps_of([[*steps[:2], *read.steps(2, 12, skipped)]]), 6, 23)
    repeated = {"window": place["window"], "step": 1}
    with pytest.raises(AssertionError):
        assert_every_row_once(steps_of([[*steps[:2], *read.steps(2, 12, repeated)]]), 6, 23)


def test_a_message_that_a_worker_loses_is_seen() -> None:
    read = batches_of(files_of([23]), size=4, workers=2)
    for lose in (None, 2):
        with emulated(per_item=2, lose=lose):
            steps = list(read.steps(0, 12))
        if lose is None:
            assert_every_row_once(steps_of([steps]), 6, 23)
        else:
            with pytest.raises(AssertionError):
                assert_every_row_once(steps_of([steps]), 6, 23)


def test_a_worker_that_takes_the_turn_of_another_is_seen() -> None:
    read = batches_of(files_of([23]), size=4, workers=2)
    with (
        emulated(),
        mock.patch.object(streaming, "get_worker_info", lambda: None),
        pytest.raises(AssertionError),
    ):
        assert_every_row_once(steps_of([list(read.steps(0, 12))]), 6, 23)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_mixture_goes_on_from_every_step_on_any_ranks(workers: int) -> None:
    small, large = files_of([5]), files_of([9, 21])
    plain = batches_of(small, tokens_per_micro_batch=20)
    mixed = replace(plain.stream, source_groups=[small, large], source_weights=(1.0, 2.0))
    of_ranks = [
        replace(plain, stream=mixed, rank=rank, ranks=3, workers=workers) for rank in range(3)
    ]
    with emulated(2):
        by_rank = [list(batches.steps(0, 20)) for batches in of_ranks]
        for start in range(1, 20):
            again = of_ranks[1].steps(start, 20, by_json(by_rank[0][start - 1].next_reader_state))
            assert list(map(content, again)) == list(map(content, by_rank[1][start:]))
    assert steps_of(by_rank) == steps_of([list(replace(plain, stream=mixed).steps(0, 20))])
    assert all(len(step) == 4 for step in steps_of(by_rank)), (
        "there is no end, so no step is smaller"
    )


@pytest.mark.parametrize(("workers", "per_item"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 50)])
def test_real_workers_send_what_emulated_ones_do(workers: int, per_item: int) -> None:
    read = batches_of(files_of([7, 0, 11, 5]), 1, 2, tokens_per_micro_batch=9)
    expected = list(map(content, read.steps(3, 12, list(read.steps(0, 3))[-1].next_reader_state)))
    place = by_json(list(read.steps(0, 3))[-1].next_reader_state)
    with mock.patch.object(streaming, "steps_per_item", lambda *args: per_item):
        assert list(map(content, replace(read, workers=workers).steps(3, 12, place))) == expected
    with emulated(per_item):
        assert list(map(content, replace(read, workers=workers).steps(3, 12, place))) == expected


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("per_item", [1, 2, 5])
def test_reading_that_fails_does_so_after_the_steps_before(workers: int, per_item: int) -> None:
    read = batches_of(files_of([40], (4,), broken=30), size=4, window=8, workers=workers)
    steps = []
    with (
        emulated(per_item),
        pytest.raises(DataError, match=r"^file 0 row 30: no more can be read"),
    ):
        for step in read.steps(0, 20):
            steps.append(step)
    assert [step.number for step in steps] == list(range(6)), (
        "three windows of 8 of the 28 rows before it"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_that_the_task_does_not_know_is_told_with_its_place(workers: int) -> None:
    files = files_of([12, 3])
    rows = [*files[1].rows[:2], {"text": "14", "label": "maybe"}]
    read = batches_of([files[0], replace(files[1], rows=rows)], size=4, workers=workers)
    with pytest.raises(DataError, match=r"^file 1 row 2: unknown label 'maybe'"):
        list(read.steps(0, 9))


def test_rows_that_were_left_out_come_with_the_first_step_behind_them() -> None:
    files = files_of([7, 0, 11, 5])
    expected = Counter(
        bad for file in files for piece in file.chunks(["text"]) for bad in piece.bad_rows
    )
    for workers in range(3):
        with emulated(2):
            steps = list(batches_of(files, workers=workers).steps(0, 6))
        assert Counter(bad for step in steps for bad in step.bad_rows) == expected
        assert all(not step.bad_rows for step in steps[1::2]), (
            "with the window that they were found in"
        )
        again = list(batches_of(files).steps(3, 6, steps[2].next_reader_state))
        assert set(again[0].bad_rows) >= set(steps[2].bad_rows), (
            "also where a run goes on in the middle of a window"
        )


def test_a_stream_without_rows_is_not_read_for_ever() -> None:
    read = batches_of(files_of([5]))
    empty = replace(read, stream=replace(read.stream, source_groups=[files_of([0, 0])]))
    with pytest.raises(DataError, match=r"^rows has no rows\.$"):
        list(empty.steps(0, 3))
    with pytest.raises(DataError, match=r"^rows has no rows\.$"):
        list(replace(empty, agree=lambda step: (0, ())).steps(0, 3))


@pytest.mark.parametrize("split", ["by_row", "by_file"])
def test_where_a_row_stands_is_told_by_the_place_of_its_step(split: str) -> None:
    files = files_of([9, 2, 17])
    starts = {file.name: int(file.rows[0]["text"].split()[0]) for file in files}
    of_ranks = [batches_of(files, rank, 2, split=split, window=8) for rank in range(2)]
    if split == "by_file":
        by_rank, errors = on_ranks(of_ranks, 0, 16)
        assert errors == ["", ""]
    else:
        by_rank = [list(batches.steps(0, 16)) for batches in of_ranks]
    for batches, steps in zip(of_ranks, by_rank, strict=True):
        wrong = 0
        for step in steps if split == "by_row" else [step for step in steps if not step.idle]:
            rows = [
                row
                for batch in step.micro_batches
                for row in batch.row_numbers.tolist()
                if row >= 0
            ]
            ids = [row for of in rows_of(step) for row in of]
            names = [
                place.rsplit(" row ", 1)
                for place in batches.locations(rows, by_json(step.window_state))
            ]
            assert [starts[name] + int(row) for name, row in names] == ids
            wrong += batches.locations(rows, steps[0].window_state) != batches.locations(
                rows, step.window_state
            )  # the control: the place of another step
        assert wrong
        assert batches.locations([batches.stream.first_row + 3], None) == ["rows row 3"]
        gone = replace(
            batches, stream=replace(batches.stream, source_groups=[files_of([9], broken=0)])
        )
        assert gone.locations([batches.stream.first_row], steps[0].window_state) == [
            "rows row 0"
        ], "the data are no longer there"


# ---- --stream_sharding by_file


@QUICK
@given(**GIVEN)
def test_ranks_with_files_of_their_own_take_every_row_once_and_the_same_number_of_steps(
    sizes: Any,
    pieces: Any,
    ranks: int,
    workers: int,
    per_item: int,
    tokens: int,
    size: int,
    window: int,
    data: st.DataObject,
) -> None:
    ranks = min(ranks, len(sizes))
    files, rows, size = files_of(sizes, pieces), sum(sizes), size + ranks
    if not rows:
        return
    of_ranks = [
        batches_of(
            files,
            rank,
            ranks,
            size=size,
            window=window,
            split="by_file",
            tokens_per_micro_batch=tokens,
            workers=workers,
        )
        for rank in range(ranks)
    ]
    per_epoch = of_ranks[0].steps_per_epoch
    assert {batches.steps_per_epoch for batches in of_ranks} == {per_epoch} and sum(
        batches.rows_per_step for batches in of_ranks
    ) == size
    start = data.draw(st.integers(0, EPOCHS * per_epoch), "steps before the restart")
    with emulated(per_item):
        by_rank, errors = on_ranks(of_ranks, 0, EPOCHS * per_epoch)
        assert errors == [""] * ranks
        places = [
            by_json(steps[start - 1].next_reader_state) if start else None for steps in by_rank
        ]
        again, _ = on_ranks(
            [replace(batches, workers=0) for batches in of_ranks], start, EPOCHS * per_epoch, places
        )
    assert_every_row_once(steps_of(by_rank), per_epoch, rows)
    assert [list(map(content, steps)) for steps in again] == [
        list(map(content, steps[start:])) for steps in by_rank
    ]
    bad = [[row for step in steps[:per_epoch] for row in step.bad_rows] for steps in by_rank]
    assert all(sorted(of_rank) == sorted(set(bad[0])) for of_rank in bad), (
        "each rank knows what all have left out, once"
    )
    numbers = [
        row
        for steps in by_rank
        for step in steps[:per_epoch]
        for batch in step.micro_batches
        for row in batch.row_numbers.tolist()
        if row >= 0
    ]
    assert len(numbers) == len(set(numbers)) == rows, (
        "a row's number is its own among the rows of all ranks"
    )
    for steps in by_rank:
        assert_within(steps, tokens)


def test_own_files_go_on_from_every_step_and_between_epochs_on_any_ranks() -> None:
    files = files_of([19, 3, 7, 0, 11])
    of_ranks = [batches_of(files, rank, 3, size=7, window=5, split="by_file") for rank in range(3)]
    per_epoch = of_ranks[0].steps_per_epoch
    by_rank, _ = on_ranks(of_ranks, 0, 2 * per_epoch + 1)
    for start in range(1, 2 * per_epoch + 1):
        again, _ = on_ranks(
            of_ranks,
            start,
            2 * per_epoch + 1,
            [by_json(steps[start - 1].next_reader_state) for steps in by_rank],
        )
        assert [list(map(content, steps)) for steps in again] == [
            list(map(content, steps[start:])) for steps in by_rank
        ]
    places = {json.dumps(steps[per_epoch - 1].next_reader_state) for steps in by_rank}
    assert len(places) == 1 and "over" in places.pop()
    assert any(
        "over" in step.next_reader_state
        for step in by_rank[1][: per_epoch - 1]
        if step.next_reader_state
    ), "one that has read its files waits there"
    fewer = [batches_of(files, rank, 2, size=7, window=5, split="by_file") for rank in range(2)]
    rest, errors = on_ranks(
        fewer,
        per_epoch,
        per_epoch + fewer[0].steps_per_epoch,
        [by_json(by_rank[0][per_epoch - 1].next_reader_state)] * 2,
    )
    assert errors == ["", ""] and sorted(row for step in steps_of(rest) for row in step) == list(
        range(40)
    )


def test_ranks_whose_files_are_empty_wait() -> None:
    of_ranks = [
        batches_of(files_of([9, 0, 0]), rank, 3, size=6, split="by_file") for rank in range(3)
    ]
    by_rank, errors = on_ranks(of_ranks, 0, 10)
    assert errors == [""] * 3 and [[step.idle for step in steps] for steps in by_rank] == [
        [False] * 10,
        [True] * 10,
        [True] * 10,
    ]
    assert_every_row_once(steps_of(by_rank), 5, 9)
    assert [steps[4].next_reader_state for steps in by_rank] == [
        by_rank[0][4].next_reader_state
    ] * 3, "they end the epoch in the same place"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_whose_rows_are_all_left_out_tells_them(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = files_of([9, 5])
    files = [good, replace(bad, rows=[{**row, "label": None} for row in bad.rows])]
    of_ranks = [
        batches_of(files, rank, 2, size=4, split="by_file", workers=workers) for rank in range(2)
    ]

    def told(steps: Sequence[RankStep]) -> list[str]:
        reasons = "label is missing, expected one in every row (column 'label')"
        return [row.file for step in steps for row in step.bad_rows if row.reason == reasons]

    with emulated(per_item=2):
        by_rank, errors = on_ranks(of_ranks, 0, 10)
        assert errors == ["", ""] and [[step.idle for step in steps] for steps in by_rank] == [
            [False] * 10,
            [True] * 10,
        ]
        assert_every_row_once(steps_of(by_rank), 5, 9)
        assert all(
            len(batch.row_numbers) and (batch.row_numbers < 0).all()
            for step in by_rank[1]
            for batch in step.micro_batches
        )
        for steps in by_rank:
            assert (
                told(steps[:5]) == told(steps[:1]) == [f"file 1 row {row}" for row in range(5)]
            ), "once an epoch, with its first step"
            assert told(steps[5:]) == told(steps[:5])
        for start in range(1, 5):
            rest, _ = on_ranks(
                of_ranks,
                start,
                10,
                [by_json(steps[start - 1].next_reader_state) for steps in by_rank],
            )
            assert [list(map(content, steps)) for steps in rest] == [
                list(map(content, steps[start:])) for steps in by_rank
            ]
        with monkeypatch.context() as patch:  # the control
            patch.setattr(
                streaming._StreamStepDataset,
                "one_epoch",
                property(lambda self: False, lambda self, value: None),
                raising=False,
            )
            with pytest.raises(AssertionError):
                assert told(on_ranks(of_ranks, 0, 1)[0][0]) == [
                    f"file 1 row {row}" for row in range(5)
                ]


def test_ranks_that_do_not_wait_for_each_other_are_seen() -> None:
    of_ranks = [batches_of(files_of([9, 3]), rank, 2, size=4, split="by_file") for rank in range(2)]
    assert_every_row_once(steps_of(on_ranks(of_ranks, 0, 10)[0]), 5, 12)
    lonely = [replace(batches, agree=Agreement(1).of(0)) for batches in of_ranks]
    with pytest.raises(AssertionError):
        assert_every_row_once(steps_of([list(batches.steps(0, 10)) for batches in lonely]), 5, 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_that_fails_ends_all_in_the_same_step(workers: int) -> None:
    files = files_of([40, 9], (4,), broken=30)
    of_ranks = [
        batches_of(files, rank, 2, size=8, window=8, split="by_file", workers=workers)
        for rank in range(2)
    ]
    with emulated():
        by_rank, errors = on_ranks(of_ranks, 0, 20)
    assert [len(steps) for steps in by_rank] == [6, 6] and errors == [
        "DataError: file 0 row 30: no more can be read."
    ] * 2


def test_real_workers_read_own_files() -> None:
    alone = batches_of(files_of([9, 5]), size=4, split="by_file", agree=Agreement(1).of(0))
    expected = list(map(content, alone.steps(0, 8)))
    assert list(map(content, replace(alone, workers=2).steps(0, 8))) == expected
    assert_every_row_once(steps_of([list(alone.steps(0, 8))]), 4, 14)


def test_each_rank_that_reads_own_files_has_one_and_a_row_of_each_step() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--stream_sharding by_file .* --train_batch_size is 2, for 3 processes\. .* any number will do\.$",
    ):
        batches_of(files_of([9, 9, 9]), 2, 3, size=2, split="by_file")
    with pytest.raises(
        ConfigError,
        match=r"^--stream_sharding by_file needs at least one file per process: rows has 2, for 3 processes\..* any number will do\.$",
    ):
        batches_of(files_of([9, 9]), 2, 3, split="by_file")


# ---- Which files each rank reads


def unread(sources: Sequence[Any]) -> Stream:
    columns = ColumnNames("text", None, "label", None)
    return Stream(
        name="rows",
        source_groups=[sources],
        columns=columns,
        label_delimiter=None,
        window_rows=4,
        seed=1,
    )


@given(st.lists(st.none() | st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_files_are_dealt_evenly_and_each_once(sizes: list[int | None], ranks: int) -> None:
    read = unread([MemoryRows(f"file {at}", [], bytes=size) for at, size in enumerate(sizes)])
    dealt = assign_files_to_ranks(read, ranks)
    assert len(dealt) == ranks and sorted(file for files in dealt for file in files) == list(
        range(len(sizes))
    )
    assert all(files == sorted(files) for files in dealt) and dealt == assign_files_to_ranks(
        read, ranks
    )
    told = [size for size in sizes if size is not None]
    usual = sum(told) // max(1, len(told))
    loads = [
        sum(usual if sizes[file] is None else sizes[file] or 0 for file in files) for files in dealt
    ]
    assert max(loads) - min(loads) <= max([usual, *told], default=0)
    if not any(loads):  # nothing is known of their sizes
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_files_dealt_by_hand() -> None:
    read = unread(
        [MemoryRows(f"file {at}", [], bytes=size) for at, size in enumerate([3, 9, 4, None, 8])]
    )
    assert assign_files_to_ranks(read, 2) == [
        [0, 1, 2],
        [3, 4],
    ]  # 9, 4 and 3; 8 and, unknown, the mean of 6
    in_turn = [[file for file in range(5) if file % 2 == rank] for rank in range(2)]
    assert in_turn != assign_files_to_ranks(read, 2)  # the control: sizes count


def test_ten_thousand_files_are_each_looked_at_once() -> None:
    class Counted:
        asked = 0

        @property
        def bytes(self) -> int:
            Counted.asked += 1
            return 7

    files: Any = [Counted() for _ in range(10_000)]
    assert (
        sorted(set(map(len, assign_files_to_ranks(unread(files), 512)))) == [19, 20]
        and Counted.asked == 10_000
    )


# ---- Agreeing on a step


def agree_on_ranks(accelerator: Accelerator, told: Sequence[Sequence[Any]]) -> list[Any]:
    """What each call gave; steps are told by their rows."""
    agree, found = agree_on_steps(accelerator), list[Any]()
    for of_rank in told:
        one = of_rank[accelerator.process_index]
        try:
            found.append(
                agree(
                    RankStep(number=0, micro_batches=[], rows=one) if isinstance(one, int) else one
                )
            )
        except BertdistError as error:
            found.append((type(error).__name__, str(error), error.on_all_ranks))
    return found


def test_ranks_agree_on_the_rows_of_a_step() -> None:
    assert run_ranks(1, agree_on_ranks, [[3], [None]]) == [[(3, ()), (0, ())]]
    assert (
        run_ranks(2, agree_on_ranks, [[3, 4], [3, None], [None, None]])
        == [[(7, ()), (3, ()), (0, ())]] * 2
    )


def test_ranks_know_what_any_of_them_left_out() -> None:
    first, second = BadRow("a", 1, "no row", ""), BadRow("b", 2, "no row", "")
    steps = [
        RankStep(number=0, micro_batches=[], rows=2, bad_rows=bad)
        for bad in ((first,), (second, first), ())
    ]
    told = [[steps[0], steps[1]], [steps[2], steps[0]], [None, steps[1]], [steps[2], steps[2]]]
    assert (
        run_ranks(2, agree_on_ranks, told)
        == [[(4, (first, second, first)), (4, (first,)), (2, (second, first)), (4, ())]] * 2
    )


def test_an_error_on_one_rank_is_raised_on_all_and_the_next_call_is_in_step() -> None:
    lost = DataError("file row 3: lost.")
    told = ("DataError", "rank 1: file row 3: lost.", True)
    assert (
        run_ranks(2, agree_on_ranks, [[3, 4], [3, lost], [1, 1]]) == [[(7, ()), told, (2, ())]] * 2
    )
    both = run_ranks(2, agree_on_ranks, [[CheckpointError("a"), DataError("b")]])
    assert both == [[("CheckpointError", "rank 0: a\nrank 1: b", True)]] * 2


def test_an_error_that_is_not_agreed_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "all_reduce_sum", lambda accelerator, values, group: values)
    found = run_ranks(
        2,
        lambda accelerator: accelerator.process_index == 0 or agree_on_ranks(accelerator, [[3, 4]]),
    )
    assert found == [True, [(4, ())]], "the control: without an exchange each has its own rows"


def test_agreeing_begins_with_the_first_step() -> None:
    """A rank that fails while a run is set up leaves nobody waiting: opening an agreement exchanges nothing."""

    def only_one(accelerator: Accelerator) -> bool:
        return accelerator.process_index == 0 or bool(agree_on_steps(accelerator))

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(streaming, "host_group", lambda accelerator: accelerator.wait_for_everyone())
        assert run_ranks(2, only_one) == [True, True]
        assert run_ranks(2, agree_on_ranks, [[3, 4]]) == [[(7, ())]] * 2
        patch.setattr(streaming, "cache", lambda group: (group(), group)[1])  # the control: at once
        with pytest.raises(RankError):
            run_ranks(2, only_one, timeout=5)
