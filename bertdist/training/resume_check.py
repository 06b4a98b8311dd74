"""Whether a run may resume from a checkpoint that was written with other settings or data.

1. `resume_signature` describes a run: settings that decide what it learns (`must_match`), and
   others worth a message when they change (`may_change`). Each checkpoint stores it.
2. `check_changes` compares it with that of the resuming run. A change that would break a promise
   (same steps, same gradients, every row once per epoch) raises an error with a table; harmless
   changes are returned, to be logged with `format_changes`.

`check_start` does so before torch is imported, with the settings that need neither rows nor model.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertdist.core.atomic_io import find_damage, read_json_object
from bertdist.core.config import TrainConfig, count_steps, plain_duration, share_of
from bertdist.core.errors import CheckpointError

if TYPE_CHECKING:  # not imported: `check_start` needs no torch
    from bertdist.data.records import Records
    from bertdist.data.streaming import Stream
    from bertdist.tasks.tasks import Task

# Of state.json. 1: bertdist 0.1.0, which wrote no number. 2: TrainState's own field names as keys.
FORMAT = 2

_DEFAULT_EFFECT = "the steps done so far used another value"
_ROWS = "rows of this epoch are repeated or missed"
_SCORES = "scores do not compare: the next evaluation counts as the best so far"
# setting -> effect of changing it, where _DEFAULT_EFFECT does not say enough
MUST_MATCH = {
    "seed": f"another row order and dropout: {_ROWS}",
    "train_batch_size": f"other rows per step: {_ROWS}",
    "mixed_precision": "the steps done so far were rounded otherwise (auto keeps what they had)",
    "ddp_comm_hook": "the steps done so far rounded gradients otherwise between ranks",
    "freeze": "the steps done so far trained other weights",
    "labels": "the model's outputs stand for other labels",
    "problem_type": "the model's outputs mean something else",
    "training_rows": f"other training rows: {_ROWS} (--accept_changed_data)",
    "total_steps": "the steps done so far used the learning rates of another run length",
    "tokenizer_name": "the model was trained on other token ids",
    "tokenizer": "another tokenizer: the model was trained on other token ids",
    "model_config": "another config.json: the same weights compute something else",
    "validation_split": "rows that were trained on would be evaluated on, or the other way round",
    "test_split": "rows that were trained on would be scored as test rows, or the other way round",
    "train_weights": "other shares of the files, and another row order",
    "stream_window": f"another row order: {_ROWS}",
    "stream_sharding": f"another row order: {_ROWS}",
}
# setting that does not decide what is learned -> effect of changing it
MAY_CHANGE = {
    "model_name_or_path": "its weights are not used: those of the checkpoint are",
    "metric_for_best_model": _SCORES,
    "validation_rows": _SCORES,
    "metrics": "from the next evaluation on; the scores so far are without it",
    "positive_label": _SCORES,
    "eval_every": "best/ is chosen among other steps",
    "early_stopping_patience": "counts on from the evaluations done so far",
    "early_stopping_threshold": "counts on from the evaluations done so far",
    "gradient_checkpointing": "same result; memory and time differ",
    "torch_compile": "same result up to rounding",
    "cuda_graphs": "same result up to rounding",
}
RESETS_BEST = {"metric_for_best_model", "validation_rows", "positive_label"}
# Not compared where an older checkpoint of the same format does not have them.
ADDED = {"tokenizer", "model_config", "model_name_or_path", "metrics", "positive_label"}


@dataclass(frozen=True)
class ResumeSignature:
    """Settings and data of a run, as JSON-able values by name."""

    must_match: dict[str, Any]
    may_change: dict[str, Any] = field(default_factory=dict)
    accept_changed_data: bool = False  # not stored


@dataclass(frozen=True)
class Change:
    """A setting that differs between a checkpoint and the run that resumes from it."""

    name: str
    before: Any
    now: Any
    effect: str


def settings_that_must_match(config: TrainConfig) -> dict[str, Any]:
    """Those of a `ResumeSignature` that need neither rows nor model."""
    must_match = {**asdict(config.optim), **asdict(config.task)}
    for name in (
        *("metrics", "metric_for_best_model", "label_names", "positive_label"),
        *("calibrate", "tune_thresholds", "threshold_for"),  # after the last step
    ):
        must_match.pop(name)
    must_match |= {
        "max_length": config.model.max_length,
        "dropout": config.model.dropout,
        "freeze": config.model.freeze,
        "tokenizer_name": config.model.tokenizer_name,
        "train_batch_size": config.batch.train_batch_size,
        "seed": config.run.seed,
        "train_weights": config.data.train_weights,
    }
    if config.run.ddp_comm_hook != "no":  # as in checkpoints of earlier versions, which had none
        must_match["ddp_comm_hook"] = config.run.ddp_comm_hook
    for name in ("stream_window", "stream_sharding") if config.data.streaming else ():
        must_match[name] = getattr(config.data, name)
    for name in ("validation_split", "test_split"):  # of files; else only other rows are scored
        if config.data.train_file and getattr(config.data, name):
            must_match[name] = share_of(getattr(config.data, name))
    return must_match


def resume_signature(
    config: TrainConfig,
    train_rows: "Records | Stream",
    validation_rows: "Records | None",
    task: "Task",
    total_steps: int,
    digests: dict[str, str],
) -> ResumeSignature:
    """The signature of this run; without devices, micro-batches, workers and intervals.

    digests: see `pretrained_digests`.
    """
    size = "a stream" if config.data.streaming else f"{len(train_rows)} rows"  # type: ignore[arg-type]
    must_match = {
        **settings_that_must_match(config),
        **digests,
        "labels": list(task.labels),
        "mixed_precision": config.run.mixed_precision,
        "total_steps": total_steps,
        "training_rows": f"{size}, {train_rows.fingerprint}",
    }
    may_change = {
        name: getattr(config.run, name) for name in MAY_CHANGE if hasattr(config.run, name)
    }
    if may_change["eval_every"].strip() == "auto":
        may_change["eval_every"] = "1 epoch"  # as earlier versions wrote it
    rows, metrics = validation_rows, config.task.metrics or []
    may_change |= {
        "model_name_or_path": config.model.model_name_or_path,
        "metrics": config.task.metrics,
        "positive_label": config.task.positive_label,
        "metric_for_best_model": config.task.metric_for_best_model or next(iter(metrics), None),
        "validation_rows": f"{len(rows)} rows, {rows.fingerprint}" if rows else None,
        "gradient_checkpointing": config.model.gradient_checkpointing,
    }
    return ResumeSignature(must_match, may_change, config.run.accept_changed_data)


def check_start(config: TrainConfig) -> None:
    """Raise BertdistError for what `train` would raise, as far as it can be seen before torch is
    imported, which takes seconds.
    """
    from bertdist.data import preflight  # for the command line only

    preflight.check_train(config)
    if not (preflight.is_launched() or config.run.folds or config.run.seeds):
        check_checkpoint(config, ResumeSignature(settings_that_must_match(config)))


def check_checkpoint(config: TrainConfig, now: ResumeSignature) -> list[str]:
    """What a start says of the checkpoint that it would resume from; nothing without one.

    now: the signature, or some of its settings. Raises CheckpointError as `check_changes`.
    """
    named = config.run.resume_from_checkpoint
    own = checkpoints_in(Path(config.run.output_dir) / "checkpoints")
    for folder in [Path(named)] if named else reversed(own):
        state = read_json_object(folder / "state.json")
        must_match, may_change, train_state = (
            state.get(name) for name in ("must_match", "may_change", "train_state")
        )
        if not (
            state.get("format") == FORMAT
            and isinstance(must_match, dict)
            and isinstance(may_change, dict)
            and isinstance(train_state, dict)
        ):
            continue  # a start says what is wrong with it
        settings = dict(now.must_match)
        # As many as of these rows: others are refused anyway
        rows = re.match(r"(\d+) rows,", str(must_match.get("training_rows")))
        if rows and "total_steps" not in settings and not config.run.accept_changed_data:
            steps_per_epoch = -(-int(rows[1]) // config.batch.train_batch_size)
            settings["total_steps"] = count_steps(config.run, steps_per_epoch)
        before = ResumeSignature(
            {name: value for name, value in must_match.items() if name in settings},
            {name: value for name, value in may_change.items() if name in now.may_change},
        )
        step = int(train_state.get("step", 0))
        try:
            changes = check_changes(folder, before, replace(now, must_match=settings), step)
        except CheckpointError:
            if find_damage(folder) is None:  # else it is skipped
                raise
            continue
        lines = [f"Resuming from {folder} (step {step})."]
        if changes:
            lines += ["Settings changed since then:", *format_changes(changes)]
        if train_state.get("finished"):
            lines.append("This run has finished: its results are shown again.")
        return lines
    return []


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders step_N by number, damaged or not. Raises OSError."""
    paths = [x for x in folder.glob("step_*") if re.fullmatch(r"\d{6,}", x.name[5:])]
    return sorted(paths, key=lambda path: int(path.name[5:]))


def check_changes(
    folder: Path, before: ResumeSignature, now: ResumeSignature, step: int
) -> list[Change]:
    """The harmless changes since the checkpoint in `folder`, which was written after `step` steps.

    Raises CheckpointError with a table if there are others.
    """
    changes = _changes(before.must_match, now.must_match, MUST_MATCH)
    accepted: list[Change] = []
    refused: list[Change] = []
    for change in changes:
        effect = _accepted_effect(change, changes, before, now)
        if change.name == "total_steps" and change.now <= step:
            refused.append(replace(change, effect=f"{step} steps are done already"))
        elif effect:
            accepted.append(replace(change, effect=effect))
        else:
            refused.append(change)
    if refused:
        table = "\n".join(format_changes(refused))
        raise CheckpointError(
            f"{folder} belongs to a run with other settings:\n{table}\n"
            "Use the old settings, or another --output_dir."
        )
    earlier, later = (
        settings | {"eval_every": plain_duration(settings.get("eval_every"))}
        for settings in (before.may_change, now.may_change)
    )
    return accepted + _changes(earlier, later, MAY_CHANGE)


def format_changes(changes: Iterable[Change]) -> list[str]:
    """Lines of an aligned table."""
    rows = [("setting", "before", "now", "effect")]
    rows += [(each.name, _short(each.before), _short(each.now), each.effect) for each in changes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    aligned = [[*map(str.ljust, row[:3], widths), row[3]] for row in rows]
    return ["  " + "  ".join(row) for row in aligned]


def _changes(before: dict[str, Any], now: dict[str, Any], effects: dict[str, str]) -> list[Change]:
    return [
        Change(name, before.get(name), now.get(name), effects.get(name, _DEFAULT_EFFECT))
        for name in {**before, **now}
        if before.get(name) != now.get(name) and (name in before or name not in ADDED)
    ]


def _accepted_effect(
    change: Change, changes: list[Change], before: ResumeSignature, now: ResumeSignature
) -> str:
    """The effect of a change that is accepted although it must match; "" if it is not."""
    changed_data = now.accept_changed_data and any(each.name == "training_rows" for each in changes)
    if change.name == "training_rows" and changed_data:
        return (
            "accepted: rows of the epoch in progress may be repeated or missed,"
            " later epochs have each row once"
        )
    if change.name == "total_steps":
        settings = (before.must_match, now.must_match)
        schedules = {each.get("lr_scheduler_type") for each in settings}
        constant = schedules <= {"constant", "constant_with_warmup"}
        if constant and not now.must_match.get("warmup_ratio"):
            return "constant learning rate: more or fewer steps, each of them the same"
        if changed_data:
            return "from here on the learning rate is that of a run of this length"
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 48 else f"{text[:44]} ..."
