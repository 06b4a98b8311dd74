"""One small run that tests kill, stop and damage in their own ways, and the same run that nobody has disturbed, to compare it with.

runs = Runs(tiny_model, folder)
run_ranks(2, run_train, runs.words(out), ...)          # disturbed, and started again
assert_same_run(out, runs.undisturbed(2))              # bit for bit
"""

from pathlib import Path
from typing import Any

from forked import run_ranks
from rows import json_of, run_train, words_of, write_split

STEPS = 15  # 5 an epoch, 3 epochs; the last of an epoch has 6 rows instead of 8
CADENCES = {
    "eval_every": "4 steps",
    "save_every": "3 steps",
    "log_every": "2 steps",
    "num_train_epochs": 3,
    "tokens_per_micro_batch": 60,
}


class Runs:
    """Runs of one command on n ranks, with dropout, and the folder of the one that nobody disturbed."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.files, self.folder = model, write_split(folder, 38, 12), folder
        self.straight: dict[int, Path] = {}

    def words(self, out: Path, **settings: Any) -> list[str]:
        return words_of(self.model, out, self.files, **{**CADENCES, **settings})

    def undisturbed(self, n: int) -> Path:
        """Made once."""
        if n not in self.straight:
            out = self.folder / f"undisturbed{n}"
            run_ranks(n, run_train, self.words(out))
            assert json_of(out / "status.json") == {
                "state": "finished",
                "step": STEPS,
                "reason": "",
            }
            self.straight[n] = out
        return self.straight[n]
