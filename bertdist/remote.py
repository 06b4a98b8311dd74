"""Any address -> its bytes, from any offset: a local path, hf://, s3://, gs://, http(s)://, plain or packed as .gz or .zst.

In: what a user writes, a glob too. Out: sorted addresses; of one of them a stream of bytes, a seekable file, its size, a fingerprint.
One module, because a reading that breaks must go on at the very byte for every kind of address, and only here is it known which byte.

How a remote file is read:
1. Requests ask for a range of at most 4 MiB, so memory stays flat and a reading that begins in the middle asks for nothing before it.
2. What is likely to pass (a dropped connection, a timeout, 429, 5xx) is asked again for the very same bytes, half as many, after a pause
   that doubles; 8 times without a new byte are an error. Before each, and at the end, size and ETag are compared: a file that changed
   is an error.
3. A http server that answers without ranges is read in one long answer; after a break that is read from the start and skipped.
"""

import glob
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from bertdist.addresses import (
    INHERITED,
    MOST_TRIES,
    Say,
    file_name,
    file_system,
    info_of,
    is_http,
    patiently,
    protocol_of,
    shown,
    version_of,
)
from bertdist.errors import DataError, did_you_mean

BLOCK_BYTES = (
    4 << 20
)  # of one request: 45 MB/s at 50 ms a request, more than one tokenizing process takes
LEAST_BYTES = 1 << 16  # of a request after many breaks
SEEKING_BYTES = 1 << 18  # what a random read may read too much
EDGE_BYTES = 1 << 20  # at either end of a local file, for its fingerprint
PACKED = {".gz": "gzip", ".zst": "zstd"}


def find_addresses(pattern: str) -> list[str]:
    """The files behind a path, an address or a glob of either, sorted. Raises DataError where there is none, or a folder."""
    if protocol_of(pattern) is None:
        return _find_local(pattern.removeprefix("file://"))
    if is_http(pattern) and "*" in pattern:
        raise DataError(
            f"{shown(pattern)}: http has no list of files, so no '*'; give each address, or use s3://, gs:// or hf://."
        )
    if is_http(pattern) or not glob.has_magic(pattern):
        if patiently(pattern, lambda: info_of(pattern)).get("type") == "directory":
            raise DataError(
                f"{pattern} is a folder; expected a file, or a pattern such as {pattern.rstrip('/')}/*.parquet."
            )
        return [pattern]

    def matches() -> list[str]:
        system, path = file_system(pattern)
        system.invalidate_cache()  # sizes and versions of this listing are those of size_of and fingerprint_of: one request for many files
        found = system.glob(path, detail=True)
        return sorted(
            system.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file"
        )

    if not (found := patiently(pattern, matches)):
        raise DataError(f"{pattern} matches no file; check the bucket, the folder and the ending.")
    return found


def open_bytes(address: str, at: int = 0, say: Say | None = None) -> BinaryIO:
    """The bytes from offset `at` on, unpacked where the name ends in .gz or .zst: `at` counts unpacked bytes, and what stands before is
    unpacked and dropped. `say` hears of the first fault that passed. Raises DataError, now or while it is read."""
    packing = packing_of(address)
    if packing is None:
        plain = _open(address, BLOCK_BYTES, say)
        plain.seek(at)
        return plain
    stream = io.BufferedReader(
        _Unpacked(address, _open(address, BLOCK_BYTES, say), packing), EDGE_BYTES
    )
    while at > 0 and (skipped := stream.read(min(at, EDGE_BYTES))):
        at -= len(skipped)
    return stream


def open_random(address: str, say: Say | None = None) -> BinaryIO:
    """The bytes as stored, seekable. Raises DataError, now or while it is read."""
    return _open(address, SEEKING_BYTES, say)


def packing_of(address: str) -> str | None:
    """`gzip`, `zstd`, or None for bytes that are read as stored."""
    return PACKED.get(os.path.splitext(file_name(address))[1].lower())


def size_of(address: str) -> int | None:
    """Bytes as stored; None where a http server does not say. Raises DataError."""
    if protocol_of(address) is None:
        with _open(address, EDGE_BYTES, None) as file:
            return file.seek(0, io.SEEK_END)
    size = patiently(address, lambda: info_of(address)).get("size")
    return None if size is None else int(size)


def fingerprint_of(address: str) -> str:
    """Changes when the file does: size and the version that the server gives; of a local file size and xxh3 of its first and last MiB,
    not its time, so that a copy is the same file. Raises DataError."""
    if protocol_of(address) is not None:
        return "-".join(version_of(patiently(address, lambda: info_of(address))))
    with _open(address, EDGE_BYTES, None) as file:
        digest = xxhash.xxh3_64(file.read(EDGE_BYTES))
        size = file.seek(0, io.SEEK_END)
        file.seek(max(EDGE_BYTES, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return f"{size}-{digest.hexdigest()}"


def _find_local(pattern: str) -> list[str]:
    place = Path(pattern)
    if place.is_dir():
        raise DataError(
            f"{pattern} is a folder; expected a file, or a pattern such as {pattern.rstrip('/')}/*.csv."
        )
    if place.exists():  # a name with brackets too
        return [pattern]
    if not glob.has_magic(pattern):
        near = (
            sorted(file.name for file in place.parent.iterdir()) if place.parent.is_dir() else None
        )
        raise DataError(
            f"{pattern}: no such {'folder' if near is None else 'file'}.{did_you_mean(place.name, near or ())}"
        )
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        folder = next(parent for parent in place.parents if not glob.has_magic(str(parent)))
        if not folder.is_dir():
            raise DataError(f"{pattern} matches no file; there is no folder {folder}.")
        names = sorted(os.listdir(folder))
        there = (
            f"holds {', '.join(map(repr, names[:10]))}{', ...' if len(names) > 10 else ''}"
            if names
            else "is empty"
        )
        raise DataError(f"{pattern} matches no file; {folder} {there}.")
    return found


def _open(address: str, buffer_bytes: int, say: Say | None) -> BinaryIO:
    if protocol_of(address) is not None:
        return io.BufferedReader(_Remote(address, say), buffer_bytes)
    try:
        return open(address.removeprefix("file://"), "rb")
    except OSError as error:
        raise DataError(f"{address} cannot be read: {error.strerror}.") from None


class _Remote(io.RawIOBase):
    """A remote file, seekable; a fork that inherits it reads on by itself."""

    def __init__(self, address: str, say: Say | None) -> None:
        self._address, self._say = address, say
        info = patiently(address, lambda: info_of(address), self._say_once)
        self._size, self._version = info.get("size"), version_of(info)
        self._ranges = self._size is not None and info.get("partial", True)
        self._at, self._pid = 0, os.getpid()
        self._file: Any = None  # fsspec's
        self._broke = False  # since the version was last compared

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise DataError(
                f"{shown(self._address)}: the server does not say how long the file is; download it, and give its path."
            )
        self._at = offset + (0, self._at, self._size or 0)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._drop()
        super().close()

    def readall(self) -> bytes:
        return b"".join(
            iter(lambda: self.read(BLOCK_BYTES), b"")
        )  # Python's own reads 8 KiB at a time

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        asked = min(len(view), BLOCK_BYTES)

        def attempt() -> bytes:
            nonlocal asked
            try:
                return self._read(asked)
            except BaseException:
                self._drop()
                asked, self._broke = min(asked, max(asked // 2, LEAST_BYTES)), True
                raise

        data = patiently(self._address, attempt, self._say_once, MOST_TRIES)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        """One request, or more of a long answer: some bytes, none at the end of the file."""
        if self._pid != os.getpid():
            self._drop()
            self._pid = os.getpid()
        left = count if self._size is None else min(count, self._size - self._at)
        if left <= 0 or self._broke:
            self._compare()
        if left <= 0:
            return b""
        if not self._ranges:
            return self._read_on(left)
        self._file = self._file or self._connect(BLOCK_BYTES)
        try:
            self._file.seek(self._at)
            data: bytes = self._file.read(left)
        except ValueError as error:
            if "range" not in str(error):
                raise
            self._drop()
            self._ranges = False
            return self._read_on(left)
        if len(data) != left:
            raise EOFError(f"{len(data)} bytes came, expected {left}")
        return data

    def _read_on(self, count: int) -> bytes:
        """From one long answer, whose next byte fsspec calls `loc`."""
        if self._file is not None and self._file.loc > self._at:
            self._drop()
        self._file = self._file or self._connect(0)
        while self._file.loc < self._at and self._file.read(
            min(BLOCK_BYTES, self._at - self._file.loc)
        ):
            pass
        data: bytes = self._file.read(count) if self._file.loc == self._at else b""
        if not data and self._size is not None:
            raise EOFError(f"the answer ended at byte {self._file.loc} of {self._size}")
        if not data:
            self._compare()
        return data

    def _connect(self, block_bytes: int) -> Any:
        """block_bytes 0: a long answer."""
        system, path = file_system(self._address)
        how: dict[str, Any] = {"cache_type": "none"} if block_bytes else {}
        if is_http(self._address):  # which would ask for it once more
            how["size"] = self._size
        return system.open(path, "rb", block_size=block_bytes, **how)

    def _compare(self) -> None:
        now = version_of(info_of(self._address, again=True))
        if now != self._version:
            was, found = (
                f"{size} bytes, version {version or 'unknown'}"
                for size, version in (self._version, now)
            )
            raise DataError(
                f"{shown(self._address)} changed while it was read ({was}; now {found}); read files that stay as they are."
            )
        self._broke = False

    def _drop(self) -> None:
        if self._file is not None:
            if self._pid == os.getpid():
                self._file.close()
            else:
                INHERITED.append(self._file)
        self._file = None

    def _say_once(self, line: str) -> None:
        say, self._say = self._say, None
        if say is not None:
            say(line)


class _Unpacked(io.RawIOBase):
    """What is in a .gz or .zst, all members or frames of it."""

    def __init__(self, address: str, packed: BinaryIO, packing: str) -> None:
        self._address, self._packing = address, packing
        self._stream = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), packing)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except (OSError, pa.ArrowException) as error:
            found = " ".join(str(error).split())
            raise DataError(
                f"{shown(self._address)} is damaged, cut off, or no {self._packing} file: {found}."
            ) from None
