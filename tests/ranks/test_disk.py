"""A disk that is full, or gone, while a run goes on: one clear error on all ranks at once, and what
was written before stays whole.
"""

import os
import resource
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    Files,
    assert_same_run,
    checkpoints_of,
    json_of,
    run_train,
    some_of,
    words_of,
    write_rows,
    write_split,
)
from rows import train_module as train

from bertdist.core.atomic_io import find_damage
from bertdist.training import run_logger
from bertdist.training.run_logger import RunLogger

SETTINGS: dict[str, Any] = {"num_train_epochs": 2, "save_every": "3 steps", "eval_every": "4 steps"}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_split(tmp_path, 38, 12)


def on_rank_0_before(step_number: int, act: Callable[[], None]) -> Callable[[Accelerator], None]:
    def breaking(accelerator: Accelerator) -> None:
        train_step = train.train_step

        def watched(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
            if step.number == step_number and accelerator.is_main_process:
                act()
            return train_step(model, optimizer, step, *rest)

        whole = train.train

        def then_there_is_room(config: Any) -> Any:  # for the rank to tell of its error
            try:
                return whole(config)
            finally:
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        train.train_step, train.train = watched, then_there_is_room

    return breaking


def full() -> None:
    """No file may grow beyond 200 bytes: the status fits, nothing else does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("n", "log_every"),
    some_of([(1, "10 steps"), (3, "1 steps")], product((1, 3), ("1 steps", "10 steps"))),
)
def test_a_disk_that_fills_up_ends_all_ranks_with_one_error(
    tiny_model: Path, files: Files, tmp_path: Path, n: int, log_every: str
) -> None:
    """The log line of step 6 fails, or best/ after step 8."""
    out = tmp_path / "out"
    words = words_of(
        tiny_model,
        out,
        files,
        **{
            **SETTINGS,
            "log_every": log_every,
            "save_every": "3 steps" if "1 " in log_every else "9 steps",
        },
    )
    with pytest.raises(RankError) as caught:
        run_ranks(n, run_train, words, on_rank_0_before(5, full))
    assert str(caught.value).count("errors.CheckpointError: ") == n, (
        "every rank, with the same kind of error"
    )
    assert "File too large" in str(caught.value) and "Connection closed" not in str(caught.value)
    assert json_of(out / "status.json")["state"] == "failed"
    assert all(
        find_damage(out / "checkpoints" / name) is None
        for name in checkpoints_of(out)
        if not name.startswith(".")
    )
    run_ranks(n, run_train, words)  # there is room again
    straight = words_of(
        tiny_model,
        tmp_path / "straight",
        files,
        **{
            **SETTINGS,
            "log_every": log_every,
            "save_every": words[words.index("--save_every") + 1],
        },
    )
    run_ranks(n, run_train, straight)
    assert_same_run(out, tmp_path / "straight")


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_folder_that_vanishes_ends_all_ranks_with_one_error(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RankError) as caught:
        run_ranks(
            n,
            run_train,
            words_of(tiny_model, out, files, **SETTINGS),
            on_rank_0_before(5, lambda: shutil.rmtree(out)),
        )
    assert str(caught.value).count(
        f"CheckpointError: rank 0: Cannot write {out}: No such file or directory."
    ) == (n if n > 1 else 0)
    assert f"Cannot write {out}: No such file or directory." in str(caught.value)


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_bad_rows_that_cannot_be_written_end_all_ranks(
    tiny_model: Path, tmp_path: Path, n: int
) -> None:
    """A stream finds its bad row in the midst of the run."""
    path = write_rows(
        tmp_path / "train.jsonl",
        [{"text": "good film", "label": label} for label in ("no", "yes") * 20],
    )
    with open(path, "a") as file:
        file.write("no json at all " * 30 + "\n")
    out = tmp_path / "out"
    stream = {
        "streaming": True,
        "stream_window": 8,
        "on_bad_row": "skip",
        "max_train_steps": 9,
        "label_names": ["no", "yes"],
    }
    words = words_of(
        tiny_model,
        out,
        Files(path),
        eval_every=None,
        save_every="never",
        log_every="never",
        **stream,
    )
    with pytest.raises(RankError) as caught:
        run_ranks(n, run_train, words, on_rank_0_before(2, full))
    assert str(caught.value).count("errors.CheckpointError: ") == n
    assert f"Cannot write {out / 'bad_rows.jsonl'}: File too large." in str(caught.value)


def test_without_agreement_the_others_would_wait_or_see_a_closed_connection(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    """The control: a log that rank 0 alone fails in."""

    def alone(accelerator: Accelerator) -> None:
        run_logger.open_log = lambda folder, accelerator: RunLogger(
            folder, accelerator.is_main_process
        )

    def breaking(accelerator: Accelerator) -> None:
        alone(accelerator)
        on_rank_0_before(5, full)(accelerator)

    with pytest.raises(RankError) as caught:
        run_ranks(2, run_train, words_of(tiny_model, tmp_path / "out", files, **SETTINGS), breaking)
    assert str(caught.value).count("errors.CheckpointError: ") < 2


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_lines_of_the_log_are_on_the_disk_before_a_checkpoint_is_there(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    """A power cut can undo what was not flushed.

    Whole runs; single calls are in runs/test_every_call.py.
    """
    out, calls = tmp_path / "out", tmp_path / "calls"

    def recording(accelerator: Accelerator) -> None:
        fsync, rename = os.fsync, os.rename

        def note(what: str) -> None:
            lines = (
                (out / "metrics.jsonl").read_text().count("\n")
                if (out / "metrics.jsonl").exists()
                else 0
            )
            with open(calls, "a") as file:
                file.write(f"{what} {lines}\n")

        def flushed(handle: int) -> None:
            fsync(handle)
            if os.readlink(f"/proc/self/fd/{handle}").endswith("/metrics.jsonl"):
                note("flushed")

        def renamed(src: Any, dst: Any) -> None:
            rename(src, dst)
            if Path(dst).name.startswith("step_"):
                note("checkpoint")

        os.fsync, os.rename = flushed, renamed

    run_ranks(n, run_train, words_of(tiny_model, out, files, **SETTINGS), recording)
    order = [line.split() for line in calls.read_text().splitlines()]
    assert [what for what, _ in order] == ["flushed", "checkpoint"] * (len(order) // 2) and len(
        order
    ) == 8
    assert all(
        before == after for (_, before), (_, after) in zip(order[::2], order[1::2], strict=True)
    ), "every line that is there then"
