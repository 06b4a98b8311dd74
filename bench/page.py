"""A page of several sections, of which each run of the benchmark replaces its own and nothing else; and the chart beside it.

A section stands between `<!-- bench: NAME -->` and `<!-- end of bench: NAME -->`. All else is written by hand and stays as it is. A new
section goes in front of the first heading that stands in BY_HAND, else to the end. Beside page.md: page.json, the figures of each section
of the last run that wrote it, and page.svg, drawn from it.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Spread, number
from bench.jobs import BenchError
from bench.stage import say
from bertdist.core.errors import BertdistError

BY_HAND = "## What limits it"
EMPTY = f"""# Benchmarks

Sections between comments that say `bench:` are written by `python -m bench.peers` and `python -m bench.scaling`; the rest by hand.

{BY_HAND}
<!-- by hand -->
<!-- end of by hand -->
"""


def replaced(page: str, name: str, section: str) -> str:
    """The page with this section in it; raises BenchError where the section's comments do not stand in pairs."""
    begin, end = f"<!-- bench: {name} -->", f"<!-- end of bench: {name} -->"
    block = f"{begin}\n{section.strip()}\n{end}"
    found = [page.count(begin), page.count(end)]
    if found == [0, 0]:
        place = re.search(rf"^{re.escape(BY_HAND)}\s*$", page, flags=re.MULTILINE)
        at = place.start() if place else len(page)
        return f"{page[:at].rstrip()}\n\n{block}\n" + (f"\n{page[at:]}" if place else "")
    if found != [1, 1] or page.index(end) < page.index(begin):
        raise BenchError(
            f"The page has {found[0]} times {begin!r} and {found[1]} times {end!r}; expected one pair, in this order."
        )
    return page[: page.index(begin)] + block + page[page.index(end) + len(end) :]


def write(output: Path, name: str, section: str, record: Mapping[str, Any]) -> str:
    """Put the section into the page and the record beside it, and draw the chart again; what is to be said of it."""
    page = output.read_text(encoding="utf-8") if output.exists() else EMPTY
    text = replaced(page, name, section)
    beside, picture = output.with_suffix(".json"), output.with_suffix(".svg")
    records = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    records[name] = record
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    beside.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    drawn = draw(records, picture)
    return f"{output}: section {name} is written, {beside.name} too; {drawn}"


def show(
    name: str,
    parser: argparse.ArgumentParser,
    compute: Callable[[argparse.Namespace, Sequence[str]], tuple[str, Mapping[str, Any]]],
    words: Sequence[str],
) -> int:
    """The command line of a benchmark that makes one section, which --output puts into a page; the exit code: 1 with one line for a user.

    compute: the flags, and the words that they were read from -> section and record.
    """
    args = parser.parse_args(words)
    try:
        section, record = compute(args, words)
        print(section)
        if args.output:
            say(write(Path(args.output), name, section, record))
    except (BenchError, BertdistError) as error:
        say(str(error))
        return 1
    return 0


def draw(records: Mapping[str, Any], picture: Path) -> str:
    """Bars with least and most for each record that has any: {"title", "unit", "bars": [[name, median, least, most], ...]}."""
    try:
        import matplotlib
    except ImportError:
        return (
            f"{picture.name} is not drawn: matplotlib is not installed (pip install -e '.[bench]')."
        )
    matplotlib.use("svg")
    # The same figures make the same file: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    panels = [record for record in records.values() if record.get("bars")]
    if not panels:
        return f"{picture.name} is not drawn: there is nothing to draw yet."
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
    places = range(len(found))
    around = [[bar.median - bar.least for bar in found], [bar.most - bar.median for bar in found]]
    colours = ["#2f6f9f" if name.startswith("bertdist") else "#b0b7bf" for name in names]
    axis.barh(
        places,
        [bar.median for bar in found],
        xerr=around,
        color=colours,
        ecolor="#333333",
        capsize=3,
    )
    for place, bar in zip(places, found, strict=True):
        axis.annotate(
            number(bar.median),
            (bar.most, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(f"{panel['title']}, {panel['unit']}", loc="left", fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def bars(names: Mapping[str, str], spreads: Mapping[str, Spread]) -> list[list[Any]]:
    """What `draw` takes."""
    return [[names[key], *found] for key, found in spreads.items()]


def slug(title: str) -> str:
    """`BERT-base, random weights` -> `bert-base-random-weights`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
