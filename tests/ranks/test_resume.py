"""I5: a resumed run equals an uninterrupted one. I6: a checkpoint is complete or absent.

Every run here has dropout. Runs are compared bit for bit: weights, optimizer, step log, predictions
(`rows.assert_same_run`).
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    Breaking,
    assert_same_run,
    assert_same_tensors,
    both,
    checkpoints_of,
    json_of,
    last_checkpoint,
    run_train,
    skip_updates,
    some_of,
    step_log,
    tensors_of,
)
from rows import train_module as train
from undisturbed import STEPS, Runs, run_on_ranks_in_turn

from bertdist.core import atomic_io
from bertdist.core.atomic_io import find_damage
from bertdist.training import best_model as best
from bertdist.training import checkpoint, micro_batches
from bertdist.training.run_logger import RunLogger


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("resume"))


def at_step(number: int, act: Callable[[Accelerator], None]) -> Breaking:
    """Act on every rank before step `number` is taken."""

    def breaking(accelerator: Accelerator) -> None:
        train_step = train.train_step

        def watched(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
            if step.number == number:
                act(accelerator)
            return train_step(model, optimizer, step, *rest)

        train.train_step = watched

    return breaking


def die(accelerator: Accelerator) -> None:
    os._exit(9)


def ask_the_last_rank_to_stop(accelerator: Accelerator) -> None:
    if accelerator.process_index == accelerator.num_processes - 1:
        os.kill(os.getpid(), signal.SIGTERM)


# --- I5


@pytest.mark.parametrize("n", some_of([3], [1, 2]))
def test_resume_equals_uninterrupted(runs: Runs, tmp_path: Path, n: int) -> None:
    """Killed at one random step, asked to stop at a later one."""
    chance = random.Random(n)
    first = chance.randrange(1, STEPS - 5)
    second = chance.randrange(first, STEPS - 1)
    words = runs.words(tmp_path / "out")
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(n, run_train, words, at_step(first, die))
    (progress, *_), *_ = run_ranks(n, run_train, words, at_step(second, ask_the_last_rank_to_stop))
    assert (progress.step, progress.finished) == (second + 1, False)
    status = json_of(tmp_path / "out" / "status.json")
    assert status == {
        "state": "preempted",
        "step": second + 1,
        "reason": "SIGTERM" if n == 1 else "a stop was requested on another rank",
    }
    (progress, *_), *_ = run_ranks(n, run_train, words)
    assert (progress.step, progress.finished) == (STEPS, True)
    assert_same_run(tmp_path / "out", runs.undisturbed(n))


def test_stop_between_two_log_lines_changes_neither(runs: Runs, tmp_path: Path) -> None:
    """The checkpoint of a stop gathers losses at an extra step; on three ranks sums may round."""
    words = runs.words(tmp_path / "out")
    run_ranks(3, run_train, words, at_step(4, ask_the_last_rank_to_stop))
    run_ranks(3, run_train, words)
    assert_same_run(tmp_path / "out", runs.undisturbed(3))


def test_meter_line_of_a_stopped_process_is_replaced_by_the_next_one(
    runs: Runs, tmp_path: Path
) -> None:
    """A stopped process leaves a line of kind "meter"; the next process replaces it by its own."""
    out, words = tmp_path / "out", runs.words(tmp_path / "out")

    def meter_lines() -> list[tuple[Any, ...]]:
        lines = [line for line in json_of(out / "metrics.jsonl") if line["kind"] == "meter"]
        return [(line["step"], line["finished"], line["train_steps"]) for line in lines]

    run_ranks(2, run_train, words, at_step(4, ask_the_last_rank_to_stop))
    assert meter_lines() == [(5, False, 5)]
    ended = run_ranks(2, run_train, [*words, "--verbose"])
    assert meter_lines() == [(STEPS, True, STEPS - 5)]
    assert f"{STEPS - 5} steps in " in ended[0][2] and "load imbalance (max/mean) 1." in ended[0][2]
    run_ranks(2, run_train, words)
    assert meter_lines() == [(STEPS, True, STEPS - 5)]
    assert_same_run(out, runs.undisturbed(2))


def die_while_writing_the_meter_line(accelerator: Accelerator) -> None:
    write = RunLogger.write

    def torn(self: RunLogger, kind: str, step: int, **values: Any) -> None:
        write(self, kind, step, **values)
        if kind == "meter":
            path = self.folder / "metrics.jsonl"
            os.truncate(path, path.stat().st_size - 40)
            os._exit(9)

    RunLogger.write = torn  # type: ignore[method-assign]


def keep_all_lines(accelerator: Accelerator) -> None:
    RunLogger._rewind = lambda self, *args: None  # type: ignore[method-assign]


@pytest.mark.parametrize("breaking", [None, keep_all_lines])
def test_one_meter_line_remains_after_stops_and_kills(
    runs: Runs, tmp_path: Path, breaking: Breaking | None
) -> None:
    """Stopped, killed, killed while writing the line, and resumed each time: one complete line."""
    out, words = tmp_path / "out", runs.words(tmp_path / "out", log_every="1 steps")
    path, broken = out / "metrics.jsonl", [breaking] if breaking else []
    run_ranks(1, run_train, words, at_step(3, ask_the_last_rank_to_stop))
    assert [line["finished"] for line in json_of(path) if line["kind"] == "meter"] == [False]
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words, both(*broken, at_step(7, die)))
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(
            1,
            run_train,
            words,
            both(*broken, at_step(10, ask_the_last_rank_to_stop), die_while_writing_the_meter_line),
        )
    began = time.perf_counter()
    ((_, seen, _),) = run_ranks(1, run_train, words, breaking)
    seconds = time.perf_counter() - began
    assert [step for step, _ in seen] == list(range(9, STEPS)), (
        "from the checkpoint before the torn line"
    )
    if (
        breaking is not None
    ):  # negative control: the stopped process's line and a truncated line remain
        assert sum('"meter"' in line for line in path.read_text().splitlines()) > 1
        with pytest.raises(ValueError, match=r"delimiter|Expecting|Extra data"):
            json_of(path)
        return
    lines = json_of(path)
    (meter,) = (line for line in lines if line["kind"] == "meter")
    assert (meter["step"], meter["finished"], meter["train_steps"]) == (STEPS, True, STEPS - 9)
    tokens = {line["step"]: line["tokens"] for line in lines if line["kind"] == "train"}
    assert list(tokens) == list(range(1, STEPS + 1))
    assert meter["tokens_per_second"] * meter["train_seconds"] == pytest.approx(
        tokens[STEPS] - tokens[9]
    )
    assert 0 < meter["data_wait_seconds"] < meter["train_seconds"] < seconds
    assert meter["padding_factor"] == meter["slowest_rank"] == 1
    assert meter["model_tflops"] == pytest.approx(
        meter["flop_utilization"] * meter["matmul_tflops"]
    )


def test_killed_between_last_log_line_and_last_checkpoint(runs: Runs, tmp_path: Path) -> None:
    def die_instead_of_saving(accelerator: Accelerator) -> None:
        save = train.Checkpointer.save

        def saving(self: Any, model: Any, optimizer: Any, state: Any) -> None:
            if state.finished:
                die(accelerator)
            save(self, model, optimizer, state)

        train.Checkpointer.save = saving

    words = runs.words(tmp_path / "out")
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words, die_instead_of_saving)
    assert step_log(tmp_path / "out", "meter") == [
        {"kind": "meter", "step": STEPS, "finished": True}
    ]
    run_ranks(1, run_train, words)
    assert_same_run(tmp_path / "out", runs.undisturbed(1))


@pytest.mark.parametrize("step", some_of([5], [4, 12]))
def test_killed_between_checkpoints(runs: Runs, tmp_path: Path, step: int) -> None:
    """After a log line newer than any checkpoint; at the start of an epoch; after a checkpoint."""
    words = runs.words(tmp_path / "out")
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words, at_step(step, die))
    run_ranks(1, run_train, words)
    assert_same_run(tmp_path / "out", runs.undisturbed(1))


def test_resume_with_loader_workers(runs: Runs, tmp_path: Path) -> None:
    words = runs.words(tmp_path / "out", dataloader_num_workers=2)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words, at_step(8, die))
    run_ranks(1, run_train, words)
    assert_same_run(tmp_path / "out", runs.undisturbed(1))


@pytest.mark.parametrize("n", some_of([1], [2]))
def test_dropout_that_is_not_a_function_of_the_step_is_detected(
    runs: Runs, tmp_path: Path, n: int
) -> None:
    def unseeded(accelerator: Accelerator) -> None:
        seed_dropout, calls = train.seed_dropout, count()
        train.seed_dropout = lambda seed, step, rank: seed_dropout(
            seed, next(calls), rank
        )  # a start counts from 0 again

    outs = [tmp_path / "straight", tmp_path / "resumed"]
    run_ranks(n, run_train, runs.words(outs[0]), unseeded)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(n, run_train, runs.words(outs[1]), both(unseeded, at_step(7, die)))
    run_ranks(n, run_train, runs.words(outs[1]), unseeded)
    with pytest.raises(AssertionError):
        assert_same_run(*outs)


def test_three_ranks_without_the_warm_up_backward_are_detected(runs: Runs, tmp_path: Path) -> None:
    """DDP reorders its buckets after the first backward, and gloo's sum over three ranks rounds by
    position: 116 of 164 tensors differ, by up to 7e-5. One and two ranks are not affected."""

    def cold(accelerator: Accelerator) -> None:
        micro_batches.MicroBatcher.warm_up_ddp = lambda self, model: None  # type: ignore[method-assign]

    outs = [tmp_path / "straight", tmp_path / "resumed"]
    run_ranks(3, run_train, runs.words(outs[0]), cold)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(3, run_train, runs.words(outs[1]), both(cold, at_step(7, die)))
    run_ranks(3, run_train, runs.words(outs[1]), cold)
    with pytest.raises(AssertionError):
        assert_same_run(*outs)


def test_stopped_on_4_ranks_it_goes_on_with_2_then_3_then_1(runs: Runs, tmp_path: Path) -> None:
    """The same rows in the same steps, and the loss curve of one rank, with dropout."""
    out, copy, straight = tmp_path / "out", tmp_path / "copy", runs.undisturbed(1)
    begun, said = run_on_ranks_in_turn(runs.words(out), [4, 2, 3], [2, 6, 11])
    shutil.copytree(out, copy)
    ended, last = run_on_ranks_in_turn(runs.words(out), [1], [])
    for before, now, text in zip([4, 2, 3], [2, 3, 1], [*said[1:], *last], strict=True):
        assert f"Written by {before} processes, resumed by {now}: the same rows per step;" in text
    assert begun | ended == runs.rows[1]
    assert same_curve(out, straight) and not same_curve(out, straight, 1e-12)
    # Controls: a step that is left out; rows that are those of other steps.
    run_ranks(1, run_train, runs.words(copy), skip_updates({1}))
    assert not same_curve(copy, straight)
    assert begun | {number: ended.get(number + 1, []) for number in ended} != runs.rows[1]


def same_curve(one: Path, other: Path, most: float = 1e-5) -> bool:
    """Whether the step logs differ by rounding only."""
    return all(
        mine == pytest.approx(theirs, abs=most)
        for mine, theirs in zip(step_log(one), step_log(other), strict=True)
    )


def test_restarting_a_finished_run_changes_nothing(runs: Runs) -> None:
    out = runs.undisturbed(1)
    kept = {
        path: path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "environment.json"
    }
    ((progress, seen, said),) = run_ranks(1, run_train, runs.words(out))
    assert (progress.step, progress.finished, seen) == (STEPS, True, [])
    assert f"Finished: {STEPS} steps, best weights (step {progress.best_step})" in said
    assert {
        path: path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "environment.json"
    } == kept


def test_resume_from_a_named_checkpoint(runs: Runs, tmp_path: Path) -> None:
    words = runs.words(tmp_path / "out", save_total_limit=9)
    run_ranks(1, run_train, words)
    named = tmp_path / "out" / "checkpoints" / "step_000006"
    ((_, seen, said),) = run_ranks(1, run_train, [*words, "--resume_from_checkpoint", str(named)])
    assert f"Resuming from {named} (step 6)." in said and seen[0][0] == 6
    assert_same_run(tmp_path / "out", runs.undisturbed(1))
    copy = shutil.copytree(named, tmp_path / "backup")
    ((_, seen, said),) = run_ranks(1, run_train, [*words, "--resume_from_checkpoint", str(copy)])
    assert f"Resuming from {named} (step 6)." in said and seen[0][0] == 6
    assert "Removed" not in said and "are not in" not in said
    assert_same_run(tmp_path / "out", runs.undisturbed(1))


# --- I6


def die_while_writing(file: str, times: int) -> Breaking:
    """The process dies with half of `file` written, at checkpoint number `times`."""

    def breaking(accelerator: Accelerator) -> None:
        save_file, count = checkpoint.save_file, iter(range(1, 99))

        def broken(tensors: Any, path: Path) -> None:
            save_file(tensors, path)
            if path.name == file and next(count) == times:
                os.truncate(path, path.stat().st_size // 2)
                os._exit(9)

        checkpoint.save_file = broken

    return breaking


def die_before_rename_to(name: str) -> Breaking:
    """The process dies when everything is written, before the rename."""

    def breaking(accelerator: Accelerator) -> None:
        rename = os.rename

        def broken(old: Path, new: Path) -> None:
            if new.name == name:
                os._exit(9)
            rename(old, new)

        os.rename = broken

    return breaking


@pytest.mark.parametrize(
    ("n", "breaking", "left", "resumes_at"),
    [
        (1, die_while_writing("model.safetensors", 1), [".step_000003.partial"], 0),
        (
            1,
            die_while_writing("optimizer.safetensors", 3),
            [".step_000009.partial", "step_000003", "step_000006"],
            6,
        ),
        (2, die_before_rename_to("step_000006"), [".step_000006.partial", "step_000003"], 3),
        (1, die_before_rename_to("best"), None, None),
    ],
)
def test_kill_while_writing_leaves_the_older_checkpoint(
    runs: Runs,
    tmp_path: Path,
    n: int,
    breaking: Breaking,
    left: list[str] | None,
    resumes_at: int | None,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(n, run_train, runs.words(out), breaking)
    if left is not None:
        assert checkpoints_of(out) == left
        assert all(
            find_damage(out / "checkpoints" / name) is None
            for name in left
            if not name.startswith(".")
        )
    ended = run_ranks(n, run_train, runs.words(out))
    if resumes_at is not None and left is not None:
        assert ended[0][1][0][0] == resumes_at
        assert f"Removing {left[0]}: writing this checkpoint was interrupted." in ended[0][2]
    assert_same_run(out, runs.undisturbed(n))
    assert not list(out.rglob(".*")), "no partial file is left"


def test_checkpoint_written_in_place_is_detected(runs: Runs, tmp_path: Path) -> None:
    """Negative control: the same kill with a write_folder that writes in place leaves damage."""

    def in_place(accelerator: Accelerator) -> None:
        def write_folder(final: Path, fill: Callable[[Path], None], size: int) -> None:
            final.mkdir(parents=True, exist_ok=True)
            fill(final)

        checkpoint.write_folder = best.write_folder = write_folder

    out = tmp_path / "out"
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(
            1,
            run_train,
            runs.words(out),
            both(in_place, die_while_writing("optimizer.safetensors", 3)),
        )
    assert any(find_damage(out / "checkpoints" / name) for name in checkpoints_of(out))


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "optimizer.safetensors", 100)


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("n", "damage", "damage_message"),
    [
        (2, flip_a_bit, "model.safetensors is not what was written (its digest differs)"),
        (1, cut_short, "optimizer.safetensors has 100 bytes instead of "),
        (1, lose_the_manifest, "manifest.json is missing"),
    ],
)
def test_damaged_checkpoint_is_named_and_skipped(
    runs: Runs, tmp_path: Path, n: int, damage: Callable[[Path], None], damage_message: str
) -> None:
    out, words = tmp_path / "out", runs.words(tmp_path / "out")
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(n, run_train, words, at_step(7, die))
    damage(last_checkpoint(out))
    ended = run_ranks(n, run_train, words)
    assert ended[0][1][0][0] == 3, "resumes from the older one"
    assert (
        f"Skipping damaged checkpoint {out / 'checkpoints' / 'step_000006'}: {damage_message}"
        in ended[0][2]
    )
    assert "Renamed to step_000006.damaged." in ended[0][2]
    assert [said for _, _, said in ended[1:]] == [""] * (n - 1), "only rank 0 prints"
    assert_same_run(out, runs.undisturbed(n))


def test_without_digests_a_flipped_bit_is_loaded(runs: Runs, tmp_path: Path) -> None:
    def trusting(accelerator: Accelerator) -> None:
        atomic_io._digest = lambda path: "0"

    out, words = tmp_path / "out", runs.words(tmp_path / "out")
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words, both(trusting, at_step(7, die)))
    flip_a_bit(last_checkpoint(out))
    ((_, seen, said),) = run_ranks(1, run_train, words, trusting)
    assert seen[0][0] == 6 and "Skipping damaged" not in said
    with pytest.raises(AssertionError):
        assert_same_tensors(
            tensors_of(last_checkpoint(out)), tensors_of(last_checkpoint(runs.undisturbed(1)))
        )
