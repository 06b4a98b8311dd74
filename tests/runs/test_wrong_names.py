"""A name that is wrong, or a hub that is not there: one line with the reason and the way without a network, exit code 1.

Some as a user would type them, in a real process, the others through `main` in a forked child; the hub is a server on loopback, or a
port where nobody listens.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from accelerate import Accelerator
from forked import run_ranks
from huggingface_hub import constants
from rows import EVERY_FAULT, Breaking, make_rows, run_main, write_rows

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {  # status, and the hub's own two headers
    "gated": (
        403,
        "GatedRepo",
        "Access to model is restricted and you are not in the authorized list.",
    ),
    "unknown": (404, "RepoNotFound", "Repository not found"),
    "broken": (503, "", ""),
}


@contextmanager
def hub(kind: str, asked: list[str]) -> Iterator[str]:
    """The address of a hub that says this to all; "silent": nobody listens there."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            status, code, message = ANSWERS[kind]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    address = f"http://127.0.0.1:{server.server_port}"
    if kind == "silent":
        server.server_close()
        yield address
        return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.tsv", make_rows(12))


def typed(tmp_path: Path, *words: str | Path, endpoint: str = "", offline: bool = False) -> str:
    """The one line that a command says; it has not begun, and its exit code is 1."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HF_TOKEN")
    }
    environment |= {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_DATASETS_OFFLINE": str(int(offline)),
    }
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith(("Device  ", "Precision  "))
    ]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("bertdist: "), (
        done.stdout
    )
    return lines[0].removeprefix("bertdist: ")


def setting(tmp_path: Path, endpoint: str, offline: bool = False) -> Breaking:
    """What the environment does to a process of its own."""

    def breaking(accelerator: Accelerator) -> None:
        for module in (constants, datasets.config):
            module.HF_HUB_OFFLINE, module.HF_ENDPOINT = offline, endpoint
        constants.ENDPOINT = constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint
        constants.HF_HUB_CACHE = str(tmp_path / "hf" / "hub")

    return breaking


def forked(tmp_path: Path, *words: str | Path, endpoint: str = "", offline: bool = False) -> str:
    """The same through `train.main` in a forked child: where no more is asked of the hub than whether it is there."""

    ((code, said, _),) = run_ranks(
        1, run_main, list(map(str, words[1:])), setting(tmp_path, endpoint, offline)
    )
    lines = [line for line in said.splitlines() if not line.startswith(("Device  ", "Precision  "))]
    assert code == 1 and len(lines) == 1 and lines[0].startswith("bertdist: "), said
    return lines[0].removeprefix("bertdist: ")


usual = typed if EVERY_FAULT else forked  # five seconds each


def training(tmp_path: Path, *words: str | Path) -> list[str | Path]:
    return ["bertdist.train", "--use_cpu", "--output_dir", tmp_path / "out", *words]


WRONG = "google-bert/bert-base-uncasde"
WAY = "Offline, give a folder that holds config.json, model.safetensors and the tokenizer; on a machine with a network, `hf download "
SAID = {
    "gated": "It is gated: accept its terms at {hub}/google-bert/bert-base-uncasde, then set HF_TOKEN or run `hf auth login`.",
    "unknown": "There is no such model on the hub, or it is private (set HF_TOKEN or run `hf auth login`).",
    "broken": "The hub ({hub}) cannot be reached (it answers with HTTP error 503), and it is not in the cache ",
    "silent": "The hub ({hub}) cannot be reached ([Errno 111] Connection refused), and it is not in the cache ",
}


@pytest.mark.parametrize("kind", SAID)
def test_a_model_that_the_hub_does_not_give(tmp_path: Path, file: Path, kind: str) -> None:
    asked: list[str] = []
    with hub(kind, asked) as address:
        told = (typed if kind == "unknown" else forked if kind == "broken" else usual)(
            tmp_path,
            *training(tmp_path, "--model_name_or_path", WRONG, "--train_file", file),
            endpoint=address,
        )
    assert told.startswith(
        f"--model_name_or_path {WRONG} is neither a folder here nor a model on the Hub. "
    ), told
    assert SAID[kind].format(hub=address) in told and WAY in told, told
    assert len(asked) <= 6, "no rounds of retries"


def test_a_model_without_a_network(tmp_path: Path, file: Path) -> None:
    told = usual(
        tmp_path,
        *training(tmp_path, "--model_name_or_path", WRONG, "--train_file", file),
        offline=True,
    )
    assert (
        f"HF_HUB_OFFLINE is set, and it is not in the cache {tmp_path / 'hf' / 'hub'}." in told
        and WAY in told
    )


@pytest.mark.parametrize("kind", ["unknown", "silent"])
def test_a_data_set_that_the_hub_does_not_give(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    with hub(kind, []) as address:
        told = (forked if kind == "silent" else usual)(
            tmp_path,
            *training(
                tmp_path, "--model_name_or_path", tiny_model, "--dataset_name", "stanfordnlp/imbd"
            ),
            endpoint=address,
        )
    assert told.startswith("stanfordnlp/imbd is neither a local folder nor a data set on the Hub. ")
    reason = "There is no such data set on the hub" if kind == "unknown" else "refused"
    assert reason in told and told.endswith(" --train_file takes files.")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task_name", "sst3"], "--task_name 'sst3' is not a GLUE task. Did you mean 'sst2'?"),
        (
            ["--train_file", "{file}", "--validation_file", "{file}", "--metrics", "acuracy"],
            "--metrics acuracy: unknown score. Did you mean 'accuracy'?",
        ),
        (
            ["--train_file", "{file}", "--tokenizer_name", "bert-base-uncasde"],
            "No tokenizer 'bert-base-uncasde', neither a folder here nor on the Hub. ",
        ),
    ],
    ids=["task", "metric", "tokenizer"],
)
def test_other_names(
    tiny_model: Path, tmp_path: Path, file: Path, words: list[str], told: str
) -> None:
    """A flag and a column are in test_user_errors.py."""
    words = [word.format(file=file) for word in words]
    say = usual if "--metrics" in words else forked
    assert say(
        tmp_path, *training(tmp_path, "--model_name_or_path", tiny_model, *words), offline=True
    ).startswith(told)


@pytest.mark.parametrize("n", [1, 2])
def test_what_the_cache_holds_is_used_where_the_hub_is_not_there(
    tiny_model: Path, tmp_path: Path, file: Path, n: int
) -> None:
    """Said once, in one line, and no file is asked for again and again."""
    stored = tmp_path / "hf" / "hub" / "models--our-team--tiny"
    shutil.copytree(tiny_model, stored / "snapshots" / ("a" * 40))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("a" * 40)
    words = training(
        tmp_path,
        "--model_name_or_path",
        "our-team/tiny",
        "--train_file",
        file,
        "--max_train_steps",
        "1",
    )
    with hub("silent", []) as address:
        ends = run_ranks(n, run_main, list(map(str, words[1:])), setting(tmp_path, address))
    assert [code for code, *_ in ends] == [0] * n, ends
    lines = [
        line for _, said, _ in ends for line in said.splitlines() if "cannot be reached" in line
    ]
    assert lines == [
        f"The hub ({address}) cannot be reached ([Errno 111] Connection refused): our-team/tiny is loaded from the cache."
    ]
