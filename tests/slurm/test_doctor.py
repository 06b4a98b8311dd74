"""`bertdist slurm doctor` in jobs of a real cluster: a right mapping is all ok, and what is wrong is named."""

import subprocess
import sys
from pathlib import Path

import pytest
from slurm.cluster import Cluster

DOCTOR = [sys.executable, "-m", "bertdist", "slurm", "doctor", "--wait=20"]


def doctor(
    cluster: Cluster, folder: Path, *command: str, **environ: str
) -> tuple[int, dict[str, list[str]], str]:
    """Exit code, check -> its lines in the table, and standard error."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=cluster.environment(COLUMNS="400", **environ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        check, _, rest = line.strip().partition("  ")
        lines.setdefault(check, []).append(rest.strip())
    return done.returncode, lines, done.stderr


def wrong(lines: dict[str, list[str]]) -> list[str]:
    """The checks with an error."""
    return [check for check, found in lines.items() for line in found if "  error  " in line]


def test_a_right_mapping_is_all_ok(cluster: Cluster, tmp_path: Path) -> None:
    code, lines, error = doctor(
        cluster,
        tmp_path,
        *("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", *DOCTOR),
    )
    assert code == 0 and wrong(lines) == [], (lines, error)
    for check in ("port", "nodes", "tasks per node", "folder", "locks (flock)", "versions"):
        assert lines[check][0].endswith("ok"), lines
    assert lines["nodes"][0].startswith("2: node1, node2")
    assert lines["all-reduce"][0].startswith("gloo, 2 ranks: ")
    assert list(tmp_path.iterdir()) == []


def test_two_tasks_per_node_where_one_is_expected(cluster: Cluster, tmp_path: Path) -> None:
    allocation = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
    code, lines, _ = doctor(cluster, tmp_path, *allocation, *DOCTOR, "--bandwidth=no")
    assert code == 1 and wrong(lines) == ["tasks per node"]
    (line,) = lines["tasks per node"]
    assert line.startswith("2 on node1, expected 1: each would start all processes of its node")
    assert "#SBATCH --ntasks-per-node=1" in line


@pytest.mark.parametrize(
    ("own", "code", "expected"),
    [
        ("0,1", 1, "tasks 0 and 1 on node1 both see GPU 0, 1 (CUDA_VISIBLE_DEVICES=0,1)"),
        ("$SLURM_LOCALID", 0, "1 per task, none shared between tasks"),
    ],
    ids=["the same", "one each"],
)
def test_the_gpus_of_two_tasks_of_a_node(
    own: str, code: int, expected: str, cluster: Cluster, tmp_path: Path
) -> None:
    step = [
        "srun",
        "--quiet",
        "--nodes=1",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "bash",
        "-c",
    ]
    script = f'export CUDA_VISIBLE_DEVICES={own}; exec "$@" --tasks_per_node=2 --bandwidth=no'
    found, lines, _ = doctor(cluster, tmp_path, *step, script, "task", *DOCTOR)
    assert found == code and wrong(lines) == ["GPUs"] * code
    assert lines["GPUs"][0].startswith(expected)


def test_a_folder_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.net:
        pytest.skip("needs root: a file system of its own is mounted on one node")
    (tmp_path / "local").mkdir()
    mounted = 'mount -t tmpfs none "$0" && exec "$@"'
    script = f"""
        command=("$@" --bandwidth=no --folder=local --wait=3)
        [[ $SLURM_PROCID == 0 ]] || exec unshare --mount bash -c '{mounted}' local "${{command[@]}}"
        exec "${{command[@]}}"
    """
    step = [
        "srun",
        "--quiet",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "bash",
        "-c",
    ]
    code, lines, _ = doctor(cluster, tmp_path, *step, script, "task", *DOCTOR)
    assert code == 1 and wrong(lines) == ["folder"]
    (line,) = lines["folder"]
    assert line.startswith(f"{tmp_path}/local is not the same on task 0 (node1) (")
    assert "and task 1 (node2) (tmpfs on " in line and "within 3 s" in line


def test_a_task_that_cannot_reach_the_first_is_named(cluster: Cluster, tmp_path: Path) -> None:
    script = '[[ $SLURM_PROCID == 0 ]] || export MAIN_PROCESS_IP=no-such-host.invalid; exec "$@"'
    step = [
        "srun",
        "--quiet",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "bash",
        "-c",
    ]
    words = [script, "task", *DOCTOR, "--wait=3", "--bandwidth=no"]
    code, lines, error = doctor(cluster, tmp_path, *step, *words)
    assert code == 1 and wrong(lines) == ["port"]
    assert lines["port"][0].startswith("no answer within 3 s of task 1 (node2) at ")
    assert "cannot reach the first task at no-such-host.invalid" in error
