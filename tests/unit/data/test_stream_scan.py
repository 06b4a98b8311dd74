"""The first pass over a stream: its labels and rows, counted once, by all ranks together, and kept."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import MemoryRows

from bertdist.core.errors import DataError
from bertdist.data import stream_scan as survey_module
from bertdist.data.records import ColumnNames
from bertdist.data.source import Chunk, ReaderState
from bertdist.data.stream_scan import StreamScan, scan_stream
from bertdist.data.streaming import Stream

ALONE: Any = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
PIECES = st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any).map(tuple)
LABELS = st.lists(st.sampled_from(["no", "yes", "maybe"]), max_size=15)


def file_of(
    labels: Sequence[Any], sizes: tuple[int, ...] = (2, 0, 3), name: str = "file", **changes: Any
) -> MemoryRows:
    return MemoryRows(
        name,
        [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)],
        sizes,
        **changes,
    )


def stream_of(files: Sequence[MemoryRows], **changes: Any) -> Stream:
    asked = ColumnNames("text", None, "label", None)
    settings = {"on_bad_row": "skip", "max_bad_rows": 99, **changes}
    return Stream(
        **{
            "name": "rows",
            "source_groups": [files],
            "columns": asked,
            "label_delimiter": None,
            "window_rows": 4,
            "seed": 0,
            **settings,
        }
    )


def plain(found: StreamScan) -> Any:
    return found.rows, found.kind, found.labels, sorted(found.bad)


# ---- What is counted


@settings(max_examples=25)
@given(st.lists(st.tuples(LABELS, PIECES), min_size=1, max_size=4))
def test_labels_and_rows_are_those_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, given: Any
) -> None:
    files = [file_of(labels, sizes, f"file {at}") for at, (labels, sizes) in enumerate(given)]
    kept = tmp_path_factory.mktemp("kept") / "survey.json"
    counts = Counter(label for labels, _ in given for label in labels)
    if not counts:
        with pytest.raises(DataError, match=r"^rows has no rows\.$"):
            scan_stream(stream_of(files), ALONE, kept)
        assert not kept.exists()
        return
    found = scan_stream(stream_of(files), ALONE, kept)
    assert (found.kind, found.labels) == ("text", counts)
    assert found.rows == {at: len(labels) for at, (labels, _) in enumerate(given)}, (
        "also of files that have none"
    )
    assert found.bad == [
        bad for file in files for piece in file.chunks(["text"]) for bad in piece.bad_rows
    ]
    assert plain(scan_stream(stream_of(files), ALONE, kept)) == plain(found), "as it was kept"


@pytest.mark.parametrize(
    ("labels", "delimiter", "kind", "expected"),
    [
        ([1, 2, 1, 0.5, 1], None, "text", {"1": 3, "2": 1, "0.5": 1}),
        ([0.5, 0.5, 1], None, "text", {"0.5": 2, "1": 1}),
        (["1", "0", 1, 1], None, "text", {"1": 3, "0": 1}),
        ([1, 0, "1", "1", 0], None, "text", {"1": 3, "0": 2}),
        ([3, 4, 3], None, "text", {"3": 2, "4": 1}),
        (["a", "a,b", "", "a , b"], ",", "set", {("a",): 1, ("a", "b"): 2, (): 1}),
    ],
)
def test_labels_of_every_kind(
    tmp_path: Path, labels: Any, delimiter: Any, kind: str, expected: Any
) -> None:
    """A piece a row, so that kinds meet between pieces."""
    read = stream_of([file_of(labels, (1,))], label_delimiter=delimiter)
    for _ in ("read", "kept"):
        found = scan_stream(read, ALONE, tmp_path / "survey.json")
        assert (found.kind, found.labels) == (kind, expected)
        assert {type(label) for label in found.labels} == {type(label) for label in expected}


def test_labels_of_kinds_that_have_nothing_in_common(tmp_path: Path) -> None:
    told = r"^file row 2: the labels are lists of labels, those before are single labels; expected one kind in all rows\.$"
    with pytest.raises(DataError, match=told):
        scan_stream(
            stream_of([file_of(["no", "yes", ["no"]], (1,))]), ALONE, tmp_path / "survey.json"
        )


def test_a_limit_counts_what_is_learned_from(tmp_path: Path) -> None:
    files = [file_of(["no"] * 5), file_of(["yes"] * 5)]
    found = scan_stream(stream_of(files, limit=7), ALONE, tmp_path / "survey.json")
    assert (found.rows, found.labels) == ({0: 7}, {"no": 5, "yes": 2})


def test_rows_that_are_left_out_end_it_as_they_end_a_run(tmp_path: Path) -> None:
    files = [file_of(["no", "yes"] * 4, (2,))]  # in four pieces and at the end one row was left out
    with pytest.raises(DataError, match=r"^file line 0: no row\.$"):
        scan_stream(stream_of(files, on_bad_row="fail"), ALONE, tmp_path / "survey.json")
    for limit in (None, 99):
        with pytest.raises(DataError, match=r"^More than 4 rows cannot be read \(--max_bad_rows\)"):
            scan_stream(
                stream_of(files, max_bad_rows=4, limit=limit), ALONE, tmp_path / "survey.json"
            )
        assert (
            len(
                scan_stream(
                    stream_of(files, max_bad_rows=5, limit=limit), ALONE, tmp_path / "survey.json"
                ).bad
            )
            == 5
        )


def test_counting_does_not_copy_what_is_counted() -> None:
    """A piece of a stream of a million different labels costs what is in the piece."""
    found = StreamScan()
    read = stream_of([file_of(range(20), (5,))])
    held = []
    for _, records in read.chunks(read.sources[0]):
        if len(records):
            found.add(0, records)
            held.append(found.labels)
    assert all(one is held[0] for one in held) and found.labels == dict.fromkeys(
        map(str, range(20)), 1
    )


# ---- What is kept


def test_what_is_kept_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, read = tmp_path / "survey.json", stream_of([file_of(["no", "yes", "no"])])
    found = scan_stream(read, ALONE, kept)
    assert sorted(json.loads(kept.read_text())) == [
        "bad",
        "fingerprint",
        "first",
        "kind",
        "labels",
        "numbers_only",
        "of_file",
        "rows",
    ]

    def refuse(*args: Any) -> Any:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "chunks", refuse)
        assert plain(scan_stream(read, ALONE, kept)) == plain(found)
        for other in (replace(read, limit=2), stream_of([file_of(["no", "yes", "yes"])])):
            with pytest.raises(AssertionError, match="read again"):
                scan_stream(other, ALONE, kept)
    changed = stream_of([file_of(["no", "yes", "yes"])])
    assert (
        scan_stream(changed, ALONE, kept).labels
        == {"no": 1, "yes": 2}
        == scan_stream(changed, ALONE, kept).labels
    )


def test_a_file_that_is_torn_or_not_ours_is_read_anew(tmp_path: Path) -> None:
    kept, read = tmp_path / "survey.json", stream_of([file_of(["no", "yes", "no"])])
    found = scan_stream(read, ALONE, kept)
    whole = kept.read_bytes()
    fingerprint = json.dumps({"fingerprint": json.loads(whole)["fingerprint"]}).encode()
    for torn in [whole[:at] for at in range(0, len(whole) - 1, 7)] + [
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        fingerprint,
    ]:
        kept.write_bytes(torn)
        assert plain(scan_stream(read, ALONE, kept)) == plain(found) and kept.read_bytes() == whole


# ---- Ranks


class Watched(MemoryRows):
    """A file that remembers in which process it was read."""

    def chunks(self, wanted: Sequence[str], place: ReaderState | None = None) -> Iterator[Chunk]:
        opened.append(self.name)
        return super().chunks(wanted, place)


opened: list[str] = []


def on_rank(accelerator: Accelerator, read: Stream, kept: Path) -> Any:
    """What a rank has counted and which files it has opened for it, or what it was told."""
    opened.clear()
    try:
        return plain(scan_stream(read, accelerator, kept)), list(opened)
    except DataError as error:
        return str(error)


def watched(counts: Sequence[int], **changes: Any) -> list[MemoryRows]:
    files = [
        file_of((["no", "yes", "maybe"] * count)[at : at + count], name=f"file {at}")
        for at, count in enumerate(counts)
    ]
    return [Watched(file.name, file.rows, file.sizes, **changes) for file in files]


def test_ranks_share_the_files_and_know_the_same(tmp_path: Path) -> None:
    files = watched([5, 0, 7, 3, 9])
    alone = plain(scan_stream(stream_of(files), ALONE, tmp_path / "alone.json"))
    (one, its), (other, others) = run_ranks(2, on_rank, stream_of(files), tmp_path / "survey.json")
    assert one == other == alone
    assert (its, others) == (["file 0", "file 2", "file 4"], ["file 1", "file 3"])
    again = run_ranks(2, on_rank, stream_of(files), tmp_path / "survey.json")
    assert again == [(alone, []), (alone, [])], "kept for all"


def test_a_rank_whose_files_are_not_counted_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = watched([5, 4])
    monkeypatch.setattr(survey_module, "gather_from_all_ranks", lambda accelerator, own: own)
    (one, _), (other, _) = run_ranks(2, on_rank, stream_of(files), tmp_path / "survey.json")
    assert one != other


def test_a_file_that_cannot_be_read_ends_all_ranks(tmp_path: Path) -> None:
    files = [file_of(["no"] * 5, name="good"), file_of(["yes"] * 5, name="bad", broken=4)]
    told = run_ranks(2, on_rank, stream_of(files), tmp_path / "survey.json")
    assert (
        told == ["rank 1: bad row 4: no more can be read."] * 2
        and not (tmp_path / "survey.json").exists()
    )
    assert (
        run_ranks(2, on_rank, stream_of([file_of([])]), tmp_path / "survey.json")
        == ["rows has no rows."] * 2
    )


class Gone(MemoryRows):
    """A file that cannot be looked at."""

    @property
    def fingerprint(self) -> str:
        raise DataError("gone.tsv is not there.")


def test_rank_0_does_not_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = stream_of([Gone("gone.tsv", [])])
    assert (
        run_ranks(2, on_rank, read, tmp_path / "survey.json")
        == ["rank 0: gone.tsv is not there."] * 2
    )

    def alone(accelerator: Accelerator) -> None:
        if accelerator.is_main_process:
            raise DataError("gone.tsv is not there.")
        accelerator.wait_for_everyone()

    with pytest.raises(RankError):  # so it would be without agreeing
        run_ranks(2, alone)
