"""One address -> the file system behind it, what it says of the file, and its faults in words: which pass, and which do not.

In: an address such as s3://bucket/key or https://host/file. Out: fsspec's file system, size and version of a file, or a DataError of one
line.
One module, because it is the only one that knows fsspec and the libraries behind it: their options, their errors, and what a fork does
to them.

Loader workers are forks. A child gets fsspec's file systems without the thread that runs them, and makes its own; but it must not free
those: closing their connections takes them out of the epoll that it shares with the parent, which then waits until its timeout for an
answer that has long come (fsspec 2026.9 frees them in its own hook). So a child keeps what it inherited.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn

from bertdist.errors import DataError

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
