"""The command `bertdist`, also `python -m bertdist`.

    bertdist train --model_name_or_path google-bert/bert-base-uncased --train_file train.tsv ...
    bertdist train --processes 2 ...     # one process per GPU, or two on a CPU
    bertdist evaluate --model out --input test.tsv
    bertdist predict --model out --text "A film to remember."
    bertdist sweep --config run.yaml --try learning_rate=1e-5..5e-4:log --output_dir sweep
    bertdist slurm submit --nodes 2 train --config run.yaml --output_dir out
    bertdist info                        # versions, devices, folders of configs and scripts

Flags are read before torch is imported: --help and mistakes are answered at once. The scripts
(`accelerate launch -m bertdist.train`, `torchrun -m bertdist.train`) run the same functions.
"""

import importlib.metadata
import logging
import os
import platform
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import bertdist
from bertdist.core.args import (
    IS_EMPTY,
    TRAIN_SECTIONS,
    parse_or_exit,
    read_config,
    read_evaluate_config,
    read_predict_config,
)
from bertdist.core.config import DataConfig, EvaluateConfig, PredictConfig
from bertdist.core.cores import usable_cores
from bertdist.core.errors import ConfigError, did_you_mean
from bertdist.core.flags import FlagParser, create_parser, help_request
from bertdist.core.terminal import (
    EXIT_BROKEN_PIPE,
    close_broken_stdout,
    escape_unencodable,
    exit_with_error,
    print_to_stderr,
    process_rank,
    show,
)
from bertdist.data.preflight import check_evaluate, check_predict
from bertdist.data_quality.config import CheckConfig, read_check_arguments
from bertdist.data_quality.config import check_start as check_start_of_check
from bertdist.distributed.slurm_config import DoctorConfig, StatusConfig, SubmitConfig
from bertdist.models.export_config import ExportConfig, check_export, read_export_config
from bertdist.reporting.config import ReportConfig, check_report, read_report_config
from bertdist.reporting.push_config import PushConfig, check_push, read_push_config
from bertdist.slurm import ACTIONS, check_slurm, read_slurm_config
from bertdist.sweep import SweepConfig, read_sweep_config
from bertdist.sweep import check_start as check_start_of_sweep
from bertdist.training.resume_check import check_start


class Command(NamedTuple):
    """A command: what --help says of it, and what reads its flags and checks what they name."""

    about: str
    sections: list[Any]  # config dataclasses, for the completion of shells
    read: Callable[[Sequence[str]], Any]
    check: Callable[[Any], None]


COMMANDS = {
    "train": Command(
        "Fine-tune a classifier, or resume a run.", TRAIN_SECTIONS, read_config, check_start
    ),
    "predict": Command(
        "Labels and probabilities of texts.", [PredictConfig], read_predict_config, check_predict
    ),
    "evaluate": Command(
        "Scores of a trained model on labelled rows.",
        [EvaluateConfig],
        read_evaluate_config,
        check_evaluate,
    ),
    "check": Command(
        "Leaks, duplicates, wrong labels: before training.",
        [CheckConfig, DataConfig],
        read_check_arguments,
        check_start_of_check,
    ),
    "report": Command(
        "The page of a run, or a comparison of several.",
        [ReportConfig],
        read_report_config,
        check_report,
    ),
    "export": Command(
        "A trained model for ONNX Runtime, or of half the size.",
        [ExportConfig],
        read_export_config,
        check_export,
    ),
    "sweep": Command(
        "Try settings of training, keep the best.",
        [SweepConfig, *TRAIN_SECTIONS],
        read_sweep_config,
        check_start_of_sweep,
    ),
    "push": Command(
        "Upload a trained model to the Hugging Face Hub.",
        [PushConfig],
        read_push_config,
        check_push,
    ),
    "slurm": Command(
        "Submit jobs to SLURM, see how they do, check a cluster.",
        [SubmitConfig, StatusConfig, DoctorConfig],
        read_slurm_config,
        check_slurm,
    ),
}
OTHER_COMMANDS = {
    "info": "Versions, devices, folders of configs and scripts.",
    "completion": "Completion of flags: for bash, zsh or fish.",
}
MODULES = {"evaluate": "eval"}  # evaluate.py would hide the library of that name
RESOURCES = ("accelerate_configs", "launch")
SHELLS = ("bash", "zsh", "fish")

_OVERVIEW_END = (
    "bertdist COMMAND --help lists the flags of a command.",
    "Exit codes: 0 done; 1 an error, of check also errors in the data; 75 stopped,",
    "the same command resumes.",
)

_LAUNCH_HELP = """
Several processes:
  --processes N        One per GPU, or N on the CPU
  --config_file FILE   Settings of `accelerate launch`"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, or 1 after an error, 75 after a stop (`run_cli`)."""
    escape_unencodable()
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name in COMMANDS:
            _run_command(name, rest)
        elif name in ("-h", "--help", "help"):
            print(_overview())
        elif name in ("-V", "--version"):
            print(f"bertdist {bertdist.__version__}")
        elif name in OTHER_COMMANDS and help_request(rest):
            print(_other_help(name))
        elif name == "info":
            _show_info(rest)
        elif name == "completion":
            print(completion(rest[0] if rest else ""))
        else:
            names = [*COMMANDS, *OTHER_COMMANDS]
            raise ConfigError(
                f"There is no command {name!r}.{did_you_mean(name, names)} "
                f"`bertdist --help` lists them."
            )
        sys.stdout.flush()
    except ConfigError as error:
        exit_with_error(error)
    except BrokenPipeError:  # bertdist train --help all | head
        if not close_broken_stdout():
            raise
        sys.exit(EXIT_BROKEN_PIPE)
    sys.exit(0)


def _overview() -> str:
    about = {**{name: command.about for name, command in COMMANDS.items()}, **OTHER_COMMANDS}
    lines = [f"bertdist {bertdist.__version__}: fine-tune, evaluate and use text classifiers", ""]
    lines += [f"  bertdist {name:11} {text}" for name, text in about.items()]
    return "\n".join([*lines, "", *_OVERVIEW_END])


def _other_help(name: str) -> str:
    """--help of `info` and `completion`, which have no flags."""
    words = f"[{'|'.join(RESOURCES)}]" if name == "info" else "|".join(SHELLS)
    only = ["With the name of a folder, only its path."] * (name == "info")
    return "\n".join([OTHER_COMMANDS[name], *only, "", f"  bertdist {name} {words}"])


def _run_command(name: str, arguments: Sequence[str]) -> NoReturn:
    if name == "sweep":  # no torch; its trials are launched
        from bertdist.sweep import run_and_exit

        run_and_exit(parse_or_exit(read_sweep_config, check_start_of_sweep, arguments))
    if name == "push":  # neither
        from bertdist.push import run as push

        push(parse_or_exit(read_push_config, check_push, arguments))
    if name == "slurm":  # nor here, but for doctor's all-reduce
        from bertdist.slurm import run_and_exit as run_slurm

        run_slurm(parse_or_exit(read_slurm_config, check_slurm, arguments))
    processes, config_file, arguments = _launch_flags(arguments)
    try:
        config = parse_or_exit(COMMANDS[name].read, COMMANDS[name].check, arguments)
    except SystemExit as end:
        if not end.code and help_request(arguments) in ("usual", "all"):
            print(_LAUNCH_HELP)
        raise
    if sys.stderr.isatty() and process_rank() == 0:
        print_to_stderr(f"bertdist {bertdist.__version__}: loading PyTorch ...")
    if processes > 1 or config_file:
        sys.exit(launch_processes(name, arguments, processes, config_file, _on_cpu(config)))
    from bertdist.distributed.launch import run_cli

    run: Callable[[Any], int]
    if name == "train":
        from bertdist.train import run
    elif name == "predict":
        from bertdist.predict import run
    elif name == "evaluate":
        from bertdist.eval import run
    elif name == "report":
        from bertdist.report import run
    elif name == "export":
        from bertdist.export import run
    else:
        from bertdist.check import run
    run_cli(run, config)


# ---- Several processes


def _launch_flags(arguments: Sequence[str]) -> tuple[int, str, list[str]]:
    """(--processes, --config_file, the other arguments). Raises ConfigError."""
    parser = FlagParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    found, rest = parser.parse_known_args(list(arguments))
    if found.processes is not None and found.processes < 1:
        raise ConfigError(f"--processes is {found.processes}; expected at least 1.")
    if found.config_file == "":
        raise ConfigError(f"--config_file {IS_EMPTY}")
    if found.config_file and not os.path.isfile(found.config_file):
        raise ConfigError(f"--config_file {found.config_file}: there is no such file.")
    return found.processes or 0, found.config_file or "", rest


def _on_cpu(config: Any) -> bool:
    sections = config if isinstance(config, tuple) else (config,)
    sections += (getattr(config, "run", None),)
    return any(getattr(section, "use_cpu", False) for section in sections)


def launch_processes(
    name: str, arguments: Sequence[str], processes: int, config_file: str, on_cpu: bool
) -> int:
    """`accelerate launch` of a command; returns the exit code.

    processes: 0 for that of config_file. config_file: "" for bertdist's own, of GPUs if there are
    any. Raises ConfigError.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from bertdist.distributed.launcher import check_accelerate_flags

    options = ["--num_processes", str(processes)] if processes else []
    if not config_file:
        gpus = 0 if on_cpu else torch.cuda.device_count()
        if 0 < gpus < processes:
            raise ConfigError(
                f"--processes is {processes}, and there are {gpus} GPUs: one process per GPU "
                "(with --use_cpu there may be any number)."
            )
        file = "gpu_x8.yaml" if gpus else "cpu_x2.yaml"
        options += ["--mixed_precision", "no"]  # unless --mixed_precision says otherwise
        config_file = str(bertdist.resource_folder("accelerate_configs") / file)
        if not gpus and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, usable_cores() // processes)
            options += ["--num_cpu_threads_per_process", str(threads)]
    options += [
        "--config_file",
        config_file,
        "-m",
        f"bertdist.{MODULES.get(name, name)}",
        *arguments,
    ]
    flags = launch_command_parser().parse_args(options)
    check_accelerate_flags(flags)
    # Every rank prints its own error: torch's report of the exit codes adds nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(flags)
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except (ValueError, OSError) as error:
        raise ConfigError(f"accelerate launch: {str(error).splitlines()[0]}") from None
    return 0


# ---- Other commands


def _show_info(arguments: Sequence[str]) -> None:
    """Versions, devices and folders; with the name of a folder, only its path."""
    if arguments:
        if len(arguments) > 1 or arguments[0] not in RESOURCES:
            raise ConfigError(f"bertdist info takes {' or '.join(RESOURCES)}, or nothing.")
        print(bertdist.resource_folder(arguments[0]))
        return
    show(f"bertdist {bertdist.__version__}, Python {platform.python_version()}")
    packages = ("torch", "transformers", "accelerate", "datasets", "evaluate")
    show(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    for name in RESOURCES:
        show(f"{name + ':':20}{bertdist.resource_folder(name)}")
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, device in enumerate(devices):
        show(f"{f'GPU {i}:':20}{device.name}, {device.total_memory / 2**30:.0f} GiB")
    cores, threads = usable_cores(), torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    show(f"{'CPU:':20}{cores} cores, torch uses {threads} threads, {capability}")
    if not devices:
        show("No GPU is visible to torch: runs are on the CPU.")


def completion(shell: str) -> str:
    """The script that completes commands and flags in a shell. Raises ConfigError."""
    if shell not in SHELLS:
        raise ConfigError(f"bertdist completion takes a shell: {', '.join(SHELLS)}.")
    try:
        import shtab
    except ImportError:
        raise ConfigError(
            "completion needs shtab: pip install shtab, or 'bertdist[completion]'."
        ) from None
    return str(shtab.complete(_completion_parser(), shell))


def _completion_parser() -> ArgumentParser:
    parser = ArgumentParser("bertdist")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        flags = create_parser(command.sections)
        added = commands.add_parser(
            name, help=command.about, parents=[flags], add_help=False, conflict_handler="resolve"
        )
        if name == "slurm":
            added.add_argument("action", choices=ACTIONS)
    for name, about in OTHER_COMMANDS.items():
        choices = RESOURCES if name == "info" else SHELLS
        commands.add_parser(name, help=about).add_argument(name, choices=choices)
    return parser


if __name__ == "__main__":
    main()
