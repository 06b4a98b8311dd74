"""What a run is made of before its first step: what decides it is written down, and what it says of itself is true."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bertdist.core.args import read_config
from bertdist.core.config import BatchConfig, ModelConfig, TaskConfig
from bertdist.data.loader import (
    EVALUATION_ROWS,
    MapLoader,
    create_eval_loader,
    create_train_loader,
    loader_settings,
)
from bertdist.data.records import Records, records_from_texts
from bertdist.data.stats import DatasetStats, LabelStats, create_task
from bertdist.data.tokenization import load_tokenizer
from bertdist.tasks.tasks import SingleLabel
from bertdist.training.run_logger import describe_data

TASK = SingleLabel(("no", "yes"))


def rank_of(ranks: int = 1, rank: int = 0, device: str = "cpu") -> Any:
    """What `loader_settings` reads of an Accelerator."""
    return SimpleNamespace(
        num_processes=ranks, process_index=rank, device=torch.device(device), mixed_precision="no"
    )


def labelled(
    values: list[Any], codes: list[int], pairs: list[str] | None = None, **changes: Any
) -> Records:
    """Rows with labels, as a source gives them."""
    plain = records_from_texts([f"text {i}" for i in range(len(codes))], pairs)
    given = {
        "label_kind": "text",
        "label_values": values,
        "label_codes": np.array(codes, dtype=np.int32),
        "label_column": "label",
        **changes,
    }
    return dataclasses.replace(plain, **given)


NEEDED = [
    "--model_name_or_path=m",
    "--train_file=t.tsv",
    "--validation_file=d.tsv",
    "--output_dir=o",
    "--early_stopping_patience=9",
]
# ---- Task and batches


def test_the_task_is_that_of_the_training_rows() -> None:
    labels = LabelStats("text", ["yes", "no"], [3, 1], None, "label")
    assert create_task(TaskConfig(class_weights=["balanced"]), labels, None) == SingleLabel(
        ("no", "yes"), class_weights=(2.0, 2 / 3)
    )
    assert create_task(TaskConfig(), labels, ("yes", "no")).labels == ("yes", "no")
    assert create_task(
        TaskConfig(), LabelStats("number", [0.5, 1.5], [1, 1], None, "stars"), None
    ).labels == ("stars",)


def test_training_batches_are_shuffled_and_others_are_in_row_order(tiny_model: Path) -> None:
    words = [
        *NEEDED,
        "--train_batch_size=5",
        "--tokens_per_micro_batch=64",
        "--dataloader_num_workers=0",
        "--seed=3",
    ]
    config, rows = read_config(words), labelled(["no", "yes"], [0, 1])
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny_model)))
    train = create_train_loader(
        rows,
        DatasetStats(LabelStats("text", ["no", "yes"], [1, 1], None, "label"), [2]),
        tokenizer,
        TASK,
        config,
        rank_of(3, 2),
    )
    dev = create_eval_loader(rows, tokenizer, TASK, config, rank_of(3, 2))
    assert isinstance(train, MapLoader) and dev is not None
    assert (train.shuffle, train.seed, train.rows_per_step) == (True, 3, 5)
    assert (dev.shuffle, dev.rows_per_step) == (False, EVALUATION_ROWS)
    for batches in (train, dev):
        assert (batches.rank, batches.ranks, batches.tokens_per_micro_batch, batches.workers) == (
            2,
            3,
            64,
            0,
        )
        assert not batches.pin
    assert loader_settings(config.batch, rank_of(device="cuda"))["pin"]


@pytest.mark.parametrize(
    ("cores", "ranks", "asked", "workers"),
    [
        (8, 1, None, 1),
        (2, 1, None, 1),
        (1, 1, None, 0),
        (2, 2, None, 0),
        (4, 2, None, 1),
        (1, 1, 3, 3),
        (8, 1, 0, 0),
    ],
)
def test_a_worker_has_a_core_of_its_own_unless_asked_for(
    cores: int, ranks: int, asked: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    config = BatchConfig(dataloader_num_workers=asked)
    assert loader_settings(config, rank_of(ranks))["workers"] == workers


# ---- What it says


def test_what_is_said_of_the_data_is_true() -> None:
    rows = labelled(["no", "yes"], [0, 1], pairs=["a", "b"])
    known = DatasetStats(LabelStats("text", ["no", "yes"], [1, 1], None, "label"), [2])
    assert describe_data(rows, known, records_from_texts(["x"] * 1234), TASK) == [
        "Training rows: 2 of texts, text in 'text' and 'pair'; validation rows: 1,234 of texts.",
        "Task: single_label_classification; outputs in order: no, yes.",
    ]
    many = SingleLabel(tuple(f"l{i}" for i in range(12)))
    _, task = describe_data(rows, known, None, many)
    assert task.endswith(
        "outputs in order: l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, ... (12 in total)."
    )
    assert (
        "validation rows: none, the last weights count as the best."
        in describe_data(rows, known, None, TASK)[0]
    )
