"""Resuming with other settings or other data: refused, or accepted with a message."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from forked import RankError, run_ranks
from rows import (
    Files,
    at_step,
    die,
    json_of,
    last_checkpoint,
    make_rows,
    run_train,
    some_of,
    tensors_of,
    words_of,
    write_rows,
    write_split,
)

STEPS = {"num_train_epochs": 2, "save_every": "2 steps", "eval_every": "5 steps"}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_split(tmp_path, 38, 12)


def interrupted(model: Path, files: Files, out: Path, n: int = 1, **settings: Any) -> list[str]:
    """A run that was killed at step 7 of 10; returns its arguments."""
    words = words_of(model, out, files, **{**STEPS, **settings})
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(n, run_train, words, at_step(7, die))
    return words


@pytest.mark.parametrize(
    ("stream", "n"), some_of([(False, 2), (True, 1)], product((False, True), (1, 2)))
)
def test_grown_data_are_refused_and_accepted_with_the_flag(
    tiny_model: Path, files: Files, tmp_path: Path, n: int, stream: bool
) -> None:
    words = interrupted(
        tiny_model,
        files,
        tmp_path / "out",
        n,
        **({"streaming": True, "stream_window": 16} if stream else {}),
    )
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "out" / "checkpoints").rglob("*")
        if path.is_file()
    }
    write_rows(files.train, make_rows(38, seed=1) + make_rows(10, seed=5))
    with pytest.raises(RankError) as caught:
        run_ranks(n, run_train, words)
    assert "training_rows" in str(caught.value) and "(--accept_changed_data)" in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before, (
        "refused without changing anything"
    )
    ((progress, seen, said), *_) = run_ranks(n, run_train, [*words, "--accept_changed_data"])
    assert "Settings changed since then:" in said
    assert (
        "accepted: rows of the epoch in progress may be repeated or missed, "
        "later epochs have each row once" in said
    )
    assert progress.finished and progress.step == 12, "two epochs of 48 rows"
    assert seen[0][0] == 6, "the steps done so far are kept"


def test_flag_changes_nothing_if_the_data_did_not_change(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    run_ranks(1, run_train, interrupted(tiny_model, files, tmp_path / "a"))
    ((_, _, said),) = run_ranks(
        1, run_train, [*interrupted(tiny_model, files, tmp_path / "b"), "--accept_changed_data"]
    )
    assert "Settings changed" not in said
    one, other = (tensors_of(last_checkpoint(tmp_path / name)) for name in "ab")
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Path]:
    """The files and the folder of a run that was killed; nobody changes it."""
    folder = tmp_path_factory.mktemp("killed")
    files = write_split(folder, 38, 12)
    interrupted(tiny_model, files, folder / "out")
    return files, folder / "out"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"train_batch_size": 4},
        {"max_length": 9},
        {"learning_rate": 0.5},
        {"label_names": ["positive", "negative"]},
        {"num_train_epochs": 3},
    ],
)
def test_changes_that_must_match_are_refused_on_all_ranks(
    tiny_model: Path, killed: tuple[Files, Path], change: dict[str, Any]
) -> None:
    files, out = killed
    words = words_of(tiny_model, out, files, **{**STEPS, **change})
    with pytest.raises(RankError) as caught:
        run_ranks(2, run_train, words)
    (name,) = change
    name = {"label_names": "labels", "num_train_epochs": "total_steps"}.get(name, name)
    assert str(caught.value).count(
        f"\n  {name} "
    ) == 2 and "belongs to a run with other settings:" in str(caught.value)


def test_another_pretrained_model_is_refused_and_a_moved_one_is_not(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    interrupted(tiny_model, files, tmp_path / "out")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    config = json_of(copy / "config.json")
    (copy / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    words = words_of(copy, tmp_path / "out", files, **STEPS)
    with pytest.raises(RankError, match=r"\n  model_config .* compute something else"):
        run_ranks(2, run_train, words)
    (copy / "config.json").write_text(json.dumps(config))
    ((progress, seen, said),) = run_ranks(1, run_train, words)
    assert progress.finished and seen[0][0] == 6
    assert "its weights are not used: those of the checkpoint are" in said
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(RankError, match=r"\n  model_config "):  # finished
        run_ranks(1, run_train, words)


def test_extended_run_at_a_constant_rate_equals_the_longer_run(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    def words(out: str, epochs: int, **more: Any) -> list[str]:
        settings = {**STEPS, "num_train_epochs": epochs, "lr_scheduler_type": "constant", **more}
        return words_of(tiny_model, tmp_path / out, files, **settings)

    run_ranks(1, run_train, words("a", 1))
    ((progress, seen, said),) = run_ranks(1, run_train, words("a", 2))
    assert "total_steps  5       10   constant learning rate: more or fewer steps" in said
    assert progress.finished and [step for step, _ in seen] == list(range(5, 10))
    run_ranks(1, run_train, words("b", 2))
    one, other = (tensors_of(last_checkpoint(tmp_path / name)) for name in "ab")
    assert one.keys() == other.keys() and all(
        bool((one[name] == other[name]).all()) for name in one
    )
    run_ranks(1, run_train, words("c", 2, lr_scheduler_type="linear"))  # negative control
    assert any(
        bool((tensor != other[name]).any())
        for name, tensor in tensors_of(last_checkpoint(tmp_path / "c")).items()
    )


def test_another_metric_resets_the_best_score(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    """Otherwise an f1 of 0.6 would never replace an accuracy of 0.8."""
    words = interrupted(
        tiny_model, files, tmp_path / "out", eval_every="2 steps", metric_for_best_model="accuracy"
    )
    ((progress, _, said),) = run_ranks(
        1, run_train, [*words, "--metric_for_best_model", "f1_macro"]
    )
    assert (
        "metric_for_best_model  accuracy  f1_macro  scores do not compare: "
        "the next evaluation counts as the best so far" in said
    )
    best = json_of(tmp_path / "out" / "evaluation.json")
    later = [
        line
        for line in json_of(tmp_path / "out" / "metrics.jsonl")
        if line["kind"] == "eval" and line["step"] > 6
    ]
    assert progress.best_step > 6 and best["step"] == progress.best_step
    assert best["scores"]["f1_macro"] == max(line["f1_macro"] for line in later)
