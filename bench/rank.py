"""One rank of bench.faults: bertdist.train with a log of every step, and standard error in a file.

    RANK=0 WORLD_SIZE=1 python -m bench.rank --output_dir OUT ...   # what launchers start

OUT/stderr_N.log is its standard error, OUT/steps_N.log has one line per step with loss and gradient
norm in hex, OUT/rows_N.log one with the rows of this rank. With STOP_BEFORE_STEP=7 in its
environment the rank asks for a stop in step 7. bench.attempts calls `run_rank` in a forked process;
a launcher starts this module.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def run_rank(arguments: Sequence[str], rank: int, out: Path) -> NoReturn:
    """Train, and end the process with the exit code of bertdist.train."""
    code: Any = 1
    with (
        open(out / f"stderr_{rank}.log", "a", buffering=1, encoding="utf-8") as stderr,
        open(out / f"steps_{rank}.log", "a") as steps,
        open(out / f"rows_{rank}.log", "a") as rows,
    ):
        os.dup2(stderr.fileno(), 2)
        sys.stderr = stderr
        try:
            code = _trained(arguments, steps, rows)
        except BaseException:
            traceback.print_exc()
    os._exit(code if isinstance(code, int) else 1)


def _trained(arguments: Sequence[str], steps: Any, rows: Any) -> Any:
    import torch

    from bertdist import cli

    # The module, patched in this process only; `bertdist.train` is the function.
    train: Any = importlib.import_module("bertdist.train")
    torch.set_num_threads(1)
    throughput: Any = importlib.import_module("bertdist.training.throughput")
    throughput.matmul_rate = lambda device, precision: 1e12
    train_step, stop = train.train_step, int(os.environ.get("STOP_BEFORE_STEP", "-1"))

    def logged(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
        if step.number == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        numbers = [row for x in step.micro_batches for row in x.row_numbers.tolist() if row >= 0]
        print(step.number, *numbers, file=rows, flush=True)
        loss, norm = train_step(model, optimizer, step, *rest)
        steps.write(f"{step.number} {float(loss).hex()} {float(norm).hex()}\n")
        steps.flush()
        return loss, norm

    train.train_step = logged
    sys.argv = ["bertdist.train", *arguments]
    try:
        cli.main(["train", *arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


if __name__ == "__main__":
    run_rank(
        sys.argv[1:],
        int(os.environ.get("RANK", "0")),
        Path(sys.argv[sys.argv.index("--output_dir") + 1]),
    )
