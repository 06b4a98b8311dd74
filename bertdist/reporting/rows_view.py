"""The rows of one evaluation as a page shows them: numbers, sentences, tables and charts.

    view = view_of("validation", run.validation, run)     # what templates/rows.html reads

What is large is bounded, and the page says so: the first MISTAKES rows, LABELS of a table, MATRIX
labels of a matrix, points of a chart.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bertdist.core.errors import listed
from bertdist.core.terminal import excerpt
from bertdist.core.types import Array
from bertdist.reporting import analysis, charts
from bertdist.reporting.charts import Chart
from bertdist.reporting.page import number, percent
from bertdist.reporting.run_folder import RunFolder, ScoredRows
from bertdist.tasks.calibration import calibration_notes

MISTAKES = 30  # rows with a wrong answer
LABELS = 40  # lines of a table of labels
MATRIX, MATRIX_OF_MANY = 30, 20  # labels up to which all are in the matrix; else the most confused
PAIRS = 15  # confusions
MOST_ISSUES = 0.05  # share of rows that look mislabelled, up to which they are marked
CURVES = 6  # labels up to which each has a precision-recall curve
DECISIONS = 2e7  # rows x labels that are sorted for a curve of all labels
NO_SHARES = ("loss", "log_loss", "mse", "rmse", "mae")  # scores that may be above 1


@dataclass(frozen=True)
class Answer:
    """A question that the top of the page answers."""

    question: str
    short: str
    more: str = ""
    verdict: str = ""  # good, bad
    link: str = ""
    link_text: str = ""


@dataclass(frozen=True)
class SplitView:
    """What rows.html shows of one evaluation."""

    id: str
    heading: str
    about: str
    answers: list[Answer]
    scores: list[dict[str, Any]]
    notes: list[str]
    per_label: dict[str, Any] | None
    pairs: dict[str, Any] | None
    matrix: dict[str, Any] | None
    counts: dict[str, Any] | None
    numbers: dict[str, Any] | None
    calibration: dict[str, Any] | None
    curves: Chart | None
    group_score: str
    lengths: dict[str, Any]
    truncation: dict[str, Any]
    slices: dict[str, Any] | None
    mistakes: dict[str, Any]
    sections: list[tuple[str, str]] = field(default_factory=list)


def view_of(
    name: str, rows: ScoredRows, run: RunFolder, explanations: Mapping[int, Any]
) -> SplitView:
    """name: validation or test. explanations: row -> its `explain.Words`."""
    id = "rows" if run.is_evaluation else name
    scores = _scores(rows)
    group_score, score = analysis.scoring(rows)
    found = None if rows.is_regression else analysis.reliability(rows)
    confusion = None if rows.is_multi_label or rows.is_regression else _confusion(rows)
    issues = analysis.mislabelled(rows)
    doubts = int(issues.sum())
    if doubts > MOST_ISSUES * len(rows):  # it says more of the model than of the labels
        issues = np.zeros(len(rows), bool)
    truncation = _truncation(rows, score)
    heading = "Evaluated rows" if run.is_evaluation else f"{name.capitalize()} rows"
    view = SplitView(
        id=id,
        heading=heading,
        about=_about(name, rows, run),
        answers=_answers(id, rows, run, found, confusion, doubts),
        scores=scores,
        notes=_notes(rows),
        per_label=_per_label(rows),
        pairs=None if confusion is None else _pairs(rows, confusion),
        matrix=None if confusion is None else _matrix(rows, confusion),
        counts=_counts(rows) if rows.is_multi_label else None,
        numbers=_numbers(id, rows) if rows.is_regression else None,
        calibration=None if found is None else _calibration(id, rows, found),
        curves=None if rows.is_regression else _curves(id, rows),
        group_score=group_score,
        lengths=_lengths(rows, score),
        truncation=truncation,
        slices=_slices(rows, score),
        mistakes=_mistakes(rows, issues, explanations),
    )
    return dataclasses.replace(view, sections=_sections(view))


def _sections(view: SplitView) -> list[tuple[str, str]]:
    parts = {
        "labels": ("Labels", view.per_label),
        "confusion": ("Confusions", view.matrix or view.counts),
        "numbers": ("Numbers", view.numbers),
        "calibration": ("Probabilities", view.calibration),
        "groups": ("Lengths and groups", True),
        "mistakes": ("Mistakes", True),
    }
    found = [(f"{view.id}-{part}", name) for part, (name, there) in parts.items() if there]
    prefix = "" if view.id != "test" else "Test: "
    return [(view.id, view.heading), *((id, prefix + name) for id, name in found)]


def _about(name: str, rows: ScoredRows, run: RunFolder) -> str:
    of = rows.report.get("evaluated")
    source = of.get("data") if isinstance(of, dict) else None
    if not run.is_evaluation:
        given = [run.config.get(f"{name}_{kind}") for kind in ("file", "split")]
        source = given[0] or (f"--{name}_split {given[1]}" if given[1] else None)
        source = source or run.config.get("dataset_name") or run.config.get("task_name")
    return f"{_rows(len(rows))}{f' of {source}' if source else ''}."


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _scores(rows: ScoredRows) -> list[dict[str, Any]]:
    """All of evaluation.json, with what they are not called there."""
    intervals = rows.report.get("intervals") or {}
    found = []
    for name, value in rows.report["scores"].items():
        if isinstance(value, int | float | None):
            ends = intervals.get(name)
            is_share = name not in NO_SHARES
            shown = float("nan") if value is None else float(value)
            found.append({"name": name, "value": shown, "interval": ends, "is_share": is_share})
    return found


def _notes(rows: ScoredRows) -> list[str]:
    """Warnings about the answers; what calibration has changed is said beside the probabilities."""
    from bertdist.training.run_summary import report_notes

    fitted = calibration_notes(rows.report)
    return [note for note in report_notes(rows.report) if note not in fitted]


def _answers(
    id: str,
    rows: ScoredRows,
    run: RunFolder,
    found: analysis.Reliability | None,
    confusion: Array | None,
    issues: int,
) -> list[Answer]:
    answers = [_how_good(id, rows, run)]
    if confusion is not None:
        answers.append(_confused(id, rows, confusion))
    if rows.is_multi_label:
        answers.append(_hardest(id, rows))
    if found is not None:
        answers.append(_honest(id, rows, found))
    if rows.is_regression:
        answers.append(_biased(id, rows))
    if confusion is not None:
        wrong = 1 - float(np.trace(confusion)) / max(1, int(confusion.sum()))
        answers.append(_mislabelled(id, rows, wrong, issues))
    elif rows.is_multi_label:
        answers.append(_mislabelled(id, rows, _wrong(rows) / max(1, len(rows)), issues))
    if rows.truncated.any():
        share = float(rows.truncated.mean())
        answers.append(
            Answer(
                "Was text cut off?",
                f"{percent(share)} of the rows were truncated",
                "",
                link=f"{id}-truncated",
                link_text="Does it matter?",
            )
        )
    return answers


def _mislabelled(id: str, rows: ScoredRows, wrong: float, issues: int) -> Answer:
    """wrong: share of the rows with a wrong answer."""
    question, link = "Which rows look mislabelled?", f"{id}-mistakes"
    if not issues:
        return Answer(question, "None", "", "", link, "The surest mistakes")
    if issues > MOST_ISSUES * len(rows):
        more = (
            f"It contradicts the labels of {_rows(issues)} with confidence, but it is wrong in "
            f"{percent(wrong)} of all rows: most of them will be its own mistakes."
        )
        short = "This model cannot tell"
        return Answer(question, short, more, "", link, "The surest ones come first")
    short = f"{_rows(issues)} look mislabelled" if issues != 1 else "1 row looks mislabelled"
    surer = (
        "another label at least the probability that rows of that label have"
        if not rows.is_multi_label
        else "a label, or its absence, at least the probability that rows with, or without, it have"
    )
    more = (
        f"The model gives {surer} on average (confident learning). Read them before you change "
        "them."
    )
    return Answer(question, short, more, "", link, "Look at them")


def _how_good(id: str, rows: ScoredRows, run: RunFolder) -> Answer:
    scores = rows.report["scores"]
    chosen = run.config.get("metric_for_best_model")
    others = [x for x, value in scores.items() if x != "loss" and isinstance(value, float | int)]
    name = chosen if chosen in scores else (others or list(scores))[0]
    ends = (rows.report.get("intervals") or {}).get(name)
    value = scores[name]
    short = f"{name} {number(value) if value is not None else 'undefined'}"
    more = ""
    if ends:
        more = f"95% interval {number(ends[0])} to {number(ends[1])} on {_rows(len(rows))}."
    if (most := analysis.majority(rows)) and "accuracy" in scores:
        label = excerpt(most["label"], 30)
        more += f" Always answering {label!r} would have accuracy {number(most['accuracy'])}."
    notes = _notes(rows)
    more = " ".join([more, *notes]).strip()
    verdict, question = "bad" if notes else "", "How good is it, and how sure is that?"
    return Answer(question, short, more, verdict, f"{id}-scores", "Scores")


def _confused(id: str, rows: ScoredRows, confusion: Array) -> Answer:
    question = "Which two labels are confused?"
    wrong = confusion - np.diag(np.diag(confusion))
    both = np.triu(wrong + wrong.T)
    if not both.any():
        return Answer(question, "None: every row is right", "", "good")
    i, j = (int(x) for x in np.unravel_index(int(both.argmax()), both.shape))
    first, second = (repr(excerpt(rows.labels[x], 40)) for x in (i, j))
    there, back = int(wrong[i, j]), int(wrong[j, i])
    more = (
        f"{_rows(there)} of {first} predicted as {second}, {back:,} the other way; "
        f"{_rows(int(wrong.sum()))} wrong in all."
    )
    return Answer(question, f"{first} and {second}", more, "", f"{id}-confusion", "Confusions")


def _hardest(id: str, rows: ScoredRows) -> Answer:
    per_class = [entry for entry in rows.report.get("per_class", ()) if entry["rows"]]
    question = "Which label is the hardest?"
    if not per_class:
        return Answer(question, "No row has a label")
    worst = min(per_class, key=lambda entry: entry["f1"])
    more = (
        f"f1 {number(worst['f1'])}: of its {_rows(worst['rows'])} {percent(worst['recall'])} are "
        f"found, and {percent(worst['precision'])} of those found have it."
    )
    if not worst["recall"]:
        more = f"None of its {_rows(worst['rows'])} is found."
    short = repr(excerpt(worst["label"], 40))
    return Answer(question, short, more, "", f"{id}-labels", "Scores per label")


def _honest(id: str, rows: ScoredRows, found: analysis.Reliability) -> Answer:
    gap = found.mean_confidence - found.mean_accuracy
    honest = found.ece <= found.ece_by_chance
    short = "Yes, as far as these rows can tell"
    if not honest:
        short = "No: too sure of itself" if gap > 0 else "No: less sure than it could be"
        short = (
            short if abs(gap) > found.ece / 2 else "No: too sure in parts, and not enough in others"
        )
    more = (
        f"Mean probability {number(found.mean_confidence)}, {_came_true(rows)} "
        f"{number(found.mean_accuracy)}; "
        f"expected calibration error {number(found.ece)} (by chance up to "
        f"{number(found.ece_by_chance)})."
    )
    verdict = "good" if honest else "bad"
    return Answer(
        "Are the probabilities honest?", short, more, verdict, f"{id}-calibration", "Probabilities"
    )


def _biased(id: str, rows: ScoredRows) -> Answer:
    gaps = analysis.residuals(rows, charts.SCATTER_POINTS)
    side = "low" if gaps.mean < 0 else "high"
    short = f"Too {side} by {number(abs(gaps.mean))} on average"
    more = (
        f"Predicted less true number: mean {number(gaps.mean)}, standard deviation "
        f"{number(gaps.std)}."
    )
    return Answer("Is it biased?", short, more, "", f"{id}-numbers", "Numbers")


# ---- Labels


def _per_label(rows: ScoredRows) -> dict[str, Any] | None:
    per_class = rows.report.get("per_class") or []
    if not per_class:
        return None
    caption = "In the order of the model's outputs."
    shown = per_class
    if len(per_class) > LABELS:
        with_rows = [entry for entry in per_class if entry["rows"]]
        shown = sorted(with_rows, key=lambda entry: float(entry["f1"]))[:LABELS]
        caption = f"The {len(shown):,} lowest f1 of {len(per_class):,} labels"
        caption += "; all are in evaluation.json."
    columns = ["rows", "precision", "recall", "f1"]
    return {
        "caption": caption,
        "columns": columns,
        "rows": [
            {
                "label": str(entry["label"]),
                "values": [entry[name] for name in columns],
                "f1": float(entry["f1"]),
            }
            for entry in shown
        ],
    }


def _confusion(rows: ScoredRows) -> Array:
    """(L, L), of evaluation.json where it is there."""
    given = rows.report.get("confusion")
    return np.array(given) if given else analysis.confusion_counts(rows)


def _pairs(rows: ScoredRows, confusion: Array) -> dict[str, Any] | None:
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[: PAIRS + 1]
    places = [np.unravel_index(int(place), wrong.shape) for place in order]
    found = [(int(i), int(j)) for i, j in places if wrong[i, j]]
    if not found:
        return None
    distinct = int((wrong > 0).sum())
    more = f", {PAIRS} of {distinct:,} that occur" if distinct > PAIRS else ""
    totals = confusion.sum(1)
    return {
        "more": more,
        "rows": [
            {
                "label": rows.labels[i],
                "predicted": rows.labels[j],
                "rows": int(wrong[i, j]),
                "share": float(wrong[i, j] / totals[i]),
            }
            for i, j in found[:PAIRS]
        ],
    }


def _matrix(rows: ScoredRows, confusion: Array) -> dict[str, Any]:
    labels = len(rows.labels)
    shown, others = np.arange(labels), 0
    caption = "Rows of the table: true labels; columns: predicted labels; an empty cell is 0."
    if labels > MATRIX:
        wrong = confusion - np.diag(np.diag(confusion))
        most = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:MATRIX_OF_MANY]
        shown, others = np.sort(most), labels - len(most)
        caption += (
            f" The {len(shown)} labels with most confusions of {labels:,}; the other {others:,} "
            "are one column, and their own rows are left out."
        )
    lines = []
    for i in shown:
        total = max(1, int(confusion[i].sum()))
        counts = confusion[i, shown].tolist()
        counts += [int(confusion[i].sum() - confusion[i, shown].sum())] if others else []
        kinds = ["right" if j == i else "wrong" for j in [*shown, -1][: len(counts)]]
        cells = [
            {"count": int(n), "kind": kind if n else "", "share": math.sqrt(n / total)}
            for n, kind in zip(counts, kinds, strict=True)
        ]
        lines.append({"label": rows.labels[i], "cells": cells})
    names = [rows.labels[i] for i in shown]
    return {"labels": names, "rows": lines, "caption": caption, "has_others": bool(others)}


def _counts(rows: ScoredRows) -> dict[str, Any]:
    counts = analysis.binary_counts(rows)
    wrong = counts[:, 1] + counts[:, 2]
    order = np.arange(len(counts))
    caption = "Rows that have the label and are given it (found), have it and are not given it "
    caption += "(missed), do not have it and are given it, and neither."
    if len(counts) > LABELS:
        order = np.argsort(-wrong, kind="stable")[:LABELS]
        caption += f" The {LABELS} labels with most wrong decisions of {len(counts):,}."
    found = [{"label": rows.labels[i], "values": counts[i][[0, 2, 1, 3]].tolist()} for i in order]
    return {"caption": caption, "rows": found}


# ---- Probabilities


def _calibration(id: str, rows: ScoredRows, found: analysis.Reliability) -> dict[str, Any]:
    scores = rows.report["scores"]
    ece = scores["ece"] if isinstance(scores.get("ece"), float) else found.ece
    nll = scores.get("log_loss") or scores.get("loss")
    what, unit = "rows by the probability of the predicted label", "rows"
    share = "share that is right"
    if rows.is_multi_label:
        what, unit = "pairs of a row and a label by the probability of the label", "pairs"
        share = "share that has the label"
    summary = (
        f"Expected calibration error (ECE) {number(ece)}, negative log-likelihood (NLL) "
        f"{number(nll)}. A model whose probabilities are honest would have an ECE up to "
        f"{number(found.ece_by_chance)} on these rows by chance."
    )
    title = "Reliability diagram"
    description = (
        f"Of {what}: the {share}. Points below the dashed line: the model is too sure. Grey bars: "
        "how many there are."
    )
    bins = [
        {
            "name": f"{found.edges[i]:.2f} to {found.edges[i + 1]:.2f}",
            "rows": int(found.rows[i]),
            "confidence": float(found.confidence[i]),
            "accuracy": float(found.accuracy[i]),
            "interval": (float(found.low[i]), float(found.high[i])),
        }
        for i in np.flatnonzero(found.rows)
    ]
    chart = charts.reliability_chart(f"{id}-reliability", title, description, found, share)
    caption = f"{what.capitalize()}, in {len(found.rows)} bins of equal width; empty ones left out."
    return {
        "summary": summary,
        "notes": calibration_notes(rows.report),
        "chart": chart,
        "bins": bins,
        "unit": unit,
        "came_true": _came_true(rows),
        "caption": caption,
    }


def _came_true(rows: ScoredRows) -> str:
    """What a share of the rows, or of the pairs of a row and a label, is called."""
    return "has label" if rows.is_multi_label else "right"


def _curves(id: str, rows: ScoredRows) -> Chart:
    labels = list(range(len(rows.labels)))
    many = len(labels) > CURVES
    if not many:
        curves = [_curve(rows, label) for label in labels]
        of = "each label"
    else:
        wanted = _worst(rows)
        curves = [analysis.precision_recall("all labels together", *_some(*analysis.micro(rows)))]
        curves += [_curve(rows, label) for label in wanted]
        names = f"the {len(wanted)} labels of lowest f1"
        of = f"all labels together (micro), and {names} of {len(labels):,}"
    description = f"Precision over recall of {of}, with the average precision."
    return charts.precision_recall_chart(
        f"{id}-precision-recall", "Precision and recall", description, curves
    )


def _worst(rows: ScoredRows) -> list[int]:
    per_class = rows.report.get("per_class") or []
    f1 = np.array([entry["f1"] if entry["rows"] else np.inf for entry in per_class])
    return [int(i) for i in np.argsort(f1, kind="stable")[: CURVES - 1] if np.isfinite(f1[i])]


def _curve(rows: ScoredRows, label: int) -> analysis.PrecisionRecall:
    return analysis.precision_recall(rows.labels[label], *analysis.one_vs_rest(rows, label))


def _some(truth: Array, scores: Array) -> tuple[Array, Array]:
    """Of very many decisions, every n-th."""
    every = max(1, math.ceil(len(truth) / DECISIONS))
    return truth[::every], scores[::every]


# ---- Groups of rows


def _lengths(rows: ScoredRows, score: analysis.Scoring) -> dict[str, Any]:
    found = analysis.length_groups(rows, score)
    caption = (
        f"Rows by their number of tokens, in up to {analysis.LENGTH_BINS} groups of equal size."
    )
    return {"caption": caption, "groups": found}


def _truncation(rows: ScoredRows, score: analysis.Scoring) -> dict[str, Any]:
    count, longest = int(rows.truncated.sum()), int(rows.tokens.max(initial=0))
    if not count:
        return {
            "summary": f"No row was truncated; the longest has {longest:,} tokens.",
            "groups": [],
        }
    summary = (
        f"{_rows(count)} of {len(rows):,} ({percent(count / len(rows))}) were truncated to "
        f"{longest:,} tokens (--max_length)."
    )
    return {"summary": summary, "groups": analysis.truncation_groups(rows, score)}


def _slices(rows: ScoredRows, score: analysis.Scoring) -> dict[str, Any] | None:
    if rows.slice_column is None:
        return None
    found, left_out = analysis.slice_groups(rows, score)
    caption = f"Rows by the column {rows.slice_column!r} (--slice_column)."
    if left_out:
        caption += f" The {len(found)} most frequent values; {left_out:,} others are left out."
    return {"column": rows.slice_column, "caption": caption, "groups": found}


# ---- Mistakes


def _mistakes(rows: ScoredRows, issues: Array, explanations: Mapping[int, Any]) -> dict[str, Any]:
    lines = list(rows.errors(MISTAKES))
    wrong = _wrong(rows)
    what = "largest errors" if rows.is_regression else "surest mistakes"
    if not lines:
        return {"heading": f"The {what}", "summary": "No row is predicted wrong.", "rows": []}
    summary = (
        f"The first {len(lines)} of {_rows(wrong)} with a wrong answer, those that the model is "
        "most sure of first"
    )
    if rows.is_regression:
        summary = f"The {len(lines)} largest errors of {_rows(wrong)}"
    file = f"{rows.prefix}errors.jsonl"
    summary += f"; all of them are in {file}." if len(lines) < wrong else f"; also in {file}."
    found = [_mistake(rows, line, bool(issues[line["row"]]), explanations) for line in lines]
    return {"heading": f"The {what}", "summary": summary, "rows": found}


def _wrong(rows: ScoredRows) -> int:
    wrong = rows.predicted != rows.truth
    return int(wrong.any(1).sum() if rows.is_multi_label else wrong.sum())


def _mistake(
    rows: ScoredRows, line: dict[str, Any], issue: bool, explanations: Mapping[int, Any]
) -> dict[str, Any]:
    row = int(line["row"])
    if rows.is_regression:
        predicted, truth = number(float(line["score"])), number(float(line["truth"]))
        how = f"off by {number(float(line['error']))}"
    elif rows.is_multi_label:
        names = [entry["label"] for entry in line["labels"]]
        predicted, truth = _set(names), _set(line["truth"])
        is_wrong = rows.predicted[row] != rows.truth[row]
        gaps = np.abs(rows.probabilities[row] - rows.truth[row])
        label = int(np.where(is_wrong, gaps, -1).argmax())
        shown = repr(excerpt(rows.labels[label], 40))
        how = f"probability of {shown} {number(float(rows.probabilities[row, label]))}"
    else:
        predicted, truth = str(line["label"]), str(line["truth"])
        how = f"probability {number(float(line['score']))}"
    return {
        "row": row,
        "predicted": predicted,
        "truth": truth,
        "how_wrong": how,
        "where": where(line),
        "text": str(line["text"]),
        "pair": line.get("text_pair"),
        "mislabelled": issue,
        "words": explanations.get(row),
    }


def where(line: Mapping[str, Any]) -> str:
    """`dev.tsv line 12`, of a line of errors.jsonl."""
    place = f"line {line['line']}" if "line" in line else f"row {line.get('file_row', line['row'])}"
    return f"{line.get('file', '')} {place}".strip()


def _set(names: Sequence[str]) -> str:
    return listed(list(map(str, names)), 10) or "no label"


# ---- Numbers


def _numbers(id: str, rows: ScoredRows) -> dict[str, Any]:
    found = analysis.residuals(rows, charts.SCATTER_POINTS)
    total = int((np.isfinite(rows.truth) & np.isfinite(rows.predicted)).sum())
    if not total:
        return {"summary": "No row has a number to compare with.", "charts": []}
    some = ""
    if len(found.shown) < total:
        some = f" {len(found.shown):,} of {total:,} rows are drawn, evenly spaced in their order."
    pictures = [
        charts.scatter_chart(
            f"{id}-scatter",
            "Predicted and true numbers",
            f"One point per row; on the dashed line the prediction is right.{some}",
            found,
        ),
        charts.residual_chart(
            f"{id}-residuals",
            "Errors",
            "How many rows are predicted how much too low or too high.",
            found,
        ),
    ]
    summary = (
        f"Predicted less true: mean {number(found.mean)}, standard deviation {number(found.std)}."
    )
    return {"summary": summary, "charts": pictures}
