"""What many ranks would lose, computed from real text lengths: to stragglers, and to the all-reduce of gradients. Nothing is run on ranks.

    python -m bench.scaling                                              # SST-2's training rows beside the repository, BERT-base
    python -m bench.scaling --train_file demo/data/train.tsv --tflops 0.1 --bandwidth_between 1.25

1. Stragglers. The rows of each step are dealt to the ranks by `bertdist.batching.deal`: by the length it is given there (bytes of text,
   known without tokenizing), and by tokens; and at random. A step takes as long as its slowest rank. The one assumption: time goes with
   the operations of bench.flops.
2. All-reduce. A ring of n ranks moves 2 (n - 1) / n x bytes over its slowest link (https://arxiv.org/abs/1802.05799), 4 bytes a weight;
   latency is left out. DDP sends gradients as they come, so they hide behind the backward pass, two thirds of a step's operations, as far
   as it is long enough; all but the embeddings' gradient, which is the last to come (a fifth of BERT-base's).
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
from bench.figures import markdown, number
from bench.flops import BERT_BASE, Shape, training_flops
from bench.jobs import BenchError
from bench.peers import positive
from bench.stage import MAKE
from bertdist.core.config import ModelConfig
from bertdist.data.loading import open_texts
from bertdist.data.sharding import balance_by_length, epoch_order
from bertdist.data.tokenization import encode, load_tokenizer

Array = npt.NDArray[Any]
SST2 = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "sst2" / "train.tsv"
ENCODED_AT_ONCE = 1000  # texts a tokenizer call
GRADIENT_BYTES = 4  # a weight: DDP reduces float32 gradients of float32 weights
BACKWARD = 2 / 3  # of a step's operations
ENOUGH = 0.9  # efficiency that the last column asks for


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.scaling", description="Scaling, computed.", allow_abbrev=False
    )
    add = found.add_argument
    add(
        "--train_file",
        default=str(SST2),
        help="Texts. Default: SST-2's training rows in ../shared/data, where they are.",
    )
    add("--text_column", help="Default: as in training (text, sentence, ...).")
    add(
        "--model_name_or_path",
        default="demo/model",
        help="Folder of the tokenizer; the sizes of the model are those of BERT-base.",
    )
    add("--max_length", type=positive, default=128, help="Longest text in tokens.")
    add("--ranks", type=positive, nargs="+", default=[8, 64, 512], help="Numbers of ranks.")
    add("--rows_a_rank", type=positive, default=32, help="Rows of a step on each rank.")
    add(
        "--global_batch",
        type=positive,
        default=1024,
        help="Rows of a step in all, for the second half of the table.",
    )
    add("--most_steps", type=positive, default=50, help="Steps of an epoch that are dealt.")
    add("--seed", type=int, default=42, help="Of the order of rows, and of dealing at random.")
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
        help="Up to so many ranks the ring stays within a node.",
    )
    add(
        "--output",
        help="Page whose section 'Scaling (computed)' is replaced; without it the table is only printed.",
    )
    return found


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Lengths of all texts."""

    size: Array  # (rows,) int64: what bertdist deals by, UTF-8 bytes
    tokens: Array  # (rows,) int64, special tokens counted


def read_texts(args: argparse.Namespace) -> Texts:
    """Tokenize all texts; raises BenchError and BertdistError."""
    if not Path(args.train_file).is_file():
        raise BenchError(
            f"--train_file {machine.shown(args.train_file)}: there is no such file. demo/data/train.tsv will do; {MAKE}"
        )
    if not Path(args.model_name_or_path, "config.json").is_file():
        raise BenchError(
            f"--model_name_or_path {args.model_name_or_path}: no config.json there, expected a model folder; {MAKE}"
        )
    records = open_texts(
        args.train_file,
        text_column=args.text_column,
        text_pair_column=None,
        column_names=None,
        delimiter=None,
        quoting="auto",
        encoding="utf-8",
    )
    tokenizer = load_tokenizer(
        ModelConfig(model_name_or_path=args.model_name_or_path, max_length=args.max_length)
    )
    tokens: list[int] = []
    for at in range(0, len(records), ENCODED_AT_ONCE):
        chunk = [records[row] for row in range(at, min(at + ENCODED_AT_ONCE, len(records)))]
        tokens += [len(ids) for ids, _ in encode(chunk, tokenizer, args.max_length)]
    return Texts(size=records.lengths(), tokens=np.array(tokens))


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """Steps of so many rows on so many ranks. What a way of dealing costs: operations of the slowest rank / mean, over all steps."""

    ranks: int
    rows: int  # of a step, all ranks together
    steps: int  # that were dealt
    at_random: float
    by_size: float  # as bertdist does
    by_tokens: float
    flops: float  # mean operations of a rank in a step


def deal_steps(
    texts: Texts, shape: Shape, ranks: int, rows: int, most_steps: int, seed: int
) -> Dealt | None:
    """Deal the whole steps of an epoch in bertdist's order; None where the texts do not fill one step."""
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
    return Dealt(
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
    """What a rank can do."""

    flops_per_second: float
    bytes_within: float  # a second, on a rank's link within its node
    bytes_between: float
    ranks_a_node: int

    def all_reduce(self, weights: int, ranks: int) -> float:
        """Seconds of a ring over the gradients of so many weights."""
        bandwidth = self.bytes_within if ranks <= self.ranks_a_node else self.bytes_between
        return 2 * (ranks - 1) / ranks * weights * GRADIENT_BYTES / bandwidth

    def waiting(self, shape: Shape, ranks: int, compute: float) -> float:
        """Seconds of the all-reduce that the backward pass does not hide, in a step of `compute` seconds."""
        rest = self.all_reduce(shape.weights - shape.embedding_weights, ranks) - BACKWARD * compute
        return self.all_reduce(shape.embedding_weights, ranks) + max(0.0, rest)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Where the seconds of a step go."""

    mean: float  # computing, of the mean rank: all that a step would take if nothing were lost
    stragglers: float  # waiting for the slowest rank
    all_reduce: float  # waiting for gradients

    @property
    def step(self) -> float:
        """The whole step."""
        return self.mean + self.stragglers + self.all_reduce


def lost(found: Dealt, slowest: float, shape: Shape, cluster: Cluster) -> Lost:
    """slowest: operations of the slowest rank / mean, in the way of dealing that is asked about."""
    mean = found.flops / cluster.flops_per_second
    return Lost(
        mean=mean,
        stragglers=mean * (slowest - 1),
        all_reduce=cluster.waiting(shape, found.ranks, mean * slowest),
    )


def rows_for(efficiency: float, found: Dealt, shape: Shape, cluster: Cluster) -> int:
    """Rows a rank, as a power of two, from which the all-reduce alone leaves this efficiency; texts as long as these."""
    a_row = found.flops * found.ranks / found.rows / cluster.flops_per_second
    rows = 1
    while (
        rows * a_row / (rows * a_row + cluster.waiting(shape, found.ranks, rows * a_row))
        < efficiency
    ):
        rows *= 2
    return rows


def straggler_table(steps: Sequence[Dealt]) -> str:
    """Operations of the slowest rank / mean, one line a number of ranks and rows."""
    lines = [
        [
            "ranks",
            "rows a step",
            "rows a rank",
            "steps",
            "at random",
            "dealt by bytes, as bertdist does",
            "dealt by tokens",
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


def step_table(steps: Sequence[Dealt], shape: Shape, cluster: Cluster) -> str:
    """Where the time of a step goes, the same lines."""
    head = [
        "ranks",
        "rows a step",
        "computing, ms",
        "all-reduce, ms",
        "not hidden, ms",
        "lost to stragglers, at random",
        "lost, dealt",
    ]
    lines = [[*head, "lost to all-reduce", "efficiency", f"rows a rank for {ENOUGH:.0%}"]]
    for found in steps:
        random, own = (
            lost(found, slowest, shape, cluster) for slowest in (found.at_random, found.by_size)
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
            *map(number, milliseconds),
            *(f"{share:.1%}" for share in shares),
        ]
        lines.append([*cells, f"{rows_for(ENOUGH, found, shape, cluster):,}"])
    return markdown(lines)


def compute(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(section, record)."""
    texts, shape, name = (
        read_texts(args),
        BERT_BASE,
        machine.shown(str(Path(args.train_file).resolve())),
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
    asked = {size: deal_steps(texts, shape, *size, args.most_steps, args.seed) for size in sizes}
    found = [steps for steps in asked.values() if steps]
    short = "; ".join(
        f"{rows:,} rows on {n} ranks" for (n, rows), steps in asked.items() if steps is None
    )
    parts = [
        "## Scaling (computed)",
        f"Computed, nothing was run on ranks. {len(texts.tokens):,} texts of {name}, {texts.tokens.mean():.1f} tokens in the mean, "
        f"{texts.tokens.max()} at most, in the order in which bertdist trains them; at most {args.most_steps} steps of an epoch.",
        f"```bash\n{machine.command('bench.scaling', words)}\n```",
        "Operations (bench/flops.py) of the slowest rank / mean:",
        straggler_table(found),
        f"A step of BERT-base, {shape.weights / 1e6:.0f} million weights, if a rank does {args.tflops:g} useful TFLOP/s and its link "
        f"carries {args.bandwidth_within:g} GB/s in a ring of at most {args.ranks_a_node} ranks and {args.bandwidth_between:g} GB/s in "
        f"a larger one, without latency. The embeddings' gradient ({shape.embedding_weights / shape.weights:.0%} of the bytes) comes last "
        "and hides behind nothing, the rest behind the backward pass. Last column: rows of this length a rank (a power of two) from which "
        f"the all-reduce leaves {ENOUGH:.0%} of the time to computing.",
        step_table(found, shape, cluster),
        f"Not computed, as these texts do not fill one step: {short}." if short else "",
    ]
    return "\n\n".join(part for part in parts if part), {
        "texts": len(texts.tokens),
        "steps": [vars(steps) for steps in found],
    }


def main(words: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, or 1 with one line for what a user can mend."""
    return page.show("scaling", parser(), compute, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
