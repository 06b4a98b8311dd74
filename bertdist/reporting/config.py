"""Settings of `bertdist report`: words, flags and YAML -> a checked dataclass, without torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bertdist.core.args import parse_arguments, with_first_words
from bertdist.core.config import Section, setting
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import REPORT_FILE, check_outputs, is_own_report, is_run_folder

PROGRAM = "bertdist report"
ABOUT = """Write the page of a run, or a comparison of several: scores with intervals, curves,
confusions, calibration, mistakes. It is one file that a browser opens.

  bertdist report out
  bertdist report out --explain 10
  bertdist report out out2 --output comparison.html"""
COMPARISON_FILE = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """What to write a page of."""

    _argument_group_name = "report"

    runs: list[str] | None = setting(
        None,
        "Folders of finished runs, or of evaluations (bertdist evaluate --output_dir). They may "
        "also stand first, without the name of the flag.",
        brief="Folders of runs, or of evaluations",
    )
    output: str | None = setting(
        None,
        "File to write. Default: report.html in the folder of a single run, and comparison.html "
        "here for several.",
        brief="File to write, default report.html in the run",
    )
    json: str | None = setting(
        None,
        "With several runs: file to write the comparison into as JSON too.",
        brief="Several runs: the comparison as JSON too",
    )
    explain: int = setting(
        0,
        "Number of the surest mistakes to explain: how much the probability of the answer falls "
        "when a word is left out. It loads the model.",
        brief="Explain the N surest mistakes word by word",
    )
    use_cpu: bool = setting(False, "With --explain: use the CPU even if there is a GPU.")


def read_report_config(arguments: Sequence[str]) -> ReportConfig:
    """`out out2 --explain 10` -> the settings. Raises ConfigError."""
    words = with_first_words(arguments, "runs")
    (config,) = parse_arguments(PROGRAM, [ReportConfig], words, ABOUT)
    assert isinstance(config, ReportConfig)
    problems = []
    if not config.runs:
        problems.append("No run is given: bertdist report out.")
    if config.explain < 0:
        problems.append(f"--explain is {config.explain}; expected a number of rows, 0 or more.")
    if config.json is not None and len(config.runs or ()) < 2:
        problems.append("--json is for the comparison of several runs.")
    if config.explain and len(config.runs or ()) > 1:
        problems.append("--explain is for the report of one run.")
    if config.use_cpu and not config.explain:
        problems.append("--use_cpu needs --explain, which loads the model.")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def check_report(config: ReportConfig) -> None:
    """Raise ConfigError for folders that are none, before torch is imported, and for an --output or
    a --json that cannot be written.
    """
    page = config.output or (COMPARISON_FILE if len(config.runs or ()) > 1 else None)
    outputs = {} if config.json is None else {"--json": config.json}
    if page is not None:
        if not is_own_report(Path(page)):
            raise ConfigError(f"{page} was not written by bertdist: rename it, or give --output.")
        if config.json is not None and os.path.realpath(page) == os.path.realpath(config.json):
            raise ConfigError(f"--json {config.json} is the page as well: name another file.")
        if not os.path.lexists(page) and Path(page).name != REPORT_FILE:
            outputs["--output"] = page
    check_outputs(outputs, [("--runs", run) for run in config.runs or ()])
    for folder in config.runs or ():
        path = Path(os.path.expanduser(folder))
        if not path.is_dir():
            raise ConfigError(f"{folder} is not the folder of a run: there is no such folder.")
        if not is_run_folder(path) and not (path / "evaluation.json").is_file():
            from bertdist.reporting.run_folder import describe_folder

            raise ConfigError(f"{folder} is {describe_folder(path)}.")
