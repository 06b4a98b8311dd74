"""What follows a finished run, on rank 0: the model card and the upload; neither makes it fail."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_folders import make_run

from bertdist.core.config import RunConfig
from bertdist.reporting import model_card, upload
from bertdist.train import train_all


def config_of(out: Path, **run: Any) -> Any:
    settings = RunConfig(output_dir=str(out), report=False, **run)
    return type("Config", (), {"run": settings})


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What --push_to_hub was asked to upload to."""
    names: list[str] = []
    monkeypatch.setattr(
        upload, "push_run", lambda config, say: names.append(config.run.push_to_hub)
    )
    return names


def test_a_finished_run_has_a_card_and_a_stopped_one_none(
    tmp_path: Path, uploaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    best = make_run(tmp_path / "out")
    config = config_of(best.parent, push_to_hub="a/b")
    assert not train_all(config, lambda config: False)
    assert not (best / "README.md").exists() and uploaded == []
    assert train_all(config, lambda config: True)
    assert (best / "README.md").exists() and uploaded == ["a/b"]
    assert f"Model card: {best / 'README.md'}" in capsys.readouterr().err
    config.run = replace(config.run, push_to_hub=None)
    train_all(config, lambda config: True)
    assert uploaded == ["a/b"]


def test_other_ranks_do_nothing(
    tmp_path: Path, uploaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = make_run(tmp_path / "out")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_all(config_of(best.parent, push_to_hub="a/b"), lambda config: True)
    assert not (best / "README.md").exists() and uploaded == []


def test_a_card_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(best: Path) -> str:
        raise KeyError("labels")

    best = make_run(tmp_path / "out")
    monkeypatch.setattr(model_card, "write_model_card", broken)
    assert train_all(config_of(best.parent), lambda config: True)
    assert "The model card was not written: KeyError: 'labels'" in capsys.readouterr().err
