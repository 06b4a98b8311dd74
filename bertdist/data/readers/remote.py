"""One address -> the file system behind it, what it says of the file, and its faults in words: which pass, and which do not.

In: an address such as s3://bucket/key or https://host/file. Out: fsspec's file system, size and version of a file, or a DataError of one
line.
One module, because it is the only one that knows fsspec and the libraries behind it: their options, their errors, and what a fork does
to them.

Loader workers are forks. A child gets fsspec's file systems without the thread that runs them, and makes its own; but it must not free
those: closing their connections takes them out of the epoll that it shares with the parent, which then waits until its timeout for an
answer that has long come (fsspec 2026.9 frees them in its own hook). So a child keeps what it inherited.

Any address -> its bytes, from any offset: a local path, hf://, s3://, gs://, http(s)://, plain or packed as .gz or .zst.

In: what a user writes, a glob too. Out: sorted addresses; of one of them a stream of bytes, a seekable file, its size, a fingerprint.
One module, because a reading that breaks must go on at the very byte for every kind of address, and only here is it known which byte.

How a remote file is read:
1. Requests ask for a range of at most 4 MiB, so memory stays flat and a reading that begins in the middle asks for nothing before it.
2. What is likely to pass (a dropped connection, a timeout, 429, 5xx) is asked again for the very same bytes, half as many, after a pause
   that doubles; 8 times without a new byte are an error. Before each, and at the end, size and ETag are compared: a file that changed
   is an error.
3. A http server that answers without ranges is read in one long answer; after a break that is read from the start and skipped.
"""

import asyncio
import glob
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
import pyarrow as pa
import xxhash

from bertdist.core.errors import DataError, did_you_mean

MOST_TRIES = 8  # without anything new: up to 90 s

FIRST_TRIES = (
    4  # where nothing has worked yet, a wrong name is likelier than a passing fault: up to 4 s
)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0

SILENCE_SECONDS = 60.0  # without a byte on an http connection

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # protocol -> extra of this package

ACCESS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, must allow it; FSSPEC_S3='{\"anon\": true}' reads public buckets",
    "gs": 'GOOGLE_APPLICATION_CREDENTIALS must allow it; FSSPEC_GS=\'{"token": "anon"}\' reads public buckets',
    "hf": "HF_TOKEN, or `hf auth login`, must allow it; a gated data set has its terms on its page",
}

NETWORKS = {
    "aiohttp",
    "aiobotocore",
    "botocore",
    "gcsfs",
    "google",
    "h11",
    "httpcore",
    "httpx",
    "httpx2",
    "requests",
    "urllib3",
}

LASTING = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "OfflineModeIsEnabled",
    "InvalidURL",
}

# What one file system or another says of a file's version, the surest first.
VERSIONS = "ETag etag md5Hash Content-MD5 Digest blob_id generation Last-Modified LastModified updated mtime".split()

Say = Callable[[str], None]

Found = TypeVar("Found")

INHERITED: list[Any] = []  # by a fork: never used, never freed


def protocol_of(address: str) -> str | None:
    """`s3` of s3://bucket/key; None of a local path, with file:// or without. Raises DataError for fsspec's chains."""
    protocol, found, rest = address.partition("://")
    if found and "::" in protocol + rest * (not is_http(address)):  # http://[::1]/ is an address
        raise DataError(
            f"{address}: chained addresses (::) are not read; .gz and .zst are unpacked by themselves."
        )
    return protocol.lower() if found and protocol.lower() != "file" else None


def is_http(address: str) -> bool:
    """Whether it begins with http:// or https://."""
    return address.lower().startswith(("http://", "https://"))


def file_name(address: str) -> str:
    """`train.csv.gz` of https://host/data/train.csv.gz?download=1."""
    path = urlsplit(address).path if is_http(address) else address
    return path.rstrip("/").rsplit("/", 1)[-1]


def shown(address: str) -> str:
    """An address as it may stand in a message: a http query can hold a signature, and the name of a host a password."""
    if not is_http(address):
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def file_system(address: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). fsspec remembers it, for one process. Raises DataError."""
    options: dict[str, Any] = {}
    if is_http(address):
        import aiohttp  # 0.2 s that local files need not pay

        # The defaults: 5 minutes for a whole answer; unpack what the server packed; no proxies of the environment, no ~/.netrc.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE_SECONDS)
        headers = {"Accept-Encoding": "identity"}
        options = {
            "client_kwargs": {
                "timeout": timeout,
                "headers": headers,
                "auto_decompress": False,
                "trust_env": True,
            }
        }
    if protocol_of(address) in (
        "gs",
        "gcs",
    ):  # else gcsfs asks by gRPC for a bucket's kind, with threads that a fork does not have
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        system, path = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        protocol = str(protocol_of(address))
        mend = (
            f"pip install 'bertdist[{EXTRAS[protocol]}]'"
            if protocol in EXTRAS
            else " ".join(str(error).split())
        )
        raise DataError(
            f"{shown(address)}: the package that reads {protocol}:// is not installed: {mend}."
        ) from None
    except ValueError as error:
        raise DataError(
            f"{shown(address)}: {error}; expected a path, or hf://, s3://, gs://, http:// or https://."
        ) from None
    return system, path


def info_of(address: str, again: bool = False) -> dict[str, Any]:
    """What the server says of a file, as fsspec names it. again: ask, whatever is remembered. Raises what the library raises."""
    system, path = file_system(address)
    if again:
        system.invalidate_cache(path)
    return dict(system.info(path))


def version_of(info: dict[str, Any]) -> tuple[str, str]:
    """(size, version), as far as they are told; empty or "None" where they are not."""
    return str(info.get("size")), next((str(info[name]) for name in VERSIONS if info.get(name)), "")


def patiently(
    address: str, action: Callable[[], Found], say: Say | None = None, tries: int = FIRST_TRIES
) -> Found:
    """What `action` gives, after as many tries as it takes, with pauses that double. Raises DataError when they are used up, and at once
    for what will not pass. `say` hears why it is tried again."""
    for attempt in range(1, tries + 1):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:
            if not _passes(error):
                raise _explained(address, error) from None
            if attempt == tries:
                given_up = f"given up after {tries} tries; check the address and the network"
                raise DataError(
                    f"{shown(address)} cannot be read: {_words(error)}; {given_up}."
                ) from None
            if say is not None:
                say(f"{shown(address)}: {_words(error)}; trying again.")
            # The system's randomness: the seeded kinds belong to training, and forks that share one would all come back at once.
            pause = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1))
    raise AssertionError(tries)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore, httpx or gcsfs; fsspec wraps them in OSErrors."""
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        found = (
            answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(answer, dict)
            else None
        )
        found = found or getattr(answer, "status_code", None) or getattr(cause, "status", None)
        if (
            found is None and _library(cause) == "gcsfs"
        ):  # aiohttp has a `code` too: 400 for an answer that was cut off
            found = getattr(cause, "code", None)
        if str(found).isdecimal() and 100 <= int(str(found)) < 600:
            return int(str(found))
    return None


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _passes(error: BaseException) -> bool:
    """Whether the same request may well work a little later."""
    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 425, 429)
    *_, root = _causes(error)
    if (
        isinstance(root, FileNotFoundError | PermissionError | IsADirectoryError)
        or type(root).__name__ in LASTING
    ):
        return False
    return isinstance(root, OSError | EOFError | asyncio.TimeoutError) or _library(root) in NETWORKS


def _words(error: BaseException) -> str:
    *_, root = _causes(error)
    status = _status(error)
    return (
        f"the server answers {status}"
        if status
        else " ".join(f"{type(root).__name__} {root}".split())[:200]
    )


def _explained(address: str, error: BaseException) -> DataError:
    """What will not pass, in one line."""
    *_, root = _causes(error)
    status, name, protocol = _status(error), shown(address), str(protocol_of(address))
    if (
        status in (401, 403)
        or isinstance(root, PermissionError)
        or "Credentials" in type(root).__name__
    ):
        advice = ACCESS.get(
            {"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), "the server wants a login"
        )
        return DataError(f"{name}: access denied, or it is not there ({_words(error)}); {advice}.")
    if status == 404 or (status is None and isinstance(root, FileNotFoundError)):
        return DataError(
            f"{name}: there is no such file ({_words(error)}); check each part of the address."
        )
    if status == 412:  # the versions of s3fs's requests
        return DataError(f"{name} changed while it was read; read files that stay as they are.")
    return DataError(f"{name} cannot be read: {_words(error)}.")


def _hold() -> None:
    """Right before a fork: what its child shall not free. fsspec's own hook does, in the child, before any other hook there."""
    kinds: list[Any] = [fsspec.AbstractFileSystem]
    held: list[Any] = []
    for kind in kinds:
        kinds += kind.__subclasses__()
        held += getattr(kind, "_cache", {}).values()
    INHERITED.append(held)


def _let_go() -> None:
    """Right after it, in the parent."""
    INHERITED.pop()


# reset_lock: fsspec 2026.9 resets it too, under a name that nothing reads.
os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=fsspec.asyn.reset_lock)

BLOCK_BYTES = (
    4 << 20
)  # of one request: 45 MB/s at 50 ms a request, more than one tokenizing process takes

LEAST_BYTES = 1 << 16  # of a request after many breaks

SEEKING_BYTES = 1 << 18  # what a random read may read too much

EDGE_BYTES = 1 << 20  # at either end of a local file, for its fingerprint

PACKED = {".gz": "gzip", ".zst": "zstd"}


def list_files(pattern: str) -> list[str]:
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
        system.invalidate_cache()  # sizes and versions of this listing are those of file_size and file_fingerprint: one request for many files
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
    packing = compression_of(address)
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


def open_seekable(address: str, say: Say | None = None) -> BinaryIO:
    """The bytes as stored, seekable. Raises DataError, now or while it is read."""
    return _open(address, SEEKING_BYTES, say)


def compression_of(address: str) -> str | None:
    """`gzip`, `zstd`, or None for bytes that are read as stored."""
    return PACKED.get(os.path.splitext(file_name(address))[1].lower())


def file_size(address: str) -> int | None:
    """Bytes as stored; None where a http server does not say. Raises DataError."""
    if protocol_of(address) is None:
        with _open(address, EDGE_BYTES, None) as file:
            return file.seek(0, io.SEEK_END)
    size = patiently(address, lambda: info_of(address)).get("size")
    return None if size is None else int(size)


def file_fingerprint(address: str) -> str:
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
