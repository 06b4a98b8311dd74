"""Rows to predict come in windows that depend on the files alone, with the columns that are kept."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from bertdist.core.config import FileConfig
from bertdist.core.errors import DataError
from bertdist.data import prediction_input
from bertdist.data.prediction_input import InputRows, InputWindow, Position
from bertdist.data.readers import file_reader
from bertdist.data.records import ColumnNames

TRAINED = ColumnNames("text", None, None, [])
ROWS = [
    {"id": f"{9007199254740993 + row}", "text": f"a film {row}", "note": "007\nline 😀" * (row % 2)}
    for row in range(11)
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    if path.suffix == ".csv":
        lines = [",".join(rows[0])]
        lines += [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def opened(*inputs: str, rows: int = 4, **options: Any) -> InputRows:
    return InputRows(inputs, FileConfig(), TRAINED, window_rows=rows, **options)


def content(window: InputWindow) -> tuple[Any, ...]:
    kept: Any = window.kept.objects
    if kept is None:
        kept = {name: column.to_pylist() for name, column in window.kept.columns.items()}
    return (window.file, window.first_row, window.records.texts.to_pylist(), kept)


def windows_from(rows: InputRows, position: Position | None = None) -> list[Any]:
    return [(content(window), window.next) for window in rows.windows(position)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks per file; a window is of several chunks, and a chunk of several windows."""
    open_text_files = prediction_input.open_text_files

    def opened_small(*arguments: Any) -> Any:
        for reader, requested in open_text_files(*arguments):
            reader.chunk_bytes = 150
            yield reader, requested

    monkeypatch.setattr(prediction_input, "open_text_files", opened_small)
    monkeypatch.setattr(file_reader, "SLICE_ROWS", 3)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "json"])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_windows_hold_all_rows_and_any_position_continues(
    tmp_path: Path, kind: str, size: int
) -> None:
    path = tmp_path / f"in.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        write(path)
    found = windows_from(opened(str(path), rows=size, keep=["id", "note"]))
    assert [len(texts) for (_, _, texts, _), _ in found] == [
        min(size, 11 - first) for first in range(0, 11, size)
    ]
    assert [x for (_, _, texts, _), _ in found for x in texts] == [row["text"] for row in ROWS]
    kept = [content[3] for content, _ in found]
    if kind in ("json", "jsonl"):
        objects = [value for some in kept for value in some]
    else:
        objects = [
            dict(zip(("id", "note"), values, strict=True))
            for some in kept
            for values in zip(some["id"], some["note"], strict=True)
        ]
    assert objects == [{"id": row["id"], "note": row["note"]} for row in ROWS]
    for number, (_, position) in enumerate(found):
        position = json.loads(json.dumps(position))
        again = windows_from(opened(str(path), rows=size, keep=["id", "note"]), position)
        assert again == found[number + 1 :]


def test_rows_of_several_files_have_their_file_and_their_row_in_it(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.csv"), write(tmp_path / "b.csv", ROWS[:2])
    found = [content for content, _ in windows_from(opened(str(tmp_path / "*.csv"), rows=8))]
    assert [(file, row, len(texts)) for file, row, texts, _ in found] == [
        (one, 0, 8),
        (one, 8, 3),
        (two, 0, 2),
    ]
    assert {file for (file, *_), _ in windows_from(opened(one))} == {None}
    (tmp_path / "texts").mkdir()
    for name in ("1.txt", "2.txt"):
        (tmp_path / "texts" / name).write_text(name)
    (window,) = opened(str(tmp_path / "texts")).windows()
    assert [window.file_of(row) for row in (0, 1)] == ["texts/1.txt", "texts/2.txt"]


def test_all_columns_are_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened(write(tmp_path / "a.csv"), keep=["all"]).kept_names == ["id", "text", "note"]
    path = tmp_path / "pandas.csv"
    path.write_text(",text,label\n0,a,b\n")
    assert opened(str(path), keep=["all"]).kept_names == ["", "text", "label"]
    assert opened(str(path), keep=["all"]).notes == []
    path.write_text("text,label,,\na,b,,\n")
    rows = opened(str(path), keep=["all"])
    assert rows.kept_names == ["text", "label"]
    assert rows.notes == ["pandas.csv: 2 columns without a name are not written."]
    assert capsys.readouterr() == ("", "")
    nested = write(
        tmp_path / "n.jsonl", [{"text": "a", "by": {"name": "x"}}, {"text": "b", "z": 1}]
    )
    twice = tmp_path / "twice.jsonl"
    twice.write_text(
        '{"text": "a", "id": 1, "m": {"k": 1}}\n{"text": "b", "id": 2, "m": {"k": 1, "k": 2}}\n'
    )
    with pytest.raises(DataError, match=r"^twice.jsonl line 2: the key 'k' occurs twice\.$"):
        list(opened(str(twice), keep=["all"]).windows())
    (window,) = opened(str(twice), keep=["id"]).windows()
    assert window.kept.objects == [{"id": 1}, {"id": 2}], "the control: it is not kept"
    rows = opened(nested, keep=["all"])
    assert rows.kept_names == ["text", "by"]
    (window,) = rows.windows()
    assert window.kept.objects == [{"text": "a", "by": {"name": "x"}}, {"text": "b", "z": 1}]
    (window,) = opened(nested, keep=["by.name"]).windows()
    assert window.kept.objects == [{"by.name": "x"}, {}]


def test_names_may_be_joined_by_commas_unless_one_column_has_that_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    assert opened(path, keep=["note,id"]).kept_names == ["note", "id"]
    odd = write(tmp_path / "b.jsonl", [{"text": "a", "x,y": 1, "x": 2, "y": 3}])
    assert opened(odd, keep=["x,y"]).kept_names == ["x,y"]
    with pytest.raises(DataError, match=r"a.csv: --keep_columns 'idd' .*Did you mean 'id'\?"):
        opened(path, keep=["idd"])


def test_a_table_has_the_same_columns_in_all_rows(tmp_path: Path) -> None:
    one = write(tmp_path / "a.csv")
    two = write(tmp_path / "b.csv", [{"text": "a", "other": "b"}])
    with pytest.raises(DataError, match=r"differ in their columns \('id', 'note', 'other'\)"):
        opened(one, two, keep=["all"], same_columns=True)
    assert len(windows_from(opened(one, two, keep=["all"]))) == 4, "the control"


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", ""), ("a.csv", "text\n"), ("a.txt", ""), ("a.jsonl", "\n")]
)
def test_a_file_without_rows_has_no_windows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert windows_from(opened(str(tmp_path / name), keep=["all"])) == []
    other = write(tmp_path / "z.csv")
    rows = opened(str(tmp_path / name), other, keep=["text"])
    assert rows.kept_names == ["text"] and len(windows_from(rows)) == 3


def test_the_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    before = opened(path).fingerprint
    assert opened(path).fingerprint == before
    write(tmp_path / "a.csv", [*ROWS[1:], ROWS[0]])
    assert opened(path).fingerprint != before


def test_how_far_a_position_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    rows = opened(path)
    shares = [rows.fraction(position) for _, position in windows_from(rows)]
    assert all(share is not None for share in shares)
    assert shares == sorted(shares) and shares[-1] == 1  # type: ignore[type-var]
