"""Checkpoints: all that the next step depends on, in a folder that is complete or absent.

    out/checkpoints/step_000400/   model.safetensors optimizer.safetensors state.json manifest.json

1. The log is flushed to the disk first, so that after a power cut no checkpoint is ahead of it.
2. Everything is written to `.step_000400.partial`, and each file is flushed.
3. manifest.json comes last, with size and xxh3 digest of each file. The folder is flushed and
   renamed, and its parent is flushed.
4. On start the newest folder whose files match its manifest is loaded; a damaged one is renamed to
   step_000400.damaged and skipped.

Row order, learning rate and dropout are pure functions of the step, so there is no state of
samplers, schedules or random generators to save, and none per rank but the position in a stream:
rank 0 writes, all ranks read. No pickle is written or read.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bertdist
from bertdist.core.atomic_io import (
    MANIFEST,
    explain_write_errors,
    find_damage,
    move_aside,
    read_json,
    read_json_object,
    recover,
    remove_folder,
    remove_leftover,
    safetensors_problem,
    write_folder,
)
from bertdist.core.config import saved_setting
from bertdist.core.errors import CheckpointError
from bertdist.data.batch import RankStep
from bertdist.data.source import STREAM_START, ReaderState
from bertdist.distributed.collectives import (
    broadcast_from_rank0,
    gather_from_all_ranks,
    raise_on_all_ranks,
)
from bertdist.training.resume_check import (
    FORMAT,
    RESETS_BEST,
    Change,
    ResumeSignature,
    check_changes,
    checkpoints_in,
    format_changes,
)
from bertdist.training.throughput import ThroughputMeter

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside "step"
LEFTOVER = re.compile(r"\.step_\d{6,}\.(partial|replaced|old)")  # of a save that was killed


@dataclass
class TrainState:
    """How far training has come: with weights and optimizer all that the next step depends on."""

    step: int = 0  # optimizer steps done
    rows: int = 0  # rows seen, all ranks together
    tokens: int = 0  # real tokens seen up to the last log line, all ranks together
    best_score: float | None = None
    best_loss: float | None = None  # as long as best_score was never a number: then it selects
    best_step: int = 0
    best_weights: str = ""  # `weights_digest` of best/; field names are keys of state.json
    best_evaluation_loss: float | None = None  # that of evaluation.json
    evaluations_since_best: int = 0
    tokens_per_micro_batch: int = 0  # requested or measured, halved where memory ran out; 0: unset
    tokens_requested: int = 0  # the --tokens_per_micro_batch that it came from; 0: measured
    oom_retries: int = 0  # steps that were repeated because memory ran out
    nan_steps: int = 0  # steps that were skipped because loss or gradient was not finite
    consecutive_nan_steps: int = 0  # up to and including the last step
    finished: bool = False
    # The evaluation after this step was interrupted by a stop; the next start catches up first.
    evaluation_pending: bool = False
    # [loss sum, rows] of each step since the last log line
    unlogged_steps: list[list[float]] = field(default_factory=list)
    # Position in a stream; with --stream_sharding by_file, this rank's.
    reader_state: ReaderState | None = None

    def __post_init__(self) -> None:
        # This rank's loss sum () of each step since the last `gather_losses`; not in a checkpoint.
        self._losses: list[Tensor] = []
        self.last_loss: Tensor | None = None  # this rank's, of the last step; not in a checkpoint

    def advance(self, step: RankStep, loss: Tensor) -> None:
        """Count one more optimizer step.

        loss: this rank's loss sum (), which stays on the device until `gather_losses`.
        """
        self.step, self.rows = step.number + 1, self.rows + step.rows
        self.reader_state = step.next_reader_state
        self.unlogged_steps.append([0.0, float(step.rows)])
        self._losses.append(loss)
        self.last_loss = loss

    def gather_losses(self, meter: ThroughputMeter, accelerator: Accelerator) -> None:
        """Fill in losses and tokens of all ranks, with the meter's figures, in one collective.

        Step by step, not as one running sum: so the log does not depend on when a checkpoint was
        written.
        """
        if self._losses:
            losses, self._losses = self._losses, []
            totals = meter.gather(torch.stack(losses), accelerator)
            for entry, (loss, tokens) in zip(
                self.unlogged_steps[-len(totals) :], totals, strict=True
            ):
                # Not finite: the step was skipped, see nonfinite.py.
                entry[:] = (loss, entry[1]) if math.isfinite(loss) else (0.0, 0.0)
                self.tokens += int(tokens)

    def pop_mean_loss(self) -> float:
        """Mean loss per row since the last log line: sums are divided, means never averaged.

        NaN if all steps were skipped.
        """
        loss, rows = (sum(entry[i] for entry in self.unlogged_steps) for i in (0, 1))
        self.unlogged_steps.clear()
        return loss / rows if rows else math.nan

    def epochs(self, steps_per_epoch: int) -> float:
        """Passes over the rows; complete ones only for a stream (steps_per_epoch 0)."""
        if steps_per_epoch:
            return self.step / steps_per_epoch
        position = self.reader_state
        return float((position.get("window") or position["over"])["epoch"]) if position else 0.0


def check_named(folder: Path) -> None:
    """Raise CheckpointError for a --resume_from_checkpoint that is no complete checkpoint."""
    if damage := find_damage(folder):
        raise CheckpointError(f"--resume_from_checkpoint {folder}: {damage}.")


class Checkpointer:
    """Writes and loads the checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        signature: ResumeSignature,
        accelerator: Accelerator,
        keep: int,
        say: Callable[..., None],
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        """keep: maximum number. say: takes lines of text. before_save: flushes the log (rank 0)."""
        self.folder, self.signature, self.accelerator = folder, signature, accelerator
        self.keep, self.say, self.before_save = keep, say, before_save
        self.source: Path | None = None  # the checkpoint that `restore` loaded

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, train_state: TrainState
    ) -> None:
        """Write step_N, delete the oldest. A collective; raises CheckpointError on all ranks."""
        ranks, scaler = self.accelerator.num_processes, self.accelerator.scaler
        readers = gather_from_all_ranks(self.accelerator, [train_state.reader_state])
        one_for_all = all(each == readers[0] for each in readers)
        state = {
            "format": FORMAT,
            "version": bertdist.__version__,
            "train_state": asdict(train_state),
            "must_match": self.signature.must_match,
            "may_change": self.signature.may_change,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ranks": ranks,
            "reader_states": readers[:1] if one_for_all else readers,
        }

        def fill(folder: Path) -> None:
            save_file(_contiguous(model_tensors(model)), folder / "model.safetensors")
            tensors = _contiguous(optimizer_tensors(model, optimizer))
            save_file(tensors, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps(state, indent=1))

        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                self.before_save()
                new = self.folder / f"step_{train_state.step:06d}"
                tensors = [model_tensors(model), optimizer_tensors(model, optimizer)]
                size = sum(x.nbytes for of in tensors for x in of.values())
                self._say_kept(write_folder(new, fill, size))
                # After --resume_from_checkpoint of an older one, the new one need not be the last.
                # A symbolic link is a user's.
                others = [x for x in self._checkpoints() if x != new and not x.is_symlink()]
                for old in others[: max(0, len(others) - self.keep + 1)]:
                    self._say_kept(remove_folder(old))

    def _say_kept(self, kept: Path | None) -> None:
        if kept is not None:
            self.say(f"{kept} keeps files that no run wrote.")

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, named: str | None = None
    ) -> TrainState:
        """Load the checkpoint `named`, or the newest complete one; without one, a new `TrainState`.

        A collective; raises CheckpointError on all ranks if the checkpoint does not fit this run.
        """
        with raise_on_all_ranks(self.accelerator):
            chosen = self._choose(named) if self.accelerator.is_main_process else None
        chosen = broadcast_from_rank0(self.accelerator, chosen)
        if not chosen:
            return TrainState()
        self.source = Path(chosen)
        folder, ranks = Path(chosen), self.accelerator.num_processes
        with raise_on_all_ranks(self.accelerator):
            state, train_state = read_state(folder)
            # Before the other settings: another number of ranks may also change the steps.
            train_state.reader_state = reader_state_of_rank(
                folder, state, self.accelerator.process_index, ranks
            )
            before = ResumeSignature(state["must_match"], state["may_change"])
            with _explain_steps_by_file(folder, state, ranks, self.signature):
                changes = check_changes(folder, before, self.signature, train_state.step)
            load_tensors(model_tensors(model), read_tensors(folder / "model.safetensors"), folder)
            load_optimizer(model, optimizer, read_tensors(folder / "optimizer.safetensors"), folder)
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self.say(f"Resuming from {folder} (step {train_state.step}).")
        total_steps = self.signature.must_match.get("total_steps", train_state.step)
        train_state = apply_changes(train_state, changes, total_steps)
        if changes:
            self.say("Settings changed since then:", *format_changes(changes))
            if train_state.finished:
                self.say("They have no effect: the run has finished.")
        if state["ranks"] != ranks:
            by_file = self.signature.must_match.get("stream_sharding") == "by_file"
            rows = (
                "the same rows per epoch, in other steps" if by_file else "the same rows per step"
            )
            self.say(
                f"Written by {state['ranks']} processes, resumed by {ranks}: {rows}; sums round in"
                " another order, and on GPUs dropout masks differ."
            )
        return train_state

    def find(self, step: int) -> Path | None:
        """The checkpoint of a step, here or beside the one that was loaded, if it is complete."""
        folders = [self.folder] + ([self.source.parent] if self.source else [])
        candidates = [folder / f"step_{step:06d}" for folder in folders]
        return next((folder for folder in candidates if find_damage(folder) is None), None)

    def _choose(self, named: str | None) -> str:
        """The folder to load, "" for none; cleans up what a killed process left."""
        for leftover in self.folder.glob(".step_*"):
            if not LEFTOVER.fullmatch(leftover.name):
                continue
            if leftover.suffix == ".replaced":
                recover(self.folder / leftover.stem[1:])
                if not os.path.lexists(leftover):
                    continue
            action = "deleting" if leftover.suffix == ".old" else "writing"
            self.say(f"Removing {leftover.name}: {action} this checkpoint was interrupted.")
            self._say_kept(remove_leftover(leftover))
        if named is not None:
            check_named(Path(named))
            self._check_same_run(Path(named))
            return str(self._same_here(Path(named)) or named)
        for folder in reversed(self._checkpoints()):
            damage = find_damage(folder)
            if damage is None:
                return str(folder)
            renamed = move_aside(folder, "damaged")
            self.say(f"Skipping damaged checkpoint {folder}: {damage}. Renamed to {renamed.name}.")
        return ""

    def _same_here(self, named: Path) -> Path | None:
        """The checkpoint of this folder that has the same bytes: best/ is of its run then."""
        manifest = (named / MANIFEST).read_bytes()
        same = (x for x in self._checkpoints() if (x / MANIFEST).is_file())
        own = (x for x in same if (x / MANIFEST).read_bytes() == manifest)
        return next((folder for folder in own if find_damage(folder) is None), None)

    def _check_same_run(self, named: Path) -> None:
        """Raise CheckpointError where a checkpoint of another folder would go on in the folder of
        another run, whose log and best weights it would replace.

        The same run: this folder resumed from it before, or has a checkpoint of the same settings.
        """
        run = self.folder.parent
        if named.resolve().parent == self.folder.resolve():
            return
        own = self._checkpoints()
        if not own and not any(os.path.lexists(run / x) for x in ("best", "metrics.jsonl")):
            return
        before = saved_setting(run / "config.yaml", "resume_from_checkpoint")
        if before and Path(str(before)).resolve() == named.resolve():
            return
        settings = read_state(named)[0]["must_match"]
        if not own or read_json_object(own[-1] / "state.json").get("must_match") != settings:
            raise CheckpointError(
                f"--resume_from_checkpoint {named} is of another run than that of {run}, whose log "
                "and best weights would be replaced: give a new --output_dir."
            )

    def _checkpoints(self) -> list[Path]:
        with explain_write_errors(self.folder, "read"):
            return checkpoints_in(self.folder)


# ---- state.json


def read_state(folder: Path) -> tuple[dict[str, Any], TrainState]:
    """state.json and the TrainState in it. Raises CheckpointError if it has another format."""
    path = folder / "state.json"
    try:
        state = read_json(path)
        if state.get("format") != FORMAT:
            version = state.get("version", "0.1.0 or earlier")
            raise CheckpointError(
                f"{folder} was written by bertdist {version} (checkpoint format"
                f" {state.get('format', 1)}), this is {bertdist.__version__} (format {FORMAT})."
                " Finish the run with that version, or start a new --output_dir."
            )
        train_state = TrainState(**state["train_state"])
        for name, default in vars(TrainState()).items():
            if not _is_valid(getattr(train_state, name), default):
                raise ValueError(f"{name} is {getattr(train_state, name)!r}")
        readers = state["reader_states"]
        signature = isinstance(state["must_match"], dict) and isinstance(state["may_change"], dict)
        if not (signature and isinstance(state["ranks"], int) and readers and "scaler" in state):
            raise ValueError("an entry is missing or has another type")
        if not all(reader is None or _is_reader_state(reader) for reader in readers):
            raise ValueError(f"reader_states is {readers!r}")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not visible on this machine; --output_dir must be on a disk that all"
            " machines share."
        ) from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}).") from None
    return state, train_state


def _is_valid(value: Any, default: Any) -> bool:
    """Whether a field of TrainState with this default may have this value."""
    if default is None:  # best_score and other scores, reader_state
        return value is None or isinstance(value, int | float | dict)
    if isinstance(default, list):
        return isinstance(value, list) and all(
            len(pair) == 2 and all(isinstance(number, int | float) for number in pair)
            for pair in value
        )
    return type(value) is type(default) and (isinstance(value, str) or value >= 0)


def _is_reader_state(value: Any) -> bool:
    return any(isinstance(value.get(name), dict) for name in ("window", "over"))


def reader_state_of_rank(
    folder: Path, state: dict[str, Any], rank: int, ranks: int
) -> ReaderState | None:
    """Where this rank continues in a stream. Raises CheckpointError if that depends on the ranks.

    With --stream_sharding by_file it does, except between two epochs.
    """
    readers: list[ReaderState | None] = state["reader_states"]
    by_file = state["must_match"].get("stream_sharding") == "by_file"
    if by_file and state["ranks"] != ranks and not all(each and "over" in each for each in readers):
        raise CheckpointError(
            f"{folder} was written by {state['ranks']} processes with --stream_sharding by_file,"
            f" each in the middle of its own files, but this run has {ranks}. Resume with"
            f" {state['ranks']}, or, with --max_train_steps, from a checkpoint at the end of an"
            " epoch (--save_every '1 epoch')."
        )
    return readers[rank % len(readers)]


@contextmanager
def _explain_steps_by_file(
    folder: Path, state: dict[str, Any], ranks: int, now: ResumeSignature
) -> Iterator[None]:
    """Where other settings are refused: whether it is the number of ranks that makes other steps of
    the same epochs.
    """
    try:
        yield
    except CheckpointError as error:
        steps, own_steps = (x.get("total_steps") for x in (state["must_match"], now.must_match))
        by_file = state["must_match"].get("stream_sharding") == "by_file"
        if not by_file or state["ranks"] == ranks or steps == own_steps:
            raise
        raise CheckpointError(
            f"{error} With --stream_sharding by_file, {state['ranks']} processes make {steps} steps"
            f" of these epochs, and {ranks} make {own_steps}: --max_train_steps {steps} keeps the"
            " length."
        ) from None


def apply_changes(state: TrainState, changes: list[Change], total_steps: int) -> TrainState:
    """The state that training resumes with after accepted changes of settings or data.

    A finished run continues if it has more steps now (total_steps), or if early stopping ended it
    and would not with these settings.
    """
    before = {change.name: change.before for change in changes}
    resets = before.keys() & RESETS_BEST
    if state.finished and state.step < total_steps:
        patience = {change.name: change.now for change in changes}.get("early_stopping_patience", 0)
        count = 0 if resets else state.evaluations_since_best
        lasts = "early_stopping_patience" in before and (patience is None or count < patience)
        more_steps = before.get("total_steps") == state.step
        state = replace(state, finished=not (resets or lasts or more_steps))
    if resets and not state.finished:
        state = replace(state, best_score=None, best_loss=None, evaluations_since_best=0)
    if "training_rows" in before and (reader := state.reader_state):
        # A position within other bytes means nothing: start the epoch again.
        if "over" in reader:
            reader = {"over": {**STREAM_START, "epoch": reader["over"]["epoch"]}}
        else:
            reader = {"window": {**STREAM_START, "epoch": reader["window"]["epoch"]}, "step": 0}
        state = replace(state, reader_state=reader)
    return state


# ---- Tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every weight and persistent buffer once, by name; tied weights under their first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state of each weight, as `name|exp_avg` and so on."""
    return {
        f"{name}|{key}": value
        for name, weight in model.named_parameters()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def load_tensors(target: dict[str, Tensor], source: dict[str, Tensor], folder: Path) -> None:
    """Copy in place. Raises CheckpointError if names, shapes or dtypes differ; then nothing is
    changed.
    """
    different = sorted(target.keys() ^ source.keys()) or sorted(
        name
        for name in target
        if (target[name].shape, target[name].dtype) != (source[name].shape, source[name].dtype)
    )
    if different:
        raise CheckpointError(
            f"{folder} is of another model: {different[0]} differs ({len(different)} in all)."
        )
    for name, tensor in target.items():
        tensor.copy_(source[name])


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, source: dict[str, Tensor], folder: Path
) -> None:
    """Inverse of `optimizer_tensors`. Raises CheckpointError as `load_tensors` does."""
    weights = dict(model.named_parameters())
    for key, value in source.items():
        name, _, entry = key.rpartition("|")
        weight = weights.get(name)
        fits = weight is not None and (
            value.dtype == torch.float32 and value.shape == ()
            if entry == "step"
            else entry in _MOMENTS and (value.shape, value.dtype) == (weight.shape, weight.dtype)
        )
        if not fits or any(f"{name}|{other}" not in source for other in ("step", *_MOMENTS)):
            raise CheckpointError(
                f"{folder} is of another model: its optimizer holds {key!r} of shape"
                f" {tuple(value.shape)} and {str(value.dtype).removeprefix('torch.')}."
            )
    optimizer.state.clear()
    for key, value in source.items():
        name, _, entry = key.rpartition("|")
        optimizer.state[weights[name]][entry] = value.to(weights[name].device)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, on the CPU. Raises CheckpointError."""
    try:
        if problem := safetensors_problem(path):
            raise CheckpointError(f"{path.parent}: {problem}.")
        return load_file(path)
    except (OSError, SafetensorError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"Cannot read {path}: {reason}.") from None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
