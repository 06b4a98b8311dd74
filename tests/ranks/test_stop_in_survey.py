"""A stop while a stream is read for the first time: answered there, on all ranks, and nothing is left half."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import run_ranks
from rows import (
    RANKS,
    Breaking,
    Files,
    assert_same_tensors,
    json_of,
    last_checkpoint,
    make_rows,
    run_main,
    some_of,
    step_log,
    tensors_of,
    words_of,
    write_rows,
)
from rows import train_module as train

from bertdist.data import stream_scan
from bertdist.data.streaming import Stream

FILES, STOPPED = 48, 75
SETTINGS: dict[str, Any] = {"streaming": True, "stream_window": 16, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("many")
    for number in range(FILES):
        write_rows(folder / f"part{number:02d}.tsv", make_rows(1, seed=number))
    return Files(folder / "part*.tsv")


def told_to_stop(read: Path, at: int | None) -> Breaking:
    """A piece takes 50 ms, and is noted. The last rank gets SIGTERM at its piece `at`."""

    def breaking(accelerator: Accelerator) -> None:
        chunks, mine = Stream.chunks, iter(range(1, 999))

        def slow(self: Stream, *rest: Any) -> Any:
            for piece in chunks(self, *rest):
                if next(mine) == at and accelerator.process_index == accelerator.num_processes - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                with open(read, "a") as file:
                    file.write("x")
                yield piece

        Stream.chunks = slow  # type: ignore[method-assign]

    return breaking


@pytest.mark.parametrize("n", RANKS)
def test_a_stop_in_the_survey_is_answered_there(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    out, read = tmp_path / "out", tmp_path / "read"
    words = words_of(tiny_model, out, files, **SETTINGS)
    ends = run_ranks(n, run_main, words, told_to_stop(read, 3))
    assert [code for code, *_ in ends] == [STOPPED] * n and [said for _, said, _ in ends[1:]] == [
        ""
    ] * (n - 1), ends
    reason = "SIGTERM" if n == 1 else "a stop was requested on another rank"
    assert (
        ends[0][1].splitlines()[-1]
        == f"Stopped ({reason}) before the first step. Rerun the same command to start."
    )
    assert json_of(out / "status.json") == {"state": "preempted", "step": 0, "reason": reason}
    assert (
        not (out / "survey.json").exists()
        and not list((out / "checkpoints").iterdir())
        and not (out / "metrics.jsonl").exists()
    )
    assert not (out / "running.json").exists() and not list(out.rglob(".*")), "nothing half"
    assert len(read.read_text()) < FILES, "not read to its end"
    assert [code for code, *_ in run_ranks(n, run_main, words)] == [0] * n
    straight = words_of(tiny_model, tmp_path / "straight", files, **SETTINGS)
    run_ranks(n, run_main, straight)
    assert step_log(out) == step_log(tmp_path / "straight")
    assert_same_tensors(
        tensors_of(last_checkpoint(out)), tensors_of(last_checkpoint(tmp_path / "straight"))
    )
    assert (out / "survey.json").read_bytes() == (
        tmp_path / "straight" / "survey.json"
    ).read_bytes()


def test_a_survey_that_asks_nobody_is_read_to_its_end(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    """The control."""
    read = tmp_path / "read"

    def deaf(accelerator: Accelerator) -> None:
        collect_stats = train.collect_stats
        train.collect_stats = lambda rows, config, accelerator, say, stop: collect_stats(
            rows, config, accelerator, say
        )
        told_to_stop(read, 3)(accelerator)

    ends = run_ranks(2, run_main, words_of(tiny_model, tmp_path / "out", files, **SETTINGS), deaf)
    assert [code for code, *_ in ends] == [STOPPED] * 2 and len(read.read_text()) >= FILES
    assert (tmp_path / "out" / "survey.json").exists() and stream_scan.SECONDS_BETWEEN_CHECKS < 1


@pytest.mark.parametrize("n", some_of([3], [2]))
def test_an_error_in_the_survey_ends_it_soon(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    """One rank's file cannot be read: the others do not read theirs to the end first, and the message is one."""
    (tmp_path / "data").mkdir()
    for path in files.train.parent.glob(files.train.name):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / f"part{n:02d}.tsv").write_text(
        "text\tlabel\nno tab here\n"
    )  # the second of rank 0
    words = words_of(
        tiny_model, tmp_path / "out", Files(tmp_path / "data" / "part*.tsv"), **SETTINGS
    )
    first, *others = run_ranks(n, run_main, words, told_to_stop(tmp_path / "read", None))
    assert first[0] == 1 and others == [(1, "", "")] * (n - 1)
    assert (
        f"bertdist: rank 0: part{n:02d}.tsv line 2: " in first[1]
        and len((tmp_path / "read").read_text()) < FILES
    )
