"""The page of a sweep: its trials by score, the importance of each setting, and the scores over the
values of each.

    save(folder / "report.html", page_of_sweep(results, folder))     # results: sweep.json
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertdist.core.search_space import Range, read_space, shown
from bertdist.reporting.charts import Chart, Line, Points, bar_chart, points_chart
from bertdist.reporting.page import render

SHOWN_TRIALS = 200  # lines of the table
SHOWN_SETTINGS = 24  # charts of values


def page_of_sweep(results: Mapping[str, Any], folder: Path) -> str:
    """The HTML. results: sweep.json; folder: of the sweep."""
    entries, metric = results["results"], str(results["metric"] or "score")
    sign = 1 if results["direction"] == "minimize" else -1
    ranked = sorted(
        entries, key=lambda x: (x["state"] != "finished", sign * (x["score"] or 0.0), x["trial"])
    )
    names, importance = list(results["space"]), results["importance"]
    scored = [x for x in entries if _is_number(x["score"])]
    charts = [_history(scored, metric, sign)] if scored else []
    if importance:
        of = "Shares of the variance of the scores (fANOVA), over the finished trials."
        charts.append(bar_chart("importance", "Importance", of, importance, "share"))
    slices = [
        _slice(number, name, results["space"][name], scored, metric)
        for number, name in enumerate(names[:SHOWN_SETTINGS])
        if scored
    ]
    best = results["best"]
    return render(
        "sweep.html",
        title=f"Sweep {folder.name}",
        results=results,
        metric=metric,
        best=best,
        best_values=[
            [name, _value(value)] for name, value in (best or {}).get("values", {}).items()
        ],
        states=", ".join(f"{n} {name}" for name, n in results["states"].items() if n),
        charts=charts,
        slices=slices,
        names=names,
        rows=[_row(entry, names) for entry in ranked[:SHOWN_TRIALS]],
        more=max(0, len(ranked) - SHOWN_TRIALS),
        folder=str(folder),
    )


def _row(entry: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    values = [_value(entry["values"].get(name)) for name in names]
    return {**entry, "shown": values, "number": len(entry["evaluations"])}


def _value(value: Any) -> str:
    return shown(value) if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _groups(scored: list[Any], of: str | None) -> list[Points]:
    """Finished and pruned trials, over their number or the values of a setting."""
    groups = []
    for state in ("finished", "pruned"):
        own = [x for x in scored if x["state"] == state]
        if own:
            at = [x["trial"] if of is None else x["values"][of] for x in own]
            groups.append(Points(state, at, [x["score"] for x in own]))
    return groups


def _history(scored: list[Any], metric: str, sign: int) -> Chart:
    best, line, trials = math.inf, [], []
    for entry in scored:
        if entry["state"] == "finished":
            best = min(best, sign * entry["score"])
            trials.append(entry["trial"])
            line.append(sign * best)
    about = "The score of each trial, of a pruned one that of its last evaluation."
    so_far = Line("best so far", trials, line) if trials else None
    return points_chart("history", "History", about, _groups(scored, None), "trial", metric, so_far)


def _slice(number: int, name: str, values: str, scored: list[Any], metric: str) -> Chart:
    dimension = read_space([f"{name}={values}"])[name]
    about = f"{metric} of the trials over {name} ({values})."
    groups, chart = _groups(scored, name), f"setting-{number}"
    if isinstance(dimension, Range):
        log = dimension.log
        return points_chart(chart, name, about, groups, name, metric, is_log=log)
    choices = [_value(value) for value in dimension.values]
    groups = [Points(x.name, list(map(_value, x.x)), x.y) for x in groups]
    return points_chart(chart, name, about, groups, name, metric, names=choices)
