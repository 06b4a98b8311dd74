"""Two ranks with a slow network between them: the share of the all-reduce in a step, measured, and
as bench.scaling computes it. Needs root, for network namespaces (bench.machines).

    python -m bench.network                                 # demo/model and demo/data
    python -m bench.network --rounds 10 --rows_a_rank 64

Two forked processes train, each in a namespace of its own, on one thread. Networks take turns, and
on each of them, in the same step of training: no exchange of gradients, float32, bf16
(--ddp_comm_hook), and an all-reduce of as many float32 numbers alone. The step is that of
bertdist's `train_step`, over the same rows again and again. Medians over the rounds.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from bench import machine, page
from bench.figures import format_number, format_spread, markdown
from bench.flops import Shape, read_shape
from bench.jobs import BenchError
from bench.machines import Machines, Network, two_machines
from bench.peers import positive
from bench.scaling import Cluster
from bench.stage import HINT, log
from bertdist.core.args import read_config

WIRES = (Network(), Network(mbit=1000), Network(mbit=100))
RELAYED = (Network(delay_ms=1, loss=0.01), Network(mbit=100, delay_ms=1, loss=0.01))
EXCHANGES = ("none", "no", "bf16", "alone")  # "no" and "bf16" as in --ddp_comm_hook
PORT, RANKS = "29611", 2
UNTIMED_STEPS = 2
PACKAGES = ("bertdist", "torch", "accelerate")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.network", description="Two ranks, slow networks.", allow_abbrev=False
    )
    add = found.add_argument
    add("--model_name_or_path", default="demo/model", help="A BERT.")
    add("--train_file", default="demo/data/train.tsv", help="Rows to train on.")
    add("--rows_a_rank", type=positive, default=32, help="Rows per step and rank.")
    add("--max_length", type=positive, default=128, help="Longest text in tokens.")
    add("--rounds", type=positive, default=5, help="Steps per network and exchange.")
    add("--output", help="Page whose section 'Slow networks' is replaced. Default: only print.")
    return found


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds on one network, by round; of the slower rank."""

    network: Network
    seconds: dict[str, list[float]]  # of EXCHANGES

    def median(self, exchange: str) -> float:
        """Of a step, or of the all-reduce alone."""
        return median(self.seconds[exchange])

    def predicted(self, exchange: str, shape: Shape) -> float | None:
        """The same as bench.scaling computes it from rate and computing; None where it cannot."""
        if not self.network.mbit or self.network.loss:
            return None
        bytes_per_second = self.network.mbit * 1e6 / 8 * (2 if exchange == "bf16" else 1)
        cluster = Cluster(
            flops_per_second=1.0,
            bytes_within=bytes_per_second,
            bytes_between=bytes_per_second,
            ranks_a_node=1,
        )
        if exchange == "alone":
            return cluster.all_reduce(shape.weights, RANKS)
        compute = self.median("none")
        return compute + cluster.exposed_all_reduce(shape, RANKS, compute)


class Exchange:
    """How DDP exchanges gradients, set before each step."""

    def __init__(self) -> None:
        self.way = "no"

    def hook(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP compares the annotation
    ) -> torch.futures.Future[torch.Tensor]:
        """The bucket's gradient: its mean over ranks, or this rank's own."""
        if self.way == "none":
            own = torch.futures.Future[torch.Tensor]()
            own.set_result(bucket.buffer())
            return own
        hooks = {"no": default_hooks.allreduce_hook, "bf16": default_hooks.bf16_compress_hook}
        world = dist.group.WORLD
        assert world is not None
        return hooks[self.way](world, bucket)


def train_and_time(
    machines: Machines, networks: Sequence[Network], words: Sequence[str], rounds: int, out: Path
) -> NoReturn:
    """One rank: bertdist's training, each step timed; ends the process when all are."""
    train: Any = importlib.import_module("bertdist.train")  # the module, not the function
    exchange, real_step, first = Exchange(), train.train_step, []
    turns = [
        (network, way) for _ in range(rounds) for network in networks for way in EXCHANGES[:-1]
    ]
    found: list[tuple[int, str, float]] = []

    def set_network(network: Network) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            machines.set_network(network)
        dist.barrier()

    def all_reduce_alone(number: int, weights: int) -> None:
        numbers = torch.zeros(weights)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        found.append((number, "alone", time.perf_counter() - start))

    def timed_step(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
        first.append(step)
        if len(first) <= UNTIMED_STEPS:
            return real_step(model, optimizer, step, *rest)
        network, exchange.way = turns[len(first) - UNTIMED_STEPS - 1]
        if exchange.way == EXCHANGES[0]:
            set_network(network)
            all_reduce_alone(networks.index(network), sum(p.numel() for p in model.parameters()))
        dist.barrier()
        start = time.perf_counter()
        result = real_step(model, optimizer, first[0], *rest)
        found.append((networks.index(network), exchange.way, time.perf_counter() - start))
        if dist.get_rank() == 0:
            log(f"{network}, {exchange.way}: {found[-1][-1]:.2f} s")
        if len(first) - UNTIMED_STEPS == len(turns):
            (out / f"rank_{dist.get_rank()}.json").write_text(json.dumps(found))
            dist.barrier()
            os._exit(0)
        return result

    train.set_comm_hook = lambda model, hook: model.register_comm_hook(exchange, Exchange.hook)
    train.train_step = timed_step
    torch.set_num_threads(1)
    train.train(read_config([*words, "--max_train_steps", str(UNTIMED_STEPS + len(turns) + 1)]))
    raise AssertionError("training ended before its last timed step")


def measure(
    networks: Sequence[Network], relay: bool, words: Sequence[str], rounds: int
) -> list[Measured]:
    """Seconds on each network. Raises BenchError."""
    with tempfile.TemporaryDirectory() as name, two_machines(relay) as machines:
        folder, pids = Path(name), []
        for rank in range(RANKS):
            pids.append(os.fork())
            if not pids[-1]:
                try:
                    machines.enter(rank)
                    os.environ |= {
                        "RANK": str(rank),
                        "WORLD_SIZE": str(RANKS),
                        "LOCAL_RANK": "0",
                        "LOCAL_WORLD_SIZE": "1",
                        "MASTER_ADDR": "10.77.0.1",
                        "MASTER_PORT": PORT,
                        "ACCELERATE_USE_CPU": "true",
                    }
                    own = [*words, "--output_dir", str(folder / "out")]
                    train_and_time(machines, networks, own, rounds, folder)
                except BaseException as error:
                    log(f"rank {rank}: {type(error).__name__}: {error}")
                finally:
                    os._exit(1)
        try:
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        except BaseException:  # Ctrl-C, SIGTERM: not without this process
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise
        if any(statuses):
            raise BenchError(f"the ranks ended with exit codes {statuses}: see above")
        ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(RANKS)]
    seconds: list[dict[str, list[float]]] = [{way: [] for way in EXCHANGES} for _ in networks]
    for (number, way, one), (_, _, other) in zip(*ranks, strict=True):
        seconds[number][way].append(max(one, other))
    return [
        Measured(network=network, seconds=each)
        for network, each in zip(networks, seconds, strict=True)
    ]


def table(measured: Sequence[Measured], shape: Shape) -> str:
    """One line per network."""
    lines = [
        [
            *("network", "all-reduce alone, s", "computed", "step without exchange, s"),
            *("step in float32, s", "computed", "all-reduce's share"),
            *("step with `--ddp_comm_hook bf16`, s", "computed", "times as fast"),
        ]
    ]
    for each in measured:
        alone, no, bf16 = (each.predicted(way, shape) for way in ("alone", "no", "bf16"))
        computed = ["" if value is None else format_number(value) for value in (alone, no, bf16)]
        step = each.median("no")
        lines.append(
            [
                str(each.network),
                format_spread(each.seconds["alone"]),
                computed[0],
                format_spread(each.seconds["none"]),
                format_spread(each.seconds["no"]),
                computed[1],
                f"{max(0.0, 1 - each.median('none') / step):.0%}",
                format_spread(each.seconds["bf16"]),
                computed[2],
                f"{step / each.median('bf16'):.2f}",
            ]
        )
    return markdown(lines)


def compute(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(section, record)."""
    try:
        shape = read_shape(args.model_name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(
            f"--model_name_or_path {args.model_name_or_path}: expected a BERT's folder; {HINT}"
        ) from error
    training = [
        *("--model_name_or_path", args.model_name_or_path, "--train_file", args.train_file),
        *("--train_batch_size", str(RANKS * args.rows_a_rank), "--use_cpu", "True"),
        *("--max_length", str(args.max_length), "--tokens_per_micro_batch", "8192"),
        *("--dataloader_num_workers", "0", "--report", "False", "--save_every", "never"),
    ]
    importlib.import_module("bertdist.train")  # once, before the forks
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # after a clean-up
    load = os.getloadavg()[0]
    measured = [
        *measure(WIRES, False, training, args.rounds),
        *measure(RELAYED, True, training, args.rounds),
    ]
    parts = [
        "## Slow networks (measured)",
        machine.describe_machine("cpu", RANKS, PACKAGES),
        f"```bash\n{machine.command('bench.network', words)}\n```",
        f"{RANKS} ranks of one thread in network namespaces, {args.rows_a_rank} rows each, "
        f"{shape.weights / 1e6:.1f} million weights; {args.rounds} rounds, in each of which all "
        "networks and ways to exchange took turns: median (min-max). The machine was shared (load "
        f"{load:.1f} at the start). Delay and loss are per direction, by a relay of IP packets "
        "in a process of its own. Computed: by the model of bench.scaling, from the rate of the "
        "network and the step without exchange. The share is that of the time which a step "
        "without exchange does not need.",
        table(measured, shape),
    ]
    return "\n\n".join(parts), {
        "networks": [{"network": str(x.network), "seconds": x.seconds} for x in measured]
    }


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns exit code 0, or 1 after a user's mistake, with one line."""
    return page.run_command("network", parser(), compute, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
