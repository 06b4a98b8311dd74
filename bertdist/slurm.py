"""Jobs of SLURM: submit a command, see how its run is doing, check an allocation.

    bertdist slurm submit --nodes 2 --gpus_per_node 8 train --config run.yaml --output_dir out
    bertdist slurm status out
    bertdist slurm doctor --folder /shared/me      # in a job

The job is a script of launch/ with the options and arguments inside (core/slurm_script.py). No
torch is imported here; the all-reduce of doctor runs in processes of its own.
"""

import os
import sys

if __name__ == "__main__" and not __package__:
    # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import fcntl
import importlib.metadata
import platform
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import bertdist
from bertdist.core.args import (
    parse_arguments,
    parse_or_exit,
    read_config,
    read_predict_config,
    with_first_words,
)
from bertdist.core.atomic_io import atomic_write, explain_write_errors, read_json_object, to_json
from bertdist.core.config import PredictConfig, TrainConfig, as_yaml
from bertdist.core.errors import BertdistError, ConfigError, did_you_mean
from bertdist.core.flags import flag_name, flags_of
from bertdist.core.output_files import JOB_FILE, JOB_SCRIPT, SLURM, STDOUT, is_special, target_of
from bertdist.core.slurm import (
    NoSlurm,
    SlurmError,
    call_slurm,
    is_time_limit,
    job_view,
    jobs_of_script,
)
from bertdist.core.slurm_script import job_script, option_words, read_options, template_options
from bertdist.core.terminal import exit_with_error, show
from bertdist.core.urls import without_secrets
from bertdist.data.preflight import check_predict
from bertdist.distributed.slurm_config import (
    ABOUT,
    DOCTOR_ABOUT,
    PROGRAM,
    STATUS_ABOUT,
    SUBMIT_ABOUT,
    DoctorConfig,
    StatusConfig,
    SubmitConfig,
)
from bertdist.sweep import Sweep, read_sweep_config
from bertdist.sweep import check_start as check_sweep
from bertdist.training.resume_check import check_start as check_train

ACTIONS = ("submit", "status", "doctor")
CONFIG = "config.yaml"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")
EXIT_INTERRUPTED = 130
LONGEST_WAIT = 3600  # seconds, of doctor
# Options with which sbatch submits another job than the written one, or none, or does not return.
NO_JOB = ("help", "parsable", "test-only", "usage", "version", "wait", "wrap")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
INPUTS = ("train_file", "validation_file", "test_file", "input")


class JobCommand(NamedTuple):
    """A command that can be a job: what reads its flags and checks them; its script in launch/."""

    read: Callable[[Sequence[str]], Any]
    check: Callable[[Any], None]
    script: str


JOB_COMMANDS = {
    "train": JobCommand(read_config, check_train, "train.slurm"),
    "predict": JobCommand(read_predict_config, check_predict, "predict.slurm"),
    "sweep": JobCommand(read_sweep_config, check_sweep, "sweep.slurm"),
}


@dataclasses.dataclass(frozen=True)
class Submission:
    """A job to submit."""

    options: SubmitConfig
    command: str  # of JOB_COMMANDS
    config: Any  # of the command
    words: list[str]  # as given

    @property
    def folder(self) -> Path:
        """Where the job is written."""
        if isinstance(self.config, PredictConfig):
            return Path(f"{self.config.output}.{SLURM}")
        run = self.config.train.run if isinstance(self.config, Sweep) else self.config.run
        return Path(run.output_dir) / SLURM


SlurmConfig: TypeAlias = "Submission | StatusConfig | DoctorConfig"


# ---- The flags


def read_slurm_config(arguments: Sequence[str]) -> SlurmConfig:
    """The arguments after `bertdist slurm`. Raises ConfigError."""
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help", "help"):
        print(ABOUT, flush=True)
        sys.exit(0)
    if action not in ACTIONS:
        raise ConfigError(
            f"bertdist slurm has no action {action!r}.{did_you_mean(action, ACTIONS)} "
            "`bertdist slurm --help` explains them."
        )
    if action == "submit":
        return read_submission(rest)
    if action == "status":
        words = with_first_words(rest, "folders")
        (status,) = parse_arguments(f"{PROGRAM} status", [StatusConfig], words, STATUS_ABOUT)
        assert isinstance(status, StatusConfig)
        return status
    (doctor,) = parse_arguments(f"{PROGRAM} doctor", [DoctorConfig], rest, DOCTOR_ABOUT)
    assert isinstance(doctor, DoctorConfig)
    if doctor.tasks_per_node < 1:
        raise ConfigError(f"--tasks_per_node is {doctor.tasks_per_node}; expected at least 1.")
    if not 1 <= doctor.wait <= LONGEST_WAIT:
        raise ConfigError(
            f"--wait is {doctor.wait:g}; expected a number of seconds, 1 to {LONGEST_WAIT}."
        )
    return dataclasses.replace(doctor, folder=os.path.expanduser(doctor.folder))


def read_submission(words: Sequence[str]) -> Submission:
    """`--nodes 2 train --config run.yaml`: flags of the job, a command, its flags."""
    number = _command_position(words)
    own, command = _with_equals(words[:number]), "".join(words[number : number + 1])
    (options,) = parse_arguments(f"{PROGRAM} submit", [SubmitConfig], own, SUBMIT_ABOUT)
    assert isinstance(options, SubmitConfig)
    if not command:
        known = ", ".join(JOB_COMMANDS)
        raise ConfigError(
            f"There is no command to submit ({known}): flags of the job, the command, its flags, "
            "such as `bertdist slurm submit --time 04:00:00 train --config run.yaml`."
        )
    given = list(words[number + 1 :])
    if problems := [*_problems(options, command), *_misplaced(given, command)]:
        raise ConfigError("\n".join(problems))
    config = JOB_COMMANDS[command].read(given)
    job = Submission(options, command, config, list(words))
    if problems := [*_problems_of(config), *_unwritable(job)]:
        raise ConfigError("\n".join(problems))
    return job


def _with_equals(words: Sequence[str]) -> list[str]:
    """`--sbatch --exclusive` as argparse reads it: with "=" a value may begin with a dash."""
    found: list[str] = []
    for word in words:
        if found[-1:] == ["--sbatch"]:
            found[-1] = f"--sbatch={word}"
        else:
            found.append(word)
    return found


def _command_position(words: Sequence[str]) -> int:
    """Of the first word that is a command and no value of a flag; their number without one."""
    switches = {flag.name for flag in flags_of(SubmitConfig) if flag.type is bool}
    is_value = False
    for i, word in enumerate(words):
        if word in JOB_COMMANDS and not is_value:
            return i
        name = word.removeprefix("--").replace("-", "_")
        is_flag = word.startswith("--") and not is_value
        is_value = is_flag and "=" not in word and name not in switches
    return len(words)


def _problems(options: SubmitConfig, command: str) -> Iterable[str]:
    bounds = {"nodes": 1, "cpus_per_task": 1, "nproc_per_node": 1, "max_restarts": 0}
    for name, least in bounds.items():
        value = getattr(options, name)
        if value is not None and value < least:
            yield f"--{name} is {value}; expected at least {least}."
    if options.time is not None and not is_time_limit(options.time):
        yield f"--time is {options.time}; expected minutes, H:M:S, D-H or D-H:M:S."
    if options.array is not None and command != "sweep":
        yield f"--array is for sweep; {command} is one job, on any number of --nodes."
    if options.nodes > 1 and command == "sweep":
        yield "--nodes is for train: the tasks of a sweep's --array, such as 0-7, have a node each."
    own = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(options)}
    for name in read_options(options.sbatch or ""):
        if name in NO_JOB:
            yield f"--sbatch gives --{name}, with which sbatch does not submit this job."
        # sbatch takes the beginning of a name; --gpus is a name
        for full in (x for x in own if x.startswith(name) and (x == name or name != "gpus")):
            yield f"--sbatch gives --{name}: give it as --{own[full]}, before {command}."


def _misplaced(words: Sequence[str], command: str) -> Iterable[str]:
    """Flags of the job after the command, where they are unknown."""
    names = {flag.name for flag in flags_of(SubmitConfig)}
    for word in words:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in names:
            continue
        if name == "dry_run":
            yield (
                f"--dry_run stands before {command} to write and show the job; "
                f"`bertdist {command} --dry_run` needs no job."
            )
        else:
            yield f"--{name} is a flag of the job: it stands before the word {command}."


def _problems_of(config: Any) -> Iterable[str]:
    """What a command can do, and a job cannot."""
    if isinstance(config, Sweep) and config.sweep.status:
        yield "--status needs no job: bertdist sweep --output_dir sweep --status."
    if isinstance(config, TrainConfig) and config.run.dry_run:
        yield "--dry_run of train needs no job: leave it out."
    if isinstance(config, PredictConfig):
        if config.output is None:
            yield "--output is missing: the predictions of a job go into a file."
        elif config.output == STDOUT or is_special(target_of(Path(config.output))):
            yield f"--output {config.output}: the predictions of a job go into a file."
    train = config.train if isinstance(config, Sweep) else config
    for section in (train, getattr(train, "data", None)):
        for name in INPUTS:
            files = getattr(section, name, None) or ()
            for file in [files] if isinstance(files, str) else files:
                if file == "-" or file.startswith(("/dev/", "/proc/")):
                    yield f"--{name} {file} is not there in a job: give a file."


def _unwritable(job: Submission) -> Iterable[str]:
    """Names that sbatch cannot have."""
    folder, found = str(job.folder.absolute()), "a line break or another control character"
    if "\\" in folder:
        found = "a backslash, which SLURM takes out of the name of the log"
    if "\\" in folder or _CONTROL.search(folder):
        yield f"The folder {folder!r} has {found} in its name: give another one."
    for name in ("job_name", "partition", "account", "array", "gpus_per_node", "sbatch"):
        value = getattr(job.options, name)
        if value is not None and _CONTROL.search(value):
            yield f"--{name} is {value!r}: a line break or another control character is in it."


def check_slurm(config: SlurmConfig) -> None:
    """Raise BertdistError for what can be seen before the job."""
    if isinstance(config, Submission):
        JOB_COMMANDS[config.command].check(config.config)
        _check_python(config.options)
    elif isinstance(config, DoctorConfig) and "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(
            "bertdist slurm doctor runs inside a job of SLURM, and SLURM_JOB_ID is not set: "
            "salloc --nodes 2 --ntasks-per-node 1, and the same command in its shell."
        )


def _check_python(options: SubmitConfig) -> None:
    """Raise ConfigError where the `python` of the job's scripts would be another Python."""
    own = Path(sys.executable)
    named = own.with_name("python")
    is_chosen = options.setup or os.environ.get("SETUP") or os.environ.get("CONTAINER")
    if not is_chosen and not (named.exists() and named.samefile(own)):
        raise ConfigError(
            f"The job would run {named}, which is not this Python, {own}: use a virtual "
            "environment, or say what to activate in the job (--setup)."
        )


# ---- submit


def submit(job: Submission) -> None:
    """Write the job and give it to sbatch. Raises BertdistError."""
    folder = job.folder.absolute()
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _only_submission(folder):
        _reject_active(folder)
        script, facts = write_job(job, folder)
        if job.options.dry_run:
            print(script.read_text(encoding="utf-8"))
            show(f"Not submitted (--dry_run): sbatch {shlex.quote(str(script))} submits it.")
            return
        # As words, since variables such as SBATCH_PARTITION win over the lines of a script.
        words = option_words(given_options(job, folder))
        answer, notes = call_slurm("sbatch", "--parsable", *words, str(script))
        # "123;cluster"; a site's own sbatch may say more
        numbers = re.findall(r"^(\d+)(?:;.*)?$", answer, re.MULTILINE)
        if not numbers:
            raise SlurmError(f"sbatch answers {answer.strip()!r}, not the number of a job.")
        facts["job_id"] = number = numbers[-1]
        atomic_write(folder / JOB_FILE, to_json(facts, indent=1))
    where = os.path.relpath(folder.parent if folder.name == SLURM else folder)
    shown = shlex.quote(f"./{where}" if where.startswith("-") else where)
    log = re.sub(
        r"%(.)", lambda x: {"%": "%", "j": number, "A": number}.get(x[1], x[0]), facts["log"]
    )
    show(*(line for line in notes.splitlines() if line.strip()))
    show(
        f"Submitted job {facts['job_id']} ({facts['options'].get('job-name', '')}); {script}.",
        f"Watch it:  bertdist slurm status {shown}",
        f"Its log:   {log}",
        f"Cancel it: scancel {facts['job_id']}",
    )


@contextmanager
def _only_submission(folder: Path) -> Iterator[None]:
    """Of two submissions at a time, the second one waits."""
    with explain_write_errors(folder):
        file = open(folder / ".lock", "ab")  # noqa: SIM115  # errors below are of something else
    with file:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reject_active(folder: Path) -> None:
    """Raise ConfigError where an earlier job of the folder waits or runs: the one in job.json, or
    one of the script that a user gave to sbatch, or whose number could not be written.
    """
    script = folder / JOB_SCRIPT
    noted = read_json_object(folder / JOB_FILE).get("job_id")
    with suppress(NoSlurm):  # sbatch says it; --dry_run needs none
        jobs = [str(noted)] if noted else []
        for job in dict.fromkeys(jobs + (jobs_of_script(script) if script.exists() else [])):
            view = job_view(job, script)
            if view is not None and view.is_active:
                where = folder.parent if folder.name == SLURM else folder
                raise ConfigError(
                    f"{os.path.relpath(where)} already has job {job}, {view.state}: wait for it, "
                    f"or scancel {job} first."
                )


def write_job(job: Submission, folder: Path) -> tuple[Path, dict[str, Any]]:
    """config.yaml, job.slurm and job.json, without a job id; returns the script, and job.json.

    Raises BertdistError.
    """
    template = bertdist.resource_folder("launch") / JOB_COMMANDS[job.command].script
    if not template.is_file():
        raise ConfigError(f"{template} is missing: install bertdist again.")
    text = template.read_text(encoding="utf-8")
    options = {**template_options(text), **given_options(job, folder)}
    config = folder / CONFIG
    facts = {
        "job_id": None,
        "command": shlex.join(map(without_secrets, ["bertdist", "slurm", "submit", *job.words])),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "working_folder": os.getcwd(),
        "log": options["output"],
        "options": options,
        "python": {"executable": sys.executable, "version": platform.python_version()},
        "packages": {"bertdist": bertdist.__version__, **dict(_versions())},
        "git": _git_state(),
    }
    script = job_script(
        text,
        options,
        before=_lines_before(job.options, folder),
        arguments=["--config", str(config)],
        about=[
            f"Written by bertdist {bertdist.__version__}, {facts['written']}, in {os.getcwd()!r}:",
            *f"  {facts['command']}".splitlines(),
            f"It is {template.name} of bertdist with options, environment and arguments.",
        ],
    )
    atomic_write(config, config_yaml(job.config).encode())
    atomic_write(folder / JOB_SCRIPT, script.encode())
    atomic_write(folder / JOB_FILE, to_json(facts, indent=1))
    return folder / JOB_SCRIPT, facts


def given_options(job: Submission, folder: Path) -> dict[str, str]:
    """Name -> value: those of the flags, and of --sbatch, which win."""
    given, name = job.options, (folder.parent if folder.name == SLURM else folder).name
    log = "%A_%a.log" if given.array else "%j.log"
    flags = {
        "job-name": given.job_name or name,
        "nodes": given.nodes,
        "gpus-per-node": given.gpus_per_node,
        "cpus-per-task": given.cpus_per_task,
        "time": given.time,
        "partition": given.partition,
        "account": given.account,
        "array": given.array,
        "output": f"{str(folder).replace('%', '%%')}/{log}",
    }
    own = {name: str(value) for name, value in flags.items() if value is not None}
    return {**own, **read_options(given.sbatch or "")}


def _lines_before(options: SubmitConfig, folder: Path) -> list[str]:
    """The shell of the job: this folder, this Python, the variables of the scripts, --setup."""
    knobs = {"MAX_RESTARTS": options.max_restarts, "NPROC_PER_NODE": options.nproc_per_node}
    python = shlex.quote(os.path.dirname(os.path.abspath(sys.executable)))
    return [
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        f'export PATH={python}:"$PATH"',
        f'export LOG_DIR={shlex.quote(str(folder))}/"$SLURM_JOB_ID"',  # of each process
        *(f"export {name}={value}" for name, value in knobs.items() if value is not None),
        *(options.setup or "").splitlines(),
    ]


def config_yaml(config: TrainConfig | Sweep | PredictConfig) -> str:
    """All settings that are not None, as YAML that the command's --config reads back."""
    sections: list[Any] = [config]
    if isinstance(config, Sweep):
        sections = [config.sweep, *vars(config.train).values()]
    elif isinstance(config, TrainConfig):
        sections = list(vars(config).values())
    values = {
        flag_name(field): getattr(section, field.name)
        for section in sections
        for field in dataclasses.fields(section)
    }
    return as_yaml({name: value for name, value in values.items() if value is not None})


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _git_state() -> dict[str, Any] | None:
    """Commit of the current folder's repository, and whether files differ from it."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], capture_output=True, text=True, timeout=20, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": bool(changes.strip())}


# ---- The command


def run(config: SlurmConfig) -> int:
    """Submit, show or check; returns the exit code. Raises BertdistError."""
    if isinstance(config, Submission):
        submit(config)
        return 0
    if isinstance(config, StatusConfig):
        from bertdist.reporting.slurm_status import show_status

        show_status(config.folders)
        return 0
    from bertdist.distributed.doctor import examine

    return examine(config)


def run_and_exit(config: SlurmConfig) -> NoReturn:
    """`run`, and exit with its code."""
    try:
        code = run(config)
        sys.stdout.flush()
    except BertdistError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit(parse_or_exit(read_slurm_config, check_slurm))
