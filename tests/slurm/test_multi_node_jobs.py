"""launch/multi_node.slurm on a real cluster: a lost node and a lost rank end as if nothing had been."""

from pathlib import Path

import pytest
from rows import (
    assert_same_run,
    skip_updates,
    step_log,
)
from slurm.cluster import Cluster, until
from slurm.train_run import Run


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, cluster: Cluster) -> Run:
    return Run(tiny_model, tmp_path, cluster)


def losses(out: Path) -> list[tuple[int, float]]:
    """The loss curve."""
    return [(entry["step"], entry["loss"]) for entry in step_log(out, "train")]


def test_two_nodes_lose_a_node_and_a_rank(run: Run, cluster: Cluster) -> None:
    job = run.submit("multi_node.slurm", "--nodes=2")
    saved = run.wait_for_checkpoint(job, 0)
    cluster.kill_node("node2")
    # by the script, or by SLURM where it misses the node first
    until(lambda: job.restarts() == 1 or job.has_ended(), job.story)
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
