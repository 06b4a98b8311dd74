"""Bytes arrive exactly, whatever a server does, and errors are one line.

Loopback servers drop connections, answer 503, and lack ranges; S3 is moto's.
"""

import asyncio
import gzip
import importlib.util
import io
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from servers import FakeGcs, FaultyServer, File, s3_server

from bertdist.core.errors import DataError
from bertdist.data.readers import remote
from bertdist.data.readers.remote import (
    FIRST_TRIES,
    compression_of,
    file_fingerprint,
    file_info,
    file_name,
    file_size,
    file_version,
    is_http,
    list_files,
    open_bytes,
    open_seekable,
    protocol_of,
    redacted,
    retry,
)

DATA = random.Random(1).randbytes(1_000_000)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(remote, "REQUEST_BYTES", 300_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def read(address: str, at: int = 0) -> bytes:
    with open_bytes(address, at, codec=compression_of(address)) as stream:
        return stream.read()


PACKED = {
    "a.csv": DATA,
    "a.csv.gz": gzip.compress(DATA[:400_000], 1)
    + gzip.compress(DATA[400_000:], 1),  # two members: what `cat a.gz b.gz` makes
    "a.csv.zst": zstd(DATA[:400_000]) + zstd(DATA[400_000:]),
}
KINDS: list[dict[str, Any]] = [
    {},
    {"ranges": False},
    {"ranges": False, "sends_size": False},
    {"heads": False},
]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("at", [0, 1, 399_999, 999_999, 1_000_000, 1_000_001])
def test_bytes_from_any_offset(name: str, at: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACKED[name])
    assert read(str(tmp_path / name), at) == DATA[at:]
    assert read(f"file://{tmp_path / name}", at) == DATA[at:]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_a_server_of_any_kind_that_fails_again_and_again(name: str, kind: dict[str, Any]) -> None:
    with FaultyServer({f"/{name}": PACKED[name], "/empty": b""}, **kind) as server:
        assert read(f"{server.url}/{name}?download=1") == DATA
        for at in (0, 650_000):
            server.drops.extend([70_000, 0, 1, 250_000])
            server.statuses.extend([503, 0, 429, 0, 500])
            assert read(f"{server.url}/{name}", at) == DATA[at:]
            assert len(server.statuses) < 3 and len(server.drops) < 4
            server.drops.clear()
            server.statuses.clear()
        assert read(f"{server.url}/empty") == b""


def test_the_content_encoding_of_a_compressed_file_is_ignored() -> None:
    """As many do: a client that believes it has unpacked the bytes before they are asked for."""
    with FaultyServer({"/a.csv.gz": PACKED["a.csv.gz"]}) as server:
        server.encoding = "gzip"
        assert read(f"{server.url}/a.csv.gz", 5) == DATA[5:]


class Forgetful:
    """A connection that begins at the first byte again, and says that it does not."""

    def __init__(self, file: Any, reader: remote._RemoteFile) -> None:
        self._file, self._reader, self.read, self.close = file, reader, file.read, file.close

    def seek(self, at: int) -> None:
        self._file.loc = 0 if self._reader._failed_once else at

    @property
    def loc(self) -> int:
        return self._reader._at


@pytest.mark.parametrize("ranges", [True, False])
def test_a_reader_that_starts_again_without_skipping_is_seen(
    ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, compare = remote._RemoteFile._connect, remote._RemoteFile._check_version

    def note(self: Any) -> None:
        self._failed_once = self._failed_once or self._failed
        compare(self)

    monkeypatch.setattr(remote._RemoteFile, "_failed_once", False, raising=False)
    monkeypatch.setattr(remote._RemoteFile, "_check_version", note)
    monkeypatch.setattr(
        remote._RemoteFile, "_connect", lambda self, block: Forgetful(connect(self, block), self)
    )
    with FaultyServer({"/a.csv": DATA}, ranges=ranges) as server:
        server.drops.extend([0, 100_000] if ranges else [400_000])
        assert (
            b"".join(
                part
                for part, _ in zip(
                    iter_parts(open_bytes(f"{server.url}/a.csv")), range(4), strict=False
                )
            )
            != DATA
        )


def iter_parts(stream: BinaryIO) -> Iterator[bytes]:
    while part := stream.read(300_000):
        yield part


def test_ranges_begin_where_the_reading_does() -> None:
    with FaultyServer({f"/{name}": data for name, data in PACKED.items()}) as server:
        read(f"{server.url}/a.csv", 700_001)
        assert server.gets == [("/a.csv", 700_001)] and server.sent == 299_999
        server.gets.clear()
        read(f"{server.url}/a.csv.gz", 700_001)  # packed bytes have no way in but the first
        assert server.gets[0] == ("/a.csv.gz", 0)


def test_a_server_that_drops_every_connection_still_gives_all() -> None:
    with FaultyServer({"/a.csv": DATA}) as server:
        server.drops.extend([70_000] * 1000)
        said: list[str] = []
        assert open_bytes(f"{server.url}/a.csv", 0, said.append).read() == DATA
        assert len(said) == 1 and "/a.csv: " in said[0] and said[0].endswith("trying again.")


@pytest.mark.parametrize("ranges", [True, False])
def test_without_progress_it_ends(ranges: bool) -> None:
    with FaultyServer({"/a.csv": DATA}, ranges=ranges) as server:
        server.drops.extend([1] * 1000)
        with pytest.raises(DataError, match=r"/a.csv cannot be read: .*; given up after 8 tries"):
            read(f"{server.url}/a.csv")
        assert len(server.gets) in (
            8,
            9,
        )  # without ranges the first answer may be the one that shows it
        server.statuses.extend([503] * 1000)
        with pytest.raises(DataError, match="the server answers 503; given up after 8 tries"):
            read(f"{server.url}/a.csv")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_source_that_trickles_for_ever_is_one_line(
    ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes arrive all the time, so no read of the connection times out."""
    monkeypatch.setattr(remote, "READ_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(remote, "MAX_TRIES", 2)
    with FaultyServer({"/a.csv": DATA}, ranges=ranges) as server:
        assert read(f"{server.url}/a.csv") == DATA  # the control
        slow = "Timeout.*given up after 2 tries" if ranges else r"arrives too slowly: \d+ bytes in"
        with open_bytes(f"{server.url}/a.csv") as stream:
            assert stream.read(10) == DATA[:10]
            server.trickle = 0.02
            with pytest.raises(DataError, match=slow):
                stream.read()


def test_a_bucket_that_trickles_for_ever_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto's own limit is for the time between two bytes."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs (pip install -e '.[dev]')")
    monkeypatch.setattr(remote, "READ_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(remote, "MAX_TRIES", 2)
    with FaultyServer({"/bucket/a.csv": DATA}) as server:  # of S3 this is all that is needed
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        assert read("s3://bucket/a.csv") == DATA  # the control
        server.trickle = 0.02
        with pytest.raises(DataError, match=r"no answer within 1 s; given up after 2 tries"):
            read("s3://bucket/a.csv")
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("etag", ['"2"', '"1"'])
@pytest.mark.parametrize("break_at", [0, 5])
def test_a_file_that_changed_meanwhile_is_an_error(etag: str, break_at: int) -> None:
    with FaultyServer({"/a.csv": DATA}) as server, open_bytes(f"{server.url}/a.csv") as stream:
        assert stream.read(10) == DATA[:10]
        server.files["/a.csv"] = File(DATA, etag=etag)
        server.drops.append(break_at)
        if etag == '"1"':  # the same
            assert stream.read() == DATA[10:]
        else:
            with pytest.raises(
                DataError,
                match=r'/a.csv changed while it was read \(1000000 bytes, version "1"; now .* "2"\)',
            ):
                stream.read()


def test_a_file_that_grew_or_shrank_meanwhile_is_an_error() -> None:
    for size in (500_000, 999_999, 1_000_001):
        with (
            FaultyServer({"/a.csv": File(DATA, etag=None)}) as server,
            open_bytes(f"{server.url}/a.csv") as stream,
        ):
            stream.read(10)
            server.files["/a.csv"] = File((DATA + b"x")[:size], etag=None)
            with pytest.raises(DataError, match="changed while it was read"):
                stream.read()


def zeros(begin: int, end: int) -> bytes:
    return bytes(end - begin)


@pytest.mark.parametrize("ranges", [True, False])
def test_memory_is_flat(ranges: bool) -> None:
    size = 24 << 20

    def peak(count: int) -> int:
        tracemalloc.start()
        stream, left = open_bytes(f"{server.url}/a.csv"), size
        while left:
            left -= len(stream.read(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    with FaultyServer({"/a.csv": File(zeros, size)}, ranges=ranges) as server:
        peak(1 << 16)  # the first imports
        assert peak(1 << 16) < 8 << 20
        assert peak(size) > size  # the measure sees what is held


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.zst"])
@pytest.mark.parametrize("damage", ["cut", "not packed"])
def test_damaged_compression_is_one_line(name: str, damage: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACKED[name][:-9] if damage == "cut" else b"text,label\n" * 99)
    with pytest.raises(
        DataError, match=rf"{name} is damaged, cut off, or not a (gzip|zstd) file: "
    ):
        read(str(tmp_path / name))


def test_a_flipped_bit_of_a_gzip_file_is_seen(tmp_path: Path) -> None:
    data = bytearray(PACKED["a.csv.gz"])
    data[200_000] ^= 1
    (tmp_path / "a.csv.gz").write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        read(str(tmp_path / "a.csv.gz"))


def test_remote_errors_below_a_compression_keep_their_message() -> None:
    with FaultyServer({"/a.csv.gz": PACKED["a.csv.gz"]}) as server:
        server.statuses.extend([0, 403])
        with pytest.raises(
            DataError,
            match=r"^http://.*/a.csv.gz: access denied, or it is not there \(the server answers 403\)",
        ):
            read(f"{server.url}/a.csv.gz")


TABLE = pa.table(
    {"text": [f"text {row}" for row in range(50_000)], "label": [row % 2 for row in range(50_000)]}
)


def parquet() -> bytes:
    found = io.BytesIO()
    pa.parquet.write_table(TABLE, found, row_group_size=10_000)
    return found.getvalue()


@pytest.mark.parametrize("ranges", [True, False])
def test_parquet_is_read_by_its_groups(ranges: bool) -> None:
    with FaultyServer({"/a.parquet": parquet()}, ranges=ranges) as server:
        server.drops.extend([0, 30_000, 0, 7])
        server.statuses.extend([0, 503])
        with open_seekable(f"{server.url}/a.parquet") as file:
            found = pa.parquet.ParquetFile(file)
            assert found.read_row_group(3).equals(TABLE.slice(30_000, 10_000))
            assert found.read().equals(TABLE)


# Paths, URLs and errors


def named(value: object) -> str:
    """The same in every process that collects the tests."""
    return (
        f"{type(value).__name__} {getattr(value, 'status', '')}"
        if isinstance(value, Exception)
        else str(value)
    )


@pytest.mark.parametrize(
    ("address", "protocol", "name"),
    [
        ("data/train.csv", None, "train.csv"),
        ("file:///data/train.csv", None, "train.csv"),
        ("odd::name.csv", None, "odd::name.csv"),
        ("s3://bucket/a/train.csv.gz", "s3", "train.csv.gz"),
        ("S3://bucket/a?.csv", "s3", "a?.csv"),
        ("hf://datasets/user/name@main/train.parquet", "hf", "train.parquet"),
        ("https://me:secret@host/a/train.csv.gz?X-Amz-Signature=5", "https", "train.csv.gz"),
        ("http://[::1]:8000/train.csv", "http", "train.csv"),
    ],
)
def test_parts_of_a_path_or_url(address: str, protocol: str | None, name: str) -> None:
    assert (protocol_of(address), file_name(address)) == (protocol, name)
    assert is_http(address) == (protocol in ("http", "https"))


def test_no_secret_is_shown() -> None:
    assert redacted("https://me:secret@host:1/a.csv?X-Amz-Signature=5") == "https://host:1/a.csv"
    assert redacted("s3://bucket/what?.csv") == "s3://bucket/what?.csv"


@pytest.mark.parametrize("address", ["zip://a.csv::s3://bucket/a.zip", "s3://bucket/a::b"])
def test_chains_are_refused(address: str) -> None:
    with pytest.raises(DataError, match="chained URLs"):
        protocol_of(address)


def test_an_unknown_protocol_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"^foo://x: Protocol not known: foo; expected a path, or hf://, s3://"
    ):
        file_info("foo://x")

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(
        DataError,
        match=r"^s3://bucket/x: the package that reads s3:// is not installed: pip install 'bertdist\[s3\]'\.$",
    ):
        file_info("s3://bucket/x")
    with pytest.raises(DataError, match="Install s3fs to access S3"):
        file_info("ftp://host/x")


def test_the_most_certain_version_key_wins() -> None:
    assert file_version({"size": 5, "mtime": 3.0, "ETag": '"a"'}) == ("5", '"a"')
    assert file_version({"size": None}) == ("None", "")


def http_error(status: int) -> Exception:
    import aiohttp

    class Request:
        real_url = "http://host/x"

    return aiohttp.ClientResponseError(Request(), (), status=status)  # type: ignore[arg-type]


def boto_error(status: int) -> Exception:
    """As s3fs raises it: an OSError with botocore's error behind it."""
    cause, error = Exception("from botocore"), OSError("in words")
    cause.response = {"ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    error.__cause__ = cause
    return error


def hub_error(status: int) -> Exception:
    error = OSError("from the hub")
    error.response = type("Response", (), {"status_code": status})()  # type: ignore[attr-defined]
    return error


def gcs_error(status: int) -> Exception:
    kind = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
    error = kind("from gcsfs")
    error.code = str(status)
    return error


def cut_off() -> Exception:
    """aiohttp's answer that ended too early carries a code of 400, which is not the server's."""
    import aiohttp
    from aiohttp.http_exceptions import ContentLengthError

    error = aiohttp.ClientPayloadError("not completed")
    error.__cause__ = ContentLengthError("Not enough data")
    return error


PASSING = [
    kind(status)
    for kind in (http_error, boto_error, hub_error, gcs_error)
    for status in (429, 500, 503)
]
PASSING += [
    cut_off(),
    ConnectionResetError(),
    TimeoutError(),
    asyncio.TimeoutError(),
    EOFError(),
    OSError("disk"),
]
LASTING = [
    kind(status)
    for kind in (http_error, boto_error, hub_error, gcs_error)
    for status in (400, 403, 404, 416)
]
LASTING += [
    FileNotFoundError(),
    PermissionError(),
    TypeError(),
    type("NoCredentialsError", (OSError,), {})(),
]


@pytest.mark.parametrize("error", PASSING, ids=named)
def test_transient_errors_are_retried(error: Exception) -> None:
    errors, said = [error, error], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        def action() -> str:
            if errors:
                raise errors.pop()
            return "found"

        assert retry("http://host/x", action, said.append) == "found"
    assert len(said) == 2 and all(
        line.startswith("http://host/x: ") and "trying again" in line for line in said
    )


@pytest.mark.parametrize("error", LASTING, ids=named)
def test_permanent_errors_are_raised_at_once(error: Exception) -> None:
    tries = []

    def action() -> None:
        tries.append(1)
        raise error

    with pytest.raises(DataError, match=r"^s3://bucket/x"):
        retry("s3://bucket/x", action)
    assert len(tries) == 1


def test_tries_are_counted() -> None:
    tries = []

    def action() -> None:
        tries.append(1)
        raise ConnectionResetError("peer")

    with pytest.raises(
        DataError,
        match=r"^s3://x cannot be read: ConnectionResetError peer; given up after 4 tries; check the URL",
    ):
        retry("s3://x", action)
    assert len(tries) == FIRST_TRIES


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (
            boto_error(403),
            "s3://b/x: access denied, or it is not there (the server answers 403); AWS_ACCESS_KEY_ID and",
        ),
        (
            boto_error(404),
            "s3://b/x: there is no such file (the server answers 404); check each part of the URL.",
        ),
        (boto_error(412), "s3://b/x changed while it was read; read files that do not change."),
        (http_error(410), "s3://b/x cannot be read: the server answers 410."),
        (TypeError("two\nlines"), "s3://b/x cannot be read: TypeError two lines."),
    ],
    ids=named,
)
def test_permanent_errors_are_one_line(error: Exception, found: str) -> None:
    def action() -> None:
        raise error

    with pytest.raises(DataError) as raised:
        retry("s3://b/x", action)
    assert str(raised.value).startswith(found) and "\n" not in str(raised.value)


def test_the_pauses_double_and_leave_the_seeded_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import random

    pauses: list[float] = []
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    random.seed(1)
    expected = random.random()
    random.seed(1)

    def action() -> None:
        raise TimeoutError

    with pytest.raises(DataError):
        retry("s3://x", action, None, 9)
    assert random.random() == expected
    for pause, most in zip(pauses, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert most / 2 <= pause <= most


# Files and their descriptions


def test_local_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.csv", "a.csv", "c.tsv", "deep/er/d.csv", "deep/e[1].csv", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list_files("*.csv") == ["a.csv", "b.csv"]
    assert list_files(f"{tmp_path}/?.csv") == [f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"]
    assert list_files("**/*.csv") == ["a.csv", "b.csv", "deep/e[1].csv", "deep/er/d.csv"]
    assert list_files("deep/e[1].csv") == ["deep/e[1].csv"]
    assert list_files(f"file://{tmp_path}/c.tsv") == [f"{tmp_path}/c.tsv"]
    for pattern, found in {
        "a.cvs": "a.cvs: no such file. Did you mean 'a.csv'?",
        "no/a.csv": "no/a.csv: no such folder.",
        "deep": "deep is a folder; expected a file, or a pattern such as deep/*.csv.",
        "deep/*.tsv": "deep/*.tsv matches no file; deep contains 'e[1].csv', 'er'.",
        "no/*.csv": "no/*.csv matches no file; there is no folder no.",
        "folder.csv/*": "folder.csv/* matches no file; folder.csv is empty.",
    }.items():
        with pytest.raises(DataError) as raised:
            list_files(pattern)
        assert str(raised.value) == found


def test_http_files_are_described() -> None:
    with FaultyServer({"/a.csv": DATA}) as server:
        address = f"{server.url}/a.csv?token=secret"
        assert list_files(address) == [address]
        assert (file_size(address), file_fingerprint(address)) == (1_000_000, '1000000-"1"')
        for wrong, found in {
            "/a*.csv": "http has no list of files",
            "/b.csv?x=secret": "there is no such file",
        }.items():
            with pytest.raises(DataError, match=found) as raised:
                list_files(server.url + wrong)
            assert "secret" not in str(raised.value)
        server.sends_size = False
        assert file_size(address) is None
    with pytest.raises(DataError, match="given up after 4 tries; check the URL and the network"):
        file_size(address)  # nobody is there any more


def test_a_fingerprint_depends_on_bytes_not_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "EDGE_BYTES", 100)
    path = tmp_path / "a.csv"
    seen = set()
    for data in (
        b"",
        b"a",
        bytes(100),
        bytes(150),
        bytes(149) + b"a",
        bytes(250),
        b"a" + bytes(249),
        bytes(249) + b"a",
    ):
        path.write_bytes(data)
        first = file_fingerprint(str(path))
        os.utime(path, (1, 1))
        assert file_fingerprint(str(path)) == first and file_size(str(path)) == len(data)
        seen.add(first)
    assert len(seen) == 8
    path.write_bytes(bytes(120) + b"a" + bytes(129))  # the middle of a long file is not looked at
    assert file_fingerprint(str(path)) in seen


# S3


def test_s3_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch) as s3:
        s3.create_bucket(Bucket="bucket")
        lines = b'{"text": "a"}\n' * 999
        bodies = {
            "x/1.csv": DATA,
            "x/2.csv": DATA,
            "x/y/3.csv": b"c",
            "x/4.csv.gz": PACKED["a.csv.gz"],
        }
        bodies |= {"x/5.jsonl": lines, "6.parquet": parquet()}
        for key, body in bodies.items():
            s3.put_object(Bucket="bucket", Key=key, Body=body)
        assert list_files("s3://bucket/x/*.csv") == [
            "s3://bucket/x/1.csv",
            "s3://bucket/x/2.csv",
        ]
        assert list_files("s3://bucket/x/**/*.csv") == [
            f"s3://bucket/x/{key}.csv" for key in ("1", "2", "y/3")
        ]
        assert list_files("s3://bucket/6.parquet") == ["s3://bucket/6.parquet"]
        assert read("s3://bucket/x/1.csv", 123_456) == DATA[123_456:]
        assert read("s3://bucket/x/4.csv.gz", 123_456) == DATA[123_456:]
        assert open_bytes("s3://bucket/x/5.jsonl", 14).readline() == b'{"text": "a"}\n'
        with open_seekable("s3://bucket/6.parquet") as file:
            assert pa.parquet.read_table(file).equals(TABLE)
        for pattern, found in {
            "s3://bucket/x": "s3://bucket/x is a folder; expected a file, or a pattern such as s3://bucket/x/*.parquet.",
            "s3://bucket/x/*.tsv": "s3://bucket/x/*.tsv matches no file",
            "s3://bucket/x/7.csv": "s3://bucket/x/7.csv: there is no such file",
            "s3://no-bucket/x.csv": "s3://no-bucket/x.csv: there is no such file",
        }.items():
            with pytest.raises(DataError) as raised:
                list_files(pattern)
            assert str(raised.value).startswith(found)
        assert file_size("s3://bucket/x/1.csv") == 1_000_000
        before = file_fingerprint("s3://bucket/x/1.csv")
        assert before != file_fingerprint("s3://bucket/x/y/3.csv")
        stream = open_bytes("s3://bucket/x/1.csv")
        stream.read(10)
        s3.put_object(Bucket="bucket", Key="x/1.csv", Body=DATA[::-1])
        with pytest.raises(DataError, match=r"^s3://bucket/x/1.csv changed while it was read"):
            stream.read()
        assert list_files("s3://bucket/x/*.csv")  # what a new run does first
        assert file_fingerprint("s3://bucket/x/1.csv") != before


def test_s3_without_credentials_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with s3_server(monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        with pytest.raises(
            DataError,
            match=r"^s3://bucket/x.csv: access denied, .* AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or",
        ):
            list_files("s3://bucket/x.csv")


def test_gs_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if (
        importlib.util.find_spec("gcsfs") is None
    ):  # not imported here: remote sets an environment variable before
        pytest.skip("needs gcsfs (pip install -e '.[gs]')")
    with FakeGcs({"x/1.csv": DATA, "x/2.csv.gz": PACKED["a.csv.gz"], "x/y/3.csv": b"c"}) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setitem(
            fsspec.config.conf, "gs", {"token": "anon"}
        )  # FSSPEC_GS, which is read when fsspec is imported
        assert list_files("gs://bucket/x/**/*.csv") == [
            "gs://bucket/x/1.csv",
            "gs://bucket/x/y/3.csv",
        ]
        server.drops.extend([0, 70_000])
        server.statuses.extend([0, 503])
        assert read("gs://bucket/x/1.csv", 123_456) == DATA[123_456:]
        assert read("gs://bucket/x/2.csv.gz", 123_456) == DATA[123_456:]
        assert file_size("gs://bucket/x/1.csv") == 1_000_000
        for wrong, found in {
            "gs://bucket/x": "is a folder",
            "gs://bucket/no.csv": "there is no such file",
        }.items():
            with pytest.raises(DataError, match=f"^{wrong}.*{found}"):
                list_files(wrong)
        stream = open_bytes("gs://bucket/x/1.csv")
        stream.read(10)
        server.objects["x/1.csv"] = DATA[::-1]
        with pytest.raises(DataError, match=r"^gs://bucket/x/1.csv changed while it was read"):
            stream.read()


# Forks

FORKING = """
import gc, multiprocessing, sys
from bertdist.data.readers import remote

remote.REQUEST_BYTES = 100_000
url, forgetful = sys.argv[1], len(sys.argv) > 2
if forgetful:  # the child frees what it inherited, as it would without this project
    remote._inherited = type("Nothing", (), {"append": lambda self, value: None, "pop": lambda self: None})()

def whole():
    return len(remote.open_bytes(url).read())

stream = remote.open_bytes(url)
begun = len(stream.read(1000))
def child():
    gc.collect()
    print("child", whole(), begun + len(stream.read()), flush=True)

kept = [stream]
if forgetful:
    kept.clear()
    del stream
    whole = lambda: remote.file_size(url)
    whole()
    def child():
        print("child", whole(), flush=True)
        gc.collect()

gc.collect()
for _ in range(2):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    print("parent", whole(), *(begun + len(stream.read()) for stream in kept), flush=True)
"""


def test_a_fork_reads_and_so_does_its_parent() -> None:
    with FaultyServer({"/a.csv": DATA}) as server:
        command = [
            sys.executable,
            "-W",
            "ignore:This process",
            "-c",
            FORKING,
            f"{server.url}/a.csv",
        ]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert found.stdout.splitlines()[:2] == [
            "child 1000000 1000000",
            "parent 1000000 1000000",
        ], found.stderr
        assert found.stdout.splitlines()[2:] == ["child 1000000 1000", "parent 1000000 1000"], (
            found.stderr
        )


def test_a_fork_reads_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch) as s3:
        s3.create_bucket(Bucket="bucket")
        s3.put_object(Bucket="bucket", Key="a.csv", Body=DATA)
        command = [sys.executable, "-W", "ignore:This process", "-c", FORKING, "s3://bucket/a.csv"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert found.stdout.splitlines()[:2] == [
            "child 1000000 1000000",
            "parent 1000000 1000000",
        ], found.stderr


def test_a_fork_that_frees_what_it_inherited_is_seen() -> None:
    with FaultyServer({"/a.csv": DATA}) as server:
        command = [
            sys.executable,
            "-W",
            "ignore:This process",
            "-c",
            FORKING,
            f"{server.url}/a.csv",
            "forgetful",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "child 1000000\n"
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:  # the parent waits for an answer that has come
                process.kill()
            else:
                pytest.skip(
                    "this fsspec does not harm the parent: remote need not hold anything over a fork"
                )
