"""What may change between two starts of a run, and what each change means. Whole runs: ranks/test_changed.py."""

from pathlib import Path
from typing import Any

import pytest

from bertdist.core.args import read_config
from bertdist.core.errors import CheckpointError
from bertdist.data.records import records_of
from bertdist.tasks.tasks import SingleLabel
from bertdist.training.resume_check import (
    ACCEPTED,
    REFUSED,
    Change,
    ResumeSignature,
    compare,
    reader_state_after_change,
    resume_signature,
    table,
)

THEN = {
    "seed": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "training_rows": "9 rows, a",
    "total_steps": 10,
}
FOLDER = Path("out/checkpoints/step_000004")


def state(**changes: Any) -> dict[str, Any]:
    return {
        "identity": {**THEN, **changes},
        "progress": {"step": 4},
        "besides": {"eval_every": "1 epoch"},
    }


def now(accept: bool = False, **changes: Any) -> ResumeSignature:
    return ResumeSignature({**THEN, **changes}, {"eval_every": "1 epoch"}, accept)


def names(found: list[Change]) -> list[str]:
    return [change.name for change in found]


def test_alike_is_alike() -> None:
    assert compare(FOLDER, state(), now()) == []
    assert compare(FOLDER, {"identity": THEN, "progress": {"step": 4}}, now()) == [], (
        "of a checkpoint that knew of nothing besides"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_decides_is_refused_with_what_it_means(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        compare(FOLDER, state(), now(**{name: 99}))
    first, header, row, last = str(caught.value).split("\n")
    assert first == f"{FOLDER} belongs to another run. What differs:"
    assert header.split() == ["setting", "then", "now", "what", "it", "means"]
    assert row.split()[0] == name and " 99 " in row and row.endswith(REFUSED[name])
    assert last == "Take the old settings, or another --output_dir."
    assert header.index("now") == row.index("99"), "columns stand under each other"


def test_a_setting_that_the_table_does_not_know_is_refused_too() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"adam_beta1 +0.9 +0.5 +the steps that are done learned in another way",
    ):
        compare(FOLDER, state(adam_beta1=0.9), now(adam_beta1=0.5))


def test_everything_that_differs_stands_in_one_table() -> None:
    with pytest.raises(CheckpointError) as caught:
        compare(FOLDER, state(), now(seed=2, learning_rate=1.0, labels=["a"] * 50))
    assert [line.split()[0] for line in str(caught.value).split("\n")[2:-1]] == [
        "seed",
        "learning_rate",
        "labels",
    ]
    assert all(len(line) < 200 for line in str(caught.value).split("\n")), "long values are cut"


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_decides_nothing_is_accepted_and_said(name: str) -> None:
    may_change = {"eval_every": "1 epoch", **({name: "x"} if name == "eval_every" else {name: 3})}
    (change,) = compare(FOLDER, state(), ResumeSignature(THEN, may_change))
    assert (change.name, change.meaning) == (name, ACCEPTED[name])


def test_every_setting_of_the_tables_is_one_that_is_remembered() -> None:
    needed = [
        "--model_name_or_path=m",
        "--train_file=t.tsv",
        "--validation_file=d.tsv",
        "--output_dir=o",
    ]
    config = read_config(needed)
    rows = records_of(["a"])
    found = resume_signature(config, rows, rows, SingleLabel(("a", "b")), 3)
    assert found.may_change.keys() == ACCEPTED.keys()
    assert set(REFUSED) - {"stream_window", "stream_sharding"} <= found.must_match.keys()


# ---- Data that changed

OTHER = {"training_rows": "12 rows, b", "total_steps": 13}


def test_changed_data_is_refused_and_the_flag_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"training_rows +9 rows, a +12 rows, b .*\(--accept_changed_data\)"
    ):
        compare(FOLDER, state(), now(**OTHER))


def test_changed_data_is_accepted_by_the_flag_and_nothing_else_is() -> None:
    accepted = compare(FOLDER, state(), now(accept=True, **OTHER))
    assert names(accepted) == ["training_rows", "total_steps"]
    assert "twice or not at all" in accepted[0].meaning
    with pytest.raises(CheckpointError) as caught:
        compare(FOLDER, state(), now(accept=True, seed=3, **OTHER))
    assert "seed" in str(caught.value) and "training_rows" not in str(caught.value)
    with pytest.raises(CheckpointError, match="total_steps"):
        compare(
            FOLDER, state(), now(accept=True, total_steps=13)
        )  # the flag alone, for rows that are the same


@pytest.mark.parametrize("accept", [False, True])
def test_fewer_steps_than_are_done_are_refused(accept: bool) -> None:
    with pytest.raises(CheckpointError, match=r"total_steps +10 +4 +4 are done already"):
        compare(FOLDER, state(), now(accept=accept, training_rows="2 rows, b", total_steps=4))


@pytest.mark.parametrize(
    ("then", "later", "accepted"),
    [
        ({"lr_scheduler_type": "constant"}, {}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, {}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}, {}, False),
        ({"lr_scheduler_type": "linear"}, {}, False),
        ({"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant"}, False),
    ],
)
def test_a_constant_learning_rate_allows_more_steps(
    then: dict[str, Any], later: dict[str, Any], accepted: bool
) -> None:
    if accepted:
        assert names(compare(FOLDER, state(**then), now(total_steps=20, **then))) == ["total_steps"]
    else:
        with pytest.raises(CheckpointError, match="total_steps"):
            compare(FOLDER, state(**then), now(total_steps=20, **{**then, **later}))


def test_a_stream_whose_data_changed_begins_its_epoch_again() -> None:
    within = {
        "window": {"epoch": 2, "window": 5, "rows": 70, "cursors": [{"pass": 2, "file": 1}]},
        "step": 3,
    }
    between = {"over": {"epoch": 3, "window": 0, "rows": 0, "cursors": []}}
    changed = [Change("training_rows", "a", "b", "")]
    begun = {"epoch": 2, "window": 0, "rows": 0, "cursors": []}
    assert reader_state_after_change(within, changed) == {"window": begun, "step": 0}
    assert reader_state_after_change(between, changed) == between
    assert reader_state_after_change(within, []) is within
    assert reader_state_after_change(None, changed) is None


def test_a_table_is_aligned() -> None:
    rows = [Change("a", 1, "x" * 60, "means"), Change("longer", [1, 2], None, "more")]
    assert table(rows) == [
        "  setting  then    now                                               what it means",
        f"  a        1       {'x' * 44} ...  means",
        "  longer   [1, 2]  None                                              more",
    ]
