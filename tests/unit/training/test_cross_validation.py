"""Cross-validation: the runs of the folds, their scores, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from forked import run_ranks
from rows import make_rows, write_rows

from bertdist.core.args import read_config
from bertdist.core.config import TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.data.load_data import load_records
from bertdist.training import cross_validation
from bertdist.training.cross_validation import cross_validate

ROWS, K = 40, 4
NEEDED = ["--model_name_or_path=m", "--output_dir=o", "--train_file=t.tsv", "--folds=3"]


@pytest.fixture(scope="module")
def words(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    rows = make_rows(ROWS, seed=3)
    rows += [{**row, "text": row["text"].upper()} for row in rows[:8]]
    file = write_rows(tmp_path_factory.mktemp("rows") / "rows.tsv", rows)

    def make(out: Path, *more: str) -> list[str]:
        flags = ["--model_name_or_path", str(tiny_model), "--train_file", str(file), "--use_cpu"]
        return [*flags, "--output_dir", str(out), "--folds", str(K), *more]

    return make


def validate(
    accelerator: Accelerator, words: list[str], stop_after: int = K
) -> tuple[bool, list[TrainConfig]]:
    """Whether all folds are done, and the runs. A run does nothing but write made-up scores."""
    runs: list[TrainConfig] = []

    def train(config: TrainConfig) -> bool:
        fold, ended = int(Path(config.run.output_dir).name), len(runs) < stop_after
        runs.append(config)
        if ended and accelerator.is_main_process:
            scores = {
                "loss": 0.5 + fold,
                "accuracy": 0.9 - 0.1 * fold,
                "mcc": None if fold == 1 else 0.5,
            }
            report = json.dumps({"step": 7, "scores": scores})
            Path(config.run.output_dir, "evaluation.json").write_text(report)
            rows = load_records(config.data, "validation")
            assert rows is not None
            wrong = [
                {"row": row, "file": "validation.jsonl", "line": row + 1, "text": rows[row].text}
                for row in (1, 0)
            ]
            errors = "".join(f"{json.dumps(entry)}\n" for entry in wrong)
            Path(config.run.output_dir, "errors.jsonl").write_text(errors)
        return ended

    finished = cross_validate(read_config(words), train)
    return finished, runs


def test_folds_divide_the_rows_and_their_scores_are_summed_up(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = words(tmp_path / "out", "--metrics", "accuracy", "mcc", "--learning_rate", "1e-4")
    seen = run_ranks(2, validate, arguments)
    assert all(finished for finished, _ in seen) and seen[0][1] == seen[1][1]
    held_out: list[set[str]] = []
    labels = []
    for fold, run in enumerate(seen[0][1]):
        assert run.run.output_dir == str(tmp_path / "out" / "folds" / str(fold))
        assert (run.run.folds, run.run.eval_every, run.optim.learning_rate) == (None, "never", 1e-4)
        assert run.task.metrics == ["accuracy", "mcc"]
        train, validation = load_records(run.data, "train"), load_records(run.data, "validation")
        assert validation is not None and len(train) + len(validation) == ROWS + 8
        texts = [{text.lower() for text in x.texts.to_pylist()} for x in (train, validation)]
        assert not texts[0] & texts[1]
        held_out.append(texts[1])
        labels.append(sum(validation[row].label == "positive" for row in range(len(validation))))
    assert len(set.union(*held_out)) == sum(map(len, held_out))  # every text in one fold
    assert max(labels) - min(labels) <= 4  # of 48: a fold may have the doubled texts
    report = json.loads((tmp_path / "out" / "cross_validation.json").read_text())
    assert report["folds"] == K and report["rows"] == ROWS + 8 and report["seed"] == 42
    assert [entry["fold"] for entry in report["per_fold"]] == [0, 1, 2, 3]
    assert [entry["rows"] for entry in report["per_fold"]] == [
        len(load_records(run.data, "validation") or ()) for run in seen[0][1]
    ]
    values = [0.9, 0.8, 0.7, 0.6]
    assert report["scores"]["accuracy"] == {
        "mean": pytest.approx(np.mean(values)),
        "std": pytest.approx(np.std(values, ddof=1)),
    }
    assert report["scores"]["mcc"] == {"mean": None, "std": None}  # undefined in a fold


def test_errors_of_a_fold_name_the_file_and_line_of_the_user(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = words(tmp_path / "out")
    file = Path(arguments[arguments.index("--train_file") + 1])
    text_at = file.read_text().splitlines()[0].split("\t").index("text")
    texts = [line.split("\t")[text_at] for line in file.read_text().splitlines()]
    for _ in range(2):  # the second time nothing is left to do
        run_ranks(1, validate, arguments)
        for fold in range(K):
            errors = tmp_path / "out" / "folds" / str(fold) / "errors.jsonl"
            entries = list(map(json.loads, errors.read_text().splitlines()))
            assert [entry["row"] for entry in entries] == [1, 0]
            for entry in entries:
                assert list(entry) == ["row", "file", "line", "text"]
                assert entry["file"] == "rows.tsv" and texts[entry["line"] - 1] == entry["text"]


def test_a_failed_start_leaves_nothing(words: Callable[..., list[str]], tmp_path: Path) -> None:
    config = read_config(words(tmp_path / "deep" / "out"))

    def fail(accelerator: Accelerator) -> None:
        def train(config: TrainConfig) -> bool:
            assert (Path(config.run.output_dir) / "train.jsonl").exists()
            raise ConfigError("no model")

        with pytest.raises(ConfigError, match="no model"):
            cross_validate(config, train)

    run_ranks(1, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_cross_validation_has_no_scores_and_resumes(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments, file = words(tmp_path / "out"), tmp_path / "out" / "cross_validation.json"
    ((finished, runs),) = run_ranks(1, validate, arguments, 2)
    assert not finished and len(runs) == 3 and not file.exists()
    ((finished, again),) = run_ranks(1, validate, arguments)
    assert finished and again[:3] == runs and file.exists()


def test_a_strangers_file_is_kept(words: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cross_validation.json").write_text('{"mine": 1}')
    arguments = words(tmp_path / "out")

    def tell(accelerator: Accelerator) -> str:
        with pytest.raises(ConfigError) as error:
            validate(accelerator, arguments)
        return str(error.value)

    assert run_ranks(1, tell)[0].startswith("No cross-validation wrote ")
    assert (tmp_path / "out" / "cross_validation.json").read_text() == '{"mine": 1}'


def test_glue_tasks_keep_their_metrics(tmp_path: Path) -> None:
    words = ["--model_name_or_path=m", "--output_dir=o", "--task_name=cola", "--folds=3"]
    task: Any = type("Task", (), {"problem_type": "regression", "labels": ()})
    records: Any = type("Records", (), {"pairs": None})
    run = cross_validation._fold_config(read_config(words), tmp_path, task, records, scored=True)
    assert run.task.metrics == ["matthews_correlation"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds=1"], "--folds is 1; expected at least 2."),
        (["--validation_file=v.tsv"], "--validation_file has no effect with --folds: each fold is"),
        (["--validation_split=0.1"], "--validation_split has no effect with --folds"),
        (["--test_split=0.1"], "--test_split has no effect with --folds"),
        (["--max_eval_samples=3"], "--max_eval_samples has no effect with --folds"),
        (["--streaming"], "--streaming has no effect with --folds: all rows are held in memory"),
        (["--train_weights=1"], "--train_weights has no effect with --folds"),
        (["--eval_every=never"], "--eval_every has no effect with --folds: each fold is scored once"),
        (["--early_stopping_patience=2"], "--early_stopping_patience has no effect with --folds"),
        (["--metric_for_best_model=loss"], "--metric_for_best_model has no effect with --folds"),
        (["--resume_from_checkpoint=c"], "each fold resumes its own newest checkpoint"),
        (["--dry_run"], "--dry_run shows the plan of one run"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config([*NEEDED, *words])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert read_config([*NEEDED, "--metrics=accuracy"]).run.folds == 3
