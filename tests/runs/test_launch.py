"""Every way to launch that the project names gives the ranks it promises, and a SLURM job is queued again only when it should be."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
SCRIPTS = [ROOT / "launch" / name for name in ("train.slurm", "multi_node.slurm", "smoke.sh")]
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
    """This process's environment without traces of another launch, and with this Python first on the path."""
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
def test_each_file_begins_with_when_and_how_to_use_it(path: Path) -> None:
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")
    ]
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    how = (
        "accelerate launch --config_file accelerate_configs/"
        if path.suffix == ".yaml"
        else "launch/"
    )
    assert any(f"{how}{path.name}" in line for line in comment)


PROMISED = {
    "cpu": (1, 1, True),
    "cpu_x2": (2, 1, True),
    "gpu": (1, 1, False),
    "gpu_x8": (8, 1, False),
    "multi_node": (16, 2, False),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_config(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises for a key that it does not know
    assert (config.num_processes, config.num_machines, config.use_cpu) == PROMISED[path.stem]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_each_script(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


# --- real launches

SAY_WORLD = """
    import torch
    from accelerate import Accelerator
    from bertdist.core.errors import BertdistError
    from bertdist.distributed.launch import check_world

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
def say_world(tmp_path: Path) -> str:
    path = tmp_path / "say_world.py"
    path.write_text(textwrap.dedent(SAY_WORLD))
    return str(path)


def launched(*words: str, **more: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `accelerate launch words...`; ended by SIGTERM, which torchrun passes on, if it hangs."""
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


def test_cpu_config_is_one_process(say_world: str) -> None:
    code, out, err = launched("--config_file", f"{CONFIGS}/cpu.yaml", say_world)
    assert (code, out) == (0, "ranks [0] over no group\n"), err


@pytest.mark.parametrize(("words", "ranks"), [([], [0, 1]), (["--num_processes", "3"], [0, 1, 2])])
def test_cpu_x2_config_is_two_processes_or_as_many_as_asked(
    say_world: str, words: list[str], ranks: list[int]
) -> None:
    code, out, err = launched("--config_file", f"{CONFIGS}/cpu_x2.yaml", *words, say_world)
    assert (code, out) == (0, f"ranks {ranks} over gloo\n"), err


def test_multi_node_config_joins_launchers(say_world: str) -> None:
    """Two machines of one process, both of them this one."""
    words = [
        "--config_file",
        f"{CONFIGS}/multi_node.yaml",
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
    ]
    words += ["--main_process_port", str(20000 + os.getpid() % 10000)]
    with ThreadPoolExecutor() as pool:
        ends = [
            pool.submit(
                launched, *words, "--machine_rank", rank, say_world, ACCELERATE_USE_CPU="true"
            )
            for rank in "01"
        ]
    said = [end.result() for end in ends]
    assert [(code, out) for code, out, _ in said] == [(0, "ranks [0, 1] over gloo\n"), (0, "")], (
        said
    )


@pytest.mark.parametrize("how", ["flags", "config"])
def test_a_launch_that_starts_one_process_of_two_is_refused(
    say_world: str, tmp_path: Path, how: str
) -> None:
    config = tmp_path / "lost.yaml"
    config.write_text(
        (CONFIGS / "cpu_x2.yaml")
        .read_text(encoding="utf-8")
        .replace("_type: MULTI_GPU", "_type: MULTI_CPU")
    )
    words = ["--config_file", str(config)] if how == "config" else ["--cpu", "--num_processes", "2"]
    code, out, err = launched(*words, say_world)
    told = [line for line in err.splitlines() if line.startswith("bertdist:")]
    assert (code, out, len(told)) == (1, "", 1), err
    assert told[0].startswith(
        "bertdist: `accelerate launch` was asked for 2 processes, but this run has 1: give it --multi_gpu"
    )


# --- the SLURM scripts, with SLURM and accelerate played by a few lines of bash

PLAYED = {
    # srun runs one task; after a failure the script runs `true` to see whether all nodes answer
    "srun": 'while [[ $1 == --* ]]; do shift; done; [[ $1 == true ]] && exit ${PLAY_LOST:-0}; SLURM_PROCID=0 exec "$@"',
    "accelerate": """
        echo "$*" >>"$PLAY/accelerate"; echo "${OMP_NUM_THREADS} ${ACCELERATE_USE_CPU:-}" >>"$PLAY/accelerate.env"
        if [[ ${PLAY_WAITS:-} ]]; then touch "$PLAY/waits"; until [[ -e $PLAY/scancel ]]; do sleep 0.05; done; fi
        if [[ ${PLAY_STATE:-} ]]; then echo '{"state": "'$PLAY_STATE'", "step": '${PLAY_STEP:-10}'}' >"$PLAY/out/status.json"; fi
        exit ${PLAY_CODE:-0}""",
    "scancel": 'echo "$*" >>"$PLAY/scancel"',
    "scontrol": """
        case $1 in show) printf 'node7\\nnode8\\n' ;; requeue) echo "$2" >>"$PLAY/requeue" ;; esac""",
    "squeue": "date -d '+1 hour' +%FT%T",
    # reading the config costs seconds: one test does it for real
    "python": """
        if [[ $2 == *read_config* && ! ${PLAY_READ:-} ]]; then echo "$PLAY/out"; else exec "$REAL_PYTHON" "$@"; fi""",
}


class Play:
    """A folder of played commands, and what they wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[subprocess.Popen[str]] = []
        (folder / "out").mkdir()
        (folder / "bin").mkdir()
        for name, body in PLAYED.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{textwrap.dedent(body)}\n")
            (folder / "bin" / name).chmod(0o755)

    def job(self, script: str, *words: str, cwd: Path = ROOT, **more: str) -> subprocess.Popen[str]:
        job = {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "4",
        }
        env = environment(
            **{
                **job,
                "PLAY": str(self.folder),
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
            cwd=cwd,
            env=env,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.jobs.append(run)
        return run

    def said(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    played = Play(tmp_path)
    yield played
    for run in played.jobs:
        if run.poll() is None:  # only where a test has failed
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


WORLDS = [  # script, nodes, the job's environment -> config, processes, OMP_NUM_THREADS and ACCELERATE_USE_CPU
    ("train", 1, {}, "cpu", 1, "4 true"),
    ("train", 1, {"NPROC_PER_NODE": "2"}, "cpu_x2", 2, "2 true"),
    ("train", 1, {"SLURM_GPUS_ON_NODE": "1"}, "gpu", 1, "4"),
    ("train", 1, {"SLURM_GPUS_ON_NODE": "8"}, "multi_node", 8, "1"),
    ("multi_node", 2, {}, "cpu_x2", 2, "4 true"),
    ("multi_node", 4, {"SLURM_GPUS_ON_NODE": "2"}, "multi_node", 8, "2"),
]


@pytest.mark.parametrize(("script", "nodes", "job", "config", "processes", "threads"), WORLDS)
def test_a_job_launches_one_process_a_gpu(
    play: Play,
    script: str,
    nodes: int,
    job: dict[str, str],
    config: str,
    processes: int,
    threads: str,
) -> None:
    run = play.job(
        f"{script}.slurm",
        "--output_dir",
        "a b",
        PLAY_STATE="finished",
        **{"SLURM_JOB_NUM_NODES": str(nodes), **job},
    )
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, out
    words = f"launch --machine_rank 0 --config_file accelerate_configs/{config}.yaml --num_machines {nodes}"
    words += f" --num_processes {processes} --main_process_ip node7 --main_process_port 23456"
    assert play.said("accelerate") == f"{words} bertdist/train.py --output_dir a b\n"
    assert play.said("accelerate.env").strip() == threads


def test_every_attempt_has_a_port_of_its_own(play: Play) -> None:
    play.job("train.slurm", PLAY_STATE="finished", SLURM_RESTART_COUNT="2").communicate(
        timeout=SECONDS
    )
    assert "--main_process_port 23718 " in play.said("accelerate")


ENDS = [  # what status.json says, the launcher's exit code -> the job's exit code, whether it is queued again
    ("finished", 0, 0, False),
    ("finished", 1, 0, False),  # a signal that comes after the end changes nothing
    ("preempted", 1, 0, True),
    ("failed", 1, 1, False),
    ("running", 1, 1, False),  # killed
    ("", 1, 1, False),  # it did not begin
    ("", 0, 1, False),
]


@pytest.mark.parametrize(("state", "code", "ends", "requeued"), ENDS)
def test_a_job_is_queued_again_only_when_training_was_preempted(
    play: Play, state: str, code: int, ends: int, requeued: bool
) -> None:
    (play.folder / "out/status.json").write_text(
        '{"state": "preempted", "step": 5}'
    )  # of an earlier attempt: it must not count
    out, _ = (run := play.job("train.slurm", PLAY_STATE=state, PLAY_CODE=str(code))).communicate(
        timeout=SECONDS
    )
    assert (run.returncode, play.said("requeue")) == (ends, "123456\n" if requeued else ""), out


@pytest.mark.parametrize(
    ("number", "step", "requeued"),
    [(signal.SIGUSR1, 10, True), (signal.SIGUSR1, 5, False), (signal.SIGTERM, 10, False)],
    ids=str,
)
def test_a_signal_is_passed_on_and_the_job_waits(
    play: Play, number: signal.Signals, step: int, requeued: bool
) -> None:
    """USR1: the time limit is near, queue again if it came further. TERM: cancelled, never again."""
    (play.folder / "out/status.json").write_text('{"state": "preempted", "step": 5}')
    run = play.job(
        "train.slurm", PLAY_STATE="preempted", PLAY_STEP=str(step), PLAY_WAITS="yes", PLAY_CODE="1"
    )
    deadline = time.monotonic() + SECONDS
    while not (play.folder / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(number)
    out, _ = run.communicate(timeout=SECONDS)
    assert play.said("scancel").splitlines()[0] == "--signal=USR1 123456", out
    assert (run.returncode, play.said("requeue")) == (
        0 if requeued else 1,
        "123456\n" if requeued else "",
    ), out


@pytest.mark.parametrize(
    ("nodes", "lost", "requeued"), [(2, 1, True), (2, 0, False), (1, 1, False)]
)
def test_a_job_that_lost_a_node_is_queued_again(
    play: Play, nodes: int, lost: int, requeued: bool
) -> None:
    """The ranks that are left fail at once, long before SLURM knows."""
    job = {
        "SLURM_JOB_NUM_NODES": str(nodes),
        "PLAY_STATE": "failed",
        "PLAY_CODE": "1",
        "PLAY_LOST": str(lost),
    }
    out, _ = (run := play.job("multi_node.slurm", **job)).communicate(timeout=SECONDS)
    assert (run.returncode, play.said("requeue")) == (
        0 if requeued else 1,
        "123456\n" if requeued else "",
    ), out


def test_a_wrong_flag_ends_the_job_before_it_launches(play: Play) -> None:
    out, _ = (run := play.job("train.slurm", "--learning_rat", "1", PLAY_READ="yes")).communicate(
        timeout=SECONDS
    )
    assert (run.returncode, play.said("accelerate")) == (1, "")
    assert out == "bertdist: Unknown setting 'learning_rat'. Did you mean 'learning_rate'?\n"


def test_a_job_in_another_folder_uses_the_installed_package(play: Play, tmp_path: Path) -> None:
    """PYTHONPATH stands for an installation here; tests/runs/test_wheel.py has a real one."""
    job = {"SLURM_JOB_NUM_NODES": "2", "PLAY_STATE": "finished"}
    run = play.job("multi_node.slurm", cwd=tmp_path, **job)
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, out
    arguments = play.said("accelerate")
    assert f"--config_file {ROOT}/bertdist/accelerate_configs/cpu_x2.yaml" in arguments
    assert arguments.endswith("-m bertdist.train\n")


def test_a_job_without_bertdist_ends_before_it_launches(play: Play, tmp_path: Path) -> None:
    (play.folder / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    run = play.job("train.slurm", cwd=tmp_path)
    out, _ = run.communicate(timeout=SECONDS)
    assert (run.returncode, play.said("accelerate")) == (1, "")
    assert f"bertdist is not installed, and {tmp_path} is not its repository." in out


# --- the smoke run


def test_smoke_run_takes_five_steps(tiny_model: Path, tmp_path: Path) -> None:
    rows = [f"a {word} film\t{label}" for word, label in (("good", 1), ("bad", 0)) * 20]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    words = f"--model_name_or_path {tiny_model} --train_file {tmp_path}/train.tsv --output_dir {tmp_path}/out --train_batch_size 4"
    command = [SCRIPTS[2], *shlex.split(words)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"train"' in line]) == 5
    assert '"finished"' in (tmp_path / "out/status.json").read_text()
