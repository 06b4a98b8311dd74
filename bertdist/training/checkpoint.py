"""A run's state on disk: all that the next step depends on, whole or absent.

    out/checkpoints/step_000400/    model.safetensors  optimizer.safetensors  state.json  manifest.json

0. The log's lines are flushed to the disk: after a power cut there is no checkpoint that knows of lines which are not there.
1. Everything is written to `.step_000400.partial` beside it, each file flushed to the disk.
2. manifest.json comes last: size and xxh3 digest of each file. The folder is flushed, renamed, and its parent flushed.
3. On start the newest folder whose files match its manifest is taken; a damaged one is named, moved aside and passed over.
Order of rows, learning rate and dropout are pure functions of the step, so there is no state of samplers, schedules or random
generators to keep, and none of a rank's own: rank 0 writes, all ranks read. No pickle is written or read.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertdist.core.atomic_io import (
    explain_write_errors,
    find_damage,
    recover,
    remove_folder,
    unused_path,
    write_folder,
)
from bertdist.core.errors import CheckpointError
from bertdist.data.batch import Step
from bertdist.data.source import ReaderState
from bertdist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from bertdist.training.resume_check import (
    BREAKS_BEST,
    FIELD_KEYS,
    Change,
    ResumeSignature,
    compare,
    read_state,
    reader_state_after_change,
    reader_state_of_rank,
    table,
)


@dataclass
class TrainState:
    """How far training has come: with weights and optimizer all that the next step depends on."""

    step: int = 0  # optimizer steps done
    rows: int = 0  # rows seen, all ranks together
    tokens: int = 0  # real tokens seen up to the last log line, all ranks together
    best_score: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    tokens_per_micro_batch: int = 0  # requested or measured, halved where memory ran out; 0: unset
    tokens_requested: int = 0  # the --tokens_per_micro_batch that it came from; 0: measured
    oom_retries: int = 0  # steps that were repeated because memory ran out
    nan_steps: int = 0  # that were left out because loss or gradient was not finite
    consecutive_nan_steps: int = 0  # of those, the last ones in a row
    finished: bool = False
    # The evaluation after this step was interrupted by a stop; the next start catches up first.
    evaluation_pending: bool = False
    # [loss sum, rows] of each step since the last log line
    unlogged_steps: list[list[float]] = field(default_factory=list)
    # Of a stream: its position; with --stream_sharding by_file, this rank's.
    reader_state: ReaderState | None = None

    def advance(self, step: Step) -> None:
        """Count one more optimizer step; its loss is filled in when the ranks' losses are gathered."""
        self.step, self.rows, self.reader_state = step.number + 1, self.rows + step.rows, step.after
        self.unlogged_steps.append([0.0, float(step.rows)])

    def epochs(self, steps_per_epoch: int) -> float:
        """Passes over the rows; complete ones only where steps_per_epoch is 0 (a stream's length is unknown)."""
        if steps_per_epoch:
            return self.step / steps_per_epoch
        position = self.reader_state
        return float((position.get("window") or position["over"])["epoch"]) if position else 0.0


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        signature: ResumeSignature,
        accelerator: Accelerator,
        keep: int,
        say: Callable[..., None],
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """first: what rank 0 does before it writes a checkpoint: bring to the disk what the checkpoint will know of."""
        self.folder, self.signature, self.accelerator, self.keep, self.say, self.first = (
            folder,
            signature,
            accelerator,
            keep,
            say,
            first,
        )

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: TrainState,
    ) -> None:
        """Write step_<progress.step>; raises CheckpointError on all ranks where rank 0 cannot. A collective."""
        places = (
            gather_object([progress.reader_state])
            if self.accelerator.num_processes > 1
            else [progress.reader_state]
        )
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                scaler = (
                    self.accelerator.scaler.state_dict()
                    if self.accelerator.scaler is not None
                    else None
                )
                state = {
                    "progress": {FIELD_KEYS.get(k, k): v for k, v in asdict(progress).items()},
                    "identity": self.signature.must_match,
                    "besides": self.signature.may_change,
                    "scaler": scaler,
                }
                state["ranks"] = self.accelerator.num_processes
                state["places"] = (
                    places if any(place != places[0] for place in places) else places[:1]
                )

                def fill(folder: Path) -> None:
                    save_file(_contiguous(model_tensors(model)), folder / "model.safetensors")
                    save_file(
                        _contiguous(optimizer_tensors(model, optimizer)),
                        folder / "optimizer.safetensors",
                    )
                    (folder / "state.json").write_text(json.dumps(state, indent=1))

                self.first()
                written = self.folder / f"step_{progress.step:06d}"
                write_folder(written, fill)
                others = [
                    folder for folder in self._all() if folder != written
                ]  # an older one may have been gone on from
                for old in others[: max(0, len(others) - self.keep + 1)]:
                    remove_folder(old)

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        named: str | None = None,
    ) -> TrainState | None:
        """Load the checkpoint `named`, or the newest whole one; None when there is none. Raises CheckpointError."""
        with raise_on_all_ranks(self.accelerator):
            chosen = self._choose(named) if self.accelerator.is_main_process else None
        chosen = broadcast_from_rank0(self.accelerator, chosen)
        if not chosen:
            return None
        folder = Path(chosen)
        with raise_on_all_ranks(self.accelerator):
            if not (folder / "state.json").exists():
                raise CheckpointError(
                    f"{folder} is not to be seen from here; --output_dir must be on a disk that every machine shares."
                )
            state, progress = read_state(folder, TrainState)
            # First, what is wrong with other ranks: they may also make another number of steps.
            place = reader_state_of_rank(
                folder, state, self.accelerator.process_index, self.accelerator.num_processes
            )
            accepted = compare(folder, state, self.signature)
            load_tensors(model_tensors(model), _load(folder / "model.safetensors"), folder)
            load_optimizer(model, optimizer, _load(folder / "optimizer.safetensors"), folder)
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        progress = _after(
            replace(progress, reader_state=reader_state_after_change(place, accepted)), accepted
        )
        self.say(f"Going on from {folder} at step {progress.step}.")
        if accepted:
            self.say("Other settings than when it was written:", *table(accepted))
        if state["ranks"] != self.accelerator.num_processes:
            own_files = self.signature.must_match.get("stream_sharding") == "by_file"
            rows = (
                "each epoch has the same rows, in other steps"
                if own_files
                else "the same rows in the same steps"
            )
            self.say(
                f"It was written by {state['ranks']} processes, now there are {self.accelerator.num_processes}: {rows}; "
                "sums are rounded in another order, and off the CPU dropout is drawn anew."
            )
        return progress

    def _choose(self, named: str | None) -> str:
        for replaced in self.folder.glob(".step_*.replaced"):
            recover(self.folder / replaced.name[1:].removesuffix(".replaced"))
        for left_over in self.folder.glob(".step_*"):
            left = "removed" if left_over.suffix == ".old" else "written"
            self.say(f"Removing {left_over.name}, a checkpoint that was not {left} to its end.")
            with explain_write_errors(left_over, "remove or rename"):
                shutil.rmtree(left_over)
        if named is not None:
            if damage := find_damage(Path(named)):
                raise CheckpointError(f"--resume_from_checkpoint {named}: {damage}.")
            return named
        for folder in reversed(self._all()):
            damage = find_damage(folder)
            if damage is None:
                return str(folder)
            aside = unused_path(folder.with_name(f"{folder.name}.damaged"))
            with explain_write_errors(folder, "remove or rename"):
                os.rename(folder, aside)
            self.say(f"Passing over checkpoint {folder}: {damage}. It is now {aside.name}.")
        return ""

    def _all(self) -> list[Path]:
        try:
            found = [path for path in self.folder.glob("step_*") if path.name[5:].isdigit()]
        except OSError as error:
            raise CheckpointError(
                f"Cannot read {self.folder}: {error.strerror or error}."
            ) from None
        return sorted(found, key=lambda path: int(path.name[5:]))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every weight and kept buffer once, by name; tied weights under their first name."""
    shared: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in shared:
            shared.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state of each weight, as `name|exp_avg` and so on."""
    named = dict(model.named_parameters())
    return {
        f"{name}|{key}": value
        for name, weight in named.items()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def load_tensors(into: dict[str, Tensor], found: dict[str, Tensor], folder: Path) -> None:
    """Copy in place; raises CheckpointError where names or shapes differ."""
    if odd := sorted(into.keys() ^ found.keys()) or sorted(
        name for name in into if into[name].shape != found[name].shape
    ):
        raise CheckpointError(
            f"{folder} is of another model: {odd[0]} differs ({len(odd)} weights in all)."
        )
    for name, tensor in into.items():
        tensor.copy_(found[name])


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, found: dict[str, Tensor], folder: Path
) -> None:
    """The inverse of `optimizer_tensors`; raises CheckpointError, and changes nothing, where a name or a shape does not fit."""
    named = dict(model.named_parameters())
    parts = [(*key.rpartition("|")[::2], value) for key, value in found.items()]
    for (name, _, value), key in zip(parts, found, strict=True):
        if name not in named or value.shape not in (named[name].shape, ()):
            raise CheckpointError(
                f"{folder} is of another model: its optimizer holds {key!r} of shape {tuple(value.shape)}."
            )
    optimizer.state.clear()
    for name, part, value in parts:
        optimizer.state[named[name]][part] = value.to(named[name].device)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {getattr(error, 'strerror', None) or error}."
        ) from None


def _after(progress: TrainState, accepted: list[Change]) -> TrainState:
    """What the changes that are accepted do to a run's memory."""
    then = {change.name: change.then for change in accepted}
    if then.keys() & BREAKS_BEST:
        progress = replace(progress, best_score=None, evaluations_since_best=0)
    goes_on = (
        then.get("total_steps") == progress.step
    )  # it had come to its end, and there are more steps now
    return replace(progress, finished=False) if goes_on else progress


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
