"""One small run that tests kill, stop and damage in their own ways, and the same run that nobody has disturbed, to compare it with.

runs = Runs(tiny_model, folder)
run_ranks(2, run_train, runs.words(out), ...)          # disturbed, and started again
assert_same_run(out, runs.undisturbed(2))              # bit for bit
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forked import run_ranks
from rows import at_step, json_of, rows_by_step, run_train, words_of, write_split

STEPS = 15  # 5 an epoch, 3 epochs; the last of an epoch has 6 rows instead of 8
CADENCES = {
    "eval_every": "4 steps",
    "save_every": "3 steps",
    "log_every": "2 steps",
    "num_train_epochs": 3,
    "tokens_per_micro_batch": 60,
}


def run_on_ranks_in_turn(
    words: Sequence[str], ranks: Sequence[int], stops: Sequence[int]
) -> tuple[dict[int, list[int]], list[str]]:
    """Start on ranks[0] ranks, stop in step stops[0], resume on ranks[1], ..., to the end after the last stop, if there is one rank more:
    the rows of every step, and what was said at each start.
    """
    steps: dict[int, list[int]] = {}
    said = []
    for n, stop in zip(ranks, [*stops, -1], strict=False):
        ended = run_ranks(
            n, run_train, words, at_step(stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
        )
        found = rows_by_step([seen for _, seen, _ in ended])
        assert not steps.keys() & found.keys()
        steps |= found
        said.append(ended[0][2])
    return steps, said


class Runs:
    """Runs of one command on n ranks, with dropout, and the folder of the one that nobody disturbed."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.files, self.folder = model, write_split(folder, 38, 12), folder
        self.straight: dict[int, Path] = {}
        self.rows: dict[int, dict[int, list[int]]] = {}  # ranks -> step -> rows, of `undisturbed`

    def words(self, out: Path, **settings: Any) -> list[str]:
        return words_of(self.model, out, self.files, **{**CADENCES, **settings})

    def undisturbed(self, n: int) -> Path:
        """Made once."""
        if n not in self.straight:
            out = self.folder / f"undisturbed{n}"
            ended = run_ranks(n, run_train, self.words(out))
            self.rows[n] = rows_by_step([seen for _, seen, _ in ended])
            assert json_of(out / "status.json") == {
                "state": "finished",
                "step": STEPS,
                "reason": "",
            }
            self.straight[n] = out
        return self.straight[n]
