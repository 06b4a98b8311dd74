"""Several runs side by side: answers in words, rows that changed, settings that differ, files, page and JSON."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_runs import MULTI, REGRESSION, softmax, write_rows, write_run
from sklearn.metrics import f1_score

from bertdist.core.args import TRAIN_SECTIONS
from bertdist.core.errors import ConfigError
from bertdist.report import run as report
from bertdist.reporting.comparison import Comparison, compare_runs, run_names
from bertdist.reporting.comparison_page import page_of
from bertdist.reporting.comparison_table import show_comparison
from bertdist.reporting.config import ReportConfig, check_report, read_report_config
from bertdist.reporting.differing_settings import DECIDES_NOTHING, FOLDER, SEED
from bertdist.reporting.run_folder import read_run

HOSTILE = "<script>alert(\"x\")</script>\u202e\x07 & 'a'"


def answers(rows: int, right: float, seed: int, labels: int = 2) -> tuple[Any, Any]:
    """Truth (the same for every seed), and probabilities that are right so often."""
    truth = np.random.default_rng(0).integers(labels, size=rows)
    rng = np.random.default_rng(seed)
    given = np.where(rng.random(rows) < right, truth, (truth + 1) % labels)
    return truth, softmax(rng.random((rows, labels)) + 3 * np.eye(labels)[given])


def comparison_of(tmp_path: Path, *runs: dict[str, Any]) -> Comparison:
    folders = []
    for number, given in enumerate(runs):
        options = {"right": 0.8, "rows": 400, "labels": 2} | given
        truth, probabilities = answers(
            options.pop("rows"), options.pop("right"), number + 1, options.pop("labels")
        )
        folders.append(write_run(tmp_path / f"run{number}", truth, probabilities, **options))
    return compare_runs([read_run(folder) for folder in folders])


def test_a_better_run_is_called_better_with_what_differs(tmp_path: Path) -> None:
    found = comparison_of(
        tmp_path, {"right": 0.7}, {"right": 0.9, "config": {"learning_rate": 2e-5}}
    )
    (split,) = found.splits
    assert (split.name, split.rows, split.main_score, split.best_run) == (
        "validation",
        400,
        "accuracy",
        1,
    )
    (pair,) = split.differences["accuracy"]
    assert found.verdict[0] == (
        f"run1 is better than run0: accuracy is {100 * pair.value:.1f} points higher (95% interval "
        f"{100 * pair.interval[0]:.1f} to {100 * pair.interval[1]:.1f} points), {split.main.values[1]:.4g} "  # type: ignore[index, union-attr]
        f"against {split.main.values[0]:.4g} on the same 400 validation rows."  # type: ignore[union-attr]
    )
    assert "have chosen the best weights" in found.verdict[1]
    decisive = [(each.name, each.values) for each in found.settings if each.decides]
    assert decisive == [("learning_rate", ("5e-05", "2e-05"))]
    assert len(found.settings) == 1, "the folders of the runs are no difference"
    assert not found.seeds_only and found.facts == ()
    (changes,) = split.changes
    right = [split.main.values[i] * 400 for i in (0, 1)]  # type: ignore[union-attr]
    assert changes.gained - changes.lost == round(right[1] - right[0]) and changes.p_value < 1e-6  # type: ignore[operator]
    first = changes.gained_rows[0]
    assert first.text == f"text {first.row}" and first.truth in ("no", "yes")
    assert first.answers[0]["label"] != first.truth == first.answers[1]["label"]


def test_lower_losses_and_undecided_scores_in_words(tmp_path: Path) -> None:
    by_loss = {"metric_for_best_model": "loss"}
    found = comparison_of(tmp_path / "loss", {"right": 0.9, "config": by_loss}, {"right": 0.7, "config": by_loss})  # fmt: skip
    assert found.verdict[0].startswith("run0 is better than run1: loss is ")
    assert " lower (95% interval " in found.verdict[0] and "interval -" not in found.verdict[0]
    assert found.splits[0].best_run == 0
    found = comparison_of(tmp_path / "same", {}, {"config": {"learning_rate": 1e-5}})
    assert found.verdict[0].startswith("Not sure: accuracy of run")
    assert found.verdict[0].endswith("contains 0.") and found.splits[0].best_run is None
    assert found.verdict[1].startswith("To be sure of a difference of this size, about ")
    assert not any("Surely different" in sentence for sentence in found.verdict)
    same = answers(50, 0.8, 1)
    runs = [read_run(write_run(tmp_path / "equal" / name, *same)) for name in "ab"]
    found = compare_runs(runs)
    assert found.verdict[0].startswith("No difference: both have accuracy ")
    assert found.verdict[-1] == "No setting that decides what is learned differs between the runs."


def test_several_runs_are_compared_together(tmp_path: Path) -> None:
    settings = [{"config": {"learning_rate": rate}} for rate in (1e-5, 2e-5, 3e-5)]
    rights = (0.6, 0.95, 0.75)
    better = [{**each, "right": right} for each, right in zip(settings, rights, strict=True)]
    found = comparison_of(tmp_path / "1", *better)
    assert found.verdict[0].startswith(
        "run1 is better than each of the other 2 runs: it has the highest"
    )
    assert found.verdict[1].startswith("3 comparisons of two runs were made")
    assert found.splits[0].best_run == 1 and len(found.splits[0].differences["accuracy"]) == 3
    assert [len(row) for row in found.splits[0].agreement] == [3, 3, 3]
    found = comparison_of(tmp_path / "2", settings[0], {**settings[1], "right": 0.5}, settings[2])
    assert found.verdict[0].startswith("Not sure which of 3 runs is the best: run")
    assert found.verdict[0].endswith("It is better than run1.")
    page = page_of(found)
    assert "Not of the best run" in page and "In the order run0, run1" in page
    linked = re.findall(r'href="#(changes-\d)">Look at them', page)
    assert len(linked) == 1 and f'id="{linked[0]}"' in page


def test_runs_that_differ_by_seed_have_a_spread_and_no_winner(tmp_path: Path) -> None:
    runs = [
        {"right": right, "config": {"seed": seed}} for seed, right in enumerate((0.6, 0.9, 0.8))
    ]
    found = comparison_of(tmp_path / "seeds", *runs)
    values = found.splits[0].main.values  # type: ignore[union-attr]
    (spread,) = found.seeds
    assert found.seeds_only and spread.runs == (0, 1, 2)
    assert (spread.mean, spread.deviation) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1))
    )
    assert found.verdict == (
        f"The 3 runs differ by their seed only, so none is a better setting: accuracy is {spread.mean:.4g} on average, "
        f"with a standard deviation of {spread.deviation:.4g} ({min(values):.4g} to {max(values):.4g}).",
    )
    runs[2]["config"] = {"seed": 2, "learning_rate": 1e-5}
    found = comparison_of(tmp_path / "control", *runs)
    assert not found.seeds_only and [each.runs for each in found.seeds] == [(0, 1), (2,)]


def test_other_training_rows_are_a_difference_that_decides(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, {}, {"training_rows": "90 rows, fedcba9876543210"})
    (each,) = [each for each in found.settings if each.decides]
    assert (each.name, each.values) == (
        "training rows",
        ("100 rows (01234567)", "90 rows (fedcba98)"),
    )
    assert found.x_axis == "tokens" and found.loss_curves[1].x == (100.0, 200.0)
    assert found.score_curves["loss"][0].x == (100.0, 200.0), "of the training lines of these steps"


def test_only_shared_rows_are_compared_and_none_is_no_answer(tmp_path: Path) -> None:
    texts = [f"text {row}" for row in range(100, 500)]
    truth, probabilities = answers(600, 0.8, 9)
    wide = write_run(tmp_path / "wide", truth[:400], probabilities[:400])
    other = write_run(tmp_path / "other", truth[100:500], probabilities[100:500], texts=texts)
    found = compare_runs([read_run(wide), read_run(other)])
    assert found.splits[0].rows == 300 and found.splits[0].totals == (400, 400)
    assert "only the 300 rows that they share" in found.splits[0].notes[0]
    assert found.splits[0].changes[0].gained == 0, "the same answers"
    apart = write_run(
        tmp_path / "apart", truth, probabilities, texts=[f"new {i}" for i in range(600)]
    )
    found = compare_runs([read_run(wide), read_run(apart)])
    assert found.verdict[0].startswith(
        "No answer. The runs were evaluated on different rows (wide 400, apart 600)"
    )
    assert found.splits[0].scores == () and "Cannot be compared" in page_of(found)


def test_test_rows_decide_where_all_runs_have_them(tmp_path: Path) -> None:
    for number, right in enumerate((0.6, 0.9)):
        folder = write_run(tmp_path / f"run{number}", *answers(300, 0.8, 5))
        truth, probabilities = answers(200, right, number)
        write_rows(
            folder, truth, probabilities, texts=[f"t{i}" for i in range(200)], prefix="test_"
        )
    found = compare_runs([read_run(tmp_path / name) for name in ("run0", "run1")])
    assert [split.name for split in found.splits] == ["test", "validation"]
    assert found.verdict[0].endswith("on the same 200 test rows.") and found.splits[0].best_run == 1
    assert not any("have chosen" in sentence for sentence in found.verdict)


def test_other_tasks_and_labels_are_said(tmp_path: Path) -> None:
    truth, probabilities = answers(100, 0.8, 1)
    a = write_run(tmp_path / "a", truth, probabilities)
    wide = np.concatenate([probabilities, np.zeros((100, 1))], axis=1)
    b = write_run(tmp_path / "b", truth, wide, labels=("no", "yes", "perhaps"))
    found = compare_runs([read_run(a), read_run(b)])
    assert "a does not know the label perhaps: it has them always wrong" in " ".join(
        found.splits[0].notes
    )
    c = write_run(
        tmp_path / "c", [0.5] * 100, probabilities[:, :1], labels=("n",), problem_type=REGRESSION
    )
    found = compare_runs([read_run(a), read_run(c)])
    assert "different tasks" in found.verdict[0]


def test_page_table_and_json_of_hostile_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("<b>one", "two\u202e")):
        truth, probabilities = answers(60, 0.7, number + 1)
        texts = [f"{HOSTILE} {row}" for row in range(60)]
        write_run(
            tmp_path / name,
            truth,
            probabilities,
            labels=("<i>no", "yes\x1b[31m"),
            texts=texts,
            config={"learning_rate": number, "train_file": [f"{HOSTILE}{number}"]},
            environment={"command": ["bertdist", HOSTILE]},
        )
    config = read_report_config(["<b>one", "two\u202e", "--json", "out.json"])
    check_report(config)
    assert report(config) == 0
    page, shown = Path("comparison.html").read_text(), capsys.readouterr().out
    for text in ("<script>alert", "<b>one", "<i>no", "\u202e", "\x1b", "\x07"):
        assert text not in page, text
    assert "&lt;script&gt;alert" in page and "&lt;i&gt;no" in page
    assert "\u202e" not in shown and "\x1b[31m" not in shown
    assert (
        "rows turn right" in shown
        and "learning_rate" in shown
        and "Report: comparison.html" in shown
    )
    found = json.loads(Path("out.json").read_text())
    assert found["names"] == ["<b>one", "two\u202e"] and found["verdict"][0] in shown.replace(
        "\n", " "
    ).replace("\\u202e", "\u202e")
    assert found["splits"][0]["differences"]["accuracy"][0]["interval"][0] is not None
    assert HOSTILE in found["splits"][0]["changes"][0]["gained_rows"][0]["text"]


@pytest.mark.parametrize("kind", [MULTI, REGRESSION, "150 labels"])
def test_pages_of_other_tasks(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(3)
    runs = []
    for number in range(3):
        options: dict[str, Any] = {"config": {"learning_rate": number}}
        if kind == MULTI:
            table = np.random.default_rng(0).random((80, 4)) < 0.4
            truth: Any = [np.flatnonzero(row).tolist() for row in table]
            probabilities = np.clip(table * 0.5 + 0.6 * rng.random((80, 4)), 0, 1)
            options |= {"problem_type": MULTI, "labels": list("abcd")}
        elif kind == REGRESSION:
            truth = np.random.default_rng(0).normal(size=80).tolist()
            probabilities = np.array(truth)[:, None] + 0.3 * (number + 1) * rng.normal(size=(80, 1))
            options |= {"problem_type": REGRESSION, "labels": ["grade"]}
        else:
            truth, probabilities = answers(600, 0.7, number + 1, 150)
            options["labels"] = [f"label {i}" for i in range(150)]
        runs.append(read_run(write_run(tmp_path / f"run{number}", truth, probabilities, **options)))
    found = compare_runs(runs)
    split, page = found.splits[0], page_of(found)
    show_comparison(found)
    assert found.verdict[0] in " ".join(capsys.readouterr().out.split())
    assert "every two runs" in page and "<svg" in page
    if kind == REGRESSION:
        assert found.verdict[0].startswith(
            "run0 is better than each of the other 2 runs: it has the lowest mse"
        )
        assert split.changes[1].lost > split.changes[1].gained and "farther" in page
        assert split.labels == () and split.never_right == 0
    else:
        assert split.changes[0].gained_rows and split.never_right > 0 and len(split.labels) > 3
        sizes = [abs(row.answers[0]["score"] - row.answers[1]["score"]) for row in split.changes[0].gained_rows] if kind != MULTI else [1]  # fmt: skip
        assert len(sizes) <= 20


def test_another_score_that_is_sure_is_named_where_the_main_one_is_not(tmp_path: Path) -> None:
    truth, probabilities = answers(300, 0.8, 1)
    blurred = (probabilities + 0.5) / 2  # the same answers, less sure
    runs = [
        write_run(tmp_path / name, truth, p) for name, p in (("a", probabilities), ("b", blurred))
    ]
    found = compare_runs([read_run(folder) for folder in runs])
    assert found.verdict[0].startswith("No difference: both have accuracy ")
    assert found.verdict[1] == "Surely different are: loss."


def test_names_tell_runs_apart() -> None:
    assert run_names(["x/out1", "y/out2"]) == ("out1", "out2")
    assert run_names(["x/out", "y/out"]) == ("x/out", "y/out")


def test_an_evaluation_is_compared_with_the_rows_of_a_run_that_are_its_own(tmp_path: Path) -> None:
    """Here the test rows; what it was trained with is not known."""
    truth, probabilities = answers(200, 0.9, 4)
    run = write_run(tmp_path / "run", *answers(100, 0.8, 5))
    texts = [f"t{i}" for i in range(200)]
    write_rows(run, truth, probabilities, texts=texts, prefix="test_")
    evaluated = tmp_path / "evaluated"
    write_rows(evaluated, truth, answers(200, 0.6, 6)[1], texts=texts)
    report = json.loads((evaluated / "evaluation.json").read_text())
    report["evaluated"] = {"model": "m", "data": "t.tsv", "rows": 200}
    (evaluated / "evaluation.json").write_text(json.dumps(report))
    found = compare_runs([read_run(run), read_run(evaluated)])
    assert [(split.name, split.rows) for split in found.splits] == [("test", 200)]
    assert found.verdict[0].startswith("run is better than evaluated")
    assert found.settings == () and not found.has_settings
    assert not any("No setting" in sentence for sentence in found.verdict)
    assert "Not known" in page_of(found)


def test_a_setting_that_an_earlier_version_did_not_write_has_its_default(tmp_path: Path) -> None:
    written = {"weight_decay": 0.01, "num_train_epochs": 3.0}
    found = comparison_of(tmp_path / "1", {}, {"config": written})
    assert found.settings == ()
    found = comparison_of(tmp_path / "2", {}, {"config": written | {"weight_decay": 0.1}})
    assert [(x.name, x.values) for x in found.settings] == [("weight_decay", ("0.01", "0.1"))]
    found = comparison_of(tmp_path / "3", {}, {"config": written | {"freeze": ["embeddings", "2"]}})
    assert [x.values for x in found.settings] == [("not set", "embeddings, 2")]


def test_settings_without_effect_exist() -> None:
    known = {x.name for section in TRAIN_SECTIONS for x in dataclasses.fields(section)}
    assert {*DECIDES_NOTHING, FOLDER, SEED} - known == set()


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", *answers(20, 0.8, 1)))
    with pytest.raises(ConfigError, match="A run is given twice"):
        compare_runs([run, run])
    with pytest.raises(ConfigError, match="1 runs are to be compared; expected 2 to 20"):
        compare_runs([run])
    with pytest.raises(ConfigError, match="--json is for the comparison of several runs"):
        read_report_config(["a", "--json", "x.json"])
    config = ReportConfig(runs=[str(tmp_path / "a")] * 2, json=str(tmp_path / "a" / "config.yaml"))
    with pytest.raises(ConfigError, match=r"--json .* would replace a file of --runs"):
        check_report(config)


def test_outputs_that_would_replace_a_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of an evaluation too, the page itself, and a page that is no page."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_rows(tmp_path / name, *answers(20, 0.8, 1))
        report = json.loads((tmp_path / name / "evaluation.json").read_text())
        (tmp_path / name / "evaluation.json").write_text(json.dumps(report | {"evaluated": {}}))
    (tmp_path / "a" / "predictions.jsonl").write_text("{}\n")
    (tmp_path / "mine.html").write_text("mine")
    for given, words in (
        ({"json": "a/predictions.jsonl"}, "would replace a file of the run in"),
        ({"json": "a/probabilities.parquet"}, "would replace a file of the run in"),
        ({"json": "comparison.html"}, "is the page as well"),
        ({"json": "x", "output": "x"}, "is the page as well"),
        ({"output": "mine.html"}, "was not written by bertdist"),
        ({"output": "none/x.html"}, "there is no folder none"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_report(ReportConfig(runs=["a", "b"], **given))
    check_report(ReportConfig(runs=["a", "b"], json="a/x.json", output="a/report.html"))


def test_scores_of_different_positive_labels_are_not_compared(tmp_path: Path) -> None:
    scores = {"loss": 0.5, "f1": 0.5, "accuracy": 0.5}
    first, other = (
        {"config": {"positive_label": x}, "scores": scores, "rows": 40} for x in ("no", "yes")
    )
    found = comparison_of(tmp_path / "same", first, first).splits[0]
    truth, probabilities = answers(40, 0.8, 1)
    right = f1_score(truth, probabilities.argmax(1), pos_label=0)
    assert found.main_score == "f1" and found.scores[1].values[0] == pytest.approx(right)
    assert right != pytest.approx(f1_score(truth, probabilities.argmax(1)))
    found = comparison_of(tmp_path / "differ", first, other).splits[0]
    assert [score.name for score in found.scores] == ["loss", "accuracy"]
    assert "f1 of the runs are of different labels (no, yes, --positive_label)" in found.notes[-1]
    report = {"evaluated": {"positive_label": "no"}, "scores": scores}
    for name in ("a", "b"):  # evaluations
        write_rows(tmp_path / name, truth, probabilities)
        (tmp_path / name / "evaluation.json").write_text(json.dumps(report))
    (found,) = compare_runs([read_run(tmp_path / name) for name in "ab"]).splits
    assert found.scores[1].values[0] == pytest.approx(right)
