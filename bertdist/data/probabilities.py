"""probabilities.parquet: what the model gives for every evaluated row, to draw, compare and
calibrate from.

One row per evaluated row, in row order:

    row            int64, as in predictions.jsonl
    text           string; text_pair too, for pairs
    truth          single-label: int32, index of the label; multi-label: list<int32>, indices;
                   regression: float32
    probabilities  list<float32>: of every label (softmax, sigmoids), or the one predicted number
    tokens         int32, after truncation to --max_length
    truncated      bool
    slice          string: the value of --slice_column, null without

The schema's metadata has, as JSON under the key `bertdist`: problem_type, labels, slice_column,
threshold (above which a label is predicted: 0.5 for multi-label tasks, null for others; after
--tune_thresholds a list of those of the labels, null for the other one of two).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from bertdist.core.atomic_io import atomic_file
from bertdist.core.types import Array
from bertdist.data.records import Records
from bertdist.data.tokenization import TokenizedDataset
from bertdist.tasks.labels import MULTI_LABEL, SINGLE_LABEL
from bertdist.tasks.tasks import Task

METADATA = b"bertdist"
THRESHOLD = 0.5  # of multi-label tasks
VALUES_PER_CHUNK = 1 << 22  # probabilities in memory at a time, besides the logits


@dataclass(frozen=True)
class Probabilities:
    """The table of some rows, made as it is written."""

    rows: TokenizedDataset
    task: Task
    logits: Tensor  # (rows, outputs)

    def write(self, path: Path) -> None:
        """Write the file as a whole, or leave what is there. Raises CheckpointError."""
        schema = self._schema()
        with (
            atomic_file(path) as file,
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            for columns in self._chunks():
                writer.write_table(pa.table(columns, schema=schema))

    def _schema(self) -> pa.Schema:
        truth = {SINGLE_LABEL: pa.int32(), MULTI_LABEL: pa.list_(pa.int32())}
        records = self.rows.records
        columns = {
            "row": pa.int64(),
            "text": pa.string(),
            **({} if records.pairs is None else {"text_pair": pa.string()}),
            "truth": truth.get(self.task.problem_type, pa.float32()),
            "probabilities": pa.list_(pa.float32()),
            "tokens": pa.int32(),
            "truncated": pa.bool_(),
            "slice": pa.string(),
        }
        about = {
            "problem_type": self.task.problem_type,
            "labels": list(self.task.labels),
            "slice_column": records.slice_column,
            "threshold": list(self.task.thresholds)
            or (THRESHOLD if self.task.problem_type == MULTI_LABEL else None),
        }
        return pa.schema(columns.items(), {METADATA: json.dumps(about).encode()})

    def _chunks(self) -> Iterator[dict[str, Any]]:
        records, targets = self.rows.records, self.rows.targets
        tokens, truncated = self.rows.token_counts
        size = max(1, min(1 << 16, VALUES_PER_CHUNK // max(1, self.logits.shape[1])))
        for start in range(0, len(records), size):
            stop = min(start + size, len(records))
            part = slice(start, stop)
            _, probabilities = self.task.predict(self.logits[part])
            yield {
                "row": pa.array(np.arange(start, stop)),
                "text": records.texts[part].cast(pa.string()),
                **(
                    {}
                    if records.pairs is None
                    else {"text_pair": records.pairs[part].cast(pa.string())}
                ),
                "truth": self._truth(targets[part]),
                "probabilities": _lists(probabilities.astype(np.float32)),
                "tokens": pa.array(tokens[part]),
                "truncated": pa.array(truncated[part]),
                "slice": pa.nulls(stop - start, pa.string())
                if records.slices is None
                else records.slices[part].cast(pa.string()),
            }

    def _truth(self, targets: Array) -> pa.Array:
        if self.task.problem_type == MULTI_LABEL:
            rows, labels = np.nonzero(targets)
            ends = np.searchsorted(rows, np.arange(len(targets) + 1)).astype(np.int32)
            return pa.ListArray.from_arrays(pa.array(ends), pa.array(labels.astype(np.int32)))
        kind = np.int32 if self.task.problem_type == SINGLE_LABEL else np.float32
        return pa.array(targets.astype(kind))


def _lists(values: Array) -> pa.ListArray:
    """(rows, n) numbers as a list per row."""
    rows, width = values.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def has_other_slices(path: Path, records: Records) -> bool:
    """Whether a --slice_column is asked for, and the file has another one, or none."""
    column = records.slice_column
    return column is not None and read_metadata(path).get("slice_column") != column


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of such a file; empty where there is none, or it cannot be read."""
    try:
        about = json.loads((pq.read_schema(path).metadata or {}).get(METADATA, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return about if isinstance(about, dict) else {}
