"""Loopback servers that fail like real ones: an http server with errors on demand, and moto's S3.

    with FaultyServer({"/a.csv": b"..."}, drops=3) as server:
        open_bytes(f"{server.url}/a.csv")

They run in threads of the test. A body may be a function (begin, end) -> bytes, for large files.
"""

import contextlib
import json
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote

import pytest

CHUNK = 1 << 16


class File:
    """The content of a path: bytes, or a function of an interval and a size; and an ETag."""

    def __init__(
        self,
        body: bytes | Callable[[int, int], bytes],
        size: int | None = None,
        etag: str | None = '"1"',
    ) -> None:
        self.size = len(body) if isinstance(body, bytes) else size
        self.part = (lambda begin, end: body[begin:end]) if isinstance(body, bytes) else body
        self.etag = etag


class FaultyServer:
    """files: path -> File. Settings may be changed while it runs.

    statuses: responses to the next GETs instead (0: none). drops: after how many bytes to
    cut off the next GETs (0: not). ranges: support Range. sends_size: send Content-Length, and not
    chunks of unknown number. gets: (path, first byte) of every GET.
    """

    def __init__(
        self,
        files: dict[str, File | bytes],
        *,
        ranges: bool = True,
        sends_size: bool = True,
        heads: bool = True,
    ) -> None:
        self.files = {
            path: file if isinstance(file, File) else File(file) for path, file in files.items()
        }
        self.ranges, self.sends_size, self.heads = ranges, sends_size, heads
        self.statuses: deque[int] = deque()
        self.drops: deque[int] = deque()
        self.encoding = ""  # Content-Encoding header of files that are compressed already
        self.gets: list[tuple[str, int]] = []
        self.sent = 0  # bytes of bodies
        self.trickle = 0.0  # seconds before each byte of a body

    def __enter__(self) -> "FaultyServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    """The request handler of one server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keep-alive: connections that a fork inherits
        disable_nagle_algorithm = True  # else every response takes 40 ms

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            if server.heads:
                self.answer(body=False)
            else:
                self.plain(405)

        def do_GET(self) -> None:
            status = server.statuses.popleft() if server.statuses else 0
            if status:
                self.plain(status)
            else:
                self.answer(body=True)

        def plain(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, *, body: bool) -> None:
            file = server.files.get(unquote(self.path.partition("?")[0]))
            if file is None and isinstance(server, FakeHub):
                return self.of_hub(server, body)
            if file is None and isinstance(server, FakeGcs):
                return self.of_gcs(server, body)
            if file is None:
                return self.plain(404)
            assert file.size is not None
            requested = (
                re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if server.ranges
                else None
            )
            begin = int(requested[1]) if requested else 0
            end = min(int(requested[2]) + 1, file.size) if requested and requested[2] else file.size
            self.send_response(206 if requested else 200)
            if requested:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{file.size}")
            if file.etag:
                self.send_header("ETag", file.etag)
            if isinstance(server, FakeHub):
                self.send_header("X-Repo-Commit", server.sha)
            if server.encoding:
                self.send_header("Content-Encoding", server.encoding)
            if server.sends_size:
                self.send_header("Content-Length", str(end - begin))
            else:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if body:
                server.gets.append((self.path, begin))
                with contextlib.suppress(OSError):  # a client may stop reading
                    self.send_body(file, begin, end)
            return None

        def of_hub(self, hub: "FakeHub", body: bool) -> None:
            result = hub.api(unquote(self.path.partition("?")[0]).rstrip("/"))
            if result is None:
                gated, here = "gated/name" in self.path, "user/name" in self.path
                self.send_response(403 if gated else 404)
                self.send_header(
                    "X-Error-Code",
                    "GatedRepo" if gated else "EntryNotFound" if here else "RepoNotFound",
                )
                self.send_header("X-Repo-Commit", hub.sha)
            else:
                self.send_response(200)
            self.send_json(result, body)

        def of_gcs(self, gcs: "FakeGcs", body: bool) -> None:
            result = gcs.api(
                unquote(self.path.partition("?")[0]), dict(parse_qsl(self.path.partition("?")[2]))
            )
            self.send_response(404 if result is None else 200)
            self.send_json(result, body)

        def send_json(self, result: Any, body: bool) -> None:
            text = b"" if result is None else json.dumps(result).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if body:
                with contextlib.suppress(OSError):
                    self.wfile.write(text)

        def send_body(self, file: File, begin: int, end: int) -> None:
            limit = server.drops.popleft() if server.drops else 0
            stop = min(end, begin + limit) if limit else end
            while begin < stop:
                time.sleep(server.trickle)
                part = file.part(begin, min(begin + (1 if server.trickle else CHUNK), stop))
                self.wfile.write(part if server.sends_size else b"%x\r\n%b\r\n" % (len(part), part))
                begin += len(part)
                server.sent += len(part)
            if stop < end:
                self.close_connection = True
            elif not server.sends_size:
                self.wfile.write(b"0\r\n\r\n")

    return Handler


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A boto3 client of an S3 server in the environment; skips without moto or s3fs."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs (pip install -e '.[dev]')")
    moto_server = pytest.importorskip(
        "moto.server", reason="needs moto[server] (pip install -e '.[dev]')"
    )
    boto3 = pytest.importorskip("boto3", reason="needs boto3, which comes with moto")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()  # of another test's server
    try:
        yield boto3.client("s3")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


class FakeHub(FaultyServer):
    """The Hub with one data set, user/name: its files by path; for processes with HF_ENDPOINT=url.

    They need HF_HUB_OFFLINE=0 too. `gated/name` has terms to be accepted, others do not exist.
    """

    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, data_set: dict[str, bytes]) -> None:
        super().__init__({})
        self.data_set = data_set
        for path, body in data_set.items():
            for revision in ("main", self.sha):
                self.files[f"/datasets/user/name/resolve/{revision}/{path}"] = File(body)

    def api(self, path: str) -> Any:
        """The JSON of /api/..., or None."""
        if path in (
            "/api/datasets/user/name",
            *(f"/api/datasets/user/name/revision/{name}" for name in ("main", self.sha)),
        ):
            siblings = [{"rfilename": name} for name in self.data_set]
            return {
                "id": "user/name",
                "_id": "0",
                "sha": self.sha,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": siblings,
            }
        if tree := re.fullmatch(r"/api/datasets/user/name/tree/(main|[0-9a-f]{40})/?(.*)", path):
            inside = {
                name: body
                for name, body in self.data_set.items()
                if name.startswith(f"{tree[2]}/" if tree[2] else "")
            }
            folders = sorted({name.rsplit("/", 1)[0] for name in inside if "/" in name} - {tree[2]})
            entries = [
                {"type": "directory", "path": name, "oid": "0", "size": 0} for name in folders
            ]
            return entries + [
                {"type": "file", "path": name, "oid": f"{zlib.crc32(body):x}", "size": len(body)}
                for name, body in inside.items()
            ]
        return None


class FakeGcs(FaultyServer):
    """Google Cloud Storage with one bucket, `bucket`.

    gcsfs needs STORAGE_EMULATOR_HOST=url and FSSPEC_GS='{"token": "anon"}'.
    """

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(
            {f"/download/storage/v1/b/bucket/o/{name}": body for name, body in objects.items()}
        )
        self.objects = objects

    def api(self, path: str, query: dict[str, str]) -> Any:
        """The JSON of /storage/v1/..., or None."""
        if path == "/storage/v1/b/bucket/o":
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "\0")
            inside = {name: name[len(prefix) :] for name in self.objects if name.startswith(prefix)}
            folders = sorted(
                {
                    prefix + rest.partition(delimiter)[0] + delimiter
                    for rest in inside.values()
                    if delimiter in rest
                }
            )
            return {
                "items": [
                    self.resource_of(name) for name, rest in inside.items() if delimiter not in rest
                ],
                "prefixes": folders,
            }
        name = path.removeprefix("/storage/v1/b/bucket/o/")
        return self.resource_of(name) if name in self.objects else None

    def resource_of(self, name: str) -> dict[str, str]:
        """Fields of https://cloud.google.com/storage/docs/json_api/v1/objects that gcsfs reads."""
        version = f"{zlib.crc32(self.objects[name]):x}"
        return {
            "name": name,
            "bucket": "bucket",
            "size": str(len(self.objects[name])),
            "etag": version,
            "updated": "2026-01-01T00:00:00.000Z",
        }
