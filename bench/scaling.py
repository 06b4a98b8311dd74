"""Losses at scale, computed from real text lengths: stragglers, and the all-reduce of gradients.

    python -m bench.scaling                                 # SST-2 in ../shared/data, BERT-base
    python -m bench.scaling --train_file demo/data/train.tsv --tflops 0.1 --bandwidth_between 1.25

1. Stragglers. The rows of each step are split among the ranks by `balance_by_length`: by bytes of
   text, as bertdist does (known without tokenizing), by tokens, and at random. A step takes as long
   as its slowest rank. The one assumption: time is proportional to the operations of bench.flops.
2. All-reduce. A ring of n ranks moves 2 (n - 1) / n x bytes over its slowest link
   (https://arxiv.org/abs/1802.05799), 4 bytes per weight; latency is left out. DDP sends gradients
   as they are computed, so they overlap with the backward pass, two thirds of a step's operations,
   as far as it lasts; all but the embeddings' gradient, which comes last (a fifth of BERT-base's).
   `python -m bench.network` compares this with two ranks on networks of known rates.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import machine, page
from bench.figures import format_number, markdown
from bench.flops import BERT_BASE, Shape, training_flops
from bench.jobs import BenchError
from bench.peers import positive
from bench.stage import HINT
from bertdist.core.config import FileConfig, ModelConfig
from bertdist.data.load_data import load_texts
from bertdist.data.records import ColumnNames
from bertdist.data.sharding import balance_by_length, epoch_order
from bertdist.data.tokenization import encode, load_tokenizer

Array = npt.NDArray[Any]
SST2 = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "sst2" / "train.tsv"
TEXTS_PER_CALL = 1000  # of the tokenizer
GRADIENT_BYTES = 4  # per weight: DDP reduces float32 gradients of float32 weights
BACKWARD = 2 / 3  # of a step's operations
TARGET_EFFICIENCY = 0.9  # of the last column


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.scaling", description="Scaling, computed.", allow_abbrev=False
    )
    add = found.add_argument
    add(
        "--train_file",
        default=str(SST2),
        help="Texts. Default: SST-2's training rows in ../shared/data.",
    )
    add("--text_column", help="Default: as in training (text, sentence, ...).")
    add(
        "--model_name_or_path",
        default="demo/model",
        help="Folder of the tokenizer; the sizes of the model are those of BERT-base.",
    )
    add("--max_length", type=positive, default=128, help="Longest text in tokens.")
    add("--ranks", type=positive, nargs="+", default=[8, 64, 512], help="Numbers of ranks.")
    add("--rows_a_rank", type=positive, default=32, help="Rows per step and rank.")
    add(
        "--global_batch",
        type=positive,
        default=1024,
        help="Rows per step in total, for the second half of the table.",
    )
    add("--most_steps", type=positive, default=50, help="Steps of an epoch to compute.")
    add("--seed", type=int, default=42, help="Of the row order and the random split.")
    add(
        "--tflops",
        type=float,
        default=60.0,
        help="Useful TFLOP/s of a rank. Default: a fifth of an A100's peak in bf16.",
    )
    add(
        "--bandwidth_within",
        type=float,
        default=200.0,
        help="GB/s of a rank's link in a node. Default: two thirds of an A100's NVLink.",
    )
    add(
        "--bandwidth_between",
        type=float,
        default=25.0,
        help="GB/s of a rank's link between nodes. Default: 200 Gbit/s a rank.",
    )
    add(
        "--ranks_a_node",
        type=positive,
        default=8,
        help="Ranks per node; a ring of at most so many stays within one.",
    )
    add(
        "--output",
        help="Page whose section 'Scaling (computed)' is replaced. Default: only print.",
    )
    return found


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Lengths of all texts."""

    size: Array  # (rows,) int64, UTF-8 bytes: what bertdist balances by
    tokens: Array  # (rows,) int64, special tokens counted


def read_texts(args: argparse.Namespace) -> Texts:
    """Tokenize all texts; raises BenchError and BertdistError."""
    if not Path(args.train_file).is_file():
        raise BenchError(
            f"--train_file {machine.shorten_path(args.train_file)}: there is no such file."
            f" demo/data/train.tsv will do; {HINT}"
        )
    if not Path(args.model_name_or_path, "config.json").is_file():
        raise BenchError(
            f"--model_name_or_path {args.model_name_or_path}: no config.json there,"
            f" expected a model folder; {HINT}"
        )
    records = load_texts(
        args.train_file,
        FileConfig(text_column=args.text_column, encoding="utf-8"),
        ColumnNames(None, None, None, []),
    )
    tokenizer = load_tokenizer(
        ModelConfig(model_name_or_path=args.model_name_or_path, max_length=args.max_length)
    )
    tokens: list[int] = []
    for at in range(0, len(records), TEXTS_PER_CALL):
        chunk = [records[row] for row in range(at, min(at + TEXTS_PER_CALL, len(records)))]
        tokens += [len(ids) for ids, _ in encode(chunk, tokenizer, args.max_length)]
    return Texts(size=records.lengths(), tokens=np.array(tokens))


@dataclass(frozen=True, kw_only=True)
class BalancedSteps:
    """Operations of the slowest rank / mean over all steps, for three ways to split the rows."""

    ranks: int
    rows: int  # per step, all ranks together
    steps: int
    at_random: float
    by_size: float  # as bertdist does
    by_tokens: float
    flops: float  # mean operations of a rank in a step


def balance_steps(
    texts: Texts, shape: Shape, ranks: int, rows: int, most_steps: int, seed: int
) -> BalancedSteps | None:
    """Split the complete steps of an epoch in bertdist's order; None if the texts fill no step."""
    steps = min(most_steps, len(texts.tokens) // rows)
    if not steps:
        return None
    of_length = np.array(
        [training_flops(shape, [length]) for length in range(int(texts.tokens.max()) + 1)]
    )
    cost = of_length[texts.tokens]  # (rows,) operations of each text
    order, random = epoch_order(len(cost), seed, 0), np.random.default_rng(seed)
    slowest, total = np.zeros(3), 0.0
    for step in range(steps):
        mine = order[step * rows : (step + 1) * rows]
        chance = np.array_split(random.permutation(mine), ranks)
        ways = (
            chance,
            balance_by_length(mine, texts.size[mine], ranks),
            balance_by_length(mine, texts.tokens[mine], ranks),
        )
        slowest += [max(float(cost[share].sum()) for share in way) for way in ways]
        total += float(cost[mine].sum())
    at_random, by_size, by_tokens = (slowest / (total / ranks)).tolist()
    flops = total / ranks / steps
    return BalancedSteps(
        ranks=ranks,
        rows=rows,
        steps=steps,
        at_random=at_random,
        by_size=by_size,
        by_tokens=by_tokens,
        flops=flops,
    )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Speed of a rank and of its links."""

    flops_per_second: float
    bytes_within: float  # a second, on a rank's link within its node
    bytes_between: float
    ranks_a_node: int

    def all_reduce(self, weights: int, ranks: int) -> float:
        """Seconds of a ring all-reduce of the gradients of so many weights."""
        bandwidth = self.bytes_within if ranks <= self.ranks_a_node else self.bytes_between
        return 2 * (ranks - 1) / ranks * weights * GRADIENT_BYTES / bandwidth

    def exposed_all_reduce(self, shape: Shape, ranks: int, compute: float) -> float:
        """Seconds of all-reduce outside of the backward pass, in a step of `compute` seconds."""
        rest = self.all_reduce(shape.weights - shape.embedding_weights, ranks) - BACKWARD * compute
        return self.all_reduce(shape.embedding_weights, ranks) + max(0.0, rest)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, in parts."""

    mean: float  # computing, of the average rank
    stragglers: float  # waiting for the slowest rank
    all_reduce: float  # waiting for gradients

    @property
    def step(self) -> float:
        """The whole step."""
        return self.mean + self.stragglers + self.all_reduce


def step_time(found: BalancedSteps, slowest: float, shape: Shape, cluster: Cluster) -> StepTime:
    """slowest: operations of the slowest rank / mean, for one way to split the rows."""
    mean = found.flops / cluster.flops_per_second
    return StepTime(
        mean=mean,
        stragglers=mean * (slowest - 1),
        all_reduce=cluster.exposed_all_reduce(shape, found.ranks, mean * slowest),
    )


def rows_for(efficiency: float, found: BalancedSteps, shape: Shape, cluster: Cluster) -> int:
    """Rows per rank, a power of two, from which the all-reduce alone allows this efficiency."""
    a_row = found.flops * found.ranks / found.rows / cluster.flops_per_second
    rows = 1
    while (
        rows * a_row / (rows * a_row + cluster.exposed_all_reduce(shape, found.ranks, rows * a_row))
        < efficiency
    ):
        rows *= 2
    return rows


def straggler_table(steps: Sequence[BalancedSteps]) -> str:
    """Operations of the slowest rank / mean, one line per number of ranks and rows."""
    lines = [
        [
            "ranks",
            "rows per step",
            "rows per rank",
            "steps",
            "at random",
            "balanced by bytes, as bertdist does",
            "balanced by tokens",
        ]
    ]
    for found in steps:
        size = [
            str(found.ranks),
            f"{found.rows:,}",
            f"{found.rows / found.ranks:g}",
            str(found.steps),
        ]
        lines.append(
            [
                *size,
                *(
                    f"{slowest:.3f}"
                    for slowest in (found.at_random, found.by_size, found.by_tokens)
                ),
            ]
        )
    return markdown(lines)


def step_table(steps: Sequence[BalancedSteps], shape: Shape, cluster: Cluster) -> str:
    """Parts of the time of a step, the same lines."""
    head = [
        "ranks",
        "rows per step",
        "computing, ms",
        "all-reduce, ms",
        "not overlapped, ms",
        "lost to stragglers, at random",
        "lost, balanced",
    ]
    lines = [
        [*head, "lost to all-reduce", "efficiency", f"rows per rank for {TARGET_EFFICIENCY:.0%}"]
    ]
    for found in steps:
        random, own = (
            step_time(found, slowest, shape, cluster)
            for slowest in (found.at_random, found.by_size)
        )
        milliseconds = [
            1000 * seconds
            for seconds in (
                own.mean,
                cluster.all_reduce(shape.weights, found.ranks),
                own.all_reduce,
            )
        ]
        shares = [
            random.stragglers / random.step,
            own.stragglers / own.step,
            own.all_reduce / own.step,
            own.mean / own.step,
        ]
        cells = [
            str(found.ranks),
            f"{found.rows:,}",
            *map(format_number, milliseconds),
            *(f"{share:.1%}" for share in shares),
        ]
        lines.append([*cells, f"{rows_for(TARGET_EFFICIENCY, found, shape, cluster):,}"])
    return markdown(lines)


def compute(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(section, record)."""
    texts, shape, name = (
        read_texts(args),
        BERT_BASE,
        machine.shorten_path(str(Path(args.train_file).resolve())),
    )
    cluster = Cluster(
        flops_per_second=args.tflops * 1e12,
        bytes_within=args.bandwidth_within * 1e9,
        bytes_between=args.bandwidth_between * 1e9,
        ranks_a_node=args.ranks_a_node,
    )
    sizes = dict.fromkeys(
        [
            *((n, n * args.rows_a_rank) for n in args.ranks),
            *((n, args.global_batch) for n in args.ranks),
        ]
    )
    asked = {size: balance_steps(texts, shape, *size, args.most_steps, args.seed) for size in sizes}
    found = [steps for steps in asked.values() if steps]
    short = "; ".join(
        f"{rows:,} rows on {n} ranks" for (n, rows), steps in asked.items() if steps is None
    )
    parts = [
        "## Scaling (computed)",
        f"Computed, nothing was run on ranks. {len(texts.tokens):,} texts of {name}, "
        f"{texts.tokens.mean():.1f} tokens on average, {texts.tokens.max()} at most, in bertdist's "
        f"training order; at most {args.most_steps} steps of an epoch.",
        f"```bash\n{machine.command('bench.scaling', words)}\n```",
        "Operations (bench/flops.py) of the slowest rank / mean:",
        straggler_table(found),
        f"A step of BERT-base, {shape.weights / 1e6:.0f} million weights, if a rank does "
        f"{args.tflops:g} useful TFLOP/s and its link carries {args.bandwidth_within:g} GB/s in a "
        f"ring of at most {args.ranks_a_node} ranks and {args.bandwidth_between:g} GB/s in a "
        "larger one, without latency. The embeddings' gradient "
        f"({shape.embedding_weights / shape.weights:.0%} of the bytes) comes last and overlaps "
        "with nothing, the rest overlaps with the backward pass. Last column: rows of this length "
        "per rank (a power of two) from which the all-reduce leaves "
        f"{TARGET_EFFICIENCY:.0%} of the time to computing. Section 'Slow networks' compares this "
        "model with measured steps.",
        step_table(found, shape, cluster),
        f"Not computed, as these texts do not fill one step: {short}." if short else "",
    ]
    return "\n\n".join(part for part in parts if part), {
        "texts": len(texts.tokens),
        "steps": [vars(steps) for steps in found],
    }


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns exit code 0, or 1 after a user's mistake, with one line."""
    return page.run_command("scaling", parser(), compute, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
