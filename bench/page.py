"""A Markdown page of several sections, each replaced by the benchmark that owns it, and a chart.

A section stands between `<!-- bench: NAME -->` and `<!-- end of bench: NAME -->`; everything else
is written by hand and not changed. A new section goes before the heading BY_HAND, else at
the end. Section OVERVIEW, if the page has it, is made of all others, side by side. Beside page.md:
page.json, the figures of each section, and page.svg, drawn from it.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Spread, format_number, markdown
from bench.jobs import BenchError
from bench.stage import log
from bertdist.core.errors import BertdistError

BY_HAND = "## What limits it"
OVERVIEW = "overview"
EMPTY = f"""# Benchmarks

Sections between `bench:` comments are written by `python -m bench.peers` and
`python -m bench.scaling`, the rest by hand.

<!-- bench: {OVERVIEW} -->
<!-- end of bench: {OVERVIEW} -->

{BY_HAND}
<!-- by hand -->
<!-- end of by hand -->
"""


def replace_section(page: str, name: str, section: str) -> str:
    """The page with this section replaced. Raises BenchError if its comments are not a pair."""
    begin, end = f"<!-- bench: {name} -->", f"<!-- end of bench: {name} -->"
    block = f"{begin}\n{section.strip()}\n{end}"
    counts = [page.count(begin), page.count(end)]
    if counts == [0, 0]:
        heading = re.search(rf"^{re.escape(BY_HAND)}\s*$", page, flags=re.MULTILINE)
        at = heading.start() if heading else len(page)
        return f"{page[:at].rstrip()}\n\n{block}\n" + (f"\n{page[at:]}" if heading else "")
    if counts != [1, 1] or page.index(end) < page.index(begin):
        raise BenchError(
            f"The page has {counts[0]} times {begin!r} and {counts[1]} times {end!r};"
            " expected one pair, in this order."
        )
    return page[: page.index(begin)] + block + page[page.index(end) + len(end) :]


def write(output: Path, name: str, section: str, record: Mapping[str, Any]) -> str:
    """Update page, page.json and chart; returns a message."""
    page = output.read_text(encoding="utf-8") if output.exists() else EMPTY
    text = replace_section(page, name, section)
    beside, picture = output.with_suffix(".json"), output.with_suffix(".svg")
    records = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    records[name] = record
    if f"<!-- bench: {OVERVIEW} -->" in text:
        text = replace_section(text, OVERVIEW, overview(records))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    beside.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    drawn = draw(records, picture)
    return f"{output}: section {name} is written, {beside.name} too; {drawn}"


def overview(records: Mapping[str, Any]) -> str:
    """The records with bars, side by side: a table per unit, a column per machine and model, a line
    per contender. In brackets how much faster the first contender of that column is.
    """
    shown = sorted(
        (x for x in records.values() if x.get("bars")), key=lambda x: x["title"].split(", ")
    )
    about = "In brackets: how many times as fast the first line of the column is."
    parts = ["## Side by side", about] if shown else []
    for unit in dict.fromkeys(record["unit"] for record in shown):
        of_unit = [record for record in shown if record["unit"] == unit]
        table = [[f"{unit}, median", *(record["title"] for record in of_unit)]]
        for name in dict.fromkeys(bar[0] for record in of_unit for bar in record["bars"]):
            table.append([name, *(_cell(record["bars"], name) for record in of_unit)])
        parts.append(markdown(table))
    return "\n\n".join(parts)


def _cell(bars: Sequence[Any], name: str) -> str:
    (first, fastest, *_), medians = bars[0], {bar[0]: bar[1] for bar in bars}
    if (median := medians.get(name)) is None:
        return ""
    times = "" if name == first or not median else f" ({fastest / median:.2f} x)"
    return f"{format_number(median)}{times}"


def run_command(
    name: str,
    parser: argparse.ArgumentParser,
    compute: Callable[[argparse.Namespace, Sequence[str]], tuple[str, Mapping[str, Any]]],
    words: Sequence[str],
) -> int:
    """Command line of a benchmark with one section; returns the exit code: 1 if a user erred.

    compute: (parsed flags, command line) -> (section, record).
    """
    args = parser.parse_args(words)
    try:
        section, record = compute(args, words)
        print(section)
        if args.output:
            log(write(Path(args.output), name, section, record))
    except (BenchError, BertdistError) as error:
        log(str(error))
        return 1
    return 0


def draw(records: Mapping[str, Any], picture: Path) -> str:
    """Draw the bars of each record {"title", "unit", "bars": [[name, median, min, max], ...]}."""
    try:
        import matplotlib
    except ImportError:
        return (
            f"{picture.name} is not drawn: matplotlib is not installed (pip install -e '.[bench]')."
        )
    matplotlib.use("svg")
    # Reproducible file: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    panels = [record for record in records.values() if record.get("bars")]
    if not panels:
        return f"{picture.name} is not drawn: there are no figures yet."
    heights = [1 + len(panel["bars"]) for panel in panels]
    size = (8, 0.38 * sum(heights) + 0.5 * len(panels))  # inches
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=size, squeeze=False, height_ratios=heights
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, panel)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)
    return f"{picture.name} is drawn."


def _draw_panel(axis: Any, panel: Mapping[str, Any]) -> None:
    names, found = [bar[0] for bar in panel["bars"]], [Spread(*bar[1:]) for bar in panel["bars"]]
    positions = range(len(found))
    around = [[bar.median - bar.least for bar in found], [bar.most - bar.median for bar in found]]
    colours = ["#2f6f9f" if name.startswith("bertdist") else "#b0b7bf" for name in names]
    axis.barh(
        positions,
        [bar.median for bar in found],
        xerr=around,
        color=colours,
        ecolor="#333333",
        capsize=3,
    )
    for position, bar in zip(positions, found, strict=True):
        axis.annotate(
            format_number(bar.median),
            (bar.most, position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axis.set_yticks(positions, names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(f"{panel['title']}, {panel['unit']}", loc="left", fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def bars(names: Mapping[str, str], spreads: Mapping[str, Spread]) -> list[list[Any]]:
    """Entries of "bars" for `draw`."""
    return [[names[key], *found] for key, found in spreads.items()]


def slug(title: str) -> str:
    """`BERT-base, random weights` -> `bert-base-random-weights`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
