"""What a sweep has found: sweep.json, best.yaml, and the lines and the table on the terminal.

results = collect_results(search, folder)
write_results(results, folder, config); show_results(results, folder)
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from bertdist.core.atomic_io import atomic_write, read_json_object, to_json
from bertdist.core.config import TrainConfig, config_to_yaml
from bertdist.core.search_space import shown, with_values
from bertdist.core.terminal import excerpt, show, show_table
from bertdist.training.search import COMPLETE, FAIL, PRUNED, RUNNING, Search
from bertdist.training.trial_runs import TRIALS

RESULTS_FILE = "sweep.json"
BEST_FILE = "best.yaml"
FINAL = "final"  # the run of best.yaml
SHOWN_TRIALS = 30  # lines of the table
STATES = {COMPLETE: "finished", PRUNED: "pruned", RUNNING: "running", FAIL: "failed"}
OPTIMISTIC = (
    "The score chose the trial, so it is optimistic for new data: rows that chose nothing "
    "(--test_file, evaluated for the best trial alone) say what to expect."
)


def collect_results(search: Search, folder: Path) -> dict[str, Any]:
    """sweep.json: the best trial, the importance of each setting, and all trials by number."""
    plan, trials = search.plan, search.trials
    metric = next((x.user_attrs["metric"] for x in trials if "metric" in x.user_attrs), None)
    counts = Counter(STATES[trial.state] for trial in trials)
    results: dict[str, Any] = {
        "trials": plan.trials,
        "states": {name: counts[name] for name in STATES.values()},
        "metric": metric or plan.metric,
        "direction": "minimize" if search.minimizes else "maximize",
        "space": {name: str(dimension) for name, dimension in plan.space.items()},
        "best": None,
        "importance": search.importance(),
        "note": OPTIMISTIC,
        "results": [_entry(trial) for trial in trials],
    }
    if best := search.best:
        entry = _entry(best)
        test = read_json_object(folder / entry["folder"] / "test_evaluation.json")
        names = ("trial", "folder", "score", "values")
        results["best"] = {name: entry[name] for name in names}
        results["best"]["test_scores"] = test.get("scores", {})
    return results


def _entry(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "state": STATES[trial.state],
        "score": trial.value if trial.state in (COMPLETE, PRUNED) else None,
        "values": dict(trial.params),
        "evaluations": [trial.intermediate_values[k] for k in sorted(trial.intermediate_values)],
        "folder": f"{TRIALS}/{trial.number:04d}",
        **{name: trial.user_attrs.get(name) for name in ("step", "scores", "seconds", "error")},
    }


def write_results(results: Mapping[str, Any], folder: Path, config: TrainConfig) -> None:
    """sweep.json, and best.yaml where a trial has finished. Raises CheckpointError."""
    atomic_write(folder / RESULTS_FILE, to_json(results, indent=1))
    if best := results["best"]:
        run = replace(config.run, output_dir=str(folder / FINAL))
        found = with_values(dataclasses.replace(config, run=run), best["values"])
        text = (
            f"# The settings of trial {best['trial']}, the best of a sweep: {results['metric']} "
            f"{best['score']:.4f}. Its weights are in {folder / best['folder'] / 'best'};\n"
            f"# `bertdist train --config {folder / BEST_FILE}` trains them again, in output_dir.\n"
        )
        atomic_write(folder / BEST_FILE, (text + config_to_yaml(found)).encode())


def show_results(results: Mapping[str, Any], folder: Path) -> None:
    """The table of the trials by score, and what to do with the best."""
    states = ", ".join(f"{count} {name}" for name, count in results["states"].items() if count)
    metric = results["metric"] or "score"
    if entries := _by_score(results):
        more = len(entries) - SHOWN_TRIALS
        title = f"Trials by {metric}" + f" (the best {SHOWN_TRIALS})" * (more > 0)
        names = list(results["space"])
        header = ["trial", metric, *names, "evaluations", "time", "state"]
        rows = [_row(entry, names) for entry in entries[:SHOWN_TRIALS]]
        right = range(len(header) - 1)
        if _width(header, rows) > shutil.get_terminal_size().columns:
            header, right = ["trial", metric, "time", "state", "values"], range(3)
            rows = [_short_row(row, names) for row in rows]
        show_table(title, header, rows, right)
    show(
        f"{sum(results['states'].values())} of {results['trials']} trials: {states or 'none yet'}."
    )
    for entry in [x for x in entries if x["state"] == "failed"][:SHOWN_TRIALS]:
        show(f"Trial {entry['trial']} failed: {entry['error']}")
    if importance := results["importance"]:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in importance.items())
        number = results["states"]["finished"]
        show(f"Importance (fANOVA, shares of the variance of {number} finished trials): {shares}.")
    if best := results["best"]:
        run = folder / best["folder"]
        show(f"Best: trial {best['trial']}, {metric} {best['score']:.4f}, in {run}.")
        show(results["note"])
        if test := best["test_scores"]:
            scores = ", ".join(
                f"{name} {x:.4f}" for name, x in test.items() if isinstance(x, float)
            )
            show(f"Its scores on the test rows: {scores}.")


def _by_score(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    sign = 1 if results["direction"] == "minimize" else -1
    order = [*STATES.values()]

    def key(entry: dict[str, Any]) -> tuple[int, float, int]:
        score = entry["score"]
        return order.index(entry["state"]), sign * (score or 0.0), entry["trial"]

    return sorted(results["results"], key=key)


def _width(header: list[str], rows: list[list[str]]) -> int:
    columns = zip(header, *rows, strict=True)
    return sum(max(map(len, column)) + 2 for column in columns)


def _short_row(row: list[str], names: list[str]) -> list[str]:
    """All values in one column, which is wrapped."""
    trial, score, *values, _, time, state = row
    words = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    return [trial, score, time, state, words]


def _row(entry: Mapping[str, Any], names: list[str]) -> list[str]:
    score, seconds = entry["score"], entry["seconds"]
    values = [excerpt(shown(entry["values"][name]), 24) for name in names]
    time = "" if seconds is None else f"{seconds:,.0f} s"
    number = str(len(entry["evaluations"]))
    first = ["" if score is None else f"{score:.4f}", *values]
    return [str(entry["trial"]), *first, number, time, entry["state"]]
