"""The bits of small fixed runs, as digests: what a change that must not change results is compared with.

    python -m bench.digests --output before.json
    python -m bench.digests --compare before.json      # exit code 1 and the names of what differs

Runs: rows in memory and streamed, on 1 and 2 forked gloo ranks on the CPU, each once undisturbed and once killed (SIGKILL of all
ranks after some steps) and started again. Digests: loss and gradient norm of every step on every rank, metrics.jsonl without measured
values, weights and optimizer tensors of the last checkpoint, best weights, predictions.jsonl, evaluation.json.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.attempts import Blow, attempt, said_in
from bench.faults import Kind, Stage, remains
from bench.machine import described


def digests_of(found: dict[str, Any]) -> dict[str, str]:
    """Part of a run -> the first 16 hex digits of its SHA-256."""
    parts = {name: value for name, value in found.items() if name not in ("checkpoint", "state")}
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


def run(stage: Stage, kind: Kind, out: Path, killed: bool) -> dict[str, str]:
    """The digests of one run; killed: all its ranks, a moment after its first steps, and started again."""
    if killed:
        blow = Blow("all ranks", after=0.05, in_training=True)
        first = attempt(stage.words(kind, out), kind.ranks, out, blow=blow)
        assert first.killed is not None and first.began, (first, said_in(out))
    end = attempt(stage.words(kind, out), kind.ranks, out)
    assert end.done, (end.codes, said_in(out))
    return digests_of(remains(out, kind.ranks))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.digests", description="The bits of small fixed runs, as digests."
    )
    parser.add_argument("--output", type=Path, help="JSON of the digests")
    parser.add_argument(
        "--compare", type=Path, help="an earlier --output; exit code 1 where anything differs"
    )
    asked = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import bertdist.train  # noqa: F401  before the ranks are forked

    runs: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="digests_") as name:
        stage = Stage(Path(name) / "stage")
        for number, (source, ranks, killed) in enumerate(
            [(s, r, k) for s in ("map", "stream") for r in (1, 2) for k in (False, True)]
        ):
            title = (
                f"{source}, {ranks} rank{'s' if ranks > 1 else ''}{', killed' if killed else ''}"
            )
            runs[title] = run(stage, Kind(source, ranks, "three"), Path(name) / str(number), killed)
            print(
                title,
                *(f"\n  {digest}  {part}" for part, digest in runs[title].items()),
                flush=True,
            )
    if asked.output:
        asked.output.write_text(
            json.dumps(
                {"machine": described("cpu", 1, ["torch", "transformers"]), "runs": runs}, indent=1
            )
            + "\n"
        )
    if asked.compare:
        before = json.loads(asked.compare.read_text())["runs"]
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
