"""NaN and Inf in a loss or gradient (--on_nan): they change no weight, all ranks learn of them at
the same step, and the rows that cause them are named in nan_rows.jsonl.

1. A non-finite loss makes the whole gradient NaN, whatever its own derivative would be
   (`nan_aware_scale`). So the gradient exchange, which happens anyway, informs every rank, and the
   gradient norm, which is the same on all ranks, is the only number to check.
2. The optimizer step is skipped if that norm is not finite (optimizer.py, `apply_update`): by an
   `if` on a CPU, on a GPU by fused AdamW's `found_inf`, which the kernel reads on the device
   without a host sync. In fp16 GradScaler does this, and an overflow of its scale is not an error:
   there the loss decides, and a gradient that is still not finite at a scale of 1 or less.
3. On a CPU the host checks every step. On a GPU it checks where it waits anyway (log, evaluation,
   checkpoint), and after 64 steps; until then no weight, checkpoint or best/ has been affected.
4. A skipped step is computed again row by row with the same dropout, and the rows whose loss or
   gradient is not finite are written down. On a GPU with --on_nan skip the weights are then those
   of a few steps later; a message says if no row is found.
5. With --detect_anomaly the host checks every step, and a skipped step is computed once more to
   name the operation (`find_anomaly`).

All ranks stop or continue together. A skipped step counts as done and its rows as seen, so order,
learning rate and dropout of all other steps stay the same.
"""

import json
import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bertdist.core.atomic_io import atomic_write
from bertdist.core.config import RunConfig
from bertdist.core.errors import NonFiniteError
from bertdist.data.bad_rows import escaped_excerpt
from bertdist.data.batch import PackedBatch, RankStep, split_batch
from bertdist.data.loader import Loader
from bertdist.distributed.collectives import gather_from_all_ranks, raise_on_all_ranks
from bertdist.models.cpu_layers import zero_grad
from bertdist.models.dropout import seed_dropout
from bertdist.tasks.tasks import Task
from bertdist.training.checkpoint import TrainState
from bertdist.training.optimizer import is_on_cpu
from bertdist.training.run_logger import RunLogger

MAX_UNCHECKED_STEPS = 64  # on a GPU
MAX_ROWS_IN_MESSAGE = 3
TORCH_FOLDER = str(Path(torch.__file__).parent)

# (operation and line of code, as a sentence; the Python stack of its call in the forward pass)
Anomaly: TypeAlias = tuple[str, str]


def nan_aware_scale(loss: Tensor, scale: float) -> Tensor:
    """() factor for a micro-batch's loss before backward: `scale`, or NaN if loss is not finite."""
    detached = loss.detach()
    return (detached - detached) + scale  # NaN - NaN and Inf - Inf are NaN


class NonFiniteGuard:
    """Checks steps, with the same result on all ranks; counts in `TrainState`."""

    def __init__(
        self,
        run: RunConfig,
        model: nn.Module,
        batches: Loader,
        task: Task,
        accelerator: Accelerator,
        state: TrainState,
        log: RunLogger,
    ) -> None:
        """model: the classifier without DDP's wrapper."""
        self.run, self.model, self.batches, self.task = run, model, batches, task
        self.accelerator, self.state, self.log = accelerator, state, log
        self._unchecked: list[tuple[RankStep, Tensor]] = []  # and whether it was skipped, () bool

    def check(self, step: RankStep, loss: Tensor, grad_norm: Tensor, now: bool) -> None:
        """After each step. now: check here even if that waits for the device.

        A collective if a step was skipped. Raises NonFiniteError on all ranks with --on_nan stop,
        or after more than --max_nan_steps consecutive skipped steps.
        """
        self._unchecked.append((step, self._is_skipped(loss, grad_norm)))
        full = len(self._unchecked) == MAX_UNCHECKED_STEPS
        if not (now or full or is_on_cpu(grad_norm) or self.run.detect_anomaly):
            return
        steps, flags = zip(*self._unchecked, strict=True)
        self._unchecked = []
        for each, skipped in zip(steps, torch.stack(flags).tolist(), strict=True):
            state = self.state
            state.consecutive_nan_steps = state.consecutive_nan_steps + 1 if skipped else 0
            if skipped:
                state.nan_steps += 1
                self._report(each)

    def check_end(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise NonFiniteError on all ranks if the run ends and no step has changed a weight.

        AdamW counts its updates, also where a GPU or fp16's GradScaler has left some out.
        """
        entries = list(optimizer.state.values())
        if self.state.finished and not (entries and float(entries[0]["step"]) > 0):
            raise nonfinite_error(
                f"Nothing was trained: each of the {self.state.step} steps was skipped, as its "
                "loss or gradient was NaN or infinite. Inspect nan_rows.jsonl, or use a smaller "
                "--learning_rate; fp16 needs more steps than these (--mixed_precision bf16 does "
                "not)."
            )

    def _is_skipped(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() bool, the same on all ranks."""
        infinite, scaler = ~torch.isfinite(grad_norm), self.accelerator.scaler
        if scaler is None:
            return infinite
        ranks: Tensor = self.accelerator.reduce((~torch.isfinite(loss)).float(), reduction="sum")
        # `_scale` () is on the device, where get_scale would wait for it. After a step it is below
        # 1 only if a scale of 1 or less still overflowed.
        skipped: Tensor = (ranks > 0) | (infinite & (scaler._scale < 1))
        return skipped

    def _report(self, step: RankStep) -> None:
        """Log a skipped step and its rows, or raise NonFiniteError. A collective."""
        number, rows = step.number + 1, self._nonfinite_rows(step)
        operation = self._name_operation(step) if self.run.detect_anomaly else ""
        path = Path(self.run.output_dir) / "nan_rows.jsonl"
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                write_rows(path, number, rows)
        shown = [
            f"{row['where']} (loss {row['loss']}, gradient {row['grad_norm']})"
            for row in rows[:MAX_ROWS_IN_MESSAGE]
        ]
        if len(rows) > len(shown):
            shown.append(f"and {len(rows) - len(shown)} more")
        cause = f"in none of its {step.rows} rows alone"
        if rows:
            cause = f"in these of its {step.rows} rows: {'; '.join(shown)}; see {path}"
        message = f"Step {number}: the loss or gradient is NaN or infinite, {cause}.{operation}"
        consecutive, limit = self.state.consecutive_nan_steps, self.run.max_nan_steps
        if self.run.on_nan == "skip" and consecutive <= limit:
            self.log.say(f"{message} The step is skipped (--on_nan skip).")
            numbers = [row["row"] for row in rows]
            self.log.write("nan", number, rows=numbers, in_row=consecutive)
            return
        if self.run.on_nan == "skip":
            message += f" Consecutive skipped steps: {consecutive} (--max_nan_steps {limit})."
        message += (
            " No weight was changed by it, and the last checkpoint is intact. Inspect the rows, use"
            " a smaller --learning_rate, or skip such steps with --on_nan skip."
        )
        hint = "" if self.run.detect_anomaly else " --detect_anomaly names the operation."
        raise nonfinite_error(message + hint)

    def _nonfinite_rows(self, step: RankStep) -> list[dict[str, Any]]:
        """Rows of all ranks whose loss or gradient is not finite, in row order. A collective."""
        seed_dropout(self.run.seed, step.number, self.accelerator.process_index)
        rows: list[dict[str, Any]] = []
        for batch in () if step.idle else split_batch(step.micro_batches, 1):  # one text each
            batch = batch.to(self.accelerator.device)
            loss = self._loss(batch)
            loss.backward()
            grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            numbers = {"loss": loss.item(), "grad_norm": nn.utils.get_total_norm(grads).item()}
            self._clear_gradients()
            if not all(map(math.isfinite, numbers.values())):
                text = escaped_excerpt(str(self.batches.dataset.tokenizer.decode(batch.ids)))
                rows.append(
                    {"row": int(batch.row_numbers[0]), "where": "", "text": text, **numbers}
                )
        locations = self.batches.locations([row["row"] for row in rows], step.window_state)
        for row, location in zip(rows, locations, strict=True):
            row["where"] = location
        gathered = gather_from_all_ranks(self.accelerator, rows)
        return sorted(gathered, key=lambda row: int(row["row"]))

    def _name_operation(self, step: RankStep) -> str:
        """A sentence on the anomaly of the first rank that has one. A collective.

        Rank 0 writes the stacks of all ranks to stacks/nan_step_N.txt.
        """
        seed_dropout(self.run.seed, step.number, self.accelerator.process_index)
        anomaly: Anomaly | None = None
        for batch in () if step.idle else step.micro_batches:
            batch = batch.to(self.accelerator.device)
            anomaly = anomaly or find_anomaly(partial(self._loss, batch))
            self._clear_gradients()
        gathered = gather_from_all_ranks(self.accelerator, [anomaly])
        anomalies = {rank: each for rank, each in enumerate(gathered) if each is not None}
        if not anomalies:
            return (
                " No operation is named: computed again it is finite, or only the gradient is"
                " infinite."
            )
        path = Path(self.run.output_dir) / "stacks" / f"nan_step_{step.number + 1:06d}.txt"
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                with suppress(OSError):  # atomic_write raises it as a CheckpointError
                    path.parent.mkdir(exist_ok=True)
                stacks = [f"rank {rank}: {each[0]}\n{each[1]}" for rank, each in anomalies.items()]
                atomic_write(path, "\n".join(stacks).encode())
        rank, (operation, _) = next(iter(anomalies.items()))
        return f" Rank {rank}: {operation}; stack in {path}."

    def _loss(self, batch: PackedBatch) -> Tensor:
        return self.task.loss(self.model(batch), batch.targets, batch.weights)

    def _clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        zero_grad(self.model)


def nonfinite_error(message: str) -> NonFiniteError:
    """A NonFiniteError that all ranks raise at the same point, so that one of them prints it."""
    error = NonFiniteError(message)
    error.on_all_ranks = True
    return error


def write_rows(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Append a step's rows to nan_rows.jsonl, dropping lines of this and later steps.

    Such lines are left by a run that was killed after its last checkpoint.
    """
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] < step:
                lines.append(line)
    for row in rows:
        # JSON has no NaN
        numbers = {
            name: row[name] if math.isfinite(row[name]) else str(row[name])
            for name in ("loss", "grad_norm")
        }
        lines.append(json.dumps({"step": step, **row, **numbers}, ensure_ascii=False).encode())
    atomic_write(path, b"".join(line + b"\n" for line in lines))


# ---- --detect_anomaly


def find_anomaly(compute: Callable[[], Tensor]) -> Anomaly | None:
    """The first operation that makes NaN, or Inf of finite numbers; None if there is none.

    compute: returns a loss () with a gradient; called once. Gradients stay in the parameters. The
    forward pass is searched by `_AnomalyMode`, the backward pass by torch's anomaly mode, which
    sees NaN only.
    """
    forward = _AnomalyMode()
    # To torch a compiled layer is one operation: run it eagerly.
    with torch.compiler.set_stance("force_eager"), torch.autograd.set_detect_anomaly(True):
        with forward, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = compute()
        if forward.anomaly:
            return forward.anomaly
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                loss.backward()
            except RuntimeError as error:
                # torch 2.13: "Function 'SqrtBackward0' returned nan values in its 0th output.",
                # and a warning with the stack of the forward call.
                function = re.search(r"Function '(\w+)' returned nan values", str(error))
                if function is None:
                    raise
                texts = [str(warning.message) for warning in caught]
                stacks = [text for text in texts if "Traceback of forward call" in text]
                stack = stacks[0].partition("\n")[2] if stacks else ""
                return _describe("NaN", function[1], "backward", stack), stack
    return None


class _AnomalyMode(TorchDispatchMode):
    """Records the first operation that makes NaN, else the first that makes Inf of finite ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.anomaly: Anomaly | None = None
        self._nan = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _nonfinite_kinds((args, kwargs))  # before the call: it may write in place
        out = func(*args, **(kwargs or {}))
        if not self._nan and "empty" not in str(func):  # whose memory is uninitialized
            self._nan = "NaN" in (new := _nonfinite_kinds(out) - inputs)
            # A NaN replaces an Inf, which may be meant: a mask.
            if self._nan or (new and not inputs and self.anomaly is None):
                stack = "".join(traceback.format_stack(sys._getframe(1)))
                kind = "NaN" if self._nan else "Inf"
                before = f"{self.anomaly[0]}; then " if self.anomaly else ""
                operation = _describe(kind, str(func.overloadpacket), "forward", stack)
                self.anomaly = before + operation, stack
        return out


def _nonfinite_kinds(values: Any) -> set[str]:
    """Which of NaN and Inf the tensors in nested values hold; "constant" for a non-finite float."""
    kinds = set()
    for leaf in tree_leaves(values):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            kinds.add("constant")  # such as the -inf of a mask
        elif isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            kinds |= {"NaN"} if leaf.isnan().any() else set()
            kinds |= {"Inf"} if leaf.isinf().any() else set()
    return kinds


def _describe(kind: str, operation: str, direction: str, stack: str) -> str:
    """With the innermost line of the stack outside of torch."""
    frames = re.findall(r'^  File "(.+)", line (\d+), in (.+)$', stack, re.MULTILINE)
    frames = [frame for frame in frames if not frame[0].startswith(TORCH_FOLDER)]
    where = ""
    if frames:
        file, line, function = frames[-1]
        where = f" ({Path(file).name}, line {line}, in {function})"
    return f"{operation} in the {direction} pass makes the first {kind}{where}"
