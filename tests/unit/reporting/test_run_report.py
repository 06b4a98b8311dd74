"""The page of one run: its numbers are those of evaluation.json, it is bounded, and data cannot break it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import random_rows, scored_rows, write_run

from bertdist.reporting import after_run, rows_view
from bertdist.reporting.run_folder import read_run
from bertdist.reporting.run_report import report_of

NASTY = "<script>alert(1)</script></svg>' \" & \x00\x1b \u202e שלום\n$x$"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(HTMLParser):
    """Elements that are closed as they were opened; all ids, links and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attributes)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if "href" in given else []
        assert not any(name.startswith("on") for name in given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(html: str) -> str:
    """The text of a page that is well formed, without links elsewhere."""
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and len(checker.ids) == len(set(checker.ids))
    assert "script" not in checker.tags and "http" not in html.replace("http-equiv", "")
    for link in checker.links:
        assert link == "data:," or link[1:] in checker.ids, link
    return " ".join(" ".join(checker.text).split())


def test_numbers_are_those_of_evaluation_json(tmp_path: Path) -> None:
    rows = random_rows(
        400, ("no", "yes"), slices=["en", "de"] * 200, truncated=[True] * 8 + [False] * 392
    )
    test = random_rows(90, ("no", "yes"), seed=2, file="test.tsv")
    run = read_run(
        write_run(tmp_path / "out", rows, test, metrics=["f1_macro", "accuracy", "ece", "log_loss"])
    )
    text = checked(report_of(run))
    for prefix in ("", "test_"):
        report = json.loads((run.folder / f"{prefix}evaluation.json").read_text())
        for name, value in report["scores"].items():
            low, high = report["intervals"][name]
            assert f"{name} {value:.4f} {low:.4f} to {high:.4f}" in text
        for entry in report["per_class"]:
            numbers = " ".join(f"{entry[x]:.4f}" for x in ("precision", "recall", "f1"))
            assert f"{entry['label']} {entry['rows']} {numbers}" in text
        (a, b), (c, d) = report["confusion"]
        assert f"no {a} {b} yes {c} {d}" in text
        scores = report["scores"]
        assert (
            f"(ECE) {scores['ece']:.4f}, negative log-likelihood (NLL) {scores['log_loss']:.4f}"
            in text
        )
        assert f"f1_macro {scores['f1_macro']:.4f} 95% interval" in text  # the answer at the top
    assert "8 rows of 400 (2.0%) were truncated" in text
    assert "Rows by the column 'source' (--slice_column)." in text
    assert "--learning_rate 0.001 5e-05" in text and "bertdist train" in text
    assert "20 steps, 2 epochs." in text and "1,234" in text.replace("1234.5", "1,234")
    (error, *_) = run.validation.errors(1) if run.validation else ()
    assert f"dev.tsv line {error['line']}" in text


def test_a_multi_label_mistake_names_its_surest_wrong_label(tmp_path: Path) -> None:
    rows = random_rows(60, ("anger", "joy", "love"), "multi", sure=0.5)
    run = read_run(write_run(tmp_path / "out", rows))
    text = checked(report_of(run))
    assert run.validation is not None
    found = run.validation
    (first,) = found.errors(1)
    row = first["row"]
    wrong = found.predicted[row] != found.truth[row]
    size = np.where(
        found.predicted[row] > 0, found.probabilities[row], 1 - found.probabilities[row]
    )
    label = int(np.where(wrong, size, 0).argmax())
    assert size[label] == pytest.approx(first["error"])
    probability = found.probabilities[row, label]
    assert f", probability of {found.labels[label]!r} {probability:.4f}" in text
    assert "the share that has the label" in text and "share that is right" not in text


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_data_cannot_break_the_page(kind: str, tmp_path: Path) -> None:
    labels = (NASTY, NASTY + "2", "c") if kind != "regression" else (NASTY,)
    rows = random_rows(
        60, labels, kind, sure=0.5, slices=[NASTY, None] * 30, slice_column=NASTY, file=NASTY
    )
    check = {
        "counts": {"error": 1},
        "findings": [
            {"severity": NASTY, "split": NASTY, "title": NASTY, "count": 1, "advice": NASTY}
        ],
    }
    out = write_run(tmp_path / "out", rows, config={"run_name": NASTY}, check=check)
    lines = (out / "errors.jsonl").read_text().splitlines()
    (out / "errors.jsonl").write_text(
        "".join(
            json.dumps({**json.loads(x), "text": NASTY, "text_pair": NASTY}) + "\n" for x in lines
        )
    )
    (out / "environment.json").write_text(
        json.dumps({"command": ["a", NASTY], "packages": {NASTY: NASTY}, NASTY: NASTY})
    )
    html = report_of(read_run(out))
    text = checked(html)
    assert "<script>alert(1)</script>" in text and not re.search("[\x00\x1b\u202e]", html)


def test_many_labels_and_rows_are_bounded(tmp_path: Path) -> None:
    labels = tuple(f"intent_{n}" for n in range(150))
    run = read_run(write_run(tmp_path / "out", random_rows(1500, labels, sure=2.0)))
    html = report_of(run)
    text = checked(html)
    assert len(html) < 400_000
    assert f"The {rows_view.LABELS} lowest f1 of 150 labels; all are in evaluation.json." in text
    assert "The 20 labels with most confusions of 150; the other 130 are one column" in text
    assert "all labels together" in text and "of 150" in text
    report: Any = run.validation and run.validation.report
    confusion = np.array(report["confusion"])
    wrong = confusion - np.diag(np.diag(confusion))
    distinct = int((wrong > 0).sum())
    assert f"The most frequent confusions, {rows_view.PAIRS} of {distinct:,} that occur." in text
    assert (
        f"The first {rows_view.MISTAKES} of {int(wrong.sum()):,} rows with a wrong answer" in text
    )


def test_the_answers_at_the_top(tmp_path: Path) -> None:
    truth, logits = [0] * 50 + [1] * 50, np.zeros((100, 2))
    logits[:50, 0] = logits[50:, 1] = 3.0
    logits[40:44] = [0.0, 4.0]
    rows = scored_rows([f"text {n}" for n in range(100)], ("cat", "dog"), truth, logits)
    text = checked(report_of(read_run(write_run(tmp_path / "out", rows))))
    assert (
        "'cat' and 'dog' 4 rows of 'cat' predicted as 'dog', 0 the other way; 4 rows wrong in all."
        in text
    )
    assert "Always answering 'cat' would have accuracy 0.5000." in text
    assert "4 rows look mislabelled" in text and text.count("looks mislabelled") == 4
    assert "Yes, as far as these rows can tell" in text
    sure = scored_rows([f"text {n}" for n in range(100)], ("cat", "dog"), truth, logits * 1.0)
    sure.logits[::3] = sure.logits[::3].flip(1) * 3
    text = checked(report_of(read_run(write_run(tmp_path / "sure", sure))))
    assert "No: too sure of itself" in text


def test_a_weak_model_and_a_calibrated_one(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", random_rows(200, ("a", "b"), sure=0.5))
    text = checked(report_of(read_run(out)))
    assert "This model cannot tell It contradicts the labels of " in text
    assert "looks mislabelled" not in text and "fitted on" not in text
    report = json.loads((out / "evaluation.json").read_text())
    report["calibration"] = {
        "temperature": 1.5,
        "threshold_for": "f1",
        "thresholds": {"b": 0.375},
        "fitted_on": {"data": NASTY, "rows": 99},
        "in_sample": False,
        "before": {"nll": 0.5, "ece": 0.25, "f1": 0.5},
        "after": {"nll": 0.375, "ece": 0.125, "f1": 0.75},
        "notes": [],
    }
    (out / "evaluation.json").write_text(json.dumps(report))
    text = checked(report_of(read_run(out)))
    assert "Fitted on 99 rows of <script>" in text and text.count("temperature 1.5, folded") == 1
    assert "NLL 0.5000 -> 0.3750, ECE 0.2500 -> 0.1250, f1 0.5000 -> 0.7500 on these rows." in text


def test_a_run_without_errors_or_rows(tmp_path: Path) -> None:
    rows = scored_rows(["a", "b"], ("x", "y"), [0, 1], [[5, 0], [0, 5]])
    text = checked(report_of(read_run(write_run(tmp_path / "right", rows))))
    assert "No row is predicted wrong." in text and "None: every row is right" in text
    out = write_run(tmp_path / "none", rows)
    for name in ("evaluation.json", "probabilities.parquet", "errors.jsonl"):
        (out / name).unlink()
    assert "No rows were evaluated" in checked(report_of(read_run(out)))
    undefined = scored_rows(["a", "b"], ("x", "y"), [0, 1], [[np.nan, 0], [0, 5]])
    assert "undefined" in checked(report_of(read_run(write_run(tmp_path / "nan", undefined))))
    of = {"model": "out", "data": "t.csv", "rows": 2}
    text = checked(report_of(read_run(write_run(tmp_path / "scores", rows, evaluated=of))))
    assert "Evaluated rows" in text and "2 rows of t.csv." in text and "Settings" not in text


def test_a_report_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_run(tmp_path / "out", scored_rows(["a", "b"], ("x", "y"), [0, 1], [[5, 0], [0, 5]]))
    after_run.write_report(out)
    assert capsys.readouterr().err.strip() == f"Report: {out / 'report.html'}"
    (out / "report.html").write_text("mine")
    after_run.write_report(out)
    said = capsys.readouterr().err
    assert said.startswith("The report was not written: ") and said.count("\n") == 1
    assert (out / "report.html").read_text() == "mine"
    after_run.attempt("Not written", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert capsys.readouterr().err == "Not written: ZeroDivisionError: division by zero\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    after_run.write_report(out)
    assert capsys.readouterr().err == ""
