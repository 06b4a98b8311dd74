"""A folder of texts: one row per file, whose label is the name of the folder that holds it.

    train/neg/1.txt, train/neg/2.txt, train/pos/1.txt  ->  FolderReader("train", FileConfig())

A folder of .txt files without folders in it has its own name as the label of all its rows. Rows are
sorted by folder and file name; a state is {"row": number of the file}.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from bertdist.core.config import FileConfig
from bertdist.core.errors import DataError, RowLocation, listed
from bertdist.data.bad_rows import BadRow, OnBadRow, escaped_excerpt
from bertdist.data.readers.file_reader import reject_unused_flags
from bertdist.data.readers.sniffing import detect_encoding
from bertdist.data.readers.text_lines import FileFormat, decode_lines, reading, resolve_codec
from bertdist.data.source import Chunk, Column, ReaderState, RowLocations

COLUMNS = ("text", "label")
ROWS = 1000  # per chunk


class FolderReader:
    """The texts in a local folder, a `DataSource`; on_bad_row "skip" skips what is not text."""

    kind = "folder"
    file = None
    has_header = False
    quoted_table = None
    features: Any = None

    def __init__(self, path: str, flags: FileConfig, on_bad_row: OnBadRow = "fail") -> None:
        """Raises DataError where there are no texts, or a flag cannot take effect."""
        self.path, self.skip = Path(path), on_bad_row == "skip"
        self.name = self.path.resolve().name
        self.encoding = flags.encoding
        reject_unused_flags(path, self.kind, flags)
        with reading(path):
            self._files, others = _list_texts(self.path)
            self._sizes = [file.stat().st_size for file in self._files]
        self.bytes = sum(self._sizes)
        counts = Counter(file.parent.name for file in self._files)
        labels = listed([f"{label} ({count:,})" for label, count in counts.items()])
        self.note = f"{self.name}: one row per file, labels by folder: {labels}"
        if others:
            names = listed([str(file.relative_to(self.path)) for file in others], 3)
            self.note += f"; not read: {len(others):,} other files ({names})"

    @cached_property
    def fingerprint(self) -> str:
        """Of the names and sizes of all files, and the contents of at most 1,000 of them."""
        digest = xxhash.xxh3_128(f"{self.encoding} {self.skip}".encode())
        with reading(str(self.path)):
            for file, size in zip(self._files, self._sizes, strict=True):
                name = f"{file.parent.name}/{file.name}\0{size}\0"
                digest.update(name.encode(errors="surrogateescape"))
            for file in self._files[:: -(-len(self._files) // ROWS)]:
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def column_names(self) -> list[str]:
        """text, label."""
        return list(COLUMNS)

    def read(self, columns: Sequence[str], num_rows: int | None = None) -> Chunk:
        """The first rows as one chunk. Raises DataError."""
        return self._read(columns, 0, num_rows)

    def chunks(self, columns: Sequence[str], state: ReaderState | None = None) -> Iterator[Chunk]:
        """The rows from `state` on (None: all), 1,000 files at a time. Raises DataError."""
        for first in range((state or {"row": 0})["row"], len(self._files), ROWS):
            yield self._read(columns, first, ROWS)

    def _read(self, columns: Sequence[str], first: int, count: int | None) -> Chunk:
        texts: list[str] = []
        files: list[Path] = []
        bad_rows: list[BadRow] = []
        stop = len(self._files) if count is None else first + count
        with reading(str(self.path)):
            for file in self._files[first:stop]:
                text = self._text(file, bad_rows)
                if text is not None:
                    texts.append(text)
                    files.append(file)
        values = {"text": texts, "label": [file.parent.name for file in files]}
        arrays: dict[str, Column] = {
            name: pa.chunked_array([values[name]], pa.large_string()) for name in columns
        }
        names = [self._name_of(file) for file in files]
        locations = RowLocations(((0, lambda row: RowLocation(names[row], 1), 0),))
        return Chunk(
            arrays,
            len(texts),
            {"row": first},
            locations,
            lambda rows: [escaped_excerpt(texts[row]) for row in rows],
            tuple(bad_rows),
        )

    def _text(self, file: Path, bad_rows: list[BadRow]) -> str | None:
        """None where it cannot be decoded, and is skipped."""
        raw = file.read_bytes()
        detected = detect_encoding(raw, True)
        encoding = self.encoding or (detected if (detected or "").startswith("utf") else "utf-8")
        fmt = FileFormat(name=self._name_of(file), kind="txt", encoding=str(encoding))
        codec, mark = resolve_codec(fmt, raw[:4])
        lines = decode_lines(fmt, raw[mark:], codec, 1, self.skip)
        if not lines.broken:
            return lines.data.decode()
        line, reason = min(lines.broken.items())
        bad_rows.append(BadRow(fmt.name, 1 + line, reason, escaped_excerpt(lines.data.decode())))
        return None

    def _name_of(self, file: Path) -> str:
        name = os.fsencode(self.name / file.relative_to(self.path))
        return name.decode("utf-8", "backslashreplace")


def _list_texts(folder: Path) -> tuple[list[Path], list[Path]]:
    """The text files of a folder, or of the folders in it, sorted; and the other files. Raises
    DataError for none.
    """
    folders, files = _scan(folder)
    inner = [_scan(label) for label in folders]
    if deeper := [path for paths, _ in inner for path in paths]:
        raise DataError(
            f"{folder} has folders in its folders, such as {deeper[0]}; pass the folder whose "
            "folders are the labels."
        )
    beside = files if inner else []
    if inner:
        files = [file for _, of_label in inner for file in of_label]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    texts = texts or [file for file in files if not file.suffix]
    if not texts:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise DataError(
                f"{folder} was written by save_to_disk of `datasets`; write each split as a file: "
                f"datasets.load_from_disk({str(folder)!r}).to_parquet('rows.parquet'), of a "
                "DatasetDict ['train'].to_parquet(...). From Python rows may be a Dataset: "
                "bertdist.train(train_rows=...)."
            )
        raise DataError(
            f"{folder} is a folder without .txt files; expected a file, a folder with one folder "
            f"of .txt files per label, or a pattern such as {folder}/*.csv."
        )
    return texts, [*beside, *(file for file in files if file not in set(texts))]


def _scan(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, sorted by name, without hidden ones."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir()]
    return folders, [entry for entry in entries if entry.is_file()]
