"""The page of a comparison of runs.

save(Path("comparison.html"), page_of(compare_runs(runs)))
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from bertdist.core.errors import listed
from bertdist.core.terminal import excerpt
from bertdist.reporting import charts
from bertdist.reporting.changed_rows import ChangedRow, Changes
from bertdist.reporting.charts import Chart, Line
from bertdist.reporting.comparison import Comparison, Curve, SplitComparison
from bertdist.reporting.differing_settings import SettingDifference
from bertdist.reporting.page import number, percent, render
from bertdist.reporting.rows_view import Answer
from bertdist.reporting.score_differences import Difference, rows_needed

NAME_COLUMNS = 40
SHOWN_VALUES = 60  # characters of a setting in an answer


def page_of(comparison: Comparison) -> str:
    """HTML."""
    names = [excerpt(name, NAME_COLUMNS) for name in comparison.names]
    first = comparison.splits[0]
    decisive = [each for each in comparison.settings if each.decides]
    others = [each for each in comparison.settings if not each.decides]
    return render(
        "comparison.html",
        title=f"Comparison of {_and(names) if len(names) < 4 else f'{len(names)} runs'}",
        subtitle=_subtitle(first),
        names=names,
        folders=comparison.folders,
        answers=_answers(comparison, names, decisive),
        sentences=[x for x in comparison.verdict[1:] if not x.startswith("To be sure")],
        splits=[_split(split, names, comparison.seeds_only) for split in comparison.splits],
        seeds=comparison.seeds,
        main_score=first.main_score,
        charts=_charts(comparison, names),
        axis=comparison.x_axis,
        has_settings=comparison.has_settings,
        decisive=decisive,
        others=others,
        facts=comparison.facts,
        commands=list(zip(names, comparison.commands, strict=True)),
    )


def _subtitle(split: SplitComparison) -> str:
    task = split.problem_type.replace("_label_", "-label ")
    rows = f"the same {split.rows:,} rows" if split.rows else "different rows"
    return f"{task}; {rows} ({split.name})"


# ---- The answers at the top


def _answers(
    comparison: Comparison, names: Sequence[str], decisive: Sequence[SettingDifference]
) -> list[Answer]:
    split = comparison.splits[0]
    answers = [_which(comparison, names)]
    if split.main is not None and not comparison.seeds_only:
        answers.append(_sure(split, names))
    answers.append(_settings(comparison, names, decisive))
    if split.changes and split.main is not None:
        merits = [split.main.sign * value for value in split.main.values]
        best = max(range(len(split.changes)), key=lambda i: merits[split.changes[i].b])
        answers.append(_rows(split.changes[best], names, f"changes-{best + 1}"))
    return answers


def _which(comparison: Comparison, names: Sequence[str]) -> Answer:
    split, question = comparison.splits[0], "Which run is better?"
    answer = comparison.verdict[0]
    if comparison.seeds_only:
        return Answer(question, "They differ by seed only", answer)
    if split.main is None:
        return Answer(question, "Cannot be compared", answer, "bad")
    best = split.best_run
    if best is not None:
        return Answer(question, names[best], answer, "good")
    for short in ("Not sure", "No difference", "No answer"):
        if answer.startswith(short):
            more = re.split("[:.] ", answer, maxsplit=1)[1]
            return Answer(question, short, more)
    return Answer(question, "Not sure", answer)


def _sure(split: SplitComparison, names: Sequence[str]) -> Answer:
    assert split.main is not None
    question, link = "Is it sure?", ("scores", "All scores")
    pairs = split.differences[split.main.name]
    if split.best_run is not None:
        short = "Yes"
    elif any(pair.interval is None for pair in pairs):
        short = f"{split.main.name} is undefined"
    else:
        short = "No"
    if len(pairs) > 1:
        short = "Not of the best run" if short == "No" else short
        sure = sum(pair.is_sure for pair in pairs)
        more = (
            f"Of the {len(pairs)} differences between two runs {sure} are sure, with 95% intervals "
            f"that allow for {len(pairs)} comparisons."
        )
        return Answer(question, short, more, "good" if short == "Yes" else "", *link)
    (pair,) = pairs
    more = ""
    if pair.probability is not None and pair.value:
        likely = 1 if pair.probability >= 0.5 else 0
        share = percent(max(pair.probability, 1 - pair.probability))
        more = f"{names[likely]} is better in {share} of the resamples of the rows."
        if (needed := rows_needed(pair, split.rows)) is not None:
            more += f" To be sure of this difference, about {needed:,} rows are needed."
    return Answer(question, short, more, "good" if short == "Yes" else "", *link)


def _settings(
    comparison: Comparison, names: Sequence[str], decisive: Sequence[SettingDifference]
) -> Answer:
    question, link = "What differs in the settings?", ("settings", "All differences")
    if not comparison.has_settings:
        return Answer(question, "Not known", "An evaluation does not hold those of its training.")
    if not decisive:
        return Answer(question, "Nothing that decides what is learned", "", "", *link)
    shown = [
        f"{each.name}: {' / '.join(excerpt(value, SHOWN_VALUES) for value in each.values)}"
        for each in decisive[:3]
    ]
    short = shown[0] if len(comparison.names) <= 4 else listed([x.name for x in decisive], 4)
    more = "; ".join(shown[1:]) if len(comparison.names) <= 4 else ""
    if len(decisive) > 3:
        more += f"; and {len(decisive) - 3} more"
    more = f"{more}." if more else ""
    if 2 < len(names) <= 4 and not comparison.seeds_only:
        more = f"{more} In the order {listed(list(names), 4)}.".strip()
    return Answer(question, short, more, "", *link)


def _rows(changes: Changes, names: Sequence[str], id: str) -> Answer:
    question, link = "Which rows changed?", (id, "Look at them")
    a, b = names[changes.a], names[changes.b]
    if changes.p_value is None:
        short = f"{changes.gained:,} numbers are nearer, {changes.lost:,} farther"
        return Answer(question, short, f"From {a} to {b}.", "", *link)
    short = f"{changes.gained:,} turn right, {changes.lost:,} turn wrong"
    more = f"From {a} to {b}"
    if changes.otherwise:
        more += f"; {changes.otherwise:,} more are wrong in both, with another answer"
    more += "."
    return Answer(question, short, more, "", *link)


# ---- Scores and rows


def _split(split: SplitComparison, names: Sequence[str], seeds_only: bool) -> dict[str, Any]:
    """What the template shows of one split."""
    scores = [
        {
            "name": score.name,
            "values": list(zip(score.values, score.intervals, strict=True)),
            "pair": _pair(split, split.differences[score.name][0]) if len(names) == 2 else None,
            "best": _best(score.values, score.sign),
        }
        for score in split.scores
    ]
    own = [
        {"name": name, "values": values}
        for name, values in split.reported.items()
        if not split.rows or name not in split.differences or len(set(split.totals)) > 1
    ]
    pairs = []
    if split.main is not None and len(names) > 2:
        pairs = [
            {"a": names[x.a], "b": names[x.b], **_pair(split, x)}
            for x in split.differences[split.main.name]
        ]
    return {
        "name": split.name,
        "rows": split.rows,
        "notes": split.notes,
        "main": split.main_score,
        "is_number": split.problem_type == "regression",
        "scores": scores,
        "own": own,
        "totals": split.totals,
        "pairs": [] if seeds_only else pairs,
        "agreement": split.agreement,
        "labels": split.labels,
        "changes": [_changes(each, names) for each in split.changes],
        "never_right": split.never_right,
        "never_right_rows": [_row(row, names) for row in split.never_right_rows],
    }


def _best(values: Sequence[float], sign: int) -> int | None:
    """The run of the best value; None where several have it, or one is undefined."""
    if not all(map(math.isfinite, values)):
        return None
    best = max(values, key=lambda value: sign * value)
    return values.index(best) if list(values).count(best) == 1 else None


def _pair(split: SplitComparison, pair: Difference) -> dict[str, Any]:
    """A difference, and where its interval is on a line from -1 to 1."""
    scale = max(map(abs, (pair.value, *(pair.interval or ()))), default=0) or 1.0
    if split.main is not None and len(split.differences[split.main.name]) > 1:
        everything = split.differences[split.main.name]
        scale = (
            max(abs(x) for each in everything for x in (each.value, *(each.interval or ()))) or 1
        )
    on_line = None
    if pair.interval is not None and math.isfinite(pair.value):
        low, high = (50 + 46 * end / scale for end in pair.interval)
        on_line = {"low": low, "width": high - low, "value": 50 + 46 * pair.value / scale}
    return {
        "value": f"{pair.value:+.4f}" if abs(pair.value) < 10 else f"{pair.value:+.4g}",
        "interval": pair.interval,
        "probability": pair.probability,
        "sure": pair.is_sure,
        "line": on_line,
    }


def _changes(changes: Changes, names: Sequence[str]) -> dict[str, Any]:
    return {
        "a": names[changes.a],
        "b": names[changes.b],
        "gained": changes.gained,
        "lost": changes.lost,
        "otherwise": changes.otherwise,
        "p_value": None if changes.p_value is None else f"{changes.p_value:.2g}",
        "gained_rows": [_row(x, (names[changes.a], names[changes.b])) for x in changes.gained_rows],
        "lost_rows": [_row(x, (names[changes.a], names[changes.b])) for x in changes.lost_rows],
    }


def _row(row: ChangedRow, names: Sequence[str]) -> dict[str, Any]:
    return {
        "row": row.row,
        "text": row.text,
        "truth": _labels(row.truth),
        "answers": [
            {"run": name, "answer": answer_in_words(answer)}
            for name, answer in zip(names, row.answers, strict=True)
        ],
    }


def _labels(truth: Any) -> str:
    if isinstance(truth, list):
        return listed(truth, 10) or "no label"
    return number(truth) if isinstance(truth, float) else str(truth)


def answer_in_words(answer: dict[str, Any]) -> str:
    """`yes (0.98)`, `joy (0.81), love (0.60)`, `3.5`."""
    if "labels" in answer:
        given = [f"{each['label']} ({each['score']:.2f})" for each in answer["labels"]]
        return listed(given, 10) or "no label"
    if "label" in answer:
        return f"{answer['label']} ({answer['score']:.2f})"
    return number(answer["score"])


# ---- Curves


def _charts(comparison: Comparison, names: Sequence[str]) -> list[Chart]:
    axis = {"epoch": "epochs", "tokens": "tokens trained on", "step": "steps"}[comparison.x_axis]
    pictures = []
    if comparison.loss_curves:
        description = f"Mean training loss of each run over {axis}, between two log lines."
        pictures.append(
            _chart(
                "training-loss",
                "Training loss",
                description,
                comparison.loss_curves,
                names,
                axis,
                "loss",
            )
        )
    for score, curves in comparison.score_curves.items():
        if curves:
            title = f"Validation {score}"
            description = f"Validation {score} of each run over {axis}."
            pictures.append(
                _chart(
                    f"validation-{len(pictures)}", title, description, curves, names, axis, score
                )
            )
    return pictures


def _chart(
    id: str,
    title: str,
    description: str,
    curves: Sequence[Curve],
    names: Sequence[str],
    x: str,
    y: str,
) -> Chart:
    lines = [Line(names[each.run], each.x, each.y, marker=len(each.x) < 30) for each in curves]
    return charts.line_chart(id, title, description, lines, x, y, named_at_end=True)


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
