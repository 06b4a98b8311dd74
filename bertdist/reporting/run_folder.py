"""What a run, or an evaluation, has left in its folder, checked and in memory.

    run = read_run("out")
    run.validation.report["scores"], run.validation.probabilities, run.validation.truth
    run.test                    # None without --test_file
    run.config, run.environment, run.metrics, run.check

Texts and the lines of errors.jsonl are read when they are asked for: there may be millions.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bertdist.core.atomic_io import read_json_object
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import RESULT_FILES, is_run_folder
from bertdist.core.types import Array
from bertdist.data.probabilities import read_metadata
from bertdist.tasks.labels import MULTI_LABEL, REGRESSION
from bertdist.tasks.row_scores import decided_labels

EVALUATION, PREDICTIONS, ERRORS, PROBABILITIES = RESULT_FILES


@dataclass(frozen=True)
class ScoredRows:
    """The rows that were evaluated, and what the model gives for each. N rows, L labels."""

    folder: Path
    prefix: str  # of the files: test_ for the rows of --test_file
    report: dict[str, Any]  # evaluation.json
    problem_type: str
    labels: tuple[str, ...]  # the name of the number for regression
    slice_column: str | None
    threshold: float | list[float | None] | None  # above which a label is predicted
    truth: Array  # (N,) int32 label, -1 without; (N, L) bool; or (N,) float32, NaN without
    probabilities: Array  # (N, L) float32; (N, 1) the predicted number
    tokens: Array  # (N,) int32, after truncation
    truncated: Array  # (N,) bool
    slices: Array  # (N,) int32: index into slice_values, -1 where there is none
    slice_values: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def is_multi_label(self) -> bool:
        """Whether a row may have several labels."""
        return self.problem_type == MULTI_LABEL

    @property
    def is_regression(self) -> bool:
        """Whether the model predicts a number."""
        return self.problem_type == REGRESSION

    @cached_property
    def predicted(self) -> Array:
        """(N,) int64 label; (N, L) bool; or (N,) float32, as evaluation.json counts them."""
        if self.is_multi_label:
            return self.probabilities > np.asarray(self.threshold or 0.5, np.float32)
        found: Array = self.probabilities[:, 0]
        thresholds = self.threshold if isinstance(self.threshold, list) else ()
        return found if self.is_regression else decided_labels(self.probabilities, thresholds)

    @property
    def path(self) -> Path:
        """Of probabilities.parquet."""
        return self.folder / f"{self.prefix}{PROBABILITIES}"

    def texts(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """{"text", and "text_pair" for pairs} of some rows, read from the file."""
        wanted, found = np.asarray(rows, np.int64), dict[int, dict[str, Any]]()
        with pq.ParquetFile(self.path) as file:
            names = [x for x in ("text", "text_pair") if x in file.schema_arrow.names]
            first = 0
            for batch in file.iter_batches(1 << 14, columns=names):
                mine = wanted[(wanted >= first) & (wanted < first + len(batch))]
                lines = batch.take(pa.array(mine - first)).to_pylist()
                found |= dict(zip(mine.tolist(), lines, strict=True))
                first += len(batch)
        return [found[row] for row in wanted.tolist()]

    def errors(self, number: int | None = None) -> Iterator[dict[str, Any]]:
        """The first lines of errors.jsonl: the rows that are predicted wrong with most confidence,
        with text, file and line. None: all.
        """
        path = self.folder / f"{self.prefix}{ERRORS}"
        with suppress(FileNotFoundError), open(path, "rb") as lines:
            yield from map(json.loads, islice(lines, number))


@dataclass(frozen=True)
class RunFolder:
    """A finished run, or an evaluation."""

    folder: Path
    config: dict[str, Any]  # config.yaml; empty for an evaluation
    environment: dict[str, Any]  # environment.json; empty for an evaluation
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl; empty for an evaluation
    validation: ScoredRows | None  # None without a validation split; an evaluation's rows
    test: ScoredRows | None  # of --test_file
    check: dict[str, Any]  # check.json, where `bertdist check --output` wrote it there, or empty

    @property
    def is_evaluation(self) -> bool:
        """Whether `bertdist evaluate` wrote it."""
        return not self.config and self.validation is not None

    @property
    def scored(self) -> dict[str, ScoredRows]:
        """The rows that were evaluated, by "validation" and "test"; none of a run without any."""
        found = {"validation": self.validation, "test": self.test}
        return {name: rows for name, rows in found.items() if rows is not None}


def read_run(folder: str | Path) -> RunFolder:
    """Of a finished run, or an evaluation with --output_dir.

    Raises ConfigError for another folder, for a run that has not finished, and for one of an older
    version, with the command that writes what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not the folder of a run: there is no such folder.")
    is_run, report = is_run_folder(folder), read_json_object(folder / EVALUATION)
    if not is_run and "evaluated" not in report:
        raise ConfigError(f"{folder} is {describe_folder(folder)}.")
    if is_run:
        _check_finished(folder)
    rows = {name: read_scored_rows(folder, prefix) for name, prefix in _PREFIXES.items()}
    return RunFolder(
        folder=folder,
        config=_read_yaml(folder / "config.yaml"),
        environment=read_json_object(folder / "environment.json"),
        metrics=list(_read_lines(folder / "metrics.jsonl")),
        check=read_json_object(folder / "check.json"),
        validation=rows["validation"],
        test=rows["test"],
    )


_PREFIXES = {"validation": "", "test": "test_"}


def describe_folder(folder: Path) -> str:
    """What a folder is that is not a run's."""
    if (folder / "folds").is_dir():
        return f"a cross-validation: name the run of a fold, such as {folder / 'folds' / '0'}"
    if (folder / "seeds").is_dir():
        return f"runs of several seeds: name these, as in bertdist report {folder / 'seeds' / '*'}"
    if (folder / "trials").is_dir():
        page, trials = folder / "report.html", folder / "trials" / "*"
        return f"a sweep, whose page is {page}: name trials, as in bertdist report {trials}"
    if is_run_folder(folder.parent):
        return f"a part of the run in {folder.parent}: name that folder"
    if (folder / "config.json").is_file():
        return (
            "a model, not the folder of a run: bertdist evaluate --model "
            f"{folder} --input FILE --output_dir scores makes one"
        )
    return "not the folder of a run: it has neither status.json nor an evaluation.json"


def _check_finished(folder: Path) -> None:
    """Raise ConfigError for a run that has not finished."""
    status = read_json_object(folder / "status.json")
    if status.get("state") != "finished":
        state = status.get("state") or "not started"
        raise ConfigError(
            f"The run in {folder} has not finished ({state}, step {status.get('step', 0)}): start "
            "it again with the same command, which resumes it."
        )


def read_scored_rows(folder: Path, prefix: str = "") -> ScoredRows | None:
    """Of one evaluation; None if there is none. Raises ConfigError where a file of it is missing,
    or is not of the same rows.
    """
    report_path, path = folder / f"{prefix}{EVALUATION}", folder / f"{prefix}{PROBABILITIES}"
    report = read_json_object(report_path)
    if not isinstance(report.get("scores"), dict):
        if report_path.exists():
            raise ConfigError(f"{report_path} is damaged: it holds no scores.{_again(folder)}")
        return None
    if not path.exists():
        raise ConfigError(f"{path} is missing: the run is of an earlier version.{_again(folder)}")
    about = read_metadata(path)
    try:
        table = pq.read_table(path, columns=_columns(about))
        return _scored_rows(folder, prefix, report, about, table)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read ({reason}).{_again(folder)}") from None


def _columns(about: dict[str, Any]) -> list[str]:
    names = ["truth", "probabilities", "tokens", "truncated"]
    return [*names, "slice"] if about["slice_column"] is not None else names


def _again(folder: Path) -> str:
    """How the files of an evaluation are written again."""
    if not is_run_folder(folder):
        return " Run the same bertdist evaluate again."
    return (
        " The same bertdist train command writes it again, without training: bertdist train "
        f"--config {folder / 'config.yaml'}"
    )


def _scored_rows(
    folder: Path, prefix: str, report: dict[str, Any], about: dict[str, Any], table: pa.Table
) -> ScoredRows:
    labels, rows = tuple(map(str, about["labels"])), len(table)
    flat = table.column("probabilities").combine_chunks().flatten()
    if len(flat) != rows * len(labels):
        raise ValueError(f"{len(flat)} probabilities for {rows} rows and {len(labels)} labels")
    truth = table.column("truth").combine_chunks()
    slices, values = np.full(rows, -1, np.int32), pa.array([], pa.string())
    if about["slice_column"] is not None:
        encoded = table.column("slice").combine_chunks().dictionary_encode()
        slices, values = _numbers(encoded.indices, -1, np.int32), encoded.dictionary
    return ScoredRows(
        folder=folder,
        prefix=prefix,
        report=report,
        problem_type=str(about["problem_type"]),
        labels=labels,
        slice_column=about["slice_column"],
        threshold=about.get("threshold"),
        truth=_checked(_truth(truth, str(about["problem_type"]), len(labels)), report),
        probabilities=np.asarray(flat, np.float32).reshape(rows, len(labels)),
        tokens=_numbers(table.column("tokens").combine_chunks(), 0, np.int32),
        truncated=np.asarray(table.column("truncated")).astype(bool),
        slices=slices,
        slice_values=tuple(values.to_pylist()),
    )


def _truth(column: pa.Array, problem_type: str, labels: int) -> Array:
    if problem_type == REGRESSION:
        return _numbers(column, np.nan, np.float32)
    if problem_type != MULTI_LABEL:
        return _numbers(column, -1, np.int32)
    found = np.zeros((len(column), labels), bool)
    found[np.asarray(column.value_parent_indices()), np.asarray(column.flatten())] = True
    return found


def _checked(truth: Array, report: dict[str, Any]) -> Array:
    """Raises ValueError where the labels are not those that evaluation.json has counted."""
    expected = [entry["rows"] for entry in report.get("per_class", ())]
    if not expected:
        return truth
    ids = truth[truth >= 0] if truth.ndim == 1 else truth
    found = ids.sum(0) if truth.ndim == 2 else np.bincount(ids, minlength=len(expected))
    if found.tolist() != expected:
        raise ValueError(f"its labels are not those of {EVALUATION}, which is of other rows")
    return truth


def _numbers(column: pa.Array, null: float, kind: Any) -> Array:
    """A column of numbers, with a number for null."""
    return np.asarray(column.fill_null(null)).astype(kind)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that was not written to its end."""
    with suppress(FileNotFoundError), open(path, "rb") as lines:
        for line in lines:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry
