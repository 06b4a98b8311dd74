"""Whether a checkpoint may be gone on from with these settings: a table of what changed, and what each change means.

In: what decided the run that wrote the checkpoint, and what decides this one. Out: nothing where they are alike; an error with the table
where going on would break a promise (same steps, same gradient, every row once an epoch); else sentences to say.
One module, because what may change and what it means belong together, and the loop should know of neither.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from bertdist.core.config import TrainConfig
from bertdist.core.errors import CheckpointError
from bertdist.data.records import Records
from bertdist.data.source import ReaderState
from bertdist.data.streaming import EMPTY, Stream
from bertdist.tasks.tasks import Task

P = TypeVar("P")

_STEPS = "the steps that are done learned in another way"

REFUSED = {  # setting -> what going on with another one would mean
    "seed": "another order of rows and other dropout: rows of this epoch come twice or not at all",
    "train_batch_size": "steps have other rows: rows of this epoch come twice or not at all",
    "max_length": "the steps that are done read texts of another length",
    "labels": "the outputs of the weights mean other labels",
    "problem_type": "the outputs of the weights mean something else",
    "training_rows": "the rows are not those that were trained on: rows of this epoch come twice or not at all (--accept_changed_data)",
    "total_steps": "the learning rate of the steps that are done was that of another length",
    "learning_rate": "the steps that are done had another learning rate",
    "lr_scheduler_type": "the steps that are done had another learning rate",
    "warmup_ratio": "the steps that are done had another learning rate",
    "warmup_steps": "the steps that are done had another learning rate",
    "layerwise_lr_decay": "the steps that are done had another learning rate",
    "dropout": "the steps that are done lost other numbers",
    "mixed_precision": "the steps that are done were computed in another precision",
    "class_weights": "the steps that are done weighed rows in another way",
    "label_smoothing_factor": "the steps that are done had other targets",
    "tokenizer_name": "the weights know texts by other token numbers",
    "train_weights": "another mixture: rows come in other shares and another order",
    "stream_window": "another order of rows: rows of this epoch come twice or not at all",
    "stream_sharding": "another order of rows: rows of this epoch come twice or not at all",
}

ACCEPTED = {  # setting that decides nothing of what is learned -> what going on with another one means
    "metric_for_best_model": "scores do not compare: the next evaluation is the best so far",
    "validation_rows": "scores do not compare: the next evaluation is the best so far",
    "eval_every": "best/ is chosen among other steps",
    "early_stopping_patience": "counts on from the evaluations that are done",
    "early_stopping_threshold": "counts on from the evaluations that are done",
    "gradient_checkpointing": "same result; memory and time differ",
    "torch_compile": "same result to rounding",
    "cuda_graphs": "same result to rounding",
}

# Fields of TrainState whose key in state.json is another one.
FIELD_KEYS = {
    "tokens_requested": "tokens_asked",
    "evaluation_pending": "owed",
    "unlogged_steps": "window",
    "reader_state": "place",
}

BREAKS_BEST = {"metric_for_best_model", "validation_rows"}


@dataclass(frozen=True)
class ResumeSignature:
    """What a run is, as far as going on with it is concerned; JSON-able values."""

    must_match: dict[str, Any]  # what it learns
    may_change: dict[str, Any] = field(
        default_factory=dict
    )  # what else a person would want to know of
    accept_changed_data: bool = False


@dataclass(frozen=True)
class Change:
    """A setting that is another one than when the checkpoint was written."""

    name: str
    then: Any
    now: Any
    meaning: str


def changes(then: dict[str, Any], now: dict[str, Any], meanings: dict[str, str]) -> list[Change]:
    """What differs, in the order of the settings."""
    return [
        Change(name, then.get(name), now.get(name), meanings.get(name, _STEPS))
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]


def compare(folder: Path, state: dict[str, Any], now: ResumeSignature) -> list[Change]:
    """The changes that are accepted. Raises CheckpointError, with a table, where there is one that is not. state: of state.json."""
    then, done = state["identity"], state["progress"]["step"]
    found = changes(then, now.must_match, REFUSED)
    accepted: list[Change] = []
    refused: list[Change] = []
    for change in found:
        meaning = _accepted(change, found, then, now)
        if change.name == "total_steps" and change.now <= done:
            refused.append(replace(change, meaning=f"{done} are done already"))
        elif meaning:
            accepted.append(replace(change, meaning=meaning))
        else:
            refused.append(change)
    if refused:
        told = "\n".join(table(refused))
        raise CheckpointError(
            f"{folder} belongs to another run. What differs:\n{told}\nTake the old settings, or another --output_dir."
        )
    return accepted + changes(state.get("besides", now.may_change), now.may_change, ACCEPTED)


def _accepted(
    change: Change, found: Iterable[Change], then: dict[str, Any], now: ResumeSignature
) -> str:
    """What a change means where it may be gone on with; "" where it may not."""
    other_rows = now.accept_changed_data and any(other.name == "training_rows" for other in found)
    if change.name == "training_rows" and other_rows:
        return "accepted: in the epoch that was begun rows may come twice or not at all, in later ones once"
    if change.name == "total_steps":
        schedules = {settings.get("lr_scheduler_type") for settings in (then, now.must_match)}
        if schedules <= {"constant", "constant_with_warmup"} and not now.must_match.get(
            "warmup_ratio"
        ):
            return "the learning rate is constant: more or fewer steps, none of them another"
        if other_rows:
            return "from here on the learning rate is that of a run of this length"
    return ""


def table(rows: Iterable[Change]) -> list[str]:
    """Lines of a table: setting, then, now, what it means."""
    cells = [
        ("setting", "then", "now", "what it means"),
        *((c.name, _short(c.then), _short(c.now), c.meaning) for c in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return [
        "  "
        + "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]
        )
        for row in cells
    ]


def reader_state_after_change(
    place: ReaderState | None, accepted: Iterable[Change]
) -> ReaderState | None:
    """Where a stream goes on whose data changed: at the begin of the epoch. A place in the midst of other bytes means nothing."""
    if place is None or not any(change.name == "training_rows" for change in accepted):
        return place
    if "over" in place:
        return {"over": {**EMPTY, "epoch": place["over"]["epoch"]}}
    return {"window": {**EMPTY, "epoch": place["window"]["epoch"]}, "step": 0}


def read_state(folder: Path, kind: Callable[..., P]) -> tuple[dict[str, Any], P]:
    """state.json and the progress in it. kind: a dataclass with defaults. Raises CheckpointError where it is not what we write."""
    try:
        state = json.loads((folder / "state.json").read_text())
        fields = {key: name for name, key in FIELD_KEYS.items()}
        progress = kind(**{fields.get(k, k): value for k, value in state["progress"].items()})
        odd = [
            name
            for name, default in vars(kind()).items()
            if not _alike(getattr(progress, name), default)
        ]
        places = state.get("places", [None])
        fits = (
            isinstance(state["identity"], dict)
            and isinstance(state["ranks"], int)
            and isinstance(state.get("besides", {}), dict)
        )
        if (
            odd
            or not fits
            or not places
            or not all(place is None or _is_place(place) for place in places)
        ):
            raise ValueError(
                f"{odd[0]} is {getattr(progress, odd[0])!r}" if odd else "it holds other things"
            )
        state.setdefault("scaler", None)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {folder / 'state.json'}: {error.strerror or error}."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'} is not what this version of bertdist writes ({error})."
        ) from None
    return state, progress


def _alike(value: Any, default: Any) -> bool:
    if default is None:  # best_score, place
        return value is None or isinstance(value, int | float | dict)
    if isinstance(default, list):
        pairs = isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 for pair in value
        )
        return pairs and all(isinstance(number, int | float) for pair in value for number in pair)
    return type(value) is type(default) and (isinstance(value, bool) or value >= 0)


def _is_place(place: Any) -> bool:
    return isinstance(place, dict) and any(
        isinstance(place.get(name), dict) for name in ("window", "over")
    )


def reader_state_of_rank(
    folder: Path, state: dict[str, Any], rank: int, ranks: int
) -> ReaderState | None:
    """Where this rank's reading of a stream goes on. Between two passes that is the same for any number of ranks that read own files."""
    places: list[ReaderState | None] = state.get(
        "places", [None]
    )  # versions before streams wrote none
    own_files = state["identity"].get("stream_sharding") == "by_file"
    if (
        own_files
        and state["ranks"] != ranks
        and not all(place and "over" in place for place in places)
    ):
        raise CheckpointError(
            f"{folder} was written by {state['ranks']} processes with --stream_sharding by_file, each in the middle of its own files, and now "
            f"there are {ranks}. Go on with {state['ranks']}, or, in a run of --max_train_steps, from a checkpoint at the end of an epoch "
            "(--save_every '1 epoch')."
        )
    return places[rank % len(places)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 48 else f"{text[:44]} ..."


def _must_match(
    config: TrainConfig, rows: Records | Stream, task: Task, total_steps: int
) -> dict[str, Any]:
    """All that decides what a run learns, and nothing else: devices, micro-batches, workers and cadences are not in it."""
    settled = {**asdict(config.optim), **asdict(config.task)}
    for name in ("metrics", "metric_for_best_model", "label_names", "class_weights"):
        settled.pop(name)
    return {
        **settled,
        "labels": list(task.labels),
        "class_weights": config.task.class_weights,
        "max_length": config.model.max_length,
        "dropout": config.model.dropout,
        "tokenizer_name": config.model.tokenizer_name,
        "mixed_precision": config.run.mixed_precision,
        "train_batch_size": config.batch.train_batch_size,
        "seed": config.run.seed,
        "total_steps": total_steps,
        "training_rows": f"{len(rows)} rows, {rows.fingerprint}"
        if isinstance(rows, Records)
        else f"a stream, {rows.fingerprint}",
        "train_weights": config.data.train_weights,
        **(
            {name: getattr(config.data, name) for name in ("stream_window", "stream_sharding")}
            if isinstance(rows, Stream)
            else {}
        ),
    }


def resume_signature(
    config: TrainConfig,
    rows: Records | Stream,
    dev_rows: Records | None,
    task: Task,
    total_steps: int,
) -> ResumeSignature:
    """What a checkpoint must agree with, and what else it remembers."""
    may_change = {name: getattr(config.run, name) for name in ACCEPTED if hasattr(config.run, name)}
    may_change |= {
        "metric_for_best_model": config.task.metric_for_best_model
        or next(iter(config.task.metrics or []), None),
        "validation_rows": f"{len(dev_rows)} rows, {dev_rows.fingerprint}" if dev_rows else None,
        "gradient_checkpointing": config.model.gradient_checkpointing,
    }
    return ResumeSignature(
        _must_match(config, rows, task, total_steps),
        may_change,
        config.run.accept_changed_data,
    )
