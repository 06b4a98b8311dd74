"""launch/train.slurm and multi_node.slurm on a real cluster: what is interrupted ends as if it had not been.

Two jobs, each interrupted again and again, since every start of Python with torch takes seconds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from rows import (
    Files,
    assert_same_run,
    assert_same_tensors,
    json_of,
    last_checkpoint,
    run_train,
    skip_updates,
    step_log,
    tensors_of,
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


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, cluster: Cluster) -> Run:
    return Run(tiny_model, tmp_path, cluster)


def losses(out: Path) -> list[tuple[int, float]]:
    """The loss curve."""
    return [(entry["step"], entry["loss"]) for entry in step_log(out, "train")]


def test_one_node_a_time_limit_and_scancel(run: Run, cluster: Cluster) -> None:
    job = run.submit("train.slurm", "--signal=B:USR1@60", "--time=60")
    saved = run.wait_for_checkpoint(job, 0)
    # SLURM looks at limits every 30 s; the signal comes 60 s before the end, rounded
    cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={job.minutes() + 2}")
    run.go("3.0")  # the run is still in its middle then
    job.wait_for_log("restart 1 of at most 100")
    assert run.saved_step() > saved and json_of(run.out / "status.json")["state"] == "preempted"
    assert "after USR1" in job.log()

    run.go(SLOW)
    saved = run.wait_for_checkpoint(job, run.saved_step())
    job.cancel()
    assert job.wait() == "CANCELLED" and job.restarts() == 1, job.story()
    until(lambda: "cancelled or out of time: not requeued" in job.log(), job.story)
    assert run.saved_step() >= saved
    assert json_of(run.out / "status.json")["state"] == "preempted"
    whole = tensors_of(last_checkpoint(run.out))

    run.go("0")
    saved = run.saved_step()
    again = run.submit("train.slurm", "--time=60")
    assert again.wait() == "COMPLETED" and again.restarts() == 0, again.story()
    assert f"(step {saved})" in again.log() and "damaged" not in again.log()
    assert_same_run(run.out, run.undisturbed(1))

    broken = run.undisturbed(1, skip_updates([5]))
    with pytest.raises(AssertionError):
        assert_same_run(run.out, broken)
    with pytest.raises(AssertionError):  # the checkpoint was of the middle
        assert_same_tensors(whole, tensors_of(last_checkpoint(run.out)))


def test_two_nodes_lose_a_node_and_a_rank(run: Run, cluster: Cluster) -> None:
    job = run.submit("multi_node.slurm", "--nodes=2")
    saved = run.wait_for_checkpoint(job, 0)
    cluster.kill_node("node2")
    job.wait_for_log("restart 1 of at most 100")
    assert run.saved_step() >= saved
    cluster.start_node("node2")

    job.wait_until_running(attempt=1)
    saved = run.wait_for_checkpoint(job, run.saved_step())
    job.ranks()[1].kill()
    job.wait_for_log("restart 2 of at most 100")
    attempt = job.log().partition("attempt 1:")[2]
    complaints = [line for line in attempt.splitlines() if "bertdist: " in line]
    assert len(complaints) == 1 and "rank 1" in complaints[0], attempt

    run.go("0")
    assert job.wait() == "COMPLETED" and job.restarts() == 2, job.story()
    for attempt_number in range(3):
        logs = sorted((run.folder / f"bertdist-{job.id}/attempt_{attempt_number}").iterdir())
        assert [path.name for path in logs] == ["node1", "node2"]
        assert any(path.stat().st_size for path in logs[0].rglob("std*.log"))

    assert_same_run(run.out, run.undisturbed(2))
    one = run.undisturbed(1)
    assert [step for step, _ in losses(one)] == [step for step, _ in losses(run.out)]
    assert [x for _, x in losses(run.out)] == pytest.approx([x for _, x in losses(one)], rel=1e-4)
    broken = run.undisturbed(1, skip_updates([5]))
    assert [x for _, x in losses(broken)] != pytest.approx([x for _, x in losses(one)], rel=1e-4)
