"""A real SLURM cluster for the tests of a process, started by the first that asks for it."""

from collections.abc import Iterator

import pytest
from slurm.cluster import INSTALL, Cluster, missing_commands


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two idle nodes, node1 and node2, of four CPUs each. A test leaves them so."""
    if missing := missing_commands():
        pytest.skip(f"needs SLURM ({', '.join(missing)} not found): {INSTALL}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
