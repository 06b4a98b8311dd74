"""Training from Python and notebooks: keywords for flags, rows in memory, results as objects.

    run = bertdist.train(
        model_name_or_path="google-bert/bert-base-uncased",
        train_rows=frame, validation_rows=dev, output_dir="out", learning_rate=3e-5,
    )
    run.scores                                  # {"loss": 0.31, "accuracy": 0.91, ...}
    run.predictor()(["A film to remember."])    # [{"label": "positive", "score": 0.98}]

The keywords are the flags of `bertdist train`, checked by the same code.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging

from bertdist.core.args import read_settings
from bertdist.core.atomic_io import read_json_object
from bertdist.core.config import DataConfig, TrainConfig, config_to_yaml
from bertdist.core.errors import BertdistError, ConfigError, DataError
from bertdist.data.records import LABEL_COLUMNS, TEXT_COLUMNS
from bertdist.distributed.launch import EXIT_STOPPED
from bertdist.predict import Predictor
from bertdist.train import train as train_from_config
from bertdist.training.cross_validation import REPORT_FILE, cross_validate
from bertdist.training.run_logger import Hooks

_running = threading.Lock()
_ROWS = (
    "expected a pandas or polars DataFrame, a datasets.Dataset, a pyarrow.Table, a list of dicts, "
    "a dict of columns, or (texts, labels)"
)


class Run:
    """The folder of a run, and what is in it. Everything is read when it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError for a folder without a run."""
        self.folder = Path(folder)
        if not any((self.folder / name).exists() for name in ("status.json", "folds")):
            raise ConfigError(f"{folder} is not the folder of a run: it has no status.json.")

    @property
    def finished(self) -> bool:
        """Whether training is done; else the same call goes on."""
        done = read_json_object(self.folder / "status.json").get("state") == "finished"
        return bool(done or self.cross_validation)

    @property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json of the best weights: step, scores, scores per label, confusion matrix;
        empty without a validation split.
        """
        return read_json_object(self.folder / "evaluation.json")

    @property
    def scores(self) -> dict[str, float]:
        """Scores of the best weights on the validation split, loss first."""
        return dict(self.evaluation.get("scores", {}))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: {"kind": "train" or "eval", "step", "epoch", "loss", ...}."""
        file = self.folder / "metrics.jsonl"
        if not file.is_file():
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    @property
    def cross_validation(self) -> dict[str, Any]:
        """cross_validation.json of folds=5: mean and std of every score, and the scores per fold;
        empty without folds. The runs are Run(run.folder / "folds" / "0") and so on.
        """
        return read_json_object(self.folder / REPORT_FILE)

    def predictor(self, **options: Any) -> Predictor:
        """A `Predictor` of the best weights; options: its own."""
        return Predictor(self.folder / "best", **options)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        state = "finished" if self.finished else "not finished"
        return f"Run({str(self.folder)!r}, {state}{', ' if shown else ''}{shown})"


def train(
    config: TrainConfig | None = None,
    *,
    train_rows: Any = None,
    validation_rows: Any = None,
    on_log: Callable[[int, dict[str, Any]], None] | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    processes: int = 1,
    **settings: Any,
) -> Run:
    """Fine-tune a classifier; the same call with the same output_dir resumes a stopped run.

    config: of `read_config`, instead of settings. settings: the flags of `bertdist train`, such as
    learning_rate=1e-4; config="run.yaml" names a file of them.
    train_rows, validation_rows: instead of files, a pandas or polars DataFrame, a datasets.Dataset,
    a pyarrow.Table, a list of dicts, a dict of columns, or (texts, labels).
    on_log(step, values) is called for every training line of metrics.jsonl, and
    on_evaluation(values) for every evaluation, on rank 0. They get copies: nothing that they do
    changes a step; an exception ends the run.
    processes: one per GPU, or any number on the CPU, in processes of their own, so that a notebook
    may have used CUDA before.
    Raises BertdistError.
    """
    if type(processes) is not int or processes < 1:
        raise ConfigError(f"processes is {processes!r}; expected a whole number of at least 1.")
    with ExitStack() as stack:
        rows = {"train_rows": train_rows, "validation_rows": validation_rows}
        if any(given is not None for given in rows.values()):
            if config is not None:
                raise ConfigError("Give rows with settings, not with a config.")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bertdist-"))
            settings |= _write_rows(rows, Path(folder), settings)
        if config is None:
            config = read_settings(settings)
        elif settings:
            raise ConfigError(
                f"Give a config or settings, not both: {', '.join(settings)}; "
                "dataclasses.replace changes a config."
            )
        if config.run.dry_run:
            raise ConfigError("dry_run is for the command: bertdist train --dry_run.")
        if processes > 1:
            if on_log or on_evaluation:
                raise ConfigError("on_log and on_evaluation need processes=1.")
            _train_in_processes(config, processes)
        else:
            stack.enter_context(_only_run())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(_own_accelerate_state())
            stack.enter_context(_quiet_transformers())
            _train_here(config, Hooks(on_log, on_evaluation))
    return Run(config.run.output_dir)


def _train_here(config: TrainConfig, hooks: Hooks) -> None:
    """In this process: a run, or one per fold."""

    def train_run(config: TrainConfig) -> bool:
        return train_from_config(config, hooks).finished

    if config.run.folds is None:
        train_run(config)
    else:
        cross_validate(config, train_run)


@contextmanager
def _only_run() -> Iterator[None]:
    """One run at a time: torch has one random state, and accelerate one device, per process."""
    if not _running.acquire(blocking=False):
        raise ConfigError("Another thread of this process trains: one run at a time.")
    try:
        yield
    finally:
        _running.release()


@contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """In a process of its own rank, accelerate starts anew, and finds its state again afterwards.

    Else the device and precision of the first Accelerator would be those of all later runs.
    """
    if torch.distributed.is_initialized() or os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    shared = [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bars and the report of transformers: bertdist says it in fewer words."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _train_in_processes(config: TrainConfig, processes: int) -> None:
    """`bertdist train --processes N`, its lines printed here. Raises BertdistError."""
    with tempfile.TemporaryDirectory(prefix="bertdist-") as folder:
        file = Path(folder, "run.yaml")
        file.write_text(config_to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "bertdist", "train", "--config", str(file)]
        command += ["--processes", str(processes)]
        errors: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        ) as process:
            assert process.stdout is not None
            while True:
                try:
                    for line in process.stdout:
                        print(line, end="", flush=True)
                        errors += [line[10:].strip()] * line.startswith("bertdist: ")
                    break
                except KeyboardInterrupt:  # the processes got it too: they save and end
                    continue
    if process.returncode not in (0, EXIT_STOPPED):
        code = process.returncode
        raise BertdistError("\n".join(errors) or f"Training failed with exit code {code}.")


# ---- Rows in memory


def _write_rows(
    rows: Mapping[str, Any], folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Rows as parquet files, and the settings that read them: the same code as for files."""
    found: dict[str, Any] = {}
    for keyword, given in rows.items():
        name = keyword.replace("_rows", "_file")
        if given is not None and settings.get(name) is not None:
            raise ConfigError(f"{name} and {keyword} both name rows; give one.")
        if given is not None:
            found[name] = str(folder / f"{keyword}.parquet")
    config = read_settings({**settings, **found})  # with those of a config file
    regression = config.task.problem_type == "regression"
    for keyword, given in rows.items():
        if given is None:
            continue
        try:
            table, label_names = _as_table(given, keyword, config.data, keep_codes=regression)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error.args[0] if error.args else error).split())
            raise DataError(f"{keyword}: {reason}. Expected one type per column.") from None
        pq.write_table(table, folder / f"{keyword}.parquet")
        if label_names and config.task.label_names is None and keyword == "train_rows":
            found["label_names"] = label_names
    return found


def _as_table(
    rows: Any, name: str, data: DataConfig, keep_codes: bool = False
) -> tuple[pa.Table, list[str] | None]:
    """A table, and the names of its labels in order where a datasets.Dataset has them.

    keep_codes: leave class labels as numbers. Raises DataError, and errors of pyarrow.
    """
    if isinstance(rows, tuple) and len(rows) == 2:
        texts, labels = (_as_list(part, name) for part in rows)
        if len(texts) != len(labels):
            raise DataError(f"{name} has {len(texts)} texts and {len(labels)} labels.")
        (text,) = data.text_column or [TEXT_COLUMNS[0]]
        return pa.table({text: texts, data.label_column or LABEL_COLUMNS[0]: labels}), None
    if isinstance(rows, pa.Table):
        return rows, None
    if isinstance(rows, Mapping) and any(hasattr(part, "features") for part in rows.values()):
        splits = ", ".join(map(repr, rows))
        raise DataError(f"{name} has splits: {splits}. Pass one of them, such as rows['train'].")
    if isinstance(rows, Mapping):
        return pa.table({key: _as_list(values, name) for key, values in rows.items()}), None
    if hasattr(rows, "to_arrow"):  # polars
        return rows.to_arrow(), None
    if hasattr(rows, "features") and hasattr(rows, "num_rows"):  # datasets
        return _table_of_dataset(rows, data, keep_codes)
    if hasattr(rows, "columns") and hasattr(rows, "iloc"):  # pandas
        frame = rows.rename(columns=str)
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(), None
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        columns = dict.fromkeys(key for row in rows for key in row)
        return pa.table({key: [row.get(key) for row in rows] for key in columns}), None
    raise DataError(f"{name} is of type {type(rows).__name__}; {_ROWS}.")


def _as_list(column: Any, name: str) -> list[Any]:
    """A column in memory. Raises DataError for what has no order, or is one text."""
    wrong = isinstance(column, str | bytes | set | frozenset | Mapping)
    if wrong or hasattr(column, "columns") or not hasattr(column, "__iter__"):
        raise DataError(f"{name}: a column is of type {type(column).__name__}; expected a list.")
    return list(column.to_list() if hasattr(column, "to_list") else column)


def _table_of_dataset(
    dataset: Any, data: DataConfig, keep_codes: bool
) -> tuple[pa.Table, list[str] | None]:
    """A datasets.Dataset with the names of its class labels in place of their numbers."""
    table = dataset.with_format("arrow")[:].replace_schema_metadata()
    label_names = None
    for index, (column, feature) in enumerate(dataset.features.items()):
        inner = getattr(feature, "feature", feature)  # of a list of labels
        names = getattr(inner, "names", None)
        if names is None or keep_codes:
            continue

        def named(value: Any, names: list[str] = names) -> Any:
            if isinstance(value, list):
                return [named(item, names) for item in value]
            # -1 is "no label" in datasets.
            return None if value is None or value < 0 else names[value]

        values = [named(value) for value in table.column(column).to_pylist()]
        kind = pa.string() if inner is feature else pa.list_(pa.string())
        table = table.set_column(index, column, pa.array(values, kind))
        if column == (data.label_column or LABEL_COLUMNS[0]):
            label_names = list(names)
    return table, label_names
