"""probabilities.parquet: what it holds for every kind of task, and that it is whole or absent."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bertdist.core.args import read_config
from bertdist.core.errors import CheckpointError, DataError
from bertdist.data import probabilities as module
from bertdist.data.load_data import load_records, load_splits
from bertdist.data.probabilities import Probabilities, has_other_slices, read_metadata
from bertdist.data.records import Records
from bertdist.data.tokenization import TokenizedDataset, create_dataset
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task
from bertdist.training.resume_check import settings_that_must_match

ROWS = [
    '{"text": "good", "label": "b", "from": "en"}',
    '{"text": "so bad", "label": "a", "from": null}',
    '{"text": "good good good good good good good good", "label": "c", "from": 7}',
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def config_of(folder: Path, *flags: str) -> Any:
    return read_config(["--model_name_or_path=m", f"--output_dir={folder}/o", *flags])


def rows_of(folder: Path, task: Task, tokenizer: Any, lines: list[str]) -> TokenizedDataset:
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    file = f"{folder}/rows.jsonl"
    words = [f"--train_file={file}", f"--validation_file={file}", "--slice_column=from"]
    config = config_of(folder, *words)
    records = load_records(config.data, "validation")
    assert records is not None
    return create_dataset(records, tokenizer, task, 6)


def written(path: Path, dataset: TokenizedDataset, task: Task, logits: Any) -> list[dict[str, Any]]:
    Probabilities(dataset, task, torch.tensor(logits)).write(path)
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_one_label_per_row(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VALUES_PER_CHUNK", 6)  # two rows at a time
    task, path = SingleLabel(("a", "b", "c")), tmp_path / "p.parquet"
    dataset = rows_of(tmp_path, task, tokenizer, ROWS)
    logits = [[0.0, 2.0, 1.0], [3.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    rows = written(path, dataset, task, logits)
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert [row["truth"] for row in rows] == [1, 0, 2]
    assert [row["slice"] for row in rows] == ["en", None, "7"]
    assert [row["text"] for row in rows] == [dataset.records[i].text for i in range(3)]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose([row["probabilities"] for row in rows], expected, rtol=1e-6)
    # [CLS] and [SEP] count, and 8 words do not fit into 6 tokens
    assert [row["tokens"] for row in rows] == [3, 4, 6]
    assert [row["truncated"] for row in rows] == [False, False, True]
    assert read_metadata(path) == {
        "problem_type": "single_label_classification",
        "labels": ["a", "b", "c"],
        "slice_column": "from",
        "threshold": None,
    }
    assert "text_pair" not in rows[0] and pq.read_schema(path).field("truth").type == "int32"
    assert read_metadata(tmp_path / "none.parquet") == {} == read_metadata(tmp_path / "rows.jsonl")


def test_several_labels_and_numbers(tmp_path: Path, tokenizer: Any) -> None:
    lines = [line.replace('"label": "c"', '"label": ["c", "a"]') for line in ROWS]
    lines[0] = lines[0].replace('"b"', "[]")
    lines[1] = lines[1].replace('"a"', '["a"]')
    task: Task = MultiLabel(("a", "b", "c"))
    dataset = rows_of(tmp_path, task, tokenizer, lines)
    path = tmp_path / "p.parquet"
    rows = written(path, dataset, task, [[0.0, 2.0, 1.0]] * 3)
    assert [row["truth"] for row in rows] == [[], [0], [0, 2]]
    np.testing.assert_allclose(rows[0]["probabilities"], [0.5, 0.880797, 0.731059], rtol=1e-5)
    assert read_metadata(path)["threshold"] == 0.5
    task = Regression(("score",))
    numbers = [f'{{"text": "good", "label": {number}, "from": "x"}}' for number in (1.5, -2, 1e-3)]
    dataset = rows_of(tmp_path, task, tokenizer, numbers)
    rows = written(path, dataset, task, [[0.25], [1.0], [-3.0]])
    assert [row["truth"] for row in rows] == [1.5, -2.0, np.float32(1e-3)]
    assert [row["probabilities"] for row in rows] == [[0.25], [1.0], [-3.0]]


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, path = SingleLabel(("a", "b", "c")), tmp_path / "p.parquet"
    dataset = rows_of(tmp_path, task, tokenizer, ROWS)
    table = Probabilities(dataset, task, torch.zeros(3, 3))
    path.write_bytes(b"before")

    def full(*_: Any) -> Any:
        yield from ()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Probabilities, "_chunks", full)
        with pytest.raises(CheckpointError, match=r"Cannot write .*p\.parquet: No space left"):
            table.write(path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2
    table.write(path)  # the control
    assert pq.read_metadata(path).num_rows == 3
    assert not has_other_slices(path, dataset.records)
    other = Records(**{**dataset.records.__dict__, "slice_column": "label"})
    assert has_other_slices(path, other) and has_other_slices(tmp_path / "none", other)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--validation_file={0}/rows.csv", "validation"),
        ("--validation_split=0.4", "validation"),
        ("--test_split=0.4 --validation_file={0}/rows.csv", "test"),
        ("--validation_split=0.4 --streaming --max_train_steps=2", "validation"),
        ("--validation_file={0}/*.csv --max_eval_samples=5", "validation"),
    ],
)
def test_slices_are_of_their_rows(flags: str, part: str, tmp_path: Path) -> None:
    """And the fingerprints, by which a run resumes, are as without them."""
    lines = ["text,label,from", *(f"text {n},{'ab'[n % 2]},from {n}" for n in range(60))]
    (tmp_path / "rows.csv").write_text("\n".join([*lines, "no label", ""]))
    words = ["--on_bad_row=skip", f"--train_file={tmp_path}/rows.csv"]
    words += flags.format(tmp_path).split()
    config = config_of(tmp_path, *words, "--slice_column=from")
    splits, without = load_splits(config), load_splits(config_of(tmp_path, *words))
    records = getattr(splits, part)
    assert records.slice_column == "from" and len(records) > 4
    texts, slices = records.texts.to_pylist(), records.slices.to_pylist()
    assert slices == [text.replace("text", "from") for text in texts]
    other = getattr(without, part)
    assert (records.fingerprint, splits.train.fingerprint) == (
        other.fingerprint,
        without.train.fingerprint,
    )
    assert other.slices is None and other.texts.equals(records.texts)
    must_match = settings_that_must_match(config)
    assert must_match == settings_that_must_match(config_of(tmp_path, *words))


def test_a_slice_column_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label,language\na,b,en\nc,d,de\n")
    words = f"--train_file={tmp_path}/rows.csv --validation_file={tmp_path}/rows.csv".split()
    with pytest.raises(DataError) as error:
        load_splits(config_of(tmp_path, *words, "--slice_column=langage"))
    assert str(error.value) == (
        "rows.csv: there is no column 'langage' (--slice_column). Did you mean 'language'? The "
        "columns are 'language', 'label', 'text'."
    )
