"""The trackers themselves, where they are installed: a run that is killed and resumed is one curve, read back from their files."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from bertdist.core.config import RunConfig
from bertdist.training import trackers
from bertdist.training.trackers import Trackers

# None of them is a requirement of the tests; each is run by hand before a change here is released.
PACKAGES = ["mlflow", "trackio", "wandb"]


def points_of(tracker: str, out: Path, saved: dict[str, Any], key: str) -> list[int]:
    """The steps of a curve, in the order that the tracker has them."""
    if tracker == "mlflow":
        import mlflow

        return [point.step for point in mlflow.MlflowClient().get_metric_history(saved["id"], key)]
    if tracker == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        values = SQLiteStorage.get_metric_values(saved["project"], saved["name"], key)
        return [int(value["step"]) for value in values]
    import wandb

    wandb.teardown()  # its process writes the files
    kind = key.removesuffix("/loss")
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    return [step for file in files for step in trackers.steps_in(file, kind)]


@pytest.mark.parametrize("tracker", PACKAGES)
def test_a_killed_run_is_one_curve(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    pytest.importorskip(tracker, reason=f"pip install {tracker}", exc_type=ImportError)
    PartialState(cpu=True)
    out = tmp_path / "out"
    out.mkdir()
    run = RunConfig(output_dir=str(out), report_to=[tracker])
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 8)
    ]

    def process(resumed_from: int, last: int, known: int) -> None:
        kept = lines[:resumed_from]
        found = Trackers(run, {"seed": 1, "name": "x"}, lines[:known], kept, resumed_from)
        found.open()
        for line in lines[resumed_from:last]:
            found.log("train", line["step"], line)
        assert found.close() == []

    process(0, 5, 0)
    process(3, 7, 5)
    saved = json.loads((out / "tracker.json").read_text())[tracker]
    assert points_of(tracker, out, saved, "train/loss") == [1, 2, 3, 4, 5, 6, 7]
    (out / "tracker.json").unlink()  # the control: another run of the tracker
    process(3, 7, 5)
    again = json.loads((out / "tracker.json").read_text())[tracker]
    assert (again["id"], again["name"]) != (saved["id"], saved["name"])
