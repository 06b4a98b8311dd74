"""Splits as streams: every row, in order, from any state; a small Hub on loopback is the real one."""

import contextlib
import functools
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from rows import not_utf8
from servers import FakeHub

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_records
from bertdist.data.readers import hub_reader as hub
from bertdist.data.readers.hub_reader import HubReader
from bertdist.data.records import ColumnNames
from bertdist.data.source import Chunk, DataSource
from bertdist.data.streaming import Stream

ROWS = [{"text": f"text {row}", "label": row % 3, "number": row / 2} for row in range(100)]
FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "number": datasets.Value("float64"),
    }
)
KINDS = ["parquet", "jsonl", "csv", "saved", "saved split"]
# datasets 5.2 leaves the files of its csv reader to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ROWS", 7)
    hub._load.cache_clear()
    datasets.disable_progress_bars()


def write(folder: Path, kind: str) -> Path:
    """100 rows; files of 40, 3 and 57 where there are several."""
    folder.mkdir()
    whole = datasets.Dataset.from_list(ROWS, features=FEATURES)
    if kind == "saved":
        datasets.DatasetDict(train=whole).save_to_disk(str(folder))
    elif kind == "saved split":
        datasets.Dataset.from_list(ROWS, features=FEATURES, split="train").save_to_disk(str(folder))
    else:
        for number, (begin, end) in enumerate([(0, 40), (40, 43), (43, 100)]):
            part, path = whole.select(range(begin, end)), folder / f"train-{number}.{kind}"
            if kind == "parquet":
                pa.parquet.write_table(
                    part.with_format("arrow")[:], path, row_group_size=10, compression="none"
                )
            elif kind == "csv":
                part.to_csv(path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[begin:end]))
    return folder


def as_lists(pieces: list[Chunk]) -> list[tuple[Any, ...]]:
    return [
        (
            piece.num_rows,
            piece.state,
            {name: column.to_pylist() for name, column in piece.columns.items()},
        )
        for piece in pieces
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_from_every_state(kind: str, tmp_path: Path) -> None:
    source: DataSource = HubReader(str(write(tmp_path / "data", kind)))
    assert pickle.loads(pickle.dumps(source)) == source
    assert source.column_names() == ["text", "label", "number"]
    pieces = list(source.chunks(["label", "text"]))
    assert [text for piece in pieces for text in piece.columns["text"].to_pylist()] == [
        row["text"] for row in ROWS
    ]
    assert [label for piece in pieces for label in piece.columns["label"].to_pylist()] == [
        row["label"] for row in ROWS
    ]
    assert (
        max(piece.num_rows for piece in pieces) == 7
        and str(pieces[3].location(1)) == f"{tmp_path}/data split 'train' row 22"
    )
    for number, piece in enumerate(pieces):
        again = list(source.chunks(["label", "text"], json.loads(json.dumps(piece.state))))
        assert as_lists(again) == as_lists(pieces[number:])
        assert str(again[0].location(0)) == str(piece.location(0))
        assert all(
            one.columns["text"].equals(other.columns["text"])
            for one, other in zip(again, pieces[number:], strict=True)
        )


def test_names_with_dots_are_columns_and_fields(tmp_path: Path) -> None:
    rows = {"a.b": ["x"], "review": [{"text": "y"}]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data"))
    (piece,) = HubReader(str(tmp_path / "data")).chunks(["a.b", "review.text"])
    assert [column.to_pylist() for column in piece.columns.values()] == [["x"], ["y"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_that_forgets_its_state_is_detected(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HubReader(str(write(tmp_path / "data", kind)))
    pieces = list(source.chunks(["text"]))

    def forgetful(read: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: read(*args[:-1], 0)

    for name in ("_read_parquet", "_read_stream", "_read_memory"):
        monkeypatch.setattr(hub, name, forgetful(getattr(hub, name)))
    assert as_lists(list(source.chunks(["text"], pieces[1].state))) != as_lists(pieces[1:])


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_texts_that_are_not_utf8_are_skipped_or_named(kind: str, tmp_path: Path) -> None:
    wrong = [0, 7, 8, 9, 10, 11, 12, 13, 22, 99]
    table = pa.table(
        {
            "text": not_utf8([row["text"] for row in ROWS], wrong),
            "label": [row["label"] for row in ROWS],
        }
    )
    (tmp_path / "data").mkdir()
    if kind == "parquet":
        pa.parquet.write_table(table, tmp_path / "data" / "train.parquet", row_group_size=10)
    else:
        datasets.Dataset(table).save_to_disk(str(tmp_path / "data"))
    source = HubReader(str(tmp_path / "data"))
    told: dict[str, Any] = {
        "name": "data",
        "columns": ColumnNames("text", None, "label", None),
        "label_delimiter": None,
        "seed": 0,
    }
    read = Stream(
        source_groups=[[source]], window_rows=16, on_bad_row="skip", max_bad_rows=99, **told
    )
    windows = list(read.windows())
    came = [text for window in windows for text in window.records.texts.to_pylist()]
    assert came == [f"text {row}" for row in range(100) if row not in wrong]
    bad = [row for window in windows for row in window.bad_rows]
    assert [row.file for row in bad] == [f"{source.name} row {row}" for row in wrong]
    assert bad[8].text == r'{"text": "text 22 \xd9", "label": 1}'
    for number, window in enumerate(windows):
        again = list(read.windows(json.loads(json.dumps(window.state))))
        assert [(one.state, one.records.texts.to_pylist()) for one in again] == [
            (one.state, one.records.texts.to_pylist()) for one in windows[number:]
        ]
    with pytest.raises(DataError, match=r"split 'train' row 0: column 'text' is not UTF-8 \("):
        list(Stream(source_groups=[[source]], window_rows=16, **told).windows())


def test_texts_of_a_split_in_memory_that_are_not_utf8_are_skipped_or_named(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": not_utf8([row["text"] for row in ROWS], [3, 99]),
            "label": [row["label"] for row in ROWS],
        }
    )
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    found = load_records(DataConfig(dataset_name=str(tmp_path), on_bad_row="skip"), "train")
    assert found.texts.to_pylist() == [f"text {row}" for row in range(99) if row != 3]
    assert [row.file for row in found.bad_rows] == [
        f"{tmp_path} split 'train' row {row}" for row in (3, 99)
    ]
    assert (
        str(found.location(3)) == f"{tmp_path} split 'train' row 4"
        and r"text 3 \xd9" in found.bad_rows[0].text
    )
    with pytest.raises(DataError, match=r"split 'train' row 3: column 'text' is not UTF-8 \("):
        load_records(DataConfig(dataset_name=str(tmp_path)), "train")


def test_class_names_and_columns(tmp_path: Path) -> None:
    source = HubReader(str(write(tmp_path / "data", "saved")))
    assert source.features["label"].names == ["a", "b", "c"]
    assert not source.has_header and source.bytes is None
    assert list(next(source.chunks(["number"])).columns) == ["number"]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_fingerprint_is_of_the_data(kind: str, tmp_path: Path) -> None:
    def fingerprint(name: str) -> str:
        hub._load.cache_clear()
        return HubReader(str(tmp_path / name)).fingerprint

    write(tmp_path / "one", kind)
    before, path = fingerprint("one"), tmp_path / "one" / f"train-1.{kind}"
    os.utime(path, (1, 1))
    assert fingerprint("one") == before
    path.write_bytes(path.read_bytes().replace(b"text 41", b"text 14"))
    assert fingerprint("one") != before


def test_errors_are_one_line(tmp_path: Path) -> None:
    folder, saved = (
        str(write(tmp_path / "data", "parquet")),
        str(write(tmp_path / "saved", "saved")),
    )
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    for source, found in [
        (HubReader(folder, split="trian"), f"{folder} has no split 'trian'. Did you mean 'train'?"),
        (
            HubReader(folder, split="train[:10%]"),
            f"{folder} has no split 'train[:10%]'. A part of a split cannot be streamed.",
        ),
        (HubReader(saved, split="dev"), f"{saved} has no split 'dev'. Known: 'train'."),
        (
            HubReader(folder, "other"),
            f"{folder}/other cannot be read: BuilderConfig 'other' not found.",
        ),
        (
            HubReader(f"{folder}/none"),
            f"{folder}/none is neither a local folder nor a data set on the Hub. ",
        ),
        (
            HubReader("user/name"),
            "user/name is neither a local folder nor a data set on the Hub. HF_HUB_OFFLINE is set, ",
        ),
        (
            HubReader(str(tmp_path / "script")),
            f"{tmp_path}/script is made by a Python script, which `datasets` no longer runs;",
        ),
    ]:
        with pytest.raises(DataError) as raised:
            source.column_names()
        assert str(raised.value).startswith(found) and "\n" not in str(raised.value)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "parquet")
    (folder / "train-1.parquet").write_bytes(b"PAR1 no more PAR1")
    with pytest.raises(DataError, match="data split 'train' cannot be read: "):
        list(HubReader(str(folder)).chunks(["text"]))


CARD = b"""---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}
  splits:
  - {name: train, num_bytes: 1, num_examples: 20000}
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
---
"""
ON_THE_HUB = """
import json, sys
from bertdist.data.readers import remote
from bertdist.core.errors import DataError
from bertdist.data.readers import hub_reader
from bertdist.data.readers.hub_reader import HubReader

remote.FIRST_WAIT_SECONDS = 0.0
sys.stdin.readline()

def told(action):
    try:
        return action()
    except DataError as error:
        return str(error)

source = HubReader("user/name")
if sys.argv[1:]:
    texts = [text for piece in source.chunks(["text"], json.loads(sys.argv[1])) for text in piece.columns["text"].to_pylist()]
    print(json.dumps([texts[0], len(texts)]), flush=True)
    sys.stdin.readline()
    hub_reader._load.cache_clear()
    print(json.dumps(HubReader("user/name").fingerprint))
else:
    texts = [(text, piece.state) for piece in source.chunks(["text"]) for text in piece.columns["text"].to_pylist()]
    print(json.dumps({
        "right": [text for text, _ in texts] == [f"{row:08}" * 20 for row in range(20_000)],
        "names": source.features["label"].names,
        "fingerprint": source.fingerprint,
        "place": texts[18_000][1],
        "found": remote.list_files("hf://datasets/user/name/data/*.parquet"),
        "csv": remote.open_bytes("hf://datasets/user/name/rows.csv", 5).read().decode(),
        "errors": [told(HubReader(name).column_names) for name in ("gated/name", "no/name")]
        + [told(lambda: remote.list_files(f"hf://datasets/{name}")) for name in ("user/name/no.csv", "gated/name/rows.csv")],
    }))
"""


@contextlib.contextmanager
def run_on(server: FakeHub, home: Path, *words: str) -> Iterator[Callable[[], Any]]:
    """A process of its own, and what gives its next answer: huggingface_hub reads its environment when it is imported."""
    offline = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = (
        os.environ
        | offline
        | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    )
    pipe, command = subprocess.PIPE, [sys.executable, "-c", ON_THE_HUB, *words]
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
    ) as process:

        def answer() -> Any:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write("go on\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, process.stderr.read()
            return json.loads(line)

        yield answer


@functools.cache
def two_files() -> list[bytes]:
    files = []
    for first in (0, 10_000):
        table = pa.table(
            {
                "text": [f"{row:08}" * 20 for row in range(first, first + 10_000)],
                "label": [row % 2 for row in range(10_000)],
            }
        )
        found = io.BytesIO()
        pa.parquet.write_table(
            table, found, row_group_size=2_000, compression="none", use_dictionary=False
        )
        files.append(found.getvalue())
    return files


def test_a_hub_from_end_to_end(tmp_path: Path) -> None:
    first, second = two_files()
    files = {
        "README.md": CARD,
        "data/train-0.parquet": first,
        "data/train-1.parquet": second,
        "rows.csv": b"text\na\n",
    }
    with FakeHub(files) as server:
        server.statuses.extend([0] * 6 + [503])
        server.drops.extend([0] * 6 + [100_000])
        with run_on(server, tmp_path) as answer:
            found = answer()
        assert found["right"] and found["names"] == ["bad", "good"] and found["csv"] == "a\n"
        assert found["found"] == [
            f"hf://datasets/user/name/data/train-{number}.parquet" for number in (0, 1)
        ]
        gated, missing, no_file, no_terms = found["errors"]
        assert (
            f"It is gated: accept its terms at {server.url}/datasets/gated/name, then set HF_TOKEN or run `hf auth login`."
            in gated
        )
        assert missing.startswith(
            "no/name is neither a local folder nor a data set on the Hub. There is no such data set on the hub"
        )
        assert no_file.startswith("hf://datasets/user/name/no.csv: there is no such file")
        assert (
            no_terms.startswith("hf://datasets/gated/name/rows.csv: access denied")
            and "HF_TOKEN" in no_terms
        )

        # From a place: nothing of the first file, and of the second neither the groups before it nor the other column.
        server.gets.clear()
        server.sent = 0
        with run_on(server, tmp_path, json.dumps(found["place"])) as answer:
            text, rows = answer()
            assert text == "00018000" * 20 and rows == 2_000
            assert all("train-0" not in path for path, _ in server.gets)
            assert server.sent < len(second) / 3
            rename(server)
            assert found["fingerprint"] != answer()


def rename(server: FakeHub) -> None:
    """Another commit of the same files."""
    server.sha = "f" * 40
    for path in server.data_set:
        server.files[f"/datasets/user/name/resolve/{server.sha}/{path}"] = server.files[
            f"/datasets/user/name/resolve/main/{path}"
        ]


def test_a_single_dataset_of_save_to_disk_is_one_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    rows.save_to_disk(str(tmp_path / "saved"))
    data = DataConfig(dataset_name=str(tmp_path / "saved"))
    found = load_records(data, "train")
    assert found is not None and list(map(str, found.texts)) == ["a", "b"]
    assert load_records(data, "validation") is None
