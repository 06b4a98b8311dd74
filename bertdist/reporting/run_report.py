"""report.html of one run: what its folder holds, as numbers, sentences and charts.

    save(Path("out/report.html"), report_of(read_run("out")))

The rows that were evaluated: rows_view.py.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bertdist.core.args import TRAIN_SECTIONS
from bertdist.core.errors import listed
from bertdist.reporting import charts
from bertdist.reporting.charts import Line
from bertdist.reporting.page import number, render
from bertdist.reporting.rows_view import NO_SHARES, view_of
from bertdist.reporting.run_folder import RunFolder

FINDINGS = 40  # of check.json
NOTHING_EVALUATED = (
    "No rows were evaluated: the run had neither validation nor test rows. bertdist evaluate "
    "--output_dir scores writes a report of any labelled rows."
)


def report_of(run: RunFolder, explanations: Mapping[str, Mapping[int, Any]] | None = None) -> str:
    """The page, as HTML. explanations: split -> row -> what `explain.explain` found of it."""
    of = explanations or {}
    splits = [view_of(name, rows, run, of.get(name, {})) for name, rows in run.scored.items()]
    settings = None if run.is_evaluation else _changed_settings(run.config)
    training = _training(run)
    sections = [section for split in splits for section in split.sections]
    sections += [("training", "Training")] * (training is not None)
    sections += [("data", "Data")] * bool(run.check)
    sections += [("settings", "Settings")] * (settings is not None)
    return render(
        "report.html",
        title=f"Report of {run.folder.resolve().name or run.folder}",
        subtitle=_subtitle(run),
        sections=sections,
        notes=[] if splits else [NOTHING_EVALUATED],
        splits=splits,
        training=training,
        check=_check(run.check) if run.check else None,
        settings=settings,
        command=_command(run),
        environment=_environment(run.environment),
    )


def _subtitle(run: RunFolder) -> str:
    rows = next(iter(run.scored.values()), None)
    if rows is None:
        return f"trained from {run.config.get('model_name_or_path', '')}"
    task = rows.problem_type.replace("_label_", "-label ")
    labels = "" if rows.is_regression else f", {len(rows.labels):,} labels"
    of = rows.report.get("evaluated")
    model = of["model"] if isinstance(of, dict) else run.config.get("model_name_or_path", "")
    step = f", best weights of step {rows.report['step']:,}" if "step" in rows.report else ""
    what = "evaluation of" if run.is_evaluation else "trained from"
    return f"{task}{labels}; {what} {model}{step}"


# ---- The run


def _training(run: RunFolder) -> dict[str, Any] | None:
    train = [line for line in run.metrics if line.get("kind") == "train"]
    evals = [line for line in run.metrics if line.get("kind") == "eval"]
    if not train and not evals:
        return None
    steps = max((int(line["step"]) for line in [*train, *evals]), default=0)
    epochs = max((float(line.get("epoch") or 0) for line in [*train, *evals]), default=0.0)
    lines = [_line("training", train, "loss")]
    lines += [_line("validation", evals, "loss", marker=True)] if evals else []
    pictures = [
        charts.line_chart(
            "loss-curve",
            "Loss",
            "Mean loss of the training steps between two log lines"
            + (", and of the validation rows." if evals else "."),
            [line for line in lines if line.x],
            "step",
            "loss",
        )
    ]
    if curves := _score_lines(evals):
        about = "Scores on the validation rows after the steps at which they were evaluated."
        pictures.append(charts.line_chart("score-curve", "Scores", about, curves, "step", "score"))
    if rates := _line("learning rate", train, "learning_rate").x:
        rate = _line("learning rate", train, "learning_rate")
        about = "The learning rate of the head, after warmup and decay."
        if rates:
            pictures.append(
                charts.line_chart("rate-curve", "Learning rate", about, [rate], "step", "rate")
            )
    return {
        "summary": f"{steps:,} steps, {epochs:.3g} epochs.",
        "charts": pictures,
        "times": _times(run),
    }


def _line(name: str, lines: Sequence[Mapping[str, Any]], key: str, marker: bool = False) -> Line:
    """Without values that are not numbers."""
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    return Line(name, [x for x, _ in found], [y for _, y in found], marker)


def _score_lines(evals: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The scores from 0 to 1 of the evaluations, at most as many as there are colours."""
    names = [
        name
        for name, value in (evals[-1] if evals else {}).items()
        if isinstance(value, float) and name not in ("epoch", *NO_SHARES)
    ]
    lines = [_line(name, evals, name, marker=True) for name in names]
    return [line for line in lines if all(-1 <= y <= 1 for y in line.y)][: len(charts.SERIES)]


_TIMES = {
    "tokens_per_second": ("tokens per second", "real tokens, all devices together"),
    "train_steps": ("steps", "of the process that finished the run"),
    "train_seconds": ("seconds of training", "without evaluations and checkpoints"),
    "data_wait_seconds": ("seconds of waiting for data", "of the rank that waited longest"),
    "evaluation_seconds": ("seconds of evaluation", "up to the end of training"),
    "saving_seconds": ("seconds of saving", "checkpoints and best weights"),
    "padding_factor": ("tokens per real token", "with padding; 1: nothing is padded"),
    "model_tflops": ("TFLOP/s", "useful operations of the model"),
    "flop_utilization": ("utilization", "share of the fastest matrix products seen"),
    "tokens_per_micro_batch": ("tokens per micro-batch", "the most"),
}


def _times(run: RunFolder) -> list[list[str]]:
    meters = [line for line in run.metrics if line.get("kind") == "meter"]
    last = meters[-1] if meters else {}
    return [
        [name, number(round(last[key]) if float(last[key]) > 1000 else last[key]), meaning]
        for key, (name, meaning) in _TIMES.items()
        if isinstance(last.get(key), int | float)
    ]


def _check(report: Mapping[str, Any]) -> dict[str, Any]:
    findings = [x for x in report.get("findings", ()) if isinstance(x, dict)]
    shown = findings[:FINDINGS]
    counts = report.get("counts") or {}
    found = ", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items())
    summary = f"check.json, written by bertdist check: {found or 'no findings'}."
    if len(findings) > len(shown):
        summary += f" The first {len(shown)} are shown."
    names = ("severity", "split", "title", "count", "advice")
    return {"summary": summary, "findings": [{x: f.get(x) for x in names} for f in shown]}


def _changed_settings(config: Mapping[str, Any]) -> list[list[str]]:
    defaults = {
        field.name: field.default
        for section in TRAIN_SECTIONS
        for field in dataclasses.fields(section)
    }
    return [
        [f"--{name}", _value(value), _value(defaults.get(name))]
        for name, value in config.items()
        if value != defaults.get(name)
    ]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return listed(list(map(str, value)), 20)
    return "" if value is None else str(value)


def _command(run: RunFolder) -> str:
    words = run.environment.get("command")
    return shlex.join(map(str, words)) if isinstance(words, list) else ""


def _environment(facts: Mapping[str, Any]) -> list[list[str]]:
    lines = [
        [name, str(value)]
        for name, value in facts.items()
        if name not in ("packages", "command") and value is not None
    ]
    packages = facts.get("packages")
    if isinstance(packages, dict):
        lines += [[name, str(version)] for name, version in packages.items() if version]
    return lines
