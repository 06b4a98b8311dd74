"""How a process of a run starts and ends. Checks on the launcher above it: launcher.py.

    run_cli(command, config)       a script's main(): settings of the process, errors, exit codes
    launch(config)                 the three below, in this order
      create_accelerator(run)        rendezvous; device, precision and ranks
        choose_precision(run, ...)     what --mixed_precision auto means, and what a run began with
      check_world(world_size)        an error if the launch promised more ranks (launcher.py)
      launch_fingerprint(config)     what must be the same on all ranks
    wait_for_all_ranks(timeout)    the rendezvous

The rendezvous uses the store of torch's process group, before the group is formed. An error names
the ranks that do not start, or a port that is in use, within --rank_timeout; torch itself names
only the number of ranks, or a host and a port. Each process keeps the list of all ranks: if a
connection breaks while no watchdog runs (in the first seconds of a run, in prediction), the dead
rank is named from it.
"""

import ctypes
import faulthandler
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, LoggerType
from torch._C._distributed_c10d import TCPStore
from transformers.utils import logging as transformers_logging

from bertdist.core.atomic_io import read_json_object
from bertdist.core.config import RunConfig, TrainConfig, saved_setting
from bertdist.core.errors import BertdistError, ConfigError, RankLost, did_you_mean
from bertdist.core.terminal import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    close_broken_stdout,
    escape_unencodable,
    exit_with_error,
    print_error,
    print_to_stderr,
    process_rank,
)
from bertdist.distributed.collectives import assert_same_on_all_ranks, gather_from_all_ranks
from bertdist.distributed.preemption import ignore_stop_signals
from bertdist.distributed.watchdog import (
    STDERR,
    Heartbeat,
    connection_error,
    is_alive,
    loader_worker_error,
    own_heartbeat,
    this_host,
)

# For a process that broke a connection to be seen as dead, and for others to see who prints it.
DEAD_RANK_WAIT_SECONDS = 2.0

# how long rank 0 keeps the store of a rendezvous that failed, for the others to read it
KEEP_STORE_SECONDS = 5.0
ABSENT = "null"  # instead of a rank's Heartbeat as JSON
# For a process that has lost another rank to exit: gloo's threads may prevent it.
EXIT_SECONDS = 30

PACKAGES = [
    *("bertdist", "torch", "transformers", "accelerate"),
    *("datasets", "evaluate", "numpy", "safetensors"),
]

C = TypeVar("C")
Precision: TypeAlias = Literal["no", "bf16", "fp16"]

_rendezvous_ranks: list[Heartbeat] = []  # all ranks of the last rendezvous, by rank


# ---- The process


def run_cli(command: Callable[[C], int], config: C) -> NoReturn:
    """Run a script: call `command` with its config, then exit with its code.

    0: finished. 75: stopped by a signal or a time limit; the same command resumes. 130: a second
    Ctrl-C. 141: who reads standard output has ended (`| head`). 1: a BertdistError, printed
    as `bertdist: <message>`, or any other exception.
    """
    configure_process()
    try:
        code = command(config)
        sys.stdout.flush()
    except BrokenPipeError:
        if not close_broken_stdout():
            raise
        code = EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        if process_rank() == 0:
            text = (
                "Interrupted; the same command resumes from the last checkpoint, if there is one."
            )
            print_error(BertdistError(text))
        os._exit(EXIT_INTERRUPTED)  # without clean-up, which could wait for another rank
    except (BertdistError, RuntimeError) as caught:
        # A launcher's SIGTERM, sent because another rank has ended, comes after the message.
        ignore_stop_signals()
        error = caught if isinstance(caught, BertdistError) else loader_worker_error(caught)
        if error is None:
            if not report_lost_connection(caught):  # where no watchdog runs
                raise
            os._exit(1)
        if isinstance(error, RankLost):
            faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=STDERR)
        exit_with_error(error)
    ignore_stop_signals()  # a late signal does not change the exit code
    sys.exit(code)


def configure_process() -> None:
    """Settings of the whole process, for scripts; programs that import bertdist have their own."""
    from bertdist.core.hub import enable_offline_fallback

    keep_freed_memory()
    enable_offline_fallback()
    escape_unencodable()
    # Loader workers are forked: a tokenizer's thread pool that began in the parent does not work in
    # them, and tokenizers prints a long warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()  # load_classifier says it in fewer words
    transformers_logging.disable_progress_bar()


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep what a step frees for the next step.

    By default it returns large blocks to the system and gets them again, zeroed page by page:
    12,000 page faults in a step of MiniLM-L6 on a CPU, 6% of its time.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def report_lost_connection(error: BaseException) -> bool:
    """Print, from one rank, that a connection broke and which rank of this machine is dead.

    Where no watchdog runs. False, and nothing printed, for other errors.
    """
    lost = connection_error(error)
    if lost is None:
        return False
    dead, should_print = find_dead_ranks(DEAD_RANK_WAIT_SECONDS)
    if dead:
        names = ", ".join(x.name for x in dead[:8])
        lost = RankLost(
            f"{names} is gone (killed? out of memory? else its own message says why). "
            "Start the same command again."
        )
    if should_print:
        print_error(lost)
    time.sleep(DEAD_RANK_WAIT_SECONDS)
    return True


def find_dead_ranks(seconds: float) -> tuple[list[Heartbeat], bool]:
    """Ranks of this machine that end within `seconds`; and whether to print it here.

    The lowest rank that is alive prints it.
    """
    here = [x for x in _rendezvous_ranks if x.host == this_host()]
    deadline = time.monotonic() + seconds
    while True:
        dead = [x for x in here if not is_alive(x.pid, x.process_start)]
        if dead or time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    first_alive = next((x.pid for x in here if x not in dead), os.getpid())
    return dead, not dead or first_alive == os.getpid()


@contextmanager
def reset_torch_modes() -> Iterator[None]:
    """No autocast, no inference mode, gradients enabled, float32 and the CPU as defaults.

    What a run computes follows from its config alone: a program that calls train() or a Predictor
    within a mode of its own gets the same bits as outside, and its modes back.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


# ---- The launch


def create_accelerator(run: RunConfig, notes: list[str] | None = None) -> Accelerator:
    """Device, precision and ranks from `accelerate launch`; the CPU if no GPU, or with --use_cpu.

    notes: gets a sentence about the precision, where there is one to say; without it rank 0 prints
    it. Raises ConfigError for what cannot take effect, and where ranks do not start.
    """
    from bertdist.distributed.launcher import ACCEPTED_TYPES, check_launcher

    check_launcher(run.mixed_precision)
    on_cpu = run.use_cpu or not torch.cuda.is_available()
    other = torch.accelerator.current_accelerator(check_available=True)  # also mps, xpu, ...
    if other is not None and on_cpu and not run.use_cpu and process_rank() == 0:
        print_to_stderr(f"bertdist: device {other.type} is not supported; using the CPU.")
    installed_trackers(run.report_to or [])
    timeout = timedelta(seconds=run.rank_timeout)
    store, precision = wait_for_all_ranks(timeout), ""
    group = InitProcessGroupKwargs(timeout=timeout)
    try:
        ranks = PartialState(cpu=on_cpu, **group.to_kwargs())  # of this Accelerator, too
        precision, note = choose_precision(run, ranks.device, ranks)
        if notes is not None:
            notes += [note] * bool(note)
        elif note and process_rank() == 0:
            print_to_stderr(f"bertdist: {note}")
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), group],
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        flag = f" (--mixed_precision {precision})" if precision and run.mixed_precision else ""
        raise ConfigError(f"accelerate: {reason}{flag}") from None
    del store  # rank 0 keeps it until the group exists
    if accelerator.distributed_type not in ACCEPTED_TYPES:
        raise ConfigError(
            f"accelerate chose {accelerator.distributed_type.value}; bertdist runs on CPUs and on "
            "CUDA or ROCm GPUs. Use an environment without torch_xla and the like."
        )
    # accelerate 1.15 would compute in float32.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError(
            "--mixed_precision fp16 needs a GPU, and this run is on the CPU; use bf16 or no."
        )
    return accelerator


def choose_precision(
    run: RunConfig, device: torch.device, ranks: PartialState | None = None
) -> tuple[Precision, str]:
    """What a run computes in, and a sentence to say about it, or "".

    --mixed_precision wins over accelerate's setting. What a run began with is kept by auto, and
    bf16 by bf16, also where it is emulated. In a new run auto chooses bf16 where it is faster on
    every rank, and bf16 on CPUs needs instructions for it. A collective of `ranks`; None: one.
    """
    asked = (run.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no").lower()
    is_first, on_cpu = ranks is None or ranks.is_main_process, device.type == "cpu"
    faster = cpu_has_amx() if on_cpu else gpu_has_bf16()
    emulates = on_cpu and not cpu_has_bf16()
    of_rank = [(faster, emulates, first_precision(run) if is_first else None)]
    of_all = of_rank if ranks is None else gather_from_all_ranks(ranks, of_rank)
    faster, emulates = all(each[0] for each in of_all), any(each[1] for each in of_all)
    began, is_run = of_all[0][2], bool(run.output_dir)
    units = "AMX" if on_cpu else "units for bf16"
    have = lack = f"this {'CPU' if on_cpu else 'GPU'} has"
    if len(of_all) > 1:
        have, lack = "all ranks have", "a rank has"
    if asked not in ("auto", "bf16") or (asked == "bf16" and not emulates):
        advice = f"float32; {have} {units}, and --mixed_precision bf16 is faster there."
        is_default = is_run and run.mixed_precision is None and asked == "no" and not began
        return cast(Precision, asked), advice if is_default and faster and on_cpu else ""
    chosen: Precision
    if began and asked in ("auto", began):
        chosen, note = cast(Precision, began), "as this run began"
        if is_initialized():  # accelerate has one precision per process
            note = "as the Accelerator of this process has it"
        if began == "bf16" and emulates:
            note += f"; {lack} neither AMX nor AVX512_BF16 and emulates it, slowly"
    elif asked == "bf16":
        chosen, note = "no", f"{lack} neither AMX nor AVX512_BF16, and emulating it is slower"
    else:
        chosen, note = ("bf16", f"{have} {units}") if faster else ("no", f"{lack} no {units}")
        note += "; kept when the run resumes" * is_run
    shown = "using float32" if chosen == "no" else f"using {chosen}"
    return chosen, f"--mixed_precision {asked}: {shown}: {note}."


def first_precision(run: RunConfig) -> str | None:
    """The precision that a run began with: of --resume_from_checkpoint or the newest checkpoint of
    --output_dir, else of config.yaml there; of its first fold or seed; of a run of this process
    that is not over (a fold is one of several). None for a new run.
    """
    if is_initialized():
        return str(AcceleratorState().mixed_precision)
    if not run.output_dir:
        return None
    folder = Path(run.output_dir)
    checkpoints = sorted(folder.glob("checkpoints/step_*"), key=lambda path: (len(path.name), path))
    named = [Path(run.resume_from_checkpoint)] if run.resume_from_checkpoint else []
    for path in [*named, *reversed(checkpoints)]:
        settings = read_json_object(path / "state.json").get("must_match")
        if isinstance(settings, dict) and (found := settings.get("mixed_precision")):
            return str(found)
    files = [folder / "config.yaml"]
    files += [
        x for runs in ("folds", "seeds") for x in sorted(folder.glob(f"{runs}/*/config.yaml"))
    ]
    return next(filter(None, (saved_setting(file, "mixed_precision") for file in files)), None)


def gpu_has_bf16() -> bool:
    """Whether this GPU has units for products in bf16."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16."""
    return torch.cpu._is_avx512_bf16_supported() or cpu_has_amx()


def cpu_has_amx() -> bool:
    """Whether this CPU has matrix units for bf16, with which it is faster than float32.

    With AVX512_BF16 alone a step took 1.2 to 1.5 times as long as in float32 (decision 0021).
    """
    return torch.cpu._is_amx_tile_supported()


def installed_trackers(names: list[str]) -> list[str]:
    """The trackers of --report_to; `all` is every installed one, `none` is none.

    Raises ConfigError.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if names == ["none"]:
        return []
    if names == ["all"] and installed:
        return installed
    for name in names:
        if name in installed:
            continue
        if name in ("all", "none"):
            reason = "no tracker is installed." if names == [name] else "give it alone."
        elif name in LoggerType.list():
            # Beside pyarrow 26 pip takes an MLflow of 2022, which protobuf 7 breaks.
            others = {"tensorboard": "'bertdist[tensorboard]'", "mlflow": "'mlflow>=3'"}
            package = others.get(name, name)
            reason = f"not an installed tracker; pip install {package}."
        else:
            reason = f"not a tracker of accelerate.{did_you_mean(name, LoggerType.list())}"
        raise ConfigError(f"--report_to {name}: {reason}")
    return names


def launch(config: TrainConfig) -> tuple[Accelerator, TrainConfig, list[str]]:
    """The accelerator, the config with the precision that the run has, and what to say about it;
    the same on all ranks.
    """
    from bertdist.distributed.launcher import check_world

    notes: list[str] = []
    accelerator = create_accelerator(config.run, notes)
    check_world(accelerator.num_processes)
    if config.run.ddp_comm_hook != "no" and accelerator.num_processes == 1:
        notes.append(
            f"--ddp_comm_hook {config.run.ddp_comm_hook} has no effect: one process exchanges no "
            "gradients."
        )
    run = replace(config.run, mixed_precision=accelerator.mixed_precision)
    config = replace(config, run=run)
    assert_same_on_all_ranks(accelerator, launch_fingerprint(config))
    return accelerator, config, notes


def launch_fingerprint(config: TrainConfig) -> dict[str, object]:
    """What must be the same on all ranks before they do anything else: settings and versions."""
    sections = asdict(config).values()
    settings = {f"--{name}": value for section in sections for name, value in section.items()}
    versions = {name: package_version(name) for name in PACKAGES}
    return {**settings, "Python": platform.python_version(), **versions}


@cache
def package_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- Rendezvous


def wait_for_all_ranks(timeout: timedelta) -> TCPStore | None:
    """Register this rank, and wait until all have; keep the store until the process group exists.

    None for one rank, or if there is a process group. Raises ConfigError, which names the missing.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    host = os.environ.get("MASTER_ADDR", "")
    if not host or not all(text.isdecimal() for text in numbers) or dist.is_initialized():
        return None
    rank, num_ranks, port = map(int, numbers)
    if num_ranks == 1:
        return None
    if port == 0:
        raise ConfigError(
            "MASTER_PORT is 0, which no rank can reach: `torchrun --standalone` and `accelerate "
            "launch --main_process_port 0` find a free port, `torchrun --master_port 29501` sets "
            "one."
        )
    seconds, address = timeout.total_seconds(), f"{host}:{port}"
    within = f"{address} within {seconds:g} s (--rank_timeout)"
    # torchrun's agent may keep the store, instead of rank 0.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = rank == 0 and not by_agent
    if not is_server and not _is_open(host, port, seconds):
        who = "torchrun's agent is not" if by_agent else "rank 0 has not arrived"
        raise _printed_by_one(
            f"rank {rank} of {num_ranks} (on {socket.gethostname()}): {who} at {within}. Its own "
            "message, or the launcher's, says more.",
            rank == (0 if by_agent else 1),
        )
    store = _open_store(host, port, is_server, timeout)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"bertdist/{restart}/{other}" for other in range(num_ranks)]
    try:
        store.compare_set(keys[rank], "", json.dumps(asdict(own_heartbeat(rank))))
        try:
            store.wait(keys, timeout)
        except (dist.DistError, RuntimeError):  # the first whose time is out decides for all
            for key in keys:
                store.compare_set(key, "", ABSENT)
        found = [json.loads(text) for text in store.multi_get(keys)]
        ranks = [Heartbeat(**fields) if fields else None for fields in found]
        if None in ranks:
            store.set(f"{keys[rank]}/read", "")
            if is_server:  # the others need the store, to read the same
                read = [f"{key}/read" for key, x in zip(keys, ranks, strict=True) if x is not None]
                with suppress(dist.DistError, RuntimeError):
                    store.wait(read, timedelta(seconds=KEEP_STORE_SECONDS))
    except (dist.DistError, RuntimeError):
        # Rank 0, which keeps the store, was killed.
        raise _printed_by_one(
            f"rank {rank} of {num_ranks}: rank 0 exited before the rendezvous completed at "
            f"{address}; its own message says more.",
            rank == 1,
        ) from None
    if None in ranks:
        raise _missing_ranks(ranks, within, rank)
    _rendezvous_ranks[:] = [x for x in ranks if x is not None]
    return store


def _is_open(host: str, port: int, seconds: float) -> bool:
    """Whether anything listens there within `seconds`.

    torch tries too, for twice as long and with a page of C++ frames.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            seconds_left = max(0.1, deadline - time.monotonic())
            socket.create_connection((host, port), timeout=seconds_left).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def _open_store(host: str, port: int, is_server: bool, timeout: timedelta) -> TCPStore:
    """The store, or a ConfigError within the timeout.

    torch waits for ever for a program that accepts the connection and says nothing.
    """

    def connect() -> TCPStore:
        return TCPStore(
            host, port, None, is_server, timeout, wait_for_workers=False, multi_tenant=True
        )

    from bertdist.core.time_limit import call_within

    try:
        return call_within(timeout.total_seconds(), connect)
    except TimeoutError:
        problem = "what listens there does not answer"
    except (dist.DistError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    raise ConfigError(
        f"Rendezvous failed at {host}:{port}: {problem}. The port may be in use, perhaps by "
        "another run: give another (--main_process_port to `accelerate launch`, --master_port to "
        "torchrun, or MASTER_PORT)."
    )


def _missing_ranks(ranks: Sequence[Heartbeat | None], within: str, rank: int) -> ConfigError:
    """Names the ranks that have not registered; printed by the lowest rank that has."""
    missing = [number for number, other in enumerate(ranks) if other is None]
    present = [other for other in ranks if other is not None]
    numbers = ", ".join(map(str, missing[:20]))
    numbers += f", ... ({len(missing)} in all)" if len(missing) > 20 else ""
    here = ", ".join(f"rank {x.rank} (on {x.host.split(' ')[0]})" for x in present[:20])
    return _printed_by_one(
        f"Rank {numbers} of {len(ranks)} did not arrive at {within}. Present: {here}.",
        bool(present) and rank == present[0].rank,
    )


def _printed_by_one(message: str, should_print: bool) -> ConfigError:
    error = ConfigError(message)
    error.on_all_ranks, error.already_printed = False, not should_print
    return error
