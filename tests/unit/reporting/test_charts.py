"""Charts: valid SVG in the page's colours, with words for those who do not see it, whatever names hold."""

import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from run_folders import random_rows, write_run

from bertdist.reporting import analysis, charts
from bertdist.reporting.charts import Chart, Line
from bertdist.reporting.run_folder import read_run

NASTY = "<script>x</script></svg> $a_b$ \"id='x'\" \x00\x1b \u202e שלום 中文"


def checked(chart: Chart) -> ET.Element:
    root = ET.fromstring(str(chart.svg))
    assert root.tag == "svg" and root.get("role") == "img" and "viewBox" in root.attrib
    title, description = root[0], root[1]
    assert (title.tag, title.text) == ("title", chart.title)
    assert (description.tag, description.text) == ("desc", chart.description)
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    text = str(chart.svg)
    for used in analysis.np.unique([x.split(")")[0] for x in text.split("url(#")[1:]]):
        assert used in ids
    assert "#00000" not in text and "<style" not in text and "<script" not in text
    assert "http" not in text and "\x00" not in text
    return root


def test_lines() -> None:
    lines = [Line("$a_b$ <b>&\x00", range(3), [1, 2, 3]), Line("b", [0.0], [2.0], marker=True)]
    chart = charts.line_chart(
        "loss", NASTY.replace("\x00\x1b ", ""), "about", lines, "step", "loss"
    )
    root = checked(chart)
    texts = [element.text for element in root.iter("text")]
    assert "step" in texts and any("$a_b$" in (text or "") for text in texts)
    assert "var(--series-1)" in str(chart.svg) and "var(--ink)" in str(chart.svg)
    again = charts.line_chart("loss", "a", "about", lines, "step", "loss")
    other = charts.line_chart("other", "a", "about", lines, "step", "loss")
    assert str(again.svg).replace("loss-", "other-") == str(other.svg)  # the same in each process


def test_a_long_line_is_averaged() -> None:
    x, y = charts._thinned(np.arange(10_000.0), np.arange(10_000.0) * 2)
    assert len(x) == charts.MOST_POINTS and x[0] == 4.5
    np.testing.assert_allclose(y, 2 * x)


def test_the_other_charts(tmp_path: Path) -> None:
    rows = read_run(write_run(tmp_path / "out", random_rows(90, ("a", NASTY)))).validation
    numbers = read_run(write_run(tmp_path / "n", random_rows(90, ("y",), "regression"))).validation
    assert rows is not None and numbers is not None
    checked(charts.reliability_chart("r", "t", "d", analysis.reliability(rows)))
    curve = analysis.precision_recall(NASTY, *analysis.one_vs_rest(rows, 1))
    checked(charts.precision_recall_chart("p", "t", "d", [curve]))
    found = analysis.residuals(numbers, 50)
    root = checked(charts.scatter_chart("s", "t", "d", found))
    assert len(list(root.iter("use"))) >= 50
    checked(charts.residual_chart("h", "t", "d", found))


def test_charts_of_threads_do_not_mix() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    found: dict[int, str] = {}

    def draw(number: int) -> None:
        line = Line("a", range(3), [number, 2, 3])
        found[number] = str(charts.line_chart("c", "t", "d", [line], "x", "y").svg)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        expected = found[number]
        draw(number)
        assert found[number] == expected
    assert dict(matplotlib.rcParams) == before
