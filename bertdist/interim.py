"""Interim: to be replaced by remote and rows at the merge."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bertdist.arrow_files import File, find_file, open_file
from bertdist.pieces import Piece, Place


def find_addresses(pattern: str) -> list[str]:
    """Interim."""
    return sorted(glob.glob(pattern)) if "*" in pattern else [pattern]


@dataclass(frozen=True)
class FileRows:
    """Interim."""

    file: File
    piece_rows: int = 7
    features: Any = None

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def has_header(self) -> bool:
        return self.file.has_header

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_64_hexdigest(Path(self.file.path).read_bytes())

    @property
    def bytes(self) -> int | None:
        return Path(self.file.path).stat().st_size

    def column_names(self) -> list[str]:
        """Interim."""
        return open_file(self.file)[0]

    def pieces(self, wanted: Sequence[str], place: Place | None = None) -> Iterator[Piece]:
        """Interim."""
        columns = open_file(self.file)[1](wanted)
        rows = len(columns[wanted[0]])
        for at in range(place["row"] if place else 0, rows, self.piece_rows):
            some = {name: column[at : at + self.piece_rows] for name, column in columns.items()}
            yield Piece(some, len(some[wanted[0]]), {"row": at}, lambda row, at=at: self.file.where(at + row))


__all__ = ["File", "FileRows", "find_addresses", "find_file"]
