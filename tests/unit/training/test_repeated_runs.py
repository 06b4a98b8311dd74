"""Scores of several runs: mean and standard deviation."""

import pytest

from bertdist.training.repeated_runs import summarize


def test_summaries() -> None:
    runs = [{"scores": {"f1": 0.5, "loss": 1.0}}, {"scores": {"f1": 1.0, "loss": None}}]
    assert summarize(runs) == {
        "f1": {"mean": 0.75, "std": pytest.approx(0.5**1.5)},
        "loss": {"mean": None, "std": None},
    }
