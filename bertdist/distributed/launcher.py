"""Checks on what started this process (accelerate launch, torchrun): was it asked for something
that bertdist does otherwise? How a process starts and ends: launch.py.

    check_launcher(mixed_precision)    before there is an Accelerator: settings of accelerate
    check_world(world_size)            once the ranks are known: whether any were lost

Settings of accelerate reach a process as ACCELERATE_ variables, which `accelerate launch` sets from
its flags and from the config file (`accelerate config` writes a default one). What it drops on the
way, such as --gradient_accumulation_steps without DeepSpeed, is read from its command line.
bertdist accepts one process, MULTI_CPU and MULTI_GPU.
"""

import io
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from typing import Any, NamedTuple

import psutil
from accelerate.utils import DistributedType

from bertdist.core.errors import ConfigError

ACCEPTED_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_MULTI_GPU = "use distributed_type MULTI_GPU, or NO for one process"
_DDP = f"bertdist keeps the whole model on every device (DDP): {_MULTI_GPU}"
_DEVICES = f"bertdist runs on CPUs and on CUDA or ROCm GPUs: {_MULTI_GPU}"
_ACCUMULATION = (
    "leave it at 1: --train_batch_size is the whole step, and --tokens_per_micro_batch splits it"
)
_CLIPPING = "remove it: --max_grad_norm clips the gradient"
_COMPILE = "remove it (dynamo_backend 'no'): train.py compiles the layers with --torch_compile"

_FALSE = "false|no|off|f|n|0"
# Variable -> the values that ask for nothing else (a regular expression), and the answer to others.
VARIABLES = {
    "ACCELERATE_USE_FSDP": (_FALSE, _DDP),
    "ACCELERATE_USE_DEEPSPEED": (_FALSE, _DDP),
    "ACCELERATE_USE_MEGATRON_LM": (_FALSE, _DDP),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_FALSE, _DDP),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": ("no", _DDP),
    "ACCELERATE_TORCH_DEVICE": (r"cpu|cuda(:\d+)?", _DEVICES),
    "ACCELERATE_DYNAMO_BACKEND": ("no", _COMPILE),
    "ACCELERATE_MIXED_PRECISION": ("no|bf16|fp16", "use no, bf16 or fp16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", _ACCUMULATION),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", _CLIPPING),
}


class AccelerateLaunch(NamedTuple):
    """The `accelerate launch` above this process."""

    flags: Namespace
    config: Any  # its ClusterConfig, or None
    file: str  # of the config, or ""


def check_launcher(
    mixed_precision: str | None = None, environ: Mapping[str, str] = os.environ
) -> None:
    """Raise ConfigError, one line per setting of accelerate that bertdist does not follow.

    mixed_precision: of a flag, which wins over accelerate's.
    """
    launch = accelerate_launch()
    source = f"set by {launch.file or '`accelerate launch`'}" if launch else "set"
    problems = {}  # one line per answer: a config file sets variables too
    for name, (harmless, answer) in VARIABLES.items():
        value = environ.get(name, "").strip()
        ours = name == "ACCELERATE_MIXED_PRECISION" and mixed_precision is not None
        if value and not ours and not re.fullmatch(harmless, value, re.IGNORECASE):
            problems[answer] = f"{name} is {value!r}" + (f", {source}" if launch else "")
    for setting, answer in _without_effect(launch) if launch else ():
        problems.setdefault(answer, f"{setting} is {source}")
    if problems:
        raise ConfigError("\n".join(f"{found}; {what}." for what, found in problems.items()))


def check_accelerate_flags(flags: Namespace) -> None:
    """Raise ConfigError for settings of `accelerate launch` that it does not pass on.

    flags: of accelerate's parser, with a config_file.
    """
    launch = AccelerateLaunch(flags, _load_config(flags.config_file), flags.config_file)
    if problems := [f"{setting}: {answer}." for setting, answer in _without_effect(launch)]:
        raise ConfigError("\n".join(f"{launch.file}: {problem}" for problem in problems))


def _load_config(file: str) -> Any:
    from accelerate.commands.config import config_args

    try:
        return config_args.load_config_from_file(file)
    except Exception as error:  # of yaml and of accelerate
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: accelerate cannot read it: {reason}.") from None


def _without_effect(launch: AccelerateLaunch) -> Iterator[tuple[str, str]]:
    """Settings that accelerate does not pass on, and the answers."""
    flags, config, _ = launch
    if (flags.gradient_accumulation_steps or 1) != 1:
        yield f"--gradient_accumulation_steps {flags.gradient_accumulation_steps}", _ACCUMULATION
    if flags.gradient_clipping is not None:
        yield f"--gradient_clipping {flags.gradient_clipping}", _CLIPPING
    if flags.use_megatron_lm:
        yield "--use_megatron_lm", _DDP
    by_flag = flags.cpu or flags.multi_gpu or flags.use_fsdp or flags.use_deepspeed
    if config is None or by_flag:
        return
    if config.distributed_type not in ACCEPTED_TYPES:
        sharding = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
        kind = config.distributed_type.value
        yield f"distributed_type {kind}", _DDP if kind in sharding else _DEVICES
    if config.parallelism_config:
        yield "parallelism_config", _DDP


def check_world(world_size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if this run has fewer ranks than its launch promised.

    Launches lose ranks silently: each task of a plain `srun python train.py` trains alone, all in
    one folder, and `accelerate launch --cpu --num_processes 2` starts one process (accelerate
    1.15). Both end with exit code 0.
    """
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    mpi = "start it with `accelerate launch` instead of mpirun"
    fixes = {
        tasks: "start one `accelerate launch` per node, as launch/multi_node.slurm does, or "
        "request one task: --ntasks 1 --cpus-per-task N",
        "OMPI_COMM_WORLD_SIZE": mpi,
        "PMI_SIZE": mpi,
        "MV2_COMM_WORLD_SIZE": mpi,
        "HOROVOD_SIZE": "start it with `accelerate launch` instead of horovodrun",
        "WORLD_SIZE": "start it with `accelerate launch --multi_gpu`, or unset RANK and WORLD_SIZE "
        "for a run of one process",
    }
    for name, fix in fixes.items():
        promised = environ.get(name, "")
        if promised.isdecimal() and world_size < int(promised):
            have = _processes(world_size)
            raise ConfigError(f"{name} is {promised}, but this run has {have}: {fix}.")
    requested = _requested_processes()
    if world_size < requested:
        raise ConfigError(
            f"`accelerate launch` was to start {_processes(requested)}, but this run has "
            f"{world_size}: give it --multi_gpu, and on CPUs `ACCELERATE_USE_CPU=true accelerate "
            f"launch --multi_gpu --num_processes {requested} ...` (not --cpu, which starts one), "
            "or --config_file accelerate_configs/cpu_x2.yaml."
        )


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def _requested_processes() -> int:
    """Processes that the `accelerate launch` above was to start; 0 if it does not say."""
    launch = accelerate_launch()
    if launch is None:
        return 0
    return int(launch.flags.num_processes or getattr(launch.config, "num_processes", 0))


def accelerate_launch() -> AccelerateLaunch | None:
    """The `accelerate launch` that is the parent of this process.

    None without one, and where anything fails: this must never end a run.
    """
    # accelerate launch, accelerate-launch, python -m accelerate.commands.launch
    launch = (
        r"(?:accelerate(?:_cli)?(?:\.py)?\0|accelerate-|accelerate[./]commands[./])"
        r"launch(?:\.py)?\0(.*)"
    )
    try:
        parent = psutil.Process().parent()
        match = re.search(launch, "\0".join(parent.cmdline()), re.DOTALL)
        if not match:
            return None
        from accelerate.commands.config import config_args
        from accelerate.commands.launch import launch_command_parser

        with redirect_stderr(io.StringIO()):  # argparse prints its usage where we are wrong
            flags = launch_command_parser().parse_args(match[1].split("\0"))
        file = config_args.default_config_file
        if flags.config_file:
            file = os.path.join(parent.cwd(), flags.config_file)
        elif flags.cpu or not os.path.isfile(file):  # with --cpu accelerate does not read it
            return AccelerateLaunch(flags, None, "")
        return AccelerateLaunch(flags, config_args.load_config_from_file(file), file)
    except (Exception, SystemExit):  # argparse exits
        return None
