"""The cluster of these tests is one: two nodes, jobs on both, a lost node."""

from pathlib import Path

from slurm.cluster import Cluster


def test_two_nodes_run_a_job(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --output=%j.log\nsrun hostname | sort\nsrun true\nexit $1\n"
    )
    job = cluster.sbatch(script, "0", cwd=tmp_path, options=["--nodes=2"])
    failed = cluster.sbatch(script, "3", cwd=tmp_path)
    assert (job.wait(), failed.wait()) == ("COMPLETED", "FAILED"), job.story()
    assert len(job.log().split()) == 2 and failed.show()["ExitCode"] == "3:0"
    if cluster.net:
        assert job.log().split() == ["node1", "node2"]
    assert cluster.nodes() == {"node1": "idle", "node2": "idle"}
