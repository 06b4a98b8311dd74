"""What an address and the flags about it make of a file; tests/unit/test_guess.py has what they leave open."""

import gzip
import io
import pickle
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers.file_reader import DataFile, FileReader, inspect_file, open_file


def unpacked(content: bytes, at: int) -> BinaryIO:
    stream = gzip.GzipFile(fileobj=io.BytesIO(content))
    stream.seek(at)
    return stream  # type: ignore[return-value]


def found(address: str, content: bytes) -> DataFile:
    opener = partial(unpacked, gzip.compress(content))
    return inspect_file(
        address, delimiter=None, quoting="auto", encoding=None, column_names=None, open_bytes=opener
    )


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/a/train.csv.gz",
        "https://host/train.csv.gz?version=1",
        "train.csv.zst",
        "/x/train.csv",
    ],
)
def test_a_file_elsewhere_has_the_kind_before_its_packing(address: str) -> None:
    file = found(address, b"text;label\na,b;1\nc;2\n")
    assert (file.kind, file.delimiter, file.describe()) == (
        "csv",
        ";",
        f"{file.name}: read as utf-8, delimiter ';', quoted",
    )
    assert file.name.startswith("train.csv") and "?" not in file.name
    names, read = open_file(file, 1)
    assert names == ["text", "label"] and read(["text"])["text"].to_pylist() == ["a,b"]  # type: ignore[union-attr]
    pieces = list(FileReader(file, fingerprint="etag", chunk_bytes=6).chunks(["label"]))
    assert [piece.columns["label"].to_pylist() for piece in pieces] == [["1"], ["2"]]  # type: ignore[union-attr]
    assert [str(piece.location(0)) for piece in pieces] == [
        f"{file.name} line 2",
        f"{file.name} line 3",
    ]


def test_a_file_travels_to_another_process_and_opens_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        file = inspect_file(
            str(tmp_path / name), delimiter=None, quoting="auto", encoding=None, column_names=None
        )
        source = pickle.loads(pickle.dumps(FileReader(file)))
        (piece,) = source.chunks(["text"])
        assert (
            piece.columns["text"].to_pylist() == ["a"]
            and source.bytes == (tmp_path / name).stat().st_size
        )


def test_a_packed_file_of_this_machine_needs_an_opener(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\na,1\n"))
    with pytest.raises(DataError, match=r"the ending '\.gz' is not known"):
        inspect_file(str(path), delimiter=None, quoting="auto", encoding=None, column_names=None)
