"""Digests of small fixed runs, to check that a change does not change any result.

    python -m bench.digests --output before.json
    python -m bench.digests --compare before.json      # exit code 1 and the names of what differs

Runs: rows in memory and streamed, on 1 and 2 forked gloo ranks on the CPU, each once uninterrupted
and once killed (SIGKILL of all ranks after some steps) and resumed. Digests: loss and gradient norm
of every step on every rank, metrics.jsonl without measured values, weights and optimizer tensors of
the last checkpoint, best weights, predictions.jsonl, evaluation.json.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.attempts import Kill, attempt, output_of_ranks
from bench.faults import FaultTest, Scenario, results_of
from bench.machine import describe_machine


def digests(result: dict[str, Any]) -> dict[str, str]:
    """Part of `results_of` a run -> first 16 hex digits of its SHA-256."""
    parts = {name: value for name, value in result.items() if name not in ("checkpoint", "state")}
    blobs = {
        name: value if isinstance(value, bytes) else repr(value).encode()
        for name, value in parts.items()
    }
    return {
        name.split("/")[-1] if name.startswith("step_") else name: hashlib.sha256(blob).hexdigest()[
            :16
        ]
        for name, blob in blobs.items()
    }


def run(faults: FaultTest, scenario: Scenario, out: Path, killed: bool) -> dict[str, str]:
    """Digests of one run; killed: after its first steps all ranks are killed, then it resumes."""
    if killed:
        kill = Kill("all ranks", after=0.05, in_training=True)
        first = attempt(faults.arguments(scenario, out), scenario.ranks, out, kill=kill)
        assert first.killed_at is not None and first.had_steps, (first, output_of_ranks(out))
    end = attempt(faults.arguments(scenario, out), scenario.ranks, out)
    assert end.succeeded, (end.exit_codes, output_of_ranks(out))
    return digests(results_of(out, scenario.ranks))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.digests", description="Digests of small fixed runs."
    )
    parser.add_argument("--output", type=Path, help="JSON of the digests")
    parser.add_argument(
        "--compare", type=Path, help="an earlier --output; exit code 1 where anything differs"
    )
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import bertdist.train  # noqa: F401  before the ranks are forked

    runs: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="digests_") as name:
        faults = FaultTest(Path(name) / "stage")
        for number, (source, ranks, killed) in enumerate(
            [(s, r, k) for s in ("map", "stream") for r in (1, 2) for k in (False, True)]
        ):
            title = (
                f"{source}, {ranks} rank{'s' if ranks > 1 else ''}{', killed' if killed else ''}"
            )
            runs[title] = run(
                faults, Scenario(source, ranks, "three"), Path(name) / str(number), killed
            )
            print(
                title,
                *(f"\n  {digest}  {part}" for part, digest in runs[title].items()),
                flush=True,
            )
    if args.output:
        args.output.write_text(
            json.dumps(
                {"machine": describe_machine("cpu", 1, ["torch", "transformers"]), "runs": runs},
                indent=1,
            )
            + "\n"
        )
    if args.compare:
        before = json.loads(args.compare.read_text())["runs"]
        differ = [
            f"{title}: {part}"
            for title in before
            for part in before[title]
            if runs.get(title, {}).get(part) != before[title][part]
        ]
        print("\n".join(f"differs: {line}" for line in differ) or "The same bits.")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
