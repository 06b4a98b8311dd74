"""Time an all-reduce; a process of each rank: python -m bertdist.distributed.all_reduce BACKEND.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. Prints one line of
JSON. It is a process of its own because one that hangs in NCCL can only be killed.

    measure(backend="gloo", ranks=[0, 1], world=4, address="node1", port=29400, seconds=60)
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

LARGE, SMALL = 25_000_000, 2_500_000  # float32 numbers: 100 MB, 10 MB
ROUNDS = 3
SLOW_SECONDS = 1.0  # of the small one: the large one would take too long


def measure(
    backend: str, ranks: Sequence[int], world: int, address: str, port: int, seconds: float
) -> dict[str, Any]:
    """Start the processes of this task, and wait for them; the line of the first.

    Raises RuntimeError with the reason, of at most `seconds`.
    """
    processes = []
    for local, rank in enumerate(ranks):
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local}
        place |= {"MASTER_ADDR": address, "MASTER_PORT": port}  # type: ignore[dict-item]
        environ = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environ.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", __name__, backend, str(seconds)]
        processes.append(
            subprocess.Popen(
                command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    deadline, outputs = time.monotonic() + seconds, []
    try:
        for process in processes:
            out, error = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if process.returncode:
                last = [line for line in error.splitlines() if line.strip()][-1:]
                raise RuntimeError("".join(last) or f"exit code {process.returncode}")
            outputs.append(json.loads(out.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {seconds:g} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {**outputs[0], "seconds": max(x["seconds"] for x in outputs)}


def main(backend: str, limit: float) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=limit))

    def timed(numbers: int) -> float:
        values = torch.ones(numbers, device=device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if backend == "nccl":
            torch.cuda.synchronize()
        took = torch.tensor([time.perf_counter() - start], device=device)
        if values[-1].item() != dist.get_world_size():
            raise RuntimeError(f"a sum of ones over {dist.get_world_size()} ranks is {values[-1]}")
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        return float(took.item())

    timed(SMALL)  # connections are made here
    numbers = LARGE if timed(SMALL) < SLOW_SECONDS else SMALL
    times = sorted(timed(numbers) for _ in range(ROUNDS))
    versions = {"CUDA": torch.version.cuda or ""}
    if backend == "nccl":
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found = {name: text for name, text in versions.items() if text}
    megabytes = 4e-6 * numbers
    print(json.dumps({"seconds": times[ROUNDS // 2], "megabytes": megabytes, "versions": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
