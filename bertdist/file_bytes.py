"""The bytes of a file, from something that opens it: as many as were asked for, however few a read gives.

In: a function that opens the unpacked file at a byte. Out: blocks of bytes that do not depend on how they were delivered, and a stamp that
changes when a file of this machine does. One module: what is known of a file before anything is known of what it holds.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa
import xxhash

from bertdist.errors import DataError

STAMP_BYTES = 1 << 16

OpenBytes: TypeAlias = Callable[[int], BinaryIO]  # from this byte of the unpacked file on
OpenRandom: TypeAlias = Callable[[], Any]  # seekable, for parquet


class Buffer:
    """The bytes of a stream that were asked for and not dropped; however few a read gives, as many as were asked for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._data, self._ended = stream, b"", False

    def first(self, size: int) -> tuple[bytes, bool]:
        """The first `size` bytes, fewer where the stream ends before; and whether it ends with them."""
        parts, missing = [self._data], size + 1 - len(self._data)
        while missing > 0 and not self._ended:
            part = self._stream.read(missing)
            self._ended, missing = not part, missing - len(part)
            parts.append(part)
        self._data = b"".join(parts)
        return self._data[:size], len(self._data) <= size

    def drop(self, size: int) -> None:
        """Forget the first `size` bytes."""
        self._data = self._data[size:]


def read_all(stream: BinaryIO) -> bytes:
    """To the end, also where a read gives less; without a copy where it gives all."""
    parts = []
    while part := stream.read():
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def open_local(path: str, at: int = 0) -> BinaryIO:
    """A file of this machine, from byte `at` on."""
    file = open(path, "rb")  # noqa: SIM115  whoever asked for it closes it
    file.seek(at)
    return file


def local_stamp(path: str) -> str:
    """Changes when a file of this machine does: size, and digest of its head and tail."""
    with open(path, "rb") as file:
        digest = xxhash.xxh3_128(file.read(STAMP_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - STAMP_BYTES))
        digest.update(file.read())
    return f"{size} {digest.hexdigest()}"


def first_bytes(path: str, open_bytes: OpenBytes, size: int) -> tuple[bytes, bool]:
    """The first `size` bytes, and whether they are all. Raises DataError."""
    with reading(path), closing(open_bytes(0)) as stream:
        return Buffer(stream).first(size)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What goes wrong inside is a DataError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
