"""Several runs side by side: which is better, is it sure, what differs, which rows changed.

    comparison = compare_runs([read_run("out1"), read_run("out2")])
    comparison.verdict                          # ["out2 is better than out1: accuracy 1.2 ..."]
    comparison.splits[0].differences["accuracy"]
    to_json(comparison.summary())               # for machines

Nothing here draws or prints. Runs are numbered in the order in which they were given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from bertdist.core.atomic_io import read_json_object
from bertdist.core.errors import ConfigError, listed
from bertdist.reporting.changed_rows import (
    ChangedRow,
    Changes,
    LabelScores,
    agreement,
    changed_rows,
    label_scores,
    never_right,
)
from bertdist.reporting.differing_settings import (
    SEED,
    SettingDifference,
    differ_by_seed_only,
    differing_facts,
    differing_settings,
    groups_by_settings,
)
from bertdist.reporting.matched_rows import MatchedRows, match_rows, read_texts
from bertdist.reporting.run_folder import RunFolder, ScoredRows
from bertdist.reporting.score_differences import Difference, Score, compare_scores
from bertdist.reporting.verdict import seeds_verdict, verdict
from bertdist.tasks.labels import SINGLE_LABEL, LabelIndex
from bertdist.tasks.metrics import OF_POSITIVE
from bertdist.training.resume_check import checkpoints_in

MOST_RUNS = 20
FEW_ROWS = 30
CURVE_POINTS = 400  # of a run


@dataclass(frozen=True)
class SplitComparison:
    """Runs on the rows of one split that they share."""

    name: str  # test, validation, or evaluated for those of `bertdist evaluate`
    problem_type: str
    rows: int  # that all runs share; 0: nothing below is filled
    totals: tuple[int, ...]  # of each run: rows that it was evaluated on
    notes: tuple[str, ...]  # how rows and labels were matched
    main_score: str
    reported: Mapping[str, tuple[Any, ...]]  # score -> of each run on all its rows; None without
    scores: tuple[Score, ...] = ()
    differences: Mapping[str, tuple[Difference, ...]] = field(default_factory=dict)
    agreement: tuple[tuple[float, ...], ...] = ()
    changes: tuple[Changes, ...] = ()  # from the first run to each other
    never_right: int = 0
    never_right_rows: tuple[ChangedRow, ...] = ()
    labels: tuple[LabelScores, ...] = ()

    @property
    def main(self) -> Score | None:
        """The score that decides; None where no row is shared."""
        return next((score for score in self.scores if score.name == self.main_score), None)

    @property
    def best_run(self) -> int | None:
        """The run that is better than each other one by the main score, surely."""
        if self.main is None or not all(map(math.isfinite, self.main.values)):
            return None
        values, sign = self.main.values, self.main.sign
        best = max(range(len(values)), key=lambda run: sign * values[run])
        pairs = [x for x in self.differences[self.main.name] if best in (x.a, x.b)]
        return best if all(pair.is_sure for pair in pairs) else None


@dataclass(frozen=True)
class SeedSpread:
    """Runs of one setting, which differ by their seed only."""

    runs: tuple[int, ...]
    mean: float
    deviation: float | None  # sample standard deviation; None of one run
    lowest: float
    highest: float


@dataclass(frozen=True)
class Curve:
    """A value of a run over its length."""

    run: int
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """All that is known of several runs together."""

    names: tuple[str, ...]  # the shortest that tell them apart
    folders: tuple[str, ...]
    splits: tuple[SplitComparison, ...]  # the first one decides
    settings: tuple[SettingDifference, ...]  # with the rows that were trained on
    has_settings: bool  # False where one is an evaluation, whose training is not known
    facts: tuple[SettingDifference, ...]  # software and machines
    commands: tuple[str, ...]
    seeds_only: bool
    seeds: tuple[SeedSpread, ...]  # of the main score; empty where no setting has two seeds
    verdict: tuple[str, ...]  # sentences; the first one is the answer
    x_axis: str  # epoch, tokens or step
    loss_curves: tuple[Curve, ...]  # of training
    score_curves: Mapping[str, tuple[Curve, ...]]  # of the validation rows: loss, main score

    def summary(self) -> dict[str, Any]:
        """For JSON, without curves."""
        values = asdict(self)
        for name in ("loss_curves", "score_curves", "x_axis"):
            del values[name]
        return values


def compare_runs(runs: Sequence[RunFolder]) -> Comparison:
    """Of two runs, or more. Raises ConfigError for fewer, and for more than MOST_RUNS."""
    folders = [str(run.folder) for run in runs]
    if not 2 <= len(runs) <= MOST_RUNS:
        raise ConfigError(
            f"{len(runs)} runs are to be compared; expected 2 to {MOST_RUNS}. "
            "bertdist report shows one."
        )
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"A run is given twice: {listed(folders)}. Name each folder once.")
    names = run_names(folders)
    has_settings = all(run.config for run in runs)  # not those of bertdist evaluate
    settings: tuple[SettingDifference, ...] = ()
    if has_settings:
        settings = differing_settings([{**run.config, **_trained_rows(run)} for run in runs])
    splits = _compare_splits(runs, names)
    main = splits[0].main_score
    seeds_only = differ_by_seed_only(settings)
    seeds: tuple[SeedSpread, ...] = ()
    if any(each.name == SEED for each in settings):
        seeds = _seed_spreads(splits[0], groups_by_settings([x.config for x in runs], settings))
    axis = _x_axis(runs, settings)
    shown = dict.fromkeys(("loss", main))
    return Comparison(
        names=names,
        folders=tuple(folders),
        splits=splits,
        settings=settings,
        has_settings=has_settings,
        facts=differing_facts([run.environment for run in runs]),
        commands=tuple(" ".join(map(str, run.environment.get("command", ()))) for run in runs),
        seeds_only=seeds_only,
        seeds=seeds,
        verdict=_answer(
            names, splits[0], settings if has_settings else None, seeds if seeds_only else ()
        ),
        x_axis=axis,
        loss_curves=_curves(runs, "train", "loss", axis),
        score_curves={name: _curves(runs, "eval", name, axis) for name in shown},
    )


def run_names(folders: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = tuple("/".join(parts[-length:]) for parts in paths)
        if len(set(names)) == len(names):
            return names
    return tuple(folders)


def _trained_rows(run: RunFolder) -> dict[str, str]:
    """What the newest checkpoint says of the rows of the run, where there is one."""
    for folder in reversed(checkpoints_in(run.folder / "checkpoints")):
        state = read_json_object(folder / "state.json")
        found = {**state.get("must_match", {}), **state.get("may_change", {})}
        rows = {"training rows": "training_rows", "validation rows": "validation_rows"}
        known = {name: found[key] for name, key in rows.items() if found.get(key)}
        if known:
            return {name: _short_digest(str(value)) for name, value in known.items()}
    return {}


def _short_digest(rows: str) -> str:
    """`2686 rows, 98fa88ca4cb14f6d...` -> `2,686 rows (98fa88ca)`."""
    number, _, digest = rows.partition(", ")
    size = number.removesuffix(" rows")
    return f"{int(size):,} rows ({digest[:8]})" if size.isdecimal() else f"{number} ({digest[:8]})"


# ---- Splits


def _compare_splits(runs: Sequence[RunFolder], names: Sequence[str]) -> tuple[SplitComparison, ...]:
    """Test rows first, because the validation rows have chosen the best weights. An evaluation is
    compared with whichever rows of the others are its own.
    """
    if all(run.is_evaluation for run in runs):
        candidates = {"evaluated": [run.validation for run in runs]}
    else:
        candidates = {
            split: [run.validation if run.is_evaluation else run.scored.get(split) for run in runs]
            for split in ("test", "validation")
        }
    complete = {
        split: [x for x in rows if x is not None]
        for split, rows in candidates.items()
        if all(x is not None for x in rows)
    }
    if not complete:
        raise ConfigError(
            "The runs have no split in common: "
            + "; ".join(f"{n}: {', '.join(x.scored)}" for n, x in zip(names, runs, strict=True))
            + ". Evaluate each on the same rows: bertdist evaluate --model RUN --input FILE "
            "--output_dir FOLDER, and compare these folders."
        )
    found = [_compare_split(split, rows, runs, names) for split, rows in complete.items()]
    shared = [split for split in found if split.rows]
    return tuple(shared or found)


def _compare_split(
    split: str, scored: Sequence[ScoredRows], runs: Sequence[RunFolder], names: Sequence[str]
) -> SplitComparison:
    reports = [rows.report.get("scores", {}) for rows in scored]
    reported = {
        name: tuple(_number(report.get(name)) for report in reports)
        for name in dict.fromkeys(name for report in reports for name in report)
    }
    common = [name for name in reported if all(name in report for report in reports)]
    wanted = [run.config.get("metric_for_best_model") for run in runs]
    others = [name for name in common if name != "loss"] or ["loss"]
    main = next((str(name) for name in wanted if name in common), others[0])
    matched = match_rows(scored, [read_texts(rows.path) for rows in scored])
    comparison = SplitComparison(
        name=split,
        problem_type=scored[0].problem_type,
        rows=0 if matched is None else len(matched),
        totals=tuple(map(len, scored)),
        notes=tuple(_notes(matched, scored, names)),
        main_score=main,
        reported=reported,
    )
    return comparison if matched is None else _filled(comparison, matched, scored, common, runs)


def _filled(
    split: SplitComparison,
    matched: MatchedRows,
    scored: Sequence[ScoredRows],
    names: Sequence[str],
    runs: Sequence[RunFolder],
) -> SplitComparison:
    """With all that is computed of the shared rows."""
    first = scored[0]

    def texts(rows: Sequence[int]) -> list[str]:
        return ["\n".join(map(str, text.values())) for text in first.texts(rows)]

    positives = [_positive_label(run, rows) for run, rows in zip(runs, scored, strict=True)]
    left_out = [name for name in names if name in OF_POSITIVE and len(set(positives)) > 1]
    if left_out:  # scores of one name, but of different labels
        names = [name for name in names if name not in left_out] or ["accuracy"]
        note = (
            f"{listed(left_out)} of the runs are of different labels ({listed(positives)}, "
            "--positive_label): not compared."
        )
        split = replace(split, notes=(*split.notes, note))
    number = matched.labels.index(positives[0]) if positives[0] in matched.labels else 1
    scores, differences = compare_scores(names, matched, number)
    main = split.main_score if split.main_score in differences else scores[0].name
    never, rows = never_right(matched, texts)
    return replace(
        split,
        main_score=main,
        scores=scores,
        differences=differences,
        agreement=agreement(matched),
        changes=tuple(changed_rows(matched, 0, run, texts) for run in range(1, len(runs))),
        never_right=never,
        never_right_rows=rows,
        labels=label_scores(matched),
    )


def _positive_label(run: RunFolder, rows: ScoredRows) -> str:
    """The positive one of two labels in the scores of a run, or an evaluation; "" of others."""
    if rows.problem_type != SINGLE_LABEL or len(rows.labels) != 2:
        return ""
    of = rows.report.get("evaluated") if run.is_evaluation else run.config
    given = of.get("positive_label") if isinstance(of, dict) else None
    found = None if given is None else LabelIndex(rows.labels).find(str(given))
    return rows.labels[1 if found is None else found]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _notes(
    matched: MatchedRows | None, scored: Sequence[ScoredRows], names: Sequence[str]
) -> list[str]:
    """How rows and labels were matched, in sentences."""
    kinds = [rows.problem_type for rows in scored]
    totals = ", ".join(f"{name} {len(x):,}" for name, x in zip(names, scored, strict=True))
    if len(set(kinds)) > 1:
        tasks = ", ".join(f"{name} {kind}" for name, kind in zip(names, kinds, strict=True))
        return [f"The runs have different tasks, which do not compare: {tasks}."]
    if matched is None:
        return [
            f"The runs were evaluated on different rows ({totals}), none of which they share: no "
            "score is compared. Evaluate all on one file: bertdist evaluate --model RUN --input "
            "FILE --output_dir FOLDER, and compare these folders."
        ]
    notes = []
    if not matched.all_shared:
        few = ", which are few" if len(matched) < FEW_ROWS else ""
        notes.append(
            f"The runs were evaluated on different rows ({totals}); only the {len(matched):,} rows "
            f"that they share{few}, by text and label, are compared."
        )
    elif not matched.in_order:
        notes.append("The rows are the same in another order; they were matched by text and label.")
    if matched.relabelled:
        notes.append(
            f"{matched.relabelled:,} texts have another label in another run's rows and are left "
            "out."
        )
    for name, labels in zip(names, matched.lacking, strict=True):
        if labels:
            word = "label" if len(labels) == 1 else "labels"
            notes.append(
                f"{name} does not know the {word} {listed(labels)}: it has them always wrong, with "
                "probability 0."
            )
    thresholds = {str(rows.threshold) for rows in scored}
    if len(thresholds) > 1:
        notes.append("The runs use different thresholds: each one's answers are by its own.")
    return notes


# ---- The answer


def _answer(
    names: Sequence[str],
    split: SplitComparison,
    settings: Sequence[SettingDifference] | None,
    seeds: Sequence[SeedSpread],
) -> tuple[str, ...]:
    """Sentences, of which the first is the answer. settings: None where they are not known. seeds:
    of runs that differ by nothing else.
    """
    if seeds:
        (spread,) = seeds
        ends, number = (spread.lowest, spread.highest), len(spread.runs)
        return (seeds_verdict(split.main_score, spread.mean, spread.deviation, ends, number),)
    if split.main is None:
        return (f"No answer. {split.notes[0]}",)
    pairs = split.differences[split.main.name]
    sentences = verdict(names, split.main, pairs, split.rows, split.name)
    others = [name for name, found in split.differences.items() if all(x.is_sure for x in found)]
    if split.best_run is None and others:
        sentences += (f"Surely different are: {listed(others)}.",)
    if split.name == "validation":
        sentences += (
            "These rows have chosen the best weights of each run; rows of --test_file have not.",
        )
    if settings is not None and not any(each.decides for each in settings):
        sentences += ("No setting that decides what is learned differs between the runs.",)
    return sentences


# ---- Seeds and curves


def _seed_spreads(
    split: SplitComparison, groups: Sequence[tuple[int, ...]]
) -> tuple[SeedSpread, ...]:
    """Of the main score, of runs that differ by their seed only; empty where none do."""
    if max(map(len, groups)) < 2:
        return ()
    values = split.main.values if split.main else split.reported.get(split.main_score, ())
    spreads = []
    for runs in groups:
        mine = [values[run] for run in runs if values[run] is not None]
        if mine and all(map(math.isfinite, mine)):
            deviation = stdev(mine) if len(mine) > 1 else None
            spreads.append(SeedSpread(runs, mean(mine), deviation, min(mine), max(mine)))
    return tuple(spreads)


def _x_axis(runs: Sequence[RunFolder], settings: Sequence[SettingDifference]) -> str:
    """Epochs where all train on the same rows, else tokens, where they are logged, else steps."""
    lines = [[x for x in run.metrics if x.get("kind") == "train"] for run in runs]
    same_rows = "training rows" not in {each.name for each in settings}
    for name in ("epoch", "tokens") if same_rows else ("tokens", "epoch"):
        if all(_number(x.get(name)) is not None for each in lines for x in each[:1] + each[-1:]):
            return name
    return "step"


def _curves(runs: Sequence[RunFolder], kind: str, name: str, axis: str) -> tuple[Curve, ...]:
    """A value of the lines of metrics.jsonl; runs without one are left out."""
    curves = []
    for number, run in enumerate(runs):
        lines = [
            x for x in run.metrics if x.get("kind") == kind and _number(x.get(name)) is not None
        ]
        places = _places(run, lines, axis)
        points = [(x, float(line[name])) for x, line in zip(places, lines, strict=True)]
        if points:
            stride = max(1, math.ceil(len(points) / CURVE_POINTS))
            kept = points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
            x, y = zip(*kept, strict=True)
            curves.append(Curve(number, x, y))
    return tuple(curves)


def _places(run: RunFolder, lines: Sequence[Mapping[str, Any]], axis: str) -> list[float]:
    """Where on the axis lines are; evaluations have no tokens, which those of training have."""
    if axis != "tokens":
        return [float(line.get(axis) or line["step"]) for line in lines]
    known = [x for x in run.metrics if _number(x.get("tokens")) is not None]
    steps, tokens = ([float(x[name]) for x in known] for name in ("step", "tokens"))
    if not steps:
        return [float(line["step"]) for line in lines]
    found: list[float] = np.interp([line["step"] for line in lines], steps, tokens).tolist()
    return found
