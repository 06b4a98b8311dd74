"""One rank of bench.faults: bertdist.train with every step written down, and nothing printed but into a file.

    RANK=0 WORLD_SIZE=1 python -m bench.rank --output_dir OUT ...      # what torchrun and `accelerate launch` start

In: the words of bertdist.train. Out: its exit code; OUT/said_N.txt, its standard error; OUT/steps_N.txt, a line a step with loss and
gradient norm in hex. `attempts` forks a process and calls `be_a_rank`; a launcher starts this module.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def be_a_rank(words: Sequence[str], rank: int, out: Path) -> NoReturn:
    """The whole life of a process."""
    code: Any = 1
    with (
        open(out / f"said_{rank}.txt", "a", buffering=1, encoding="utf-8") as said,
        open(out / f"steps_{rank}.txt", "a") as steps,
    ):
        os.dup2(said.fileno(), 2)
        sys.stderr = said
        try:
            code = _trained(words, steps)
        except BaseException:
            traceback.print_exc()
    os._exit(code if isinstance(code, int) else 1)


def _trained(words: Sequence[str], steps: Any) -> Any:
    import torch

    # The module, watched and quickened in this process only; `bertdist.train` is the function.
    train: Any = importlib.import_module("bertdist.train")
    torch.set_num_threads(1)
    throughput: Any = importlib.import_module("bertdist.training.throughput")
    throughput.matmul_rate = lambda device, precision: 1e12
    train_step = train.train_step

    def written(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
        loss, norm = train_step(model, optimizer, step, *rest)
        steps.write(f"{step.number} {float(loss).hex()} {float(norm).hex()}\n")
        steps.flush()
        return loss, norm

    train.train_step = written
    sys.argv = ["bertdist.train", *words]
    try:
        train.main()
    except SystemExit as end:
        return end.code or 0
    return 0


if __name__ == "__main__":
    be_a_rank(
        sys.argv[1:],
        int(os.environ.get("RANK", "0")),
        Path(sys.argv[sys.argv.index("--output_dir") + 1]),
    )
