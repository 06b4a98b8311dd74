"""The model card: what it says, that it can be public, whose it is, and that its snippets run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from model_folders import MULTI, REGRESSION, SINGLE, evaluation_of, make_run

from bertdist import cli
from bertdist.core.atomic_io import find_damage, write_folder
from bertdist.reporting.model_card import create_card, is_own, name_model, write_model_card


def card_of(best: Path) -> ModelCard:
    write_model_card(best)
    return ModelCard((best / "README.md").read_text(encoding="utf-8"))


# ---- What it says


def test_metadata_and_scores_of_two_labels(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path / "out"))
    data = card.data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["bertdist"],
        "metrics": ["loss", "accuracy", "f1"],
    }
    (result,) = index[0]["results"]
    assert result["task"] == {"type": "text-classification"}
    assert result["dataset"] == {"name": "dev.csv", "type": "custom", "split": "validation"}
    assert result["metrics"] == [
        {"type": "loss", "value": 0.25, "name": "loss"},
        {"type": "accuracy", "value": 0.9, "name": "accuracy"},
        {"type": "f1", "value": 0.875, "name": "f1_macro"},
    ]
    for line in (
        "# Classifier of texts: bad or good",
        "| 1 | `good` | 30 | 0.75 | 0.5 | 0.6 |",
        "| `accuracy` | 0.9 | 0.85 to 0.95 |",
        "| `bad` | 29 | 1 |",
        "| Training | 120 | `reviews.csv` |",
        "| Validation | 60 | `dev.csv` |",
        "Text in `review`.",
        "- Texts are cut after 64 tokens: what follows has no influence.",
        "- Its highest probability is below 0.7 for 2 of 5 validation rows; 50% of these answers "
        "are right, and 67% of the others.",
        "| `learning_rate` | 3e-05 |",
        "bertdist 0.2.0, torch 2.13.0, transformers 5.23.0.",
        "This model (bert, 12 parameters) gives each text one of 2 labels. It was fine-tuned from "
        "a model in a local folder with bertdist.",
    ):
        assert f"\n{line}\n" in card.text.replace("\\_", "_"), line


@pytest.mark.parametrize("evaluation", [None, {}, evaluation_of(("bad", "good"), SINGLE, step=19)])
def test_scores_are_those_of_the_weights_or_there_are_none(
    tmp_path: Path, evaluation: dict[str, Any] | None
) -> None:
    card = card_of(make_run(tmp_path / "out", evaluation=evaluation))
    has_scores = evaluation is None
    assert ("## Scores" in card.text) == ("model-index" in card.data.to_dict()) == has_scores
    assert "| 0 | `bad` |" in card.text
    assert ("no validation rows" in card.text) == (evaluation == {})


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    best = make_run(tmp_path / "out", evaluation={})
    assert "had not finished" not in card_of(best).text
    status = {"state": "preempted", "step": 20, "reason": "SIGTERM"}
    (best.parent / "status.json").write_text(json.dumps(status))
    text = card_of(best).text
    assert "- The training had not finished." in text and "no validation rows" not in text


def test_a_hundred_and_fifty_labels(tmp_path: Path) -> None:
    labels = tuple(f"label {i}" for i in range(150))
    text = card_of(make_run(tmp_path / "out", labels=labels)).text
    assert "# Classifier of texts: 150 labels" in text and "All 150 labels</summary>" in text
    assert all(f"| {i} | `label {i}` | 30 |" in text for i in range(150))
    pairs = re.findall(r"^\| `label (\d+)` \| `label (\d+)` \| 1 \|$", text, re.MULTILINE)
    assert len(pairs) == 10 and all(int(b) == (int(a) + 1) % 150 for a, b in pairs)


def test_names_of_labels_are_no_markdown(tmp_path: Path) -> None:
    labels = ("a|b", "`c`", "<script>x</script>", "two\nlines", "---", "**", "")
    text = card_of(make_run(tmp_path / "out", labels=labels)).text
    table = text.split("## Labels")[1].split("##")[0].strip().splitlines()[2:]
    assert len(table) == 2 + len(labels), "one line per label"
    names = [re.split(r"(?<!\\)\|", line)[2].strip() for line in table[2:]]
    assert names == [
        "`a\\|b`", "`` `c` ``", "`<script>x</script>`", "`two\\nlines`", "`---`", "`**`", "`  `"
    ]  # fmt: skip
    title = text.strip().splitlines()[0]
    assert title == "# Classifier of texts: 7 labels"


def test_a_name_in_the_title_is_escaped(tmp_path: Path) -> None:
    text = card_of(make_run(tmp_path / "out", labels=("<b>", "*x*"))).text
    assert r"# Classifier of texts: \<b\> or \*x\*" in text


# ---- Nothing private


def test_no_path_user_or_host_is_in_it(tmp_path: Path) -> None:
    best = make_run(
        tmp_path / "out",
        test_file="https://anna:secret@host.example/private/test.csv?token=abc",
        dataset_name=None,
    )
    text = best.parent.joinpath("README.md").as_posix()
    text = str(card_of(best))
    for private in ("anna", "/home", "s3:", "bucket", "secret", "token=", "host.example", "Linux"):
        assert private not in text, private
    assert str(tmp_path) not in text and "reviews.csv" in text


def test_a_base_model_is_named_if_it_is_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    best = make_run(tmp_path / "out", model_name_or_path="google/bert")
    assert "base_model" not in card_of(best).data.to_dict(), "it may be a folder google/bert"
    (tmp_path / "cache" / "models--google--bert").mkdir(parents=True)
    card = card_of(best)
    assert card.data.base_model == "google/bert"
    assert "fine-tuned from [google/bert](https://huggingface.co/google/bert) with" in card.text
    assert card_of(best).data.base_model == "google/bert"
    (best / "README.md").unlink()
    monkeypatch.chdir(tmp_path)
    Path("google/bert").mkdir(parents=True)  # which the loader takes
    assert "base_model" not in card_of(best).data.to_dict()


@pytest.mark.parametrize(
    ("settings", "dataset", "validation"),
    [
        ({"task_name": "sst2"}, "nyu-mll/glue", "`nyu-mll/glue/sst2`, split `validation`"),
        ({"task_name": "mnli"}, "nyu-mll/glue", "`nyu-mll/glue/mnli`, split `validation_matched`"),
        ({"dataset_name": "a/b", "validation_split": "dev"}, "a/b", "`a/b`, split `dev`"),
        ({"dataset_name": "/home/anna/rows"}, None, "`rows`, split `validation`"),
        ({"train_file": ["hf://datasets/a/b/x.csv"]}, "a/b", "`dev.csv`"),
        (
            {"train_file": ["/x/all.csv"], "validation_file": None, "validation_split": "0.1"},
            None,
            "0.1 of the rows of `all.csv`, held out from training",
        ),
        (
            {"train_file": ["/tmp/bertdist-x1/train_rows"], "validation_file": None},
            None,
            "rows of rows given in Python, held out from training",
        ),
    ],
)
def test_where_the_rows_are_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    dataset: str | None,
    validation: str,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "datasets--a--b").mkdir(parents=True)
    of_hub = {"train_file": None, "validation_file": None} if "train_file" not in settings else {}
    card = card_of(make_run(tmp_path / "out", **(of_hub | settings)))
    assert card.data.to_dict().get("datasets") == ([dataset] if dataset else None)
    assert f"| Validation | 60 | {validation} |" in card.text


# ---- Whose it is


def test_an_edited_card_is_kept(tmp_path: Path) -> None:
    best = make_run(tmp_path / "out")
    path = best / "README.md"
    assert write_model_card(best) == f"Model card: {path}"
    first = path.read_text()
    assert is_own(first) and find_damage(best, ("config.json",)) is None
    write_model_card(best)
    assert path.read_text() == first
    path.write_text(first.replace("license: unknown", "license: mit"))
    assert write_model_card(best) == f"{path} was written or edited by hand: it is kept as it is."
    assert "license: mit" in path.read_text()
    path.write_text("# Mine\n")
    assert "kept" in write_model_card(best) and path.read_text() == "# Mine\n"


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    best = make_run(tmp_path / "out")
    (tmp_path / "mine.md").write_text("# Mine\n")
    (best / "README.md").symlink_to(tmp_path / "mine.md")
    assert "kept" in write_model_card(best)
    assert (tmp_path / "mine.md").read_text() == "# Mine\n"


def test_other_weights_keep_an_edited_card_and_replace_an_own_one(tmp_path: Path) -> None:
    best = make_run(tmp_path / "out")
    write_model_card(best)
    path, config = best / "README.md", json.loads((best / "config.json").read_text())

    def fill(folder: Path) -> None:
        config["bertdist"]["step"] = 30
        (folder / "config.json").write_text(json.dumps(config))

    assert write_folder(best, fill) is None, "nothing is moved to best.kept"
    assert "after step 20" in path.read_text() and find_damage(best, ("config.json",)) is None
    write_model_card(best)
    assert "after step 20" not in path.read_text()
    path.write_text("# Mine\n")
    assert write_folder(best, fill) is None and path.read_text() == "# Mine\n"
    assert sorted(x.name for x in best.parent.iterdir() if "best" in x.name) == ["best"]


def test_fields_of_a_user_stay(tmp_path: Path) -> None:
    best = make_run(tmp_path / "out")
    text, is_edited = create_card(best, {"license": "mit", "language": ["en", "no"]})
    (best / "README.md").write_text(text)
    write_model_card(best)
    data = card_of(best).data
    assert (data.license, data.language, is_edited) == ("mit", ["en", "no"], False)
    assert "language of the training texts" not in text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# Mine\n", "---\nlicense: mit\n---\n\n# Mine\n"),
        ("---\na: 1 # why\n---\n# Mine\n", "---\na: 1 # why\nlicense: mit\n---\n# Mine\n"),
        ("---\nlicense:\n- x\n- y\nb: 2\n---\n# M\n", "---\nlicense: mit\nb: 2\n---\n# M\n"),
        ("---\nlicense: x\n---\nlicense: x\n", "---\nlicense: mit\n---\nlicense: x\n"),
    ],
)
def test_fields_of_an_edited_card(tmp_path: Path, before: str, after: str) -> None:
    best = make_run(tmp_path / "out")
    (best / "README.md").write_text(before)
    assert create_card(best, {"license": "mit"}) == (after, True)


def test_a_folder_without_its_run_has_a_card_of_the_model(tmp_path: Path) -> None:
    best = make_run(tmp_path / "out").rename(tmp_path / "best")
    text, _ = create_card(best)
    assert "| 0 | `bad` |" in text and "## Scores" not in text and "## Training" not in text


# ---- Its snippets


def calibration(temperature: float | None, score: str, **thresholds: float) -> dict[str, Any]:
    """As --calibrate and --tune_thresholds write it."""
    return {
        "temperature": temperature,
        "threshold_for": score if thresholds else None,
        "thresholds": thresholds,
        "fitted_on": {"data": "dev.csv", "rows": 60},
        "in_sample": True,
        "before": {"nll": 0.5, "ece": 0.125, score: 0.5},
        "after": {"nll": 0.25, "ece": 0.0625, score: 0.625},
        "notes": [],
    }


VARIANTS: dict[str, Any] = {
    "one label": (SINGLE, ("bad", "good"), False, {}),
    "one label by a threshold": (SINGLE, ("bad", "good"), False, {"good": 0.999}),
    "several labels": (MULTI, ("joy", "fear", "love"), False, {}),
    "several labels by thresholds": (
        *(MULTI, ("joy", "fear", "love"), False),
        {"joy": 0.001, "fear": 0.999, "love": 0.001},
    ),
    "a number": (REGRESSION, ("score",), False, {}),
    "a number of pairs": (REGRESSION, ("score",), True, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_snippets_run(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variant: str,
) -> None:
    problem_type, labels, pairs, thresholds = VARIANTS[variant]
    fitted = calibration(None, "f1", **thresholds) if thresholds else None
    out = tmp_path / "out"
    best = make_run(out, tiny_model, problem_type, labels, pairs=pairs, calibration=fitted)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write_model_card(best)
    text = name_model((best / "README.md").read_text(), str(best))
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "python", "bash"]
    printed = []
    names: dict[str, Any] = {}
    for _, block in blocks[:2]:
        capsys.readouterr()
        exec(block, names)
        printed.append(capsys.readouterr().out.strip())
    texts = (["A text to classify."], ["Its second text."])[: 1 + pairs]
    predictor, answer = names["predictor"], names["answer"]
    assert printed[1] == str(predictor(*texts))
    if problem_type == REGRESSION:
        given = predictor(*texts)[0]["score"]
        assert float(printed[0]) == pytest.approx(given, abs=1e-5)
    else:
        probabilities = dict(zip(labels, predictor.probabilities(*texts)[0].tolist(), strict=True))
        found = {x["label"]: x["score"] for x in ([answer] if isinstance(answer, dict) else answer)}
        assert found == pytest.approx({x: probabilities[x] for x in found}, abs=1e-5)
        best_label = max(probabilities, key=lambda x: probabilities[x])
        if problem_type == MULTI:
            above = [x for x in found if found[x] > thresholds.get(x, 0.5)]
            assert printed[0] == str(above) and set(found) == set(labels)
            assert not thresholds or sorted(above) == ["joy", "love"]
        else:
            assert printed[0] == ("bad" if thresholds else str(answer))
            assert thresholds or answer["label"] == best_label
    with pytest.raises(SystemExit) as end:
        cli.main(shlex.split(blocks[2][1])[1:])
    assert end.value.code == 0 and "classify" in capsys.readouterr().out


def test_what_was_fitted(tmp_path: Path) -> None:
    fitted = calibration(1.25, "f1_macro", bad=0.375)
    text = card_of(make_run(tmp_path / "out", calibration=fitted)).text
    assert (
        "A temperature of 1.25 is folded into the output layer; it was fitted on validation rows, "
        "negative log-likelihood 0.5 before and 0.25 after, expected calibration error 0.125 "
        "before and 0.0625 after.\n"
    ) in text
    assert "| `bad` | 0.375 |" in text and "## Probabilities" in text
    assert "## Probabilities" not in card_of(make_run(tmp_path / "other")).text


def test_a_sigmoid_would_be_seen(tiny_model: Path, tmp_path: Path) -> None:
    """The control of the number: another function of `pipeline` gives another answer."""
    from transformers import pipeline

    best = make_run(tmp_path / "out", tiny_model, REGRESSION, ("score",))
    classifier = pipeline("text-classification", model=str(best))
    scores = [classifier("A text.", function_to_apply=x)[0]["score"] for x in ("none", "sigmoid")]
    assert abs(scores[0] - scores[1]) > 1e-3


def test_metadata_are_yaml(tmp_path: Path) -> None:
    text, _ = create_card(make_run(tmp_path / "out"))
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
