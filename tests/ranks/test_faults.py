"""What happens to a run when a rank dies, hangs, differs or is asked to stop in the midst of something; and that nothing is lost."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate import Accelerator
from forked import TO_TELL, RankError, run_ranks
from rows import (
    EVERY_FAULT,
    Breaking,
    assert_same_run,
    checkpoints_of,
    json_of,
    make_rows,
    on_rank,
    run_main,
    run_train,
    some_of,
    words_of,
    write_rows,
)
from rows import train_module as train
from undisturbed import STEPS, Runs

from bertdist import predict
from bertdist.core.errors import BertdistError
from bertdist.data import loader as begin
from bertdist.data import tokenization as encoding
from bertdist.distributed import launch, watchdog
from bertdist.training import evaluation
from bertdist.training.checkpoint import find_damage


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("faults"))


def before_step(number: int, act: Callable[[], object]) -> Callable[[], None]:
    def patch() -> None:
        train_step = train.train_step

        def watched(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
            if step.number == number:
                act()
            return train_step(model, optimizer, step, *rest)

        train.train_step = watched

    return patch


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def in_evaluation(number: int, act: Callable[[], object]) -> Callable[[], None]:
    """Act in the so-manieth evaluation, before its first micro-batch is computed."""

    def patch() -> None:
        compute, left = evaluation.compute_in_micro_batches, iter(range(1, 99))

        def watched(*args: Any) -> Any:
            if next(left) == number:
                act()
            return compute(*args)

        evaluation.compute_in_micro_batches = watched

    return patch


def told_by_each(
    accelerator: Accelerator, words: list[str], breaking: Breaking, folder: Path
) -> None:
    """run_main, where some ranks do not live to tell: (exit code, standard error) goes into a file."""
    code, said, _ = run_main(accelerator, words, breaking)
    (folder / f"told_{accelerator.process_index}.json").write_text(json.dumps([code, said]))


def told(folder: Path) -> dict[int, tuple[int, list[str]]]:
    """Rank -> (exit code, lines of complaint)."""
    found = {}
    for path in sorted(folder.glob("told_*.json")):
        code, said = json.loads(path.read_text())
        found[int(path.stem[5:])] = (
            code,
            [
                line
                for line in said.splitlines()
                if line.startswith("bertdist: ") or "Traceback" in line
            ],
        )
    return found


# --- Asked to stop, in the midst of something


@pytest.mark.parametrize(  # number: 1 is after step 4; 4 is the last
    ("n", "number"), some_of([(1, 4), (3, 1)], product((1, 2, 3), (1, 4)))
)
def test_a_stop_in_an_evaluation_is_answered_there_and_the_evaluation_is_made_up_for(
    runs: Runs, tmp_path: Path, n: int, number: int
) -> None:
    out, step = tmp_path / "out", {1: 4, 4: STEPS}[number]
    results = run_ranks(
        n, run_main, runs.words(out), on_rank(n - 1, in_evaluation(number, ask_to_stop))
    )
    assert [code for code, _, _ in results] == [75] * n
    assert (
        f"step {step} of {STEPS} is saved. Rerun the same command to resume, starting with the evaluation."
        in results[0][1]
    )
    assert json_of(out / "status.json")["state"] == "preempted"
    assert (
        json_of(out / "checkpoints" / f"step_{step:06d}" / "state.json")["train_state"][
            "evaluation_pending"
        ]
        is True
    )
    assert [line["step"] for line in json_of(out / "metrics.jsonl") if line["kind"] == "eval"] == [
        4,
        8,
        12,
    ][: number - 1]
    run_ranks(n, run_train, runs.words(out))
    assert_same_run(out, runs.undisturbed(n))


def test_an_owed_evaluation_that_is_forgotten_is_seen(runs: Runs, tmp_path: Path) -> None:
    def forgetful(accelerator: Accelerator) -> None:
        restore = train.Checkpointer.restore

        def forgetting(*args: Any) -> Any:
            state = restore(*args)
            state.evaluation_pending = False
            return state

        train.Checkpointer.restore = forgetting

    out = tmp_path / "out"
    run_ranks(1, run_main, runs.words(out), on_rank(0, in_evaluation(1, ask_to_stop)))
    run_ranks(1, run_train, runs.words(out), forgetful)
    with pytest.raises(AssertionError):
        assert_same_run(out, runs.undisturbed(1))


def test_killed_behind_an_owed_evaluation_its_line_stands_once(runs: Runs, tmp_path: Path) -> None:
    """The evaluation is made up for and written down; before a checkpoint knows of it, the process dies."""
    out, words = tmp_path / "out", runs.words(tmp_path / "out")
    run_ranks(1, run_main, words, on_rank(0, in_evaluation(1, ask_to_stop)))
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words, on_rank(0, before_step(4, lambda: os._exit(9))))
    run_ranks(1, run_train, words)
    assert_same_run(out, runs.undisturbed(1))


def test_another_rank_finishes_its_step_and_no_more(runs: Runs, tmp_path: Path) -> None:
    """An evaluation of several steps: the rank that was not asked computes no step behind the one in which another was."""

    def small_steps(accelerator: Accelerator) -> None:
        begin.EVALUATION_ROWS = 2
        on_rank(1, in_evaluation(1, ask_to_stop))(accelerator)
        compute = evaluation.compute_in_micro_batches

        def counted(*args: Any) -> Any:
            for batch, found in compute(*args):
                computed.append(batch.row_numbers.tolist())
                yield batch, found

        evaluation.compute_in_micro_batches = counted

    def run(accelerator: Accelerator, words: list[str]) -> Any:
        return run_main(accelerator, words, small_steps)[0], computed

    computed: list[list[int]] = []
    first, second = run_ranks(2, run, runs.words(tmp_path / "out"))
    assert first[0] == second[0] == 75
    assert sum(map(len, first[1])) <= 1 and second[1] == []


def in_checkpoint() -> None:
    save = train.Checkpointer.save

    def asked(self: Any, *args: Any) -> None:
        ask_to_stop()
        save(self, *args)

    train.Checkpointer.save = asked


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_stop_while_a_checkpoint_is_written(runs: Runs, tmp_path: Path, n: int) -> None:
    out = tmp_path / "out"
    results = run_ranks(n, run_main, runs.words(out), on_rank(0, in_checkpoint))
    assert [code for code, _, _ in results] == [75] * n and "step 4 of 15 is saved" in results[0][1]
    run_ranks(n, run_train, runs.words(out))
    assert_same_run(out, runs.undisturbed(n))


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_second_ctrl_c_ends_at_once_and_leaves_the_last_checkpoint_whole(
    runs: Runs, tmp_path: Path, n: int
) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        os._exit(3)  # not at once

    def breaking(accelerator: Accelerator) -> None:
        before_step(7, twice)()

    out = tmp_path / "out"
    with pytest.raises(RankError, match=r"rank \d of \d: ended with status 130"):
        run_ranks(n, run_main, runs.words(out), breaking)
    assert [find_damage(out / "checkpoints" / name) for name in checkpoints_of(out)] == [None, None]
    run_ranks(n, run_train, runs.words(out))
    assert_same_run(out, runs.undisturbed(n))


@pytest.mark.parametrize(
    ("n", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (3, signal.SIGINT)]
)
def test_prediction_stops_and_leaves_nothing_half(
    runs: Runs, tmp_path: Path, n: int, number: int
) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", make_rows(20))
    answers = tmp_path / "answers.jsonl"
    words = [
        "--model",
        str(runs.undisturbed(1) / "best"),
        "--input",
        str(texts),
        "--output",
        str(answers),
        "--use_cpu",
        "True",
    ]
    asked = on_rank(n - 1, in_evaluation(1, lambda: os.kill(os.getpid(), number)))
    results = run_ranks(n, run_main, words, asked, predict)
    assert [code for code, _, _ in results] == [75] * n
    assert (
        "bertdist: Stopped on request: nothing was written; rerun the same command."
        in results[0][1]
    )
    assert all(said == "" for _, said, _ in results[1:]) and sorted(os.listdir(tmp_path)) == [
        "texts.jsonl"
    ]
    run_ranks(n, run_main, words, None, predict)
    assert len(json_of(answers)) == 20


# --- A rank is gone


@pytest.mark.parametrize(("n", "victim"), some_of([(2, 0), (3, 1)], [(2, 1)]))
def test_a_killed_rank_is_named_once_and_nothing_is_lost(
    runs: Runs, tmp_path: Path, n: int, victim: int
) -> None:
    out, words = tmp_path / "out", runs.words(tmp_path / "out")
    kill = on_rank(victim, before_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    with pytest.raises(RankError, match=f"rank {victim} of {n}: ended with status -9"):
        run_ranks(n, told_by_each, words, kill, tmp_path, grace=TO_TELL)
    found = told(tmp_path)
    assert {rank: code for rank, (code, _) in found.items()} == {
        rank: 1 for rank in range(n) if rank != victim
    }
    (line,) = (line for _, lines in found.values() for line in lines)
    assert re.match(
        rf"bertdist: rank {victim} \(process \d+ on .*\) is gone without a message", line
    ), line
    assert line.endswith("the others are at step 7. The same command resumes from step 6."), line
    assert (
        json_of(out / "status.json")["state"] == "failed"
        and f"rank {victim} " in json_of(out / "status.json")["reason"]
    )
    run_ranks(n, run_train, words)
    assert_same_run(out, runs.undisturbed(n))
    assert not (out / ".ranks").exists()


def test_a_rank_s_own_error_is_the_one_message(runs: Runs, tmp_path: Path) -> None:
    def broken() -> None:
        raise BertdistError("a text from hell")

    results = run_ranks(
        3, run_main, runs.words(tmp_path / "out"), on_rank(1, before_step(2, broken))
    )
    assert [code for code, _, _ in results] == [1, 1, 1]
    complaints = [
        line
        for _, said, _ in results
        for line in said.splitlines()
        if line.startswith("bertdist: ")
    ]
    assert complaints == ["bertdist: rank 1: a text from hell"]
    assert (
        "has ended: rank 1: a text from hell" in json_of(tmp_path / "out" / "status.json")["reason"]
    )


def test_without_a_watchdog_nobody_is_named(runs: Runs, tmp_path: Path) -> None:
    def unwatched(accelerator: Accelerator) -> None:
        watchdog.Watchdog.__exit__ = lambda self, *args: None
        on_rank(1, before_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL)))(accelerator)

    with pytest.raises(RankError):
        run_ranks(2, told_by_each, runs.words(tmp_path / "out"), unwatched, tmp_path, grace=TO_TELL)
    assert all("rank 1" not in line for _, lines in told(tmp_path).values() for line in lines)


# --- Ranks that wait


def test_a_collective_that_hangs_ends_with_the_stacks_of_all(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def sleep_for_ever() -> None:
        time.sleep(1000)

    with pytest.raises(RankError, match="ended with status 1") as ended:
        run_ranks(
            3,
            told_by_each,
            runs.words(out, rank_timeout=5),
            on_rank(1, before_step(4, sleep_for_ever)),
            tmp_path,
            grace=TO_TELL,
        )
    assert "did not end" not in str(ended.value) and "still ran" not in str(ended.value), (
        ended.value
    )
    stacks = {path.name: path.read_text() for path in (out / "stacks").iterdir()}
    assert sorted(stacks) == ["rank_0.txt", "rank_1.txt", "rank_2.txt"]
    assert (
        "in sleep_for_ever" in stacks["rank_1.txt"]
        and "in sleep_for_ever" not in stacks["rank_0.txt"]
    )
    assert "in backward" in stacks["rank_0.txt"] and "in _watch" in stacks["rank_0.txt"], (
        "every thread"
    )
    reason = json_of(out / "status.json")["reason"]
    assert (
        "No rank has made progress for 5 s (--rank_timeout), so a collective hangs: rank 0 in "
        in reason
        and "resumes from step 3" in reason
    )


@pytest.mark.skipif(
    not EVERY_FAULT,
    reason="ten busy seconds on two cores; tests/unit/distributed/test_watchdog_slow_disk.py has the rule: with BERTDIST_EVERY_FAULT=1 only",
)
def test_a_rank_that_works_is_waited_for(runs: Runs, tmp_path: Path) -> None:
    """For twice --rank_timeout, in one function."""

    def work() -> None:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            pass

    run_ranks(
        2, run_train, runs.words(tmp_path / "out", rank_timeout=4), on_rank(1, before_step(4, work))
    )
    assert_same_run(tmp_path / "out", runs.undisturbed(2))


# --- Ranks that differ


def test_another_command_line_is_named_before_anything_is_written(
    runs: Runs, tmp_path: Path
) -> None:
    def run(accelerator: Accelerator) -> Any:
        rate = 0.5 if accelerator.process_index == 1 else 1e-3
        return run_main(accelerator, runs.words(tmp_path / "out", learning_rate=rate))

    first, second, third = run_ranks(3, run)
    assert first[0] == 1 and second == third == (1, "", "") and not (tmp_path / "out").exists()
    assert re.fullmatch(
        r"bertdist: rank 1 \(on .*\) differs from rank 0 \(on .*\): --learning_rate is 0\.5 instead of 0\.001\.\n"
        r"bertdist: Every rank must be started with the same command, data and packages\.\n",
        first[1],
    ), first[1]


def test_another_version_is_named(runs: Runs, tmp_path: Path) -> None:
    def older() -> None:
        version = launch.package_version
        launch.package_version = lambda package: "2.2.0" if package == "torch" else version(package)

    first, _ = run_ranks(2, run_main, runs.words(tmp_path / "out"), on_rank(1, older))
    assert first[0] == 1 and "torch is 2.2.0 instead of 2." in first[1]


def test_another_file_content_is_named_before_the_model_is_built(
    runs: Runs, tmp_path: Path
) -> None:
    """The same path on two machines."""
    for host in ("a", "b"):
        write_rows(tmp_path / host / "train.tsv", make_rows(20)) if (
            tmp_path / host
        ).mkdir() is None else None
    write_rows(
        tmp_path / "b" / "train.tsv", [*make_rows(19), {"text": "changed", "label": "positive"}]
    )

    def run(accelerator: Accelerator) -> Any:
        os.chdir(tmp_path / "ab"[accelerator.process_index])
        files = runs.files._replace(train=Path("train.tsv"), dev=None)
        return run_main(
            accelerator, words_of(runs.model, tmp_path / "out", files), on_rank(0, no_model)
        )

    def no_model() -> None:
        train.load_classifier = None

    first, second = run_ranks(2, run)
    assert first[0] == 1 and second == (1, "", "")
    assert (
        "differs from rank 0 (on " in first[1] and "train.tsv (digest of the rows) is " in first[1]
    )


def test_ranks_that_differ_and_do_not_compare_are_seen(runs: Runs, tmp_path: Path) -> None:
    def run(accelerator: Accelerator) -> Any:
        train.assert_same_on_all_ranks = launch.assert_same_on_all_ranks = lambda *args: None
        rate = 0.5 if accelerator.process_index == 1 else 1e-3
        return run_main(
            accelerator,
            runs.words(
                tmp_path / "out", learning_rate=rate, max_train_steps=2, num_train_epochs=None
            ),
        )

    assert [code for code, _, _ in run_ranks(2, run)] == [0, 0]


# --- Loader workers


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_killed_loader_worker_is_named_soon(runs: Runs, tmp_path: Path, n: int) -> None:
    def kill_worker() -> None:
        for child in psutil.Process().children():
            child.kill()
        time.sleep(1000)  # SIGCHLD ends it

    words = runs.words(tmp_path / "out", dataloader_num_workers=1)
    results = run_ranks(n, run_main, words, on_rank(n - 1, before_step(5, kill_worker)))
    assert [code for code, _, _ in results] == [1] * n
    (line,) = (
        line
        for _, said, _ in results
        for line in said.splitlines()
        if line.startswith("bertdist: ")
    )
    assert re.search(
        r"Loader worker \(process \d+\) was killed \(Killed\): usually the system was out of memory",
        line,
    ), line
    run_ranks(n, run_train, words)
    assert_same_run(tmp_path / "out", runs.undisturbed(n))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_worker_that_raises_names_the_row(
    runs: Runs, tmp_path: Path, workers: int
) -> None:
    def stumble() -> None:
        encode = encoding.TokenizedDataset.__getitem__

        def broken(self: Any, rows: Any) -> Any:
            if 17 in list(rows):
                raise KeyError("a bug")
            return encode(self, rows)

        encoding.TokenizedDataset.__getitem__ = broken

    words = runs.words(
        tmp_path / "out", dataloader_num_workers=workers, validation_file=None, eval_every=None
    )
    ((code, said, _),) = run_ranks(1, run_main, words, on_rank(0, stumble))
    assert code == 1 and "Traceback" not in said
    assert (
        "train.tsv line 19: cannot be encoded: KeyError: 'a bug' (test_faults.py line "
        in said.splitlines()[-1]
    )
