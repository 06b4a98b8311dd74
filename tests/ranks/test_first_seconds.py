"""A rank that dies where no watchdog looks, before the ranks have compared their commands or in prediction, is named all the same.

Forked ranks that meet at a port, as bench.faults starts them.
"""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from rows import (
    make_rows,
    run_train,
    some_of,
    words_of,
    write_rows,
    write_split,
)

from bench import rank as bench_rank
from bench.attempts import Attempt, attempt, output_of_ranks
from bertdist import cli, predict
from bertdist.distributed import launch, launcher


def killing(rank: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; on that rank there is a SIGKILL in place of it."""

    def called(*args: Any, **options: Any) -> Any:
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return called


def lines(out: Path) -> list[str]:
    said = output_of_ranks(out)
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("bertdist: ")]


def trained(model: Path, folder: Path, ranks: int) -> Attempt:
    words = words_of(
        model, folder / "out", write_split(folder, 20), num_train_epochs=1, rank_timeout=60
    )
    return attempt(words, ranks, folder / "out")


@pytest.mark.parametrize(("n", "victim"), some_of([(2, 0), (3, 1)], [(2, 1)]))
def test_a_rank_killed_before_the_ranks_have_compared_is_named(
    tiny_model: Path, tmp_path: Path, n: int, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(launcher, "check_world", killing(victim, launcher.check_world))
        found = trained(tiny_model, tmp_path, n)
    assert found.exit_codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(n)]
    told = lines(tmp_path / "out")
    named = re.compile(
        rf"bertdist: .*rank {victim} \(process \d+ on .*\) is gone \(killed\?.*Start the same command again\."
    )
    assert told and all(named.fullmatch(line) for line in told), told
    assert len(told) <= n - 1, (
        "once, unless a survivor is so slow that the one who told it has left"
    )
    assert trained(tiny_model, tmp_path, n).succeeded


def test_a_rank_that_remembers_nobody_names_nobody(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(launcher, "check_world", killing(1, launcher.check_world))
    monkeypatch.setattr(
        launch.json, "loads", lambda card: vars(launch.own_heartbeat(0))
    )  # everybody is me
    trained(tiny_model, tmp_path, 2)
    (told,) = lines(tmp_path / "out")
    assert told.startswith("bertdist: The connection to another rank is broken: ")


def test_a_rank_killed_in_prediction_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(
        1,
        run_train,
        words_of(tiny_model, tmp_path / "run", write_split(tmp_path, 20, 6), num_train_epochs=1),
    )
    texts, answers = write_rows(tmp_path / "texts.jsonl", make_rows(20)), tmp_path / "answers.jsonl"
    words = [
        "--model",
        str(tmp_path / "run" / "best"),
        "--input",
        str(texts),
        "--output",
        str(answers),
        "--use_cpu",
        "True",
    ]

    def predicted(words: Any, *logs: Any) -> int:
        sys.argv = ["bertdist.predict", *words]
        with pytest.raises(SystemExit) as ended:
            cli.main(["predict", *words])
        return int(ended.value.code or 0)

    monkeypatch.setattr(bench_rank, "_trained", predicted)
    with monkeypatch.context() as broken:
        broken.setattr(predict, "predict_rows", killing(1, predict.predict_rows))
        found = attempt(words, 2, tmp_path / "out")
    assert found.exit_codes == [1, -signal.SIGKILL] and not answers.exists(), found
    (told,) = lines(tmp_path / "out")
    assert re.match(r"bertdist: rank 1 \(process \d+ on .*\) is gone \(killed\?", told), told
    assert (
        attempt(words, 2, tmp_path / "out").succeeded
        and len(answers.read_text().splitlines()) == 20
    )
