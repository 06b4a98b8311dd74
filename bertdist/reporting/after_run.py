"""What is written for people after a run, or an evaluation, has finished.

It is never a reason for a run to fail: what cannot be written is said in one line.
"""

from collections.abc import Callable
from pathlib import Path

from bertdist.core.config import TrainConfig
from bertdist.core.errors import BertdistError
from bertdist.core.terminal import print_to_stderr, process_rank


def finish_run(config: TrainConfig) -> None:
    """What follows a finished run, on rank 0: --report, the model card, --push_to_hub."""
    folder = Path(config.run.output_dir)
    if config.run.report:
        write_report(folder)

    def write() -> str:
        from bertdist.reporting.model_card import write_model_card

        return write_model_card(folder / "best")

    attempt("The model card was not written", write)
    if config.run.push_to_hub and process_rank() == 0:
        from bertdist.reporting.upload import push_run

        push_run(config, print_to_stderr)


def write_report(folder: Path) -> None:
    """report.html of a finished run, or an evaluation, on rank 0; after its process group's end."""

    def write() -> str:
        from bertdist.core.output_files import REPORT_FILE
        from bertdist.reporting.page import save
        from bertdist.reporting.run_folder import read_run
        from bertdist.reporting.run_report import report_of

        path = folder / REPORT_FILE
        save(path, report_of(read_run(folder)))
        return f"Report: {path}"

    attempt("The report was not written", write)


def attempt(problem: str, write: Callable[[], str]) -> None:
    """On rank 0, call `write` and show the line that it returns; or `problem` and why it failed.

    The result of hours of training is there already: nothing that goes wrong here may end it.
    """
    if process_rank() != 0:
        return
    try:
        line = write()
    except BertdistError as error:
        line = f"{problem}: {error}"
    except Exception as error:
        line = f"{problem}: {type(error).__name__}: {error}"
    print_to_stderr(line)
