"""Start and end of a process: the command line's frame, the Accelerator, checks of the launch.

run_cli(command)             a script's main(): settings of the process, errors, exit codes
create_accelerator(run)      device, precision and ranks
check_world(world_size)      an error if the launch promised more ranks
launch_fingerprint(config)   what must be the same on all ranks
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers.utils import logging as transformers_logging

from bertdist.core.config import RunConfig, TrainConfig
from bertdist.core.errors import BertdistError, ConfigError, did_you_mean
from bertdist.core.hub import enable_offline_fallback
from bertdist.core.terminal import print_error, process_rank
from bertdist.distributed.collectives import assert_same_on_all_ranks
from bertdist.distributed.preemption import _asked_of_accelerate, _processes, ignore_stop_signals
from bertdist.distributed.rendezvous import wait_for_all_ranks
from bertdist.distributed.watchdog import end_soon, loader_worker_error, report_lost_connection

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped before the end; the same command resumes
EXIT_INTERRUPTED = 130  # a second Ctrl-C, as a shell has it for SIGINT


def run_cli(command: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a script: call `command` with the command-line arguments, then exit with its code.

    0: finished. 75: stopped by a signal or a time limit; the same command resumes. 130: a second
    Ctrl-C. 1: a BertdistError, printed as `bertdist: <message>`, or any other exception.
    """
    configure_process()
    try:
        code = command(sys.argv[1:])
    except KeyboardInterrupt:
        if process_rank() == 0:
            print_error(
                BertdistError(
                    "Interrupted; the same command resumes from the last checkpoint, if there is one."
                )
            )
        os._exit(EXIT_INTERRUPTED)  # without clean-up, which could wait for another rank
    except (BertdistError, RuntimeError) as caught:
        # A launcher's SIGTERM, sent because another rank has ended, comes after the message.
        ignore_stop_signals()
        error = caught if isinstance(caught, BertdistError) else loader_worker_error(caught)
        if error is None:
            if not report_lost_connection(caught):  # where no watchdog runs
                raise
            os._exit(1)
        if not error.already_printed and (process_rank() == 0 or not error.on_all_ranks):
            print_error(error)
        end_soon(error)
        sys.exit(1)
    ignore_stop_signals()  # a late signal does not change the exit code
    sys.exit(code)


def configure_process() -> None:
    """Settings of the whole process. Scripts call this; a program that imports bertdist does not."""
    keep_freed_memory()
    enable_offline_fallback()
    # Loader workers are forked: a tokenizer's thread pool that began in the parent does not work in
    # them, and tokenizers prints a long warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()  # load_classifier says it in fewer words
    transformers_logging.disable_progress_bar()


def check_world(world_size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if this run has fewer ranks than its launch promised.

    Launches lose ranks without a word: each task of a plain `srun python train.py` trains alone, all in one folder, and
    `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15). Both end with exit code 0.
    """
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    cures = {
        tasks: "start one `accelerate launch` a node, as launch/multi_node.slurm does, or ask for one task: --ntasks 1 --cpus-per-task N",
        "OMPI_COMM_WORLD_SIZE": "start it with `accelerate launch` instead of mpirun",
        "PMI_SIZE": "start it with `accelerate launch` instead of mpirun",
        "WORLD_SIZE": "start it with `accelerate launch --multi_gpu`, or unset RANK and WORLD_SIZE for a run of one process",
    }
    for name, cure in cures.items():
        promised = environ.get(name, "")
        if promised.isdecimal() and world_size < int(promised):
            raise ConfigError(
                f"{name} is {promised}, but this run has {_processes(world_size)}: {cure}."
            )
    asked = _asked_of_accelerate()
    if asked is not None and world_size < asked:
        raise ConfigError(
            f"`accelerate launch` was asked for {_processes(asked)}, but this run has {world_size}: give it --multi_gpu, and on CPUs"
            f" `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} ...` (not --cpu, which starts one),"
            " or take --config_file accelerate_configs/cpu_x2.yaml."
        )


def create_accelerator(run: RunConfig) -> Accelerator:
    """Device, precision and ranks are what `accelerate launch` said; without a GPU, or with --use_cpu, the CPU."""
    trackers = run.report_to or []
    known = [str(tracker) for tracker in get_available_trackers()]
    for name in trackers:
        if name not in known:
            raise ConfigError(
                f"--report_to {name}: not a tracker that is installed here.{did_you_mean(name, known)}"
            )
    limit = timedelta(seconds=run.rank_timeout)
    meeting = wait_for_all_ranks(limit)
    try:
        accelerator = Accelerator(
            cpu=run.use_cpu or not torch.accelerator.is_available(),
            mixed_precision=run.mixed_precision,
            log_with=trackers or None,
            project_dir=run.output_dir or None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=limit),
            ],
        )
    except ValueError as error:
        raise ConfigError(
            f"{str(error).splitlines()[0]} (--mixed_precision {run.mixed_precision})"
        ) from None
    del meeting
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"accelerate was told gradient_accumulation_steps {accelerator.gradient_accumulation_steps}; leave it at 1: "
            "--train_batch_size is the whole step, and --tokens_per_micro_batch cuts it."
        )
    if (
        accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    ):  # accelerate 1.15 would compute in float32
        raise ConfigError(
            "--mixed_precision fp16 needs a GPU, and this run is on the CPU; take bf16 or no."
        )
    if trackers:
        accelerator.init_trackers("bertdist")
    return accelerator


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step, where it can (glibc).

    By default it hands large blocks back to the system and takes them again, page by page zeroed: 12,000 page faults in a step of
    MiniLM-L6 on a CPU, 6% of its time.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


PACKAGES = (
    "bertdist",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "safetensors",
)


def launch(config: TrainConfig) -> tuple[Accelerator, TrainConfig]:
    """The accelerator, and the config with the precision that the launcher chose; the same on all ranks, or an error."""
    accelerator = create_accelerator(config.run)
    check_world(accelerator.num_processes)
    run = replace(config.run, mixed_precision=accelerator.mixed_precision)
    config = replace(config, run=run)
    assert_same_on_all_ranks(accelerator, launch_fingerprint(config))
    return accelerator, config


def launch_fingerprint(config: TrainConfig) -> dict[str, object]:
    """What must be the same on all ranks before they do anything together: settings and versions."""
    settings = {
        f"--{name}": value for section in asdict(config).values() for name, value in section.items()
    }
    return {
        **settings,
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
