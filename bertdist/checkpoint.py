"""A run's state on disk: all that the next step depends on, whole or absent.

    out/checkpoints/step_000400/    model.safetensors  optimizer.safetensors  state.json  manifest.json

1. Everything is written to `.step_000400.partial` beside it, each file flushed to the disk.
2. manifest.json comes last: size and xxh3 digest of each file. The folder is flushed, renamed, and its parent flushed.
3. On start the newest folder whose files match its manifest is taken; a damaged one is named, moved aside and passed over.
Order of rows, learning rate and dropout are pure functions of the step, so there is no state of samplers, schedules or random
generators to keep, and none of a rank's own: rank 0 writes, all ranks read. No pickle is written or read.

xxh3 runs at 9 GB/s (sha256 at 0.2); it finds damage, not forgery.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertdist.errors import CheckpointError
from bertdist.pieces import Place
from bertdist.ranks import from_main, together


@dataclass
class Progress:
    """How far a run has come; what state.json holds besides."""

    step: int = 0  # optimizer steps done
    rows: int = 0  # rows seen, all ranks together
    tokens: int = 0  # real tokens seen up to the last log line, all ranks together
    best_score: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    tokens_per_micro_batch: int = 0  # as asked or found, and as halved since; 0: not known yet
    tokens_asked: int = 0  # the --tokens_per_micro_batch that it came from; 0: found
    halvings: int = 0  # steps that were taken again because memory ran out
    finished: bool = False
    owed: bool = False  # the evaluation of this step was given up, to stop; it comes first when the run goes on
    window: list[list[float]] = field(default_factory=list)  # [loss sum, rows] of each step since the last log line
    place: Place | None = None  # of a stream: where its reading stands; with --stream_split files, this rank's

    def count(self, step: int, rows: int, place: Place | None) -> None:
        """One more step of so many rows; its loss is filled in when the ranks bring them together."""
        self.step, self.rows, self.place = step, self.rows + rows, place
        self.window.append([0.0, float(rows)])

    def epochs(self, per_epoch: int) -> float:
        """Passes over the rows; whole ones only, where per_epoch is 0: nobody knows how long a stream is."""
        if per_epoch:
            return self.step / per_epoch
        return float((self.place.get("window") or self.place["over"])["epoch"]) if self.place else 0.0


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int, say: Callable[[str], None]) -> None:
        self.folder, self.accelerator, self.keep, self.say = folder, accelerator, keep, say

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, identity: dict[str, Any]) -> None:
        """Write step_<progress.step>; raises CheckpointError on all ranks where rank 0 cannot. A collective."""
        places = gather_object([progress.place]) if self.accelerator.num_processes > 1 else [progress.place]
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
                state = {"progress": asdict(progress), "identity": identity, "ranks": self.accelerator.num_processes, "scaler": scaler}
                state["places"] = places if any(place != places[0] for place in places) else places[:1]

                def fill(folder: Path) -> None:
                    save_file(_contiguous(model_tensors(model)), folder / "model.safetensors")
                    save_file(_contiguous(optimizer_tensors(model, optimizer)), folder / "optimizer.safetensors")
                    (folder / "state.json").write_text(json.dumps(state, indent=1))

                written = self.folder / f"step_{progress.step:06d}"
                write_folder(written, fill)
                others = [folder for folder in self._all() if folder != written]  # an older one may have been gone on from
                for old in others[: max(0, len(others) - self.keep + 1)]:
                    _at(old, shutil.rmtree)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], named: str | None) -> Progress | None:
        """Load the checkpoint `named`, or the newest whole one; None when there is none. Raises CheckpointError."""
        with together(self.accelerator):
            chosen = self._choose(named) if self.accelerator.is_main_process else None
        chosen = from_main(self.accelerator, chosen)
        if not chosen:
            return None
        folder = Path(chosen)
        with together(self.accelerator):
            if not (folder / "state.json").exists():
                raise CheckpointError(f"{folder} is not to be seen from here; --output_dir must be on a disk that every machine shares.")
            state = json.loads((folder / "state.json").read_text())
            # First, what is wrong with other ranks: they may also make another number of steps.
            place = _place_of_rank(folder, state, self.accelerator.process_index, self.accelerator.num_processes)
            _same_run(folder, state["identity"], identity)
            load_tensors(model_tensors(model), load_file(folder / "model.safetensors"), folder)
            load_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        progress = replace(Progress(**state["progress"]), place=place)
        self.say(f"Going on from {folder} at step {progress.step}.")
        if state["ranks"] != self.accelerator.num_processes:
            own_files = identity.get("stream_split") == "files"
            rows = "each epoch has the same rows, in other steps" if own_files else "the same rows in the same steps"
            self.say(
                f"It was written by {state['ranks']} processes, now there are {self.accelerator.num_processes}: {rows}; "
                "sums are rounded in another order, and off the CPU dropout is drawn anew."
            )
        return progress

    def _choose(self, named: str | None) -> str:
        for replaced in self.folder.glob(".step_*.replaced"):  # stopped between the two renames of write_folder
            if not (whole := self.folder / replaced.name[1:].removesuffix(".replaced")).exists():
                _at(replaced, partial(os.rename, dst=whole))
        for left_over in self.folder.glob(".step_*"):
            self.say(f"Removing {left_over.name}, a checkpoint that was not written to its end.")
            _at(left_over, shutil.rmtree)
        if named is not None:
            if damage := damage_of(Path(named)):
                raise CheckpointError(f"--resume_from_checkpoint {named}: {damage}.")
            return named
        for folder in reversed(self._all()):
            damage = damage_of(folder)
            if damage is None:
                return str(folder)
            aside = _free_name(folder.with_name(f"{folder.name}.damaged"))
            _at(folder, partial(os.rename, dst=aside))
            self.say(f"Passing over checkpoint {folder}: {damage}. It is now {aside.name}.")
        return ""

    def _all(self) -> list[Path]:
        found = [path for path in self.folder.glob("step_*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is whole or absent: fill a hidden one beside it, add the manifest, flush, rename. Raises CheckpointError."""
    beside = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        fill(beside)
        files = sorted(path for path in beside.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(beside)): {"bytes": path.stat().st_size, "xxh3_128": _digest(path)} for path in files}
        (beside / "manifest.json").write_text(json.dumps({"format": 1, "files": manifest}, indent=1))
        for path in [*files, beside / "manifest.json", beside]:
            _flush(path)
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.rename(final, replaced)
        try:
            os.rename(beside, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        _flush(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"Cannot write {final}: {reason}. What was there before is untouched.") from None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file is as its manifest says."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())["files"]
        expected = {name: (int(entry["bytes"]), str(entry["xxh3_128"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        if name not in expected:
            return f"manifest.json does not name {name}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if _digest(path) != digest:
            return f"{name} is not what was written (its digest differs)"
    return None


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
    return {f"{name}|{key}": value for name, weight in named.items() for key, value in optimizer.state.get(weight, {}).items()}


def load_tensors(into: dict[str, Tensor], found: dict[str, Tensor], folder: Path) -> None:
    """Copy in place; raises CheckpointError where names or shapes differ."""
    if odd := sorted(into.keys() ^ found.keys()) or sorted(name for name in into if into[name].shape != found[name].shape):
        raise CheckpointError(f"{folder} is of another model: {odd[0]} differs ({len(odd)} weights in all).")
    for name, tensor in into.items():
        tensor.copy_(found[name])


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, found: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    named = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in found.items():
        name, part = key.rsplit("|", 1)
        optimizer.state[named[name]][part] = value.to(named[name].device)


def _same_run(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        raise CheckpointError(
            f"{folder} belongs to another run. What differs: {'; '.join(changed)}. Take the old settings, or another --output_dir."
        )


def _place_of_rank(folder: Path, state: dict[str, Any], rank: int, ranks: int) -> Place | None:
    """Where this rank's reading of a stream goes on. Between two passes that is the same for any number of ranks that read own files."""
    places: list[Place | None] = state.get("places", [None])  # versions before streams wrote none
    own_files = state["identity"].get("stream_split") == "files"
    if own_files and state["ranks"] != ranks and not all(place and "over" in place for place in places):
        raise CheckpointError(
            f"{folder} was written by {state['ranks']} processes with --stream_split files, each in the middle of its own files, and now "
            f"there are {ranks}. Go on with {state['ranks']}, or, in a run of --max_train_steps, from a checkpoint at the end of an epoch "
            "(--save_every '1 epoch')."
        )
    return places[rank % len(places)]


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _at(folder: Path, change: Callable[[Path], object]) -> None:
    try:
        change(folder)
    except OSError as error:
        raise CheckpointError(f"Cannot remove or rename {folder}: {error.strerror or error}.") from None


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
