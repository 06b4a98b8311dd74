"""Loopback servers that fail like real ones: an http server with errors on demand, and moto's S3.

    with FaultyServer({"/a.csv": b"..."}, drops=3) as server:
        open_bytes(f"{server.url}/a.csv")

They run in threads of the test. A body may be a function (begin, end) -> bytes, for large files.
"""

import base64
import contextlib
import hashlib
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
import yaml

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
        "moto.server", reason="needs moto and flask (pip install -e '.[dev]')"
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


class Repository:
    """A model repository of an UploadHub: the files of each branch."""

    def __init__(self, private: bool, files: dict[str, bytes] | None = None) -> None:
        self.private = private
        self.branches = {"main": {".gitattributes": b"", **(files or {})}}
        self.messages: list[str] = []  # of commits

    @property
    def files(self) -> dict[str, bytes]:
        return {name: body for name, body in self.branches["main"].items() if name[0] != "."}


class UploadHub:
    """The part of the Hub that models are uploaded to and loaded from; for HF_ENDPOINT=url, with
    HF_HUB_DISABLE_XET=1 (large files by the basic transfer of LFS).

    repositories: by name. token: what it accepts. requests: all that were made, `POST /api/...`.
    statuses: a status instead, by a part of a request and then once.
    """

    def __init__(self, token: str = "hf_test") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.statuses: dict[str, int] = {}
        self.lfs: dict[str, bytes] = {}

    def __enter__(self) -> "UploadHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), upload_handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        target = self._server.serve_forever
        self._thread = threading.Thread(target=target, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def changes(self) -> list[str]:
        """The requests that are not of readers."""
        return [x for x in self.requests if not x.startswith(("GET ", "HEAD "))]

    def requests_of(self, name: str) -> list[str]:
        """Those about a repository: huggingface_hub asks for other things too, once a process."""
        return [x for x in self.requests if name in x]

    def commit_of(self, name: str, branch: str = "main") -> str:
        repository = self.repositories[name]
        files = {file: zlib.crc32(body) for file, body in repository.branches[branch].items()}
        seen = repr([sorted(files.items()), repository.messages])
        return hashlib.sha1(seen.encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any, str]:
        """(status, JSON or bytes, X-Error-Code)."""
        request = f"{method} {path}"
        self.requests.append(request)
        for part in [part for part in self.statuses if part in request]:
            return self.statuses.pop(part), {"error": "as the test asked"}, ""
        if token not in ("", f"Bearer {self.token}"):
            return 401, {"error": "Invalid username or password."}, ""
        if method in ("POST", "PUT") and not token and not path.startswith("/lfs/"):
            return 401, {"error": "no token"}, ""
        if method == "PUT" and (found := re.fullmatch("/lfs/([0-9a-f]{64})", path)):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.lfs[found[1]] = body
            return 200, {}, ""
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        pattern = r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?"
        found = re.fullmatch(pattern, path)
        repository = self.repositories.get(found[1]) if found else None
        if found is None or repository is None or (repository.private and not token):
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        return self._of_repository(found[1], repository, found[2] or "", body)

    def _validate(self, content: str) -> tuple[int, Any, str]:
        metadata = content.split("---")[1] if content.startswith("---") else "{}"
        values = yaml.safe_load(metadata)
        if values.get("license") == "no such":
            return 400, {"errors": [{"message": '"license" must be one of [...]'}]}, ""
        warned = [] if "library_name" in values else [{"message": "no library_name"}]
        return 200, {"errors": [], "warnings": warned}, ""

    def _create(self, given: dict[str, Any]) -> tuple[int, Any, str]:
        name = f"{given['organization']}/{given['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": name}, ""
        private = given.get("visibility") == "private" or given.get("private") is True
        self.repositories[name] = Repository(private)
        return 200, {"url": f"{self.url}/{name}", "id": name}, ""

    def _of_repository(
        self, name: str, repository: Repository, rest: str, body: bytes
    ) -> tuple[int, Any, str]:
        action, _, rest = rest.partition("/")
        branch, _, file = rest.partition("/")
        if action == "branch":
            repository.branches[branch] = dict(repository.branches["main"])
            return 200, {}, ""
        if action == "info":  # /info/lfs/objects/batch
            objects = [
                {**x, "actions": {"upload": {"href": f"{self.url}/lfs/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, ""
        files = repository.branches.get(branch or "main")
        if files is None and branch == self.commit_of(name):
            files = repository.branches["main"]
        if files is None:
            return 404, {"error": "Invalid rev id"}, "RevisionNotFound"
        if action in ("", "revision"):
            return 200, self._info(name, repository, branch or "main", files), ""
        if action == "preupload":
            modes = [self._upload_mode(x["path"], files) for x in json.loads(body)["files"]]
            return 200, {"files": modes}, ""
        if action == "commit":
            self._commit(repository, files, [json.loads(x) for x in body.splitlines()])
            oid = self.commit_of(name, branch)
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}, ""
        if action == "resolve" and file in files:
            return 200, files[file], ""
        return 404, {"error": "Entry not found"}, "EntryNotFound"

    def _info(
        self, name: str, repository: Repository, branch: str, files: dict[str, bytes]
    ) -> dict[str, Any]:
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "_id": "0", "sha": self.commit_of(name, branch), "tags": []}
        return {**info, "private": repository.private, "siblings": siblings}

    def _upload_mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        is_large, body = path.endswith(".safetensors"), files.get(path)
        oid = None
        if body is not None:
            blob = b"blob %d\0" % len(body) + body
            oid = (hashlib.sha256(body) if is_large else hashlib.sha1(blob)).hexdigest()
        mode = "lfs" if is_large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _commit(
        self, repository: Repository, files: dict[str, bytes], lines: list[dict[str, Any]]
    ) -> None:
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                repository.messages.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
            else:
                assert kind == "deletedFile", kind
                del files[value["path"]]


def upload_handler(hub: UploadHub) -> type[BaseHTTPRequestHandler]:
    """The request handler of an UploadHub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            path, token = unquote(self.path.partition("?")[0]), self.headers.get("Authorization")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, result, code = hub.answer(self.command, path, body, token or "")
            content = result if isinstance(result, bytes) else json.dumps(result).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            if isinstance(result, bytes):
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", hub.commit_of("/".join(path.split("/")[1:3])))
            else:
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer

    return Handler
