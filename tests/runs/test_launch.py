"""Accelerate configs and launch scripts start the right ranks; SLURM jobs are requeued."""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from forked import Command
from launched import accelerate_launch
from rows import EVERY_FAULT, make_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
SCRIPT_NAMES = ("train.slurm", "multi_node.slurm", "smoke.sh", "predict.slurm", "sweep.slurm")
SCRIPTS = [ROOT / "launch" / name for name in SCRIPT_NAMES]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
SECONDS = 300  # each of these takes 5 on an idle machine
OURS = (
    "SLURM_",
    "ACCELERATE_",
    "NPROC_PER_NODE",
    "MAIN_PROCESS_IP",
    "RANKS",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
)


def environment(**more: str) -> dict[str, str]:
    """This environment without variables of another launch, with this Python first on PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {
        **kept,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": "/nonexistent",
        **more,
    }  # no config of the user's own


# --- files


@pytest.mark.parametrize(
    "path", [*sorted(CONFIGS.glob("*.yaml")), *SCRIPTS], ids=lambda path: path.name
)
def test_each_file_starts_with_its_usage(path: Path) -> None:
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")
    ]
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    is_config = path.suffix == ".yaml"
    command = "accelerate launch --config_file accelerate_configs/" if is_config else "launch/"
    assert any(f"{command}{path.name}" in line for line in comment)


EXPECTED = {
    "cpu": (1, 1, True),
    "cpu_x2": (2, 1, True),
    "gpu": (1, 1, False),
    "gpu_x8": (8, 1, False),
    "multi_node": (16, 2, False),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_config(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises for an unknown key
    assert (config.num_processes, config.num_machines, config.use_cpu) == EXPECTED[path.stem]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_each_script(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


# --- real launches

PRINT_WORLD = """
    import torch
    from accelerate import Accelerator
    from bertdist.core.errors import BertdistError
    from bertdist.distributed.launcher import check_world

    accelerator = Accelerator(cpu=True)
    try:
        check_world(accelerator.num_processes)
    except BertdistError as error:
        raise SystemExit(f"bertdist: {error}") from None
    ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
    backend = torch.distributed.get_backend() if accelerator.num_processes > 1 else "no group"
    if accelerator.is_main_process:
        print(f"ranks {ranks} over {backend}")
    accelerator.end_training()
"""


@pytest.fixture
def print_world(tmp_path: Path) -> str:
    path = tmp_path / "print_world.py"
    path.write_text(textwrap.dedent(PRINT_WORLD))
    return str(path)


def launched(*words: str, **more: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `accelerate launch`, a Python of its own: its command line is read. SIGTERM ends one that hangs."""
    pipe, command = subprocess.PIPE, [*ACCELERATE, *words]
    with subprocess.Popen(
        command,
        env=environment(**more),
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            out, err = run.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGTERM)
            raise
        return run.returncode, out, err


# Launches of this kind have their unit tests in tests/unit/distributed/test_launcher.py, and tests/slurm
# launches two machines.
every_fault = pytest.mark.skipif(
    not EVERY_FAULT, reason="a launch more: with BERTDIST_EVERY_FAULT=1 only"
)


@pytest.mark.parametrize("kind", ["default", pytest.param("file", marks=every_fault)])
def test_a_users_config_that_asks_for_more_is_one_line(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """For prediction too; dynamo would compile the whole model, and FSDP shard it."""
    setting = {
        "default": "dynamo_config: {dynamo_backend: INDUCTOR}\ndistributed_type: 'NO'\n",
        "file": "distributed_type: FSDP\nmain_process_port: 0\nfsdp_config: {fsdp_version: 2}\n",
    }
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text(
        f"compute_environment: LOCAL_MACHINE\nuse_cpu: true\nnum_processes: 1\n{setting[kind]}"
    )
    words = [] if kind == "default" else ["--config_file", str(file)]
    home = tmp_path if kind == "default" else Path("/nonexistent")
    script = [["-m", "bertdist.predict"], ["-m", "bertdist.train"]][kind == "file"]
    model, train_file = str(tiny_model), write_rows(tmp_path / "t.csv", make_rows(4))
    flags = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out")]
    flags = (
        [*flags, "--train_file", str(train_file)]
        if kind == "file"
        else ["--model", model, "--text", "a"]
    )
    code, _, err = launched("--quiet", *words, *script, *flags, HF_HOME=str(home))
    name = {"default": "ACCELERATE_DYNAMO_BACKEND is 'INDUCTOR'", "file": "ACCELERATE_USE_FSDP is"}
    lines = [line for line in err.splitlines() if line.startswith("bertdist: ")]
    assert code == 1 and len(lines) == 1, err
    assert lines[0].startswith(f"bertdist: {name[kind]}") and f", set by {file}; " in lines[0]
    assert not (tmp_path / "out").exists()


def test_cpu_x2_config_is_as_many_processes_as_num_processes(
    print_world: str, tmp_path: Path
) -> None:
    """Without the flag it is two: tests/launched.py. cpu.yaml is one: the smoke run. The launcher is a fork."""
    words = ["launch", "--config_file", f"{CONFIGS}/cpu_x2.yaml", "--num_processes", "3"]
    out, err = tmp_path / "said_out", tmp_path / "said_err"
    run = Command(accelerate_launch, [*words, print_world], out, environment(), err)
    try:
        code = run.wait(SECONDS)
    finally:
        run.send_signal(signal.SIGTERM)
    said = (code, out.read_text())
    assert said == (0, "ranks [0, 1, 2] over gloo\n"), err.read_text()


def test_multi_node_config_joins_launchers(print_world: str, tmp_path: Path) -> None:
    """Two machines of one process, both simulated on this one; the launchers are forks."""
    words = f"launch --config_file {CONFIGS}/multi_node.yaml --num_processes 2".split()
    words += (
        f"--main_process_ip 127.0.0.1 --main_process_port {20000 + os.getpid() % 10000}".split()
    )
    env = environment(ACCELERATE_USE_CPU="true")
    runs = [
        Command(
            accelerate_launch,
            [*words, "--machine_rank", rank, print_world],
            tmp_path / f"out{rank}",
            env,
            tmp_path / f"err{rank}",
        )
        for rank in "01"
    ]
    try:
        codes = [run.wait(SECONDS) for run in runs]
    finally:
        for run in runs:
            run.send_signal(signal.SIGTERM)
    said = [(tmp_path / f"out{rank}").read_text() for rank in "01"]
    assert (codes, said) == ([0, 0], ["ranks [0, 1] over gloo\n", ""]), [
        (tmp_path / f"err{rank}").read_text() for rank in "01"
    ]


@every_fault
@pytest.mark.parametrize("how", ["flags", "config"])
def test_a_launch_that_starts_one_process_of_two_is_refused(
    print_world: str, tmp_path: Path, how: str
) -> None:
    config = tmp_path / "lost.yaml"
    config.write_text(
        (CONFIGS / "cpu_x2.yaml")
        .read_text(encoding="utf-8")
        .replace("_type: MULTI_GPU", "_type: MULTI_CPU")
    )
    words = ["--config_file", str(config)] if how == "config" else ["--cpu", "--num_processes", "2"]
    code, out, err = launched(*words, print_world)
    messages = [line for line in err.splitlines() if line.startswith("bertdist:")]
    assert (code, out, len(messages)) == (1, "", 1), err
    expected = (
        "`accelerate launch` was to start 2 processes, but this run has 1: give it --multi_gpu"
    )
    assert messages[0].startswith(f"bertdist: {expected}")


# --- the SLURM scripts, with SLURM's commands and accelerate replaced by a few lines of bash

COMMANDS = {
    # srun runs one task; after a failure the script runs `true` to test all nodes
    "srun": """
        [[ $* == *train.py* ]] && echo "$* / ${SLURM_EXPORT_ENV:-} ${!SLURM_CPU_BIND*}" >>"$FAKE/step"
        while [[ $1 == --* ]]; do shift; done
        [[ $1 == true ]] && exit ${FAKE_LOST:-0}
        SLURM_PROCID=0 SLURMD_NODENAME=node7 exec "$@" """,
    "accelerate": """
        echo "$*" >>"$FAKE/accelerate"
        echo "${OMP_NUM_THREADS} ${ACCELERATE_USE_CPU:-}" >>"$FAKE/accelerate.env"
        echo "$SLURM_JOB_END_TIME" >>"$FAKE/end"
        if [[ ${FAKE_WAITS:-} ]]; then
            touch "$FAKE/waits"
            until [[ -e $FAKE/scancel ]]; do sleep 0.05; done
        fi
        if [[ ${FAKE_STATE:-} ]]; then
            status='{"state": "'$FAKE_STATE'", "step": 10, "cause": "'${FAKE_CAUSE:-}'"}'
            echo "$status" >"$FAKE/out/status.json"
        fi
        mkdir -p "$FAKE/out/checkpoints/step_${FAKE_STEP:-10}"
        if [[ ${FAKE_PARTIAL:-} ]]; then echo "$FAKE_PARTIAL" >"$FAKE/partial.json"; fi
        exit ${FAKE_CODE:-0}""",
    "scancel": 'echo "$*" >>"$FAKE/scancel"',
    "scontrol": """
        case "$1 $2" in
            "--oneliner show")
                echo "JobId=$4 Restarts=${FAKE_RESTARTS-$SLURM_RESTART_COUNT} EndTime=$(date -d '+1 hour' +%FT%T)" ;;
            "show hostnames") printf 'node7\\nnode8\\n' ;;
            "show job") echo "PreemptEligibleTime=2026-11-27T11:16:11 PreemptTime=${FAKE_PREEMPTED:-None}" ;;
            requeue*) echo "$2" >>"$FAKE/requeue"; kill -TERM $$ $PPID; sleep 0.1 ;;
        esac""",
    # reading the config takes seconds: one test does it
    "python": """
        if [[ $2 == *read_config* && ! ${FAKE_READ:-} ]]; then echo "$FAKE/out"; exit; fi
        if [[ $2 == *read_predict_config* && ! ${FAKE_READ:-} ]]; then
            echo "$FAKE/partial.json"; exit
        fi
        exec "$REAL_PYTHON" "$@" """,
}


class FakeSlurm:
    """A folder of replaced commands, and what they recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[subprocess.Popen[str]] = []
        (folder / "out").mkdir()
        (folder / "bin").mkdir()
        for name, body in COMMANDS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{textwrap.dedent(body)}\n")
            (folder / "bin" / name).chmod(0o755)
        self.clone = folder / "clone"  # jobs write their logs there
        self.clone.mkdir()
        for name in ("bertdist", "launch", "accelerate_configs"):
            (self.clone / name).symlink_to(ROOT / name)

    def job(
        self, script: str, *words: str, cwd: Path | None = None, **more: str
    ) -> subprocess.Popen[str]:
        job = {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "4",
        }
        env = environment(
            **{
                **job,
                "FAKE": str(self.folder),
                "REAL_PYTHON": sys.executable,
                "OMP_NUM_THREADS": "",
                **more,
            }
        )
        env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{env['PATH']}"
        command = ["bash", f"{ROOT}/launch/{script}", *words]
        pipe = subprocess.PIPE
        run = subprocess.Popen(
            command,
            cwd=cwd or self.clone,
            env=env,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.jobs.append(run)
        return run

    def record(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[FakeSlurm]:
    fake = FakeSlurm(tmp_path)
    yield fake
    for run in fake.jobs:
        if run.poll() is None:  # only if a test failed
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


# script, nodes, the job's environment -> config, processes, OMP_NUM_THREADS and ACCELERATE_USE_CPU
WORLDS = [
    ("train", 1, {}, "cpu", 1, "4 true"),
    ("train", 1, {"NPROC_PER_NODE": "2"}, "cpu_x2", 2, "2 true"),
    ("train", 1, {"SLURM_GPUS_ON_NODE": "1"}, "gpu", 1, "4"),
    ("train", 1, {"SLURM_GPUS_ON_NODE": "8"}, "multi_node", 8, "1"),
    ("multi_node", 2, {}, "cpu_x2", 2, "4 true"),
    ("multi_node", 4, {"SLURM_GPUS_ON_NODE": "2"}, "multi_node", 8, "2"),
]


@pytest.mark.parametrize(("script", "nodes", "job", "config", "processes", "threads"), WORLDS)
def test_a_job_launches_one_process_per_gpu(
    slurm: FakeSlurm,
    script: str,
    nodes: int,
    job: dict[str, str],
    config: str,
    processes: int,
    threads: str,
) -> None:
    run = slurm.job(
        f"{script}.slurm",
        "--output_dir",
        "a b",
        FAKE_STATE="finished",
        **{"SLURM_JOB_NUM_NODES": str(nodes), **job},
    )
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, out
    words = f"launch --quiet --machine_rank 0 --config_file accelerate_configs/{config}.yaml"
    if processes > 1:
        logs = "--tee 3 --role node7. --log_dir bertdist-123456/attempt_0/node7"
        words = words.replace("--config", f"{logs} --config")
    words += f" --num_machines {nodes} --num_processes {processes}"
    words += " --main_process_ip node7 --main_process_port 23456"
    assert slurm.record("accelerate") == f"{words} bertdist/train.py --output_dir a b\n"
    assert slurm.record("accelerate.env").strip() == threads


def test_every_attempt_has_another_port(slurm: FakeSlurm) -> None:
    slurm.job("train.slurm", FAKE_STATE="finished", SLURM_RESTART_COUNT="2").communicate(
        timeout=SECONDS
    )
    assert "--main_process_port 23718 " in slurm.record("accelerate")


# name, state of status.json and what ended it, newest checkpoint (5 before), exit code of the launcher,
# the job's environment -> exit code of the job, requeued, what is said
LAST = {"MAX_RESTARTS": "2", "SLURM_RESTART_COUNT": "2"}
ENDS = [
    ("finished", "finished", "", 10, 0, {}, 0, False, "finished"),
    # a signal that comes after the end changes nothing
    ("finished late", "finished", "", 10, 1, {}, 0, False, "finished"),
    ("preempted", "preempted", "", 10, 1, {}, 0, True, "restart 1 of at most 100"),
    ("no step", "preempted", "", 5, 1, {}, 1, False, "no progress since step 5: not requeued"),
    ("by SLURM", "preempted", "", 5, 1, {"FAKE_PREEMPTED": "2026-11-27T11:17:00"}, 0, True, ""),
    ("error", "failed", "error", 10, 1, {}, 1, False, "would meet the same error"),
    ("lost", "failed", "lost", 10, 1, {}, 0, True, "restart 1"),
    ("hang", "failed", "hang", 10, 1, {}, 0, True, "restart 1"),
    ("lost at once", "failed", "lost", 5, 1, {}, 1, False, "no progress since step 5"),
    ("killed", "running", "", 10, 1, {}, 0, True, "restart 1"),
    ("killed at once", "running", "", 5, 1, {}, 1, False, "no progress since step 5"),
    ("it did not begin", "", "", 5, 1, {}, 1, False, "state none"),
    ("nothing, and no error", "", "", 5, 0, {}, 1, False, "state none"),
    ("refused: another job trains there", "", "", 10, 1, {}, 1, False, "state none"),
    ("limit", "preempted", "", 10, 1, LAST, 1, False, "restarted 2 times (MAX_RESTARTS)"),
    ("below it", "preempted", "", 10, 1, {**LAST, "SLURM_RESTART_COUNT": "1"}, 0, True, "2 of at"),
]


@pytest.mark.parametrize(
    ("state", "cause", "step", "code", "job", "ends", "requeued", "said"),
    [pytest.param(*case, id=name) for name, *case in ENDS],
)
def test_a_job_is_requeued_if_it_can_go_on(
    slurm: FakeSlurm,
    state: str,
    cause: str,
    step: int,
    code: int,
    job: dict[str, str],
    ends: int,
    requeued: bool,
    said: str,
) -> None:
    before = (
        '{"state": "preempted", "step": 5}'  # of an earlier attempt or another job: to be ignored
    )
    (slurm.folder / "out/status.json").write_text(before)
    (slurm.folder / "out/checkpoints/step_5").mkdir(parents=True)
    fake = {"FAKE_STATE": state, "FAKE_CAUSE": cause, "FAKE_CODE": str(code)}
    run = slurm.job("train.slurm", **fake, FAKE_STEP=str(step), **job)
    out, _ = run.communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("requeue")) == (ends, "123456\n" if requeued else ""), out
    assert said in out
    assert state or (slurm.folder / "out/status.json").read_text() == before, "it may be another's"


def test_a_finished_run_that_is_refused_later_is_an_error(slurm: FakeSlurm) -> None:
    """Such as with another setting."""
    (slurm.folder / "out/status.json").write_text('{"state": "finished", "step": 10}')
    out, _ = (run := slurm.job("train.slurm", FAKE_CODE="1")).communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("requeue")) == (1, ""), out


def test_a_run_folder_that_is_a_link_is_requeued(slurm: FakeSlurm) -> None:
    """To a faster disk. A damaged checkpoint is none."""
    (slurm.folder / "out").rename(slurm.folder / "elsewhere")
    (slurm.folder / "out").symlink_to("elsewhere")
    (slurm.folder / "elsewhere/checkpoints/step_000012.damaged").mkdir(parents=True)
    job = slurm.job("train.slurm", FAKE_STATE="preempted", FAKE_CODE="1")
    out, _ = job.communicate(timeout=SECONDS)
    assert (job.returncode, slurm.record("requeue")) == (0, "123456\n"), out


def test_variables_of_a_job_that_submitted_this_one_are_not_used(slurm: FakeSlurm) -> None:
    """sbatch passes them on. SLURM_EXPORT_ENV is what `sbatch --export=NONE` sets."""
    outer = {"SLURM_RESTART_COUNT": "7", "SLURM_JOB_END_TIME": "111", "SLURM_NTASKS": "4"}
    outer |= {"SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_CPU_BIND_LIST": "0x1"}
    job = {"FAKE_STATE": "finished", "FAKE_RESTARTS": "0", "MAX_RESTARTS": "5"}
    run = slurm.job("train.slurm", SLURM_EXPORT_ENV="NONE", **outer, **job)
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0 and "attempt 0" in out, out
    assert 3500 < int(slurm.record("end")) - time.time() < 3700
    step = slurm.record("step")
    assert step.startswith("--nodes=1 --ntasks=1 ") and step.endswith("/ ALL \n"), step


@pytest.mark.parametrize("script", ["train", "predict", "sweep"])
def test_a_signal_before_the_start_ends_the_job(slurm: FakeSlurm, script: str) -> None:
    """With a time limit below 120 s SLURM sends it at once."""
    job = slurm.job(f"{script}.slurm", SETUP='kill -USR1 "$$"')
    out, _ = job.communicate(timeout=SECONDS)
    assert (job.returncode, slurm.record("accelerate"), slurm.record("requeue")) == (1, "", ""), out
    assert "USR1 came before the start" in out and "not requeued" in out


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SETUP", "no_such_command", "SETUP ended with exit code 127: no_such_command"),
        ("CONTAINER", "run 'b", "bash cannot read CONTAINER or SRUN_OPTIONS: run 'b"),
        ("LOG_DIR", "/proc/none", "/proc/none"),
        ("SLURM_JOB_ID", "", "this is a job of SLURM: sbatch launch/train.slurm"),
    ],
)
def test_variables_that_cannot_be_used_end_the_job(
    slurm: FakeSlurm, name: str, value: str, said: str
) -> None:
    run = slurm.job("train.slurm", **{"NPROC_PER_NODE": "2", name: value})
    out, _ = run.communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("accelerate")) == (1, "")
    assert said in out.splitlines()[-1], out


@pytest.mark.parametrize("fold", ["folds/2", "seeds/43"])
def test_a_job_of_several_runs_is_judged_by_the_newest(slurm: FakeSlurm, fold: str) -> None:
    """--folds and --seeds: each has a folder of its own, and --output_dir has no status.json."""
    for name, state, step in (("1", "finished", 40), (fold.split("/")[1], "preempted", 10)):
        run = slurm.folder / "out" / fold.split("/")[0] / name
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (run / "status.json").write_text(f'{{"state": "{state}", "step": {step}}}')
        os.utime(run / "status.json", (step, 1000 - step))
    # an attempt that saves another step of the second, and one that finishes it
    text = f"""
        mkdir -p "$FAKE/out/{fold}/checkpoints/step_$FAKE_STEP"
        echo '{{"state": "'$FAKE_STATE'", "step": '$FAKE_STEP'}}' >"$FAKE/out/{fold}/status.json"
        exit $FAKE_CODE"""
    (slurm.folder / "bin" / "accelerate").write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n")
    for state, step, code, ends, requeued in (
        ("preempted", "20", "1", 0, "123456\n"),
        ("preempted", "20", "1", 1, ""),
        ("finished", "40", "0", 0, ""),
    ):
        (slurm.folder / "requeue").unlink(missing_ok=True)
        job = slurm.job("train.slurm", FAKE_STATE=state, FAKE_STEP=step, FAKE_CODE=code)
        out, _ = job.communicate(timeout=SECONDS)
        assert (job.returncode, slurm.record("requeue")) == (ends, requeued), out


def test_modules_containers_and_options_of_srun(slurm: FakeSlurm) -> None:
    """SETUP, CONTAINER and SRUN_OPTIONS; the log of each process where LOG_DIR says."""
    for name, body in (
        ("apptainer", 'echo "$*" >>"$FAKE/apptainer"; [[ $3 == "b c.sif" ]] && shift 3; exec "$@"'),
    ):
        (slurm.folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (slurm.folder / "bin" / name).chmod(0o755)
    srun = slurm.folder / "bin" / "srun"
    srun.write_text(srun.read_text().replace("#!/bin/bash", '#!/bin/bash\necho $* >>"$FAKE/srun"'))
    words = {
        "SETUP": 'set -eo pipefail; export LOADED="a b"; echo "loaded $LOADED" >"$FAKE/setup"',
        "CONTAINER": "apptainer exec --nv 'b c.sif'",
        "SRUN_OPTIONS": "--container-image=b.sqsh --container-mounts=/data",
        "LOG_DIR": "logs",
        "NPROC_PER_NODE": "2",
        "MAIN_PROCESS_PORT": "4000",
    }
    run = slurm.job("train.slurm", "--output_dir", "a b", FAKE_STATE="finished", **words)
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, out
    assert slurm.record("setup") == "loaded a b\n"
    steps = slurm.record("srun").splitlines()
    assert "python -c" in steps[0] and "--wait=60" in " ".join(steps)
    assert all(words["SRUN_OPTIONS"] in step for step in steps if "--" in step), steps
    in_container = slurm.record("apptainer").splitlines()
    assert in_container[0].startswith("exec --nv b c.sif python -c")
    launch = "exec --nv b c.sif accelerate launch --quiet --machine_rank 0 --tee 3 --role node7. --log_dir"
    assert any(line.startswith(f"{launch} logs/attempt_0/node7 ") for line in in_container)
    assert slurm.record("accelerate").endswith("4000 bertdist/train.py --output_dir a b\n")


# the job's environment -> what SLURM's commands are given: this task, never the whole array
ARRAY_TASKS = [
    ({"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}, "123456_3"),
    # another task, or a job that a task of another array has submitted: the variables are the same
    ({"SLURM_ARRAY_JOB_ID": "123453", "SLURM_ARRAY_TASK_ID": "1"}, "123456"),
    ({}, "123456"),
]


@pytest.mark.parametrize(("task", "job"), ARRAY_TASKS)
def test_a_task_of_an_array_is_requeued_and_cancelled_alone(
    slurm: FakeSlurm, task: dict[str, str], job: str
) -> None:
    run = slurm.job("train.slurm", FAKE_STATE="preempted", FAKE_WAITS="yes", FAKE_CODE="1", **task)
    deadline = time.monotonic() + SECONDS
    while not (slurm.folder / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGUSR1)
    out, _ = run.communicate(timeout=SECONDS)
    assert slurm.record("scancel").splitlines()[0] == f"--signal=USR1 {job}", out
    assert slurm.record("requeue") == f"{job}\n", out


@pytest.mark.parametrize(
    ("number", "step", "requeued"),
    [(signal.SIGUSR1, 10, True), (signal.SIGUSR1, 5, False), (signal.SIGTERM, 10, False)],
    ids=str,
)
def test_a_signal_is_forwarded_and_the_job_waits(
    slurm: FakeSlurm, number: signal.Signals, step: int, requeued: bool
) -> None:
    """USR1: the time limit is near, requeue if there was progress. TERM: cancelled, no requeue."""
    (slurm.folder / "out/checkpoints/step_5").mkdir(parents=True)
    run = slurm.job(
        "train.slurm", FAKE_STATE="preempted", FAKE_STEP=str(step), FAKE_WAITS="yes", FAKE_CODE="1"
    )
    deadline = time.monotonic() + SECONDS
    while not (slurm.folder / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(number)
    out, _ = run.communicate(timeout=SECONDS)
    assert slurm.record("scancel").splitlines()[0] == "--signal=USR1 123456", out
    assert (run.returncode, slurm.record("requeue")) == (
        0 if requeued else 1,
        "123456\n" if requeued else "",
    ), out


@pytest.mark.parametrize(
    ("nodes", "lost", "requeued"), [(2, 1, True), (2, 0, False), (1, 1, False)]
)
def test_a_job_that_lost_a_node_is_requeued(
    slurm: FakeSlurm, nodes: int, lost: int, requeued: bool
) -> None:
    """The remaining ranks fail at once, long before SLURM notices."""
    job = {
        "SLURM_JOB_NUM_NODES": str(nodes),
        "FAKE_STATE": "failed",
        "FAKE_CAUSE": "lost",
        "FAKE_STEP": "0",  # nothing was saved
        "FAKE_CODE": "1",
        "FAKE_LOST": str(lost),
    }
    out, _ = (run := slurm.job("multi_node.slurm", **job)).communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("requeue")) == (
        0 if requeued else 1,
        "123456\n" if requeued else "",
    ), out


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("train", "MAX_RESTARTS", "many"),
        ("predict", "MAX_RESTARTS", ""),
        ("sweep", "MAX_RESTARTS", "-1"),
        ("train", "MAX_RESTARTS", "08"),
        ("train", "NPROC_PER_NODE", "0"),
        ("train", "OMP_NUM_THREADS", "two"),
    ],
)
def test_a_variable_that_is_no_number_ends_the_job(
    slurm: FakeSlurm, script: str, name: str, value: str
) -> None:
    run = slurm.job(f"{script}.slurm", **{name: value})
    out, _ = run.communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("accelerate")) == (1, "")
    assert f"{name} is '{value}'; expected a whole number, {int(name[0] != 'M')} or more." in out


def test_a_job_that_slurm_restarts_too_often_ends(slurm: FakeSlurm) -> None:
    """SLURM requeues by itself after a lost node."""
    job = {"MAX_RESTARTS": "2", "SLURM_RESTART_COUNT": "3"}
    out, _ = (run := slurm.job("train.slurm", **job)).communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("accelerate")) == (1, "")
    assert "restarted 3 times, more than MAX_RESTARTS" in out


def test_a_wrong_flag_ends_the_job_before_it_launches(slurm: FakeSlurm) -> None:
    out, _ = (run := slurm.job("train.slurm", "--learning_rat", "1", FAKE_READ="yes")).communicate(
        timeout=SECONDS
    )
    assert (run.returncode, slurm.record("accelerate")) == (1, "")
    assert out == "bertdist: Unknown setting --learning_rat. Did you mean --learning_rate?\n"


def test_a_job_in_another_folder_uses_the_installed_package(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    """PYTHONPATH stands for an installation here; tests/runs/test_wheel.py has a real one."""
    job = {"SLURM_JOB_NUM_NODES": "2", "FAKE_STATE": "finished"}
    run = slurm.job("multi_node.slurm", cwd=tmp_path, **job)
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, out
    arguments = slurm.record("accelerate")
    assert f"--config_file {ROOT}/bertdist/accelerate_configs/cpu_x2.yaml" in arguments
    assert arguments.endswith("-m bertdist.train\n")


def test_a_job_without_bertdist_ends_before_it_launches(slurm: FakeSlurm, tmp_path: Path) -> None:
    (slurm.folder / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    run = slurm.job("train.slurm", cwd=tmp_path)
    out, _ = run.communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("accelerate")) == (1, "")
    assert f"bertdist is not installed, and {tmp_path} is not its repository." in out


# --- predict.slurm, in the same way; its state is that of the unfinished output


def partial_state(rows: int, command: str = "this", error: str = "", job: str = "123456") -> str:
    """As bertdist/core/partial_file.py writes it; 0 rows: nothing was saved."""
    state = {
        "key": {"input": command},
        "bytes": 9 * rows,
        "state": {"rows": rows} if rows else None,
        "job": job,
    }
    return json.dumps({**state, "error": error} if error else state)


# name, before the attempt, after it, the job's environment -> requeued, and the line that says why not
AT_10 = partial_state(10)
PREDICTIONS = [
    ("begun", None, AT_10, {}, True, ""),
    ("continued", AT_10, partial_state(20), {}, True, ""),
    ("preempted", AT_10, AT_10, {"FAKE_PREEMPTED": "2026-11-27T11:17:00"}, True, ""),
    ("no progress", AT_10, AT_10, {}, False, "no progress since row 10: not requeued"),
    ("nothing saved", None, partial_state(0), {}, False, "no progress since row 0: not requeued"),
    ("no output", None, None, {}, False, "no progress since row 0: not requeued"),
    ("another job", AT_10, partial_state(20, job="7"), {}, False, "no progress since row 10"),
    ("another job's error", AT_10, partial_state(20, error="row 7", job="7"), {}, False, "row 10"),
    ("another before", partial_state(90, "another"), AT_10, {}, True, ""),
    ("bad row", None, partial_state(10, error="rows.csv line 7"), {}, False, "the same error"),
    ("100th", None, AT_10, {"SLURM_RESTART_COUNT": "99"}, True, ""),
    ("101st", None, AT_10, {"SLURM_RESTART_COUNT": "100"}, False, "restarted 100 times"),
    (
        "limit",
        None,
        AT_10,
        {"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"},
        False,
        "2 times (MAX_",
    ),
]


@pytest.mark.parametrize(
    ("before", "after", "job", "requeued", "said"),
    [pytest.param(*case, id=name) for name, *case in PREDICTIONS],
)
def test_a_prediction_is_requeued_only_if_it_made_progress(
    slurm: FakeSlurm,
    before: str | None,
    after: str | None,
    job: dict[str, str],
    requeued: bool,
    said: str,
) -> None:
    if before is not None:
        (slurm.folder / "partial.json").write_text(before)
    run = slurm.job("predict.slurm", FAKE_CODE="1", FAKE_PARTIAL=after or "", **job)
    out, _ = run.communicate(timeout=SECONDS)
    assert (run.returncode, slurm.record("requeue")) == (
        0 if requeued else 1,
        "123456\n" if requeued else "",
    ), out
    assert said in out


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=str)
def test_a_prediction_forwards_signals(slurm: FakeSlurm, number: signal.Signals) -> None:
    """As train.slurm does; requeued after USR1 alone. Of an array its own task."""
    run = slurm.job(
        "predict.slurm",
        FAKE_WAITS="yes",
        FAKE_CODE="1",
        FAKE_PARTIAL=partial_state(10),
        SLURM_ARRAY_JOB_ID="123456",
        SLURM_ARRAY_TASK_ID="3",
    )
    deadline = time.monotonic() + SECONDS
    while not (slurm.folder / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(number)
    out, _ = run.communicate(timeout=SECONDS)
    assert slurm.record("scancel").splitlines()[0] == "--signal=USR1 123456_3", out
    is_usr1 = number == signal.SIGUSR1
    assert slurm.record("requeue") == ("123456_3\n" if is_usr1 else ""), out


def test_a_prediction_launches_all_nodes_and_ends(slurm: FakeSlurm, tmp_path: Path) -> None:
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    out, _ = (run := slurm.job("predict.slurm", "--top_k", "all", **job)).communicate(
        timeout=SECONDS
    )
    assert (run.returncode, slurm.record("requeue")) == (0, ""), out
    words = "launch --quiet --machine_rank 0 --tee 3 --role node7. --log_dir bertdist-123456/attempt_0/node7"
    words += " --config_file accelerate_configs/multi_node.yaml"
    words += " --num_machines 2 --num_processes 8 --main_process_ip node7 --main_process_port 23456"
    assert slurm.record("accelerate") == f"{words} bertdist/predict.py --top_k all\n"
    slurm.job("predict.slurm", cwd=tmp_path).communicate(timeout=SECONDS)
    assert slurm.record("accelerate").endswith("-m bertdist.predict\n"), "an installed package"


def test_a_prediction_to_standard_output_ends_before_it_launches(slurm: FakeSlurm) -> None:
    words = ["--model", "out", "--input", "rows.csv"]
    out, _ = (run := slurm.job("predict.slurm", *words, FAKE_READ="yes")).communicate(
        timeout=SECONDS
    )
    assert (run.returncode, slurm.record("accelerate")) == (1, ""), out
    assert out == (
        "bertdist: launch/predict.slurm needs --input and --output: a file, which can be "
        "continued.\n"
    )


# --- sweep.slurm, in the same way; `bertdist sweep` and what its trials have done are made up


@pytest.fixture
def swept(slurm: FakeSlurm) -> FakeSlurm:
    """FAKE_TRIALS: "before after", as `progress` of the script counts."""
    text = """
        if [[ $1 == -c ]]; then
            echo >>"$FAKE/asked"
            set -- $FAKE_TRIALS
            if (($(wc -l <"$FAKE/asked") == 1)); then echo "$1"; else echo "$2"; fi
            exit
        fi
        echo "$*" >>"$FAKE/sweep"
        if [[ ${FAKE_WAITS:-} ]]; then
            touch "$FAKE/waits"
            until [[ -e $FAKE/scancel ]]; do sleep 0.05; done
        fi
        exit ${FAKE_CODE:-0}"""
    (slurm.folder / "bin" / "python").write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n")
    return slurm


ONE_TASK = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "1"}
# name, trials before and after, exit code, the job's environment -> exit code, requeued, what is said
SWEEPS = [
    ("finished", "0 9", 0, {}, 0, False, "exit code 0"),
    ("stopped", "5 9", 75, {}, 0, True, "requeueing"),
    ("no progress", "5 5", 75, {}, 75, False, "no trial has advanced: not requeued"),
    ("failed", "5 9", 1, {}, 1, False, "exit code 1"),
    ("preempted", "5 5", 143, {"FAKE_PREEMPTED": "2026-11-27T11:17:00"}, 0, True, "requeueing"),
    ("limit", "5 9", 75, {"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"}, 75, False, "2 times"),
    ("below it", "5 9", 75, {"SLURM_RESTART_COUNT": "1", "MAX_RESTARTS": "2"}, 0, True, "requeue"),
]


@pytest.mark.parametrize(
    ("trials", "code", "job", "ends", "requeued", "said"),
    [pytest.param(*case, id=name) for name, *case in SWEEPS],
)
def test_a_task_of_a_sweep_is_requeued_alone_if_trials_have_advanced(
    swept: FakeSlurm,
    trials: str,
    code: int,
    job: dict[str, str],
    ends: int,
    requeued: bool,
    said: str,
) -> None:
    job = {**ONE_TASK, **job, "FAKE_CODE": str(code), "FAKE_TRIALS": trials}
    out, _ = (run := swept.job("sweep.slurm", "--jobs", "4", **job)).communicate(timeout=SECONDS)
    assert (run.returncode, swept.record("requeue")) == (ends, "123456_1\n" * requeued), out
    assert swept.record("sweep") == "-m bertdist sweep --worker --jobs 4\n"
    assert said in out


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=str)
def test_a_task_of_a_sweep_passes_a_signal_to_its_step(
    swept: FakeSlurm, number: signal.Signals
) -> None:
    """TERM, which SLURM sends to the step itself, is not passed on; nor is the task requeued."""
    job = {**ONE_TASK, "FAKE_CODE": "75", "FAKE_TRIALS": "5 9", "FAKE_WAITS": "yes"}
    run = swept.job("sweep.slurm", **job)
    deadline = time.monotonic() + SECONDS
    while not (swept.folder / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(number)
    if number == signal.SIGTERM:
        (swept.folder / "scancel").touch()
    out, _ = run.communicate(timeout=SECONDS)
    is_usr1 = number == signal.SIGUSR1
    assert swept.record("scancel") == "--signal=TERM 123456_1\n" * is_usr1, out
    assert (run.returncode, swept.record("requeue")) == (
        0 if is_usr1 else 75,
        "123456_1\n" * is_usr1,
    ), out


# --- the smoke run


def test_smoke_run_takes_five_steps(tiny_model: Path, tmp_path: Path) -> None:
    rows = [f"a {word} film\t{label}" for word, label in (("good", 1), ("bad", 0)) * 20]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    words = f"--model_name_or_path {tiny_model} --train_file {tmp_path}/train.tsv"
    words += f" --output_dir {tmp_path}/out --train_batch_size 4"
    command = [SCRIPTS[2], *shlex.split(words)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out/environment.json").read_text())["processes"] == 1
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"train"' in line]) == 5
    assert '"finished"' in (tmp_path / "out/status.json").read_text()
