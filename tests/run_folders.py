"""Folders of runs that nobody has trained: rows and logits made by rule, written by the code that writes those of a run.

rows = scored_rows(["a text"], ("no", "yes"), [1], np.array([[0.2, 1.5]]))
write_run(tmp_path / "out", rows)                # evaluation.json, ..., config.yaml, metrics.jsonl
write_run(tmp_path / "out", rows, test=other)    # test_evaluation.json, ... too
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from bertdist.core.config import TaskConfig
from bertdist.core.errors import RowLocation
from bertdist.data.records import Record
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel
from bertdist.training.best_model import write_results
from bertdist.training.evaluation import Scorer

TASKS: dict[str, Any] = {"single": SingleLabel, "multi": MultiLabel, "regression": Regression}


class Rows(NamedTuple):
    """What write_run writes of one evaluation."""

    dataset: Any  # as TokenizedDataset
    task: Any
    logits: torch.Tensor


class FakeRecords(SimpleNamespace):
    """As data.records.Records."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Record:
        pair = None if self.pairs is None else self.pairs[row].as_py()
        return Record(row, self.texts[row].as_py(), pair, None)


def scored_rows(
    texts: Sequence[str],
    labels: Sequence[str],
    truth: Any,
    logits: Any,
    kind: str = "single",
    pairs: Sequence[str] | None = None,
    slices: Sequence[str | None] | None = None,
    slice_column: str = "source",
    file: str = "dev.tsv",
    tokens: Any = None,
    truncated: Any = None,
) -> Rows:
    """truth: (N,) label ids, (N, L) of 0 and 1, or (N,) numbers; logits: (N, L)."""
    large = pa.large_string()
    records = FakeRecords(
        name=file,
        texts=pa.array(texts, large),
        pairs=None if pairs is None else pa.array(pairs, large),
        slices=None if slices is None else pa.array(slices, large),
        slice_column=None if slices is None else slice_column,
        location=lambda row: RowLocation(file, row + 2),
        is_one_file=True,
    )
    number = len(texts)
    tokens = np.array([len(x.split()) + 2 for x in texts]) if tokens is None else np.array(tokens)
    cut = np.zeros(number, bool) if truncated is None else np.array(truncated)
    targets = np.array(truth, np.int64 if kind == "single" else np.float32)
    dataset = SimpleNamespace(
        records=records, targets=targets, token_counts=(tokens.astype(np.int32), cut)
    )
    task = TASKS[kind](tuple(labels))
    return Rows(dataset, task, torch.tensor(np.array(logits), dtype=torch.float32))


def random_rows(
    number: int,
    labels: Sequence[str],
    kind: str = "single",
    seed: int = 0,
    sure: float = 2.0,
    **given: Any,
) -> Rows:
    """Rows that are mostly predicted right. sure: 0 for answers by chance."""
    rng = np.random.default_rng(seed)
    outputs = len(labels)
    logits = rng.normal(size=(number, outputs))
    if kind == "single":
        truth = rng.integers(outputs, size=number)
        logits[np.arange(number), truth] += sure
    elif kind == "multi":
        truth = (rng.random((number, outputs)) < 0.3).astype(np.float32)
        logits += sure * (2 * truth - 1)
    else:
        truth = rng.normal(size=number).astype(np.float32)
        logits = truth[:, None] * min(1.0, sure / 2) + 0.3 * logits
    lengths = rng.integers(1, 60, size=number)
    texts = [" ".join(f"word{n}" for n in rng.integers(500, size=length)) for length in lengths]
    return scored_rows(texts, labels, truth, logits, kind, **given)


def write_run(
    folder: Path,
    rows: Rows,
    test: Rows | None = None,
    metrics: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
    check: dict[str, Any] | None = None,
    evaluated: dict[str, Any] | None = None,
) -> Path:
    """A finished run; with `evaluated` an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, split in (("", rows), ("test_", test)):
        if split is not None:
            task_config = TaskConfig(metrics=None if metrics is None else list(metrics))
            scorer = Scorer(task_config, split.task, None)
            evaluation = scorer.score(split.logits, split.dataset.targets)
            first: Any = {"evaluated": evaluated} if evaluated else {"step": 20}
            write_results(folder, evaluation.results(split.dataset, **first), prefix)
    if evaluated:
        return folder
    settings = {"model_name_or_path": "tiny", "train_file": ["train.tsv"]} | (config or {})
    settings |= {"validation_file": "dev.tsv", "learning_rate": 0.001, "max_length": 128}
    (folder / "config.yaml").write_text(json.dumps(settings))  # YAML too
    (folder / "environment.json").write_text(
        json.dumps(
            {"python": "3.12", "packages": {"bertdist": "0.2"}, "command": ["bertdist", "train"]}
        )
    )
    (folder / "status.json").write_text('{"state": "finished", "step": 20, "reason": ""}\n')
    lines: list[dict[str, Any]] = []
    for step in range(1, 21):
        lines.append(
            {
                "kind": "train",
                "step": step,
                "epoch": step / 10,
                "loss": 1 / step,
                "learning_rate": 1e-3 / step,
            }
        )
        if step % 10 == 0:
            lines.append(
                {
                    "kind": "eval",
                    "step": step,
                    "epoch": step / 10,
                    "loss": 0.5,
                    "accuracy": step / 25,
                }
            )
    lines.append(
        {
            "kind": "meter",
            "step": 20,
            "finished": True,
            "tokens_per_second": 1234.5,
            "train_seconds": 12.5,
        }
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if check is not None:
        (folder / "check.json").write_text(json.dumps(check))
    return folder
