"""The best weights of a run and their results (best/, evaluation.json, predictions.jsonl,
errors.jsonl, probabilities.parquet), and early stopping.

Both decide by `improvement`, a function of the scores alone, and remember what they need in
TrainState: a run that is resumed from an earlier checkpoint writes the same files again.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from bertdist.core.atomic_io import (
    MANIFEST,
    atomic_write,
    explain_write_errors,
    find_damage,
    move_aside,
    read_json_object,
    recover,
    refuse_link,
    to_json,
    weights_digest,
    write_folder,
)
from bertdist.core.config import RunConfig, TrainConfig, config_to_yaml
from bertdist.core.errors import CheckpointError, ConfigError
from bertdist.core.output_files import REPORT_FILE, RESULT_FILES, STATUS, is_own_report
from bertdist.data.probabilities import Probabilities
from bertdist.data.records import Records
from bertdist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from bertdist.models.classifier import Classifier, save_classifier
from bertdist.tasks.calibration import check_calibration
from bertdist.training.checkpoint import (
    Checkpointer,
    TrainState,
    load_tensors,
    model_tensors,
    read_tensors,
)

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream

# Results of a run that a new one in the same folder must not show as its own.
RESULTS = (*RESULT_FILES, *(f"test_{name}" for name in RESULT_FILES), "nan_rows.jsonl")


def _lacks_only_manifest(best: Path) -> bool:
    """Whether manifest.json was removed, as after a change on purpose, and the rest can be read."""
    if os.path.lexists(best / MANIFEST) or not read_json_object(best / "config.json"):
        return False
    weights = list(best.glob("*.safetensors"))
    try:
        for path in weights:
            with safe_open(path, "pt"):  # compares the header with the size of the file
                pass
    except (OSError, SafetensorError):
        return False
    return bool(weights)


def improvement(score: float, best: float | None) -> float:
    """How much better a selection score is than the best so far; inf for the first.

    NaN for a score that is not a finite number: it compares with no other.
    """
    if not math.isfinite(score):
        return math.nan
    return math.inf if best is None or not math.isfinite(best) else score - best


def improves_loss(loss: float, best: float | None) -> bool:
    """Whether weights without a score become the best of those without: by a lower loss.

    best: None as long as no loss was a finite number; then the last weights are the best.
    """
    return best is None or loss < best


class EarlyStopping:
    """`triggered` after --early_stopping_patience evaluations in a row that improve by at most the
    threshold.
    """

    def __init__(self, run: RunConfig, state: TrainState) -> None:
        self.run, self.state, self.triggered = run, state, False

    def update(self, gain: float) -> None:
        """gain: the `improvement` of an evaluation; NaN (its score is no number, or it was
        interrupted) does not count.
        """
        if not math.isnan(gain):
            improved = gain > self.run.early_stopping_threshold
            count = 0 if improved else self.state.evaluations_since_best + 1
            self.state.evaluations_since_best = count
            patience = self.run.early_stopping_patience
            self.triggered = patience is not None and count >= patience


class Results(NamedTuple):
    """What is written of an evaluation."""

    report: dict[str, Any]  # evaluation.json
    predictions: Iterable[dict[str, Any]]  # predictions.jsonl, one per row
    errors: Iterable[dict[str, Any]]  # errors.jsonl: rows that are predicted wrong, the worst first
    probabilities: Probabilities | None = None  # probabilities.parquet


def write_results(folder: Path, results: Results, prefix: str = "") -> None:
    """Write them into files of these names. Raises CheckpointError.

    prefix: test_ for the rows of --test_file. A report.html that is there is of other scores, and
    removed first.
    """
    if is_own_report(folder / REPORT_FILE):
        with explain_write_errors(folder / REPORT_FILE, "remove"):
            (folder / REPORT_FILE).unlink(missing_ok=True)
    names = [folder / f"{prefix}{name}" for name in RESULT_FILES]
    report, predictions, errors, probabilities = names
    atomic_write(predictions, map(to_json, results.predictions))
    atomic_write(errors, map(to_json, results.errors))
    if results.probabilities is not None:
        results.probabilities.write(probabilities)
    atomic_write(report, to_json(results.report, indent=1))


def _has_loss(report: dict[str, Any], expected: float | None) -> bool:
    """Whether an evaluation.json has scores, and this loss: up to the rounding of other devices.

    expected: None if it is not known.
    """
    scores = report.get("scores")
    if not isinstance(scores, dict):
        return False
    if not all(value is None or isinstance(value, int | float) for value in scores.values()):
        return False
    return expected is None or math.isclose(
        scores.get("loss") or 0.0, expected, rel_tol=1e-4, abs_tol=1e-4
    )


class BestModel:
    """Where the best weights of a run are saved, and whether they are there."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        rows: "Records | Stream",
        accelerator: Accelerator,
        say: Callable[..., None] = lambda *lines: None,
        codes: Sequence[str] = (),
    ) -> None:
        """rows: the training rows. say: takes lines of text. codes: of --label_names.

        Their column names and --max_length are saved too, for `Predictor`.
        """
        self.folder, self.tokenizer = Path(config.run.output_dir), tokenizer
        self.config = config
        self.accelerator, self.say = accelerator, say
        # Of the weights in best/; None if there are none, or none of this run. On every rank.
        self.step: int | None = None
        self._checked = False
        columns = rows.text_columns
        self.settings = {
            "max_length": config.model.max_length,
            "text_column": columns[0] if len(columns) == 1 else list(columns),
            "text_pair_column": rows.pair_column,
        }
        if codes:
            self.settings["label_codes"] = list(codes)
        if accelerator.is_main_process:
            recover(self.folder / "best")

    def save(
        self,
        model: Classifier,
        step: int,
        results: Results | None = None,
    ) -> str:
        """Write the weights after `step` as the best, with the results of their evaluation, if
        there was one. Returns their `weights_digest`.

        A collective; rank 0 writes. Raises CheckpointError on all ranks if it cannot.
        """
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                self._write(model, step)
                if results is not None:
                    write_results(self.folder, results)
        self.step = step
        return self._digest()

    def _digest(self) -> str:
        is_main = self.accelerator.is_main_process
        found = weights_digest(self.folder / "best") if is_main else ""
        return broadcast_from_rank0(self.accelerator, found)

    def calibration(self) -> dict[str, Any]:
        """What was fitted to the weights in best/ after training; {} if nothing was."""
        with suppress(ConfigError):  # changed by hand: loading it says so
            return check_calibration(self._metadata().get("calibration"))
        return {}

    def _metadata(self) -> dict[str, Any]:
        metadata = read_json_object(self.folder / "best" / "config.json").get("bertdist")
        return metadata if isinstance(metadata, dict) else {}

    def _trained_weights(self) -> str:
        """The `weights_digest` of best/ as it was trained, before --calibrate."""
        return self._metadata().get("trained_weights") or weights_digest(self.folder / "best")

    def save_fitted(self, model: Classifier, step: int, fitted: dict[str, Any]) -> None:
        """Replace best/ by the same weights with what was fitted, on rank 0; see `calibration`."""
        self._write(model, step, calibration=fitted, trained_weights=self._trained_weights())

    def _write(self, model: Classifier, step: int, **more: Any) -> None:
        settings = {**self.settings, "step": step, **more}
        kept = write_folder(
            self.folder / "best",
            lambda folder: save_classifier(model, self.tokenizer, folder, settings),
            sum(weight.nbytes for weight in model.state_dict().values()),
        )
        if kept is not None:
            self.say(f"{kept} keeps files that no run wrote.")

    def repair(
        self, model: Classifier, state: TrainState, checkpointer: Checkpointer
    ) -> dict[str, Any] | None:
        """Make best/ complete and of `state.best_step` where it is not. A collective.

        At the start of a run and at its end; in between nothing is done. Weights that are not there
        are written again from the checkpoint of their step; without one the next evaluation counts
        as the best so far, and CheckpointError is raised on all ranks if there will be none.

        Returns their evaluation (evaluation.json) at the end of the run, on rank 0 if there is one.
        """
        if self._checked and not state.finished:
            return None
        starts, self._checked = not self._checked, True
        is_main = self.accelerator.is_main_process
        with raise_on_all_ranks(self.accelerator):
            if starts and is_main:
                self._check_start(state, checkpointer)
                log = self.folder / "metrics.jsonl"
                if state.finished and not (log.exists() and log.stat().st_size):
                    what = "is empty" if log.exists() else f"is not in {self.folder}"
                    self.say(f"metrics.jsonl {what}; nothing can write it again.")
            step = self._read_step(state, checkpointer) if is_main else None
        self.step = step = broadcast_from_rank0(self.accelerator, step)
        # A later one than the checkpoint: its evaluation is about to be repeated.
        repeats = step is not None and step > state.step and not state.finished
        if state.best_step and step != state.best_step and not repeats:
            with raise_on_all_ranks(self.accelerator):
                written = is_main and self._write_again(model, state, checkpointer)
            if broadcast_from_rank0(self.accelerator, written):
                self.step, state.best_weights = state.best_step, self._digest()
            else:
                state.best_score = state.best_loss = state.best_evaluation_loss = None
                state.best_step = state.evaluations_since_best = 0
        return self._report(state) if is_main and state.finished else None

    def lacks(self, state: TrainState) -> bool:
        """Whether the best weights so far are not in best/, and are not about to be.

        A run that was killed after an evaluation leaves later weights there. It repeats that
        evaluation when it resumes, unless --eval_every has changed.
        """
        return self.step != state.best_step and (self.step is None or self.step <= state.step)

    def _check_start(self, state: TrainState, checkpointer: Checkpointer) -> None:
        """Say what becomes of an earlier run's files. Raises CheckpointError for best weights."""
        best, source = self.folder / "best", checkpointer.source
        if not state.finished:
            refuse_link(best)
        if source is None and os.path.lexists(best):
            status = read_json_object(self.folder / STATUS)
            is_finished = status.get("state") == "finished"
            if is_finished or status.get("step") != 0:
                kind = "a finished" if is_finished else "an earlier"
                raise CheckpointError(
                    f"{self.folder} holds the best weights of {kind} run and no checkpoint: "
                    "the run would start again and replace them. Use another --output_dir, or "
                    f"remove {best}."
                )
            # It ended before its first checkpoint: with the same settings the same weights follow.
            if not self._has_same_settings():
                kept = move_aside(best, "kept")
                self.say(f"Renamed {best} to {kept.name}: the run before had other settings.")
        if source is None and (self.folder / "metrics.jsonl").exists():
            self.say(f"No checkpoint in {checkpointer.folder}: training starts at the first step.")
        if source is None or not self._is_own(checkpointer):
            names = [name for name in RESULTS if (self.folder / name).exists()]
            if (self.folder / REPORT_FILE).exists() and is_own_report(self.folder / REPORT_FILE):
                names.append(REPORT_FILE)
            for name in names:
                with explain_write_errors(self.folder / name, "remove"):
                    (self.folder / name).unlink()
            if names:
                self.say(f"Removed {', '.join(names)} of an earlier run.")

    def _has_same_settings(self) -> bool:
        """Whether the last process in this folder had all settings of this one."""
        with suppress(OSError, UnicodeDecodeError):
            return (self.folder / "config.yaml").read_text() == config_to_yaml(self.config)
        return False

    def _is_own(self, checkpointer: Checkpointer) -> bool:
        """Whether the run resumed from a checkpoint of its own folder, or from none."""
        source, own = checkpointer.source, checkpointer.folder
        return source is None or source.resolve().parent == own.resolve()

    def _read_step(self, state: TrainState, checkpointer: Checkpointer) -> int | None:
        """The step of the weights in best/ if it is this run's; a damaged one is renamed."""
        best = self.folder / "best"
        if not os.path.lexists(best) or (self.step is None and not self._is_own(checkpointer)):
            return None
        if _lacks_only_manifest(best):
            self.say(f"{best} has no {MANIFEST}: taken as changed on purpose.")
        elif damage := find_damage(best, required=()):
            aside = move_aside(best, "damaged")
            self.say(f"{best} is damaged: {damage}. Renamed to {aside.name}.")
            if (aside / MANIFEST).exists():
                self.say(
                    f"If it was changed on purpose: remove {MANIFEST} there and rename it back."
                )
            return None
        step = self._metadata().get("step")
        if step is None:  # 0.1.0 did not write it
            step = read_json_object(self.folder / "evaluation.json").get("step", state.best_step)
        found = self._trained_weights()
        if step == state.best_step and found and state.best_weights not in ("", found):
            return None  # of another run
        return step if isinstance(step, int) else None

    def _write_again(
        self, model: Classifier, state: TrainState, checkpointer: Checkpointer
    ) -> bool:
        """Write best/ from the checkpoint of its step, on rank 0; False if there is none.

        Raises CheckpointError if there is none and the run has finished.
        """
        best, step = self.folder / "best", state.best_step
        present = step == state.step
        source = None if present else checkpointer.find(step)
        if not present and source is None:
            missing = f"The best weights, of step {step}, are not in {best}"
            if state.finished:
                raise CheckpointError(
                    f"{missing}, and there is no checkpoint of that step to write them again. "
                    "Copy them back, or train in another --output_dir."
                )
            self.say(f"{missing}: the next evaluation counts as the best so far.")
            return False
        if os.path.lexists(best):
            kept = move_aside(best, "kept").name
            self.say(f"Renamed {best} to {kept}: it is of another step or run.")
        if source is None:
            self._write(model, step)
        else:
            tensors = model_tensors(model)
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            load_tensors(tensors, read_tensors(source / "model.safetensors"), source)
            try:
                self._write(model, step)
            finally:
                load_tensors(tensors, before, source)
        self.say(f"{best} was not there: written again from the checkpoint of step {step}.")
        return True

    def _report(self, state: TrainState) -> dict[str, Any] | None:
        path = self.folder / "evaluation.json"
        report, fitted = read_json_object(path), self.calibration()
        loss = fitted["after"]["nll"] if fitted else state.best_evaluation_loss
        is_same = (report.get("calibration") or {}) == fitted
        if report.get("step") == state.best_step and is_same and _has_loss(report, loss):
            return report
        if path.exists():
            self.say(f"{path} is not of the best weights, step {state.best_step}: not shown.")
        return None
