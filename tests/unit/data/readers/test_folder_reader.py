"""A folder per label is rows in the order of folders and files, for training and prediction."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from bertdist.core.config import DataConfig, FileConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_records, load_texts, open_stream
from bertdist.data.readers import folder_reader
from bertdist.data.readers.folder_reader import FolderReader
from bertdist.data.records import ColumnNames, Record

TEXTS = {"neg/1.txt": "dull\n", "neg/10.txt": "poor\r\nfilm", "pos/0.txt": "best é"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/neg and train/pos, and files that are not rows."""
    train = tmp_path / "train"
    for name, text in {**TEXTS, "urls_pos.txt": "http://", "pos/.hidden.txt": "x"}.items():
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        (train / name).write_bytes(text.encode())
    (train / "pos" / "features.feat").write_text("1:2")
    return train


def records_of(folder: Path, **settings: Any) -> list[Record]:
    records = load_records(DataConfig(train_file=[str(folder)], **settings), "train")
    return [records[row] for row in range(len(records))]


def test_the_label_is_the_name_of_the_folder(folder: Path) -> None:
    rows = [
        Record(0, "dull\n", None, "neg"),
        Record(1, "poor\r\nfilm", None, "neg"),
        Record(2, "best é", None, "pos"),
    ]
    assert records_of(folder) == rows
    texts = load_texts(str(folder), FileConfig(), ColumnNames("review", None, None, []))
    assert [texts[row].text for row in range(len(texts))] == [row.text for row in rows]
    assert str(texts.location(1)) == "train/neg/10.txt line 1"
    assert texts.format_notes == (
        "train: one row per file, labels by folder: neg (2), pos (1); not read: 2 other files "
        "(urls_pos.txt, pos/features.feat)",
    )
    others = [folder / "urls_pos.txt", folder / "pos" / "features.feat"]
    for path in others:
        path.unlink()
    texts = load_texts(str(folder), FileConfig(), ColumnNames("review", None, None, []))
    assert texts.format_notes == ("train: one row per file, labels by folder: neg (2), pos (1)",)
    assert [row.label for row in records_of(folder / "neg")] == ["neg", "neg"]
    for path in (folder / "neg").iterdir():  # as 20 Newsgroups names its files
        path.rename(path.with_suffix(""))
    (folder / "pos" / "0.txt").unlink()
    assert [row.label for row in records_of(folder)] == ["neg", "neg"]


def test_a_stream_of_a_folder_resumes_at_every_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_reader, "ROWS", 2)
    reader = FolderReader(str(folder), FileConfig())
    chunks = list(reader.chunks(["text"]))
    assert [chunk.state for chunk in chunks] == [{"row": 0}, {"row": 2}]
    copy = pickle.loads(pickle.dumps(reader))
    (again,) = copy.chunks(["text"], json.loads(json.dumps(chunks[1].state)))
    assert again.columns["text"].to_pylist() == ["best é"]  # type: ignore[union-attr]
    assert str(again.location(0)) == "train/pos/0.txt line 1"
    assert copy.fingerprint == reader.fingerprint
    (folder / "neg" / "1.txt").write_bytes(b"fine\n")
    changed = FolderReader(str(folder), FileConfig()).fingerprint
    (folder / "neg" / "10.txt").write_bytes(b"longer than it was\n")
    grown = FolderReader(str(folder), FileConfig()).fingerprint
    assert len({changed, grown, reader.fingerprint}) == 3
    config = DataConfig(train_file=[str(folder)], streaming=True, stream_window=1)
    windows = list(open_stream(config, 1).windows())
    assert [window.records[0].label for window in windows] == ["neg", "neg", "pos"]


def test_bytes_of_another_encoding_name_the_file(folder: Path) -> None:
    (folder / "neg" / "2.txt").write_bytes(b"plain\n\xa35\n")
    (folder / "pos" / "1.txt").write_bytes("wide é".encode("utf-16"))
    with pytest.raises(DataError, match=r"^train/neg/2\.txt line 2: byte 0xA3 is not utf-8; pass"):
        records_of(folder)
    config = DataConfig(train_file=[str(folder)], on_bad_row="skip")
    records = load_records(config, "train")
    assert [row.location for row in records.bad_rows] == ["train/neg/2.txt line 2"]
    assert records[3].text == "wide é" and len(records) == 4


@pytest.mark.parametrize(
    ("inner", "flags", "message"),
    [
        ("", {"delimiter": ","}, "--delimiter cannot take effect on a folder"),
        ("", {"file_format": "csv"}, "--file_format cannot take effect on a folder"),
        ("..", {}, "has folders in its folders, such as"),
        ("empty", {}, "is a folder without .txt files; expected a file, a folder with one folder"),
        ("saved", {}, r"was written by save_to_disk of `datasets`.*to_parquet"),
        ("", {"text_column": "review"}, "there is no column 'review'.*The columns are 'text'"),
    ],
)
def test_what_is_no_folder_of_texts_is_refused(
    folder: Path, inner: str, flags: dict[str, Any], message: str
) -> None:
    (folder.parent / "train" / "empty").mkdir()
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=message):
        records_of(folder / inner, **flags)
