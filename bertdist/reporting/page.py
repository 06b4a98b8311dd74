"""The page of a report: templates, and where it is written.

    html = render("report.html", title=..., ...)
    save(Path("out/report.html"), html)          # replaces only what bertdist has written

Every value is escaped: markup by jinja2, and characters that a page must not contain (control
characters, marks that reverse the order of what follows) as `printable` shows them. Templates of
other pages extend base.html (blocks title, style, header, main, footer) and import macros.html.
"""

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bertdist import __version__
from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import is_own_report
from bertdist.core.terminal import excerpt, printable

TEMPLATES = Path(__file__).parent / "templates"
TEXT_CHARACTERS = 1_000  # of a text; the rest is left out, and said
NAME_COLUMNS, SHORT_COLUMNS = 60, 24  # of a label in a table, and in the head of a matrix


def render(template: str, **values: Any) -> str:
    """The HTML of a template in reporting/templates; `version` and the filters number, percent,
    text, short, shorter are there for all.
    """
    return _templates().get_template(template).render(version=__version__, **values)


@functools.cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    templates.filters |= {
        "number": number,
        "percent": percent,
        "text": shown_text,
        "scale": scale_of,
        "short": functools.partial(excerpt, columns=NAME_COLUMNS),
        "shorter": functools.partial(excerpt, columns=SHORT_COLUMNS),
    }
    return templates


def _finalize(value: Any) -> Any:
    """What is written for a value; markup of our own stays as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return "" if value is None else value


def number(value: Any) -> str:
    """A number as the tables show it; "" for None, "undefined" for NaN."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A share."""
    return "" if value is None or not math.isfinite(value) else f"{value:.1%}"


def scale_of(groups: Iterable[Any]) -> tuple[float, float]:
    """The ends of the line on which scores of groups and their intervals are drawn."""
    found = [x for group in groups for x in (group.score, *(group.interval or ())) if x is not None]
    low, high = min(found, default=0.0), max(found, default=1.0)
    room = (high - low) * 0.05 or 0.01
    return max(low - room, 0.0) if low >= 0 else low - room, min(high + room, max(1.0, high))


def shown_text(text: str) -> Markup:
    """A text with its line breaks, escaped; of a long one the beginning."""
    more = f" ... ({len(text) - TEXT_CHARACTERS:,} more characters)"
    shown = text[:TEXT_CHARACTERS] + more * (len(text) > TEXT_CHARACTERS)
    return Markup("\n").join(printable(line) for line in shown.split("\n"))


def save(path: Path, html: str) -> None:
    """Write a page. Raises ConfigError for a file that bertdist did not write, and CheckpointError
    where it cannot be written.
    """
    if not is_own_report(path):
        raise ConfigError(f"{path} was not written by bertdist: rename it, or give --output.")
    atomic_write(path, html.encode("utf-8", "backslashreplace"))
