"""A run that is stopped on some ranks and resumed on others: what stays the same?

    python -m bench.elastic

Small runs as in bench.faults, forked gloo ranks on the CPU, dropout 0.1. Each is stopped in the
middle of an epoch and resumed with another number of ranks: all pairs of 1, 2, 3 and 4, and
4, 2, 3, 1 one after the other. Compared with a run on one rank that was never stopped: the rows of
every step, the loss of every step, the weights after the last. With the same number of ranks, bit
for bit with an uninterrupted run on so many (`results_of` in bench.faults).

by_file: its steps depend on the number of ranks, so it is resumed on others at the end of an epoch,
and the rows of every epoch are compared. In the middle of one it is refused.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from bench.attempts import attempt, output_of_ranks
from bench.faults import DATA, FaultTest, Scenario, difference, results_of
from bertdist.core.terminal import show_table

RANKS = (1, 2, 3, 4)
CHAIN = (4, 2, 3, 1)
ROWS_BY_FILE = 37  # of an epoch
PREEMPTED = 75  # the exit code


class Elastic:
    """Runs of one kind of data, in one folder."""

    def __init__(self, faults: FaultTest, source: str, settings: Sequence[str] = ()) -> None:
        self.faults, self.source = faults, source
        self.settings = ["--log_every", "1 steps", "--save_total_limit", "9", *settings]

    def run(self, chain: Iterable[int], stops: Iterable[int], name: str) -> Path:
        """Start on chain[0] ranks, stop in step stops[0], resume on chain[1] ranks, ..."""
        out = self.faults.folder / f"{self.source} {name}"
        shutil.rmtree(out, ignore_errors=True)
        for ranks, stop in zip(chain, [*stops, -1], strict=True):
            code = self.start(ranks, stop, out)
            assert code == (0 if stop < 0 else PREEMPTED), (code, output_of_ranks(out))
        return out

    def start(self, ranks: int, stop: int, out: Path) -> int:
        """One start; the exit code of rank 0."""
        # about three micro-batches per step
        scenario = Scenario(self.source, min(ranks, 3), "three")
        words = [*self.faults.arguments(scenario, out), *self.settings]
        os.environ["STOP_BEFORE_STEP"] = str(stop)
        return attempt(words, ranks, out).exit_codes[0]

    def differences(self, out: Path, straight: Path) -> tuple[bool, float, float]:
        """Whether every step had the same rows, and the largest difference of a step's loss and of
        a weight.
        """
        losses, expected = _losses(out), _losses(straight)
        loss = max(abs(losses[step] - expected[step]) for step in expected)
        same = rows_of_steps(out) == rows_of_steps(straight) and losses.keys() == expected.keys()
        weights, others = _weights(out), _weights(straight)
        return same, loss, max(float((weights[x] - others[x]).abs().max()) for x in others)


def rows_of_steps(out: Path) -> dict[int, list[int]]:
    """Step -> its rows on all ranks, sorted. A step that was repeated must have had the same."""
    steps: dict[int, list[int]] = {}
    for path in out.glob("rows_*.log"):
        for line in path.read_text().splitlines():
            number, *rows = map(int, line.split())
            steps.setdefault(number, []).extend(rows)
    return {number: sorted(rows) for number, rows in steps.items()}


def _losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _weights(out: Path) -> Any:
    from safetensors.torch import load_file

    last = max((out / "checkpoints").glob("step_*"), key=lambda path: path.name)
    return load_file(last / "model.safetensors")


def _same_number(elastic: Elastic, stop: int) -> str:
    """Runs stopped and resumed on the same number of ranks."""
    for ranks in RANKS:
        straight = elastic.run([ranks], [], f"straight {ranks}")
        out = elastic.run([ranks, ranks], [stop], "stopped")
        result, expected = results_of(out, ranks), results_of(straight, ranks)
        assert result == expected, (ranks, difference(result, expected))
    return "bit-identical"


def same_steps(faults: FaultTest, source: str) -> list[list[str]]:
    """Rows of the table where steps do not depend on the ranks. Raises AssertionError."""
    elastic = Elastic(faults, source)
    rows = [[source, "n -> n, n = 1 to 4", "same", _same_number(elastic, 6), "bit-identical"]]
    straight = faults.folder / f"{source} straight 1"
    found = [
        elastic.differences(elastic.run(pair, [6], "stopped"), straight)
        for pair in permutations(RANKS, 2)
    ]
    chain = elastic.differences(elastic.run(CHAIN, [3, 7, 11], "stopped"), straight)
    for name, some in (("12 other pairs", found), (" -> ".join(map(str, CHAIN)), [chain])):
        assert all(same for same, _, _ in some), (source, name)
        loss, weight = (max(each[i] for each in some) for i in (1, 2))
        rows.append([source, name, "same", f"within {loss:.1e}", f"within {weight:.1e}"])
    return rows


def by_file(faults: FaultTest) -> list[list[str]]:
    """Rows of the table for --stream_sharding by_file. Raises AssertionError."""
    elastic = Elastic(faults, "by_file")
    rows = [["by_file", "n -> n, n = 1 to 4", "same", _same_number(elastic, 8), "bit-identical"]]
    out = elastic.faults.folder / "refused"
    assert elastic.start(4, 8, out) == PREEMPTED
    for other in (1, 2, 3):
        code = elastic.start(other, -1, out)
        assert code == 1 and "each in the middle of its own files" in output_of_ranks(out)
    rows.append(["by_file", "other pairs, in an epoch", "refused, one line", "", ""])
    elastic = Elastic(faults, "by_file", ["--max_train_steps", "36", "--save_every", "1 epoch"])
    pairs = 0
    for pair in permutations(RANKS, 2):
        ends = [_steps_per_epoch(faults, elastic, ranks) for ranks in pair]
        steps = rows_of_steps(elastic.run(pair, [ends[0] - 1], "stopped"))
        last = ends[0] + ends[1]
        for begin, end in ((0, ends[0]), (ends[0], last)):
            seen = [row for step in range(begin, end) for row in steps[step]]
            assert len(seen) == len(set(seen)) == ROWS_BY_FILE, (pair, begin, len(seen))
        pairs += 1
    rows.append(["by_file", f"{pairs} other pairs, between epochs", "same per epoch", "", ""])
    return rows


def _steps_per_epoch(faults: FaultTest, elastic: Elastic, ranks: int) -> int:
    """Counted in an uninterrupted run of three epochs."""
    last = max(rows_of_steps(faults.folder / f"by_file straight {ranks}"))
    return (last + 1) // 3


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.elastic", description="Stopped and resumed on other ranks."
    )
    parser.add_argument(
        "--data", nargs="+", choices=DATA, default=list(DATA), help="Of which rows."
    )
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import bertdist.tasks.metrics
    import bertdist.train  # noqa: F401  before the ranks are forked

    with tempfile.TemporaryDirectory(prefix="elastic_") as name:
        faults, rows = FaultTest(Path(name) / "stage"), []
        for source in args.data:
            rows += by_file(faults) if source == "by_file" else same_steps(faults, source)
            print(f"{source}: done", file=sys.stderr, flush=True)
    header = ["data", "stopped on -> resumed on", "rows of each step", "loss of each step"]
    show_table("Other numbers of ranks", [*header, "last weights"], rows)


if __name__ == "__main__":
    main()
