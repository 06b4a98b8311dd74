"""What a run says of itself while it goes on, and at its end: lines of metrics.jsonl, status.json, a few sentences.

In: how far it has come. Out: words and numbers; nothing here decides what the next step learns.
"""

import math

from bertdist.models.classifier import Classifier
from bertdist.training.best_model import BestModel
from bertdist.training.checkpoint import TrainState
from bertdist.training.evaluation import Evaluation
from bertdist.training.run_logger import RunLogger
from bertdist.training.throughput import ThroughputMeter


def record_training(log: RunLogger, progress: TrainState, per_epoch: int, **values: float) -> None:
    """One line about the steps since the last one: sums are divided, means are never averaged."""
    loss, rows = (sum(entry[i] for entry in progress.unlogged_steps) for i in (0, 1))
    mean = loss / rows if rows else math.nan  # every step was left out, see nonfinite.py
    log.record(
        "train",
        progress.step,
        epoch=progress.epochs(per_epoch),
        loss=mean,
        **values,
        tokens=progress.tokens,
    )
    progress.unlogged_steps.clear()


def keep_score(
    evaluation: Evaluation | None,
    classifier: Classifier,
    log: RunLogger,
    best: BestModel,
    progress: TrainState,
    per_epoch: int,
) -> None:
    """What an evaluation found; None: it was given up, to stop, and is owed."""
    if evaluation is None:
        progress.evaluation_pending, progress.finished = True, False
        return
    log.record("eval", progress.step, epoch=progress.epochs(per_epoch), **evaluation.scores)
    best.consider(classifier, evaluation, progress)


def tell_meter(
    log: RunLogger, progress: TrainState, meter: ThroughputMeter, stopping: bool
) -> None:
    """At its end, what this process did with its time: a line in metrics.jsonl, before the last checkpoint is whole, and two sentences."""
    if progress.finished or stopping:
        log.write("meter", progress.step, finished=progress.finished, **meter.summary())
        log.say(str(meter))


def tell_end(
    log: RunLogger, progress: TrainState, best: BestModel, total_steps: int, reason: str
) -> None:
    """What a run says last. reason: why it was asked to stop, where it has not finished."""
    log.close_progress()
    if progress.finished:
        log.status("finished", progress.step)
        best.show(log)
        log.say(
            f"Finished: {progress.step} steps, best weights (step {progress.best_step}) in {log.folder / 'best'}."
        )
    else:
        log.status("preempted", progress.step, reason)
        owed = "; its evaluation comes first then" if progress.evaluation_pending else ""
        log.say(
            f"Asked to stop ({reason}): step {progress.step} of {total_steps} is saved; the same command goes on{owed}."
        )
