"""Throughput: real tokens, padding, useful operations beside what the devices can do, waiting for
data.

    meter = create_meter(classifier, accelerator)
    for step in meter.watch(steps): ...
    meter.gather(losses, accelerator)   # when a log line is due
    meter.lap(), meter.summary()        # figures for metrics.jsonl; str(meter): in two sentences
    meter.measure_again()               # before the last summary

No figure makes the host wait for the device: each rank keeps its own on the host, and they travel
with the losses in one collective per log line. MEASURED names the keys that differ from run to run;
comparisons of runs leave them out.

What the devices can do is the highest rate seen: of matrix products before the first step and after
the last, and of the run itself. So other work on the machine during one of them cannot make a
utilization above 1.

Legend: L tokens of one text. FLOP: one multiplication or one addition of floating point numbers.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bertdist.models.classifier import Classifier

MEASURED = (  # keys of metrics.jsonl that differ from run to run, also on one machine
    "tokens_per_second",  # real tokens, all ranks together
    "data_wait_seconds",  # of the rank that waited longest for its loader
    "padding_factor",  # cells given to the model / real tokens
    "model_tflops",  # useful FLOP/s of all ranks / 1e12
    "flop_utilization",  # ... / the highest FLOP/s of large matrix products, or of the run, so far
    "slowest_rank",  # FLOPs of the rank that had most to do in each step / mean of the ranks
    "matmul_tflops",  # that highest rate, all ranks together / 1e12
    "train_seconds",  # without evaluations and checkpoints
    "train_steps",  # that this process took
    "tokens_per_micro_batch",  # the most; may be chosen from free memory
    "evaluation_seconds",  # of this process, until the line is written
    "saving_seconds",
)


class Texts(Protocol):
    """What the meter reads of a step: tokens of each text of each micro-batch of this rank; none
    where the rank is idle.
    """

    @property
    def lengths(self) -> Sequence[Sequence[int]]: ...


S = TypeVar("S", bound=Texts)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs that forward and backward need for texts of given lengths; NaN for a model whose layers
    are not understood.
    """

    per_token: float
    per_pair: float  # a text of L tokens has L x L pairs that attend to each other
    per_text: float

    def __call__(self, lengths: Sequence[int]) -> float:
        """lengths: tokens of each text."""
        pairs = sum(length * length for length in lengths)
        return self.per_token * sum(lengths) + self.per_pair * pairs + self.per_text * len(lengths)


def model_flops(model: Any, last_layer: Literal["all", "first tokens"] = "all") -> ModelFlops:
    """The useful FLOPs of a Hugging Face classifier: none for padding, embeddings, or what is
    computed twice to save memory.

    A weight of a linear layer costs 6 a token: a multiplication and an addition in forward, twice
    that in backward. Attention costs 12 x L x L x hidden a layer. A frozen one costs a third: its
    forward pass. Linear layers outside the encoder
    and in its pooler see one vector a text. ALBERT's shared layers count as often as they run.
    Norms, activations and the optimizer are left out, as is usual
    (https://arxiv.org/abs/2204.02311, appendix B), and so are DeBERTa's products with relative
    positions; a sliding window counts as the whole text.

    last_layer "first tokens": K and V are computed for all tokens there, everything else for the
    first token of each text.
    """
    config, base = model.config, model.base_model
    stack = next((module for module in base.modules() if isinstance(module, nn.ModuleList)), None)
    runs, hidden = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not (stack and runs and hidden):
        return ModelFlops(math.nan, math.nan, math.nan)
    by_run = [stack[run * len(stack) // runs] for run in range(runs)]
    passes = [_passes(layer) for layer in by_run]
    per_text = _flops(model) - _flops(base)
    if isinstance(pooler := getattr(base, "pooler", None), nn.Module):
        per_text += _flops(pooler)
    per_token = (
        sum(map(_flops, by_run)) + _flops(model) - sum(map(_flops, stack)) - per_text
    )  # the rest: projections of embeddings (ELECTRA, ALBERT)
    per_pair = 4 * hidden * sum(passes)
    if last_layer == "first tokens":
        once = _flops(by_run[-1]) - 2 * passes[-1] * 2 * hidden * hidden
        per_token, per_text = per_token - once, per_text + once
        attention = 4 * hidden * passes[-1]  # one query a text: L pairs of it, not L x L
        return ModelFlops(per_token + attention, per_pair - attention, per_text)
    return ModelFlops(per_token, per_pair, per_text)


def _flops(module: nn.Module) -> int:
    """Of all linear layers for a token, each once, without biases."""
    parts = (part for part in module.modules() if isinstance(part, nn.Linear))
    return sum(2 * _passes(part) * part.weight.numel() for part in parts)


def _passes(module: nn.Module) -> int:
    """3: forward, and a backward pass of twice its cost; 1 where all weights are frozen."""
    return 3 if any(weight.requires_grad for weight in module.parameters()) else 1


def matmul_rate(device: torch.device, precision: str, seconds: float = 0.05) -> float:
    """FLOP/s of the fastest of the large matrix products that fit into so many seconds, at least
    three.

    precision: "no" (float32), "bf16" or "fp16". All ranks call it at the same time, since those of
    one machine share it.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    # On a GPU several in a row, so that starting them and waiting for the last do not count. Random
    # numbers, because a GPU that multiplies constants needs less power and clocks higher; and not
    # from the generator that dropout draws from.
    size, in_a_row = (1024, 1) if device.type == "cpu" else (8192, 4)
    random = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, device=device, generator=random).to(dtype) for _ in range(2)
    )
    fastest, tries, until = math.inf, 0, time.perf_counter() + seconds
    while tries < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        for _ in range(in_a_row):
            torch.mm(left, right)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        fastest, tries = min(fastest, (time.perf_counter() - begin) / in_a_row), tries + 1
    if device.type == "cuda":
        del left, right
        torch.cuda.empty_cache()  # up to 1 GB that the model may want
    return 2 * size**3 / fastest


@dataclass
class _Sums:
    """Sums over ranks and steps since a moment of the meter's clock."""

    since: float
    steps: int = 0
    tokens: float = 0.0
    cells: float = 0.0
    flops: float = 0.0
    longest: float = 0.0  # FLOPs of the rank that had most to do, step by step
    waited: Tensor = field(
        default_factory=lambda: torch.zeros(1, dtype=torch.float64)
    )  # (ranks,) seconds

    def add(self, figures: Tensor) -> None:
        """figures: (ranks, steps, 4) float64."""
        tokens, cells, flops, waited = figures.unbind(-1)
        self.steps += figures.shape[1]
        self.tokens += float(tokens.sum())
        self.cells += float(cells.sum())
        self.flops += float(flops.sum())
        self.longest += float(flops.amax(0).sum())
        self.waited = self.waited + waited.sum(1)

    def flops_per_second(self, now: float) -> float:
        """Useful ones of all ranks; NaN if they are not known."""
        return self.flops / (now - self.since)

    def values(self, now: float, rate: float) -> dict[str, float]:
        """What a line of metrics.jsonl says of it."""
        seconds = now - self.since
        return {
            "tokens_per_second": self.tokens / seconds,
            "data_wait_seconds": float(self.waited.max()),
            "padding_factor": self.cells / self.tokens if self.tokens else math.nan,
            "model_tflops": self.flops_per_second(now) / 1e12,
            "flop_utilization": self.flops_per_second(now) / rate,
            "slowest_rank": self.longest * len(self.waited) / self.flops
            if self.flops
            else math.nan,
        }


class ThroughputMeter:
    """Counts what this process trains and how long it takes, without pauses.

    Its clock starts when it is made.
    """

    def __init__(
        self,
        flops: ModelFlops,
        packed: bool,
        rate: float,
        measure: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """packed: whether the model is given real tokens only. rate: FLOP/s of matrix products, all
        ranks together. measure: measures it again, a collective.
        """
        self.flops, self.packed, self.rate, self._measure = flops, packed, rate, measure
        self._pauses, self._paused_at = 0.0, math.nan
        # This rank's [tokens, cells, FLOPs, seconds waited] of each step since the last `gather`.
        self._figures: list[list[float]] = []
        self._since_log, self._total = _Sums(self._now()), _Sums(self._now())

    def _now(self) -> float:
        now = time.perf_counter() if math.isnan(self._paused_at) else self._paused_at
        return now - self._pauses

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what runs inside from the training time: evaluations, checkpoints."""
        self._paused_at = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - self._paused_at
        self._paused_at = math.nan

    def watch(self, steps: Iterator[S]) -> Generator[S]:
        """The same steps; counts their tokens and how long each was waited for."""
        while True:
            begin = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            waited = time.perf_counter() - begin
            tokens = sum(map(sum, step.lengths))
            padded = sum(len(lengths) * max(lengths) for lengths in step.lengths)
            cells = tokens if self.packed else padded
            self._figures.append([tokens, cells, sum(map(self.flops, step.lengths)), waited])
            yield step

    def gather(self, losses: Tensor, accelerator: Accelerator) -> list[tuple[float, float]]:
        """(loss sum, tokens) over all ranks of each step since the last call. A collective.

        losses: (steps,) this rank's loss sums.
        """
        figures = self.take().to(accelerator.device)
        mine = torch.cat([losses[:, None], figures], dim=1)  # (steps, 1 + 4)
        ranks = accelerator.gather(mine[None]).cpu().double()  # (ranks, steps, 1 + 4)
        self.add(ranks[:, :, 1:])
        # gloo's own sum over 3 ranks rounds by position
        return [(loss, tokens) for loss, tokens in ranks[:, :, :2].sum(0).tolist()]

    def take(self) -> Tensor:
        """(steps, 4) float32: this rank's figures of the steps since the last call."""
        figures, self._figures = self._figures, []
        return torch.tensor(figures)

    def add(self, figures: Tensor) -> None:
        """Count the figures of all ranks: (ranks, steps, 4) float64 on the host."""
        self._since_log.add(figures)
        self._total.add(figures)

    def lap(self) -> dict[str, float]:
        """The figures of a log line: of the steps since the last one."""
        sums, self._since_log = self._since_log, _Sums(self._now())
        now = self._since_log.since
        self.rate = max(self.rate, sums.flops_per_second(now))  # the first if the other is NaN
        return sums.values(now, self.rate)

    def measure_again(self) -> None:
        """Measure what the devices can do once more: the higher rate counts. A collective."""
        self.rate = max(self.rate, self._measure())

    def summary(self) -> dict[str, float]:
        """The figures of all steps of this process."""
        now = self._now()
        self.rate = max(self.rate, self._total.flops_per_second(now))
        process = {
            "train_steps": self._total.steps,
            "train_seconds": now - self._total.since,
            "matmul_tflops": self.rate / 1e12,
        }
        return {**process, **self._total.values(now, self.rate)}

    def __str__(self) -> str:
        """The summary in two sentences."""
        values, ranks = self.summary(), len(self._total.waited)
        seconds, wait = values["train_seconds"], values["data_wait_seconds"]
        text = (
            f"{values['train_steps']:,} steps in {seconds:,.1f} s: "
            f"{values['tokens_per_second']:,.0f} real tokens per second, "
            f"padding factor {values['padding_factor']:.2f}; "
            f"{wait:.1f} s ({wait / seconds:.1%}) waiting for data."
        )
        if values["model_tflops"] > 0:  # not NaN
            peak = f"{values['matmul_tflops']:.3g} of plain matrix products"
            share = f"{values['flop_utilization']:.0%} of the {peak}"
            text += f" The model did {values['model_tflops']:.3g} TFLOP/s, {share}"
            text += (
                f"; load imbalance (max/mean) {values['slowest_rank']:.3f}." if ranks > 1 else "."
            )
        return text


def create_meter(
    classifier: Classifier, accelerator: Accelerator, measure: bool = True
) -> ThroughputMeter:
    """A meter whose clock starts. measure: what the devices can do, on all ranks at the same time.

    A collective.
    """

    def measured() -> float:
        mine = 0.0
        if measure:
            # after the last step there may be no memory for it, on a GPU
            with suppress(torch.OutOfMemoryError):
                mine = matmul_rate(accelerator.device, accelerator.mixed_precision)
        rates = torch.tensor([mine], device=accelerator.device)
        return float(accelerator.reduce(rates, reduction="sum").item())

    flops = model_flops(classifier.model, "first tokens" if classifier.first_tokens_only else "all")
    packed = classifier.packed or classifier.padding_changes_logits
    return ThroughputMeter(flops, packed, measured(), measured)
