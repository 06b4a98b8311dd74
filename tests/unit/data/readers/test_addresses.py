"""Addresses in parts and in messages, and which faults pass."""

import asyncio
import warnings
from typing import Any

import fsspec
import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers import remote
from bertdist.data.readers.remote import (
    FIRST_TRIES,
    file_info,
    file_name,
    file_version,
    is_http,
    protocol_of,
    redacted,
    retry,
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)


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
def test_an_address_in_parts(address: str, protocol: str | None, name: str) -> None:
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


def test_the_surest_word_of_a_version_counts() -> None:
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
def test_what_passes_is_tried_again(error: Exception) -> None:
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
def test_what_lasts_is_told_at_once(error: Exception) -> None:
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
def test_what_lasts_is_one_line(error: Exception, found: str) -> None:
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
