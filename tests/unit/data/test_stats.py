"""What must be known before the first step: from flags where they say it, else by reading; and who reads which files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from hypothesis import given
from hypothesis import strategies as st
from rows import MemoryRows

from bertdist.core.args import read_config
from bertdist.core.config import TrainConfig
from bertdist.core.errors import BertdistError, CheckpointError, DataError
from bertdist.data import stats as known_module
from bertdist.data.batch import Step
from bertdist.data.records import Columns, records_of
from bertdist.data.source import SkippedRow
from bertdist.data.stats import (
    DatasetStats,
    LabelStats,
    agreement,
    assign_files_to_ranks,
    collect_stats,
)
from bertdist.data.streaming import Stream

ALONE: Any = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
STEPS = ["--max_train_steps=9", "--eval_every=3 steps", "--save_every=50%"]


def config_of(out: Path, *words: str) -> TrainConfig:
    return read_config(
        [
            "--model_name_or_path=m",
            "--train_file=t.tsv",
            "--validation_file=d.tsv",
            f"--output_dir={out}",
            "--streaming",
            *words,
        ]
    )


def stream_of(files: Sequence[MemoryRows], **changes: Any) -> Stream:
    asked = Columns("text", None, "label", None)
    settings = {"on_bad_row": "skip", "max_bad_rows": 99, **changes}
    return Stream(
        **{
            "name": "t.tsv",
            "parts": [files],
            "asked": asked,
            "label_delimiter": None,
            "window_rows": 4,
            "seed": 0,
            **settings,
        }
    )


def file_of(labels: Sequence[Any], name: str = "file", **changes: Any) -> MemoryRows:
    return MemoryRows(
        name,
        [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)],
        **changes,
    )


# ---- What is known, and how


def test_rows_in_memory_know_it_all(tmp_path: Path) -> None:
    codes = np.array([0, 1, 0], np.int32)
    rows = dataclasses.replace(
        records_of(["a", "b", "c"]),
        label_kind="text",
        label_values=["no", "yes"],
        label_codes=codes,
        label_column="l",
    )
    found = collect_stats(rows, config_of(tmp_path), ALONE, pytest.fail)
    assert found == DatasetStats(LabelStats("text", ["no", "yes"], [2, 1], None, "l"), [3])


def test_a_stream_is_read_once_and_it_is_said_what_for(tmp_path: Path) -> None:
    files = [file_of(["no", "yes", "no"]), file_of([]), file_of(["maybe"])]
    said: list[str] = []
    found = collect_stats(stream_of(files), config_of(tmp_path), ALONE, said.append)
    assert (dict(zip(found.labels.values, found.labels.counts, strict=True)), found.rows) == (
        {"no": 2, "yes": 1, "maybe": 1},
        [3, 0, 1],
    )
    assert said == [
        "Reading t.tsv once, for its labels (--label_names tells them), its length (--max_train_steps instead of --num_train_epochs), "
        "--eval_every '1 epoch' (in steps it needs no length), --save_every '1 epoch' (in steps it needs no length)."
    ]
    assert (tmp_path / "survey.json").exists()


@pytest.mark.parametrize(
    ("words", "labels", "reasons"),
    [
        ([*STEPS], ["no", "yes"], "its labels (--label_names tells them)"),
        ([*STEPS, "--label_names", "no", "yes", "maybe"], ["no", "yes"], None),
        (
            [*STEPS, "--label_names", "no", "yes", "--class_weights=balanced"],
            ["no"],
            "the rows of each label (--class_weights balanced)",
        ),
        ([*STEPS, "--label_names", "no", "yes", "--class_weights", "1", "2"], ["no"], None),
        (
            [*STEPS, "--label_names", "no", "yes", "--log_every=0.1 epochs"],
            ["no"],
            "--log_every '0.1 epochs' (in steps it needs no length)",
        ),
        ([*STEPS], [0.5, 1.5], None),
        ([*STEPS], [3, 4], "its labels (--label_names tells them)"),
        ([*STEPS, "--problem_type=regression"], ["3", "4"], None),
        (
            [*STEPS[1:], "--label_names", "no", "yes"],
            ["no"],
            "its length (--max_train_steps instead of --num_train_epochs)",
        ),
    ],
)
def test_flags_make_the_reading_needless(
    tmp_path: Path, words: list[str], labels: list[Any], reasons: str | None
) -> None:
    read, said = (
        stream_of([file_of(labels), file_of(["other"] if isinstance(labels[0], str) else labels)]),
        list[str](),
    )
    found = collect_stats(read, config_of(tmp_path, *words), ALONE, said.append)
    assert said == ([] if reasons is None else [f"Reading t.tsv once, for {reasons}."])
    assert (found.rows == []) == (reasons is None) == (not (tmp_path / "survey.json").exists())


def test_without_reading_the_labels_are_those_that_were_named(tmp_path: Path) -> None:
    named = config_of(tmp_path, *STEPS, "--label_names", "no", "yes", "maybe")
    found = collect_stats(stream_of([file_of(["no", "no"])]), named, ALONE, pytest.fail).labels
    assert (found.kind, found.values, found.column) == (
        "text",
        ["no", "yes", "maybe"],
        "label",
    ) and len(found.counts) == 3
    sets = stream_of([file_of(["no,yes", "no"])], label_delimiter=",")
    assert collect_stats(sets, named, ALONE, pytest.fail).labels.values == [
        ("no",),
        ("yes",),
        ("maybe",),
    ]
    feature = SimpleNamespace(names=["bad", "good"])
    fixed = stream_of([file_of([0, 1], features={"label": feature})])
    found = collect_stats(fixed, config_of(tmp_path, *STEPS), ALONE, pytest.fail).labels
    assert (found.values, found.class_names) == (["bad", "good"], ("bad", "good"))


def first_look(accelerator: Accelerator, reads: Sequence[Stream], out: Path) -> str:
    try:
        collect_stats(
            reads[accelerator.process_index], config_of(out, *STEPS), accelerator, lambda text: None
        )
        return "known"
    except DataError as error:
        return str(error)


def test_a_rank_that_cannot_see_the_first_rows_does_not_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = stream_of([file_of(["no", "yes"])]), stream_of([file_of(["no", "yes"], broken=0)])
    assert (
        run_ranks(2, first_look, [good, bad], tmp_path)
        == ["rank 1: file row 0: no more can be read."] * 2
    )
    assert run_ranks(2, first_look, [good, good], tmp_path) == ["known"] * 2


# ---- Which files each rank reads


@given(st.lists(st.none() | st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_files_are_dealt_evenly_and_each_once(sizes: list[int | None], ranks: int) -> None:
    read = stream_of([MemoryRows(f"file {at}", [], bytes=size) for at, size in enumerate(sizes)])
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
    read = stream_of(
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
        sorted(set(map(len, assign_files_to_ranks(stream_of(files), 512)))) == [19, 20]
        and Counted.asked == 10_000
    )


# ---- Agreeing on a step


def assert_same_on_all_ranks(accelerator: Accelerator, told: Sequence[Sequence[Any]]) -> list[Any]:
    """What each call gave; steps are told by their rows."""
    agree, found = agreement(accelerator), list[Any]()
    for of_rank in told:
        one = of_rank[accelerator.process_index]
        try:
            found.append(agree(Step(number=0, share=[], rows=one) if isinstance(one, int) else one))
        except BertdistError as error:
            found.append((type(error).__name__, str(error), error.on_all_ranks))
    return found


def test_ranks_agree_on_the_rows_of_a_step() -> None:
    assert run_ranks(1, assert_same_on_all_ranks, [[3], [None]]) == [[(3, ()), (0, ())]]
    assert (
        run_ranks(2, assert_same_on_all_ranks, [[3, 4], [3, None], [None, None]])
        == [[(7, ()), (3, ()), (0, ())]] * 2
    )


def test_ranks_know_what_any_of_them_left_out() -> None:
    first, second = SkippedRow("a", 1, "no row", ""), SkippedRow("b", 2, "no row", "")
    steps = [Step(number=0, share=[], rows=2, bad=bad) for bad in ((first,), (second, first), ())]
    told = [[steps[0], steps[1]], [steps[2], steps[0]], [None, steps[1]], [steps[2], steps[2]]]
    assert (
        run_ranks(2, assert_same_on_all_ranks, told)
        == [[(4, (first, second, first)), (4, (first,)), (2, (second, first)), (4, ())]] * 2
    )


def test_an_error_on_one_rank_is_raised_on_all_and_the_next_call_is_in_step() -> None:
    lost = DataError("file row 3: lost.")
    told = ("DataError", "rank 1: file row 3: lost.", True)
    assert (
        run_ranks(2, assert_same_on_all_ranks, [[3, 4], [3, lost], [1, 1]])
        == [[(7, ()), told, (2, ())]] * 2
    )
    both = run_ranks(2, assert_same_on_all_ranks, [[CheckpointError("a"), DataError("b")]])
    assert both == [[("CheckpointError", "rank 0: a\nrank 1: b", True)]] * 2


def test_an_error_that_is_not_agreed_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_module, "all_reduce_sum", lambda accelerator, values, group: values)
    found = run_ranks(
        2,
        lambda accelerator: (
            accelerator.process_index == 0 or assert_same_on_all_ranks(accelerator, [[3, 4]])
        ),
    )
    assert found == [True, [(4, ())]], "the control: without an exchange each has its own rows"


def test_agreeing_begins_with_the_first_step() -> None:
    """A rank that fails while a run is set up leaves nobody waiting: opening an agreement exchanges nothing."""

    def only_one(accelerator: Accelerator) -> bool:
        return accelerator.process_index == 0 or bool(agreement(accelerator))

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(
            known_module, "host_group", lambda accelerator: accelerator.wait_for_everyone()
        )
        assert run_ranks(2, only_one) == [True, True]
        assert run_ranks(2, assert_same_on_all_ranks, [[3, 4]]) == [[(7, ())]] * 2
        patch.setattr(
            known_module, "cache", lambda group: (group(), group)[1]
        )  # the control: at once
        with pytest.raises(RankError):
            run_ranks(2, only_one, timeout=5)
