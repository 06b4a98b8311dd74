"""I7: ranks agree before they act. An error on one rank ends all ranks, with one message, soon."""

import gc
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import TO_TELL, RankError, run_ranks
from rows import checkpoints_of, json_of, on_rank, run_main, run_train, words_of, write_split
from rows import train_module as train

from bertdist.core.args import read_config
from bertdist.core.errors import CheckpointError, ConfigError, DataError
from bertdist.distributed import preemption as slurm
from bertdist.tasks.tasks import SingleLabel
from bertdist.training import best_model as best
from bertdist.training import checkpoint, evaluation


def no_file() -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise DataError("train.tsv: no such file.")

    train.load_splits = broken


def gone_since() -> None:
    """A file that is there when it is listed, and not when its digest is taken."""

    def broken(*args: Any, **more: Any) -> Any:
        raise DataError("train/neg/1.txt cannot be read.")

    train.data_fingerprint = broken


def no_model() -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise DataError("weights.bin: gone.")

    train.load_classifier = broken


def full_disk() -> None:
    """For real: no file of this process may grow beyond 20 kB, which the model's do."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def full_disk_for_best() -> None:
    def broken(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    best.save_classifier = broken


def broken_metric() -> None:
    """Scores are computed on rank 0 only."""

    def broken(*args: Any, **more: Any) -> Any:
        raise ConfigError("--metrics ./mine.py: failed on 6 rows: KeyError: 'x'")

    evaluation.Scorer.score = broken


def no_state() -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise CheckpointError("step_000002 is not visible here.")

    checkpoint.load_optimizer = broken


@pytest.mark.parametrize(
    ("n", "rank", "act", "said"),
    [
        (2, 1, no_file, "bertdist: rank 1: train.tsv: no such file."),
        (3, 1, no_file, "bertdist: rank 1: train.tsv: no such file."),
        (2, 1, gone_since, "bertdist: rank 1: train/neg/1.txt cannot be read."),
        (2, 1, no_model, "bertdist: rank 1: weights.bin: gone."),
        (2, 0, broken_metric, "bertdist: rank 0: --metrics ./mine.py: failed on 6 rows: KeyError"),
        (2, 0, full_disk, "step_000002: "),
        (
            2,
            0,
            full_disk_for_best,
            "best: No space left on device (about ",
        ),
    ],
)
def test_one_ranks_error_ends_all_with_one_message(
    tiny_model: Path, tmp_path: Path, n: int, rank: int, act: Callable[[], None], said: str
) -> None:
    words = words_of(
        tiny_model,
        tmp_path / "out",
        write_split(tmp_path, 20, 6),
        max_train_steps=4,
        save_every="2 steps",
    )
    first, *others = run_ranks(n, run_main, words, on_rank(rank, act))
    assert first[0] == 1 and others == [(1, "", "")] * (n - 1)
    complaints = [line for line in first[1].splitlines() if line.startswith("bertdist: ")]
    assert len(complaints) == 1 and said in complaints[0], first[1]
    assert "Traceback" not in first[1]


def test_a_rank_that_cannot_see_the_checkpoint_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    words = words_of(
        tiny_model,
        tmp_path / "out",
        write_split(tmp_path, 20),
        max_train_steps=4,
        save_every="2 steps",
    )
    run_ranks(2, run_train, words)
    first, other = run_ranks(2, run_main, words, on_rank(1, no_state))
    assert (
        first[0] == 1
        and first[1].endswith("bertdist: rank 1: step_000002 is not visible here.\n")
        and other == (1, "", "")
    )


def test_the_same_error_on_all_ranks_is_told_once_and_names_no_rank(
    tiny_model: Path, tmp_path: Path
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 20), label_column="lable")
    first, other = run_ranks(2, run_main, words)
    assert (
        first[0] == 1
        and first[1].count("bertdist: train.tsv line 1: there is no column 'lable'") == 1
        and "rank" not in first[1]
    )
    assert other == (1, "", "")


def test_without_agreement_the_others_are_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    """What is left when nobody brings them together: the watchdog, and a message of the rank that
    failed.
    """

    def alone(accelerator: Accelerator) -> None:
        from contextlib import nullcontext

        train.raise_on_all_ranks = lambda accelerator: nullcontext()
        on_rank(1, no_file)(accelerator)

    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 20, 6), max_train_steps=4)
    first, second = run_ranks(2, run_main, words, alone)
    assert first[0] == second[0] == 1 and "bertdist: " not in first[1], (
        "rank 0 learns of it from its broken connection"
    )
    assert second[1].endswith("bertdist: rank 1: train.tsv: no such file.\n")


def test_a_folder_that_cannot_be_made_ends_all_with_one_message(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Rank 0 alone makes the run's folder."""
    (tmp_path / "file").write_text("")
    words = words_of(
        tiny_model, tmp_path / "file" / "out", write_split(tmp_path, 20), max_train_steps=4
    )
    first, other = run_ranks(2, run_main, words)
    assert (
        first[0] == 1
        and len(first[1].splitlines()) == 1
        and str(tmp_path / "file" / "out") in first[1]
    )
    assert other == (1, "", "")


def test_a_file_that_cannot_be_written_ends_all_with_one_message(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Rank 0 alone writes config.yaml."""
    (tmp_path / "out" / "config.yaml").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints").mkdir()  # the folder of a run
    (tmp_path / "out" / "run.lock").touch()
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 20), max_train_steps=4)
    first, other = run_ranks(2, run_main, words)
    assert (
        first[0] == 1
        and f"Cannot write {tmp_path / 'out' / 'config.yaml'}" in first[1].splitlines()[-1]
    )
    assert other == (1, "", "")


def test_an_error_of_our_own_on_one_rank_hangs_nobody(tiny_model: Path, tmp_path: Path) -> None:
    def stumble() -> None:
        train_step = train.train_step

        def broken(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
            if step.number == 2:
                raise RuntimeError("stumbled")
            return train_step(model, optimizer, step, *rest)

        train.train_step = broken

    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 20, 6), max_train_steps=4)
    with pytest.raises(
        RankError, match=r"^rank 1 of 3: Traceback(.|\n)*RuntimeError: stumbled"
    ) as ended:
        run_ranks(3, run_train, words, on_rank(1, stumble), grace=TO_TELL)
    assert "still ran" not in str(ended.value) and "did not end" not in str(ended.value), (
        ended.value
    )
    assert json_of(tmp_path / "out" / "status.json")["state"] == "failed"


# --- The end


def models_left_at_the_end(accelerator: Accelerator, words: list[str], keep: bool) -> int:
    """DDP models that are still alive when the process group ends."""
    from torch.nn.parallel import DistributedDataParallel

    left = []
    end_training = Accelerator.end_training

    def watched(self: Accelerator) -> None:
        left.extend(
            thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)
        )
        if keep:
            os._exit(len(left))  # before what is left is freed, which may hang
        end_training(self)

    Accelerator.end_training = watched
    if keep:
        Accelerator.free_memory = lambda self, *objects: objects
    run_train(accelerator, words)
    return len(left)


def test_ranks_end_without_waiting_for_each_other(tiny_model: Path, tmp_path: Path) -> None:
    """DDP must go before the process group.

    What holds the group last joins gloo's thread, DDP with the GIL held, and that thread may be
    waiting for the GIL (torch 2.13): on a busy machine about one run in six hung after its last
    step.
    """
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 20), max_train_steps=2)
    assert run_ranks(2, models_left_at_the_end, words, False) == [0, 0]


def test_a_model_that_outlives_its_group_is_seen(tiny_model: Path, tmp_path: Path) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 20), max_train_steps=2)
    with pytest.raises(RankError, match="ended with status 1"):
        run_ranks(2, models_left_at_the_end, words, True)


# --- Stopping


def stop_at_step_2() -> None:
    train_step = train.train_step

    def watched(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(model, optimizer, step, *rest)

    train.train_step = watched


@pytest.mark.parametrize(("n", "rank"), [(2, 0), (3, 2)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    tiny_model: Path, tmp_path: Path, n: int, rank: int
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 40), save_every="never")
    results = run_ranks(n, run_main, words, on_rank(rank, stop_at_step_2))
    assert [code for code, _, _ in results] == [75] * n
    assert "step 3 of 15 is saved. Rerun the same command to resume." in results[0][1]
    assert checkpoints_of(tmp_path / "out") == ["step_000003"]
    assert json_of(tmp_path / "out" / "status.json")["state"] == "preempted"


def test_ranks_that_decide_alone_are_seen(tiny_model: Path, tmp_path: Path) -> None:
    def alone(accelerator: Accelerator) -> None:
        slurm.StopSignal.requested = lambda self, accelerator: bool(self.reason)
        on_rank(1, stop_at_step_2)(accelerator)

    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 40), save_every="never")
    with pytest.raises(RankError):
        run_ranks(2, run_main, words, alone, timeout=6)


def test_an_own_loop_is_told_of_a_metric_on_all_ranks(tiny_model: Path, tmp_path: Path) -> None:
    """`Evaluator` makes its metrics on rank 0."""
    flags = ["--metrics", "pearson"]
    words = [*words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 12, 6)), *flags]

    def told(accelerator: Accelerator) -> str:
        try:
            task = SingleLabel(("no", "yes"))
            evaluation.Evaluator(None, task, read_config(words), accelerator)
        except ConfigError as error:
            return str(error)
        return ""

    first, second = run_ranks(2, told)
    assert first == second and "--metrics pearson: is for regression" in first
