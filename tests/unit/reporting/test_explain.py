"""Explanations by leaving out words: of a model whose weights of words are known."""

from pathlib import Path

import numpy as np
import pytest
from run_folders import scored_rows, write_run

from bertdist.core.types import Array
from bertdist.reporting import explain
from bertdist.reporting.run_folder import read_run
from bertdist.reporting.run_report import report_of

WEIGHTS = {"good": 2.0, "bad": -3.0, "Film": 0.5}


def probabilities(texts: list[str], pairs: list[str] | None) -> Array:
    joined = [f"{a} {b}" for a, b in zip(texts, pairs or [""] * len(texts), strict=True)]
    logit = np.array([sum(WEIGHTS.get(word, 0.0) for word in text.split()) for text in joined])
    positive = 1 / (1 + np.exp(-logit))
    return np.stack([1 - positive, positive], 1)


def test_the_words_of_a_mistake(tmp_path: Path) -> None:
    texts = ["A good  Film,\nnot bad", "good"]
    rows = scored_rows(texts, ("no", "yes"), [1, 1], probabilities(texts, None) * 9)
    run = read_run(write_run(tmp_path / "out", rows))
    assert run.validation is not None
    found = explain.explain_mistakes(run.validation, 5, probabilities)
    assert [*found] == [0]
    words = found[0].words
    assert "".join(word.space + word.text for word in words) == texts[0]
    by_word = {word.text: word.effect for word in words}
    full, without = probabilities([texts[0], "A Film, not bad"], None)[:, 0]
    assert by_word["good"] == pytest.approx(full - without) and by_word["good"] < 0
    assert by_word["bad"] > 0 and by_word["not"] == 0
    assert max(word.share for word in words) == 1
    assert found[0].summary.startswith("Most: 'bad' +0.") and "'no'" in found[0].about
    html = report_of(run, {"validation": found})
    assert 'class="for"' in html and 'class="against"' in html and "Most: &#39;bad&#39; +0." in html


def test_a_model_that_has_changed_since_is_said(tmp_path: Path) -> None:
    def other(texts: list[str], pairs: list[str] | None) -> Array:
        return np.tile([0.25, 0.75], (len(texts), 1))

    rows = scored_rows(["bad"], ("no", "yes"), [1], np.log(probabilities(["bad"], None)))
    run = read_run(write_run(tmp_path / "out", rows)).validation
    assert run is not None
    same, changed = (explain.explain_mistakes(run, 1, x)[0].summary for x in (probabilities, other))
    assert same == "Most: 'bad' +0.453."
    assert changed.endswith(
        "gives 0.25 now, 0.953 when the row was evaluated: the model, "
        "or a setting (--max_length), is another one."
    )


def test_pairs_long_texts_and_texts_without_blanks(tmp_path: Path) -> None:
    texts = ["bad " * (explain.MOST_WORDS + 3), "中文字"]
    rows = scored_rows(texts, ("no", "yes"), [1, 1], [[1, 0], [1, 0]], pairs=["good", "x"])
    run = read_run(write_run(tmp_path / "out", rows))
    assert run.validation is not None
    found = explain.explain_mistakes(run.validation, 2, probabilities)
    assert f"only the first {explain.MOST_WORDS} words were left out" in found[0].summary
    assert len(found[0].words) == explain.MOST_WORDS + 4 and found[0].words[-1].space == "\n"
    assert [word.text for word in found[1].words] == ["中", "文", "字", "x"]


def test_several_labels_and_numbers(tmp_path: Path) -> None:
    rows = scored_rows(["good bad"], ("a", "b"), [[1, 0]], [[1, 2]], "multi")
    run = read_run(write_run(tmp_path / "multi", rows))
    assert run.validation is not None
    (found,) = explain.explain_mistakes(run.validation, 2, probabilities).values()
    assert "'b'" in found.about  # given and wrong
    rows = scored_rows(["good bad"], ("y",), [1.0], [[2.0]], "regression")
    run = read_run(write_run(tmp_path / "number", rows))
    assert run.validation is not None
    (found,) = explain.explain_mistakes(run.validation, 2, probabilities).values()
    assert found.about == "How much the number changes by each word:"
