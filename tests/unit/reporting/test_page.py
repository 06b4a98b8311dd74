"""What a page is made of: every value escaped, numbers, and whose file it may replace."""

import os
from pathlib import Path

import pytest
from markupsafe import Markup

from bertdist.core.errors import CheckpointError, ConfigError
from bertdist.core.output_files import REPORT_MARKER, is_own_report
from bertdist.reporting import page

NASTY = "<script>alert('1')</script> </svg> \"q\" & \x00\x1b[31m \u202e \ud800 שלום"


def test_values_are_escaped_and_cannot_control_the_page() -> None:
    html = page.render("base.html", title=NASTY)
    assert "<script>" not in html and "\x00" not in html and "\u202e" not in html
    shown = "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &lt;/svg&gt; &#34;q&#34; &amp; \\x00\\x1b[31m \\u202e"
    assert html.count(shown) == 2 and "שלום" in html  # <title> and <h1>
    template = page._templates().from_string("{{ x }}|{{ x | text }}|{{ y }}")
    assert template.render(x="<a\nb>", y=Markup("<b>")) == "&lt;a\\nb&gt;|&lt;a\nb&gt;|<b>"


def test_numbers() -> None:
    given = [None, 1234, 0.12345, 0.0, 1e-7, -2.5, 123456.7, float("nan"), True]
    shown = ["", "1,234", "0.1235", "0.0000", "1e-07", "-2.5000", "1.235e+05", "undefined", "True"]
    assert [page.number(value) for value in given] == [
        x if x != "0.1235" else f"{0.12345:.4f}" for x in shown
    ]
    assert page.percent(0.0456) == "4.6%" and page.percent(None) == ""


def test_a_long_text_is_cut_and_says_so() -> None:
    shown = page.shown_text("x" * (page.TEXT_CHARACTERS + 1_500))
    assert str(shown) == "x" * page.TEXT_CHARACTERS + " ... (1,500 more characters)"


def test_only_pages_of_its_own_are_replaced(tmp_path: Path) -> None:
    file, html = tmp_path / "report.html", page.render("base.html", title="a")
    assert REPORT_MARKER in html.encode()[:4096]
    page.save(file, html)
    page.save(file, page.render("base.html", title="b\ud800"))  # its own
    assert "b\\ud800</h1>" in file.read_text()
    file.write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match=r"report\.html was not written by bertdist"):
        page.save(file, html)
    assert file.read_text() == "<html>mine</html>" and not is_own_report(file)
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "elsewhere.html")
    assert not is_own_report(link) and not is_own_report(tmp_path)
    os.mkfifo(tmp_path / "fifo")  # which is not read: that would wait for ever
    assert not is_own_report(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="Cannot write"):
        page.save(tmp_path / "none" / "report.html", html)


def test_the_line_of_scores_of_groups() -> None:
    class Group:
        def __init__(self, score: float | None, interval: tuple[float, float] | None) -> None:
            self.score, self.interval = score, interval

    low, high = page.scale_of([Group(0.9, (0.8, 0.95)), Group(None, None)])
    assert 0.78 < low < 0.8 and 0.95 < high <= 1
    assert page.scale_of([Group(1.0, (1.0, 1.0))]) == (0.99, 1.0)
    assert page.scale_of([Group(3.0, (2.0, 4.0))])[1] == 4.0
