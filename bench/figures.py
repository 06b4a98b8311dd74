"""Time stamps and rows -> figures -> tables. Pure functions: nothing is run or measured here.

Rates are sums divided by sums over the timed steps of a run. Over repetitions: the median, with
minimum and maximum behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from bench.flops import Shape, training_flops
from bench.jobs import BenchError, PredictResult, TrainResult


class Spread(NamedTuple):
    """One figure over the repetitions."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum."""
    return Spread(median(values), min(values), max(values))


def format_number(value: float, digits: int | None = None) -> str:
    """Three or more digits: 12,345 or 123 or 12.3 or 1.23; `digits`: decimals."""
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def format_spread(values: Sequence[float], digits: int | None = None) -> str:
    """`123 (120-130)`; the number alone if all are formatted alike."""
    shown = [format_number(value, digits) for value in spread(values)]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]}-{shown[2]})"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one training run; all but memory and loss are of its timed steps."""

    tokens_per_second: float  # real tokens
    rows_per_second: float
    ms_per_step: float
    tokens_per_row: float  # real tokens
    cells_per_token: float  # computed tokens / real tokens: 1 without padding
    flops_per_second: float  # useful ones: bench.flops
    memory_mib: float  # of the process and a child
    child_mib: float
    device_mib: float | None
    loss: float


def timed_figures(run: TrainResult, untimed_steps: int, shape: Shape) -> Figures:
    """Figures of the steps after the first `untimed_steps`, timed from the end of those."""
    seconds = run.stamps[-1] - run.stamps[untimed_steps - 1]
    timed = run.seen[untimed_steps:]
    assert len(timed) == len(run.stamps) - untimed_steps >= 1, (
        len(timed),
        len(run.stamps),
        untimed_steps,
    )
    lengths = [length for step in timed for length in step.lengths]
    tokens, rows = sum(lengths), len(lengths)
    return Figures(
        tokens_per_second=tokens / seconds,
        rows_per_second=rows / seconds,
        ms_per_step=1000 * seconds / len(timed),
        tokens_per_row=tokens / rows,
        cells_per_token=sum(step.cells for step in timed) / tokens,
        flops_per_second=training_flops(shape, lengths) / seconds,
        memory_mib=run.process_mib + run.child_mib,
        child_mib=run.child_mib,
        device_mib=run.device_mib,
        loss=run.loss,
    )


def assert_same_rows(runs: Mapping[str, TrainResult]) -> None:
    """Raises BenchError unless contenders of as many steps trained the same rows and tokens."""
    held: dict[
        int, tuple[str, list[int], int]
    ] = {}  # steps -> (contender, rows, tokens) of the first that had so many
    for name, run in runs.items():
        rows = sorted(row for step in run.seen for row in step.rows)
        tokens = sum(length for step in run.seen for length in step.lengths)
        if rows != list(range(len(rows))):
            raise BenchError(f"Contender {name} did not train each of {len(rows)} rows once.")
        first, first_rows, first_tokens = held.setdefault(len(run.seen), (name, rows, tokens))
        if (rows, tokens) != (first_rows, first_tokens):
            raise BenchError(
                f"Contender {name} trained {len(rows)} rows of {tokens} tokens, "
                f"{first} trained {len(first_rows)} rows of {first_tokens} "
                "tokens; expected the same of contenders with as many steps."
            )


Column = tuple[str, Callable[[Figures], float | None], int | None]


def columns_of(matmul: float) -> list[Column]:
    """Heading, figure, decimals. matmul: FLOP/s that count as 100 %."""
    return [
        ("real tokens/s", lambda f: f.tokens_per_second, None),
        ("rows/s", lambda f: f.rows_per_second, None),
        ("ms per step", lambda f: f.ms_per_step, None),
        ("real tokens per row", lambda f: f.tokens_per_row, 1),
        ("computed per real token", lambda f: f.cells_per_token, 2),
        ("peak memory, MiB", lambda f: f.memory_mib, 0),
        ("of which a child", lambda f: f.child_mib, 0),
        ("GPU peak, MiB", lambda f: f.device_mib, 0),
        ("useful GFLOP/s", lambda f: f.flops_per_second / 1e9, None),
        ("% of matmul", lambda f: 100 * f.flops_per_second / matmul, None),
        ("final loss", lambda f: f.loss, 4),
    ]


def training_table(
    names: Mapping[str, str],
    runs: Mapping[str, Sequence[Figures]],
    timed: Mapping[str, int],
    matmul: float,
) -> str:
    """One line per contender. timed: steps. A figure that no run has (GPU memory) has no column."""
    everyone = [figures for found in runs.values() for figures in found]
    columns = [
        column
        for column in columns_of(matmul)
        if all(column[1](figures) is not None for figures in everyone)
    ]
    table = [["", "timed steps", *(title for title, _, _ in columns)]]
    for key, found in runs.items():
        cells = [
            format_spread(
                [value for figures in found if (value := of(figures)) is not None], digits
            )
            for _, of, digits in columns
        ]
        table.append([f"{key}  {names[key]}", str(timed[key]), *cells])
    return markdown(table)


def ratio_table(
    names: Mapping[str, str], runs: Mapping[str, Sequence[Figures]], ours: str = "a"
) -> str:
    """Ratios of `ours` to each other contender, per repetition; "" if there is none."""
    if ours not in runs or len(runs) < 2:
        return ""
    table = [[f"{names[ours]} to", "real tokens/s", "rows/s", "peak memory"]]
    for key, found in runs.items():
        if key != ours:
            pairs = list(zip(runs[ours], found, strict=True))
            speed = format_spread([a.tokens_per_second / b.tokens_per_second for a, b in pairs], 2)
            rows = format_spread([a.rows_per_second / b.rows_per_second for a, b in pairs], 2)
            memory = format_spread(
                [(a.device_mib or a.memory_mib) / (b.device_mib or b.memory_mib) for a, b in pairs],
                2,
            )
            table.append([f"{key}  {names[key]}", f"{speed} x", f"{rows} x", f"{memory} x"])
    return markdown(table)


def prediction_table(
    names: Mapping[str, str],
    runs: Mapping[str, Sequence[PredictResult]],
    truth: Sequence[str],
    ours: str = "bertdist",
) -> str:
    """One line per contender: rows/s, memory, accuracy, the ratio of `ours` to it per repetition,
    and what differs from the answers of the first contender. truth: the labels of the texts.
    """
    reference = next(iter(runs))
    table = [
        [
            "",
            "rows/s",
            "peak memory, MiB",
            f"{names[ours]} to it, rows/s",
            "accuracy",
            "other labels",
            "largest difference of a score",
        ]
    ]
    for key, found in runs.items():
        rows = format_spread([len(run.answers) / run.seconds for run in found])
        ratio = format_spread(
            [run.seconds / own.seconds for own, run in zip(runs[ours], found, strict=True)], 2
        )
        pairs = list(zip(runs[reference], found, strict=True))
        differing = [""] * 2
        if key != reference:
            others = max(other_labels(one, run) for one, run in pairs)
            furthest = max(difference(one, run) for one, run in pairs)
            differing = [str(others), f"{furthest:.1e}"]
        table.append(
            [
                names[key],
                rows,
                format_spread([run.process_mib for run in found], 0),
                "" if key == ours else f"{ratio} x",
                format_spread([accuracy(run, truth) for run in found], 4),
                *differing,
            ]
        )
    return markdown(table)


def accuracy(run: PredictResult, truth: Sequence[str]) -> float:
    """Share of the answers with the right label."""
    pairs = zip(run.answers, truth, strict=True)
    return sum(answer[0] == label for answer, label in pairs) / len(truth)


def other_labels(one: PredictResult, other: PredictResult) -> int:
    """Texts with different labels."""
    return sum(a[0] != b[0] for a, b in zip(one.answers, other.answers, strict=True))


def difference(one: PredictResult, other: PredictResult) -> float:
    """Largest difference between two scores of a text, of the same label (of two labels)."""
    return max(
        abs(a[1] - (b[1] if a[0] == b[0] else 1 - b[1]))
        for a, b in zip(one.answers, other.answers, strict=True)
    )


def assert_same_answers(runs: Mapping[str, PredictResult], tolerance: float = 1e-4) -> None:
    """Raises BenchError for the first text with different labels or too different scores."""
    (first, ours), *others = runs.items()
    for name, run in others:
        for row, (a, b) in enumerate(zip(ours.answers, run.answers, strict=True)):
            if a[0] != b[0] or abs(a[1] - b[1]) > tolerance:
                said = f"{first} says {a[0]} {a[1]:.6f}, {name} says {b[0]} {b[1]:.6f}"
                raise BenchError(
                    f"Text {row}: {said}; expected the same label, and scores within {tolerance:g}."
                )


def accuracy_table(
    names: Mapping[str, str], seeds: Sequence[int], accuracies: Mapping[str, Sequence[float]]
) -> str:
    """One line per contender, one column per seed; mean, spread, and differences to the first."""
    table = [["", *(f"seed {seed}" for seed in seeds), "mean (min-max)"]]
    (first, ours), *others = accuracies.items()
    lines = [(names[key], values) for key, values in accuracies.items()]
    lines += [
        (f"{names[first]} minus {names[key]}", [a - b for a, b in zip(ours, values, strict=True)])
        for key, values in others
    ]
    for name, values in lines:
        mean = sum(values) / len(values)
        table.append(
            [
                name,
                *(f"{value:.4f}" for value in values),
                f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})",
            ]
        )
    return markdown(table)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table whose first line is the header; numbers are right-aligned."""
    head, *lines = table
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
