"""All files of a run are read with the columns of the first one, in memory as streamed."""

from pathlib import Path
from typing import Any

import pytest
from rows import write_rows

from bertdist.core.args import read_settings
from bertdist.core.config import TrainConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_splits
from bertdist.data.records import Records
from bertdist.data.streaming import Stream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    columns = {
        "single": {"text": "x", "label": "a"},
        "score": {"text": "x", "score": "a"},
        "both": {"sentence": "x", "label": "c", "text": "y", "score": "b"},
        "pair": {"sentence1": "x", "sentence2": "y", "label": "a"},
        "sentence": {"sentence": "x", "label": "a"},
    }
    for name, row in columns.items():
        write_rows(tmp_path / f"{name}.jsonl", [row] * 2)
    return tmp_path


def config_of(folder: Path, train: str, validation: str | None, **settings: Any) -> TrainConfig:
    train_file = [str(folder / f"{name}.jsonl") for name in train.split()]
    dev = None if validation is None else str(folder / f"{validation}.jsonl")
    needed = {"model_name_or_path": "m", "output_dir": "o"}
    return read_settings({**needed, "train_file": train_file, "validation_file": dev, **settings})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "missing"), [("single score", "label"), ("single sentence", "text")]
)
def test_a_file_without_the_columns_of_the_first_is_refused(
    files: str, missing: str, streaming: bool, folder: Path
) -> None:
    with pytest.raises(DataError) as caught:
        rows = load_splits(config_of(folder, files, None, streaming=streaming)).train
        assert not isinstance(rows, Records)
        list(rows.head())  # a stream opens its other files when it comes to them
        for chunk in rows.source_groups[1][0].chunks(rows.columns.names(), None):
            assert chunk
    problem = f"the key {missing!r} is missing" if streaming else f"no column {missing!r}"
    assert problem in str(caught.value)


def test_other_usual_columns_of_later_files_are_not_read(folder: Path) -> None:
    rows = load_splits(config_of(folder, "single both", None)).train
    assert isinstance(rows, Records)
    assert [rows[row][1:] for row in (0, 2)] == [("x", None, "a"), ("y", None, "c")]
    first = load_splits(config_of(folder, "score both", None)).train  # the control
    assert isinstance(first, Records) and first[2].label == "b"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("train", "dev"), [("single", "pair"), ("pair", "single")])
def test_pairs_and_single_texts_do_not_go_together(
    train: str, dev: str, streaming: bool, folder: Path
) -> None:
    with pytest.raises(DataError) as caught:
        load_splits(config_of(folder, train, dev, streaming=streaming))
    expected = (
        "pair.jsonl has pairs of texts (columns 'sentence1' and 'sentence2'), and single.jsonl "
        "single ones (column 'text'): name the columns with --text_column and --text_pair_column."
    )
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("dev", "notes"),
    [
        ("score", ("score.jsonl: columns 'score' (training: 'label')",)),
        ("sentence", ("sentence.jsonl: columns 'sentence' (training: 'text')",)),
        ("single", ()),
    ],
)
def test_other_columns_of_the_validation_rows_are_named(
    dev: str, notes: tuple[str, ...], folder: Path
) -> None:
    validation = load_splits(config_of(folder, "single", dev)).validation
    assert validation is not None and validation.format_notes == notes


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_with_a_header_alone_is_refused_beside_others(
    streaming: bool, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nx,a\ny,b\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    settings = {"model_name_or_path": "m", "output_dir": "o", "streaming": streaming}
    files = [str(tmp_path / name) for name in ("rows.csv", "empty.csv")]
    with pytest.raises(DataError, match=r"^empty.csv has no rows\."):
        rows = load_splits(read_settings({**settings, "train_file": files})).train
        assert isinstance(rows, Stream)
        assert [len(records) for _, records in rows.chunks(rows.sources[0])] == [2], "the control"
        list(rows.chunks(rows.sources[1]))
