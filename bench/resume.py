"""Time to the first step when a run resumes at 1%, 50% and 99% of an epoch, in memory and streamed.

    python -m bench.resume --model M --rows 500000

The row order is a pure function of seed, epoch and step, so nothing is replayed. Timed are opening
the loader there and making the first step (planning the epoch or reading one window again, and
tokenizing one step). The data are generated. The minimum of 5 trials.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bertdist.core.config import DataConfig, ModelConfig
from bertdist.data.batch import RankStep
from bertdist.data.load_data import load_records, open_stream
from bertdist.data.loader import MapLoader
from bertdist.data.source import ReaderState
from bertdist.data.streaming import StreamLoader
from bertdist.data.tokenization import create_dataset, load_tokenizer
from bertdist.tasks.tasks import SingleLabel

ROWS_PER_STEP, WINDOW, TRIALS = 32, 16_384, 5
TASK = SingleLabel(("no", "yes"))
POSITIONS = (0.01, 0.5, 0.99)


def write(path: Path, rows: int) -> None:
    """Rows of 2 to 40 words."""
    random_ = random.Random(0)
    words = "a an and but film is it movie not of so the this very was good bad fine dull".split()
    with open(path, "w") as file:
        for _ in range(rows):
            text = " ".join(random_.choices(words, k=random_.randint(2, 40)))
            file.write(json.dumps({"text": text, "label": random_.choice(("no", "yes"))}) + "\n")


def seconds_to_first_step(first: Callable[[], RankStep]) -> float:
    """Seconds until there is a step; the minimum of several trials."""
    trials = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        first()
        trials.append(time.perf_counter() - began)
    return min(trials)


def measure(model: str, rows: int, folder: Path) -> dict[str, list[float]]:
    """Seconds to the first step at each of POSITIONS."""
    path = folder / "rows.jsonl"
    write(path, rows)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=model))
    data, common = (
        DataConfig(train_file=[str(path)]),
        {"rows_per_step": ROWS_PER_STEP, "tokens_per_micro_batch": 8192, "seed": 1},
    )
    records = load_records(data, "train")
    batches = MapLoader(
        dataset=create_dataset(records, tokenizer, TASK, 128),
        shuffle=True,
        **common,  # type: ignore[arg-type]
    )
    stream = open_stream(replace(data, streaming=True, stream_window=WINDOW), 1)
    states = [window.state for window in stream.windows()]
    head = create_dataset(stream.head(), tokenizer, TASK, 128)
    streamed = StreamLoader(stream=stream, task=TASK, dataset=head, **common)  # type: ignore[arg-type]

    def step_of(some: Any, number: int, place: ReaderState | None) -> Callable[[], RankStep]:
        return lambda: next(iter(some.steps(number, number + 1, place)))

    steps = [int(place * batches.steps_per_epoch) for place in POSITIONS]
    windows: list[ReaderState] = [
        {"window": states[int(place * len(states))], "step": 3} for place in POSITIONS
    ]
    return {
        "rows in memory": [seconds_to_first_step(step_of(batches, step, None)) for step in steps],
        "a stream": [
            seconds_to_first_step(step_of(streamed, step, place))
            for step, place in zip(steps, windows, strict=True)
        ],
    }


def main(words: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.resume")
    parser.add_argument(
        "--model", required=True, help="Folder or name of a model, for its tokenizer."
    )
    parser.add_argument("--rows", type=int, default=500_000)
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        for kind, seconds in measure(asked.model, asked.rows, Path(folder)).items():
            told = ", ".join(
                f"{place:.0%}: {taken:.3f} s"
                for place, taken in zip(POSITIONS, seconds, strict=True)
            )
            print(f"{kind:15} {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
