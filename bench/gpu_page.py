"""The report of `bench.gpu` as a page: `render(report)`, at any time, with what there is."""

from collections.abc import Sequence
from typing import Any

from bench.figures import format_number

Report = dict[str, Any]
NOT_A_GPU = "**Not run on a GPU**: this page shows that the kit works, its figures mean nothing."


def render(report: Report) -> str:
    """Markdown."""
    facts = found_by(report, "machine")
    rate = facts.get("matmul_flops")
    versions = ", ".join(
        f"{name} {number}" for name, number in report["versions"].items() if number
    )
    lines = [
        "# bertdist on a GPU",
        NOT_A_GPU if facts.get("device") == "cpu" or report["tiny"] else "",
        table(
            ("", ""),
            [
                ("device", describe_device(facts)),
                ("driver, CUDA", f"{report['driver']}, {facts.get('cuda')}"),
                ("versions", f"Python {report['python']}, {versions}"),
                ("host", report["cpu"]),
                ("commit", report["commit"]),
                ("date", report["date"]),
                ("command", f"`{report['command']}`"),
                ("not installed", ", ".join(facts.get("missing", ())) or "-"),
                (
                    "model",
                    f"{'a tiny BERT' if report['tiny'] else 'BERT-base'}, random weights; "
                    f"tokenizer: {facts.get('tokenizer')}",
                ),
                ("rows", f"{facts.get('rows', 0):,}: {facts.get('source')}"),
                ("matrix products, bf16", f"{rate / 1e12:,.3g} TFLOP/s" if rate else "-"),
            ],
        ),
        "## Stages",
        table(
            ("stage", "", "seconds"),
            [
                (
                    entry["name"],
                    f"{entry['status']}: {entry['message']}"
                    if "message" in entry
                    else entry["status"],
                    f"{entry.get('seconds', 0):.0f}",
                )
                for entry in report["stages"]
            ],
        ),
        f"{report.get('seconds', 0):.0f} of {60 * report['minutes']:.0f} seconds.",
        *tests_section(report),
        *families_section(report),
        *training_section(report, rate),
        *profile_section(report),
        *prediction_section(report),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def results(report: Report, job: str) -> list[Report]:
    """All results of a job."""
    entries = [entry for entry in report["stages"] if entry["job"] == job]
    return [result for entry in entries for result in entry["results"]]


def found_by(report: Report, job: str) -> Report:
    """The results of a job, joined."""
    return {name: value for result in results(report, job) for name, value in result.items()}


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first two are numbers. Empty without rows."""
    if not rows:
        return ""
    ruler = [":--" if i < 2 else "--:" for i in range(len(heading))]
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (heading, ruler, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def describe_device(facts: Report) -> str:
    """The card in a line."""
    names = [facts.get("device", "unknown")]
    if "memory_gib" in facts:
        flash = "has" if facts.get("flash attention of torch") else "has no"
        names += [f"{facts['memory_gib']} GiB", f"compute capability {facts['capability']}"]
        names.append(f"torch {flash} flash attention")
    return ", ".join(names)


def tests_section(report: Report) -> list[str]:
    """Counts, and the end of each failure."""
    found = results(report, "tests")
    if not found:
        return []
    lines = ["## Tests"]
    for result in found:
        if "counts" in result:
            lines.append(
                ", ".join(f"{count} {name}" for name, count in result["counts"].items()) + "."
            )
        elif "unfinished" in result:
            lines.append(f"pytest was {result['unfinished']}: not all tests were run.")
        else:
            lines += [f"**{result['failed']}**", "```", *result["tail"], "```"]
    return ["\n".join([*lines[:1], "", *lines[1:]])]


def families_section(report: Report) -> list[str]:
    """Distances from padded Hugging Face in float32."""
    found = results(report, "families")
    if not found:
        return []
    kinds = ["Hugging Face, bf16", "bertdist, bf16", "bertdist, float32"]
    kinds.append("bertdist, one token in the wrong text")
    rows = []
    for result in found:
        if "error" in result:
            rows.append([result["family"], result["error"], *["-"] * len(kinds)])
            continue
        verdict = f"wrong: {' and '.join(result['wrong'])}" if result["wrong"] else "right"
        pairs = [result["differences"][kind] for kind in kinds]
        cells = [f"{logits:.1e}, {gradients:.1e}" for logits, gradients in pairs]
        rows.append([result["family"], f"{verdict} ({result['kernel']})", *cells])
    return [
        "## Families",
        "Largest difference of logits, and of gradients, from padded Hugging Face in float32,"
        " relative to the largest of each. Wrong: more than three times that of Hugging Face in"
        " bf16 (and 2%), or 0.1% in float32. The last column is a mistake that has to be seen.",
        table(["family", "verdict (attention)", *kinds], rows),
    ]


def training_section(report: Report, rate: float | None) -> list[str]:
    """All ways to train, by rows per step; then epochs."""
    entries = [entry for entry in report["stages"] if entry["job"] == "contender"]
    sizes = sorted({result["batch_size"] for entry in entries for result in entry["results"]})
    lines = ["## Training in bf16"] if sizes else []
    for size in sizes:
        rows, notes = [], []
        for entry in entries:
            for result in entry["results"]:
                if result["batch_size"] == size and entry["name"] != "epoch":
                    rows.append(
                        [entry["name"], str(result["steps"]), *training_cells(result, rate)]
                    )
                    notes += [f"{entry['name']}: {note}" for note in result["notes"]]
        heading = ["", "steps", "real tokens/s", "rows/s", "ms per step", "computed per real token"]
        heading += ["GPU peak, MiB", "useful TFLOP/s", "% of matmul", "final loss"]
        lines += [f"### {size} rows per step", table(heading, rows)]
        lines += ["\n".join(f"- {note}" for note in notes)]
    epochs = [
        result for entry in entries if entry["name"] == "epoch" for result in entry["results"]
    ]
    total = found_by(report, "machine").get("rows", 0)
    rows = [[str(one["batch_size"]), "measured", *epoch_cells(one, rate)] for one in epochs]
    measured = {one["batch_size"] for one in epochs}
    rows += [
        [str(one["batch_size"]), "from the steps above", *epoch_cells(one, rate, total)]
        for entry in entries
        for one in entry["results"]
        if entry["name"] == "bertdist" and one["batch_size"] not in measured
    ]
    heading = ["rows per step", "", "seconds", "steps", "real tokens/s", "% of matmul"]
    if rows:
        lines += [f"### An epoch of {total:,} rows", table(heading, rows)]
    return lines


def training_cells(result: Report, rate: float | None) -> list[str]:
    """The figures of one way to train."""
    names = ("tokens_per_second", "rows_per_second", "ms_per_step", "cells_per_token", "device_mib")
    cells = ["-" if result[name] is None else format_number(result[name]) for name in names]
    flops = result["flops_per_second"]
    cells.append(f"{flops / 1e12:.3g}")
    return [*cells, f"{100 * flops / rate:.1f}" if rate else "-", f"{result['loss']:.4f}"]


def epoch_cells(result: Report, rate: float | None, rows: int | None = None) -> list[str]:
    """The figures of an epoch; rows: estimated for so many."""
    steps = result["steps"] if rows is None else -(-rows // result["batch_size"])
    seconds = steps * result["ms_per_step"] / 1e3
    share = f"{100 * result['flops_per_second'] / rate:.1f}" if rate else "-"
    return [f"{seconds:.2f}", str(steps), format_number(result["tokens_per_second"]), share]


def profile_section(report: Report) -> list[str]:
    """The kernels that take the most time."""
    lines: list[str] = []
    for result in results(report, "profile"):
        rows = [
            (
                f"`{kernel['name']}`",
                "",
                f"{kernel['calls']:.0f}",
                f"{kernel['ms']:.3f}",
                f"{100 * kernel['share']:.1f}",
            )
            for kernel in result["top"]
        ]
        lines += [
            f"## Profile, {result['batch_size']} rows per step",
            f"{result['steps']} steps: {result['wall_ms']:.2f} ms per step with the profiler"
            f" running, {result['kernel_ms']:.2f} ms of them in"
            f" {result['kernels_per_step']:,.0f} kernels.",
            table(("kernel", "", "calls per step", "ms per step", "% of kernels"), rows),
        ]
    return lines


def prediction_section(report: Report) -> list[str]:
    """Rows per second."""
    rows = [
        (one["contender"], f"{one['rows']:,}", format_number(one["rows_per_second"]))
        for one in results(report, "prediction")
    ]
    return ["## Prediction in bf16", table(("", "rows", "rows/s"), rows)] if rows else []
