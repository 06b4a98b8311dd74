"""What a run is made of before its first step: what decides it is written down, and what it says of itself is true."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bertdist.core.args import read_config
from bertdist.core.config import BatchConfig, ModelConfig, TaskConfig, TrainConfig
from bertdist.data.loader import EVALUATION_ROWS, batches_of, create_train_loader
from bertdist.data.records import Records, records_of
from bertdist.data.sharding import MapLoader
from bertdist.data.stats import DatasetStats, LabelStats, create_task
from bertdist.data.tokenization import load_tokenizer
from bertdist.tasks.tasks import SingleLabel
from bertdist.training.resume_check import resume_signature
from bertdist.training.run_logger import describe_data, environment, notes_of

TASK = SingleLabel(("no", "yes"))


def rank_of(ranks: int = 1, rank: int = 0, device: str = "cpu") -> Any:
    """What `batches_of` asks of an Accelerator."""
    return SimpleNamespace(
        num_processes=ranks, process_index=rank, device=torch.device(device), mixed_precision="no"
    )


def labelled(
    values: list[Any], codes: list[int], pairs: list[str] | None = None, **changes: Any
) -> Records:
    """Rows with labels, as a source gives them."""
    plain = records_of([f"text {i}" for i in range(len(codes))], pairs)
    given = {
        "label_kind": "text",
        "label_values": values,
        "label_codes": np.array(codes, dtype=np.int32),
        "label_column": "label",
        **changes,
    }
    return dataclasses.replace(plain, **given)


# ---- resume_signature: what decides what a run learns

NEEDED = [
    "--model_name_or_path=m",
    "--train_file=t.tsv",
    "--validation_file=d.tsv",
    "--output_dir=o",
    "--early_stopping_patience=9",
]
DECIDES = {  # flag -> another value
    "tokenizer_name": "other",
    "max_length": "64",
    "dropout": "0.3",
    "problem_type": "regression",
    "class_weights": "balanced",
    "label_smoothing_factor": "0.1",
    "train_batch_size": "16",
    "learning_rate": "1e-3",
    "weight_decay": "0.5",
    "adam_beta1": "0.8",
    "adam_beta2": "0.9",
    "adam_epsilon": "1e-3",
    "max_grad_norm": "0",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": "0.5",
    "warmup_steps": "3",
    "layerwise_lr_decay": "0.5",
    "seed": "3",
    "mixed_precision": "bf16",
}
DOES_NOT = {  # where it runs, how it is cut, when something is written or said, when it is enough
    "gradient_checkpointing": "yes",
    "metrics": "mcc",
    "metric_for_best_model": "loss",
    "tokens_per_micro_batch": "64",
    "dataloader_num_workers": "3",
    "output_dir": "elsewhere",
    "dry_run": "yes",
    "use_cpu": "yes",
    "torch_compile": "yes",
    "cuda_graphs": "yes",
    "eval_every": "7 steps",
    "save_every": "1 steps",
    "log_every": "1 steps",
    "save_total_limit": "5",
    "resume_from_checkpoint": "c",
    "early_stopping_patience": "3",
    "early_stopping_threshold": "0.5",
    "stop_before_time_limit": "3",
    "rank_timeout": "3",
    "report_to": "tensorboard",
    "validation_file": "v.tsv",
    "max_eval_samples": "3",
    "accept_changed_data": "yes",
    "on_nan": "skip",
    "detect_anomaly": "yes",
}
# These decide through what they make: the rows and their fingerprint, the labels, the number of steps. The model's name and place
# may change, as when a folder is moved: its weights are in the checkpoint.
THROUGH = """
    model_name_or_path model_revision train_file train_weights streaming stream_window stream_sharding
    dataset_name dataset_config_name task_name train_split validation_split text_column
    text_pair_column label_column label_columns label_delimiter column_names delimiter quoting encoding
    on_bad_row max_bad_rows max_train_samples label_names
    num_train_epochs max_train_steps max_nan_steps
""".split()


def identity(
    *words: str, rows: Records | None = None, task: Any = TASK, steps: int = 10
) -> dict[str, Any]:
    rows = rows or labelled(["no", "yes"], [0, 1])
    return json.loads(
        json.dumps(
            resume_signature(read_config([*NEEDED, *words]), rows, None, task, steps).must_match
        )
    )  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides_a_run_is_in_its_identity(name: str) -> None:
    assert identity(f"--{name}={DECIDES[name]}") != identity()


@pytest.mark.parametrize("name", DOES_NOT)
def test_what_does_not_decide_a_run_is_not(name: str) -> None:
    assert identity(f"--{name}={DOES_NOT[name]}") == identity()


def test_every_setting_is_known_to_decide_or_not() -> None:
    sections = [field.type for field in dataclasses.fields(TrainConfig)]
    names = {field.name for section in sections for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    assert names == DECIDES.keys() | DOES_NOT.keys() | set(THROUGH)


@pytest.mark.parametrize(
    "other",
    [
        {"rows": labelled(["no", "yes"], [0, 1, 1])},
        {"rows": dataclasses.replace(labelled(["no", "yes"], [0, 1]), fingerprint="other texts")},
        {"task": SingleLabel(("yes", "no"))},
        {"steps": 11},
    ],
)
def test_rows_labels_and_steps_are_in_the_identity(other: dict[str, Any]) -> None:
    assert identity(**other) != identity()


def test_an_identity_survives_json() -> None:
    config = read_config([*NEEDED, "--class_weights", "1", "2", "--warmup_ratio", "0.1"])
    found = resume_signature(config, labelled(["no", "yes"], [0, 1]), None, TASK, 10)
    assert json.loads(json.dumps(found.must_match)) == found.must_match


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
    dev = batches_of(train.examples, config.batch, rank_of(3, 2))
    assert isinstance(train, MapLoader)
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
    assert batches_of(train.examples, config.batch, rank_of(device="cuda")).pin


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
    assert (
        batches_of(range(3), BatchConfig(dataloader_num_workers=asked), rank_of(ranks)).workers
        == workers
    )  # type: ignore[arg-type]


# ---- What it says


def test_what_is_said_of_the_data_is_true() -> None:
    rows = labelled(["no", "yes"], [0, 1], pairs=["a", "b"])
    known = DatasetStats(LabelStats("text", ["no", "yes"], [1, 1], None, "label"), [2])
    assert describe_data(rows, known, records_of(["x"] * 1234), TASK, 1000, 3000) == [
        "Training rows: 2 of texts, text in 'text' and 'pair'; validation rows: 1,234 of texts.",
        "Task: single_label_classification; outputs in order: no, yes.",
        "3,000 steps, 1,000 an epoch.",
    ]
    many = SingleLabel(tuple(f"l{i}" for i in range(12)))
    _, task, _ = describe_data(rows, known, None, many, 1, 1)
    assert task.endswith(
        "outputs in order: l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, ... (12 in all)."
    )
    assert (
        "validation rows: none: the last weights count as the best."
        in describe_data(rows, known, None, TASK, 1, 1)[0]
    )


def test_the_notes_are_what_a_predictor_needs() -> None:
    config = read_config([*NEEDED, "--max_length=64"])
    assert notes_of(config, records_of(["a"], ["b"])) == {
        "max_length": 64,
        "text_column": "text",
        "text_pair_column": "pair",
    }
    assert notes_of(config, records_of(["a"]))["text_pair_column"] is None


def test_the_environment_is_json_and_names_the_versions() -> None:
    found = json.loads(environment(rank_of(2)))
    assert found["packages"]["torch"] == torch.__version__
    assert (found["processes"], found["device"], found["mixed_precision"]) == (2, "cpu", "no")
