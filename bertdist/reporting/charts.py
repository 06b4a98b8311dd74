"""Charts of a report, as SVG by matplotlib: their colours are CSS variables of the page.

    chart = line_chart("loss", "Loss", "...", [Line("training", steps, losses)], "step", "loss")
    chart.svg                 # Markup: <svg role="img">, with title and description, without script

No pyplot: a figure and its canvas belong to the call. Text stays text (the page's font), no id is
used twice in a page as long as the names of its charts differ, and characters that XML does not
have are escapes. Colours: --ink, --muted, --grid, --paper, --series-1 to --series-6.
"""

import io
import logging
import re
import threading
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from bertdist.core.terminal import excerpt
from bertdist.core.types import Array
from bertdist.reporting.analysis import PrecisionRecall, Reliability, Residuals

# What matplotlib draws with, and the variable of the page that takes its place
INK, MUTED, GRID, PAPER = "#000001", "#000002", "#000003", "#000004"
SERIES = tuple(f"#0000f{number}" for number in range(1, 7))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)
}
_COLOR = re.compile("|".join(_VARIABLES))
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"(url\(#|^#)([^)]+)")
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1)), (0, (2, 3)))
SIZE = (5.0, 3.1)  # inches; the page scales it
MOST_POINTS = 1_000  # of a line: more are averaged in groups of equal size
SCATTER_POINTS = 1_500
NAME_COLUMNS = 28  # of a name in a legend
# Names at the ends of lines; the width of a letter and the gap are shares of the picture
END_COLUMNS, COLUMN_WIDTH, LINE_GAP = 18, 0.015, 0.06


@dataclass(frozen=True)
class Chart:
    """One picture with its words."""

    title: str
    description: str  # read to those who do not see it
    svg: Markup


@dataclass(frozen=True)
class Line:
    """One series."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marker: bool = False


_drawing = threading.Lock()  # settings and warnings are those of the process


@contextmanager
def _settings() -> Iterator[Any]:
    """matplotlib with our settings, without its warnings on fonts: the page has its own."""
    import matplotlib

    logger = logging.getLogger("matplotlib")
    level = logger.level
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "bertdist",
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "axes.unicode_minus": True,
    }
    logger.setLevel(logging.ERROR)
    try:
        with (
            _drawing,
            warnings.catch_warnings(),
            matplotlib.rc_context({**matplotlib.rcParamsDefault}),
        ):
            warnings.simplefilter("ignore")
            matplotlib.rcParams.update(settings)
            yield matplotlib
    finally:
        logger.setLevel(level)


def _figure(size: tuple[float, float] = SIZE) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor="none")
    # Margins by hand: to find them, matplotlib would draw everything twice
    figure.subplots_adjust(left=0.13, right=0.98, top=0.95, bottom=0.15)
    axes = figure.add_subplot(facecolor="none")
    axes.ticklabel_format(scilimits=(-3, 5))
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GRID)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=3)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any, **options: Any) -> None:
    options = {"loc": "best", "fontsize": 8} | options
    axes.legend(frameon=True, facecolor=PAPER, edgecolor="none", labelcolor=INK, **options)


def _svg(figure: Any, name: str, title: str, description: str) -> Chart:
    """name: of the chart in its page, of letters, digits and dashes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    target = io.BytesIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(target, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ET.fromstring(target.getvalue())
    for parent in list(root.iter()):  # a <style> in a picture is one of the whole page
        for child in [x for x in parent if x.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    used = {
        match[2]
        for element in root.iter()
        for value in element.attrib.values()
        for match in _REFERENCE.finditer(value)
    }
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        attributes = dict(element.attrib)
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
                continue
            plain = _REFERENCE.sub(rf"\g<1>{name}-\g<2>", value)
            plain = _COLOR.sub(lambda match: f"var({_VARIABLES[match[0]]})", plain)
            element.set("href" if key == _LINK else key, plain)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(position, element)
    return Chart(title, description, Markup(ET.tostring(root, encoding="unicode")))


def _color(number: int) -> dict[str, Any]:
    """Of a series: also without colours the lines differ, and more than there are colours do."""
    style = _STYLES[(number + number // len(SERIES)) % len(_STYLES)]
    return {"color": SERIES[number % len(SERIES)], "linestyle": style}


def line_chart(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    x: str,
    y: str,
    bounds: tuple[float, float] | None = None,
    named_at_end: bool = False,
) -> Chart:
    """Values over steps. bounds: of the vertical axis. Of more than MOST_POINTS the means of groups
    are drawn. named_at_end: up to as many lines as colours have their names at their ends.
    """
    with _settings():
        figure, axes = _figure()
        for number, line in enumerate(lines):
            points = _thinned(np.asarray(line.x, float), np.asarray(line.y, float))
            style = {"marker": "o", "markersize": 3.5} if line.marker or len(line.x) == 1 else {}
            axes.plot(*points, label=excerpt(line.name, NAME_COLUMNS), **_color(number), **style)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if bounds is not None:
            axes.set_ylim(*bounds)
        if named_at_end and 1 < len(lines) <= len(SERIES):
            _name_ends(figure, axes, lines)
        elif len(lines) > 1:
            _legend(axes)
        return _svg(figure, name, title, description)


def _name_ends(figure: Any, axes: Any, lines: Sequence[Line]) -> None:
    """The names of the lines at the height of their last points, LINE_GAP apart at least."""
    names = [excerpt(line.name, END_COLUMNS) for line in lines]
    figure.subplots_adjust(right=0.97 - COLUMN_WIDTH * max(map(len, names)))
    low, high = axes.get_ylim()
    heights = [(float(line.y[-1]) - low) / (high - low) for line in lines]
    order = sorted(range(len(lines)), key=heights.__getitem__)
    place, places = -LINE_GAP, {}
    for number in order:
        places[number] = place = max(heights[number], place + LINE_GAP)
    most = 1.0
    for number in reversed(order):  # those of lines that end at the top go down
        places[number] = most = min(places[number], most)
        most -= LINE_GAP
        axes.text(
            1.015,
            places[number],
            names[number],
            transform=axes.transAxes,
            color=SERIES[number],
            fontsize=8,
            verticalalignment="center",
        )


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    if len(x) <= MOST_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), MOST_POINTS)
    return np.array([x[i].mean() for i in groups]), np.array([y[i].mean() for i in groups])


def reliability_chart(
    name: str,
    title: str,
    description: str,
    found: Reliability,
    share_name: str = "share that is right",
) -> Chart:
    """Bars of accuracy per bin of probability with their intervals, and how many rows there are."""
    with _settings():
        figure, axes = _figure()
        some = found.rows > 0
        middle = (found.edges[:-1] + found.edges[1:]) / 2
        share = found.rows / max(1, found.rows.max())
        axes.bar(
            middle[some],
            share[some] * 0.22,
            width=1 / len(middle) * 0.9,
            color=MUTED,
            alpha=0.35,
            label="share of the rows",
        )
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 2)), label="honest")
        low, high = found.accuracy - found.low, found.high - found.accuracy
        axes.errorbar(
            found.confidence[some],
            found.accuracy[some],
            yerr=np.stack([low[some], high[some]]).clip(0),
            color=SERIES[0],
            marker="o",
            markersize=4,
            linewidth=1.4,
            elinewidth=1,
            capsize=2,
            label="this model, 95% interval",
        )
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("probability that the model gives")
        axes.set_ylabel(share_name)
        figure.subplots_adjust(top=0.9)
        _legend(axes, loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=3)
        return _svg(figure, name, title, description)


def precision_recall_chart(
    name: str, title: str, description: str, curves: Sequence[PrecisionRecall]
) -> Chart:
    """Precision over recall; the legend has the average precision of each."""
    with _settings():
        figure, axes = _figure()
        for number, curve in enumerate(curves):
            label = f"{excerpt(curve.name, NAME_COLUMNS)}: {curve.average_precision:.3f}"
            axes.step(curve.recall, curve.precision, where="pre", label=label, **_color(number))
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        lines = -(-len(curves) // 2)  # above the curves, which may be anywhere
        figure.subplots_adjust(top=0.97 - 0.06 * lines)
        _legend(axes, loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=2)
        return _svg(figure, name, title, description)


def scatter_chart(name: str, title: str, description: str, found: Residuals) -> Chart:
    """Predicted over true numbers."""
    with _settings():
        figure, axes = _figure()
        truth, predicted = found.truth[found.shown], found.predicted[found.shown]
        axes.plot(
            truth, predicted, "o", color=SERIES[0], markersize=2.6, alpha=0.45, markeredgewidth=0
        )
        ends = [float(min(truth.min(), predicted.min())), float(max(truth.max(), predicted.max()))]
        axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xlabel("true number")
        axes.set_ylabel("predicted number")
        return _svg(figure, name, title, description)


def residual_chart(name: str, title: str, description: str, found: Residuals) -> Chart:
    """A histogram of predicted - true."""
    with _settings():
        figure, axes = _figure()
        known = np.isfinite(found.truth) & np.isfinite(found.predicted)
        gaps = (found.predicted - found.truth)[known].astype(np.float64)
        axes.hist(gaps, bins=min(40, max(5, int(np.sqrt(len(gaps))))), color=SERIES[0], alpha=0.7)
        axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xlabel("predicted − true")
        axes.set_ylabel("rows")
        return _svg(figure, name, title, description)


@dataclass(frozen=True)
class Points:
    """Some points of a chart."""

    name: str
    x: Sequence[Any]  # numbers, or names: the same kind in all of a chart
    y: Sequence[float]


def points_chart(
    name: str,
    title: str,
    description: str,
    groups: Sequence[Points],
    x: str,
    y: str,
    line: Line | None = None,
    is_log: bool = False,
    names: Sequence[str] = (),
) -> Chart:
    """Points over a number, or over `names`; line: drawn with them. is_log: the horizontal axis."""
    markers = ("o", "x", "^", "s", "+", "D")
    with _settings():
        figure, axes = _figure()
        for number, group in enumerate(groups):
            at = [list(names).index(value) for value in group.x] if names else group.x
            axes.plot(
                at,
                group.y,
                markers[number % len(markers)],
                color=SERIES[number % len(SERIES)],
                markersize=4.5,
                label=excerpt(group.name, NAME_COLUMNS),
            )
        if line is not None:
            label = excerpt(line.name, NAME_COLUMNS)
            axes.plot(line.x, line.y, color=MUTED, linewidth=1, drawstyle="steps-post", label=label)
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, position: "")
        if names:
            axes.set_xticks(range(len(names)), [excerpt(value, 16) for value in names])
            axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(groups) + (line is not None) > 1:
            _legend(axes)
        return _svg(figure, name, title, description)


def bar_chart(name: str, title: str, description: str, values: dict[str, float], x: str) -> Chart:
    """A horizontal bar per name, the first on top."""
    with _settings():
        height = 0.8 + 0.3 * len(values)
        figure, axes = _figure((5.0, height))
        names = [excerpt(value, NAME_COLUMNS) for value in values]
        left = 0.05 + 1.15 * COLUMN_WIDTH * max(map(len, names), default=0)
        figure.subplots_adjust(left=left, top=1 - 0.1 / height, bottom=0.5 / height)
        axes.barh(range(len(names)), list(values.values()), color=SERIES[0], height=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        return _svg(figure, name, title, description)
