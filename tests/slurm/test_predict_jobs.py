"""launch/predict.slurm on a real cluster: what a lost node leaves is continued, bit for bit."""

import json
import time
from pathlib import Path

import pytest
from model_folders import make_run
from slurm.cluster import SECONDS, Cluster

from bertdist.core.args import read_predict_config
from bertdist.core.partial_file import partial_paths
from bertdist.predict import ROWS_PER_WINDOW
from bertdist.predict import run as predict

ROWS = 100_000
WORDS = (
    "a bad best dull film fine fun good great is it movie not poor the this very warm worst".split()
)


def saved_rows(output: Path) -> int:
    """Rows that the next attempt need not predict; 0 before the first were saved."""
    try:
        state = json.loads(partial_paths(output)[1].read_text())["state"]
    except FileNotFoundError:
        return 0
    return int(state["rows"]) if state else 0


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two words each: what takes time is their number."""
    count = len(WORDS)
    pairs = (f"{WORDS[row % count]} {WORDS[row // count % count]}" for row in range(ROWS))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"review": "{pair}"}}\n' for pair in pairs))
    return file


def test_two_nodes_of_which_one_is_lost_write_the_file_of_one_process(
    cluster: Cluster, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    make_run(tmp_path / "out", tiny_model)
    words = ["--model", str(tmp_path / "out"), "--input", str(rows), "--use_cpu", "--output"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    # small micro-batches, so that it is not over before the kill
    more = [str(two), "--tokens_per_micro_batch", "128"]
    options = ["--nodes=2", "--cpus-per-task=1"]
    job = cluster.sbatch("predict.slurm", *words, *more, cwd=tmp_path, options=options)

    deadline = time.monotonic() + SECONDS
    while not saved_rows(two) and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster.kill_node("node2")
    at_kill = partial_paths(two)[0].read_bytes()
    cluster.start_node("node2")
    assert job.wait() == "COMPLETED", job.story()

    assert predict(read_predict_config([*words, str(one)])) == 0
    answers = one.read_bytes()
    assert two.read_bytes() == answers
    assert job.restarts() == 1, job.story()
    assert "Continuing after " in job.log() and f"{ROWS:,} rows." in job.log()
    # Controls: the kill came in the middle, and a share of rows at a wrong place would be seen.
    assert 0 < len(at_kill) < len(answers) and answers.startswith(at_kill[:1000])
    scores = [json.loads(line)["score"] for line in answers.splitlines()]
    shares = [scores[i : i + ROWS_PER_WINDOW] for i in range(0, ROWS, ROWS_PER_WINDOW)]
    assert len(scores) == ROWS and len(set(map(tuple, shares))) == len(shares)
