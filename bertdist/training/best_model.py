"""The best weights of a run and their predictions (best/, evaluation.json, predictions.jsonl), and
early stopping.

Both decide by `improvement`, a function of the scores alone, and remember what they need in
TrainState: a run that is resumed from an earlier checkpoint writes the same files again.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from bertdist.core.atomic_io import atomic_write, recover, to_json, write_folder
from bertdist.core.config import RunConfig, TrainConfig
from bertdist.data.records import Records
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.models.classifier import Classifier, save_classifier
from bertdist.training.checkpoint import TrainState

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream


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

    def update(self, improvement: float | None) -> None:
        """improvement: of an evaluation. None if it was interrupted, and NaN if its score is no
        number: these do not count.
        """
        if improvement is not None and not math.isnan(improvement):
            improved = improvement > self.run.early_stopping_threshold
            count = 0 if improved else self.state.evaluations_since_best + 1
            self.state.evaluations_since_best = count
            patience = self.run.early_stopping_patience
            self.triggered = patience is not None and count >= patience


class BestModel:
    """Where the best weights of a run are saved."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        rows: "Records | Stream",
        accelerator: Accelerator,
    ) -> None:
        """rows: the training rows.

        Their column names and --max_length are saved too, for `Predictor`.
        """
        self.folder, self.tokenizer = Path(config.run.output_dir), tokenizer
        self.accelerator = accelerator
        columns = rows.text_columns
        self.settings = {
            "max_length": config.model.max_length,
            "text_column": columns[0] if len(columns) == 1 else list(columns),
            "text_pair_column": rows.pair_column,
        }
        if accelerator.is_main_process:
            recover(self.folder / "best")

    def save(
        self,
        model: Classifier,
        report: dict[str, Any] | None = None,
        predictions: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Write these weights as the best, with the scores and predictions of their evaluation, if
        there was one.

        A collective; rank 0 writes. Raises CheckpointError on all ranks if it cannot.
        """
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                write_folder(
                    self.folder / "best",
                    lambda folder: save_classifier(model, self.tokenizer, folder, self.settings),
                )
                if report is not None:
                    atomic_write(self.folder / "evaluation.json", to_json(report, indent=1))
                    atomic_write(self.folder / "predictions.jsonl", map(to_json, predictions))

    def report(self) -> dict[str, Any] | None:
        """The saved evaluation of the best weights (evaluation.json); None if there is none, and on
        other ranks.
        """
        path = self.folder / "evaluation.json"
        if not self.accelerator.is_main_process or not path.exists():
            return None
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report
