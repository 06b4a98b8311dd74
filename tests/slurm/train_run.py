"""One training command as a slow job on a cluster, and the same run that nobody disturbs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import run_ranks
from rows import (
    Files,
    run_train,
    words_of,
    write_split,
)
from slurm.cluster import Cluster, Job, until

from bertdist.training.trial_runs import last_saved_step

STEPS = 24
SETTINGS = {
    "num_train_epochs": 3,  # of 8 steps
    "save_every": "2 steps",
    "log_every": "2 steps",
    "eval_every": "8 steps",
    "rank_timeout": 120,
}
SLOW = "1.0"  # seconds a step

Breaking = Callable[[Any], None]


class Run:
    """One command, and the same run that nobody disturbs."""

    def __init__(self, model: Path, folder: Path, cluster: Cluster) -> None:
        self.model, self.folder, self.cluster = model, folder, cluster
        self.files: Files = write_split(folder, 60, 16)  # the last step of an epoch is smaller
        self.out, self.pace = folder / "out", folder / "pace"
        self.go(SLOW)

    def go(self, seconds: str) -> None:
        """From now on a step takes so many seconds more."""
        self.pace.with_suffix(".new").write_text(seconds)
        self.pace.with_suffix(".new").replace(self.pace)

    def words(self, out: Path) -> list[str]:
        return words_of(self.model, out, self.files, **SETTINGS)

    def submit(self, script: str, *options: str) -> Job:
        slowly = Path(__file__).parent / "slowly"
        path = self.cluster.environment()["PYTHONPATH"]
        env = {"PYTHONPATH": f"{slowly}:{path}", "PACE": str(self.pace)}
        options = (*options, "--cpus-per-task=1")
        return self.cluster.sbatch(
            script, *self.words(self.out), cwd=self.folder, options=options, env=env
        )

    def undisturbed(self, ranks: int, breaking: Breaking | None = None) -> Path:
        """On forked ranks: a launcher does not change the arithmetic."""
        out = self.folder / f"on_{ranks}{'_broken' * (breaking is not None)}"
        run_ranks(ranks, run_train, self.words(out), breaking)
        return out

    def saved_step(self) -> int:
        return last_saved_step(self.out)

    def wait_for_checkpoint(self, job: Job, after: int) -> int:
        """Until a later step is saved; it, long before the end."""
        until(lambda: self.saved_step() > after or job.has_ended(), job.story)
        assert job.state() == "RUNNING" and self.saved_step() < STEPS - 4, job.story()
        return self.saved_step()
