"""The best weights of a run, and what they answered: best/, evaluation.json, predictions.jsonl. Early stopping is decided here.

In: an Evaluation. Out: files, and the three numbers of Progress that remember the best; all are functions of the step, so a run
that goes on from an earlier checkpoint writes the same files again.
"""

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from bertdist.core.atomic_io import atomic_write, recover, to_json, write_folder
from bertdist.core.config import RunConfig
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.models.classifier import Classifier, save_classifier
from bertdist.tasks.tasks import Task
from bertdist.training.checkpoint import TrainState
from bertdist.training.evaluation import Evaluation
from bertdist.training.run_logger import RunLogger

SHOWN_LABELS = 24  # more labels than a screen has lines are in evaluation.json only


class BestModel:
    """Where the best weights of a run go. notes: what `Predictor` wants to know of the training (max_length, columns)."""

    def __init__(
        self,
        run: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        accelerator: Accelerator,
        notes: dict[str, Any],
    ) -> None:
        self.run, self.tokenizer, self.task, self.accelerator, self.notes = (
            run,
            tokenizer,
            task,
            accelerator,
            notes,
        )
        self.folder = Path(run.output_dir)
        with raise_on_all_ranks(accelerator):
            if accelerator.is_main_process:
                recover(self.folder / "best")

    def consider(self, model: Classifier, evaluation: Evaluation, progress: TrainState) -> None:
        """Keep the weights if they are better than all before; decide whether the run has stopped getting better."""
        selection_score, best = evaluation.selection_score, progress.best_score
        gain = math.inf if best is None else selection_score - best
        if math.isnan(gain):  # an undefined score is worse than any other
            gain = -math.inf if math.isnan(selection_score) else math.inf
        progress.evaluations_since_best = (
            0 if gain > self.run.early_stopping_threshold else progress.evaluations_since_best + 1
        )
        if gain > 0:
            progress.best_score, progress.best_step = selection_score, progress.step
            self.keep(model, evaluation, progress)
        patience = self.run.early_stopping_patience
        progress.finished = progress.finished or (
            patience is not None and progress.evaluations_since_best >= patience
        )

    def keep(self, model: Classifier, evaluation: Evaluation | None, progress: TrainState) -> None:
        """Write these weights as the best; raises CheckpointError on all ranks where rank 0 cannot."""
        progress.best_step = progress.step
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                write_folder(
                    self.folder / "best",
                    lambda folder: save_classifier(model, self.tokenizer, folder, self.notes),
                )
                if evaluation is not None:
                    scored = {
                        "step": progress.step,
                        "scores": evaluation.scores,
                        **evaluation.classes,
                    }
                    atomic_write(self.folder / "evaluation.json", to_json(scored, indent=1))
                    atomic_write(
                        self.folder / "predictions.jsonl", b"".join(self._lines(evaluation))
                    )

    def show(self, log: RunLogger) -> None:
        """At the end of a run: the best evaluation, label by label, and what is taken for what."""
        path = self.folder / "evaluation.json"
        if not self.accelerator.is_main_process or not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        classes, labels = found.get("per_class", []), found.get("labels", [])
        if 0 < len(classes) <= SHOWN_LABELS:
            log.table(
                f"By label, step {found['step']}",
                list(classes[0]),
                [list(entry.values()) for entry in classes],
            )
        if "confusion" in found and len(labels) <= SHOWN_LABELS // 2:
            rows = [
                [label, *counts] for label, counts in zip(labels, found["confusion"], strict=True)
            ]
            log.table("Rows of a label (down) by answer (across)", ["", *labels], rows)

    def _lines(self, evaluation: Evaluation) -> list[bytes]:
        assert evaluation.references is not None
        truths = [self.task.label(target) for target in evaluation.references]
        rows = zip(evaluation.answers, truths, strict=True)
        lines = [{"row": row, **answer, "truth": truth} for row, (answer, truth) in enumerate(rows)]
        return [to_json(line) for line in lines]
