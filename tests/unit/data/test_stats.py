"""What must be known before the first step: from flags where they say it, else by reading; and who reads which files."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from forked import run_ranks
from rows import MemoryRows
from transformers import AutoConfig, AutoTokenizer

from bertdist.core.args import read_config
from bertdist.core.config import TaskConfig, TrainConfig
from bertdist.core.errors import DataError
from bertdist.data.columns import LabelRules
from bertdist.data.in_memory import records_from_texts
from bertdist.data.records import ColumnNames
from bertdist.data.stats import DatasetStats, collect_stats, pretrained_digests
from bertdist.data.streaming import Stream
from bertdist.tasks.labels import LabelStats
from bertdist.tasks.tasks import SingleLabel, create_task

ALONE: Any = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
STEPS = ["--max_train_steps=9", "--eval_every=3 steps", "--save_every=50%"]


def config_of(out: Path, *words: str) -> TrainConfig:
    return read_config(
        [
            "--model_name_or_path=m",
            "--train_file=t.tsv",
            "--validation_file=d.tsv",
            f"--output_dir={out}",
            "--streaming",
            *words,
        ]
    )


def stream_of(files: Sequence[MemoryRows], **changes: Any) -> Stream:
    asked = ColumnNames("text", None, "label", None)
    settings = {"on_bad_row": "skip", "max_bad_rows": 99, **changes}
    return Stream(
        **{
            "name": "t.tsv",
            "source_groups": [files],
            "columns": asked,
            "label_delimiter": None,
            "window_rows": 4,
            "seed": 0,
            **settings,
        }
    )


def file_of(labels: Sequence[Any], name: str = "file", **changes: Any) -> MemoryRows:
    return MemoryRows(
        name,
        [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)],
        **changes,
    )


# ---- What is known, and how


def test_rows_in_memory_know_it_all(tmp_path: Path) -> None:
    codes = np.array([0, 1, 0], np.int32)
    rows = dataclasses.replace(
        records_from_texts(["a", "b", "c"]),
        label_kind="text",
        label_values=["no", "yes"],
        label_indices=codes,
        label_column="l",
    )
    found = collect_stats(rows, config_of(tmp_path), ALONE, pytest.fail)
    assert found == DatasetStats(found.labels, [3])
    assert found.labels[:5] == ("text", ["no", "yes"], [2, 1], None, "l")
    assert found.labels.locate("yes") == "texts row 1"


def test_a_stream_is_read_once_and_it_is_said_what_for(tmp_path: Path) -> None:
    files = [file_of(["no", "yes", "no"]), file_of([]), file_of(["maybe"])]
    said: list[str] = []
    found = collect_stats(stream_of(files), config_of(tmp_path), ALONE, said.append)
    assert (
        dict(zip(found.labels.values, found.labels.counts, strict=True)),
        found.num_rows_per_source,
    ) == (
        {"no": 2, "yes": 1, "maybe": 1},
        [3, 0, 1],
    )
    assert said == [
        "Reading t.tsv once, for its labels (or pass --label_names), its length (--max_train_steps instead of --num_train_epochs)."
    ]
    assert (tmp_path / "survey.json").exists()


@pytest.mark.parametrize(
    ("words", "labels", "reasons"),
    [
        ([*STEPS], ["no", "yes"], "its labels (or pass --label_names)"),
        ([*STEPS, "--label_names", "no", "yes", "maybe"], ["no", "yes"], None),
        (["--max_train_steps=9", "--label_names", "no", "yes"], ["no", "yes"], None),
        (
            ["--max_train_steps=9", "--label_names", "no", "yes", "--eval_every=1 epoch"],
            ["no", "yes"],
            "--eval_every '1 epoch' (in steps it needs no length)",
        ),
        (
            [*STEPS, "--label_names", "no", "yes", "--class_weights=balanced"],
            ["no"],
            "the rows of each label (--class_weights balanced)",
        ),
        ([*STEPS, "--label_names", "no", "yes", "--class_weights", "1", "2"], ["no"], None),
        (
            [*STEPS, "--label_names", "no", "yes", "--log_every=0.1 epochs"],
            ["no"],
            "--log_every '0.1 epochs' (in steps it needs no length)",
        ),
        ([*STEPS], [0.5, 1.5], None),
        ([*STEPS], [3, 4], "its labels (or pass --label_names)"),
        ([*STEPS, "--problem_type=regression"], ["3", "4"], None),
        (
            [*STEPS[1:], "--label_names", "no", "yes"],
            ["no"],
            "its length (--max_train_steps instead of --num_train_epochs)",
        ),
    ],
)
def test_flags_make_the_reading_needless(
    tmp_path: Path, words: list[str], labels: list[Any], reasons: str | None
) -> None:
    read, said = (
        stream_of([file_of(labels), file_of(["other"] if isinstance(labels[0], str) else labels)]),
        list[str](),
    )
    found = collect_stats(read, config_of(tmp_path, *words), ALONE, said.append)
    assert said == ([] if reasons is None else [f"Reading t.tsv once, for {reasons}."])
    assert (
        (found.num_rows_per_source == [])
        == (reasons is None)
        == (not (tmp_path / "survey.json").exists())
    )


def test_without_reading_the_labels_are_those_that_were_named(tmp_path: Path) -> None:
    named = config_of(tmp_path, *STEPS, "--label_names", "no", "yes", "maybe")
    found = collect_stats(stream_of([file_of(["no", "no"])]), named, ALONE, pytest.fail).labels
    assert (found.kind, found.values, found.column) == (
        "text",
        ["no", "yes", "maybe"],
        "label",
    ) and len(found.counts) == 3
    sets = stream_of([file_of(["no,yes", "no"])], label_delimiter=",")
    assert collect_stats(sets, named, ALONE, pytest.fail).labels.values == [
        ("no",),
        ("yes",),
        ("maybe",),
    ]
    feature = SimpleNamespace(names=["bad", "good"])
    fixed = stream_of([file_of([0, 1], features={"label": feature})])
    found = collect_stats(fixed, config_of(tmp_path, *STEPS), ALONE, pytest.fail).labels
    assert (found.values, found.class_names) == (["bad", "good"], ("bad", "good"))


def first_look(accelerator: Accelerator, reads: Sequence[Stream], out: Path) -> str:
    try:
        collect_stats(
            reads[accelerator.process_index], config_of(out, *STEPS), accelerator, lambda text: None
        )
        return "known"
    except DataError as error:
        return str(error)


def test_a_rank_that_cannot_see_the_first_rows_does_not_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = stream_of([file_of(["no", "yes"])]), stream_of([file_of(["no", "yes"], broken=0)])
    assert (
        run_ranks(2, first_look, [good, bad], tmp_path)
        == ["rank 1: file row 0: no more can be read."] * 2
    )
    assert run_ranks(2, first_look, [good, good], tmp_path) == ["known"] * 2


def test_the_task_is_that_of_the_training_rows() -> None:
    labels = LabelStats("text", ["yes", "no"], [3, 1], None, "label")
    assert create_task(TaskConfig(class_weights=["balanced"]), labels, None) == SingleLabel(
        ("no", "yes"), class_weights=(2.0, 2 / 3)
    )
    assert create_task(TaskConfig(), labels, ("yes", "no")).labels == ("yes", "no")
    assert create_task(
        TaskConfig(), LabelStats("text", ["0.5", "1.5"], [1, 1], None, "stars"), None
    ).labels == ("stars",)


COLUMNS: list[list[Any]] = [
    ["1", "0", 1, 0.0],
    [f"{i % 25}.0" for i in range(50)],
    [i % 25 for i in range(50)],
    [i / 2 for i in range(9)],
    [*([0, 1] * 30), "n/a"],
    ["a,b", "a", "b"],
    [[0, 1, 1], [1, 0, 0]],
    [[0, 1, 1], [1, 0]],
    [["a"], ["a", "b"], []],
    [True, "True", False],
    ["no", "yes"],
]


def task_or_error(stats: LabelStats) -> Any:
    try:
        task = create_task(TaskConfig(), stats, None)
        return task, task.reason
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column[-2:]))
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_stream_means_what_the_same_rows_in_memory_mean(
    column: list[Any], chunk: int, tmp_path: Path
) -> None:
    stream = stream_of([file_of(column, sizes=(chunk,))], window_rows=999)
    found = collect_stats(stream, config_of(tmp_path, *STEPS), ALONE, lambda text: None)
    assert found.numbers_only or column[-1] != "n/a"
    rules = LabelRules(numbers_only=found.numbers_only)
    (window,) = dataclasses.replace(stream, rules=rules).windows()
    in_memory = task_or_error(window.records.label_stats())
    assert task_or_error(found.labels) == in_memory
    other = stream_of([file_of(["x", "y"])])  # the control: other labels mean something else
    found = collect_stats(other, config_of(tmp_path, *STEPS), ALONE, lambda text: None)
    assert task_or_error(found.labels) != in_memory


def test_a_stream_that_begins_with_fractions_is_not_read_first(tmp_path: Path) -> None:
    column = [*(i / 2 for i in range(60)), "n/a"]
    stream = stream_of([file_of(column, sizes=(7,))], window_rows=999)
    found = collect_stats(stream, config_of(tmp_path, *STEPS), ALONE, pytest.fail)
    task = create_task(TaskConfig(), found.labels, None)
    (window,) = stream.windows()
    with pytest.raises(DataError, match="expected a number, found 'n/a'"):  # where it is met
        [task.encode_label(label) for label in window.records.label_values]
    with pytest.raises(DataError, match="row 60: label 'n/a' is not a number"):  # in memory
        create_task(TaskConfig(), window.records.label_stats(), None)


# ---- Digests of the pretrained model


def digests_of(folder: Path) -> dict[str, str]:
    return pretrained_digests(
        AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )


def test_a_copied_model_has_the_same_digests(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copy)
    change(copy / "config.json", transformers_version="4.40.0")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer(["a text"], truncation=True, padding="max_length", max_length=9)
    assert pretrained_digests(AutoConfig.from_pretrained(copy), tokenizer) == digests_of(tiny_model)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("model_config", {"hidden_act": "relu"}),
        ("model_config", {"num_attention_heads": 4}),
        ("model_config", {"layer_norm_eps": 1e-3}),
        ("tokenizer", "case"),
        ("tokenizer", "ids"),
    ],
)
def test_what_changes_a_logit_changes_a_digest(
    tiny_model: Path, tmp_path: Path, name: str, setting: Any
) -> None:
    copy = tmp_path / "other"
    shutil.copytree(tiny_model, copy)
    file = copy / {"model_config": "config.json", "tokenizer": "tokenizer.json"}[name]
    if setting == "ids":
        model = json.loads(file.read_text())["model"]
        ids = model["vocab"]
        ids["good"], ids["bad"] = ids["bad"], ids["good"]
        setting = {"model": model}
    if setting == "case":
        file, setting = copy / "tokenizer_config.json", {"do_lower_case": False}
    change(file, **setting)
    before, now = digests_of(tiny_model), digests_of(copy)
    assert [each for each in before if before[each] != now[each]] == [name]


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
