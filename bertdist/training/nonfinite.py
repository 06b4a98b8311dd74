"""NaN and Inf in loss or gradient: no weight is ever changed by one, all ranks know, and the rows are named. (--on_nan)

In: a micro-batch's loss, a step's gradient norm. Out: a step that is left out, nan_rows.jsonl, and an error or a line about it.

1. A loss that is not finite makes the whole gradient NaN, whatever its own derivative would be (`nan_aware_scale`): so the exchange of gradients,
   which is there anyway, tells every rank, and the gradient's norm, which all ranks have alike, is the one number to look at.
2. The update is left out where that norm is not finite. On a CPU by looking; on a GPU by fused AdamW's `found_inf`, which its kernel
   reads on the device: nobody waits. In fp16 GradScaler does this, and an overflow of its scale is no fault: there the loss counts, and
   a gradient that is not finite at a scale of 1 or less either.
3. The host looks at every step on a CPU. On a GPU it looks where it waits anyway (log, evaluation, checkpoint), and after 64 steps: until
   then nothing that is not finite has gone into a weight, a checkpoint or best/.
4. A step that was left out is computed again row by row, with its own dropout; rows whose loss or gradient is not finite are written
   down. On a GPU with --on_nan skip the weights are by then those of a few steps later; where no row is found, that is said.
5. With --detect_anomaly the host looks at every step, and a step that was left out is computed once more to find the operation
   (anomaly.py). Nothing of this is a collective that another rank could miss: all ranks leave, or go on, together.

A left-out step is counted as done and its rows as seen: order, learning rate and dropout of all other steps stay what they are.
"""

import json
import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from bertdist.core.atomic_io import atomic_write
from bertdist.core.config import RunConfig
from bertdist.core.errors import NonFiniteError
from bertdist.data.batch import PackedBatch, Step, split_batch
from bertdist.data.sharding import MapLoader
from bertdist.data.source import excerpt
from bertdist.data.streaming import AnyLoader
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.models.cpu_layers import zero_grad
from bertdist.models.dropout import seed_dropout
from bertdist.tasks.tasks import Task
from bertdist.training.anomaly import Anomaly, find_anomaly
from bertdist.training.checkpoint import TrainState
from bertdist.training.evaluation import Evaluation, describe_nonfinite_rows
from bertdist.training.run_logger import RunLogger

MAX_UNCHECKED_STEPS = 64  # on a GPU, at most so many steps until the host looks

SHOWN_ROWS = 3


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether a look at its value waits for no device."""
    return tensor.device.type == "cpu"


def nan_aware_scale(loss: Tensor, scale: float) -> Tensor:
    """() what to multiply a micro-batch's loss with before its backward pass: `scale`, or NaN where the loss is not finite."""
    held = loss.detach()
    return (held - held) + scale  # NaN - NaN and Inf - Inf are NaN


def step_if_finite(
    model: nn.Module, optimizer: Any, grad_norm: Tensor, accelerator: Accelerator
) -> None:
    """optimizer.step(), unless the gradient is not finite; and the gradients are cleared. optimizer: as accelerate prepared it, or bare."""
    finite = not is_on_cpu(grad_norm) or math.isfinite(grad_norm.item())
    if accelerator.scaler is not None:  # it looks itself
        optimizer.step()
    elif not is_on_cpu(grad_norm):
        fused_step_if_finite(optimizer, grad_norm)
    elif finite:
        optimizer.step()
    if not finite:
        model.zero_grad(
            set_to_none=True
        )  # clipping has spread NaN over rows that `zero_grad` would not reach
    zero_grad(model)


def fused_step_if_finite(optimizer: Any, grad_norm: Tensor) -> None:
    """optimizer.step() of fused AdamW, which does nothing where grad_norm () is not finite; nobody waits for the device to say so."""
    getattr(optimizer, "optimizer", optimizer).found_inf = (~torch.isfinite(grad_norm)).float()
    optimizer.step()


class NonFiniteGuard:
    """Looks at the steps that were taken, on all ranks alike. What it counts is in progress, so a restart changes nothing."""

    def __init__(
        self,
        run: RunConfig,
        model: nn.Module,
        batches: AnyLoader,
        task: Task,
        accelerator: Accelerator,
        progress: TrainState,
        log: RunLogger,
    ) -> None:
        """model: the classifier itself, not as DDP wraps it."""
        self.run, self.model, self.batches, self.task = run, model, batches, task
        self.accelerator, self.progress, self.log = accelerator, progress, log
        self._taken: list[tuple[Step, Tensor]] = []

    def check(self, step: Step, loss: Tensor, grad_norm: Tensor, now: bool) -> None:
        """A step was taken; now: whether a host that does not look at every step must look here.

        A collective where a step was left out. Raises NonFiniteError on all ranks: --on_nan stop, or more than --max_nan_steps in a row.
        """
        self._taken.append((step, self._is_wrong(loss, grad_norm)))
        if (
            now
            or is_on_cpu(grad_norm)
            or self.run.detect_anomaly
            or len(self._taken) == MAX_UNCHECKED_STEPS
        ):
            taken, self._taken = self._taken, []
            for (each, _), wrong in zip(
                taken, torch.stack([flag for _, flag in taken]).tolist(), strict=True
            ):
                self.progress.consecutive_nan_steps = (
                    self.progress.consecutive_nan_steps + 1 if wrong else 0
                )
                if wrong:
                    self.progress.nan_steps += 1
                    self._tell(each)

    def check_evaluation(
        self, evaluation: Evaluation | None, batches: MapLoader
    ) -> Evaluation | None:
        """The same evaluation; said where the model gave no number for a row. Raises NonFiniteError on all ranks with --on_nan stop."""
        if evaluation is not None and evaluation.no_number:
            rows = describe_nonfinite_rows(
                evaluation.no_number, len(batches.examples), batches.examples.records.where
            )
            told = f"Evaluation after step {self.progress.step}: {rows}"
            if self.run.on_nan == "stop":
                raise nonfinite_error(f"{told} To go on without its scores: --on_nan skip.")
            self.log.say(f"{told} Its scores count as undefined (--on_nan skip).")
        return evaluation

    def _is_wrong(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() bool, the same on all ranks."""
        infinite, scaler = ~torch.isfinite(grad_norm), self.accelerator.scaler
        if scaler is None:
            return infinite
        flag: Tensor = self.accelerator.reduce((~torch.isfinite(loss)).float(), reduction="sum")
        # Its scale () after the step, on the device (get_scale would wait for it): below 1 where a scale of 1 or less did not help.
        wrong: Tensor = (flag > 0) | (infinite & (scaler._scale < 1))
        return wrong

    def _tell(self, step: Step) -> None:
        rows = self._wrong_rows(step)
        operation = self._operation(step) if self.run.detect_anomaly else ""
        path = Path(self.run.output_dir) / "nan_rows.jsonl"
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                _write(path, step.number + 1, rows)
        shown = "; ".join(
            f"{row['where']} (loss {row['loss']}, gradient {row['grad_norm']})"
            for row in rows[:SHOWN_ROWS]
        )
        more = f"; and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        which = (
            f"of its {step.rows} rows: {shown}{more}; see {path}"
            if rows
            else f"of none of its {step.rows} rows alone"
        )
        told = f"Step {step.number + 1}: the loss or the gradient is NaN or infinite, {which}.{operation}"
        in_row, most = self.progress.consecutive_nan_steps, self.run.max_nan_steps
        if self.run.on_nan == "skip" and in_row <= most:
            self.log.say(f"{told} Its update is left out (--on_nan skip).")
            self.log.write("nan", step.number + 1, rows=[row["row"] for row in rows], in_row=in_row)
            return
        why = (
            f"It is number {in_row} in a row (--max_nan_steps {most}). "
            if self.run.on_nan == "skip"
            else ""
        )
        cure = "Look at the rows, take a smaller --learning_rate, or leave such steps out: --on_nan skip."
        more = "" if operation else " --detect_anomaly names the operation."
        raise nonfinite_error(
            f"{told} {why}No weight has changed by it, and the last checkpoint is whole. {cure}{more}"
        )

    def _wrong_rows(self, step: Step) -> list[dict[str, Any]]:
        """The rows of a step whose own loss or gradient is not finite, of all ranks, in the order of the rows. A collective."""
        seed_dropout(self.run.seed, step.number, self.accelerator.process_index)
        found: list[dict[str, Any]] = []
        for batch in () if step.idle else split_batch(step.share, 1):  # one text each
            batch = batch.to(self.accelerator.device)
            loss = self._loss(batch)
            loss.backward()
            grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            values = [loss.item(), torch.nn.utils.get_total_norm(grads).item()]
            self._clear()
            if not all(map(math.isfinite, values)):
                text = excerpt(str(self.batches.examples.tokenizer.decode(batch.ids)))
                row = int(batch.rows[0])
                found.append(
                    {
                        "row": row,
                        "where": "",
                        "text": text,
                        "loss": values[0],
                        "grad_norm": values[1],
                    }
                )
        for told, where in zip(
            found, self.batches.where([told["row"] for told in found], step.place), strict=True
        ):
            told["where"] = where
        every = gather_object(found) if self.accelerator.num_processes > 1 else found
        return sorted(every, key=lambda row: int(row["row"]))

    def _operation(self, step: Step) -> str:
        """Which operation made it, of the first rank that finds one, in a sentence; rank 0 writes the stacks of all. A collective."""
        seed_dropout(self.run.seed, step.number, self.accelerator.process_index)
        mine: Anomaly | None = None
        for batch in () if step.idle else step.share:
            batch = batch.to(self.accelerator.device)
            mine = mine or find_anomaly(partial(self._loss, batch))
            self._clear()
        every = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        found = {rank: anomaly for rank, anomaly in enumerate(every) if anomaly is not None}
        if not found:
            return " Computed again it is finite, or only its gradient is infinite, so no operation is named."
        path = Path(self.run.output_dir) / "stacks" / f"nan_step_{step.number + 1:06d}.txt"
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                with suppress(OSError):  # atomic_write will tell
                    path.parent.mkdir(exist_ok=True)
                texts = [
                    f"rank {rank}: {anomaly}\n{anomaly.stack}\n" for rank, anomaly in found.items()
                ]
                atomic_write(path, "\n".join(texts).encode())
        first, anomaly = next(iter(found.items()))
        return f" It comes from rank {first}: {anomaly}; its stack stands in {path}."

    def _loss(self, batch: PackedBatch) -> Tensor:
        return self.task.loss(self.model(batch), batch.targets, batch.weights)

    def _clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        zero_grad(self.model)


def nonfinite_error(text: str) -> NonFiniteError:
    """One that all ranks raise."""
    error = NonFiniteError(text)
    error.on_all_ranks = True
    return error


def _write(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Add the rows of a step to nan_rows.jsonl, and take back what an earlier start said of this step and of later ones."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] < step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    told = (
        {"step": step, **row, **{name: _number(row[name]) for name in ("loss", "grad_norm")}}
        for row in rows
    )
    lines += [json.dumps(row, ensure_ascii=False).encode() for row in told]
    atomic_write(path, b"".join(line + b"\n" for line in lines))


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
