"""Whole runs through the real command line: killed, asked to stop, started again; every kind of file and task; what a run leaves.

Two real launches, shared by the tests of this file; what needs no process of its own is forked. A forked run is the undisturbed
twin of a launched one: the launch adds nothing to the arithmetic.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import Command, run_ranks
from launched import accelerate_launch
from rows import (
    assert_same_run,
    checkpoints_of,
    json_of,
    make_rows,
    run_main,
    run_train,
    step_log,
    tensors_of,
    words_of,
    write_rows,
    write_split,
)

from bertdist.core.args import read_config
from bertdist.core.atomic_io import find_damage

ROOT = Path(__file__).resolve().parents[2]
EPOCH, EPOCHS = 50, 4  # 400 rows in steps of 8
CADENCES = {
    "num_train_epochs": EPOCHS,
    "save_every": "40 steps",
    "log_every": "2 steps",
    "tokens_per_micro_batch": 200,
}


class Launch:
    """A command of `accelerate launch` that is running; the launcher is a fork."""

    def __init__(self, config: str, words: list[str], said: Path) -> None:
        options = ["--quiet", "--config_file", f"accelerate_configs/{config}.yaml"]
        self.process = Command(
            accelerate_launch,
            ["launch", *options, "bertdist/train.py", *words],
            said,
            {**os.environ, "HF_HOME": "/nonexistent"},
            cwd=ROOT,
        )
        self.out, self.said = Path(words[words.index("--output_dir") + 1]), said

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl tells of it."""
        deadline = time.monotonic() + 200
        over = False
        while not over:
            over = (
                time.monotonic() > deadline or self.process.poll() is not None
            )  # and look once more
            if (
                (self.out / "metrics.jsonl").exists()
                and step_log(self.out)[-1:]
                and step_log(self.out)[-1]["step"] >= step
            ):
                return
            time.sleep(0.01)
        raise AssertionError(f"ended, or too slow, before step {step}:\n{self.said.read_text()}")

    def kill(self) -> None:
        """SIGKILL to the launcher and everything below it, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [
                *psutil.Process(self.process.pid).children(recursive=True),
                psutil.Process(self.process.pid),
            ]:
                process.kill()
        self.process.wait()


@contextlib.contextmanager
def launched(config: str, words: list[str], said: Path) -> Iterator[Launch]:
    launch = Launch(config, words, said)
    try:
        yield launch
    finally:
        launch.kill()


@pytest.fixture(scope="module")
def killed_run(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], int]:
    """A run of one process, killed in the middle of its second epoch and started again: (folder, words, last step before the kill)."""
    folder = tmp_path_factory.mktemp("killed")
    words = words_of(tiny_model, folder / "out", write_split(folder, 400, 12), **CADENCES)
    reached = EPOCH * EPOCHS
    while (
        reached == EPOCH * EPOCHS
    ):  # again, where this process was held for so long that the run came to its end
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "said.txt").unlink(missing_ok=True)
        with launched("cpu", words, folder / "said.txt") as launch:
            launch.wait_for_step(EPOCH + 10)
            launch.kill()
        reached = step_log(folder / "out")[-1]["step"]
    with launched("cpu", words, folder / "said.txt") as launch:
        assert launch.process.wait(200) == 0, launch.said.read_text()
    return folder, words, reached


@pytest.mark.timeout(600)
def test_a_killed_run_started_again_equals_one_that_nobody_disturbed(
    killed_run: tuple[Path, list[str], int], tiny_model: Path
) -> None:
    folder, _, reached = killed_run
    assert EPOCH + 10 <= reached < EPOCH * EPOCHS
    said = (folder / "said.txt").read_text()
    assert "Resuming from " in said and "Traceback" not in said
    taken_over = r"^Previous run \(pid \d+ on .*\) did not end cleanly; lock taken over\.$"
    assert len(re.findall(taken_over, said, re.MULTILINE)) == 1
    straight = words_of(tiny_model, folder / "straight", write_split(folder, 400, 12), **CADENCES)
    run_ranks(1, run_train, straight)
    assert_same_run(folder / "out", folder / "straight")


# --- What a run leaves


@pytest.mark.timeout(600)
def test_a_run_folder_explains_itself(killed_run: tuple[Path, list[str], int]) -> None:
    folder, words, _ = killed_run
    out = folder / "out"
    files = {path.name for path in out.iterdir()}
    expected = "best checkpoints config.yaml environment.json errors.jsonl evaluation.json metrics.jsonl predictions.jsonl probabilities.parquet run.lock status.json"
    assert files == set(expected.split())
    assert read_config(["--config", str(out / "config.yaml")]) == read_config(
        [*words, "--mixed_precision", "no"]
    )  # as it was settled
    made_with = json_of(out / "environment.json")
    assert (
        made_with["device"] == "cpu"
        and made_with["processes"] == 1
        and made_with["packages"]["torch"]
    )
    assert json_of(out / "status.json") == {
        "state": "finished",
        "step": EPOCH * EPOCHS,
        "reason": "",
    }
    assert len(checkpoints_of(out)) == 2 and all(
        find_damage(out / "checkpoints" / name) is None for name in checkpoints_of(out)
    )
    assert sorted(os.listdir(out / "checkpoints" / checkpoints_of(out)[-1])) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert (
        not list(out.rglob("*.bin"))
        and not list(out.rglob("*.pt"))
        and not list(out.rglob("*.pkl"))
    ), "no pickle anywhere"


@pytest.mark.timeout(600)
def test_the_step_log_has_its_fields(killed_run: tuple[Path, list[str], int]) -> None:
    folder, _, _ = killed_run
    lines = json_of(folder / "out" / "metrics.jsonl")
    learned, scored, of_process = (
        [line for line in lines if line["kind"] == kind] for kind in ("train", "eval", "meter")
    )
    assert len(learned) + len(scored) + len(of_process) == len(lines)
    assert [line["step"] for line in learned] == list(range(2, EPOCH * EPOCHS + 1, 2)), (
        "each once, though some steps were taken twice"
    )
    assert [line["step"] for line in scored] == list(range(EPOCH, EPOCH * EPOCHS + 1, EPOCH))
    speed = {
        "tokens_per_second",
        "data_wait_seconds",
        "padding_factor",
        "model_tflops",
        "flop_utilization",
        "slowest_rank",
    }
    assert all(
        line.keys()
        == {"kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", *speed}
        for line in learned
    )
    assert all(line.keys() >= {"kind", "step", "epoch", "loss", "accuracy"} for line in scored)
    assert all(line["epoch"] == line["step"] / EPOCH for line in (*learned, *scored))
    assert all(line[name] > 0 for name in speed for line in learned)
    assert [line.keys() - speed for line in of_process] == [
        {"kind", "step", "finished", "train_steps", "train_seconds", "matmul_tflops"}
        | {"tokens_per_micro_batch", "evaluation_seconds", "saving_seconds"}
    ]
    assert of_process[0]["train_steps"] < EPOCH * EPOCHS, (
        "of the process that finished, not of the one that was killed"
    )
    assert all(
        line["padding_factor"] == line["slowest_rank"] == 1 for line in (*learned, *of_process)
    )
    assert learned[0]["loss"] > learned[-1]["loss"], "it learns"


@pytest.mark.timeout(600)
def test_the_best_predictions_and_scores_are_kept(killed_run: tuple[Path, list[str], int]) -> None:
    folder, _, _ = killed_run
    out = folder / "out"
    lines, scored = json_of(out / "predictions.jsonl"), json_of(out / "evaluation.json")
    assert all(line.keys() == {"row", "label", "score", "truth"} for line in lines)
    assert [(line["row"], line["truth"]) for line in lines] == [
        (i, row["label"]) for i, row in enumerate(make_rows(12, seed=2))
    ]
    assert (
        scored["scores"]["accuracy"] == sum(line["label"] == line["truth"] for line in lines) / 12
    )
    best = json_of(out / "best" / "config.json")
    assert (
        best["id2label"] == {"0": "negative", "1": "positive"}
        and best["problem_type"] == "single_label_classification"
    )
    columns = {"text_column": "text", "text_pair_column": None}
    assert best["bertdist"] == {"max_length": 128, "step": scored["step"], **columns}


# --- Kinds of files and of tasks


def finish(words: list[str], n: int = 1) -> str:
    """Run the command line to its end; what rank 0 said."""
    results = run_ranks(n, run_main, words)
    assert [code for code, _, _ in results] == [0] * n, results[0][1]
    return str(results[0][1])


def test_the_kind_of_file_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Texts with what each kind has to escape."""
    rows = [{**row, "text": f'{row["text"]} "so, and" \\ it'} for row in make_rows(20, seed=1)]
    for kind in ("tsv", "csv", "jsonl", "parquet"):
        files = write_split(tmp_path, 8, 8, kind)
        for path in files:
            assert path is not None
            if kind == "tsv":
                path.write_text(
                    "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows),
                    encoding="utf-8",
                )
            else:
                write_rows(path, rows)
        finish(words_of(tiny_model, tmp_path / kind, files, num_train_epochs=2))
        assert_same_run(tmp_path / kind, tmp_path / "tsv")


def test_many_labels_come_in_three_ways(tiny_model: Path, tmp_path: Path) -> None:
    """A list, a string with a delimiter, one 0/1 column a label: the same run. Some rows have no label at all."""
    names = ["bad", "long", "short"]
    sets = [
        [
            name
            for name, on in zip(
                names,
                ("dull" in row["text"], len(row["text"]) > 120, len(row["text"]) < 30),
                strict=True,
            )
            if on
        ]
        for row in make_rows(24, seed=1)
    ]
    assert [] in sets and any(len(labels) == 2 for labels in sets)
    texts = [row["text"] for row in make_rows(24, seed=1)]
    ways: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
        "list": (
            "jsonl",
            [{"text": text, "labels": labels} for text, labels in zip(texts, sets, strict=True)],
            {},
        ),
        "arrow": (
            "parquet",
            [{"text": text, "labels": labels} for text, labels in zip(texts, sets, strict=True)],
            {},
        ),
        "string": (
            "tsv",
            [
                {"text": text, "labels": "|".join(labels)}
                for text, labels in zip(texts, sets, strict=True)
            ],
            {"label_delimiter": "|"},
        ),
        "columns": (
            "csv",
            [
                {"text": text, **{name: int(name in labels) for name in names}}
                for text, labels in zip(texts, sets, strict=True)
            ],
            {"label_columns": names},
        ),
    }
    for way, (kind, rows, settings) in ways.items():
        files = write_split(tmp_path, 8, 8, kind)
        for path in files:
            assert path is not None
            write_rows(path, rows)
        said = finish(words_of(tiny_model, tmp_path / way, files, num_train_epochs=2, **settings))
        assert "multi-label classification, 3 labels: bad, long, short\n" in said
        assert_same_run(tmp_path / way, tmp_path / "list")
    lines = json_of(tmp_path / "list" / "predictions.jsonl")
    assert [line["truth"] for line in lines] == sets
    assert all(line.keys() == {"row", "labels", "truth"} for line in lines)
    assert {"f1_micro"} & step_log(tmp_path / "list", "eval")[0].keys(), step_log(
        tmp_path / "list", "eval"
    )[0]


def test_regression_on_pairs(tiny_model: Path, tmp_path: Path) -> None:
    files = write_split(tmp_path, 8, 8)
    others = [row["text"] for row in make_rows(30, seed=8)]
    rows = [
        {
            "sentence1": row["text"],
            "sentence2": other,
            "score": f"{abs(len(row['text']) - len(other)) / 50:.3f}",
        }
        for row, other in zip(make_rows(30, seed=9), others, strict=True)
    ]
    for path in files:
        assert path is not None
        write_rows(path, rows)
    said = finish(words_of(tiny_model, tmp_path / "out", files, num_train_epochs=3), n=2)
    assert "Task        regression\n" in said and "text in 'sentence1' and 'sentence2'" in said
    assert step_log(tmp_path / "out", "eval")[-1].keys() >= {"loss", "pearson", "spearman"}
    lines = json_of(tmp_path / "out" / "predictions.jsonl")
    assert [line["truth"] for line in lines] == pytest.approx([float(row["score"]) for row in rows])
    error = sum((line["score"] - line["truth"]) ** 2 for line in lines) / len(lines)
    assert json_of(tmp_path / "out" / "evaluation.json")["scores"]["loss"] == pytest.approx(
        error, rel=1e-5
    )
    best = json_of(tmp_path / "out" / "best" / "config.json")
    assert (
        best["problem_type"] == "regression" and best["bertdist"]["text_pair_column"] == "sentence2"
    )


def test_settings_of_a_real_run_work_together(tiny_model: Path, tmp_path: Path) -> None:
    """Smoothing, class weights, layer-wise rates, warmup, gradient checkpointing, an order of labels; two ranks."""
    settings = {
        "label_smoothing_factor": 0.1,
        "class_weights": "balanced",
        "layerwise_lr_decay": 0.8,
        "warmup_ratio": 0.2,
        "lr_scheduler_type": "cosine",
        "label_names": ["positive", "negative"],
        "metrics": ["accuracy", "f1_macro", "matthews_correlation", "roc_auc"],
        "metric_for_best_model": "f1_macro",
    }
    files = write_split(tmp_path, 30, 12)
    plain = words_of(
        tiny_model, tmp_path / "plain", files, num_train_epochs=2, dropout=0, **settings
    )
    finish(plain, n=2)
    assert step_log(tmp_path / "plain", "eval")[0].keys() >= {"loss", *settings["metrics"]}  # type: ignore[misc]
    assert json_of(tmp_path / "plain" / "best" / "config.json")["id2label"] == {
        "0": "positive",
        "1": "negative",
    }
    slim = words_of(
        tiny_model,
        tmp_path / "slim",
        files,
        num_train_epochs=2,
        dropout=0,
        **settings,
        gradient_checkpointing=True,
    )
    finish(slim, n=2)
    for name, tensor in tensors_of(tmp_path / "plain" / "best").items():
        assert (tensor - tensors_of(tmp_path / "slim" / "best")[name]).abs().max() < 1e-6
