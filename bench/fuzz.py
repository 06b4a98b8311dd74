"""Whatever bytes a reader is given, only a BertdistError may come out.

    python -m bench.fuzz --inputs 100000

hypothesis makes the inputs: bytes, and bytes made of the reader's own words (quotes, delimiters,
braces, marks of encodings); files that
were good, with some bytes changed; JSON of the right shape with values of the wrong kind. One line
a reader: inputs, how many were
read and how many refused, seconds. The first input that brings out anything else is printed,
shrunk, and ends the program with code 1.

The files lie in memory where there is a place for that: a checkpoint is flushed to the disk 7
times, which took 4 to 40 ms an input.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bertdist.core.args import read_config
from bertdist.core.atomic_io import write_folder
from bertdist.core.config import DataConfig, OptimConfig
from bertdist.core.errors import BertdistError
from bertdist.data.bad_rows import read_bad_rows
from bertdist.data.load_data import load_records, open_stream
from bertdist.data.stream_scan import _read_scan as read_scan
from bertdist.training.checkpoint import Checkpointer, TrainState
from bertdist.training.optimizer import create_optimizer
from bertdist.training.resume_check import ResumeSignature

Inputs = st.SearchStrategy[bytes]
ONE: Any = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0, scaler=None)
DEEP = [b"[" * 5000, b'{"a":' * 5000]  # deeper than Python's own stack
WORDS = [
    *DEEP,
    b",",
    b"\t",
    b'"',
    b'""',
    b"\n",
    b"\r\n",
    b"\r",
    b"\0",
    b" ",
    b"text",
    b"label",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"null",
    b"NaN",
    b"1e999",
    b"-0",
    b"true",
    b'{"text": "a", "label": 1}\n',
    "🙂\u202e\u00a0".encode(),
    b"\x1a",
    b";",
    b"|",
    b"#",
    b"'",
    b"a" * 300,
]
YAML_WORDS = [
    b"[" * 500,  # as deep; PyYAML takes seconds for 5,000
    b"seed",
    b": ",
    b"\n",
    b"- ",
    b"!!python/object:os.system",
    b"&a",
    b"*a",
    b"[",
    b"]",
    b"{",
    b"}",
    b"<<",
    b"? ",
    b"|",
    b">",
    b"1",
    b"~",
]
MEMORY = Path("/dev/shm")
GOOD_TABLE = pa.table({"text": ["a fine film", "dull", "x"], "label": ["pos", "neg", "pos"]})


class Reader(NamedTuple):
    """Something that reads what others may have written."""

    name: str
    inputs: Inputs
    read: Callable[[bytes], object]
    share: float  # of all inputs


def of_words(words: list[bytes]) -> Inputs:
    """Arbitrary bytes, or words of a format in any order."""
    return st.one_of(
        st.lists(st.sampled_from(words), max_size=25).map(b"".join), st.binary(max_size=200)
    )


def changed(good: bytes) -> Inputs:
    """Good bytes with some of them changed, left out or added, or cut short."""

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(good)
        for at, out, new in edits:
            at %= len(data) + 1
            data[at : at + out] = new
        return bytes(data)

    edit = st.tuples(st.integers(0, max(1, len(good))), st.integers(0, 9), st.binary(max_size=4))
    return st.one_of(
        st.lists(edit, min_size=1, max_size=4).map(change),
        st.integers(0, len(good)).map(lambda size: good[:size]),
    )


def parquet_of(rows: list[tuple[bytes | None, bytes | None]]) -> bytes:
    """A whole parquet file whose texts and labels are whatever bytes."""
    texts, labels = (
        pa.array(column, pa.large_binary()).view(pa.large_string())
        for column in (zip(*rows, strict=True) if rows else ((), ()))
    )
    sink = io.BytesIO()
    pa.parquet.write_table(
        pa.table({"text": texts, "label": labels}),
        sink,
        row_group_size=2,
        use_dictionary=len(rows) % 2 == 0,
    )
    return sink.getvalue()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def like(good: Any) -> Inputs:
    """JSON of the same shape, of which some values are another thing; and JSON that is too deep."""
    if isinstance(good, dict):
        fields = {name: st.one_of(_like(value), JSON) for name, value in good.items()}
        shape: Any = st.fixed_dictionaries({}, optional=fields)
    else:
        shape = JSON
    found = st.one_of(shape, JSON).map(lambda value: json.dumps(value).encode())
    return st.one_of(found, found, st.sampled_from(DEEP))


def _like(value: Any) -> Any:
    if isinstance(value, dict) and value:
        return st.fixed_dictionaries(
            {}, optional={name: st.one_of(st.just(inner), JSON) for name, inner in value.items()}
        )
    return st.just(value)


def table_reader(kind: str, folder: Path, stream: bool) -> Callable[[bytes], object]:
    """Rows to learn from, of a file of this kind."""

    def read(content: bytes) -> object:
        path = folder / f"data.{kind}"
        path.write_bytes(content)
        data = DataConfig(
            train_file=[str(path)],
            on_bad_row="skip" if len(content) % 2 else "fail",
            streaming=stream,
        )
        if not stream:
            rows = load_records(data, "train")
            return (
                [str(rows.location(row)) for row in range(len(rows))],
                rows.lengths(),
                list(map(rows.__getitem__, range(len(rows)))),
            )
        return [len(window.records) for window in open_stream(data, 1).windows()]

    return read


def config_reader(folder: Path) -> Callable[[bytes], object]:
    """--config."""

    def read(content: bytes) -> object:
        path = folder / "run.yaml"
        path.write_bytes(content)
        return read_config(
            [
                "--config",
                str(path),
                "--model_name_or_path=m",
                "--train_file=t.tsv",
                "--output_dir=o",
            ]
        )

    return read


class Saved:
    """A small checkpoint, whole; one of its files is replaced."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.model = folder, nn.Linear(2, 2)
        self.optimizer = create_optimizer(self.model, OptimConfig())
        self.checkpoints = Checkpointer(
            folder, ResumeSignature({"seed": 1}), ONE, 2, lambda *lines: None
        )
        self.checkpoints.save(self.model, self.optimizer, TrainState(step=1))
        self.whole = {path.name: path.read_bytes() for path in (folder / "step_000001").iterdir()}

    def replaced(self, name: str, manifest: bool) -> Callable[[bytes], object]:
        """manifest: whether it agrees with the file, as after a hand's work."""

        def read(content: bytes) -> object:
            shutil.rmtree(self.folder)
            files = {**self.whole, name: content}
            written = self.folder / "step_000001"
            if manifest:
                write_folder(written, partial(_fill, files))
            else:
                written.mkdir(parents=True)
                _fill(files, written)
            return self.checkpoints.restore(self.model, self.optimizer)

        return read


def _fill(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def kept_reader(
    folder: Path, name: str, read_kept: Callable[[Path], object]
) -> Callable[[bytes], object]:
    """A file that an earlier start of the run has left."""

    def read(content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read_kept(folder / name)

    return read


def readers(folder: Path) -> list[Reader]:
    """All of them, with files below `folder`."""
    parquet = io.BytesIO()
    pa.parquet.write_table(GOOD_TABLE, parquet)
    saved = Saved(folder / "checkpoints")
    state = json.loads(saved.whole["state.json"])
    manifest = json.loads(saved.whole["manifest.json"])
    scan_stream = {
        "fingerprint": "f",
        "rows": {"0": 3},
        "kind": "text",
        "labels": [["a", 2]],
        "bad": [["a.tsv", 3, "why", "x"]],
    }
    row = {"file": "a.tsv", "line": 3, "reason": "why", "text": "x"}
    good = b'text,label\n"a fine, film",pos\ndull,neg\n'
    words = st.none() | st.lists(
        st.sampled_from([b"a", b"\xff", b"\xed\xa0\x80", b" ", "\u00e9".encode(), b"1"]), max_size=4
    ).map(b"".join)
    any_texts = st.lists(st.tuples(words, words), max_size=8).map(parquet_of)
    found = [
        Reader(
            "csv",
            of_words([*WORDS, good]) | changed(good),
            table_reader("csv", folder, False),
            0.12,
        ),
        Reader(
            "tsv",
            of_words([*WORDS, good]) | changed(good.replace(b",", b"\t")),
            table_reader("tsv", folder, False),
            0.12,
        ),
        Reader(
            "jsonl",
            of_words(WORDS) | changed(b'{"text": "a", "label": "b"}\n' * 2),
            table_reader("jsonl", folder, False),
            0.12,
        ),
        Reader(
            "parquet",
            st.binary(max_size=60) | changed(parquet.getvalue()),
            table_reader("parquet", folder, False),
            0.1,
        ),
        Reader("parquet of any texts", any_texts, table_reader("parquet", folder, False), 0.04),
        Reader(
            "parquet, streamed",
            any_texts | changed(parquet.getvalue()),
            table_reader("parquet", folder, True),
            0.04,
        ),
        Reader(
            "csv, streamed",
            of_words(WORDS) | changed(good),
            table_reader("csv", folder, True),
            0.05,
        ),
        Reader(
            "jsonl, streamed",
            changed(b'{"text": "a", "label": "b"}\n' * 2),
            table_reader("jsonl", folder, True),
            0.05,
        ),
        Reader(
            "--config",
            of_words(YAML_WORDS) | changed(b"seed: 3\nlabel_names: [a, b]\n"),
            config_reader(folder),
            0.12,
        ),
        Reader(
            "survey.json",
            like(scan_stream),
            kept_reader(folder, "survey.json", lambda path: read_scan(path, "f")),
            0.06,
        ),
        Reader(
            "bad_rows.jsonl",
            like(row) | of_words(WORDS),
            kept_reader(folder, "bad_rows.jsonl", read_bad_rows),
            0.06,
        ),
        Reader(
            "manifest.json",
            like(manifest) | changed(saved.whole["manifest.json"]),
            saved.replaced("manifest.json", False),
            0.06,
        ),
        Reader(
            "state.json",
            like(state) | changed(saved.whole["state.json"]),
            saved.replaced("state.json", True),
            0.04,
        ),
        Reader(
            "model.safetensors",
            changed(saved.whole["model.safetensors"]),
            saved.replaced("model.safetensors", True),
            0.02,
        ),
    ]
    assert abs(sum(reader.share for reader in found) - 1) < 1e-6
    return found


def fuzz(reader: Reader, inputs: int) -> tuple[int, int]:
    """Inputs that were read, and that were refused. Raises what else comes out, for the smallest
    input that brings it out.
    """
    counts = [0, 0]

    @settings(
        max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(reader.inputs)
    def attempt(content: bytes) -> None:
        try:
            reader.read(content)
            counts[0] += 1
        except BertdistError:
            counts[1] += 1

    attempt()
    return counts[0], counts[1]


def main(words: list[str]) -> int:
    """The command line; 1 where anything but a BertdistError came out."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz")
    parser.add_argument("--inputs", type=int, default=100_000, help="Inputs in all.")
    parser.add_argument("--reader", help="Only this one.")
    asked = parser.parse_args(words)
    failed = total = 0
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        for reader in readers(Path(folder)):
            if asked.reader not in (None, reader.name):
                continue
            began = time.monotonic()
            try:
                with redirect_stderr(io.StringIO()):
                    good, refused = fuzz(reader, max(1, round(asked.inputs * reader.share)))
            except Exception as error:
                failed += 1
                notes = " ".join(getattr(error, "__notes__", []))
                print(f"{reader.name:20} {type(error).__name__}: {error}\n  {notes}", flush=True)
                continue
            total += good + refused
            counts = f"{good + refused:8,} inputs  {good:7,} read  {refused:7,} refused"
            print(f"{reader.name:20} {counts}  {time.monotonic() - began:6.1f} s", flush=True)
    print(f"{total:,} inputs, {failed} readers with anything but a BertdistError")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
