"""Bytes of a local path or URL (hf, s3, gs, http, https) from any offset, decompressed (gz, zst).

    for path in list_files("s3://bucket/train-*.csv.gz"):
        stream = open_bytes(path, at=1_000_000)

`list_files` expands globs, `open_bytes` streams, `open_seekable` serves parquet; `file_size` and
`file_fingerprint` describe a file. Errors are DataErrors of one line. How a URL is read
(docs/decisions/0018-remote-files.md):

1. Requests are for a range of at most 4 MiB, so memory stays flat and reading from the middle
   requests nothing before it.
2. After a transient error (a dropped connection, a timeout, 429, 5xx) the same bytes are requested
   again, half as many, after a pause that doubles; 8 tries without a new byte are an error. Before
   a retry, and at the end, size and ETag are compared: a file that changed is an error.
3. An http server without ranges is read as one long response; after an error that is read again
   from the start, and skipped.

fsspec is imported when the first URL is opened. Loader workers are forks: a child gets fsspec's
file systems without the thread that runs them, and creates its own. It must not free the inherited
ones: closing their connections removes them from the epoll that it shares with the parent, which
then waits until its timeout for a response that has long arrived (fsspec 2026.9 frees them in a
fork hook of its own). So a forked worker never frees inherited file systems.
"""

import asyncio
import glob
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import xxhash

from bertdist.core.errors import DataError, did_you_mean, did_you_mean_path, listed
from bertdist.core.time_limit import call_within

MAX_TRIES = 8  # without a new byte: up to 90 s
# Before anything has worked, a wrong name is likelier than a transient error: up to 4 s.
FIRST_TRIES = 4
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.5, 30.0
READ_TIMEOUT_SECONDS = 60.0  # for one range or one question, and without a byte of a long response
MIN_BYTES_PER_SECOND = 1000  # of one long response, over READ_TIMEOUT_SECONDS of waiting

# Of one request: 45 MB/s at 50 ms a request, more than one tokenizing process needs.
REQUEST_BYTES = 4 << 20
MIN_REQUEST_BYTES = 1 << 16  # after many errors
SEEK_BUFFER_BYTES = 1 << 18  # what a random read may read too much
EDGE_BYTES = 1 << 20  # at either end of a local file, for its fingerprint

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # file name extension -> pyarrow's codec
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # their first bytes
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # protocol -> extra of this package
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, must allow it; "
    "FSSPEC_S3='{\"anon\": true}' reads public buckets",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS must allow it; "
    'FSSPEC_GS=\'{"token": "anon"}\' reads public buckets',
    "hf": "HF_TOKEN, or `hf auth login`, must allow it; "
    "the terms of a gated data set are on its page",
}
_NETWORK_PACKAGES = set(
    "aiohttp aiobotocore botocore gcsfs google h11 httpcore httpx httpx2 requests urllib3".split()
)
_PERMANENT_ERRORS = set(
    "NoCredentialsError PartialCredentialsError ProfileNotFound ParamValidationError "
    "OfflineModeIsEnabled InvalidURL".split()
)
# What the file systems call a file's version, the most certain first.
_VERSION_KEYS = (
    "ETag etag md5Hash Content-MD5 Digest blob_id generation Last-Modified LastModified "
    "updated mtime".split()
)

STDIN, STDIN_NAME = "-", "standard input"  # as a path, and in messages

Warn = Callable[[str], None]
OpenBytes = Callable[[int], BinaryIO]  # from this byte of the decompressed file on
OpenSeekable = Callable[[], Any]  # for parquet
Result = TypeVar("Result")

_inherited: list[Any] = []  # by a fork: never used, never freed


def protocol_of(path: str) -> str | None:
    """`s3` of s3://bucket/key; None of a local path, file://. Raises DataError for chained URLs."""
    protocol, separator, rest = path.partition("://")
    # http://[::1]/ is a URL.
    if separator and "::" in (protocol if is_http(path) else protocol + rest):
        raise DataError(
            f"{path}: chained URLs (::) are not supported; "
            ".gz and .zst are decompressed without them."
        )
    return protocol.lower() if separator and protocol.lower() != "file" else None


def is_http(path: str) -> bool:
    """Whether it begins with http:// or https://."""
    return path.lower().startswith(("http://", "https://"))


def file_name(path: str) -> str:
    """`train.csv.gz` of https://host/data/train.csv.gz?download=1."""
    path = urlsplit(path).path if is_http(path) else path
    return path.rstrip("/").rsplit("/", 1)[-1]


def compression_of(path: str) -> str | None:
    """`gzip` and `zstd` of .gz and .zst, else None."""
    return COMPRESSIONS.get(os.path.splitext(file_name(path))[1].lower())


def compression_in(first: bytes, path: str) -> str | None:
    """That of a file that begins with `first`; by its name where that is not text either."""
    for magic, codec in _MAGIC.items():
        if first.startswith(magic):
            return codec
    return compression_of(path) if first and min(first) < ord("\t") else None


def redacted(path: str) -> str:
    """For messages: an http query can hold a signature, and a host name a password."""
    if not is_http(path):
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# Files


def list_files(pattern: str) -> list[str]:
    """The files of a path, URL or glob, sorted. Raises DataError for none, or a folder."""
    if protocol_of(pattern) is None:
        return _list_local(pattern.removeprefix("file://"))
    if is_http(pattern) and "*" in pattern:
        raise DataError(
            f"{redacted(pattern)}: http has no list of files, so no '*'; "
            "pass each URL, or use s3://, gs:// or hf://."
        )
    if is_http(pattern) or not glob.has_magic(pattern):
        if retry(pattern, lambda: file_info(pattern)).get("type") == "directory":
            raise _folder_error(pattern, "parquet")
        return [pattern]

    def match() -> list[str]:
        system, path = file_system(pattern)
        # file_size and file_fingerprint use this listing: one request for many files.
        system.invalidate_cache()
        infos = system.glob(path, detail=True)
        return sorted(
            system.unstrip_protocol(name) for name, info in infos.items() if info["type"] == "file"
        )

    if not (files := retry(pattern, match)):
        raise DataError(
            f"{pattern} matches no file; check the bucket, the folder and the extension."
        )
    return files


def _list_local(pattern: str) -> list[str]:
    if pattern == STDIN:
        return [pattern]
    if os.path.exists(pattern) or not glob.has_magic(pattern):  # a name may contain brackets
        check_local_file(pattern)
        return [pattern]
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if files:
        return files
    parents = Path(pattern).parents
    folder = next(parent for parent in parents if not glob.has_magic(str(parent)))
    if not folder.is_dir():
        raise DataError(f"{pattern} matches no file; there is no folder {folder}.")
    names = sorted(os.listdir(folder))
    content = f"contains {listed(list(map(repr, names)))}" if names else "is empty"
    raise DataError(f"{pattern} matches no file; {folder} {content}.")


def check_local_file(path: str) -> None:
    """Raises DataError where there is no file."""
    folder = Path(path).parent
    if os.path.isdir(path):
        raise _folder_error(path, "csv")
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder.{did_you_mean_path(path)}")
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(f"{path} is a symbolic link to {os.readlink(path)}, which is not there.")
    if not os.path.exists(path):
        names = sorted(os.listdir(folder))
        near = did_you_mean_path(path) or did_you_mean(Path(path).name, names)
        raise DataError(f"{path}: no such file.{near}")
    if not os.path.isfile(path):  # a pipe or a device: every reader starts at the first byte
        raise DataError(f"{path} is not a regular file; write its rows to a file first.")


def _folder_error(path: str, extension: str) -> DataError:
    example = f"{path.rstrip('/')}/*.{extension}"
    return DataError(f"{path} is a folder; expected a file, or a pattern such as {example}.")


def open_stored(path: str, warn: Warn | None = None) -> BinaryIO:
    """The bytes as stored, to be read in order.

    `warn` gets one line about the first transient error. Raises DataError, now or while it is read.
    """
    return _open(path, REQUEST_BYTES, warn)


def open_bytes(
    path: str, at: int = 0, warn: Warn | None = None, codec: str | None = None
) -> BinaryIO:
    """The bytes from byte `at` on, decompressed; those before it are decompressed and dropped.

    codec: of `compression_in`. Otherwise as `open_stored`.
    """
    stream = open_stored(path, warn)
    if codec is None:
        stream.seek(at)
        return stream
    stream = decompressed(path, stream, codec)
    while at > 0 and (skipped := stream.read(min(at, EDGE_BYTES))):
        at -= len(skipped)
    return stream


def decompressed(path: str, stored: BinaryIO, codec: str | None) -> BinaryIO:
    """What the stored bytes of a file are, decompressed. path: for messages."""
    if codec is None:
        return stored
    return io.BufferedReader(_Decompressed(path, stored, codec), EDGE_BYTES)


def open_seekable(path: str, warn: Warn | None = None) -> BinaryIO:
    """The bytes as stored. Raises DataError, now or while it is read."""
    if path == STDIN:
        return io.BytesIO(_open(path, EDGE_BYTES, None).read())
    return _open(path, SEEK_BUFFER_BYTES, warn)


def file_size(path: str) -> int | None:
    """Bytes as stored; None where an http server does not send the size. Raises DataError."""
    if protocol_of(path) is None:
        with _open(path, EDGE_BYTES, None) as file:
            return file.seek(0, io.SEEK_END)
    size = retry(path, lambda: file_info(path)).get("size")
    return None if size is None else int(size)


def file_fingerprint(path: str) -> str:
    """Changes with the file: of a URL its size and version. Raises DataError.

    Of a local file its size and xxh3 of its first and last MiB, but not its time, so that a copy is
    the same file.
    """
    if protocol_of(path) is not None:
        return "-".join(file_version(retry(path, lambda: file_info(path))))
    with _open(path, EDGE_BYTES, None) as file:
        digest = xxhash.xxh3_64(file.read(EDGE_BYTES))
        size = file.seek(0, io.SEEK_END)
        file.seek(max(EDGE_BYTES, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return f"{size}-{digest.hexdigest()}"


def _open(path: str, buffer_bytes: int, warn: Warn | None) -> BinaryIO:
    if path == STDIN:
        return io.BufferedReader(_StandardInput(), EDGE_BYTES)
    if protocol_of(path) is not None:
        return io.BufferedReader(_RemoteFile(path, warn), buffer_bytes)
    try:
        return open(path.removeprefix("file://"), "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


# fsspec


@cache
def import_fsspec() -> Any:
    """fsspec, with fork hooks that keep its file systems alive in a child."""
    import fsspec  # lazy: only URLs need it
    import fsspec.asyn

    # Right before a fork: fsspec's own hook in the child is the first one there.
    def hold() -> None:
        kinds: list[Any] = [fsspec.AbstractFileSystem]
        held: list[Any] = []
        for kind in kinds:
            kinds += kind.__subclasses__()
            held += getattr(kind, "_cache", {}).values()
        _inherited.append(held)

    # reset_lock: fsspec 2026.9 resets it too, under a name that nothing reads.
    os.register_at_fork(
        before=hold,
        after_in_parent=lambda: _inherited.pop() and None,
        after_in_child=fsspec.asyn.reset_lock,
    )
    return fsspec


def file_system(url: str, long_response: bool = False) -> tuple[Any, str]:
    """(fsspec's file system, which it caches per process; the path in it). Raises DataError.

    long_response: an http response may take any time.
    """
    options: dict[str, Any] = {}
    protocol = str(protocol_of(url))
    if is_http(url):
        import aiohttp  # lazy: only http needs it

        # The defaults: 5 minutes for a complete response; decompress what the server compressed;
        # no proxies from the environment, no ~/.netrc.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(
                total=None if long_response else READ_TIMEOUT_SECONDS,
                sock_connect=30,
                sock_read=READ_TIMEOUT_SECONDS,
            ),
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,
            "trust_env": True,
        }
    if protocol in ("gs", "gcs"):
        # Else gcsfs asks by gRPC for the kind of a bucket, with threads that a fork does not have.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        system, path = import_fsspec().core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'bertdist[{extra}]'" if extra else " ".join(str(error).split())
        raise DataError(
            f"{redacted(url)}: the package that reads {protocol}:// is not installed: {remedy}."
        ) from None
    except ValueError as error:
        expected = "expected a path, or hf://, s3://, gs://, http:// or https://"
        raise DataError(f"{redacted(url)}: {error}; {expected}.") from None
    return system, path


def file_info(url: str, refresh: bool = False) -> dict[str, Any]:
    """fsspec's info of a file. refresh: not from a cache. Raises what the library raises."""
    system, path = file_system(url)
    if refresh:
        system.invalidate_cache(path)
    return dict(_in_time(url, lambda: system.info(path)))


def _in_time(url: str, action: Callable[[], Result]) -> Result:
    """The answer to one request. aiohttp has a limit of its own; boto's and httpx's are for the
    time between two bytes.
    """
    return action() if is_http(url) else call_within(READ_TIMEOUT_SECONDS, action)


def file_version(info: dict[str, Any]) -> tuple[str, str]:
    """(size, version); "None" or "" where they are unknown."""
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return str(info.get("size")), version


# Errors


def retry(
    url: str, action: Callable[[], Result], warn: Warn | None = None, tries: int = FIRST_TRIES
) -> Result:
    """The result of `action`, called up to `tries` times, with pauses that double.

    Raises DataError after the last try, and at once for an error that is not transient. `warn` gets
    a line per retry.
    """
    for attempt in range(1, tries + 1):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:
            if not _is_transient(error):
                raise _permanent_error(url, error) from None
            problem = _describe(error)
            if attempt == tries:
                raise DataError(
                    f"{redacted(url)} cannot be read: {problem}; given up after {tries} tries; "
                    "check the URL and the network."
                ) from None
            if warn is not None:
                warn(f"{redacted(url)}: {problem}; trying again.")
            # The system's randomness: the seeded generators belong to training, and forks that
            # share one would all retry at once.
            pause = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), MAX_WAIT_SECONDS)
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1))
    raise AssertionError(tries)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
        if isinstance(cause, asyncio.CancelledError):  # how aiohttp ends what timed out
            return


def _http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore, httpx or gcsfs, as fsspec wraps it."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(response, "status_code", None)
        status = status or getattr(cause, "status", None)
        if status is None and _package(cause) == "gcsfs":
            # aiohttp has a `code` too: 400 for a response that was cut off.
            status = getattr(cause, "code", None)
        if str(status).isdecimal() and 100 <= int(str(status)) < 600:
            return int(str(status))
    return None


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may well work a little later."""
    if (status := _http_status(error)) is not None:
        return status >= 500 or status in (408, 425, 429)
    *_, root = _causes(error)
    if isinstance(root, FileNotFoundError | PermissionError | IsADirectoryError):
        return False
    if type(root).__name__ in _PERMANENT_ERRORS:
        return False
    network = isinstance(root, OSError | EOFError | asyncio.TimeoutError)
    return network or _package(root) in _NETWORK_PACKAGES


def _describe(error: BaseException) -> str:
    if status := _http_status(error):
        return f"the server answers {status}"
    *_, root = _causes(error)
    return " ".join(f"{type(root).__name__} {root}".split())[:200]


def _permanent_error(url: str, error: BaseException) -> DataError:
    *_, root = _causes(error)
    status, name, problem = _http_status(error), redacted(url), _describe(error)
    is_denied = isinstance(root, PermissionError) or "Credentials" in type(root).__name__
    if status in (401, 403) or is_denied:
        protocol = str(protocol_of(url))
        advice = CREDENTIALS.get(EXTRAS.get(protocol, protocol), "the server wants a login")
        return DataError(f"{name}: access denied, or it is not there ({problem}); {advice}.")
    if status == 404 or (status is None and isinstance(root, FileNotFoundError)):
        return DataError(f"{name}: there is no such file ({problem}); check each part of the URL.")
    if status == 412:  # s3fs requests a version
        return DataError(f"{name} changed while it was read; read files that do not change.")
    return DataError(f"{name} cannot be read: {problem}.")


# Streams


class _StandardInput(io.RawIOBase):
    """Standard input from its start: what was read is kept for the next one that is opened."""

    _start = bytearray()
    _is_kept = True

    def __init__(self) -> None:
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET and offset <= len(self._start), (whence, offset)
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        kind, size = type(self), len(buffer)
        part = bytes(kind._start[self._at : self._at + size])
        if not part:
            part = os.read(0, size)
            if kind._is_kept:
                kind._start += part
            else:
                kind._start.clear()
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def forget_standard_input() -> None:
    """What is read of it from here on is not kept: the next stream of it is the last one."""
    _StandardInput._is_kept = False


class _RemoteFile(io.RawIOBase):
    """A seekable file; a fork that inherits it continues to read, independently."""

    def __init__(self, url: str, warn: Warn | None) -> None:
        self._url, self._warn = url, warn
        info = retry(url, lambda: file_info(url), self._warn_once)
        self._size, self._version = info.get("size"), file_version(info)
        self._has_ranges = self._size is not None and info.get("partial", True)
        self._at, self._pid = 0, os.getpid()
        self._file: Any = None  # fsspec's
        self._failed = False  # since the version was last compared
        self._request_bytes = REQUEST_BYTES  # fewer after errors
        self._waited, self._arrived = 0.0, 0  # seconds for how many bytes of a long response

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise DataError(
                f"{redacted(self._url)}: the server does not send the size of the file; "
                "download it, and pass its path."
            )
        self._at = offset + (0, self._at, self._size or 0)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._disconnect()
        super().close()

    def readall(self) -> bytes:
        # Python's own reads 8 KiB at a time.
        return b"".join(iter(lambda: self.read(REQUEST_BYTES), b""))

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")

        def request() -> bytes:
            try:
                return self._request(min(len(view), self._request_bytes))
            except BaseException:
                self._disconnect()
                self._request_bytes = max(self._request_bytes // 2, MIN_REQUEST_BYTES)
                self._failed = True
                raise

        data = retry(self._url, request, self._warn_once, MAX_TRIES)
        self._request_bytes = min(2 * self._request_bytes, REQUEST_BYTES)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _request(self, count: int) -> bytes:
        """One range, or more of a long response: some bytes, none at the end of the file."""
        if self._pid != os.getpid():
            self._disconnect()
            self._pid = os.getpid()
        if self._size is not None:
            count = min(count, self._size - self._at)
        if count <= 0 or self._failed:
            self._check_version()
        if count <= 0:
            return b""
        if not self._has_ranges:
            return self._continue(count)
        self._file = self._file or self._connect(REQUEST_BYTES)
        try:
            file = self._file
            file.seek(self._at)
            data: bytes = _in_time(self._url, lambda: file.read(count))
        except ValueError as error:
            if "range" not in str(error):
                raise
            self._disconnect()
            self._has_ranges = False
            return self._continue(count)
        if len(data) != count:
            raise EOFError(f"{len(data)} bytes arrived, expected {count}")
        return data

    def _continue(self, count: int) -> bytes:
        """From one long response, whose next byte fsspec calls `loc`."""
        if self._file is not None and self._file.loc > self._at:
            self._disconnect()
        self._file = self._file or self._connect(0)
        while self._file.loc < self._at:
            if not self._read_timed(min(REQUEST_BYTES, self._at - self._file.loc)):
                break
        data = self._read_timed(count) if self._file.loc == self._at else b""
        if not data and self._size is not None:
            raise EOFError(f"the response ended at byte {self._file.loc} of {self._size}")
        if not data:
            self._check_version()
        return data

    def _read_timed(self, count: int) -> bytes:
        """Bytes of a long response. Raises DataError where they arrive too slowly."""
        start = time.monotonic()
        data: bytes = self._file.read(count)
        self._waited += time.monotonic() - start
        self._arrived += len(data)
        if self._waited > READ_TIMEOUT_SECONDS:
            if self._arrived < MIN_BYTES_PER_SECOND * self._waited:
                raise DataError(
                    f"{redacted(self._url)} arrives too slowly: {self._arrived:,} bytes in "
                    f"{self._waited:.0f} seconds; download it, and pass its path."
                )
            self._waited, self._arrived = 0.0, 0
        return data

    def _connect(self, block_bytes: int) -> Any:
        """fsspec's file; block_bytes 0: one long response."""
        system, path = file_system(self._url, long_response=not block_bytes)
        options: dict[str, Any] = {"cache_type": "none"} if block_bytes else {}
        if is_http(self._url):  # which would ask for it once more
            options["size"] = self._size
        return system.open(path, "rb", block_size=block_bytes, **options)

    def _check_version(self) -> None:
        version = file_version(file_info(self._url, refresh=True))
        if version != self._version:
            before, now = (
                f"{size} bytes, version {tag or 'unknown'}"
                for size, tag in (self._version, version)
            )
            raise DataError(
                f"{redacted(self._url)} changed while it was read ({before}; now {now}); "
                "read files that do not change."
            )
        self._failed = False

    def _disconnect(self) -> None:
        if self._file is not None:
            if self._pid == os.getpid():
                self._file.close()
            else:
                _inherited.append(self._file)
        self._file = None

    def _warn_once(self, line: str) -> None:
        warn, self._warn = self._warn, None
        if warn is not None:
            warn(line)


class _Decompressed(io.RawIOBase):
    """The content of a .gz or .zst, all members or frames of it."""

    def __init__(self, path: str, compressed: BinaryIO, codec: str) -> None:
        self._path, self._codec = path, codec
        self._stream = pa.CompressedInputStream(pa.PythonFile(compressed, mode="r"), codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except (OSError, pa.ArrowException) as error:
            problem = " ".join(str(error).split())
            name = redacted(self._path)
            raise DataError(
                f"{name} is damaged, cut off, or not a {self._codec} file: {problem}."
            ) from None
