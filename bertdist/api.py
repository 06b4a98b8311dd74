"""Training and evaluation from Python and notebooks: keywords for flags, rows in memory, objects.

    run = bertdist.train(
        model_name_or_path="google-bert/bert-base-uncased",
        train_rows=frame, validation_rows=dev, output_dir="out", learning_rate=3e-5,
    )
    run.scores                                  # {"loss": 0.31, "accuracy": 0.91, ...}
    run.predictor()(["A film to remember."])    # [{"label": "positive", "score": 0.98}]
    run.evaluate(test).errors                   # rows that are predicted wrong

The keywords are the flags of `bertdist train` and `bertdist evaluate`, checked by the same code.
"""

import functools
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast_object_list

from bertdist.core.args import TRAIN_SECTIONS, read_evaluate_settings, read_settings
from bertdist.core.atomic_io import read_json_object, to_json
from bertdist.core.config import EvaluateConfig, ModelConfig, TrainConfig, config_to_yaml
from bertdist.core.errors import BertdistError, ConfigError
from bertdist.core.flags import flags_of
from bertdist.core.hub import model_folder
from bertdist.core.output_files import RESULT_FILES
from bertdist.core.terminal import EXIT_STOPPED
from bertdist.data.in_memory import as_table
from bertdist.data.preflight import check_upload
from bertdist.data.trained_columns import data_of_model
from bertdist.models.classifier import (
    load_model_config,
    quiet_transformers,
    saved_metadata,
    trained_task,
)
from bertdist.reporting.after_run import write_report
from bertdist.tasks.labels import REGRESSION
from bertdist.train import train as train_from_config
from bertdist.train import train_all
from bertdist.training.run_logger import Hooks
from bertdist.training.run_summary import report_notes

if TYPE_CHECKING:
    from bertdist.predict import Predictor

P = ParamSpec("P")
R = TypeVar("R")

_running = threading.Lock()
# A command, which stays as it is, or a flag
_FLAG = re.compile(
    r"(?P<command>`[^`]*`|\b(?:bertdist|accelerate) \w+(?: --?\w[\w-]*(?: \w[\w./]*)?)*)"
    r"|(?<![^\s(])--(?P<flag>[a-z][\w-]*)(?: (?P<value>\w+))?"
)
_NULL_TEXT = re.compile(
    r"(?P<found>(?:\w+_)?rows row \d+: column (?P<column>'.+?') is null; expected a text\.)"
)


def as_keywords(message: str, command: str) -> str:
    """A message about flags, as one about keywords: --on_bad_row skip is on_bad_row="skip".

    command: train or evaluate, whose --help a message names. Of null texts in memory it also says
    how to fill them.
    """
    choices = {flag.name: flag.choices for x in TRAIN_SECTIONS for flag in flags_of(x)}

    def keyword(match: re.Match[str]) -> str:
        name, value = match["flag"], match["value"]
        if match["command"]:
            return match[0]
        if name == "help":
            return f"bertdist {command} {match[0]}"
        if value in choices.get(name, ()):
            return f'{name}="{value}"'
        return name + f" {value}" * (value is not None)

    fill = r"\g<found> In a DataFrame: frame.fillna({\g<column>: ''})."
    return _NULL_TEXT.sub(fill, _FLAG.sub(keyword, message))


def _with_keywords(command: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Errors of the function name keywords, and their traceback ends at the call of it."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except BertdistError as error:
                error.args = (as_keywords(str(error), command),)
                raise error.with_traceback(None) from error.__cause__  # of a hook

        return called

    return decorate


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """The scores of a model on labelled rows, and what it predicts for each.

    report: evaluation.json: scores, intervals, scores per label, confusion matrix.
    predictions: one dict per row, in their order, with `row`, `label` and `score`, and `truth`.
    errors: the rows that are predicted wrong, the most confident error first, with `text`.
    folder: output_dir, which has the same as files; None if it was not given.
    """

    report: dict[str, Any]
    predictions: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    folder: Path | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Loss first; None for a score that is undefined on these rows."""
        return dict(self.report["scores"])

    @property
    def intervals(self) -> dict[str, list[float] | None]:
        """The 95% interval of each score, [low, high]; of custom metrics there is none."""
        return dict(self.report["intervals"])

    @property
    def notes(self) -> list[str]:
        """Sentences on answers that are all alike, or all empty."""
        return [as_keywords(note, "evaluate") for note in report_notes(self.report)]

    @property
    def per_label(self) -> list[dict[str, Any]]:
        """One dict per label: label, rows, precision, recall, f1; empty for numbers."""
        return list(self.report.get("per_class", []))

    @property
    def labels(self) -> list[str]:
        """The labels of the model, in the order of the confusion matrix; empty for numbers."""
        return list(self.report.get("labels", []))

    @property
    def confusion(self) -> list[list[int]]:
        """Rows: true labels, columns: predicted ones; empty where there is none (several labels
        per row, numbers, more than 200 labels).
        """
        return list(self.report.get("confusion", []))

    def __repr__(self) -> str:
        of = self.report["evaluated"]
        shown = f"Evaluation({of['model']!r}, {of['rows']:,} rows, {_shown_scores(self.scores)})"
        return "\n".join([shown, *self.notes])

    def _repr_html_(self) -> str:
        of = self.report["evaluated"]
        title = f"{of['model']} on {of['rows']:,} rows"
        title += f" of {of['data']}" * (of["data"] != "rows")
        return _html_scores(title, self.scores, self.intervals, self.notes)


class Run:
    """The folder of a run, and what is in it. Everything is read when it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError for a folder without a run."""
        if not isinstance(folder, str | Path) or not str(folder):
            raise ConfigError(f"The run is {folder!r}; expected its folder.")
        self.folder = Path(folder)
        if not any((self.folder / name).exists() for name in ("status.json", "folds", "seeds")):
            raise ConfigError(f"{folder} is not the folder of a run: it has no status.json.")

    @property
    def finished(self) -> bool:
        """Whether training is done; if not, the same call of `train` resumes it."""
        done = read_json_object(self.folder / "status.json").get("state") == "finished"
        return bool(done or self.cross_validation or self.seeds)

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
        *lines, last = file.read_bytes().split(b"\n")
        entries = [json.loads(line) for line in lines]
        with suppress(ValueError):  # empty, or still being written
            entries.append(json.loads(last))
        return entries

    @property
    def cross_validation(self) -> dict[str, Any]:
        """cross_validation.json of folds=5: mean and std of every score, and the scores per fold;
        empty without folds. The runs are Run(run.folder / "folds" / "0") and so on.
        """
        from bertdist.training.cross_validation import REPORT_FILE

        return read_json_object(self.folder / REPORT_FILE)

    @property
    def seeds(self) -> dict[str, Any]:
        """seeds.json of seeds=5: mean and std of every score, the scores per seed, and the best;
        empty without seeds. The runs are Run(run.folder / "seeds" / "42") and so on.
        """
        from bertdist.training.seeds import REPORT_FILE

        return read_json_object(self.folder / REPORT_FILE)

    @_with_keywords("evaluate")
    def predictor(self, **options: Any) -> "Predictor":
        """A `Predictor` of the best weights; options: its own."""
        from bertdist.predict import Predictor

        return Predictor(self._best(), **options)

    def _best(self) -> Path:
        """The folder of the best weights. Raises ConfigError if there is none."""
        best = Path(model_folder(self.folder))  # with seeds, of the best one
        if best.name == "best" and best.exists():
            return best
        if (self.folder / "folds").exists():
            raise ConfigError(
                f"{self.folder} has a model per fold, and none of all rows: train without folds, "
                f"or take bertdist.Run({str(self.folder / 'folds' / '0')!r})."
            )
        raise ConfigError(f"{self.folder} has no best weights yet: the same call of train goes on.")

    @_with_keywords("evaluate")
    def evaluate(self, rows: Any, **settings: Any) -> Evaluation:
        """`bertdist.evaluate` with the best weights. rows: labelled rows in memory, or a file."""
        given = {"input" if isinstance(rows, str | Path) else "rows": rows}
        return evaluate(self._best(), **given, **settings)

    def _shown(self) -> tuple[str, dict[str, float]]:
        """What state the run is in, and its scores."""
        if folds := self.cross_validation:
            means = {name: values["mean"] for name, values in folds["scores"].items()}
            return f"mean of {folds['folds']} folds", means
        if seeds := self.seeds:
            means = {name: values["mean"] for name, values in seeds["scores"].items()}
            return f"mean of {len(seeds['seeds'])} seeds", means
        return "finished" if self.finished else "not finished", self.scores

    def __repr__(self) -> str:
        state, scores = self._shown()
        shown = _shown_scores(scores)
        return f"Run({str(self.folder)!r}, {state}{', ' if shown else ''}{shown})"

    def _repr_html_(self) -> str:
        state, scores = self._shown()
        return _html_scores(f"{self.folder}: {state}", scores, self.evaluation.get("intervals"))


@_with_keywords("train")
def train(
    config: TrainConfig | str | Path | None = None,
    *,
    train_rows: Any = None,
    validation_rows: Any = None,
    test_rows: Any = None,
    on_log: Callable[[int, dict[str, Any]], None] | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    processes: int = 1,
    **settings: Any,
) -> Run:
    """Fine-tune a classifier; the same call with the same output_dir resumes a stopped run.

        run = bertdist.train(
            model_name_or_path="google-bert/bert-base-uncased",
            train_rows=frame, validation_split=0.1, output_dir="out", learning_rate=3e-5,
        )

    settings: the flags of `bertdist train`: model_name_or_path, train_file, validation_file,
    test_file, validation_split, output_dir, text_column, label_column, label_names, max_length,
    num_train_epochs, learning_rate, train_batch_size, metrics, seed, ...; `bertdist train --help
    all` says what each does.
    config: of `read_config`, instead of settings; or a YAML file of them, which settings override.
    train_rows, validation_rows, test_rows: instead of files, a pandas or polars DataFrame, a
    datasets.Dataset, a pyarrow.Table, a list of dicts, a dict of columns, or (texts, labels).
    on_log(step, values) is called for every training line of metrics.jsonl, and
    on_evaluation(values) for every evaluation, on rank 0. They get copies: nothing that they do
    changes a step; an exception ends the run.
    processes: one per GPU, or any number on the CPU, in processes of their own, so that a notebook
    may have used CUDA before.
    Raises BertdistError.
    """
    _check_processes(processes)
    if isinstance(config, str | Path):
        settings, config = {"config": str(config), **settings}, None
    elif not isinstance(config, TrainConfig | None):
        raise ConfigError(
            f"config is of type {type(config).__name__}; expected the path of a YAML file, or a "
            "TrainConfig of read_config."
        )
    with ExitStack() as stack:
        rows = {"train_rows": train_rows, "validation_rows": validation_rows}
        rows["test_rows"] = test_rows
        if any(given is not None for given in rows.values()):
            if config is not None:
                raise ConfigError("Give rows with settings, not with a config.")
            settings |= _write_rows(rows, stack.enter_context(_temporary_folder()), settings)
        if config is None:
            config = read_settings(settings)
        elif settings:
            raise ConfigError(
                f"Give a config or settings, not both: {', '.join(settings)}; "
                "dataclasses.replace changes a config."
            )
        if config.run.dry_run:
            raise ConfigError("dry_run is for the command: bertdist train --dry_run.")
        check_upload(config)
        if processes > 1:
            if on_log or on_evaluation:
                raise ConfigError("on_log and on_evaluation need processes=1.")
            _run_command("train", config_to_yaml(config), processes)
        else:
            stack.enter_context(_in_this_process())
            _train_here(config, Hooks(on_log, on_evaluation))
    return Run(config.run.output_dir)


@_with_keywords("evaluate")
def evaluate(
    model: str | Path, rows: Any = None, *, processes: int = 1, **settings: Any
) -> Evaluation:
    """Evaluate a trained classifier on labelled rows.

    model: the folder of a run, or any Hugging Face folder of a sequence classifier.
    rows: a table in memory, as in `train`; or a file as input="test.csv", or a data set of the hub.
    settings: the flags of `bertdist evaluate`, such as metrics=["accuracy", "f1_macro"],
    label_column="stars" or max_length=256. Columns are those of the training, unless they are
    named. Nothing is written without output_dir.
    processes: see `train`.
    Raises BertdistError.
    """
    _check_processes(processes)
    settings = {**settings, "model": model_folder(model)}
    with ExitStack() as stack:
        if rows is not None:
            if settings.get("input") is not None:
                raise ConfigError("input and rows both name rows; give one.")
            settings["input"] = stack.enter_context(_temporary_folder()) / "rows"
        config = read_evaluate_settings(settings)
        if rows is not None:
            _write_labelled_rows(rows, config)
        folder = None if config.output_dir is None else Path(config.output_dir)
        if processes > 1:
            written = folder or stack.enter_context(_temporary_folder())
            text = config_to_yaml(replace(config, output_dir=str(written)))
            hidden = "" if folder else str(written)
            if _run_command("evaluate", text, processes, hidden) == EXIT_STOPPED:
                raise _stopped()
            return _read_evaluation(written, folder)
        stack.enter_context(_in_this_process())
        from bertdist.eval import evaluate as evaluate_from_config
        from bertdist.predict import Stopped

        try:
            results = evaluate_from_config(config)
        except Stopped:
            raise _stopped() from None
        if folder is not None:
            if config.report:
                write_report(folder)
            return _read_evaluation(folder, folder)
        found: list[Any] = [None]  # rank 0 has the results
        if results is not None:
            (report,) = _plain([results.report])
            found = [Evaluation(report, _plain(results.predictions), _plain(results.errors))]
        evaluation: Evaluation = broadcast_object_list(found)[0]
        return evaluation


def _plain(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The values that a file of these lines has."""
    return [json.loads(to_json(line)) for line in lines]


def _read_evaluation(written: Path, folder: Path | None) -> Evaluation:
    """Of the files that an evaluation wrote."""
    report, predictions, errors = (written / name for name in RESULT_FILES[:3])
    return Evaluation(
        read_json_object(report), _read_lines(predictions), _read_lines(errors), folder
    )


def _read_lines(file: Path) -> list[dict[str, Any]]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write_labelled_rows(rows: Any, config: EvaluateConfig) -> None:
    """To the file of config.input. Raises BertdistError."""
    model_config = load_model_config(ModelConfig(model_name_or_path=config.model), "--model")
    task = trained_task(model_config, f"--model {config.model}")
    data = data_of_model(config, saved_metadata(model_config))
    table, _ = as_table(rows, "rows", data, keep_codes=task.problem_type == REGRESSION)
    pq.write_table(table, str(config.input))


def _stopped() -> BertdistError:
    return BertdistError("Stopped on request: nothing was written; call it again.")


def _check_processes(processes: int) -> None:
    if type(processes) is not int or processes < 1:
        raise ConfigError(f"processes is {processes!r}; expected a whole number of at least 1.")


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bertdist-") as folder:
        yield Path(folder)


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Whatever the run sets is as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(_only_run())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_own_accelerate_state())
        stack.enter_context(quiet_transformers())
        yield


def _train_here(config: TrainConfig, hooks: Hooks) -> None:
    """In this process: a run, or one per fold or seed."""

    def train_run(config: TrainConfig) -> bool:
        return train_from_config(config, hooks).finished

    train_all(config, train_run)


@contextmanager
def _only_run() -> Iterator[None]:
    """One at a time: torch has one random state, and accelerate one device, per process."""
    if not _running.acquire(blocking=False):
        raise ConfigError("Another thread of this process trains or evaluates: one at a time.")
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


def _run_command(name: str, config: str, processes: int, hidden: str = "") -> int:
    """`bertdist train --processes N`, its lines printed here; returns the exit code.

    config: as YAML. hidden: a folder that no line that is printed names. Raises BertdistError.
    """
    with _temporary_folder() as folder:
        file = folder / "run.yaml"
        file.write_text(config, encoding="utf-8")
        command = [sys.executable, "-m", "bertdist", name, "--config", str(file)]
        command += ["--processes", str(processes)]
        errors: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        ) as process:
            assert process.stdout is not None
            while True:
                try:
                    for line in process.stdout:
                        if not hidden or hidden not in line:
                            print(line, end="", flush=True)
                        errors += [line[10:].strip()] * line.startswith("bertdist: ")
                    break
                except KeyboardInterrupt:  # the processes got it too: they save and end
                    continue
    if process.returncode not in (0, EXIT_STOPPED):
        code = process.returncode
        raise BertdistError("\n".join(errors) or f"bertdist {name}: failed with exit code {code}.")
    return process.returncode


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
            found[name] = str(folder / keyword)  # messages have this name
    config = read_settings({**settings, **found})  # with those of a config file
    regression = config.task.problem_type == "regression"
    for keyword, given in rows.items():
        if given is None:
            continue
        table, label_names = as_table(given, keyword, config.data, keep_codes=regression)
        pq.write_table(table, folder / keyword)
        if label_names and config.task.label_names is None and keyword == "train_rows":
            found["label_names"] = label_names
    return found


# ---- In a notebook


def _shown_scores(scores: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in scores.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "undefined"


def _html_scores(
    title: str,
    scores: Mapping[str, Any],
    intervals: Mapping[str, Any] | None,
    notes: Iterable[str] = (),
) -> str:
    """A small table of scores with their intervals, and notes below it."""
    header = "<th>score</th><th>value</th>" + "<th>95% interval</th>" * bool(intervals)
    lines = []
    for name, value in scores.items():
        cells = [name, _number(value)]
        if intervals:
            ends = intervals.get(name)
            cells.append(" to ".join(map(_number, ends)) if ends else "")
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
    below = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return f"<div>{html.escape(title)}</div>{table * bool(scores)}{below}"
