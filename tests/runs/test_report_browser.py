"""The page in a real browser: nothing on the console, no request, nothing that keeps people from reading it, at three widths."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import some_of
from run_folders import random_rows, write_run

from bertdist.reporting.explain import explain_mistakes
from bertdist.reporting.page import save
from bertdist.reporting.run_folder import read_run
from bertdist.reporting.run_report import report_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
).split()
WIDTHS = (390, 800, 1400)
NASTY = "<script>throw new Error('run')</script></svg> \x00 שלום " + "long" * 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    missing = [] if CHROMIUM else ["apt-get install -y chromium"]
    try:
        import axe_playwright_python.sync_playwright
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing += ["pip install -e '.[browser]'"]
    if missing:
        pytest.skip(f"no browser: {' && '.join(missing)}")
    assert axe_playwright_python.sync_playwright and os.access(CHROMIUM, os.X_OK)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


def page_of(folder: Path, kind: str) -> Path:
    """A report with everything that there may be."""
    labels = [
        f"{n} {NASTY}" if n % 2 else f"label {n}" for n in range(33 if kind == "single" else 4)
    ]
    labels = labels if kind != "regression" else ["score"]
    given: Any = {"slices": [NASTY, "en", None] * 60, "truncated": np.arange(180) % 9 == 0}
    rows = random_rows(180, labels, kind, sure=1.5, file=NASTY, **given)
    check = {
        "counts": {"error": 1},
        "findings": [dict.fromkeys(("severity", "split", "title", "count", "advice"), NASTY)],
    }
    run = read_run(write_run(folder / kind, rows, check=check, config={"run_name": NASTY}))
    assert run.validation is not None
    words = explain_mistakes(
        run.validation,
        2,
        lambda texts, _: np.random.default_rng(0).random((len(texts), len(labels))),
    )
    save(folder / f"{kind}.html", report_of(run, {"validation": words}))
    return folder / f"{kind}.html"


@pytest.mark.parametrize("kind", some_of(["multi"], ["single", "regression"]))
def test_the_page_in_a_browser(kind: str, browser: Any, tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    said: list[str] = []
    file = page_of(tmp_path, kind)
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(file.as_uri())
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wider) == 0, width
    assert said == [file.as_uri()]
    assert page.locator("svg[role=img]").count() >= 4 and page.locator("h3").count() >= 6
    for scheme in ("light", "dark") if kind == "single" else ("light",):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        bad = [
            (x["id"], x["nodes"][0]["html"][:200])
            for x in found
            if x["impact"] in ("serious", "critical")
        ]
        assert bad == [], scheme
    page.close()


def test_what_a_browser_refuses_is_seen(browser: Any, tmp_path: Path) -> None:
    """The control: a page with a script that fails, a request, low contrast, and a wide element."""
    from axe_playwright_python.sync_playwright import Axe

    said: list[str] = []
    file = tmp_path / "bad.html"
    file.write_text(
        "<!doctype html><html><head><title>x</title><link rel=stylesheet href=none.css></head><body>"
        "<p style='color:#ccc;background:#fff'>pale</p><div style='width:3000px'>wide</div>"
        "<script>throw new Error('run')</script></body></html>"
    )
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(file.as_uri())
    assert len(said) == 3 and page.evaluate("document.documentElement.scrollWidth") > 390
    found = {x["id"] for x in Axe().run(page).response["violations"] if x["impact"] == "serious"}
    assert {"color-contrast", "html-has-lang"} <= found
    page.close()
