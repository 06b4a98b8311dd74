"""The table of `bertdist slurm status`, from run folders and made-up answers of SLURM."""

import json
import os
import socket
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from bertdist.core.errors import ConfigError
from bertdist.core.slurm import JobView, NoSlurm, SlurmError
from bertdist.reporting import slurm_status
from bertdist.reporting.slurm_status import (
    Progress,
    Target,
    folder_of_job,
    progress_of,
    row_of,
    show_status,
    targets_in,
    targets_in_queue,
    total_steps,
    with_queued_jobs,
)

LINES = [
    {"kind": "train", "step": 10, "epoch": 0.5, "loss": 1.0},
    {"kind": "eval", "step": 10, "epoch": 0.5, "loss": 0.9, "accuracy": 0.75, "f1_macro": 0.5},
    {"kind": "eval", "step": 20, "epoch": 1.0, "loss": 0.7, "accuracy": 0.625, "f1_macro": 0.6},
    {"kind": "train", "step": 25, "epoch": 1.25, "loss": 0.6},
]


@pytest.fixture(autouse=True)
def _no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_status, "own_jobs", list)


def make_run(folder: Path, job: str = "", state: str = "running", **settings: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 20, "reason": ""}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"num_train_epochs": 3.0, **settings}))
    lines = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "metrics.jsonl").write_text(lines + '{"kind": "train", "step": 9')  # being written
    if job:
        (folder / "slurm").mkdir()
        (folder / "slurm" / "job.json").write_text(json.dumps({"job_id": job}))
    return folder


def test_progress_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    assert progress_of(run) == Progress("running", "25 of 60", "accuracy 0.625 (0.75)")
    # of a run that has stopped, status.json has the step of its checkpoint
    run = make_run(tmp_path / "stopped", state="preempted", metric_for_best_model="loss")
    assert progress_of(run) == Progress("preempted", "20 of 60", "loss 0.7 (0.7)")
    run = make_run(tmp_path / "short", max_train_steps=1200, metric_for_best_model="f1_macro")
    assert progress_of(run) == Progress("running", "25 of 1,200", "f1_macro 0.6 (0.6)")
    assert progress_of(tmp_path) == progress_of(None) == Progress()


def test_total_steps_are_not_known_before_the_first_line() -> None:
    assert total_steps({"num_train_epochs": 3.0}, {}) is None
    assert total_steps({"num_train_epochs": 2.5}, {"step": 3, "epoch": 1 / 3}) == 22


def test_progress_of_a_sweep_and_of_a_prediction(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    make_run(sweep / "trials" / "0000", state="finished")
    make_run(sweep / "trials" / "0001")
    (sweep / "slurm").mkdir()
    (sweep / "slurm" / "config.yaml").write_text("trials: 20\n")
    assert progress_of(sweep) == Progress("sweep", "1 of 20 trials", "accuracy (0.625)")
    job = tmp_path / "answers.csv.slurm"
    job.mkdir()
    (job / "job.json").write_text("{}")
    assert progress_of(job) == Progress()
    (tmp_path / "answers.csv").touch()
    assert progress_of(job) == Progress("finished")


TARGET = Target(Path("out"), "41", "out")


@pytest.mark.parametrize(
    ("view", "is_asked", "state", "expected"),
    [
        (
            JobView("RUNNING", True, 90.0, 2),
            True,
            "running",
            ["RUNNING", "running", "0:01:30", "2"],
        ),
        (
            JobView("PENDING (Priority)", True, None, 0),
            True,
            "",
            ["PENDING (Priority)", "not started", "", "0"],
        ),
        (JobView("NODE_FAIL", False), True, "running", ["NODE_FAIL", "killed", "", ""]),
        (None, True, "running", ["forgotten by SLURM", "killed", "", ""]),
        (None, True, "finished", ["forgotten by SLURM", "finished", "", ""]),
        (None, False, "running", ["", "running", "", ""]),  # SLURM is not here
        # requeued after a lost node
        (
            JobView("PENDING (BeginTime)", True),
            True,
            "running",
            ["PENDING (BeginTime)", "killed", "", ""],
        ),
    ],
)
def test_states_of_job_and_run(
    view: JobView | None, is_asked: bool, state: str, expected: list[str]
) -> None:
    row = row_of(TARGET, view, is_asked, Progress(state))
    assert [row[2], row[3], row[6], row[7]] == expected


def test_a_prediction_that_runs_is_not_called_not_started(tmp_path: Path) -> None:
    folder = tmp_path / "answers.csv.slurm"
    folder.mkdir()
    (folder / "job.json").touch()
    for where in (folder, None):  # None: of launch/predict.slurm
        target = Target(where, "41", "answers")
        for state, expected in (("RUNNING", ""), ("PENDING (Priority)", "not started")):
            assert row_of(target, JobView(state, True), True, Progress())[3] == expected
    assert row_of(TARGET, JobView("RUNNING", True), True, Progress())[3] == "not started"


def test_states_of_runs_without_a_job() -> None:
    for is_alive, expected in ((True, "running"), (None, "running"), (False, "killed")):
        assert row_of(TARGET, None, False, Progress("running", is_alive=is_alive))[3] == expected
    # an ended job's run goes on by hand
    assert row_of(TARGET, None, True, Progress("running", is_alive=True))[3] == "running"
    written = Target(Path("out"), "", "out", Path("out/slurm/job.slurm"))
    assert row_of(written, None, False, Progress())[2:4] == ["no job known", ""]
    assert row_of(written, None, False, Progress("finished"))[2:4] == ["", "finished"]


def test_folders_and_folders_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/b"), "7")
    make_run(Path("runs/a"))
    Path("runs/notes").mkdir()
    assert [(x.name, x.job) for x in targets_in(["runs/b"])] == [("runs/b", "7")]
    assert [(x.name, x.job) for x in targets_in(["runs"])] == [("a", ""), ("b", "7")]
    assert [x.name for x in targets_in(["runs", "runs/b"])] == ["runs/a", "runs/b", "runs/b"]
    for given, message in (("none", "there is no such folder"), ("runs/notes", "holds none")):
        with pytest.raises(ConfigError, match=message):
            list(targets_in([given]))


def test_the_folder_of_a_job_in_the_queue(tmp_path: Path) -> None:
    out = make_run(tmp_path / "it's my out", "7")
    (tmp_path / "run.yaml").write_text("output_dir: from_file\n")
    place = str(tmp_path)
    assert folder_of_job("/", f"{out}/slurm/job.slurm") == out
    assert folder_of_job(place, "launch/train.slurm --output_dir=x --seed 3") == tmp_path / "x"
    assert folder_of_job(place, "/a/multi_node.slurm --seed 3 --output-dir x") == tmp_path / "x"
    assert folder_of_job(place, "launch/train.slurm --config run.yaml") == tmp_path / "from_file"
    assert folder_of_job(place, "launch/predict.slurm --model m") == Path()
    for other in ("train.sh --output_dir x", "(null)", "elsewhere/job.slurm", "a 'b", ""):
        assert folder_of_job(place, other) is None


def test_jobs_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "out", "7")
    place = str(tmp_path)
    jobs = [
        ("7", "/", f"{place}/out/slurm/job.slurm"),
        ("8", place, "bash"),
        ("9", place, "train.slurm"),
    ]
    monkeypatch.setattr(slurm_status, "own_jobs", lambda: jobs)
    assert [(x.name, x.job) for x in targets_in_queue()] == [("out", "7"), ("train.slurm", "9")]


def test_a_job_submitted_by_hand_is_that_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("out"), "7")
    make_run(Path("other"), "6")
    jobs = [("9", str(tmp_path), "out/slurm/job.slurm"), ("8", "/", f"/x/train.slurm --output_dir={tmp_path}/out")]  # fmt: skip
    monkeypatch.setattr(slurm_status, "own_jobs", lambda: jobs)
    found = with_queued_jobs(targets_in(["out", "other"]), targets_in_queue())
    assert [(x.name, x.job) for x in found] == [("out", "9"), ("out", "8"), ("other", "6")]


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    damaged = Progress("its files are damaged")
    run = make_run(tmp_path / "a", num_train_epochs="x")
    assert progress_of(run) == damaged
    run = make_run(tmp_path / "b", metric_for_best_model=["f1"])
    assert progress_of(run) == damaged
    run = make_run(tmp_path / "c")
    (run / "metrics.jsonl").write_text('{"step": "x", "epoch": 1}\n')
    assert progress_of(run) == damaged
    (run / "status.json").write_text("{")
    assert progress_of(run) == damaged
    (run / "status.json").unlink()
    (run / "status.json").mkdir()
    assert progress_of(run) == Progress("cannot be read (Is a directory)")
    (tmp_path / "d" / "trials").mkdir(parents=True)
    (tmp_path / "d" / "sweep.json").write_text('{"trials": "x"}')
    assert progress_of(tmp_path / "d") == damaged


def test_a_run_may_be_named_like_the_folder_of_a_prediction(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out.slurm", "7")
    assert [(x.folder, x.job) for x in targets_in([str(run)])] == [(run, "7")]
    assert progress_of(run).state == "running"
    assert folder_of_job("/", f"{run}/slurm/job.slurm") == run


def test_whether_a_process_trains_is_known_on_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "out")
    assert progress_of(run).is_alive is None
    for host, pid, expected in (
        (socket.gethostname(), os.getpid(), True),
        (socket.gethostname(), (1 << 22) + 1, False),  # more than Linux has
        ("elsewhere", (1 << 22) + 1, None),
    ):
        owner = {"host": host, "pid": pid, "since": "now"}
        (run / "running.json").write_text(json.dumps(owner))
        assert progress_of(run).is_alive is expected
    (run / "run.lock").touch()
    with FileLock(run / "run.lock"):
        assert progress_of(run).is_alive


def table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *folders: str, width: int
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    show_status(folders)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_the_table(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("out"), "7")
    monkeypatch.setattr(
        slurm_status, "job_view", lambda job, script: JobView("RUNNING", True, 3600.0, 1)
    )
    lines = table(capsys, monkeypatch, "out", width=width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for cell in ("out", "7", "RUNNING", "running", "25 of 60", "1:00:00", "restarts"):
        assert cell in text
    if width == 200:
        row = next(line for line in lines if line.startswith(" out"))
        assert row.split("  ")[0].strip() == "out" and "accuracy 0.625 (0.75)" in row


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (NoSlurm("SLURM is not installed here: there is no command scontrol."), "SLURM is not installed here: job states are not known."),
        (SlurmError("scontrol: Unable to contact slurm controller"), "scontrol: Unable to contact slurm controller: job states are not known."),
    ],
)  # fmt: skip
def test_without_slurm_the_run_is_shown(
    error: SlurmError,
    note: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("out"), "7")
    make_run(Path("second"), "8")
    asked = []

    def no_answer(job: str, script: Path) -> JobView:
        asked.append(job)
        raise error

    monkeypatch.setattr(slurm_status, "job_view", no_answer)
    lines = table(capsys, monkeypatch, "out", "second", width=120)
    assert asked == ["7"]  # each question may take a minute
    assert lines[-1] == note and "job state" not in " ".join(lines[:-1])
    assert "running    25 of 60" in " ".join(lines)
