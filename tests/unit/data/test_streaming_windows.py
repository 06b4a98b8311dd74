"""Windows of rows that are never held together: every row once, and reading again from a state is reading on."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import MemoryRows, not_utf8

from bertdist.core.config import DataConfig, FileConfig
from bertdist.core.errors import DataError
from bertdist.data import records as records_module
from bertdist.data import streaming as stream
from bertdist.data.bad_rows import OnBadRow
from bertdist.data.load_data import load_records, open_stream
from bertdist.data.readers import parquet_reader
from bertdist.data.readers.file_reader import FileReader, inspect_file
from bertdist.data.records import ColumnNames
from bertdist.data.source import STREAM_START, Chunk, ReaderState
from bertdist.data.streaming import HEAD_ROWS, Stream, Window

QUICK = settings(max_examples=25)
COLUMNS = ColumnNames("text", None, "label", None)
PIECES = st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any).map(tuple)
FILES = st.lists(st.tuples(st.integers(0, 12), PIECES), min_size=1, max_size=4)
ENOUGH = 12  # windows: two epochs of most streams here; with weights there is no end


def rows_named(name: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {row}", "label": ("no", "yes")[row % 2]} for row in range(count)]


def files_of(found: Sequence[tuple[int, tuple[int, ...]]]) -> list[MemoryRows]:
    return [
        MemoryRows("abcd"[at], rows_named("abcd"[at], count), sizes)
        for at, (count, sizes) in enumerate(found)
    ]


def stream_of(parts: Sequence[Sequence[Any]], **changes: Any) -> Stream:
    settings = {"window_rows": 4, "seed": 3, "on_bad_row": "skip", "max_bad_rows": 99, **changes}
    return Stream(
        name="rows", source_groups=parts, columns=COLUMNS, label_delimiter=None, **settings
    )


def texts(window: Window) -> list[str]:
    return window.records.texts.to_pylist()


def content(window: Window) -> Any:
    """All of a window but the rows left out, which come again with the piece in which reading begins."""
    records = window.records
    labels = [record.label for record in map(records.__getitem__, range(len(records)))]
    places = [str(records.location(row)) for row in range(len(records))]
    return (
        texts(window),
        labels,
        places,
        records.first_row,
        window.state,
        window.next_state,
        window.next_epoch_state,
    )


def epochs(read: Stream, count: int) -> list[list[Window]]:
    found: list[list[Window]] = []
    state = None
    for _ in range(count):
        found.append(list(read.windows(state)))
        state = found[-1][-1].next_epoch_state
    return found


def follow(read: Stream, state: ReaderState | None, count: int) -> list[Window]:
    """So many windows from a state on, from one epoch to the next."""
    found: list[Window] = []
    while True:
        for window in read.windows(state):
            found.append(window)
            if len(found) == count:
                return found
        state = found[-1].next_epoch_state


def assert_goes_on(read: Stream) -> None:
    """From each window's state, written as JSON and read again, come exactly the windows that came before."""
    through = follow(read, None, ENOUGH)
    expected = list(map(content, through))
    for at, window in enumerate(through):
        again = follow(read, json.loads(json.dumps(window.state)), ENOUGH - at)
        assert list(map(content, again)) == expected[at:], f"from window {at}: {window.state}"


# ---- Every row once


@QUICK
@given(FILES, st.integers(1, 9), st.integers(0, 5))
def test_every_row_once_an_epoch_in_the_order_of_the_files(
    found: Any, window_rows: int, seed: int
) -> None:
    files = files_of(found)
    read = stream_of([files[:1], files[1:]], window_rows=window_rows, seed=seed)
    total = sum(len(file.rows) for file in files)
    if not total:
        (window,) = read.windows()
        assert len(window.records) == 0 and len(window.bad_rows) == len(files), (
            "what was left out is told"
        )
        return
    for epoch, windows in enumerate(epochs(read, 3)):
        sizes = [len(window.records) for window in windows]
        assert (
            sizes[:-1] == [window_rows] * (len(windows) - 1)
            and 0 < sizes[-1] <= window_rows
            and sum(sizes) == total
        )
        assert [window.records.first_row for window in windows] == [
            window_rows * at for at in range(len(windows))
        ]
        assert [(window.state["epoch"], window.state["window"]) for window in windows] == [
            (epoch, at) for at in range(len(windows))
        ]
        came = [text for window in windows for text in texts(window)]
        order = list(dict.fromkeys(text[0] for text in came))
        assert came == [
            row["text"]
            for name in order
            for row in rows_named(name, Counter(text[0] for text in came)[name])
        ]
        assert sorted(came) == sorted(row["text"] for file in files for row in file.rows)
        assert (windows[-1].next_state, windows[-1].next_epoch_state["epoch"]) == (None, epoch + 1)


def test_files_come_in_another_order_in_each_epoch_and_for_each_seed() -> None:
    files = files_of([(2, (2,))] * 4)

    def orders(**changes: Any) -> list[str]:
        return [
            "".join(text[0] for window in windows for text in texts(window)[::2])
            for windows in epochs(stream_of([files], **changes), 6)
        ]

    assert len(set(orders())) > 2 and orders() == orders(window_rows=2) != orders(seed=4)
    assert orders(limit=5) == ["abc"] * 6, "the first so many rows are the same in each epoch"


@pytest.mark.parametrize("limit", [1, 4, 5, 8, 9, 30])
def test_a_limit_takes_the_first_rows(limit: int) -> None:
    files = files_of([(5, (2, 0)), (0, (1,)), (4, (3,))])
    all_rows = [row["text"] for file in files for row in file.rows]
    for windows in epochs(stream_of([files], limit=limit), 2):
        assert [text for window in windows for text in texts(window)] == all_rows[:limit]


def test_parts_with_weights_give_their_shares_pass_after_pass() -> None:
    small, large = files_of([(3, (2, 0, 1)), (20, (4,))])
    windows = list(
        islice(stream_of([[small], [large]], source_weights=(1.0, 3.0)).windows(), ENOUGH)
    )
    assert all([text[0] for text in texts(window)] == ["a", "b", "b", "b"] for window in windows)
    times = Counter(text for window in windows for text in texts(window))
    assert all(times[f"a {row}"] == 4 for row in range(3)) and sum(times.values()) == 4 * ENOUGH
    assert all(times[f"b {row}"] == 1 + (row < 16) for row in range(20))
    limited = epochs(stream_of([[small], [large]], source_weights=(1.0, 3.0), limit=10), 3)
    assert [[len(window.records) for window in of] for of in limited] == [[4, 4, 2]] * 3
    came = [text for of in limited for window in of for text in texts(window) if text[0] == "b"]
    assert max(Counter(came[:20]).values()) == 1, "the parts go on from epoch to epoch"


# ---- Reading again from a state


@QUICK
@given(FILES, st.integers(1, 9), st.sampled_from([None, 1, 7, 19]))
def test_reading_from_a_state_is_reading_on(
    found: Any, window_rows: int, limit: int | None
) -> None:
    files = files_of(found)
    if any(file.rows for file in files):
        assert_goes_on(stream_of([files], window_rows=window_rows, limit=limit))


@QUICK
@given(FILES, FILES, st.integers(1, 9), st.floats(0.1, 10), st.sampled_from([None, 7, 19]))
def test_reading_a_mixture_from_a_state_is_reading_on(
    one: Any, other: Any, window_rows: int, weight: float, limit: int | None
) -> None:
    parts = [files_of(one), files_of(other)]
    if all(any(file.rows for file in part) for part in parts):
        assert_goes_on(
            stream_of(parts, window_rows=window_rows, source_weights=(1.0, weight), limit=limit)
        )


def test_a_state_that_forgets_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stream._GroupReader.cursor.fget
    assert whole is not None
    for lost, changes in (
        ("skip", {}),
        ("place", {}),
        ("file", {}),
        ("pass", {"source_weights": (1.0,)}),
    ):
        read = stream_of([files_of([(7, (3, 0)), (9, (2,))])], window_rows=5, **changes)
        assert_goes_on(read)
        forget = property(
            lambda self, lost=lost: {
                **whole(self),
                lost: {"skip": 0, "place": None, "file": 0, "pass": 0}[lost],
            }
        )
        with monkeypatch.context() as patch:
            patch.setattr(stream._GroupReader, "cursor", forget)
            with pytest.raises((AssertionError, IndexError)):
                assert_goes_on(read)


class Shifted(MemoryRows):
    """A source whose places are one row off."""

    def chunks(self, wanted: Sequence[str], place: ReaderState | None = None) -> Iterator[Chunk]:
        return super().chunks(wanted, place and {**place, "row": place["row"] + 1})


def test_a_source_that_goes_on_elsewhere_is_seen() -> None:
    rows = rows_named("a", 9)
    assert_goes_on(stream_of([[MemoryRows("a", rows, (2,))]]))
    with pytest.raises(AssertionError, match="from window 1"):
        assert_goes_on(stream_of([[Shifted("a", rows, (2,))]]))


def test_the_state_is_a_few_integers() -> None:
    read = stream_of([files_of([(9, (4,)), (9, (4,))])])
    first, second, *_ = read.windows()
    assert first.state == STREAM_START == next(read.windows(STREAM_START)).state
    assert (
        second.state
        == first.next_state
        == {
            "epoch": 0,
            "window": 1,
            "rows": 4,
            "cursors": [{"pass": 0, "file": 0, "place": {"row": 4, "piece": 1}, "skip": 0}],
        }
    )


# ---- Where a row stands; rows that were left out


def test_where_a_row_stands_is_told_of_its_file() -> None:
    files = files_of([(5, (2, 0)), (0, (1,)), (4, (3,))])
    for windows in epochs(stream_of([files]), 2):
        for window in windows:
            told = [str(window.records.location(row)) for row in range(len(window.records))]
            assert told == [text.replace(" ", " row ") for text in texts(window)]


def test_rows_that_were_left_out_arrive_once_also_of_pieces_without_rows() -> None:
    files = files_of([(5, (2, 0)), (0, (1,)), (9, (0, 0, 3)), (2, (5,))])
    expected = sorted(
        bad for file in files for piece in file.chunks(["text"]) for bad in piece.bad_rows
    )
    for window_rows in (1, 2, 4, 100):
        read = stream_of([files], window_rows=window_rows)
        windows = list(read.windows())
        assert sorted(bad for window in windows for bad in window.bad_rows) == expected
        for at, window in enumerate(
            windows
        ):  # none is lost by going on, and those before come again at most once
            again = [bad for later in read.windows(window.state) for bad in later.bad_rows]
            assert len(again) == len(set(again)) and {
                bad for later in windows[at:] for bad in later.bad_rows
            } <= set(again)
    with pytest.raises(AssertionError):
        assert sorted(bad for window in windows for bad in window.bad_rows[1:]) == expected


# ---- Sources that are empty, or wrong


def parquet_rows(path: Path, wrong: Sequence[int], on_bad_row: OnBadRow = "skip") -> FileReader:
    """40 rows in 4 groups, some of them with a text that is not UTF-8."""
    texts = not_utf8([f"{path.stem} {row}" for row in range(40)], wrong)
    pq.write_table(pa.table({"text": texts, "label": ["no", "yes"] * 20}), path, row_group_size=10)
    told = inspect_file(str(path), FileConfig())
    return FileReader(told, on_bad_row=on_bad_row)


def test_texts_of_a_parquet_file_that_are_not_utf8_are_left_out_from_any_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_SLICE_ROWS", 4)
    wrong = {
        "a": [0, 9, 10, 11, 12, 13],
        "b": [39],
        "c": list(range(40)),
    }  # all of a piece, the last of a file, all of a file
    read = stream_of(
        [[parquet_rows(tmp_path / f"{name}.parquet", rows) for name, rows in wrong.items()]]
    )
    for windows in epochs(read, 2):
        came = [text for window in windows for text in texts(window)]
        expected = [
            f"{name} {row}" for name, rows in wrong.items() for row in range(40) if row not in rows
        ]
        assert sorted(came) == sorted(expected)
        assert [str(records.location(0)) for records, *_ in windows[:1]] == [
            f"{came[0].split()[0]}.parquet row {came[0].split()[1]}"
        ]
        bad = [row for window in windows for row in window.bad_rows]
        assert sorted((row.file, row.line) for row in bad) == [
            (f"{name}.parquet", row) for name, rows in wrong.items() for row in rows
        ]
        assert all(
            "column 'text' is not UTF-8 ('utf-8' codec can't decode byte 0xd9 in" in row.reason
            for row in bad
        )
        assert r'{"text": "b 39 \xd9", "label": "yes"}' in [row.text for row in bad]
    assert_goes_on(read)

    # The controls: a reader that takes what it can of such a text, and --on_bad_row fail, which ends with a line.
    def careless(column: Any, *_: Any) -> Any:
        return pa.array(
            [str(value.as_buffer().to_pybytes()) for value in column], pa.large_string()
        )

    with monkeypatch.context() as patch:
        patch.setattr(records_module, "_validated", careless)
        assert sum(len(window.records) for window in read.windows()) == 120
    with pytest.raises(
        DataError,
        match=r"^d\.parquet row 7: column 'text' is not UTF-8 \(.* can't decode byte 0xd9 in position 4: ",
    ):
        list(
            stream_of(
                [[parquet_rows(tmp_path / "d.parquet", [7, 8], "fail")]], on_bad_row="fail"
            ).windows()
        )


def test_sources_without_rows() -> None:
    empty = MemoryRows("empty", [])
    (window,) = stream_of([[empty, empty]]).windows()
    assert (
        len(window.records),
        [row.reason for row in window.bad_rows],
        window.next_state,
    ) == (
        0,
        ["end", "end"],
        None,
    )
    assert list(stream_of([[]]).windows()) == []
    with pytest.raises(DataError, match=r"^rows has no rows\.$"):
        stream_of([[]]).head()
    with pytest.raises(DataError, match=r"^empty has no rows\.$"):  # and not for ever
        list(
            stream_of([[empty, empty], files_of([(9, (4,))])], source_weights=(1.0, 1.0)).windows()
        )


def test_a_source_without_a_column_is_one_line() -> None:
    other = MemoryRows("other.jsonl", [{"text": "a", "labell": "no"}], columns=("text", "labell"))
    read = stream_of([[*files_of([(3, (2,))]), other]], limit=9)
    told = r"^other\.jsonl: there is no column 'label'\. Did you mean 'labell'\? The columns are 'text', 'labell'\.$"
    windows = read.windows()
    with pytest.raises(DataError, match=told):
        list(windows)


def test_sources_that_fail_give_what_stands_before() -> None:
    broken = MemoryRows("b", rows_named("b", 12), (3,), broken=10)
    windows = stream_of([[broken]]).windows()
    assert [texts(next(windows))[0], texts(next(windows))[0]] == ["b 0", "b 4"]
    with pytest.raises(DataError, match="b row 10: no more can be read"):
        next(windows)


def test_labels_of_other_kinds_are_told_with_their_place() -> None:
    numbers = MemoryRows("n", [{"text": "x", "label": ["x"]}])
    with pytest.raises(
        DataError, match=r"^n row 0: the labels are lists of labels, those before are single labels"
    ):
        list(stream_of([[*files_of([(3, (2,))]), numbers]], limit=9).windows())


MIXED = [
    "no",
    ["1"],
    ["2"],
    ["3"],
    "yes",
    ["0.5"],
    "yes",
    ["no"],
    None,
    ["4"],
    ["5"],
    ["6"],
    ["7"],
    "no",
]  # in pieces of 3 two begin with a list


@pytest.mark.parametrize("limit", [None, 5])
def test_labels_of_other_kinds_are_left_out_wherever_reading_begins(limit: int | None) -> None:
    files = [
        MemoryRows(
            name,
            [{"text": f"{name} {row}", "label": label} for row, label in enumerate(MIXED)],
            (3, 1),
        )
        for name in "ab"
    ]
    files.append(MemoryRows("c", [{"text": f"c {row}", "label": [row]} for row in range(5)]))
    plain = stream_of([files], limit=limit)
    read = plain.with_first_rows()
    good = [
        f"{name} {row}"
        for name in "ab"
        for row, label in enumerate(MIXED)
        if isinstance(label, str)
    ]
    for windows in epochs(read, 2):
        assert sorted(text for window in windows for text in texts(window)) == sorted(good[:limit])
        assert {window.records.label_kind for window in windows} == {"text"}
        bad = [
            (row.file, row.reason)
            for window in windows
            for row in window.bad_rows
            if row.reason not in ("no row", "end")
        ]
        assert limit or len(bad) == 2 * (len(MIXED) - 4) + 5
        assert (
            "a row 1",
            "label ['1'] is a list of labels, each of the labels above it is a single label (column 'label')",
        ) in bad
    assert_goes_on(read)
    with pytest.raises(
        DataError, match="the labels are lists of labels, those before are single labels"
    ):  # the control
        list(replace(plain, window_rows=99, limit=None).windows())
    failing = stream_of([[MemoryRows("a", [{"text": "a", "label": "b"}])]], on_bad_row="fail")
    assert failing.with_first_rows() is failing


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(("csv", "jsonl"), ["0", "1"]), (("jsonl", "csv"), ["0", "1"])],
    ids=["text first", "numbers first"],
)
def test_whole_numbers_and_texts_that_are_some_stay_one_kind(
    tmp_path: Path, kinds: tuple[str, str], expected: list[Any]
) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "a.jsonl").write_text(
        "".join(
            f'{{"text": "{text}", "label": {label}}}\n'
            for text, label in (("c", 0), ("d", 1), ("e", '["0"]'))
        )
    )
    data = DataConfig(train_file=[str(tmp_path / f"a.{kind}") for kind in kinds], on_bad_row="skip")
    (window,) = open_stream(data, 0).windows()
    held = load_records(data, "train")
    for records in (window.records, held):
        assert sorted(records.label_values) == expected and sorted(records.texts.to_pylist()) == [
            "a",
            "b",
            "c",
            "d",
        ]
        assert [records[row].label for row in range(4)] == [expected[row % 2] for row in range(4)]
    assert [(row.file, row.line) for row in (*window.bad_rows, *held.bad_rows)] == [
        ("a.jsonl", 3)
    ] * 2


# ---- head, fingerprint


def test_the_head_is_some_of_the_first_rows() -> None:
    head = stream_of([files_of([(0, (1,)), (9, (0, 4)), (5, (2,))])], seed=8).head()
    assert (
        head.texts.to_pylist() == ["b 0", "b 1", "b 2", "b 3"]
        and str(head.location(3)) == "b row 3"
    )
    assert len(stream_of([files_of([(2 * HEAD_ROWS, (2 * HEAD_ROWS,))])]).head()) == HEAD_ROWS


def test_a_head_without_rows_tells_what_was_left_out() -> None:
    files = [MemoryRows(f"file {at}", []) for at in range(5)]
    told = r"^rows has no rows but 5 that cannot be read, the first of them file 0 line -1: end$"
    with pytest.raises(DataError, match=told):
        stream_of([files]).head()
    with pytest.raises(
        DataError, match=r"^More than 3 rows cannot be read"
    ):  # and does not read to the end for it
        stream_of([files], max_bad_rows=3).head()
    with pytest.raises(DataError, match=r"^file 0 line -1: end\.$"):
        stream_of([files], on_bad_row="fail").head()


def test_the_fingerprint_tells_what_is_read() -> None:
    files = files_of([(4, (2,)), (5, (2,))])
    read = stream_of([files])
    others = [
        stream_of([files[::-1]]),
        stream_of([files[:1]]),
        stream_of([[files[0], MemoryRows("b", rows_named("b", 6))]]),
        replace(read, columns=ColumnNames("label", None, "text", None)),
        replace(read, columns=ColumnNames("text", None, None, ["label"])),
        replace(read, label_delimiter=","),
        replace(read, limit=3),
        stream_of([files[:1], files[1:]], source_weights=(1.0, 1.0)),
        stream_of([files, []], source_weights=(1.0, 1.0)),
    ]
    assert len({one.fingerprint for one in [read, *others]}) == len(others) + 1
    same = [
        replace(read, window_rows=9, seed=1, first_row=4, name="other"),
        stream_of([files[:1], files[1:]]),
    ]
    assert {one.fingerprint for one in same} == {read.fingerprint}
