"""`bertdist slurm submit` and `status` with a real SLURM: a job waits, is refused twice, runs, is shown."""

import json
import subprocess
import sys
from pathlib import Path

from rows import words_of, write_split
from slurm.cluster import Cluster, Job


def bertdist(cluster: Cluster, folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `bertdist slurm`."""
    done = subprocess.run(
        [sys.executable, "-m", "bertdist", "slurm", *words],
        cwd=folder,
        env=cluster.environment(COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_job_waits_runs_and_is_shown(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    train = words_of(tiny_model, Path("out"), write_split(tmp_path, train=32), max_train_steps=2)
    held = ["--cpus_per_task=1", "--sbatch", "--hold"]
    code, out, error = bertdist(cluster, tmp_path, "submit", *held, "train", *train)
    assert (code, error) == (0, ""), error
    number = json.loads((tmp_path / "out/slurm/job.json").read_text())["job_id"]
    assert out.startswith(f"Submitted job {number} (out)")

    code, _, error = bertdist(cluster, tmp_path, "submit", *held, "train", *train)
    reason = (
        f"bertdist: out already has job {number}, PENDING (JobHeldUser): wait for it, or scancel"
    )
    assert code == 1 and error.startswith(reason)
    code, out, error = bertdist(cluster, tmp_path, "status")
    assert code == 0 and "PENDING (JobHeldUser)" in out and "not started" in out, error

    cluster.run("scontrol", "release", number)
    job = Job(cluster, number)
    assert job.wait() == "COMPLETED", job.story()
    code, out, _ = bertdist(cluster, tmp_path, "status", "out")
    assert code == 0 and "COMPLETED" in out and "finished" in out and "2 of 2" in out
    code, out, _ = bertdist(cluster, tmp_path, "status")
    assert out == "You have no jobs of bertdist in the queue; name folders to see their runs.\n"
