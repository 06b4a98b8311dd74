"""What a launcher was asked to do: settings of accelerate that bertdist does not follow, and lost ranks."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from accelerate.utils import DistributedType
from accelerate.utils import launch as accelerate_launch

from bertdist.core.errors import ConfigError
from bertdist.distributed import launcher
from bertdist.distributed.launcher import VARIABLES, check_launcher, check_world

# ---- check_world

LOST = [
    (
        {"SLURM_NTASKS": "2"},
        1,
        "SLURM_NTASKS is 2, but this run has 1 process: start one `accelerate launch` per node",
    ),
    (
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
        2,
        "SLURM_STEP_NUM_TASKS is 4, but this run has 2 processes",
    ),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "OMPI_COMM_WORLD_SIZE is 2, but this run has 1 process"),
    ({"PMI_SIZE": "3"}, 1, "PMI_SIZE is 3"),
    ({"MV2_COMM_WORLD_SIZE": "2"}, 1, "MV2_COMM_WORLD_SIZE is 2"),
    ({"HOROVOD_SIZE": "2"}, 1, "HOROVOD_SIZE is 2"),
    ({"WORLD_SIZE": "2"}, 1, "WORLD_SIZE is 2"),
]
KEPT: list[tuple[dict[str, str], int]] = [
    ({}, 1),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, 1),
    (
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"},
        1,
    ),  # srun --ntasks 1 in a job of two tasks
    ({"SLURM_NTASKS": "2"}, 2),
    (
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"},
        16,
    ),  # one launcher a node, eight ranks each
    ({"SLURM_NTASKS": "", "PMI_SIZE": "many", "OMPI_COMM_WORLD_SIZE": "-1"}, 1),
]


@pytest.mark.parametrize(("environ", "world_size", "message"), LOST)
def test_lost_ranks_are_an_error(environ: dict[str, str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(world_size, environ)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("environ", "world_size"), KEPT)
def test_a_whole_world_is_no_error(environ: dict[str, str], world_size: int) -> None:
    check_world(world_size, environ)


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ConfigError, match="SLURM_NTASKS is 2"):
        check_world(1)


def below(monkeypatch: pytest.MonkeyPatch, command: str, folder: Path = Path("/")) -> None:
    """Make `command`, run in `folder`, the parent of this process."""
    parent = SimpleNamespace(cmdline=command.split, cwd=lambda: str(folder))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """two.yaml asks for two processes, and so does the user's default config; sub/three.yaml asks for three."""
    (tmp_path / "sub").mkdir()
    for path, count in ((tmp_path / "two.yaml", 2), (tmp_path / "sub/three.yaml", 3)):
        path.write_text(
            f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: {count}\nuse_cpu: true\n"
        )
    monkeypatch.setattr(
        "accelerate.commands.config.config_args.default_config_file", str(tmp_path / "two.yaml")
    )
    return tmp_path


PYTHON = "/usr/bin/python3 /env/bin/"
ASKED = [
    (PYTHON + "accelerate launch --cpu --num_processes 2 train.py", 2),
    (PYTHON + "accelerate launch --cpu --num_processes=2 train.py --num_processes 9", 2),
    (PYTHON + "accelerate-launch --cpu --num_processes 2 -m bertdist.train", 2),
    ("python -m accelerate.commands.launch --num_processes 2 train.py", 2),
    ("python /env/accelerate/commands/launch.py --num_processes 2 train.py", 2),
    ("python /env/accelerate/commands/accelerate_cli.py launch --num_processes 2 train.py", 2),
    (PYTHON + "accelerate launch --config_file sub/three.yaml train.py", 3),
    (PYTHON + "accelerate launch --config_file sub/three.yaml --num_processes 1 train.py", 1),
    (PYTHON + "accelerate launch train.py", 2),  # the default config
    (PYTHON + "accelerate launch --cpu train.py", 0),  # with --cpu accelerate does not read it
    (PYTHON + "accelerate launch --config_file missing.yaml train.py", 0),
    (PYTHON + "accelerate launch --no_such_flag train.py", 0),
    (PYTHON + "accelerate launch", 0),
    (PYTHON + "accelerate env --num_processes 2", 0),
    (PYTHON + "pytest launch --num_processes 2 train.py", 0),
    ("bash", 0),
    ("", 0),
]


@pytest.mark.parametrize(("command", "count"), ASKED)
def test_what_accelerate_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    configs: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    count: int,
) -> None:
    below(monkeypatch, command, configs)
    assert launcher._requested_processes() == count
    if count > 1:
        check_world(count, {})
        with pytest.raises(
            ConfigError,
            match=rf"^`accelerate launch` was to start {count} processes, but this run has 1: .*--multi_gpu",
        ):
            check_world(1, {})
    else:
        check_world(1, {})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [psutil.AccessDenied(), psutil.NoSuchProcess(1), PermissionError(), FileNotFoundError("/proc")],
)
def test_a_look_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(psutil, "Process", refuse)
    check_world(1, {})


def test_a_process_without_a_parent_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: None))
    check_world(1, {})


# ---- check_launcher

ALONE = SimpleNamespace(parent=lambda: None)
DDP = (
    "; bertdist keeps the whole model on every device (DDP): use distributed_type MULTI_GPU, or NO "
    "for one process."
)
DEVICES = (
    "; bertdist runs on CPUs and on CUDA or ROCm GPUs: use distributed_type MULTI_GPU, or NO for "
    "one process."
)
REFUSED = [  # variable, value, beginning of the answer
    ("ACCELERATE_USE_FSDP", "true", "bertdist keeps the whole model on every device (DDP)"),
    ("ACCELERATE_USE_FSDP", "1", "bertdist keeps"),
    ("ACCELERATE_USE_DEEPSPEED", "TRUE", "bertdist keeps"),
    ("ACCELERATE_USE_MEGATRON_LM", "true", "bertdist keeps"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "bertdist keeps"),
    ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "DATA_PARALLEL", "bertdist keeps"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "remove it (dynamo_backend 'no'): train.py compiles"),
    ("ACCELERATE_DYNAMO_BACKEND", "eager", "remove it"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", "use no, bf16 or fp16"),
    ("ACCELERATE_MIXED_PRECISION", "tf32", "use no, bf16 or fp16"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "leave it at 1: --train_batch_size"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "four", "leave it at 1: --train_batch_size"),
    ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "remove it: --max_grad_norm"),
    ("ACCELERATE_TORCH_DEVICE", "mps", "bertdist runs on CPUs and on CUDA"),
    ("ACCELERATE_TORCH_DEVICE", "meta", "bertdist runs on CPUs and on CUDA"),
]
HARMLESS = [
    {},
    {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "0", "ACCELERATE_USE_CPU": "true"},
    {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"},
    {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"},
    {"ACCELERATE_MIXED_PRECISION": "BF16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
    {"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO"},
    {"ACCELERATE_TORCH_DEVICE": "cuda:1"},
    {"ACCELERATE_USE_FSDP": ""},
]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "Process", lambda: ALONE)


@pytest.mark.parametrize(("name", "value", "answer"), REFUSED)
def test_a_setting_that_is_not_followed_is_one_line(
    name: str, value: str, answer: str, alone: None
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launcher(environ={name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}; {answer}")
    assert "\n" not in str(caught.value) and caught.value.on_all_ranks


@pytest.mark.parametrize("environ", HARMLESS)
def test_a_setting_that_changes_nothing_is_accepted(environ: dict[str, str], alone: None) -> None:
    check_launcher(environ=environ)


def test_a_flag_wins_over_the_precision_of_accelerate(alone: None) -> None:
    check_launcher("bf16", {"ACCELERATE_MIXED_PRECISION": "fp8"})
    with pytest.raises(ConfigError):
        check_launcher(None, {"ACCELERATE_MIXED_PRECISION": "fp8"})


def test_each_setting_is_a_line(alone: None) -> None:
    with pytest.raises(ConfigError) as caught:
        check_launcher(
            environ={"ACCELERATE_USE_FSDP": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
        )
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_DYNAMO_BACKEND",
    ]


# What `accelerate launch` sets besides, and why that needs no answer.
OTHERS = (
    "ACCELERATE_USE_CPU ACCELERATE_DEBUG_MODE ACCELERATE_CPU_AFFINITY OMP_NUM_THREADS "  # followed
    "MASTER_ADDR MASTER_PORT KMP_AFFINITY KMP_BLOCKTIME CUDA_VISIBLE_DEVICES "
    "NCCL_P2P_DISABLE NCCL_IB_DISABLE PYTHONPATH "
    # Without effect unless a variable of the table is set.
    "ACCELERATE_DYNAMO_MODE ACCELERATE_DYNAMO_USE_FULLGRAPH ACCELERATE_DYNAMO_USE_DYNAMIC "
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION ACCELERATE_CONFIG_DS_FIELDS "
    "FSDP_VERSION ACCELERATE_USE_SAGEMAKER "
    # For devices that bertdist does not use.
    "ZE_AFFINITY_MASK MLU_VISIBLE_DEVICES SDAA_VISIBLE_DEVICES MUSA_VISIBLE_DEVICES "
    "ASCEND_RT_VISIBLE_DEVICES HABANA_VISIBLE_MODULES NEURON_RT_VISIBLE_CORES "
    "XLA_USE_BF16 XLA_DOWNCAST_BF16 "
).split()
OTHER_PREFIXES = ("FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "ACCELERATE_DEEPSPEED_")


def unanswered(source: str) -> set[str]:
    """The variables that this source sets and nobody here has thought of."""
    names = re.findall(r"""current_env\[["']([A-Z0-9_]+)["']\]""", source)
    names += re.findall(r"""^\s+["']((?:ACCELERATE|FSDP)_[A-Z0-9_]+)["']:""", source, re.M)
    return {
        name
        for name in names
        if name not in VARIABLES and name not in OTHERS and not name.startswith(OTHER_PREFIXES)
    }


def test_every_variable_that_accelerate_launch_sets_has_been_thought_of() -> None:
    source = inspect.getsource(accelerate_launch)
    assert "ACCELERATE_USE_FSDP" in source and unanswered(source) == set()
    more = source + '\n    current_env["ACCELERATE_USE_MORE"] = "true"\n'
    assert unanswered(more) == {"ACCELERATE_USE_MORE"}


CONFIG = "compute_environment: LOCAL_MACHINE\nnum_processes: 1\nuse_cpu: true\n"


@pytest.mark.parametrize("kind", list(DistributedType), ids=str)
@pytest.mark.parametrize("words", ["--config_file users.yaml", ""], ids=["file", "default"])
def test_a_config_file_of_another_kind_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: DistributedType, words: str
) -> None:
    file = tmp_path / "users.yaml"
    file.write_text(f"{CONFIG}distributed_type: '{kind.value}'\n")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    below(monkeypatch, PYTHON + f"accelerate launch {words} train.py", tmp_path)
    if kind in launcher.ACCEPTED_TYPES:
        check_launcher(environ={})
        return
    with pytest.raises(ConfigError) as caught:
        check_launcher(environ={})
    answer = DDP if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") else DEVICES
    assert str(caught.value) == f"distributed_type {kind.value} is set by {file}{answer}"
    # Where accelerate sets a variable too, that is one line, with the file.
    if kind == DistributedType.FSDP:
        with pytest.raises(ConfigError) as caught:
            check_launcher(environ={"ACCELERATE_USE_FSDP": "true"})
        assert str(caught.value) == f"ACCELERATE_USE_FSDP is 'true', set by {file}{DDP}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--gradient_accumulation_steps 4", "--gradient_accumulation_steps 4 is set by `accel"),
        ("--gradient_accumulation_steps=4", "--gradient_accumulation_steps 4 is set by `accel"),
        ("--gradient_clipping 1.0", "--gradient_clipping 1.0 is set by `accelerate launch`; remo"),
        ("--use_megatron_lm --cpu", "--use_megatron_lm is set by `accelerate launch`; bertdist ke"),
        ("--gradient_accumulation_steps 1", ""),
        ("--multi_gpu --num_processes 2 --mixed_precision bf16 --dynamo_backend no", ""),
    ],
)
def test_flags_that_accelerate_drops_are_named(
    monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    below(monkeypatch, PYTHON + f"accelerate launch {words} train.py")
    monkeypatch.setattr("os.path.isfile", lambda _: False)  # no default config
    if not line:
        check_launcher(environ={})
        return
    with pytest.raises(ConfigError) as caught:
        check_launcher(environ={})
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["--cpu", "--multi_gpu --num_processes 2"])
def test_a_flag_wins_over_the_kind_in_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str
) -> None:
    (tmp_path / "users.yaml").write_text(f"{CONFIG}distributed_type: MULTI_XPU\n")
    command = PYTHON + f"accelerate launch --config_file users.yaml {words} train.py"
    below(monkeypatch, command, tmp_path)
    check_launcher(environ={})
    below(monkeypatch, command.replace(words, ""), tmp_path)
    with pytest.raises(ConfigError):
        check_launcher(environ={})


def test_parallelism_of_a_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "users.yaml").write_text(
        f"{CONFIG}distributed_type: 'NO'\nparallelism_config:\n  parallelism_config_cp_size: 2\n"
    )
    below(monkeypatch, PYTHON + "accelerate launch --config_file users.yaml train.py", tmp_path)
    with pytest.raises(ConfigError, match=r"^parallelism_config is set by .*users\.yaml; bertdist"):
        check_launcher(environ={})
