"""`bertdist sweep`: its flags, what is refused before any trial, and one sweep of real trials."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from forked import Command
from rows import EVERY_FAULT, make_rows, write_rows
from slurm.cluster import missing_commands

from bertdist.core.args import parse_or_exit, read_config
from bertdist.core.errors import BertdistError, ConfigError
from bertdist.core.hub import model_folder
from bertdist.distributed.launch import run_cli
from bertdist.distributed.preemption import StopSignal
from bertdist.sweep import Sweep, check_start, read_sweep_config, run, search_plan
from bertdist.train import run as run_training
from bertdist.training import trial_runs
from bertdist.training.trial_runs import TRIAL_VARIABLE, TrialLauncher, error_of, read_evaluations

NEEDED = [
    *("--model_name_or_path=m", "--output_dir=o", "--train_file=t", "--validation_file=v"),
    *("--try", "learning_rate=1e-5..5e-4:log", "train_batch_size=16,32"),
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (NEEDED[:4], "--try is missing: what to try, such as --try learning_rate=1e-5..5e-4:log."),
        ([*NEEDED, "--try", "seed=1,2"], "--try is given twice: name all settings after one --try"),
        ([*NEEDED, "--trials=0"], "--trials is 0; expected at least 1."),
        ([*NEEDED, "--jobs=0"], "--jobs is 0; expected at least 1."),
        ([*NEEDED, "--seeds=3"], "--seeds is not for trials; give it to `bertdist train --config"),
        ([*NEEDED, "--folds=3"], "--folds is not for trials"),
        ([*NEEDED, "--dry_run"], "--dry_run is not for trials"),
        ([*NEEDED[:3], *NEEDED[4:]], "A sweep needs rows to compare trials on"),
        ([*NEEDED, "--sampler=grid"], "--sampler grid tries all values, and learning_rate="),
        (
            [*NEEDED[:5], "max_length=8,9", "--sampler=grid", "--trials=3"],
            "grid has 2 combinations",
        ),
        ([*NEEDED, "--trails=3"], "Unknown setting --trails. Did you mean --trials?"),
        ([*NEEDED[:5], "learning_rate=-1,1"], "--learning_rate is -1.0; expected at least 0."),
        (["--status"], "--status needs --output_dir: the folder of the sweep."),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_sweep_config(words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_number_of_trials() -> None:
    assert read_sweep_config(NEEDED).trials == 20
    grid = [*NEEDED[:5], "max_length=8..10", "train_batch_size=16,32", "--sampler=grid"]
    assert read_sweep_config(grid).trials == 6
    assert read_sweep_config([*grid, "--trials=4"]).trials == 4


def test_a_yaml_file_may_have_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("try: [learning_rate=1e-5..5e-4:log, 'train_batch_size=16,32']\ntrials: 7\n")
    sweep = read_sweep_config([*NEEDED[:4], "--config", str(file)])
    assert sweep.space == read_sweep_config(NEEDED).space and sweep.trials == 7


def test_what_may_change_when_a_sweep_continues() -> None:
    def settings(*words: str) -> Any:
        return search_plan(read_sweep_config([*NEEDED, *words])).settings

    same = ["--use_cpu", "--test_file=x", "--jobs=3", "--trials=9", "--keep_all", "--verbose"]
    assert settings(*same) == settings()
    for other in ("--max_length=9", "--seed=1", "--sampler=random", "--pruner=none"):
        assert settings(other) != settings()
    assert settings()["try"]["learning_rate"] == "1e-05..0.0005:log"
    assert json.loads(json.dumps(settings())) == settings()


def test_evaluations_at_different_points_prune_nothing() -> None:
    sweep = read_sweep_config([*NEEDED, "--pruner=hyperband"])
    assert search_plan(sweep).pruner == "hyperband"
    sweep = read_sweep_config([*NEEDED[:5], "eval_every=1 epoch,20%"])
    assert search_plan(sweep).pruner == "none" and sweep.sweep.pruner == "median"


def test_a_metric_by_its_file_does_not_say_how_its_score_is_called() -> None:
    words = [*NEEDED, "--metric_for_best_model=./mine.py", "--metrics"]
    with pytest.raises(ConfigError, match=r"mine.py: to compare runs, give the name of the score"):
        read_sweep_config([*words, "accuracy", "./mine.py"])
    read_sweep_config([*words, "./mine.py", "accuracy"])  # the first one is known


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    sweep = read_sweep_config([*NEEDED, f"--output_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"holds 'mine.txt', which no sweep wrote"):
        check_start(sweep)


def test_trials_are_ordinary_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    launcher = TrialLauncher(tmp_path, tmp_path / "base.yaml", jobs=3)
    words = launcher.command(7, {"learning_rate": 0.1 + 0.2, "eval_every": "1 epoch"})[4:]
    assert words == [
        *("--config", str(tmp_path / "base.yaml")),
        *("--learning_rate=0.30000000000000004", "--eval_every=1 epoch"),
        *("--output_dir", str(tmp_path / "trials" / "0007")),
    ]
    environment = launcher._environment(1)
    assert environment["OMP_NUM_THREADS"] == "2" and environment[TRIAL_VARIABLE] == str(os.getpid())
    gpus = TrialLauncher(tmp_path, tmp_path, processes=2, gpus=["4", "5", "6", "7"], jobs=2)
    assert [gpus._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,5", "6,7"]
    assert "OMP_NUM_THREADS" not in gpus._environment(0)
    assert gpus.command(0, {})[-4:-2] == ["--processes", "2"]


def test_a_trial_ends_with_its_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRIAL_VARIABLE, str(os.getppid()))
    with StopSignal() as stop:
        assert not stop.requested_locally()
    monkeypatch.setenv(TRIAL_VARIABLE, str(2**22))  # no such process: it has ended
    with StopSignal() as stop:
        assert stop.requested_locally() and stop.reason == "the launcher is gone"


def test_why_a_trial_failed(tmp_path: Path) -> None:
    log = tmp_path / "0001.log"
    assert error_of(tmp_path, log, -signal.SIGKILL) == "ended by SIGKILL (out of memory?)"
    assert error_of(tmp_path, log, 3) == "exit code 3"
    log.write_text("Training\nbertdist: There is no model.\n\n")
    assert error_of(tmp_path, log, 1) == "There is no model."
    log.write_text('bertdist: x\nTraceback\nValueError: "a"\n')
    (tmp_path / "status.json").write_text('{"state": "failed", "reason": "Out of memory.\\nmore"}')
    assert error_of(tmp_path, log, 1) == "Out of memory."


def test_evaluations_of_a_run_that_is_writing(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == []
    line = '{"kind": "eval", "step": 3, "epoch": 1.0, "loss": 0.5, "accuracy": null}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "train"}}\n{line}{line[:30]}')
    assert read_evaluations(tmp_path) == [(3, 1.0, {"loss": 0.5, "accuracy": None})]


class ForkedTrial:
    """`bertdist train` in a fork of the test: no seconds in which torch is imported."""

    def __init__(self, command: list[str], environment: Mapping[str, str], output: Any) -> None:
        def main() -> None:
            run_cli(run_training, read_config(command[4:]))

        self.process = Command(main, command, Path(output.name), environment)

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@pytest.mark.skipif(
    not EVERY_FAULT and not missing_commands(),
    reason="half a minute; tests/slurm/test_sweep_jobs.py has real trials: with BERTDIST_EVERY_FAULT=1 or without SLURM only",
)
def test_a_sweep_of_real_trials(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trial_runs, "_Process", ForkedTrial)
    rows = write_rows(tmp_path / "rows.tsv", make_rows(40, seed=1))
    out = tmp_path / "sweep"
    words = [
        *(f"--model_name_or_path={tiny_model}", f"--train_file={rows}", f"--test_file={rows}"),
        *("--validation_split=0.3", "--num_train_epochs=1", "--use_cpu", f"--output_dir={out}"),
        *("--try", "learning_rate=1e-4,5e-3", "--sampler=grid", "--dataloader_num_workers=0"),
    ]

    def sweep(*more: str) -> Sweep:
        return parse_or_exit(read_sweep_config, check_start, [*words, *more])

    assert run(sweep("--trials=1")) == 0  # stopped half way, as it were
    assert run(sweep()) == 0
    found = json.loads((out / "sweep.json").read_text())
    assert [x["state"] for x in found["results"]] == ["finished", "finished"]
    assert [x["values"] for x in found["results"]] == [{"learning_rate": x} for x in (1e-4, 5e-3)]
    for entry in found["results"]:
        report = json.loads((out / entry["folder"] / "evaluation.json").read_text())
        assert entry["score"] == report["scores"]["accuracy"] == entry["scores"]["accuracy"]
    best = found["best"]
    assert best["score"] == max(x["score"] for x in found["results"])
    assert (
        best["test_scores"]["accuracy"] > 0
        and "<h1>Sweep sweep" in (out / "report.html").read_text()
    )
    assert model_folder(out) == str(out / best["folder"] / "best")
    weights = [x.parent.parent.name for x in out.glob("trials/*/best/model.safetensors")]
    assert weights == [Path(best["folder"]).name]
    assert len([*out.glob("trials/*/best*")]) == 1  # nothing is left of the other
    again = read_config(["--config", str(out / "best.yaml")])
    assert again.optim.learning_rate == best["values"]["learning_rate"]
    assert again.run.output_dir == str(out / "final") and again.data.test_file == str(rows)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert (
        run(parse_or_exit(read_sweep_config, check_start, ["--status", f"--output_dir={out}"])) == 0
    )
    assert "2 of 2 trials: 2 finished." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ConfigError, match="train_batch_size was the default, is 16"):
        run(sweep("--train_batch_size=16"))
    with (
        FileLock(out / ".running.lock"),
        pytest.raises(BertdistError, match="Another process runs"),
    ):
        run(sweep())
