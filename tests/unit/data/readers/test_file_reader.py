"""The chunks of a file, from the start and from the state of any chunk, are the complete file.

Files are random, tiny chunks split them at every byte, and streams return a few bytes per read. The
negative controls break what a chunk boundary rests on.
"""

import gzip
import io
import json
import pickle
import random
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertdist.core.config import FileConfig
from bertdist.core.errors import DataError
from bertdist.data.bad_rows import BadRow
from bertdist.data.readers import csv_reader, file_reader
from bertdist.data.readers.file_reader import DataFile, FileReader, inspect_file
from bertdist.data.readers.text_lines import Lines
from bertdist.data.source import Chunk, DataSource, first_rows_of_chunk

Rows = list[tuple[Any, ...]]


class Trickle(io.RawIOBase):
    """A stream that gives one to three bytes a read, as a network would."""

    def __init__(self, content: bytes) -> None:
        self._stream, self._chance = io.BytesIO(content), random.Random(len(content))

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(
            min(self._chance.randrange(1, 4), size) if size >= 0 else self._chance.randrange(1, 4)
        )


def opened(content: bytes, at: int) -> BinaryIO:
    return Trickle(content[at:])  # type: ignore[return-value]


def file_of(content: bytes, kind: str = "csv", **form: Any) -> DataFile:
    given = {"quoted": kind == "csv", "delimiter": "," if kind == "csv" else "\t", **form}
    name = f"a.{kind}"
    return DataFile(
        name=name,
        kind=kind,
        path=name,
        open_bytes=partial(opened, content),
        open_seekable=partial(io.BytesIO, content),
        **given,
    )


def values(column: Any) -> list[Any]:
    return list(column) if isinstance(column, list) else list(column.to_pylist())


def rows_of(piece: Chunk, wanted: list[str]) -> Rows:
    """(place in words, value, value, ...) of every row."""
    columns = [values(piece.columns[name]) for name in wanted]
    assert all(len(column) == piece.num_rows for column in columns)
    return [
        (str(piece.location(row)), *(column[row] for column in columns))
        for row in range(piece.num_rows)
    ]


Outcome = tuple[Rows, list[BadRow]]


def whole(file: DataFile, wanted: list[str] | None = None, **settings: Any) -> Outcome | str:
    """Rows and bad rows of the whole file, or the refusal."""
    try:
        source = FileReader(file, **settings)
        wanted = wanted or source.column_names()
        piece = source.read(wanted)
        return rows_of(piece, wanted), list(piece.bad_rows)
    except DataError as error:
        return str(error)


def in_pieces(file: DataFile, wanted: list[str] | None = None, **settings: Any) -> Outcome | str:
    """The same from pieces; every place is tried."""
    rows: Rows = []
    bad: list[BadRow] = []
    try:
        source = FileReader(file, **settings)
        wanted = wanted or source.column_names()
        pieces = list(source.chunks(wanted))
    except DataError as error:
        return str(error)
    for at, piece in enumerate(pieces):
        assert piece.state["row"] == len(rows)
        assert piece.num_rows or piece.bad_rows
        rows += rows_of(piece, wanted)
        bad += piece.bad_rows
        if (
            at % max(1, len(pieces) // 5) == 0
        ):  # from its place the same pieces come again, also to another process
            again = list(
                pickle.loads(pickle.dumps(source)).chunks(
                    wanted, json.loads(json.dumps(piece.state))
                )
            )
            assert [(other.state, other.bad_rows, rows_of(other, wanted)) for other in again] == [
                (other.state, other.bad_rows, rows_of(other, wanted)) for other in pieces[at:]
            ]
    return rows, bad


CHARACTERS = [
    *"ab\"',\t\n\r ;",
    "\r\n",
    '""',
    "é",
    "中",
    "\U0001f600",
    "\ufeff",
    "\ue000",
    "\u2028",
]
FIELD = st.lists(st.sampled_from(CHARACTERS), max_size=6).map("".join)
LONG = st.tuples(FIELD, st.integers(0, 120)).map(lambda pair: pair[0] + "x" * pair[1])


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, DataFile]:
    """A well-formed file of any kind."""
    kind = draw(st.sampled_from(["csv", "tsv", "jsonl", "txt"]))
    num_fields = draw(st.sampled_from([1, 2, 3]))
    rows = draw(st.lists(st.tuples(*[FIELD | LONG] * num_fields), min_size=1, max_size=12))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    names = [f"c{at}" for at in range(num_fields)]
    if kind in ("csv", "tsv"):
        sign = "," if kind == "csv" else "\t"

        def field(text: str) -> str:
            plain = text.translate({9: " ", 10: " ", 44: " ", 13: " "})
            if kind == "tsv":
                return plain
            bare = not plain.startswith('"') and draw(
                st.booleans()
            )  # a quote within an unquoted field is text
            return plain if bare else '"' + text.replace('"', '""') + '"'

        lines = [sign.join(map(field, row)) for row in rows]
        header = draw(st.booleans())
        lines = [sign.join(names), *lines] if header else lines
        form: dict[str, Any] = {} if header else {"column_names": tuple(names)}
    elif kind == "jsonl":
        lines = [
            json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=draw(st.booleans()))
            for row in rows
        ]
        form = {}
    else:
        lines = [row[0].translate({10: " "}) for row in rows]
        form = {}
    text = "".join(line + end * (1 + draw(st.sampled_from([0, 0, 0, 1]))) for line in lines)
    text = text.removesuffix(end) if draw(st.booleans()) else text
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-16-be", "gb18030", "utf-32"]))
    content = ("\ufeff" * draw(st.booleans()) + text).encode(encoding)
    return text, file_of(content, kind, encoding=encoding, **form)


@settings(max_examples=80)
@given(table=tables(), chunk_bytes=st.integers(7, 200))
def test_chunks_concatenated_are_the_complete_file(
    table: tuple[str, DataFile], chunk_bytes: int
) -> None:
    _, file = table
    for skip in ("fail", "skip"):
        expected = whole(file, on_bad_row=skip)
        assert in_pieces(file, on_bad_row=skip, chunk_bytes=chunk_bytes) == expected


def broken_tables(chance: random.Random) -> DataFile:
    """A file with faults of every kind."""
    kind = chance.choice(["csv", "csv", "csv", "tsv", "jsonl"])
    if kind == "jsonl":
        lines = [
            '{"c0": "a", "c1": 1}',
            '{"c0": "b"}',
            "{",
            "7",
            "",
            " ",
            '{"c0": "é", "c1": null, "c2": 3}',
            '{"c0": 1, "c0": 2}',
            "[1]",
        ]
        text = '{"c0": "a", "c1": 0}\n' * chance.randrange(2)
        text += "".join(chance.choice(lines) + "\n" for _ in range(chance.randrange(1, 12)))
    elif chance.random() < 0.5:
        sign = "," if kind == "csv" else "\t"
        parts = ["a", '"', sign, "\n", "\n", "\r", "é", '""', '"b"', "\r\n", '"\n"', " ", "xyz"]
        text = "".join(chance.choices(parts, k=chance.randrange(60)))
    else:
        sign = "," if kind == "csv" else "\t"
        fields = [
            "a",
            "é\r",
            '"b"',
            '"\n""x"""',
            "",
            " ",
            'x"y',
            '"',
            '"c"d',
            f"{sign}",
            '"\nb"z',
            "word",
        ]
        weights = [6, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6]
        lines = [
            sign.join(chance.choices(fields, weights, k=2)) for _ in range(chance.randrange(1, 12))
        ]
        text = "".join(line + chance.choice(["\n", "\n", "\r\n", "\n\n"]) for line in lines)
    content = text.encode()
    if chance.random() < 0.3 and content:
        at = chance.randrange(len(content))
        content = content[:at] + chance.choice([b"\xff", b"\xe4", b"\x81\x82"]) + content[at:]
    names: dict[str, Any] = {} if kind == "jsonl" else {"column_names": ("c0", "c1")}
    return file_of(content, kind, **names)


def test_bad_rows_are_the_same_in_chunks_and_in_the_complete_file() -> None:
    # 12,000 of these ran without a difference; 300 stay.
    chance, num_bad, num_rows, refused = random.Random(5), 0, 0, 0
    for _ in range(300):
        file = broken_tables(chance)
        size, limit = chance.randrange(1, 90), chance.choice([20, 60, 1 << 20])
        wanted = ["c0", "c1"]
        expected = whole(file, wanted, on_bad_row="skip", row_bytes=limit)
        found = in_pieces(file, wanted, on_bad_row="skip", row_bytes=limit, chunk_bytes=size)
        if (
            isinstance(found, str) and "does not end within" in found
        ) or "no row ends within" in found:
            continue  # a long row can only be left out where its end is known
        assert found == expected, (file.open_bytes.args, size, limit)  # type: ignore[attr-defined]
        strict, pieces = whole(file, wanted), in_pieces(file, wanted, chunk_bytes=size)
        assert isinstance(strict, str) == isinstance(pieces, str), (
            file.open_bytes.args,
            strict,
            pieces,
        )  # type: ignore[attr-defined]
        if isinstance(expected, str):
            refused += 1
            continue
        num_rows, num_bad = num_rows + len(expected[0]), num_bad + len(expected[1])
        assert isinstance(strict, str) == bool(expected[1])
        if isinstance(strict, str):
            first = expected[1][0]
            assert (
                strict.startswith(f"{first.file} line {first.line}: {first.reason}")
                or "byte 0x" in strict
            )
    assert num_bad > 300 and num_rows > 300


QUOTED = b'c0,c1\n"a\nb,""c",1\n5" pipe,2\n"d\n\n",3\n'


def test_a_boundary_that_ignores_quotes_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(QUOTED)
    expected = whole(file)
    assert isinstance(expected, tuple) and [row[0] for row in expected[0]] == [
        "a.csv line 2",
        "a.csv line 4",
        "a.csv line 5",
    ]
    assert all(in_pieces(file, chunk_bytes=size) == expected for size in range(1, 60))

    def at_a_newline(
        form: Any, lines: Lines, num_fields: int, is_eof: bool, soft: int, limit: int
    ) -> tuple[int, None]:
        return csv_reader.last_line_end(lines.data, is_eof, soft), None

    monkeypatch.setattr(file_reader, "find_row_end", at_a_newline)
    assert any(in_pieces(file, chunk_bytes=size) != expected for size in range(1, 60))


def test_a_boundary_that_only_counts_quotes_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    # 5" pipe has a quote that opens nothing: from there on every count is odd.
    file = file_of(QUOTED)
    expected = whole(file)
    monkeypatch.setattr(csv_reader, "quotes_pair_up", lambda data, delimiter: True)
    assert any(in_pieces(file, chunk_bytes=size) != expected for size in range(1, 60))


def test_a_quote_that_never_closes_costs_one_line() -> None:
    text = 'c0,c1\na,1\nb,"2\nc,3\nd,"4"\ne,"5\n'
    rows, bad = (
        [("a.csv line 2", "a", "1"), ("a.csv line 4", "c", "3"), ("a.csv line 5", "d", "4")],
        [3, 6],
    )
    for size in (1, 9, 1000):
        for read in (whole, in_pieces):
            found = read(file_of(text.encode()), on_bad_row="skip", chunk_bytes=size)
            assert (
                isinstance(found, tuple)
                and found[0] == rows
                and [row.line for row in found[1]] == bad
            )
    reasons = [row.reason.split(";")[0] for row in found[1]]
    assert reasons == [
        "text follows the quote closed on line 5",
        "a quote opens here and never closes",
    ]
    assert [row.text for row in found[1]] == ['b,"2', 'e,"5']


def test_only_rows_with_bytes_of_another_encoding_are_skipped() -> None:
    content = b'c0,c1\na,1\n\xa35,"2\n\n"\nb,"3\nx\xe4\n"\nc,4\n'
    for size in (1, 12, 1000):
        for read in (whole, in_pieces):
            found = read(file_of(content), on_bad_row="skip", chunk_bytes=size)
            assert isinstance(found, tuple) and [row[1:] for row in found[0]] == [
                ("a", "1"),
                ("c", "4"),
            ]
            assert [(row.line, row.text) for row in found[1]] == [
                (3, r'\xa35,"2\n\n"'),
                (6, r'b,"3\nx\xe4\n"'),
            ]
            assert found[1][0].reason.startswith("byte 0xA3 is not utf-8")


def test_an_error_in_a_chunk_names_the_line_of_the_file() -> None:
    lines = [f'"row\n{at}",{at}\n' for at in range(50)]
    lines[30] = "ragged\n"
    file = file_of(("c0,c1\n" + "".join(lines)).encode())
    message = "a.csv line 62: 1 field, expected 2 as in the header"
    for found in (whole(file), *(in_pieces(file, chunk_bytes=size) for size in (5, 50, 500))):
        assert isinstance(found, str) and found.startswith(message)


def test_a_row_that_is_too_long_is_refused_where_it_begins() -> None:
    file = file_of(b'c0,c1\na,1\n"' + b"x\n" * 400 + b'",2\nb,3\n')
    assert isinstance(whole(file), tuple)
    found = in_pieces(file, chunk_bytes=16, row_bytes=200)
    assert isinstance(found, str) and found.startswith(
        "a.csv line 3: a quote opens here and does not close within 200 bytes"
    )
    found = in_pieces(
        file_of(b"c0\tc1\na\t1\nb\t" + b"x" * 5000 + b"\n", "tsv"), chunk_bytes=16, row_bytes=200
    )
    assert found == "a.tsv line 3: a row begins here that does not end within 200 bytes."


def test_chunks_are_small_and_memory_is_a_few_of_them() -> None:
    line = b'"' + b"x" * 200 + b'",1\n'
    pieces = list(FileReader(file_of(b"c0,c1\n" + line * 500), chunk_bytes=4096).chunks(["c0"]))
    assert {piece.num_rows for piece in pieces[:-1]} == {4096 // len(line)}
    assert [piece.state["at"] for piece in pieces] == [
        6 + len(line) * sum(p.num_rows for p in pieces[:at]) for at in range(len(pieces))
    ]
    stray = b'5" pipe,1\n'  # every row is judged: the pieces are as small
    assert {
        piece.num_rows
        for piece in list(
            FileReader(file_of(b"c0,c1\n" + stray * 500), chunk_bytes=100).chunks(["c0"])
        )[:-1]
    } == {10}


def test_a_stateful_encoding_is_not_read_in_chunks() -> None:
    file = file_of("c0,c1\nあ,1\n".encode("iso2022_jp"), encoding="iso2022_jp")
    found = whole(file)
    assert isinstance(found, tuple) and found[0] == [("a.csv line 2", "あ", "1")]
    advice = "convert the file to UTF-8"
    assert in_pieces(file) == f"a.csv: iso2022_jp cannot be read in chunks; {advice}."


def test_a_local_file_has_a_size_and_a_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"c0\tc1\na\t1\n")

    def source(**form: Any) -> DataSource:
        return FileReader(DataFile(**{**vars(file_of(b"", "tsv", **form)), "path": str(path)}))

    one = source()
    assert one.bytes == 10 and one.has_header and one.name == "a.tsv" and one.features is None
    assert one.fingerprint == source().fingerprint != source(quoted=True).fingerprint
    path.write_bytes(b"c0\tc1\na\t2\n")
    assert source().fingerprint != one.fingerprint
    there = FileReader(file_of(b"", "tsv"), fingerprint="etag", size=7)
    assert (
        there.bytes == 7
        and there.fingerprint != FileReader(file_of(b"", "tsv"), fingerprint="other").fingerprint
    )


def test_the_first_rows_come_with_the_rows_skipped_among_them() -> None:
    content = b"c0,c1\na,1\nbad\nb,2\nbad\nc,3\nbad\n"
    for count, lines in ((1, [3]), (2, [3, 5]), (3, [3, 5, 7])):
        piece = FileReader(file_of(content), on_bad_row="skip").read(["c0"], count)
        again = first_rows_of_chunk(
            next(FileReader(file_of(content), on_bad_row="skip").chunks(["c0"])), count
        )
        for found in (piece, again):
            assert (found.num_rows, values(found.columns["c0"])) == (count, list("abc")[:count])
            assert [row.line for row in found.bad_rows] == lines


@pytest.mark.parametrize(
    "path", ["chnsenticorp/train.tsv", "sms_spam/spam.csv", "clinc150/data_full.json"]
)
def test_real_files_in_chunks_are_the_real_files(shared_data: Path, path: str) -> None:
    content = (shared_data / path).read_bytes()
    kind = {"tsv": "tsv", "csv": "csv", "json": "txt"}[path.rsplit(".", 1)[1]]
    form: dict[str, Any] = {
        "tsv": {"column_names": ("text", "label")},
        "csv": {"encoding": "cp1252"},
        "txt": {},
    }[kind]
    file = DataFile(
        **{**vars(file_of(content, kind, **form)), "open_bytes": partial(_plain, content)}
    )
    expected = whole(file)
    assert (
        isinstance(expected, tuple)
        and len(expected[0]) == {"tsv": 9_600, "csv": 5_572, "txt": content.count(b"\n") + 1}[kind]
    )
    assert in_pieces(file, chunk_bytes=1 << 17) == expected


def _plain(content: bytes, at: int) -> BinaryIO:
    return io.BytesIO(content[at:])


# What `inspect_file` makes of a path and the flags; test_sniffing.py has what it detects


def inspect(path: str | Path, **flags: Any) -> DataFile:
    return inspect_file(str(path), FileConfig(**flags))


def unpacked(content: bytes, at: int) -> BinaryIO:
    stream = gzip.GzipFile(fileobj=io.BytesIO(content))
    stream.seek(at)
    return stream  # type: ignore[return-value]


@pytest.mark.parametrize(
    "url", ["s3://bucket/a/train.csv.gz", "https://host/train.csv.gz?version=1", "hf://x/train.csv"]
)
def test_the_kind_of_a_remote_file_is_before_its_compression(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = gzip.compress(b"text;label\na,b;1\nc;2\n")
    monkeypatch.setattr(file_reader, "open_stored", lambda path, warn: io.BytesIO(content))
    monkeypatch.setattr(
        file_reader, "open_bytes", lambda path, at=0, warn=None, codec=None: unpacked(content, at)
    )
    file = inspect(url)
    assert (file.kind, file.delimiter, file.note) == (
        "csv",
        ";",
        f"{file.name}: read as utf-8, delimiter ';', quoted",
    )
    assert file.name.startswith("train.csv") and "?" not in file.name
    reader = FileReader(file, fingerprint="etag", chunk_bytes=6)
    assert reader.column_names() == ["text", "label"]
    assert values(reader.read(["text"], 1).columns["text"]) == ["a,b"]
    chunks = list(reader.chunks(["label"]))
    assert [values(chunk.columns["label"]) for chunk in chunks] == [["1"], ["2"]]
    assert [str(chunk.location(0)) for chunk in chunks] == [
        f"{file.name} line 2",
        f"{file.name} line 3",
    ]


def test_a_file_is_opened_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text,label\na,1\n"))
    for name in ("a.csv", "a.parquet", "b.csv.gz"):
        reader = pickle.loads(pickle.dumps(FileReader(inspect(tmp_path / name))))
        (chunk,) = reader.chunks(["text"])
        assert values(chunk.columns["text"]) == ["a"]
        assert reader.bytes == (tmp_path / name).stat().st_size


def test_a_json_document_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks have the rows of the whole, each bad row once, and resume; it is parsed once."""
    monkeypatch.setattr(file_reader, "SLICE_ROWS", 2)
    items = [{"text": "a"}, 7, {"text": "b"}, {"text": "c"}, 8, 9, {"text": "d"}]
    (tmp_path / "a.json").write_text(json.dumps(items))
    reader = FileReader(inspect(tmp_path / "a.json"), on_bad_row="skip")
    assert reader.column_names() == ["text"]
    (tmp_path / "a.json").write_text("[]")
    chunks = list(reader.chunks(["text"]))
    (tmp_path / "a.json").write_text(json.dumps(items))
    whole = reader.read(["text"])
    assert [chunk.columns["text"] for chunk in chunks] == [["a"], ["b", "c"], [], ["d"]]
    assert whole.columns["text"] == ["a", "b", "c", "d"]
    assert [row for chunk in chunks for row in chunk.bad_rows] == [*whole.bad_rows]
    assert [row.location for row in whole.bad_rows] == [f"a.json row {n}" for n in (1, 4, 5)]
    for location in (whole.location(2), chunks[1].location(1)):
        assert str(location) == "a.json row 3"
    again = list(reader.chunks(["text"], chunks[1].state))
    assert [chunk.columns for chunk in again] == [chunk.columns for chunk in chunks[1:]]


@pytest.mark.parametrize(
    ("file_format", "note"), [("auto", "data.bin: read as parquet"), ("parquet", None)]
)
def test_parquet_under_another_name(file_format: Any, note: str | None, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "data.bin")
    reader = FileReader(inspect(tmp_path / "data.bin", file_format=file_format))
    assert values(reader.read(["text"]).columns["text"]) == ["a"] and reader.note == note


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    with pytest.raises(DataError, match=r"b\.csv: no such file\. Did you mean '.*/a\.csv'\?"):
        inspect(tmp_path / "b.csv")
    with pytest.raises(DataError, match="is a folder; expected a file"):
        inspect(tmp_path)
