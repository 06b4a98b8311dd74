"""Write the page of a run, or a comparison of several runs.

    bertdist report out
    bertdist report out --explain 10 --output page.html
    bertdist report out out2            # comparison.html, and its tables on the terminal

A run writes its own page when it has finished (--report no turns it off); this command writes it
again, with explanations of mistakes, or for a run of which it is missing.
"""

import os
import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder
        # above.
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from bertdist.core.args import parse_or_exit
    from bertdist.reporting.config import check_report, read_report_config

    # Before torch is imported, which takes seconds
    parsed_config = parse_or_exit(read_report_config, check_report)

from pathlib import Path
from typing import Any

from bertdist.core.atomic_io import to_json
from bertdist.core.output_files import REPORT_FILE, write_output
from bertdist.core.terminal import show
from bertdist.distributed.launch import run_cli
from bertdist.reporting.config import COMPARISON_FILE, ReportConfig
from bertdist.reporting.page import save
from bertdist.reporting.run_folder import RunFolder, read_run
from bertdist.reporting.run_report import report_of


def write_report(config: ReportConfig) -> Path:
    """Write the page; returns its file. Raises BertdistError."""
    folders = [Path(folder) for folder in config.runs or ()]
    if len(folders) > 1:
        return write_comparison(folders, config)
    (folder,) = folders
    run, explanations = read_run(folder), None
    if config.explain:
        explanations = explain(run, config)
    path = Path(config.output) if config.output else folder / REPORT_FILE
    save(path, report_of(run, explanations))
    return path


def write_comparison(folders: list[Path], config: ReportConfig) -> Path:
    """Show the comparison of several runs, and write its page and --json; returns the page's file.

    Raises BertdistError.
    """
    from bertdist.reporting.comparison import compare_runs
    from bertdist.reporting.comparison_page import page_of
    from bertdist.reporting.comparison_table import show_comparison

    comparison, path = (
        compare_runs(list(map(read_run, folders))),
        Path(config.output or COMPARISON_FILE),
    )
    save(path, page_of(comparison))
    if config.json:
        write_output(config.json, to_json(comparison.summary()))
    show_comparison(comparison)
    return path


def explain(run: RunFolder, config: ReportConfig) -> dict[str, dict[int, Any]]:
    """Split -> row -> the words of its surest mistakes."""
    from bertdist.core.config import RunConfig
    from bertdist.distributed.launch import create_accelerator
    from bertdist.predict import Predictor
    from bertdist.reporting.explain import explain_mistakes

    first = next(iter(run.scored.values()))
    model = first.report["evaluated"]["model"] if run.is_evaluation else str(run.folder / "best")
    settings = RunConfig(
        use_cpu=config.use_cpu, mixed_precision=run.config.get("mixed_precision") or None
    )
    predictor = Predictor(model, accelerator=create_accelerator(settings))
    return {
        name: explain_mistakes(rows, config.explain, predictor.probabilities)
        for name, rows in run.scored.items()
    }


def run(config: ReportConfig) -> int:
    """Write the page and say where; returns the exit code."""
    show(f"Report: {write_report(config)}")
    return 0


if __name__ == "__main__":
    run_cli(run, parsed_config)
