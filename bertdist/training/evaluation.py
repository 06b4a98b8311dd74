"""Evaluation and prediction, exact on any number of ranks.

    evaluator = Evaluator(loader, task, config, accelerator)
    evaluation = evaluator.evaluate(model)           # scores, and predictions on rank 0

`RunEvaluator` does the same while a run trains, and logs the scores and keeps the best weights.

1. The rows are distributed over the ranks as in training, in row order; each rank computes its
   share.
2. (row, logits) of all ranks are gathered once; that each row came exactly once is asserted every
   time.
3. Rank 0 computes loss and scores from logits in row order, so they depend on neither ranks nor
   batches, and broadcasts them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bertdist.core.atomic_io import explain_write_errors, read_json_object
from bertdist.core.config import TaskConfig, TrainConfig
from bertdist.core.errors import BertdistError, ConfigError, did_you_mean, listed
from bertdist.core.output_files import RESULT_FILES
from bertdist.core.types import Array
from bertdist.data.batch import PackedBatch
from bertdist.data.loader import MapLoader
from bertdist.data.probabilities import Probabilities, has_other_slices
from bertdist.data.records import Records
from bertdist.data.source import LocateRow
from bertdist.data.tokenization import TokenizedDataset
from bertdist.distributed.collectives import (
    all_reduce_sum,
    broadcast_from_rank0,
    host_group,
    raise_on_all_ranks,
)
from bertdist.distributed.preemption import StopSignal
from bertdist.models.classifier import Classifier, load_trained_classifier
from bertdist.models.head import divide_output
from bertdist.tasks.calibration import measure_again
from bertdist.tasks.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from bertdist.tasks.metric_names import LOWER_IS_BETTER
from bertdist.tasks.tasks import Task, Threshold, check_answer, mean_loss, with_thresholds
from bertdist.training.best_model import (
    BestModel,
    Results,
    improvement,
    improves_loss,
    write_results,
)
from bertdist.training.calibration import (
    describe_fits,
    due_fits,
    fit_run_temperature,
    stays_fitted,
    wanted_fits,
)
from bertdist.training.checkpoint import Checkpointer, TrainState
from bertdist.training.micro_batches import compute_in_micro_batches
from bertdist.training.nonfinite import nonfinite_error
from bertdist.training.run_logger import RunLogger

GLUE_METRICS = {
    "cola": ["matthews_correlation"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
}

SHOWN_ROWS = 3
PROBED_OUTPUTS = 64  # a metric of a user's may name a score after each label


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of one split."""

    scores: dict[str, float]  # loss first
    # The score that selects the best weights, negated where lower is better; may be NaN.
    selection_score: float
    selected: str = ""  # its name; on rank 0 only
    # Rows for which the model gave NaN or Inf; with any, all scores are NaN. On every rank.
    nonfinite_rows: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()  # on undefined scores, each once. On rank 0 only, as what follows
    # One record per row, made as they are read, once: a row may have many labels.
    predictions: Iterable[dict[str, Any]] = ()
    classes: dict[str, Any] = field(default_factory=dict)  # scores per label, confusion matrix
    intervals: Callable[[], dict[str, Any]] = dict  # of the scores, computed when it is called
    # The rows of these records that are predicted wrong, as in errors.jsonl.
    errors: Callable[[Records], Iterable[dict[str, Any]]] = lambda records: ()
    task: Task | None = None
    logits: Tensor | None = None  # (rows, outputs)

    def results(self, rows: TokenizedDataset, /, **first: Any) -> Results:
        """What is written of it, on rank 0. first: the first entries of evaluation.json."""
        records, table = rows.records, None
        report = {**first, "scores": self.scores, "intervals": self.intervals(), **self.classes}
        predictions = self.predictions
        if not records.is_one_file:
            predictions = (
                {"row": line["row"], **location_fields(records, line["row"]), **line}
                for line in predictions
            )
        if self.task is not None and self.logits is not None:
            table = Probabilities(rows, self.task, self.logits)
        return Results(report, predictions, self.errors(records), table)


class Evaluator:
    """Evaluates a split, for a training loop of your own.

    Every rank makes one and calls `evaluate`; every row is scored exactly once.
    """

    def __init__(
        self, loader: MapLoader | None, task: Task, config: TrainConfig, accelerator: Accelerator
    ) -> None:
        """loader: of `create_eval_loader`. task: of `create_task`. config: --metrics,
        --metric_for_best_model and the like are read.

        A collective: raises ConfigError on all ranks for metrics that are unknown or do not fit the
        task.
        """
        self.loader, self.accelerator = loader, accelerator
        with raise_on_all_ranks(accelerator):
            self.scorer = create_scorer(config, task, accelerator)

    def evaluate(self, model: nn.Module, stop: StopSignal | None = None) -> Evaluation | None:
        """The scores of the split. A collective: every rank calls it.

        model: what `accelerator.prepare` gave; logits are (N, O) for a micro-batch of N texts.
        stop: a request to end, such as a signal.

        Returns an `Evaluation`: `scores` on all ranks, `predictions` and the rest on rank 0 only;
        None on all ranks if a stop was requested meanwhile. Raises AssertionError without a loader,
        DataError for a row that cannot be encoded, ConfigError if a custom metric fails.
        """
        assert self.loader is not None, "there is no split to evaluate"
        return evaluate_split(model, self.loader, self.scorer, self.accelerator, stop)


class RunEvaluator:
    """Evaluates while a run trains: logs the scores, and keeps the best weights."""

    def __init__(
        self,
        loader: MapLoader | None,
        task: Task,
        config: TrainConfig,
        accelerator: Accelerator,
        best_model: BestModel,
        log: RunLogger,
        test_loader: MapLoader | None = None,
    ) -> None:
        """loader: None if there is no validation split. test_loader: of the rows of --test_file.

        Raises ConfigError on rank 0 for metrics that are unknown or do not fit the task.
        """
        self.loader, self.accelerator, self.on_nan = loader, accelerator, config.run.on_nan
        self.best_model, self.log, self.test_loader = best_model, log, test_loader
        self.wanted = wanted_fits(config.task, has_rows=loader is not None)
        self.scorer: Scorer | None = None
        if loader is not None or test_loader is not None:
            self.scorer = create_scorer(config, task, accelerator)
        if self.scorer is not None and self.scorer.positive_note:
            log.note(self.scorer.positive_note)

    def evaluate_step(
        self, model: Classifier, state: TrainState, epoch: float, stop: StopSignal
    ) -> float:
        """After a training step: evaluate, log the scores, save the weights if they are the best.

        Returns the `improvement`: inf for the first, NaN if the score is not a number, or if a stop
        was requested meanwhile; `state.evaluation_pending` is cleared unless it was. As long as no
        score was a number, the lowest loss selects. Without a validation split the present weights
        count as the best. Raises NonFiniteError on all ranks for logits that are not finite, with
        --on_nan stop.
        """
        if self.loader is None:
            state.best_step = state.step
            state.best_weights = self.best_model.save(model, state.step)
            state.evaluation_pending = False
            return math.inf
        tokens = state.tokens_per_micro_batch
        self.loader = replace(self.loader, tokens_per_micro_batch=tokens)
        with self.log.screen.evaluating(len(self.loader.dataset)) as show:
            evaluation = evaluate_split(
                model, self.loader, self.scorer, self.accelerator, stop, show
            )
        if evaluation is None:
            return math.nan
        state.evaluation_pending = False
        if evaluation.nonfinite_rows:
            self._report_nonfinite(evaluation.nonfinite_rows, self.loader.dataset, state.step)
        gain = improvement(evaluation.selection_score, state.best_score)
        lacks_best = gain <= 0 and self.best_model.lacks(state)
        if lacks_best:
            gain = math.inf
        loss, undefined = evaluation.scores["loss"], math.isnan(gain)
        is_best = gain > 0 or (
            undefined and state.best_score is None and improves_loss(loss, state.best_loss)
        )
        selected = "loss" if undefined else evaluation.selected
        self.log.log_eval(state.step, epoch, evaluation.scores, selected, is_best)
        if lacks_best:
            self.log.say(
                f"The best weights so far, of step {state.best_step}, are not in best/: those of "
                f"step {state.step} count as the best."
            )
        self.log.say(*evaluation.notes)
        if is_best:
            state.best_score = None if undefined else evaluation.selection_score
            state.best_loss = loss if undefined and math.isfinite(loss) else None
            state.best_step = state.step
            state.best_evaluation_loss = loss if math.isfinite(loss) else None
            self.log.screen.saving()
            results = None
            if self.accelerator.is_main_process:
                results = evaluation.results(self.loader.dataset, step=state.step)
            state.best_weights = self.best_model.save(model, state.step, results)
        return gain

    def repair_best(
        self, model: Classifier, state: TrainState, checkpointer: Checkpointer
    ) -> dict[str, Any] | None:
        """Write again what is missing of best/ (`BestModel.repair`) and, where the run has
        finished, of evaluation.json, predictions.jsonl and errors.jsonl.

        Returns evaluation.json if the run has finished, on rank 0. A collective.
        """
        if self.wanted.temperature and not state.finished:
            with raise_on_all_ranks(self.accelerator):
                model.output_layer()  # before hours of training
        report = self.best_model.repair(model, state, checkpointer)
        if self.loader is None:
            return report
        others = [self.best_model.folder / name for name in RESULT_FILES[1:]]
        is_whole = report is not None and all(path.exists() for path in others)
        lacks = state.finished and not is_whole
        slices = state.finished and has_other_slices(others[-1], self.loader.dataset.records)
        if not broadcast_from_rank0(self.accelerator, lacks or slices):
            return report
        report = self._evaluate_best(self.loader, state)
        why = f"were not all in {self.best_model.folder}" if lacks else "had other slices"
        of = f"of the best weights (step {state.best_step})"
        self.log.say(f"{', '.join(RESULT_FILES)} {of} {why}: written again.")
        return report

    def write_final_reports(
        self, model: Classifier, state: TrainState, checkpointer: Checkpointer
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """At the end: repair best/ and its results, fit its temperature and thresholds, evaluate
        the rows of --test_file with it.

        Returns evaluation.json and test_evaluation.json, on rank 0 if there are any. A collective.
        """
        report = self.repair_best(model, state, checkpointer)
        if state.finished and self.loader is not None:
            report = self._fit_best(self.loader, state) or report
        return report, self.evaluate_test(state)

    def _fit_best(self, loader: MapLoader, state: TrainState) -> dict[str, Any] | None:
        """Fit what --calibrate and --tune_thresholds ask for and best/ has not, write it into best/
        and evaluate again; returns evaluation.json on rank 0, None if there was nothing to fit.

        best/ is replaced as a whole, after both fits: a run that is killed before has it as it was,
        and fits again. Checkpoints keep the weights that are trained.
        """
        is_main = self.accelerator.is_main_process
        saved = self.best_model.calibration() if is_main else {}
        saved = broadcast_from_rank0(self.accelerator, saved)
        fits = due_fits(self.wanted, saved)
        if stays := stays_fitted(self.wanted, saved):
            self.log.say(stays)
        if not any(fits):
            return None
        classifier, loader = self._load_best(loader, state)
        with raise_on_all_ranks(self.accelerator):
            layer = classifier.output_layer() if fits.temperature else None
        references, records = loader.dataset.targets, loader.dataset.records
        before = after = self._predict(classifier, loader)
        if nonfinite_rows(before):
            self.log.say("Nothing is fitted: the model gives NaN or Inf for validation rows.")
            return None
        temperature = (1.0, "")
        if layer is not None:
            temperature = fit_run_temperature(before, references, self.accelerator)
            if temperature[0] != 1:
                divide_output(layer, temperature[0])
                after = self._predict(classifier, loader)
        with raise_on_all_ranks(self.accelerator):
            if self.scorer is not None:
                fitted = describe_fits(
                    fits,
                    saved,
                    self.scorer.task,
                    before,
                    after,
                    temperature,
                    references,
                    records,
                    self.scorer.positive,
                )
                self.best_model.save_fitted(classifier, state.best_step, fitted)
        return self._write_evaluation(after, loader, state)

    def evaluate_test(self, state: TrainState) -> dict[str, Any] | None:
        """At the end of the run, evaluate the rows of --test_file with the best weights.

        Nothing is computed where test_evaluation.json is of the same weights, rows and metrics.
        Returns its contents on rank 0.
        """
        loader = self.test_loader
        if not state.finished:
            return None
        if loader is None:
            with raise_on_all_ranks(self.accelerator):
                if self.accelerator.is_main_process:
                    self._remove_other_test_results(state)
            return None
        records = loader.dataset.records
        of: dict[str, Any] = {
            "step": state.best_step,
            "rows": f"{len(records)} rows of {records.name}, {records.fingerprint}",
            "metrics": [*self.scorer.names, self.scorer.positive_label] if self.scorer else [],
        }
        if state.best_weights:
            of["weights"] = state.best_weights
        if fitted := self._fitted():
            of["fitted"] = fitted
        files = [self.best_model.folder / f"test_{name}" for name in RESULT_FILES]
        report = read_json_object(files[0])
        lacks = {name: report.get(name) for name in of} != of
        lacks = lacks or not all(path.exists() for path in files)
        lacks = lacks or has_other_slices(files[-1], records)
        if not broadcast_from_rank0(self.accelerator, lacks):
            return report
        return self._evaluate_best(loader, state, "test_", **of)

    def _fitted(self) -> dict[str, Any]:
        """What of the fits of best/ its answers depend on."""
        fitted = self.best_model.calibration()
        return {name: fitted.get(name) for name in ("temperature", "thresholds")} if fitted else {}

    def _remove_other_test_results(self, state: TrainState) -> None:
        """Without --test_file: remove the results of an earlier one that are not of best/ as it is
        now, which the report and the model card would show as its scores.
        """
        files = [self.best_model.folder / f"test_{name}" for name in RESULT_FILES]
        report = read_json_object(files[0])
        is_same = report.get("weights", "") in ("", state.best_weights)
        if not report or (
            is_same
            and report.get("step") == state.best_step
            and report.get("fitted", {}) == self._fitted()
        ):
            return
        found = [path for path in files if path.exists()]
        for path in found:
            with explain_write_errors(path, "remove"):
                path.unlink()
        self.log.say(
            f"Removed {listed([path.name for path in found])}: of the model before. --test_file "
            "evaluates it again."
        )

    def _evaluate_best(
        self, loader: MapLoader, state: TrainState, prefix: str = "", **first: Any
    ) -> dict[str, Any] | None:
        """Evaluate the weights of best/ and write the results; returns the report on rank 0."""
        classifier, loader = self._load_best(loader, state)
        return self._write_evaluation(
            self._predict(classifier, loader), loader, state, prefix, **first
        )

    def _load_best(self, loader: MapLoader, state: TrainState) -> tuple[Classifier, MapLoader]:
        """The weights of best/, on the device, and the loader with micro-batches of the run."""
        with raise_on_all_ranks(self.accelerator):
            classifier, _, _ = load_trained_classifier(str(self.best_model.folder / "best"))
        tokens = state.tokens_per_micro_batch or loader.tokens_per_micro_batch
        return classifier.to(self.accelerator.device), replace(
            loader, tokens_per_micro_batch=tokens
        )

    def _predict(self, classifier: Classifier, loader: MapLoader) -> Tensor:
        with self.accelerator.autocast():
            logits = predict_rows(classifier, loader, self.accelerator)
        assert logits is not None, "nothing could stop it"
        return logits

    def _write_evaluation(
        self, logits: Tensor, loader: MapLoader, state: TrainState, prefix: str = "", **first: Any
    ) -> dict[str, Any] | None:
        """Score logits of best/ with its thresholds, and write the results; returns the report on
        rank 0.
        """
        folder, fitted = self.best_model.folder, dict[str, Any]()
        if self.scorer is not None:
            fitted = self.best_model.calibration()
            self.scorer.use_thresholds(fitted.get("thresholds"))
        evaluation = score_rows(logits, loader, self.scorer, self.accelerator)
        if evaluation.nonfinite_rows:
            self._report_nonfinite(evaluation.nonfinite_rows, loader.dataset, state.best_step)
        report = None
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                results = evaluation.results(loader.dataset, **{"step": state.best_step, **first})
                if fitted and self.scorer is not None:
                    references = loader.dataset.targets
                    results.report["calibration"] = (
                        self.scorer.measure_fit(fitted, logits, references) if prefix else fitted
                    )
                write_results(folder, results, prefix)
                report = results.report
        self.log.say(*evaluation.notes)
        return report

    def _report_nonfinite(
        self, rows: tuple[int, ...], examples: TokenizedDataset, step: int
    ) -> None:
        report = describe_nonfinite_rows(rows, len(examples), examples.records.location)
        message = f"Evaluation after step {step}: {report}"
        if self.on_nan == "stop":
            raise nonfinite_error(f"{message} To continue without its scores: --on_nan skip.")
        self.log.say(f"{message} Its scores count as undefined (--on_nan skip).")


def create_scorer(config: TrainConfig, task: Task, accelerator: Accelerator) -> "Scorer | None":
    """The scorer of a run, on rank 0. Raises ConfigError there, as `Scorer`."""
    if not accelerator.is_main_process:
        return None
    return Scorer(config.task, task, config.data.task_name)


class Scorer:
    """Metrics, and the one that selects the best weights.

    Made on rank 0 only: importing `evaluate` is slow.
    """

    def __init__(self, config: TaskConfig, task: Task, glue_task: str | None) -> None:
        """Raises ConfigError for metrics that are unknown or do not fit the task."""
        from bertdist.tasks import constant_answers, metrics

        self.task, self._noted = task, set[str]()
        self._describe_constant = constant_answers.describe_constant_answers
        names = (
            config.metrics
            or GLUE_METRICS.get(glue_task or "")
            or metrics.default_metrics(task.problem_type)
        )
        self._metrics = metrics.load_metrics(
            names, task.problem_type, task.labels, config.positive_label, config.tune_thresholds
        )
        self.names, self.positive_note = self._metrics.names, self._metrics.positive_note
        self.positive_label, self.positive = config.positive_label, self._metrics.positive
        self._report, self._undefined = metrics.classification_report, metrics.UNDEFINED
        self.selection_metric = config.metric_for_best_model or self._metrics.names[0]
        self._named = config.metric_for_best_model is not None
        computed = ["loss", *self._metrics.names]
        if self._named and self.selection_metric not in computed:
            own = [name for name in names if "/" in name or ":" in name or name.endswith(".py")]
            if (scores := self._own_scores() if own else []) is not None:
                self._check_selection([*(name for name in computed if name not in own), *scores])

    def use_thresholds(self, thresholds: Threshold) -> None:
        """Answer with these thresholds, where there are any. Raises ConfigError for others than the
        task can have.
        """
        if thresholds not in (None, {}):
            check_answer(self.task, None, thresholds)
            self.task = with_thresholds(self.task, thresholds)

    def measure_fit(
        self, fitted: dict[str, Any], logits: Tensor, references: Array
    ) -> dict[str, Any]:
        """`calibration` of an evaluation.json of other rows than those of the fit."""
        return measure_again(fitted, self.task, logits, references, self.positive)

    def _own_scores(self) -> list[str] | None:
        """The names of all scores, by computing those of one row per label, all of them right.

        None if this does not show them: the first evaluation does.
        """
        outputs = len(self.task.labels)
        if outputs > PROBED_OUTPUTS:
            return None
        references: Array = np.eye(max(outputs, 2), outputs, dtype=np.float32)
        probabilities = references
        if self.task.problem_type == SINGLE_LABEL:
            references = np.arange(outputs)
        elif self.task.problem_type == REGRESSION:
            references = references[:, 0]
        try:
            return list(self._metrics.compute(references, probabilities, references))
        except ConfigError:  # it needs more than that
            return None

    def _check_selection(self, computed: Iterable[str]) -> None:
        if self._named and self.selection_metric not in computed:
            hint = did_you_mean(self.selection_metric, computed)
            raise ConfigError(
                f"--metric_for_best_model {self.selection_metric}: "
                f"not among the scores that are computed.{hint}"
            )

    def score(self, logits: Tensor, references: Array) -> Evaluation:
        """logits: (rows, outputs). references: (rows, ...) targets as the task has them."""
        task = self.task
        predictions, probabilities = task.predict(logits)
        loss = mean_loss(task, logits, references)
        computed = self._metrics.compute(predictions, probabilities, references)
        scores = {"loss": loss, **computed}
        if nonfinite_rows(logits):
            # The largest of NaNs is some label, and might be right.
            scores = dict.fromkeys(scores, math.nan)
        first = next((key for key in scores if key != "loss"), "loss")
        selected = self._metrics.main_scores.get(self.selection_metric, self.selection_metric)
        if selected not in scores:
            self._check_selection(scores)
            selected = first
        sign = -1 if selected in LOWER_IS_BETTER else 1
        classes = {}
        if task.problem_type != REGRESSION:
            classes = self._report(predictions, references, task.labels)
        if task.problem_type == MULTI_LABEL and not predictions.any() and references.any():
            classes["suggested_threshold"] = suggested_threshold(probabilities, references)
        elif note := self._describe_constant(
            task.problem_type, predictions, references, task.labels, scores
        ):
            classes["note"] = note
        truths = map(task.decode_target, references)
        records = zip(task.to_records(logits), truths, strict=True)
        return Evaluation(
            scores=scores,
            selection_score=sign * scores[selected],
            selected=selected,
            notes=self._notes(scores, selected) if math.isfinite(loss) else (),
            predictions=(
                {"row": row, **record, "truth": truth}
                for row, (record, truth) in enumerate(records)
            ),
            classes=classes,
            intervals=partial(self._intervals, scores, logits, references),
            errors=partial(error_records, task, logits, references),
            task=task,
            logits=logits,
        )

    def _intervals(
        self, scores: dict[str, float], logits: Tensor, references: Array
    ) -> dict[str, Any]:
        """The interval of each built-in score; None for one that is undefined."""
        from bertdist.tasks.confidence_intervals import Arrays, bootstrap_intervals

        arrays = Arrays(*self.task.predict(logits), references)
        targets = torch.from_numpy(references)
        losses = self.task.eval_loss(logits.double(), targets, "none").numpy()
        names = ["loss", *(name for name in scores if name in self._metrics.names)]
        return bootstrap_intervals(names, arrays, losses, self._metrics.positive)

    def _notes(self, scores: dict[str, float], selected: str) -> tuple[str, ...]:
        """Sentences about scores that are not numbers, the first time that they are none."""
        found = self._metrics.not_numbers
        notes = {name: f"{name} is {found[name]}; expected a number." for name in found}
        if not math.isfinite(scores[selected]):
            reason = self._undefined.get(selected) or found.get(selected, str(scores[selected]))
            notes[selected] = (
                f"{selected} is undefined ({reason}): such an evaluation neither selects the best "
                "weights nor counts for --early_stopping_patience. As long as it was never a "
                "number, the lowest loss selects."
            )
        new = notes.keys() - self._noted
        self._noted |= new
        return tuple(note for name, note in notes.items() if name in new)


def suggested_threshold(probabilities: Array, references: Array) -> float:
    """The threshold at which the answers have as many labels as the truth, all rows together.

    probabilities, references: (rows, labels), the latter 0/1.
    """
    number, flat = int(references.sum()), np.sort(probabilities, axis=None)[::-1]
    last, following = flat[number - 1], flat[number] if number < flat.size else 0.0
    return float((last + following) / 2)


def error_records(
    task: Task, logits: Tensor, references: Array, records: Records
) -> Iterator[dict[str, Any]]:
    """Lines of errors.jsonl: the rows that are predicted wrong, the most confident errors first."""
    sizes = task.error_sizes(logits, references)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]  # neither right nor NaN
    for row, answer in zip(order, task.to_records(logits[order]), strict=True):
        record = records[int(row)]
        yield {
            "row": int(row),
            **location_fields(records, int(row)),
            **answer,
            "truth": task.decode_target(references[row]),
            "error": float(sizes[row]),
            "text": record.text,
            **({} if record.pair is None else {"text_pair": record.pair}),
        }


def location_fields(records: Records, row: int) -> dict[str, Any]:
    """A row's file and line, or its number in a file without lines, from 0."""
    file, line, file_row = records.location(row)
    return {"file": file, "file_row": file_row} if line is None else {"file": file, "line": line}


class EvaluationStopped(Exception):
    """A stop was requested on a rank, or a rank has failed, before all rows were computed; raised
    on all ranks.
    """


@torch.no_grad()
def predict_rows(
    model: nn.Module,
    loader: MapLoader,
    accelerator: Accelerator,
    stop: StopSignal | None = None,
    show: Callable[[int], None] = lambda rows: None,
) -> Tensor | None:
    """Logits (rows, outputs) float32 on the CPU, in row order, the same on every rank.

    show: called now and then with the number of rows done.

    None on all ranks if a stop was requested meanwhile: that rank skips the rest of a step, and the
    ranks agree after each. Raises DataError on all ranks if one of them cannot read or encode a
    row, or if a single text does not fit into memory.
    """
    was_training = model.training
    model.eval()
    rows, logits, group = [], [], host_group(accelerator)

    def stop_here() -> bool:
        return stop is not None and stop.requested_locally()

    def agree(failed: bool) -> None:
        if any(all_reduce_sum(accelerator, [int(stop_here()), int(failed)], group)):
            raise EvaluationStopped

    def share() -> Iterator[PackedBatch]:
        for step in loader.steps(0, loader.steps_per_epoch):
            for batch in step.micro_batches:
                if batch.row_numbers[0] >= 0 and not stop_here():  # -1: an idle rank's text
                    yield batch
            agree(False)
            show((step.number + 1) * loader.rows_per_step)

    def compute(batch: PackedBatch) -> Tensor:
        output: Tensor = model(batch.to(accelerator.device)).float()
        return output

    stopped = False
    with raise_on_all_ranks(accelerator):
        try:
            for batch, output in compute_in_micro_batches(compute, share(), loader):
                rows.append(batch.row_numbers)
                logits.append(output)
        except EvaluationStopped:
            stopped = True
        except BertdistError:
            with suppress(EvaluationStopped):
                agree(True)
            raise
    model.train(was_training)
    return None if stopped else _in_row_order(rows, logits, len(loader.dataset), accelerator)


def _in_row_order(
    rows: list[Tensor], logits: list[Tensor], total: int, accelerator: Accelerator
) -> Tensor:
    """Gather the rows of all ranks; asserts that each of the `total` rows came exactly once."""
    device = accelerator.device
    width = logits[0].shape[1] if logits else 0
    if accelerator.num_processes > 1:  # a rank may have had no row
        width = int(accelerator.gather(torch.tensor([width], device=device)).max().item())
    mine = torch.cat([torch.zeros(0, dtype=torch.int64), *rows]).to(device)
    values = torch.cat([torch.zeros(0, width, device=device), *logits])
    if accelerator.num_processes > 1:
        padded = accelerator.pad_across_processes(mine, dim=0, pad_index=-1)
        missing = len(padded) - len(mine)
        values = accelerator.gather(torch.cat([values, values.new_zeros(missing, width)]))
        mine = accelerator.gather(padded)
        values, mine = values[mine >= 0], mine[mine >= 0]
    mine, values = mine.cpu(), values.cpu()
    assert_each_row_once(mine, total)
    ordered = torch.empty_like(values)
    ordered[mine] = values
    return ordered


def assert_each_row_once(rows: Tensor, total: int) -> None:
    """Checked in every evaluation and prediction."""
    times = torch.bincount(rows, minlength=total)
    missing, repeated = int((times == 0).sum()), int((times > 1).sum())
    assert len(times) == total and bool((times == 1).all()), (
        f"each of {total} rows must be evaluated once; {missing} are missing, {repeated} repeated"
    )


def evaluate_split(
    model: nn.Module,
    loader: MapLoader,
    scorer: Scorer | None,
    accelerator: Accelerator,
    stop: StopSignal | None = None,
    show: Callable[[int], None] = lambda rows: None,
) -> Evaluation | None:
    """The scores of a split; None if a stop was requested meanwhile.

    scorer: on rank 0, None elsewhere. show: see `predict_rows`. Raises ConfigError on all ranks
    where a user's metric fails.
    """
    logits = predict_rows(model, loader, accelerator, stop, show)
    return None if logits is None else score_rows(logits, loader, scorer, accelerator)


def score_rows(
    logits: Tensor, loader: MapLoader, scorer: Scorer | None, accelerator: Accelerator
) -> Evaluation:
    """The scores of logits of `predict_rows`, the same on every rank. scorer, errors: see
    `evaluate_split`.
    """
    with raise_on_all_ranks(accelerator):  # a metric of a user's may fail
        mine = scorer.score(logits, loader.dataset.targets) if scorer is not None else None
    shared = (mine.scores, mine.selection_score) if mine is not None else None
    scores, selection_score = broadcast_from_rank0(accelerator, shared)
    evaluation = mine or Evaluation(scores=scores, selection_score=selection_score)
    return replace(evaluation, nonfinite_rows=nonfinite_rows(logits))


def nonfinite_rows(logits: Tensor) -> tuple[int, ...]:
    """Rows of logits (rows, outputs) that hold NaN or Inf."""
    return tuple(torch.nonzero(~torch.isfinite(logits).all(-1))[:, 0].tolist())


def describe_nonfinite_rows(rows: tuple[int, ...], total: int, where: LocateRow) -> str:
    """A message: for which rows logits are not finite, and why that may be. where: row -> its file
    and line.
    """
    more = ", and more" if len(rows) > SHOWN_ROWS else ""
    first = ", ".join(str(where(row)) for row in rows[:SHOWN_ROWS]) + more
    why = "Its weights are broken, or the precision is too small for it (--mixed_precision no)."
    return f"the model gives NaN or Inf for {len(rows):,} of {total:,} rows: {first}. {why}"
