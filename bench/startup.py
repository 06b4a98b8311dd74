"""How long one waits for the first answer: from a cold process, in turns with the peer.

    python -m bench.startup --model_name_or_path demo/model --train_file demo/data/train.tsv

Timed: `bertdist --help`; `bertdist predict --text` against `transformers.pipeline` with the same
weights; the first training step after torch is imported; and what each import costs. Medians and
extremes, in seconds; processor time too, which other work on the machine disturbs less.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.machine import describe_machine
from bench.peers import positive

PIPELINE = """
import sys
from transformers import pipeline
print(pipeline("text-classification", model=sys.argv[1])("A film to remember."))
"""
FIRST_STEP = """
import sys, time
import torch
start = time.monotonic()
import bertdist
bertdist.train(
    model_name_or_path=sys.argv[1], train_file=sys.argv[2], output_dir=sys.argv[3],
    max_train_steps=1, log_every="1 steps", use_cpu=True,
    on_log=lambda step, values: print(f"first step after {time.monotonic() - start:.2f} s"),
)
"""
IMPORTS = ("torch", "transformers", "accelerate", "datasets", "evaluate", "pandas", "pyarrow")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    result = argparse.ArgumentParser(
        prog="python -m bench.startup", description="Start-up times.", allow_abbrev=False
    )
    result.add_argument("--model_name_or_path", default="demo/model", help="Folder of the model.")
    result.add_argument("--train_file", default="demo/data/train.tsv", help="Rows to train on.")
    result.add_argument("--repetitions", type=positive, default=5, help="Times of each command.")
    return result


def timed(command: Sequence[str]) -> tuple[float, float, str]:
    """(seconds, processor seconds, output) of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if found.returncode:
        raise SystemExit(f"bench.startup: {' '.join(command)}: {found.stderr[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, found.stdout


def show(name: str, values: Sequence[float]) -> None:
    """Median, lowest and highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    print(f"{name:48} {middle:6.2f}  ({low:.2f} to {high:.2f})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train for one step, then time the commands in turns."""
    args = parser().parse_args(arguments)
    print(describe_machine("cpu", os.cpu_count() or 1, ("torch", "transformers", "accelerate")))
    print(f"Seconds, medians of {args.repetitions}, in turns.")
    with tempfile.TemporaryDirectory() as folder:
        first = [
            float(re.findall(r"after ([0-9.]+) s", output)[0])
            for i in range(args.repetitions)
            for _, _, output in [
                timed(["-c", FIRST_STEP, args.model_name_or_path, args.train_file, f"{folder}/{i}"])
            ]
        ]
        best = str(Path(folder, "0", "best"))
        commands = {
            "bertdist --help": ["-m", "bertdist", "--help"],
            "bertdist train --help all": ["-m", "bertdist", "train", "--help", "all"],
            "bertdist predict --text": [
                "-m",
                "bertdist",
                "predict",
                "--model",
                best,
                "--text",
                "A",
            ],
            "transformers.pipeline": ["-c", PIPELINE, best],
        }
        runs: dict[str, list[tuple[float, float, str]]] = {name: [] for name in commands}
        for _ in range(args.repetitions):
            for name, command in commands.items():
                runs[name].append(timed(command))
    show("first training step, after torch is imported", first)
    for name, found in runs.items():
        show(name, [seconds for seconds, _, _ in found])
        show(f"{name}, processor time", [used for _, used, _ in found])
    ratios = [
        ours[0] / theirs[0]
        for ours, theirs in zip(
            runs["bertdist predict --text"], runs["transformers.pipeline"], strict=True
        )
    ]
    show("bertdist predict / transformers.pipeline", ratios)
    bare = statistics.median(timed(["-c", "pass"])[1] for _ in range(args.repetitions))
    for name in IMPORTS:
        show(f"import {name}, processor time", [timed(["-c", f"import {name}"])[1] - bare])


if __name__ == "__main__":
    main()
