"""metrics.jsonl and status.json can be read after any crash; messages are shown literally."""

import contextlib
import json
import math
import os
import resource
import shlex
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bertdist.core.args import read_config
from bertdist.core.config import config_to_yaml
from bertdist.core.errors import CheckpointError, DataError, RankLost
from bertdist.training.checkpoint import TrainState
from bertdist.training.run_logger import RunLogger


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def status_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunLogger:
    """A log that writes to a file or a pipe, whoever runs the tests."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return RunLogger(tmp_path, enabled=True)


def test_a_record_is_one_json_line(log: RunLogger, tmp_path: Path) -> None:
    log.write("train", 1, loss=0.5, epoch=0.1)
    log.write("eval", 1, accuracy=0.25, note="grün\nund")
    assert lines_of(tmp_path) == [
        {"kind": "train", "step": 1, "loss": 0.5, "epoch": 0.1},
        {"kind": "eval", "step": 1, "accuracy": 0.25, "note": "grün\nund"},
    ]
    assert "grün" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_null(
    value: float, log: RunLogger, tmp_path: Path
) -> None:
    log.write("train", 1, loss=value, grad_norm=1.0)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "grad_norm": 1.0,
    }
    with pytest.raises(AssertionError):
        json.loads(
            json.dumps(value), parse_constant=refuse
        )  # the control: plain json would have written a word


def test_floats_are_written_exactly(log: RunLogger, tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": 5e-324, "d": 1 / 3}
    log.write("train", 1, **values)
    assert lines_of(tmp_path)[0] == {"kind": "train", "step": 1, **values}


def test_a_silent_rank_writes_and_shows_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(tmp_path / "run", enabled=False) as log:
        log.say("hello")
        log.begin(0, {"config.yaml": "seed: 1\n"})
        log.status("running", 0)
        with log.progress(step for step in range(2)) as steps:
            assert list(steps) == [0, 1]
        log.log_training(TrainState(step=1), 0.1, 0.1, 1.0, {})
        log.log_eval(1, 0.1, {"loss": 0.5}, "loss", True)
        log.note("a note")
        log.screen.block("Data", "rows")
        log.log_summary(TrainState(step=1, finished=True), "", {"step": 1, "scores": {"loss": 1}})
        log.log_summary(TrainState(step=1), "SIGTERM")
        log.screen.table("title", ["a"], [["1"]])
    assert (list(tmp_path.iterdir()), capfd.readouterr()) == ([], ("", ""))


OLD = [{"kind": kind, "step": step} for step in (1, 2, 3) for kind in ("train", "eval")]


def write_old(folder: Path, tail: bytes = b"") -> None:
    (folder / "metrics.jsonl").write_bytes(
        b"".join(json.dumps(line).encode() + b"\n" for line in OLD) + tail
    )


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 2), (2, 4), (3, 6), (99, 6)])
def test_lines_of_steps_that_are_taken_again_are_dropped(
    step: int, kept: int, log: RunLogger, tmp_path: Path
) -> None:
    write_old(tmp_path)
    log.begin(step, {})
    assert lines_of(tmp_path) == OLD[:kept]


@pytest.mark.parametrize(
    "torn",
    [
        b'{"kind": "train", "ste',
        b'{"kind": "train", "step": 3',
        b'{"kind": "tr\xc3',
        b"\x00\x00\x00",
        b"[1]\n",
        b'"step"\n',
        b"{}\n",
        b'{"step": "3"}\n',
    ],
)
def test_a_torn_line_is_dropped_and_the_next_one_stands_alone(
    torn: bytes, log: RunLogger, tmp_path: Path
) -> None:
    write_old(tmp_path, torn)
    log.begin(3, {})
    log.write("train", 4, loss=1.0)
    assert lines_of(tmp_path) == [*OLD, {"kind": "train", "step": 4, "loss": 1.0}]


def test_what_a_stopped_process_said_of_itself_goes_and_what_the_last_one_said_stays(
    log: RunLogger, tmp_path: Path
) -> None:
    write_old(tmp_path)
    log.write("meter", 3, finished=False, tokens_per_second=1.0)
    log.begin(3, {})
    assert lines_of(tmp_path) == OLD
    log.write("meter", 3, finished=True)
    log.begin(3, {})
    assert lines_of(tmp_path) == [*OLD, {"kind": "meter", "step": 3, "finished": True}]


def test_a_whole_last_line_without_its_end_is_kept(log: RunLogger, tmp_path: Path) -> None:
    write_old(tmp_path)
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 1)
    log.begin(3, {})
    log.write("train", 4)
    assert lines_of(tmp_path) == [*OLD, {"kind": "train", "step": 4}]


def test_kept_lines_are_not_rewritten(log: RunLogger, tmp_path: Path) -> None:
    odd = '{"step":1,   "note": "grün", "x": 1.10}\n'.encode()
    (tmp_path / "metrics.jsonl").write_bytes(odd + b'{"step": 2}\n')
    log.begin(1, {})
    assert (tmp_path / "metrics.jsonl").read_bytes() == odd


def test_a_fresh_folder_gets_its_files_and_no_metrics(tmp_path: Path) -> None:
    RunLogger(tmp_path / "deep" / "run", enabled=True).begin(
        0, {"config.yaml": "text_column: grün\n"}
    )
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["config.yaml"]
    assert (tmp_path / "deep" / "run" / "config.yaml").read_text(
        encoding="utf-8"
    ) == "text_column: grün\n"


def test_the_status_is_what_was_said_last(log: RunLogger, tmp_path: Path) -> None:
    log.status("running", 3)
    assert status_of(tmp_path) == {"state": "running", "step": 3, "reason": ""}
    log.status("preempted", 5, 'SIGTERM "now"')
    assert status_of(tmp_path) == {"state": "preempted", "step": 5, "reason": 'SIGTERM "now"'}


@pytest.mark.parametrize(
    ("error", "reason", "cause"),
    [
        (DataError("bad row"), "bad row", "error"),
        (ValueError(), "ValueError", "error"),
        (KeyboardInterrupt(), "KeyboardInterrupt", "error"),
        (RankLost("rank 1 is gone"), "rank 1 is gone", "lost"),
    ],
)
def test_a_run_that_breaks_says_why(
    error: BaseException, reason: str, cause: str, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), RunLogger(tmp_path, enabled=True) as log:
        log.status("running", 3)
        raise error
    assert status_of(tmp_path) == {
        "state": "failed",
        "step": 3,
        "reason": reason,
        "cause": cause,
    }


def test_a_run_that_never_began_leaves_the_last_status_alone(tmp_path: Path) -> None:
    before = {"state": "finished", "step": 9, "reason": ""}
    (tmp_path / "status.json").write_text(json.dumps(before))
    with pytest.raises(DataError), RunLogger(tmp_path, enabled=True):
        raise DataError("a typing error in the command, the second time")
    assert status_of(tmp_path) == before


def test_a_run_that_ended_well_stays_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunLogger(tmp_path, enabled=True) as log:
        log.status("running", 3)
        log.status("finished", 9)
        raise ValueError("a tracker cannot say good-bye")
    assert status_of(tmp_path) == {"state": "finished", "step": 9, "reason": ""}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError) as caught:
            RunLogger(folder, enabled=True)
        assert str(caught.value).startswith(f"Cannot write {folder}: ")
        assert len(str(caught.value).splitlines()) == 1


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_old_file_stays(log: RunLogger, tmp_path: Path) -> None:
    log.status("running", 1)
    calls = [
        (lambda: log.write("train", 2, loss=1.0), tmp_path),
        (lambda: log.status("running", 2), tmp_path / "status.json"),
        (lambda: log.begin(0, {"config.yaml": "x"}), tmp_path / "config.yaml"),
    ]
    for call, place in calls:
        with full_disk(), pytest.raises(CheckpointError) as caught:
            call()
        assert str(caught.value) == f"Cannot write {place}: File too large."
    assert status_of(tmp_path)["step"] == 1


def test_an_error_that_is_not_of_the_disk_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunLogger(tmp_path, enabled=True).write("train", 1, loss=object())


def test_a_line_can_be_written_without_being_shown(
    log: RunLogger, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log.write("meter", 3, train_seconds=1.5)
    assert capfd.readouterr().err == ""
    assert lines_of(tmp_path) == [{"kind": "meter", "step": 3, "train_seconds": 1.5}]


def test_numbers_are_short_on_the_screen_only(
    log: RunLogger, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log.state, log.total_steps, log.steps_per_epoch = TrainState(step=12), 24, 8
    log.state.unlogged_steps = [[0.123456789, 1.0]]
    figures = {"tokens_per_second": 123456.7, "padding_factor": 1.25}
    log.log_training(log.state, 1.5, 1e-3, 2.5, figures)
    line = "train  step 12/24  epoch 1.5/3  loss 0.1235  123,457 tokens/s"
    assert capfd.readouterr().err == f"{line}\n"
    assert lines_of(tmp_path)[0]["loss"] == 0.123456789
    log.screen.verbose = True
    log.log_training(log.state, 1.5, 1e-3, 2.5, figures)
    more = "learning_rate 0.001  grad_norm 2.5  padding_factor 1.25  tokens 0"
    assert capfd.readouterr().err.endswith(f"{more}\n")


def test_the_steps_are_closed_by_an_error_too(log: RunLogger) -> None:
    closed: list[int] = []

    def steps() -> Generator[int]:
        try:
            yield from range(9)
        finally:
            closed.append(1)

    with pytest.raises(DataError), log.progress(steps()) as tracked:
        assert next(tracked) == 0 and not closed
        raise DataError("a bad row")
    assert closed == [1]


# ---- Lines about training


def test_an_evaluation_is_one_line(log: RunLogger, tmp_path: Path) -> None:
    log.log_eval(8, 2.0, {"loss": 0.5, "accuracy": 1.0})
    assert lines_of(tmp_path) == [
        {"kind": "eval", "step": 8, "epoch": 2.0, "loss": 0.5, "accuracy": 1.0}
    ]


def test_a_training_line_is_the_mean_since_the_last_one(log: RunLogger, tmp_path: Path) -> None:
    """Sums are divided; a mean of means would be 0.875."""
    state = TrainState(step=2, tokens=9, unlogged_steps=[[3.0, 4.0], [1.0, 1.0]])
    log.log_training(state, 0.5, 0.1, 2.0, {"padding_factor": 1.0})
    assert lines_of(tmp_path) == [
        {"kind": "train", "step": 2, "epoch": 0.5, "loss": 0.8, "learning_rate": 0.1}
        | {"grad_norm": 2.0, "padding_factor": 1.0, "tokens": 9}
    ]
    assert state.unlogged_steps == []
    log.log_training(state, 0.5, 0.1, 2.0, {})
    assert lines_of(tmp_path)[1]["loss"] is None, "no step"


@pytest.mark.parametrize(
    ("state", "message", "status"),
    [
        (
            TrainState(step=8, finished=True, best_step=4),
            "Finished: 8 steps, best weights (step 4) in ",
            "finished",
        ),
        (
            TrainState(step=6, finished=True, best_step=4, evaluations_since_best=2),
            "Finished: 6 of 8 steps (early stopping after 2 evaluations without improvement), best "
            "weights (step 4) in ",
            "finished",
        ),
        (
            TrainState(step=4),
            "Stopped (SIGTERM): step 4 of 8 is saved. Rerun the same command to resume.",
            "preempted",
        ),
        (
            TrainState(step=4, evaluation_pending=True),
            "step 4 of 8 is saved. Rerun the same command to resume, starting with the evaluation.",
            "preempted",
        ),
        (
            TrainState(),
            "Stopped (SIGTERM) before the first step. Rerun the same command to start.",
            "preempted",
        ),
    ],
)
def test_the_summary(
    state: TrainState, message: str, status: str, log: RunLogger, tmp_path: Path, capfd: Any
) -> None:
    log.total_steps = 8
    log.log_summary(state, "SIGTERM")
    assert message in capfd.readouterr().err
    assert status_of(tmp_path)["state"] == status


GOOD_REPORT = {
    "step": 4,
    "labels": ["no", "yes"],
    "per_class": [{"label": "no", "f1": 0.5}, {"label": "yes", "f1": 0.25}],
    "confusion": [[3, 1], [0, 7]],
}


@pytest.mark.parametrize(
    "damage",
    [
        {"per_class": "x"},
        {"per_class": [1, 2]},
        {"per_class": [{}] * 30},
        {"per_class": 7},
        {"labels": 7},
        {"labels": ["no"]},
        {"confusion": [[3, 1]]},
        {"confusion": None},
        {"labels": ["no"] * 20, "confusion": [["a"] * 20] * 20},
        {"per_class": [{"label": 1, "f1": None, "rows": 1}, {"f1": 0, "rows": 2}] * 30},
    ],
    ids=lambda damage: str(damage)[:30],
)
def test_a_damaged_evaluation_does_not_end_a_finished_run(
    damage: dict[str, Any], log: RunLogger, capfd: Any, tmp_path: Path
) -> None:
    state = TrainState(step=8, finished=True, best_step=4)
    log.log_summary(state, "", {**GOOD_REPORT, **damage})
    said = capfd.readouterr().err
    assert "evaluation.json is damaged: its tables are not shown." in said
    assert "Finished: 8" in said
    log.log_summary(state, "", GOOD_REPORT)  # the control
    assert "is damaged" not in capfd.readouterr().err


def test_a_resumed_run_shows_the_evaluations_before_it(log: RunLogger, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        log.log_eval(step, step / 2, {"loss": 0.5, "accuracy": 0.25 * step, "auc": math.nan})
        log.write("eval", step, note="no epoch")
    log.begin(2, {})
    shown = [(entry.step, entry.epoch, entry.scores) for entry in log.screen.evaluations]
    assert shown == [(n, n / 2, {"loss": 0.5, "accuracy": 0.25 * n}) for n in (1, 2)]
    log.begin(2, {}, evaluation_pending=True)
    assert [entry.step for entry in log.screen.evaluations] == [1]


def test_the_end_says_what_to_do_next(
    log: RunLogger, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    log.screen.pairs = True
    log.log_summary(TrainState(step=8, finished=True, best_step=4), "", GOOD_REPORT)
    said = capfd.readouterr().err
    command = f'predict --model {shlex.quote(str(tmp_path))} --text "..." --text_pair "..."\n'
    assert command in said and "evaluate --model" in said and f"{tmp_path / 'best'}: " in said
    assert "predictions.jsonl" not in said  # there is none
    log.log_summary(TrainState(step=4), "SIGTERM")
    assert "--model" not in capfd.readouterr().err


def test_a_damaged_line_of_the_log_is_dropped(log: RunLogger, tmp_path: Path) -> None:
    good = b'{"kind": "train", "step": 1}\n'
    for bad in (b"", b"\xff", b"[" * 100_000, b"[1]", b'"x"', b"null", b'{"step": "a"}', b"{"):
        (tmp_path / "metrics.jsonl").write_bytes(good + bad + b"\n" + good)
        log.begin(2, {})
        assert (tmp_path / "metrics.jsonl").read_bytes() == good * 2
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"^Cannot read .*metrics.jsonl: Is a directory\.$"):
        log.begin(2, {})


def test_a_start_describes_the_run(log: RunLogger, tmp_path: Path) -> None:
    write_old(tmp_path)
    config = read_config(["--model_name_or_path=m", "--train_file=t.tsv", "--output_dir=o"])
    accelerator: Any = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), mixed_precision="no"
    )
    log.start(TrainState(step=2, evaluation_pending=True), 9, config, accelerator)
    assert (tmp_path / "config.yaml").read_text() == config_to_yaml(config)
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert (facts["processes"], facts["device"], facts["mixed_precision"]) == (2, "cpu", "no")
    assert status_of(tmp_path) == {"state": "running", "step": 2, "reason": ""}
    assert lines_of(tmp_path) == OLD[:3], "the evaluation of step 2 will be repeated"
    other = read_config(["--model_name_or_path=m", "--train_file=x.tsv", "--output_dir=o"])
    (tmp_path / "environment.json").write_text("{}")
    log.start(TrainState(step=1, finished=True), 9, other, accelerator)
    assert (tmp_path / "config.yaml").read_text() == config_to_yaml(config), "that it trained with"
    assert (tmp_path / "environment.json").read_text() == "{}"
    data = replace(other.data, test_file="test.tsv")
    log.start(TrainState(step=1, finished=True), 9, replace(other, data=data), accelerator)
    again = read_config(["--config", str(tmp_path / "config.yaml")])
    assert again == replace(config, data=replace(config.data, test_file="test.tsv"))
    (tmp_path / "config.yaml").unlink()
    log.start(TrainState(step=1, finished=True), 9, other, accelerator)
    assert (tmp_path / "config.yaml").read_text() == config_to_yaml(other)
    assert status_of(tmp_path)["state"] == "finished" and lines_of(tmp_path) == OLD[:2]


def test_a_tracker_that_fails_at_the_end_does_not_hide_that_the_run_has(tmp_path: Path) -> None:
    class Broken:
        def close(self, failed: bool) -> list[str]:
            raise OSError("no route to host")

    with pytest.raises(OSError, match="no route"), RunLogger(tmp_path, enabled=True) as log:
        log.status("running", 3)
        log.trackers = Broken()  # type: ignore[assignment]
        raise DataError("a wrong row")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 3)
