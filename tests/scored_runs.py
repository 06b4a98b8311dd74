"""Run folders by hand: what a finished run leaves, of rows and probabilities that a test chooses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
CONFIG = {"model_name_or_path": "m", "train_file": ["t.tsv"], "learning_rate": 5e-5, "seed": 42}


def softmax(logits: Any) -> Any:
    weights = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def write_rows(
    folder: Path,
    truth: Any,
    probabilities: Any,
    *,
    labels: Sequence[str] = ("no", "yes"),
    texts: Sequence[str] | None = None,
    pairs: Sequence[str] | None = None,
    problem_type: str = SINGLE,
    threshold: Any = None,
    scores: Mapping[str, float] | None = None,
    prefix: str = "",
) -> None:
    """evaluation.json and probabilities.parquet. truth: ids, lists of ids, or numbers; None without label."""
    probabilities = np.asarray(probabilities, np.float32)
    rows = len(probabilities)
    kinds = {SINGLE: pa.int32(), MULTI: pa.list_(pa.int32()), REGRESSION: pa.float32()}
    texts = [f"text {row}" for row in range(rows)] if texts is None else texts
    columns = {
        "row": pa.array(range(rows), pa.int64()),
        "text": pa.array(texts, pa.string()),
        **({} if pairs is None else {"text_pair": pa.array(pairs, pa.string())}),
        "truth": pa.array(list(truth), kinds[problem_type]),
        "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
        "tokens": pa.array([5] * rows, pa.int32()),
        "truncated": pa.array([False] * rows),
        "slice": pa.nulls(rows, pa.string()),
    }
    about = {
        "problem_type": problem_type,
        "labels": list(labels),
        "slice_column": None,
        "threshold": 0.5 if threshold is None and problem_type == MULTI else threshold,
    }
    table = pa.table(columns).replace_schema_metadata({"bertdist": json.dumps(about)})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{prefix}probabilities.parquet", compression="zstd")
    if scores is None:
        scores = {"loss": 0.5, "mse" if problem_type == REGRESSION else "accuracy": 0.5}
    (folder / f"{prefix}evaluation.json").write_text(
        json.dumps({"step": 8, "scores": dict(scores)})
    )


def write_run(
    folder: Path,
    truth: Any,
    probabilities: Any,
    *,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    curve: Sequence[float] = (0.7, 0.5),
    training_rows: str = "100 rows, 0123456789abcdef",
    **rows: Any,
) -> Path:
    """A finished run; rows: for `write_rows`."""
    write_rows(folder, truth, probabilities, **rows)
    checkpoint = folder / "checkpoints" / "step_000008"
    checkpoint.mkdir(parents=True)
    state = {"must_match": {"training_rows": training_rows}, "may_change": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    settings = CONFIG | {"output_dir": str(folder)} | dict(config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    facts = {"python": "3.11", "packages": {"bertdist": "0.2", "torch": "2.13"}, "device": "cpu"}
    (folder / "environment.json").write_text(json.dumps(facts | dict(environment or {})))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 8, "reason": ""}))
    lines = [
        {"kind": kind, "step": 4 * n, "epoch": n / 2, "loss": loss, **({"tokens": 100 * n} if kind == "train" else {"accuracy": 1 - loss})}
        for n, loss in enumerate(curve, start=1)
        for kind in ("train", "eval")
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
