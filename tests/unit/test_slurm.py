"""`bertdist slurm submit`: what is checked, written and given to sbatch, which is a script here."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bertdist import cli, slurm
from bertdist.core.args import TRAIN_SECTIONS, parse_arguments
from bertdist.core.config import PredictConfig, TrainConfig
from bertdist.core.flags import flags_of
from bertdist.core.output_files import check_run_folder, check_sweep_folder
from bertdist.data import preflight
from bertdist.distributed.slurm_config import DoctorConfig
from bertdist.slurm import JOB_COMMANDS, Submission, config_yaml, read_slurm_config
from bertdist.sweep import Sweep, SweepConfig
from bertdist.training import resume_check

TRAIN = ["train", "--model_name_or_path=m", "--train_file=t.tsv", "--output_dir=out"]
SWEEP = [
    "sweep",
    *TRAIN[1:],
    "--validation_split=0.1",
    "--try",
    "learning_rate=1e-5..5e-4:log",
    "weight_decay=0,0.1",
]
PREDICT = ["predict", "--model=m", "--input=t.tsv", "--output=answers.csv"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder. The files of TRAIN do not exist, and are not looked for."""
    monkeypatch.setattr(preflight, "is_launched", lambda: True)
    monkeypatch.setattr(slurm, "_git_state", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands, first on PATH; sbatch notes its words, and scontrol knows job 41 only."""
    commands = folder / "bin"
    commands.mkdir()
    texts = {
        "sbatch": f'echo "$@" >> {folder}/sbatch.log; echo "41;here"',
        "scontrol": (
            f'[[ $4 == 41 ]] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}\n'
            f"cat {folder}/state"
        ),
        "sacct": "exit 1",
        "squeue": f"cat {folder}/queue",
    }
    for name, text in texts.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    (folder / "state").write_text("JobId=41 JobState=PENDING Reason=Priority\n")
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    return commands


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    """(exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["slurm", *words])
    return ended.value.code, *capsys.readouterr()


def submission(*words: str) -> Submission:
    found = read_slurm_config(["submit", *words])
    assert isinstance(found, Submission)
    return found


# ---- The flags


def test_flags_of_the_job_stand_before_the_command() -> None:
    job = submission("--partition", "train", "--dry_run", "--sbatch", "--exclusive -C a", *TRAIN)
    assert (job.command, job.options.partition, job.options.dry_run) == ("train", "train", True)
    assert job.options.sbatch == "--exclusive -C a" and job.config.run.output_dir == "out"
    assert submission("--nodes=2", "--dry-run", *PREDICT).command == "predict"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is no command to submit (train, predict, sweep)"),
        (["--partition", "train"], "There is no command to submit"),
        (["evaluate"], "Unexpected argument 'evaluate'"),
        (["--nodez", "2", *TRAIN], "Unknown setting --nodez. Did you mean --nodes?"),
        (["--nodes", "0", *TRAIN], "--nodes is 0; expected at least 1."),
        (["--max_restarts", "-1", *TRAIN], "--max_restarts is -1; expected at least 0."),
        (["--time", "4h", *TRAIN], "--time is 4h; expected minutes, H:M:S, D-H or D-H:M:S."),
        (["--array", "0-3", *TRAIN], "--array is for sweep; train is one job"),
        (["--nodes", "2", *SWEEP], "--nodes is for train"),
        (
            [*TRAIN, "--nodes", "2"],
            "--nodes is a flag of the job: it stands before the word train.",
        ),
        ([*TRAIN, "--dry-run"], "--dry_run stands before train"),
        (["--sbatch=--time=2", *TRAIN], "--sbatch gives --time: give it as --time, before train."),
        (["--sbatch=-a 0-1", *TRAIN], "--sbatch gives --array: give it as --array, before train."),
        (["--sbatch=--arr=0-1", *TRAIN], "--sbatch gives --arr: give it as --array, before train."),
        (["--sbatch=--wait", *TRAIN], "--sbatch gives --wait, with which sbatch does not submit"),
        (["--job_name=a\nb", *TRAIN], "--job_name is 'a\\nb': a line break or another control"),
        ([*TRAIN, "--output_dir=a\\b"], "The folder "),
        ([*TRAIN, "--output_dir=a\nb"], "The folder "),
        ([*TRAIN, "--dry_run=yes"], "--dry_run stands before train"),
        ([*TRAIN, "--config=dry.yaml"], "--dry_run of train needs no job"),
        ([*TRAIN, "--train_file=-"], "--train_file - is not there in a job: give a file."),
        ([*PREDICT, "--input=/dev/fd/63"], "--input /dev/fd/63 is not there in a job"),
        ([*PREDICT, "--output=-"], "--output -: the predictions of a job go into a file."),
        ([*PREDICT, "--output=/dev/stdout"], "--output /dev/stdout: the predictions of a job"),
        ([*TRAIN, "--lerning_rate=1"], "Unknown setting --lerning_rate"),
        (PREDICT[:-1], "--output is missing"),
        (["sweep", "--output_dir=s", "--status"], "--status needs no job"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("dry.yaml").write_text("dry_run: true\n")
    code, out, error = run(capsys, "submit", *words)
    assert (code, out) == (1, "") and error.startswith(f"bertdist: {message}")
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_wrong_actions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "sumbit")[2].startswith(
        "bertdist: bertdist slurm has no action 'sumbit'. Did you mean"
    )
    assert "is not set: salloc" in run(capsys, "doctor")[2]
    assert "--wait is 0; expected" in run(capsys, "doctor", "--wait", "0")[2]
    assert "--wait is inf; expected" in run(capsys, "doctor", "--wait", "inf")[2]
    error = run(capsys, "status", "out", "--folders", "out2")[2]
    assert error == "bertdist: 'out' stands before --folders: give all of them in one place.\n"
    assert read_slurm_config(["doctor", "--folder=~/x"]) == DoctorConfig(
        folder=os.path.expanduser("~/x")
    )
    assert "no_such: there is no such folder." in run(capsys, "status", "no_such")[2]


@pytest.mark.parametrize("action", slurm.ACTIONS)
@pytest.mark.parametrize("words", [["--help"], ["--help", "all"]])
def test_help_of_an_action_fits_into_80_columns(
    action: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, error = run(capsys, action, *words)
    assert (code, error) == (0, "") and f"  bertdist slurm {action}" in out
    assert max(map(len, out.split("\n"))) <= 80


def test_paths_are_checked_before_the_job(
    sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "is_launched", lambda: False)
    code, _, error = run(capsys, "submit", *TRAIN)
    assert code == 1 and "t.tsv" in error
    assert not Path("out").exists() and not Path("sbatch.log").exists()


def test_the_job_has_this_python(
    folder: Path, sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (sbatch / "python3").symlink_to(sys.executable)  # as of systems without `python`
    monkeypatch.setattr(sys, "executable", f"{sbatch}/python3")
    code, _, error = run(capsys, "submit", *TRAIN)
    message = f"bertdist: The job would run {sbatch}/python, which is not this Python, {sbatch}/"
    assert code == 1 and error.startswith(message)
    assert run(capsys, "submit", "--setup", "source activate bert", *TRAIN)[0] == 0
    (sbatch / "python").symlink_to("python3")
    assert run(capsys, "submit", "--dry_run", *TRAIN, "--output_dir=other")[0] == 0


# ---- What is written


@pytest.mark.parametrize("command", JOB_COMMANDS)
def test_every_setting_reads_back_the_same(command: str) -> None:
    texts = ["null", "yes", "1e3", "- x", "a: #b", " é ", "\x85", "a\nb", "'", "$HOME", "--x", "%", "\u2028"]  # fmt: skip
    values: dict[type, list[Any]] = {
        bool: [True, False],
        int: [0, -1, 10**12],
        float: [1e-5, 0.1, 1e16, 5e-324, -2.0],
        str: texts,
    }
    paths = {"model_name_or_path", "model", "tokenizer_name", "train_file", "validation_file"}
    paths |= {"test_file", "input", "output", "output_dir"}  # which are checked
    sections: list[Any] = [PredictConfig] if command == "predict" else TRAIN_SECTIONS
    sections = [SweepConfig, *sections] if command == "sweep" else sections
    for i in range(len(texts)):
        given = []
        for section in sections:
            odd: dict[str, Any] = {}
            for field, flag in zip(dataclasses.fields(section), flags_of(section), strict=True):
                known = list(flag.choices) or values[flag.type]
                if flag.name not in paths:
                    one = known[i % len(known)]
                    odd[field.name] = [one, *known] if flag.many else one
            given.append(section(**odd))
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        config: Any = given[0]
        if command != "predict":
            config = TrainConfig(**dict(zip(names, given[-len(names) :], strict=True)))
        config = Sweep(given[0], config, {}) if command == "sweep" else config
        Path("config.yaml").write_text(config_yaml(config), encoding="utf-8")
        again = parse_arguments("", sections, ["--config", "config.yaml"])
        assert list(again) == given


@pytest.mark.parametrize("words", [TRAIN, SWEEP, PREDICT], ids=lambda words: words[0])
def test_the_config_of_the_job_reads_back_the_same(words: list[str]) -> None:
    more = (
        []
        if words is PREDICT
        else ["--validation_split=0.1", "--metrics", "f1_macro", "accuracy", "--warmup_ratio=0.1"]
    )
    job = submission(*words, *more)
    Path("config.yaml").write_text(config_yaml(job.config))
    again = JOB_COMMANDS[job.command].read(["--config", "config.yaml"])
    assert again == job.config
    odd = submission(*words, "--text_column", "\x85", "null", "1e3", "- x", " ", "é: #", "a\nb")
    Path("config.yaml").write_text(config_yaml(odd.config))
    assert JOB_COMMANDS[job.command].read(["--config", "config.yaml"]) == odd.config
    other = submission(*words, *more, "--max_length=77")
    assert again != other.config


def test_a_submission(folder: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--nodes=2",
        "--gpus_per_node=a100:4",
        "--max_restarts=20",
        "--setup",
        "module load cuda",
    ]
    code, out, error = run(capsys, "submit", *words, "--sbatch", "--qos=high", *TRAIN, "--seed=3")
    assert (code, error) == (0, "")
    job = folder / "out" / "slurm"
    assert out.startswith(f"Submitted job 41 (out); {job}/job.slurm.\n")
    assert "bertdist slurm status out\n" in out and f"{job}/41.log\n" in out
    options = f"--job-name=out --nodes=2 --gpus-per-node=a100:4 --output={job}/%j.log --qos=high"
    assert Path("sbatch.log").read_text() == f"--parsable {options} {job}/job.slurm\n"

    script = (job / "job.slurm").read_text()
    lines = script.splitlines()
    for line in (
        *("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=a100:4", "#SBATCH --qos=high"),
        *("#SBATCH --requeue", "#SBATCH --job-name=out", f"#SBATCH --output={job}/%j.log"),
        f'export LOG_DIR={job}/"$SLURM_JOB_ID"',
        *("export MAX_RESTARTS=20", "module load cuda", f"set -- --config {job}/config.yaml"),
    ):
        assert lines.count(line) == 1, line
    assert lines.index("module load cuda") < lines.index("set -u")
    assert f"cd {folder} || exit 1" in script and "NPROC_PER_NODE=" not in lines[:25]

    facts = json.loads((job / "job.json").read_text())
    assert facts["job_id"] == "41" and facts["working_folder"] == str(folder)
    assert facts["options"]["qos"] == "high" and facts["packages"]["torch"]
    assert facts["command"].startswith("bertdist slurm submit --nodes=2 ")
    assert yaml.safe_load((job / "config.yaml").read_text())["seed"] == 3
    check_run_folder(folder / "out")  # the job's own start


def test_a_second_submission_while_the_first_waits(
    folder: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "submit", *TRAIN)[0] == 0
    before = (folder / "out/slurm/config.yaml").read_bytes()
    for words in ([], ["--dry_run"]):
        code, out, error = run(capsys, "submit", *words, *TRAIN, "--seed=9")
        assert (code, out) == (1, "")
        assert error == (
            "bertdist: out already has job 41, PENDING (Priority): wait for it, or scancel 41 first.\n"
        )
    assert (folder / "out/slurm/config.yaml").read_bytes() == before
    (folder / "state").write_text("JobId=41 JobState=COMPLETED Reason=None\n")
    assert run(capsys, "submit", *TRAIN, "--seed=9")[0] == 0
    assert Path("sbatch.log").read_text().count("\n") == 2


def test_a_job_that_was_not_noted_is_found_in_the_queue(
    folder: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of `sbatch out/slurm/job.slurm` by hand, or of a submission that was interrupted."""
    assert run(capsys, "submit", "--dry_run", *TRAIN)[0] == 0
    (folder / "queue").write_text(f"41\x1f{folder}\x1f{folder}/out/slurm/job.slurm\n")
    before = (folder / "out/slurm/config.yaml").read_bytes()
    code, _, error = run(capsys, "submit", *TRAIN, "--seed=9")
    assert code == 1 and "out already has job 41, PENDING (Priority)" in error
    assert (folder / "out/slurm/config.yaml").read_bytes() == before
    (folder / "queue").write_text(f"41\x1f{folder}\x1f{folder}/other/slurm/job.slurm\n")
    assert run(capsys, "submit", *TRAIN, "--seed=9")[0] == 0


def test_an_answer_without_a_number_is_no_submission(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sbatch / "sbatch").write_text("#!/bin/bash\necho done\n")
    assert run(capsys, "submit", *TRAIN)[2].startswith("bertdist: sbatch answers 'done', not")
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'Maintenance on 24 May'; echo '77;here'\n")
    assert run(capsys, "submit", *TRAIN)[1].startswith("Submitted job 77 ")


def test_a_folder_with_percent_signs_and_a_dash(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "submit", *TRAIN, "--output_dir=-5%j")
    assert code == 0 and "status ./-5%j\n" in out and "/-5%j/slurm/41.log\n" in out


def test_passwords_of_urls_are_not_noted(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://me:secret@host/t.tsv?sig=secret"
    assert run(capsys, "submit", *TRAIN, f"--validation_file={url}")[0] == 0
    for name in ("job.json", "job.slurm"):
        text = Path("out/slurm", name).read_text()
        assert "secret" not in text and "--validation_file=https://host/t.tsv" in text
    assert url in Path("out/slurm/config.yaml").read_text()  # which the job reads


def test_a_dry_run_shows_the_script_and_submits_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # SLURM is not needed
    code, out, error = run(capsys, "submit", "--dry_run", *TRAIN)
    assert (code, error) == (0, "") and out.startswith("#!/bin/bash\n")
    assert out.endswith(
        f"Not submitted (--dry_run): sbatch {folder}/out/slurm/job.slurm submits it.\n"
    )
    assert json.loads((folder / "out/slurm/job.json").read_text())["job_id"] is None
    assert "there is no command sbatch" in run(capsys, "submit", *TRAIN)[2]


def test_an_error_of_sbatch_is_one_line(
    folder: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Invalid qos' >&2\nexit 1\n")
    assert run(capsys, "submit", *TRAIN) == (1, "", "bertdist: sbatch: Invalid qos\n")
    check_run_folder(folder / "out")


def test_jobs_of_sweeps_and_predictions(
    folder: Path, sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "JOB_COMMANDS", {  # without their checks
        name: command._replace(check=lambda config: None) for name, command in JOB_COMMANDS.items()
    })  # fmt: skip
    assert run(capsys, "submit", "--array", "0-3", *SWEEP)[0] == 0
    script = (folder / "out/slurm/job.slurm").read_text()
    assert "#SBATCH --array=0-3\n" in script and "bertdist sweep --worker" in script
    assert f"#SBATCH --output={folder}/out/slurm/%A_%a.log\n" in script
    check_sweep_folder(folder / "out")
    code, out, error = run(capsys, "submit", *PREDICT)
    assert error == ""
    assert code == 0 and "bertdist slurm status answers.csv.slurm\n" in out
    assert "find_program predict" in (folder / "answers.csv.slurm/job.slurm").read_text()


@pytest.mark.parametrize("check", [check_run_folder, check_sweep_folder])
def test_a_folder_slurm_of_another_program_is_foreign(check: Any, folder: Path) -> None:
    (folder / "x" / "slurm").mkdir(parents=True)
    (folder / "x" / "slurm" / "notes.txt").touch()
    with pytest.raises(slurm.ConfigError, match="holds 'slurm', which no"):
        check(folder / "x")
    (folder / "x" / "slurm" / "job.json").touch()
    check(folder / "x")


def test_the_imports_of_the_checks_are_those_of_the_commands() -> None:
    for name, command in JOB_COMMANDS.items():
        assert command.read is cli.COMMANDS[name].read and command.check is cli.COMMANDS[name].check
    assert JOB_COMMANDS["train"].check is resume_check.check_start
