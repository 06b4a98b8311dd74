"""What --calibrate and --tune_thresholds fit at the end of a run, and what of it is still to do.

A run fits what its best/ has not: so one that was killed while it did goes on, and a finished one
can be given the flags later. What best/ has stays, also without the flags.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from bertdist.core.config import TaskConfig
from bertdist.core.errors import ConfigError
from bertdist.core.types import Array
from bertdist.data.records import Records
from bertdist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from bertdist.tasks.calibration import fit_temperature, measure, tune, without_thresholds
from bertdist.tasks.tasks import Task


def public_name(data: str) -> str:
    """The name of a data set for config.json, which may be published: of a path the last part."""
    return PurePath(data).name if PurePath(data).is_absolute() else data


class Fits(NamedTuple):
    """What is fitted."""

    temperature: bool = False
    threshold_for: str | None = None


def wanted_fits(config: TaskConfig, has_rows: bool) -> Fits:
    """Those of the flags. has_rows: whether there is a validation split; raises ConfigError for
    flags without one.
    """
    fits = Fits(config.calibrate, config.threshold_for if config.tune_thresholds else None)
    if any(fits) and not has_rows:
        name = "calibrate" if config.calibrate else "tune_thresholds"
        raise ConfigError(f"--{name} needs rows to evaluate on: name them as --validation_split.")
    return fits


def due_fits(wanted: Fits, fitted: Mapping[str, Any]) -> Fits:
    """What best/ has not. fitted: its `calibration`. Another temperature needs other thresholds."""
    temperature = wanted.temperature and fitted.get("temperature") is None
    before = fitted.get("threshold_for")
    threshold_for = wanted.threshold_for or before
    is_due = temperature or threshold_for != before
    return Fits(temperature, threshold_for if is_due else None)


def stays_fitted(wanted: Fits, fitted: Mapping[str, Any]) -> str:
    """A sentence where best/ has what the flags do not ask for, else ""."""
    kept = []
    if fitted.get("temperature") is not None and not wanted.temperature:
        kept.append("its temperature (--calibrate)")
    if fitted.get("thresholds") and not wanted.threshold_for:
        kept.append("its thresholds (--tune_thresholds)")
    return f"best/ keeps {' and '.join(kept)}: only another run is without." if kept else ""


def fit_run_temperature(
    logits: Tensor, references: Array, accelerator: Accelerator
) -> tuple[float, str]:
    """`fit_temperature` on rank 0, the same result on every rank. A collective."""
    found: tuple[float, str] | None = None
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            found = fit_temperature(logits.numpy(), references)
    temperature, note = broadcast_from_rank0(accelerator, found)
    return temperature, note


def describe_fits(
    fits: Fits,
    fitted: Mapping[str, Any],
    task: Task,
    before: Tensor,
    after: Tensor,
    temperature: tuple[float, str],
    references: Array,
    records: Records,
    positive: int,
) -> dict[str, Any]:
    """`calibration` of config.json and evaluation.json, with the thresholds, which are fitted here.

    fitted: what best/ had. before, after: logits (N, O) of best/ before and after the temperature.
    """
    plain, notes = without_thresholds(task), [temperature[1]] if temperature[1] else []
    tuned, threshold_for = plain, fits.threshold_for
    value = temperature[0] if fits.temperature else fitted.get("temperature")
    if threshold_for is not None:
        tuned, more = tune(plain, after, references, threshold_for, positive)
        notes += more
    if value is not None and not fits.temperature:  # best/ had one already
        before = (before.double() * value).float()
    pairs = zip(task.labels, tuned.thresholds, strict=False)
    return {
        "temperature": value,
        "threshold_for": threshold_for,
        "thresholds": {label: number for label, number in pairs if number is not None},
        "fitted_on": {"data": public_name(records.name), "rows": len(records)},
        "in_sample": True,
        "before": measure(plain, before, references, threshold_for, positive),
        "after": measure(tuned, after, references, threshold_for, positive),
        "notes": notes,
    }
