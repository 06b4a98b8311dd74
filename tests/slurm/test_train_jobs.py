"""launch/train.slurm on a real cluster: what is interrupted ends as if it had not been."""

from pathlib import Path

import pytest
from rows import (
    assert_same_run,
    assert_same_tensors,
    json_of,
    last_checkpoint,
    skip_updates,
    tensors_of,
)
from slurm.cluster import Cluster, until
from slurm.train_run import SLOW, Run


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, cluster: Cluster) -> Run:
    return Run(tiny_model, tmp_path, cluster)


URGENT = "#!/bin/sh\nsleep 2\n"


def test_one_node_a_time_limit_a_preemption_and_scancel(
    run: Run, cluster: Cluster, tmp_path: Path
) -> None:
    job = run.submit("train.slurm", "--signal=B:USR1@60", "--time=60")
    saved = run.wait_for_checkpoint(job, 0)
    # SLURM looks at limits every 30 s; the signal comes 60 s before the end, rounded
    cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={job.minutes() + 2}")
    run.go("5.0")  # the run is still in its middle then
    job.wait_for_log("restart 1 of at most 100")
    assert run.saved_step() > saved and json_of(run.out / "status.json")["state"] == "preempted"
    assert "after USR1" in job.log()

    run.go(SLOW)
    saved = run.wait_for_checkpoint(job, run.saved_step())
    script, node = tmp_path / "urgent.sh", f"--nodelist={job.show()['NodeList']}"
    script.write_text(URGENT)
    options = ["--partition=urgent", "--exclusive", node]
    urgent = cluster.sbatch(script, cwd=tmp_path, options=options)
    job.wait_for_log("restart 2 of at most 100")
    assert run.saved_step() >= saved and json_of(run.out / "status.json")["state"] == "preempted"
    assert "state preempted" in job.log().partition("attempt 1")[2]
    assert urgent.wait() == "COMPLETED", urgent.story()

    saved = run.wait_for_checkpoint(job, run.saved_step())
    job.cancel()
    assert job.wait() == "CANCELLED" and job.restarts() == 2, job.story()
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
