"""The page of a sweep."""

from pathlib import Path
from typing import Any

from bertdist.reporting.sweep_page import page_of_sweep

EVIL = "<script>alert(1)</script>"


def entry(trial: int, state: str, score: float | None, model: str = "a") -> dict[str, Any]:
    return {
        "trial": trial,
        "state": state,
        "score": score,
        "values": {"learning_rate": 10.0 ** -(trial + 2), "model_name_or_path": model},
        "evaluations": [0.5],
        "folder": f"trials/{trial:04d}",
        "step": 3,
        "scores": {},
        "seconds": 12.5,
        "error": EVIL if state == "failed" else None,
    }


def results(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = {
        "trials": 5,
        "states": {"finished": 2, "pruned": 1, "running": 0, "failed": 1},
        "metric": "accuracy",
        "direction": "maximize",
        "space": {"learning_rate": "1e-05..0.1:log", "model_name_or_path": f"a,{EVIL}"},
        "best": None,
        "importance": {},
        "note": "It is optimistic.",
        "results": list(entries),
    }
    return {**found, **more}


def test_trials_by_score_the_best_and_charts() -> None:
    entries = [
        entry(0, "finished", 0.7),
        entry(1, "finished", 0.9, EVIL),
        entry(2, "pruned", 0.95),
        entry(3, "failed", None),
    ]
    best = {name: entries[1][name] for name in ("trial", "folder", "score", "values")}
    importance = {"learning_rate": 0.75, "model_name_or_path": 0.25}
    html = page_of_sweep(
        results(*entries, best={**best, "test_scores": {"f1": 0.875}}, importance=importance),
        Path("out/sweep"),
    )
    assert EVIL not in html and "&lt;script&gt;" in html
    assert "Trial 1: accuracy 0.9000." in html and "0.8750" in html
    places = [html.index(f'<th scope="row" class="word">{trial}</th>') for trial in (1, 0, 2, 3)]
    assert places == sorted(places)
    assert html.count("<svg") == 4  # history, importance, two settings


def test_a_sweep_without_a_finished_trial() -> None:
    html = page_of_sweep(results(entry(0, "failed", None)), Path("sweep"))
    assert "No trial has finished." in html and "<svg" not in html


def test_a_long_sweep_is_bounded() -> None:
    html = page_of_sweep(results(*(entry(k % 3, "finished", 0.1) for k in range(2000))), Path("s"))
    assert html.count('<td class="word">finished</td>') == 200 and "1,800 more are in" in html
