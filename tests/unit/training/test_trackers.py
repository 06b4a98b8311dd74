"""Trackers get every line of metrics.jsonl once, also over resumes, and never stop a run; read back from TensorBoard's own files."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import GeneralTracker

from bertdist.core.args import read_config
from bertdist.core.config import RunConfig, TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.core.urls import without_secrets
from bertdist.train import train
from bertdist.training import trackers
from bertdist.training.run_logger import Hooks
from bertdist.training.trackers import Trackers, flat_settings, tracked_run
from tests.rows import words_of, write_split

VARIABLES = ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "MLFLOW_EXPERIMENT_NAME")


class Recorder(GeneralTracker):
    """A tracker that keeps what it is sent, and fails or waits where it is told."""

    name = "recorder"
    requires_logging_directory = False
    started: ClassVar[list["Recorder"]] = []
    broken: ClassVar[set[int]] = set()  # steps
    cannot_start = ""
    waits_for: threading.Event | None = None

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        self.project, self.arguments = project, arguments
        self.settings: dict[str, Any] | None = None
        self.points: list[tuple[int, dict[str, float]]] = []
        self.ended = ""

    @property
    def tracker(self) -> "Recorder":
        return self

    def start(self) -> None:
        if Recorder.cannot_start:
            raise ValueError(Recorder.cannot_start)
        self.seen = (sys.stdin.isatty(), sys.stdin.read(), list(sys.argv))
        Recorder.started.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if Recorder.waits_for is not None:
            Recorder.waits_for.wait()
        if step in Recorder.broken:
            raise ConnectionError("connection refused\nand a page about it")
        assert step is not None
        self.points.append((step, values))

    def finish(self) -> None:
        self.ended = "finished"


class Other(Recorder):
    """A second one."""

    name = "other"


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    """The recorders that were started; no tracker of the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    classes = {**trackers.LOGGER_TYPE_TO_CLASS, "recorder": Recorder, "other": Other}
    monkeypatch.setattr(trackers, "LOGGER_TYPE_TO_CLASS", classes)
    monkeypatch.setattr(trackers, "installed_trackers", list)
    yield Recorder.started
    Recorder.started.clear()
    Recorder.broken.clear()
    Recorder.cannot_start, Recorder.waits_for = "", None


def line(step: int, kind: str = "train", **values: float) -> dict[str, Any]:
    return {"kind": kind, "step": step, **(values or {"loss": 1 / step})}


def opened(
    out: Path, lines: Sequence[dict[str, Any]] = (), step: int = 0, report_to: str = "recorder"
) -> Trackers:
    """Trackers of a run that resumes from `step`."""
    run = RunConfig(output_dir=str(out), report_to=report_to.split())
    out.mkdir(exist_ok=True)
    kept = [x for x in lines if x["step"] <= step]
    found = Trackers(run, {"learning_rate": 0.1}, lines, kept, step)
    found.open()
    return found


def steps_of(recorder: Recorder, kind: str = "train") -> list[int]:
    return [step for step, values in recorder.points if f"{kind}/loss" in values]


def test_a_tracker_gets_numbers_by_kind_and_step(tmp_path: Path, recorders: list[Recorder]) -> None:
    found = opened(tmp_path / "out")
    found.log("train", 5, {"loss": 0.5, "epoch": 0.1, "tokens_per_second": 9.0, "grad_norm": None})
    found.log("eval", 5, {"loss": 0.4, "accuracy": 1, "note": "text", "ok": True})
    found.log("meter", 5, {"train_steps": 5})
    assert found.log_final(5, {"best/accuracy": 1.0, "test/f1": None}) == []
    assert found.close() == []
    (recorder,) = recorders
    assert recorder.points == [
        (5, {"train/loss": 0.5, "train/epoch": 0.1, "train/tokens_per_second": 9.0}),
        (5, {"eval/loss": 0.4, "eval/accuracy": 1}),
        (5, {"best/accuracy": 1.0}),
    ]
    assert (recorder.settings, recorder.ended) == ({"learning_rate": 0.1}, "finished")


def test_no_step_is_sent_twice_to_a_tracker_that_cannot_drop_it(
    tmp_path: Path, recorders: list[Recorder]
) -> None:
    """Killed at 450, resumed at 400; killed at 420, and resumed at 400 once more."""
    out = tmp_path / "out"
    lines = [line(step) for step in range(10, 460, 10)] + [line(400, "eval")]
    first = opened(out)
    for each in lines:
        first.log(each["kind"], each["step"], each)
    first.close()
    second = opened(out, lines, 400)
    for step in (410, 420):
        second.log("train", step, line(step))
    second.close()
    third = opened(out, [x for x in lines if x["step"] <= 420], 400)
    third.log("eval", 400, line(400, "eval"))  # an evaluation that was pending
    for step in range(410, 500, 10):
        third.log("train", step, line(step))
    third.close()
    assert [len(recorder.points) for recorder in recorders] == [len(lines), 0, 4]
    steps = [step for recorder in recorders for step in steps_of(recorder)]
    assert steps == list(range(10, 500, 10))
    assert [recorder.settings is not None for recorder in recorders] == [True, True, True]
    # The control: without tracker.json it is a new run of the tracker, which gets all lines
    (out / "tracker.json").unlink()
    opened(out, lines, 400).close()
    assert steps_of(recorders[-1]) == list(range(10, 410, 10))


def test_a_tracker_that_can_be_asked_gets_what_it_lacks(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(step) for step in (1, 2, 3, 4, 5)]
    opened(tmp_path / "out").close()
    has = {("train", 1), ("train", 5)}  # its server was gone from 2 to 4
    monkeypatch.setattr(trackers, "asked", lambda *_: lambda *point: point in has)
    second = opened(tmp_path / "out", lines, 4)
    for step in (5, 6):
        second.log("train", step, line(step))
    second.close()
    assert steps_of(recorders[-1]) == [2, 3, 4, 6]


def test_a_tracker_that_joins_later_gets_all_lines(
    tmp_path: Path, recorders: list[Recorder]
) -> None:
    lines = [line(1), line(2), line(2, "eval"), line(3)]
    opened(tmp_path / "out").close()
    opened(tmp_path / "out", lines, 2, "recorder other").close()
    assert [(x.name, steps_of(x), steps_of(x, "eval")) for x in recorders[1:]] == [
        ("recorder", [], []),
        ("other", [1, 2], [2]),
    ]


def test_the_id_is_that_of_the_folder(tmp_path: Path) -> None:
    def id_of(out: str) -> str:
        opened(tmp_path / out).close()
        saved = json.loads((tmp_path / out / "tracker.json").read_text())
        return str(saved["recorder"]["id"])

    first, again, other = id_of("a"), id_of("a"), id_of("b")
    assert first == again != other


def test_final_scores_are_sent_once(tmp_path: Path, recorders: list[Recorder]) -> None:
    out, scores, lines = tmp_path / "out", {"best/accuracy": 0.9}, [line(1), line(2)]
    run = RunConfig(output_dir=str(out), report_to=["recorder"])
    found = opened(out)
    found.log_final(2, scores)
    found.close()

    def rerun(scores: dict[str, float], run: RunConfig = run) -> int:
        """Of a finished run; the number of trackers that were started."""
        before, again = len(recorders), Trackers(run, {}, lines, lines, 2)
        again.log_final(2, scores)
        again.close()
        return len(recorders) - before

    assert rerun(scores) == 0
    assert rerun(scores | {"test/accuracy": 0.8}) == 1  # with --test_file now
    assert recorders[-1].points == [(2, {"best/accuracy": 0.9, "test/accuracy": 0.8})]
    # A tracker that the run did not have
    assert (
        rerun(scores | {"test/accuracy": 0.8}, replace(run, report_to=["recorder", "other"])) == 1
    )
    assert [step for step, _ in recorders[-1].points] == [1, 2, 2]
    Recorder.cannot_start = "no key"
    (said,) = Trackers(run, {}, lines, lines, 2).log_final(2, {"best/accuracy": 0.7})
    assert said.startswith("Warning: --report_to recorder: it does not start: ValueError: no key.")


def test_what_fails_later_is_one_warning(tmp_path: Path, recorders: list[Recorder]) -> None:
    found, said = opened(tmp_path / "out", report_to="recorder other"), []
    Recorder.broken |= {2, 3}
    for step in (1, 2):
        said += found.log("train", step, line(step))
    while len(said) < 2:
        said += found.log("meter", 2, {})  # which trackers do not get
    for step in (3, 4):
        said += found.log("train", step, line(step))
    assert found.close() == []
    assert sorted(said, reverse=True) == [
        f"Warning: {name} did not take a line: ConnectionError: connection refused. Training is "
        "not affected; metrics.jsonl has all lines."
        for name in ("recorder", "other")
    ]
    assert [steps_of(recorder) for recorder in recorders] == [[1, 4], [1, 4]]


def test_final_scores_that_were_lost_are_sent_again(
    tmp_path: Path, recorders: list[Recorder]
) -> None:
    Recorder.broken |= {2}
    for scores in ({"best/loss": 0.5}, {"best/loss": 0.5}):
        found = opened(tmp_path / "out", [line(1)], 1)
        found.log_final(2, scores)
        found.close()
        Recorder.broken.clear()
    assert [x.points for x in recorders] == [[(1, {"train/loss": 1.0})], [(2, scores)]]


def test_a_tracker_that_hangs_delays_nothing(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "END_SECONDS", 0.2)
    found = opened(tmp_path / "out")
    Recorder.waits_for = threading.Event()
    for step in range(1, 100):  # else this would wait for ever
        found.log("train", step, line(step))
    (warning,) = found.close()
    assert warning.startswith("Warning: recorder did not take a line: no answer within 0.2 s.")
    Recorder.waits_for.set()


def test_a_tracker_that_does_not_start_is_one_line(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    Other_start = Other.start

    def start(self: Recorder) -> None:
        Recorder.cannot_start = "no key.\nUse login."
        Other_start(self)

    monkeypatch.setattr(Other, "start", start)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "out", report_to="recorder other")
    assert str(caught.value) == "--report_to other: it does not start: ValueError: no key."
    assert [x.ended for x in recorders] == ["finished"]  # the first one
    assert not (tmp_path / "out" / "tracker.json").exists()
    # A server that does not answer
    monkeypatch.setattr(trackers, "START_SECONDS", 0.05)
    monkeypatch.setattr(Other, "start", lambda self: time.sleep(1))
    with pytest.raises(ConfigError, match=r"^--report_to other: .*: no answer within 0\.05 s\.$"):
        opened(tmp_path / "out", report_to="other")


def test_a_tracker_finds_no_terminal_and_no_secret(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train.py", "--train_file=https://me:word@host/a.csv?sig=1", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", words)
    before = sys.stdin
    opened(tmp_path / "out").close()
    without = ["train.py", "--train_file=https://host/a.csv", "--seed", "1"]
    assert recorders[0].seen == (False, "", without)
    assert (sys.stdin, sys.argv) == (before, words)


def config_of(out: Path, *more: str) -> TrainConfig:
    words = ["--model_name_or_path=m", "--train_file=t.tsv", f"--output_dir={out}"]
    return read_config([*words, "--validation_file=v.tsv", *more])


def test_settings_are_flat_plain_and_without_secrets(tmp_path: Path) -> None:
    urls = ["https://me:word@host/a.csv?sig=1", "hf://datasets/a/b@main/t.csv", "s3://b/c.csv"]
    config = config_of(tmp_path, "--metrics", "accuracy", "f1", "--train_file", *urls)
    found = flat_settings(config, processes=2)
    assert found["train_file"] == "https://host/a.csv, hf://datasets/a/b@main/t.csv, s3://b/c.csv"
    assert (found["metrics"], found["processes"]) == ("accuracy, f1", 2)
    assert (found["learning_rate"], found["use_cpu"]) == (config.optim.learning_rate, False)
    assert "warmup_steps" not in found or found["warmup_steps"] is not None
    assert {type(value) for value in found.values()} <= {bool, int, float, str}
    assert "word" not in str(found) and "sig=1" not in str(found)


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://me:p@ss@host/a.csv?sig=1", "https://host/a.csv"),
        ("https://host/a.csv#access_token=secret", "https://host/a.csv"),
        ("https://me:pa#ss@host/a", "https://host/a"),
        ("hf://datasets/a/b@main/t.csv", "hf://datasets/a/b@main/t.csv"),
    ],
)
def test_no_part_of_a_password_is_sent(url: str, shown: str) -> None:
    assert without_secrets(f"see {url} and x") == f"see {shown} and x"


def test_names_follow_flags_then_variables_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(tracker: str, folder: str, **flags: str) -> tuple[str, str, str | None]:
        run = RunConfig(output_dir=str(tmp_path / folder), **flags)
        of = tracked_run(tracker, run, {}, 0)
        return of.project, of.name, of.group

    assert found("wandb", "out") == ("bertdist", "out", None)
    assert found("trackio", "out/folds/3") == ("bertdist", "out-fold-3", "out")
    assert found("mlflow", "o/seeds/42", run_name="x") == ("bertdist", "x-seed-42", "x")
    monkeypatch.setenv("WANDB_PROJECT", "p")
    monkeypatch.setenv("WANDB_NAME", "n")
    assert found("wandb", "out") == ("p", "n", None)
    assert found("wandb", "out", project="q", run_name="r") == ("q", "r", None)
    assert found("mlflow", "out") == ("bertdist", "out", None)
    monkeypatch.chdir(tmp_path)
    run = tracked_run("wandb", RunConfig(output_dir="."), {}, 0)
    assert run.name == "n" and tracked_run("aim", RunConfig(output_dir="."), {}, 0).name == (
        tmp_path.name
    )


def test_a_run_stays_in_its_project(tmp_path: Path) -> None:
    opened(tmp_path / "out").close()
    run = RunConfig(output_dir=str(tmp_path / "out"), report_to=["recorder"], project="new")
    found = Trackers(run, {})
    assert found.open() == [
        "Tracker recorder: run out of project bertdist, where it began; --project new is for new "
        "runs."
    ]
    found.close()


# ---- TensorBoard


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_shows_one_curve_of_a_run_that_was_killed_twice(
    tiny_model: Path, tmp_path: Path
) -> None:
    """After each kill a resumed run repeats steps; the curve is that of metrics.jsonl in the end."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    out, files = tmp_path / "out", write_split(tmp_path, 32, 6)
    words = words_of(
        tiny_model, out, files, max_train_steps=8, save_every="3 steps", eval_every="2 steps"
    )
    config = read_config([*words, "--report_to", "tensorboard"])

    def killed_at(last: int) -> None:
        def on_log(step: int, values: dict[str, Any]) -> None:
            if step == last:
                raise KeyboardInterrupt  # no error of ours: nothing is saved or closed in order

        with pytest.raises(KeyboardInterrupt):
            train(config, Hooks(on_log=on_log))

    killed_at(5)
    killed_at(5)
    assert train(config).finished
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    found = curves(out / "tensorboard")
    for kind, name in (("train", "loss"), ("train", "tokens_per_second"), ("eval", "accuracy")):
        expected = [(x["step"], x[name]) for x in lines if x["kind"] == kind]
        assert found[f"{kind}/{name}"] == [(step, pytest.approx(y)) for step, y in expected]
    scores = json.loads((out / "evaluation.json").read_text())["scores"]
    assert found["best/accuracy"] == [(8, pytest.approx(scores["accuracy"]))]
    assert {"train/learning_rate", "train/grad_norm", "train/epoch", "eval/loss"} <= {*found}
    # The control: without purge_step the points of both are there
    events = sorted((out / "tensorboard").glob("events*"), key=os.path.getmtime)
    assert len(events) == 3
    every = [step for file in events for step, _ in curves(file)["train/loss"]]
    assert len(every) > len(set(every)) == 8
