"""No text is changed, no row is lost, and whatever is wrong with a source is one line that names the file and the line.

The reader that the real readers are held against is `reference`, thirty lines of plain Python. Promises have a twin: what another
reader would have done to the same bytes, or the same check on bytes that do not deserve it.
"""

import csv
import io
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertdist.core.config import DataConfig, FileConfig
from bertdist.core.errors import DataError
from bertdist.data.all_columns import read_source
from bertdist.data.in_memory import records_from_texts
from bertdist.data.load_data import load_records, load_texts, open_stream
from bertdist.data.readers import csv_reader
from bertdist.data.records import ColumnNames, Record, Records, concat_records

Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(name, content) -> path."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def train(path: str, **settings: Any) -> Records:
    return load_records(DataConfig(train_file=[path], **settings), "train")


def texts_of(path: str, **settings: Any) -> Records:
    trained = ColumnNames(None, None, None, None)
    return load_texts(path, FileConfig(**{"encoding": "utf-8", **settings}), trained)


def rows_of(records: Records) -> list[Record]:
    return [records[row] for row in range(len(records))]


def labels_of(records: Records) -> list[Any]:
    return [records[row].label for row in range(len(records))]


def refusal(call: Callable[[], Any]) -> str:
    """The message of the DataError that `call` raises: one line, and no other exception behind it."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__ | (
        caught.value.__context__ is None
    )
    return str(caught.value)


# --- Texts stay as they are


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'label,text\n1,"a, ""b"" c"\n0, x \n'),
        ("a.tsv", 'label\ttext\n1\ta, "b" c\n0\t x \n'),
        ("a.jsonl", '{"label": "1", "text": "a, \\"b\\" c"}\n\n{"text": " x ", "label": "0"}\n'),
        ("a.json", '{"label": "1", "text": "a, \\"b\\" c"}\n{"text": " x ", "label": "0"}'),
        ("A.TSV", '\ufefflabel\ttext\r\n1\ta, "b" c\r\n\r\n0\t x \r\n'),
    ],
)
def test_every_format_gives_the_same_records(write: Write, name: str, content: str) -> None:
    records = train(write(name, content))
    assert rows_of(records) == [Record(0, 'a, "b" c', None, "1"), Record(1, " x ", None, "0")]
    assert (records.text_column, records.pair_column, records.label_column) == (
        "text",
        None,
        "label",
    )
    assert (records.label_kind, records.label_values, records.class_names) == (
        "text",
        ["1", "0"],
        None,
    )
    assert (
        records.label_indices is not None
        and records.label_indices.dtype == np.int32
        and records.label_indices.tolist() == [0, 1]
    )
    assert records.name == name


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(
            pa.table(
                {
                    "text": pa.array(['a, "b" c', " x "]).cast(kind),
                    "label": pa.array(["1", "0"]).cast(kind),
                }
            ),
            path,
        )
        assert rows_of(train(str(path))) == [
            Record(0, 'a, "b" c', None, "1"),
            Record(1, " x ", None, "0"),
        ]


LOST_ELSEWHERE = [
    "NA",
    "null",
    "None",
    "nan",
    "",
    "N/A",
    " blank ",
    "007",
    "1e5",
    "9007199254740993",
    "true",
    "2024-01-01",
    "\u00a0",
    "-",
]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_words_that_mean_something_elsewhere_are_texts_here(write: Write, ending: str) -> None:
    delimiter = "," if ending == "csv" else "\t"
    path = write(
        f"a.{ending}",
        f"text{delimiter}label\n"
        + "".join(f"{text}{delimiter}{row}\n" for row, text in enumerate(LOST_ELSEWHERE)),
    )
    assert [record.text for record in rows_of(train(path))] == LOST_ELSEWHERE
    pandas = pytest.importorskip("pandas")
    assert (
        pandas.read_csv(path, sep=delimiter)["text"].isna().sum() >= 6
    )  # the twin: what the reader behind `datasets` makes of it


PIECES = [
    *"ab\"',\t\n\r ",
    "\r\n",
    "\0",
    "é",
    "中",
    "\U0001f600",
    "\u2028",
    "\x85",
    "\ue000",
    "NA",
    "null",
    "9007199254740993",
]
NASTY = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
NASTY |= st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), max_size=8
)  # U+FEFF: a byte order mark at the start


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=6),
    ending=st.sampled_from(["csv", "tsv", "jsonl"]),
    crlf=st.booleans(),
)
def test_any_text_that_can_be_written_is_read_back(
    rows: list[tuple[str, str]], ending: str, crlf: bool
) -> None:
    if ending == "tsv":  # has no way to write a tab or a line end
        rows = [
            (a.translate({9: " ", 10: " ", 13: " "}), b.translate({9: " ", 10: " ", 13: " "}))
            for a, b in rows
        ]
        lines = ["\t".join(row) for row in rows]
    elif ending == "csv":
        lines = [
            ",".join(f'"{field.replace(chr(34), chr(34) * 2)}"' for field in row) for row in rows
        ]
    else:
        lines = [json.dumps({"c0": a, "c1": b}, ensure_ascii=crlf) for a, b in rows]
    names = {"column_names": ["c0", "c1"]} if ending != "jsonl" else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{ending}"
        path.write_bytes(
            "".join(line + "\r\n" * crlf + "\n" * (not crlf) for line in lines).encode()
        )
        records = texts_of(str(path), text_column="c0", text_pair_column="c1", **names)
        assert [(record.text, record.pair) for record in rows_of(records)] == rows
        assert records.lengths().tolist() == [len(a.encode()) + len(b.encode()) for a, b in rows]


def test_a_quoted_field_is_changed_by_a_reader_that_splits_lines(write: Write) -> None:
    # The twin of the test above: its nasty fields are such that a plainer reader does lose them.
    content = 'c0,c1\n"a,b\nc","say ""x"""\n'
    record = texts_of(write("a.csv", content), text_column="c0", text_pair_column="c1")[0]
    assert (record.text, record.pair) == ("a,b\nc", 'say "x"')
    assert [line.split(",") for line in content.splitlines()][1][0] != record.text


# --- The grammar of csv and tsv, against a reader of its own


class Malformed(Exception):
    pass


def reference(
    content: str, delimiter: str, quoted: bool, num_fields: int
) -> list[tuple[int, list[str]]]:
    """(line, fields) of every row, one character after the other; a line ends at \\n or \\r\\n, a lone \\r is text."""
    rows, at, line = [], 0, 1

    def line_end() -> int:
        return 2 if content.startswith("\r\n", at) else int(content.startswith("\n", at))

    while at < len(content):
        start, fields, blank = line, [], bool(line_end())
        while True:
            field = ""
            if quoted and content.startswith('"', at):
                at, opened = at + 1, line
                while not content.startswith('"', at) or content.startswith('""', at):
                    if at >= len(content):
                        raise Malformed(f"line {opened}: a quote opens")
                    line += content[at] == "\n"
                    field, at = field + content[at], at + 1 + content.startswith('""', at)
                at += 1
                if at < len(content) and content[at] != delimiter and not line_end():
                    raise Malformed(f"line {start}: text follows")
            else:
                while at < len(content) and content[at] != delimiter and not line_end():
                    field, at = field + content[at], at + 1
            fields.append(field)
            if not content.startswith(delimiter, at):
                break
            at += 1
        line, at = line + 1, at + line_end()
        if blank and num_fields > 1:
            continue
        if len(fields) != num_fields:
            raise Malformed(f"line {start}: {len(fields)} field")
        rows.append((start, fields))
    if not rows:
        raise Malformed("has no rows")
    return rows


def agree(folder: Path, content: str, ending: str, quoted: bool, num_fields: int) -> bool:
    """Read with both, compare rows, lines and refusals; whether the content was well-formed."""
    path, names = folder / f"a.{ending}", ["c0", "c1", "c2"][:num_fields]
    path.write_bytes(content.encode())
    pair, quoting = "c1" if num_fields > 1 else None, "double" if quoted else "none"
    try:
        expected = reference(content, "," if ending == "csv" else "\t", quoted, num_fields)
    except Malformed as error:
        problem = str(error)
    else:
        problem = ""
    if problem:
        assert problem in refusal(
            lambda: texts_of(
                str(path),
                text_column="c0",
                text_pair_column=pair,
                column_names=names,
                quoting=quoting,
            )
        ), content
        return False
    records = texts_of(
        str(path), text_column="c0", text_pair_column=pair, column_names=names, quoting=quoting
    )
    found = [
        (str(records.location(row)), [record.text, record.pair][: len(names)])
        for row, record in enumerate(rows_of(records))
    ]
    assert found == [(f"a.{ending} line {line}", fields[:2]) for line, fields in expected], content
    return True


def test_the_reader_and_a_plain_reader_agree_on_any_bytes(tmp_path: Path) -> None:
    # 100,000 of these ran without a difference; 600 stay.
    chance, well_formed = random.Random(0), 0
    for _ in range(600):
        ending, quoted, num_fields = (
            chance.choice(["csv", "tsv"]),
            chance.random() < 0.5,
            chance.choice([1, 2, 2, 3]),
        )
        delimiter = "," if ending == "csv" else "\t"
        if chance.random() < 0.5:  # any pieces
            pieces = ["a", '"', delimiter, "\n", "\r", "é", '""', '"b"', "\r\n", '"\n"', " ", "\0"]
            content = "".join(chance.choices(pieces, k=chance.randrange(16)))
        else:  # rows, most of them well-formed
            fields = ["a", "é\r", '"b"', '"\n""x"""', "", " ", "\0", 'x"y'] + [
                f'"{delimiter}"'
            ] * quoted
            lines = [
                delimiter.join(chance.choices(fields, k=num_fields))
                for _ in range(chance.randrange(1, 5))
            ]
            content = "".join(line + chance.choice(["\n", "\r\n", "\n\n"]) for line in lines)
        if "\r" in content and "\n" not in content:
            continue  # an old Mac file: a test of its own
        well_formed += agree(tmp_path, content, ending, quoted, num_fields)
    assert 150 < well_formed < 450  # the test saw both


def test_pyarrow_alone_would_have_taken_what_is_refused_here() -> None:
    def alone(content: bytes) -> list[str]:
        types = {"a": pa.string(), "b": pa.string()}
        convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
        table = pa.csv.read_csv(
            io.BytesIO(content),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )
        found: list[str] = table.column("b").to_pylist()
        return found

    assert alone(b'a,b\n1,"open\n2,x\n') == ["open\n2,x\n"]
    assert alone(b'a,b\n1,"so" he said\n') == ["so he said"]
    assert alone(b"a,b\r1,x\r2,y\n") == ["x", "y"]


def test_rows_longer_than_a_block_and_blocks_of_many_rows_are_the_same_rows(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(1)
    rows = [
        ["".join(chance.choice('ab",\né') for _ in range(chance.randrange(40))) for _ in range(2)]
        for _ in range(2000)
    ]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    path = write("a.csv", buffer.getvalue())

    def read() -> list[list[str | None]]:
        records = texts_of(path, text_column="a", text_pair_column="b", column_names=["a", "b"])
        return [[record.text, record.pair] for record in rows_of(records)]

    assert read() == rows
    monkeypatch.setattr(csv_reader, "BLOCK_BYTES", 1024)
    assert read() == rows
    with pytest.raises(
        DataError,
        match=r"^\S+b\.csv cannot be read: straddling object straddles two block boundaries",
    ):
        texts_of(write("b.csv", "text\n" + "x" * 5000 + "\n"))
    monkeypatch.undo()
    assert texts_of(write("b.csv", "text\n" + "x" * 3_000_000 + "\n")).lengths().tolist() == [
        3_000_000
    ]  # pyarrow's own blocks: 1 MiB


def test_a_blank_line_is_a_row_only_where_there_is_one_column(write: Write) -> None:
    two = train(write("a.tsv", "text\tlabel\n\na\t1\n\n\nb\t2\n"))
    assert [(record.text, str(two.location(record.row))) for record in rows_of(two)] == [
        ("a", "a.tsv line 3"),
        ("b", "a.tsv line 6"),
    ]
    one = texts_of(write("b.tsv", "text\na\n\nb\n"))
    assert [(record.text, str(one.location(record.row))) for record in rows_of(one)] == [
        ("a", "b.tsv line 2"),
        ("", "b.tsv line 3"),
        ("b", "b.tsv line 4"),
    ]
    lines = texts_of(write("c.txt", "\ufeffa\r\n\r\nb\rc\u2028d"))
    assert [(record.text, str(lines.location(record.row))) for record in rows_of(lines)] == [
        ("a", "c.txt line 1"),
        ("", "c.txt line 2"),
        ("b\rc\u2028d", "c.txt line 3"),
    ]


def test_where_is_the_line_on_which_a_row_starts(write: Write, tmp_path: Path) -> None:
    quoted = train(write("a.csv", 'text,label\n"one\ntwo\n\nthree",1\n\nb,2\n'))
    assert [str(quoted.location(row)) for row in range(2)] == ["a.csv line 2", "a.csv line 7"]
    objects = train(
        write("a.jsonl", '\n{"text": "a", "label": 1}\n \t\n{"text": "b", "label": 2}\n')
    )
    assert [str(objects.location(row)) for row in range(2)] == ["a.jsonl line 2", "a.jsonl line 4"]
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1, 2]}), tmp_path / "a.parquet")
    assert str(train(str(tmp_path / "a.parquet")).location(1)) == "a.parquet row 1"
    again = train(write("b.csv", "text,label\na,1\nb,2\n"))
    (tmp_path / "b.csv").unlink()
    assert str(again.location(1)) == "b.csv row 1"  # a message is not lost because the file is


# --- Real data


@pytest.mark.parametrize(
    ("path", "settings", "count"),
    [
        ("chnsenticorp/train.tsv", {"column_names": ["text", "label"]}, 9_600),
        ("sst2/train.tsv", {}, 67_349),
        ("sst2/dev.tsv", {}, 872),
        ("stsb/train.tsv", {}, 5_749),
        ("stsb/dev.tsv", {}, 1_500),
        ("cola/train.tsv", {"column_names": ["_", "label", "_", "text"]}, 8_551),
        ("rte/train.tsv", {}, 2_490),
    ],
)
def test_real_sets_have_all_their_rows_and_texts(
    shared_data: Path, path: str, settings: dict[str, Any], count: int
) -> None:
    records = train(str(shared_data / path), **settings)
    assert len(records) == count
    lines = (shared_data / path).read_text(encoding="utf-8").split("\n")
    header = settings.get("column_names") or lines.pop(0).split("\t")
    columns = [
        header.index(name)
        for name in (records.text_column, records.pair_column, records.label_column)
        if name
    ]
    expected = [[line.split("\t")[column] for column in columns] for line in lines if line]
    assert [
        [field for field in record[1:] if field is not None] for record in rows_of(records)
    ] == expected


def test_reading_quotes_in_tsv_files_loses_rows_elsewhere_and_is_refused_here(
    shared_data: Path,
) -> None:
    for path, fewer in (("chnsenticorp/train.tsv", 9_146), ("stsb/train.tsv", 5_712)):
        with (shared_data / path).open(encoding="utf-8", newline="") as file:
            assert sum(1 for _ in csv.reader(file, delimiter="\t")) == fewer
        names = ["text", "label"] if path.startswith("chn") else None
        assert " line " in refusal(
            lambda path=path, names=names: train(
                str(shared_data / path), column_names=names, quoting="double"
            )
        )  # type: ignore[misc]


def test_smsspamcollection_has_all_its_rows(shared_data: Path, write: Write) -> None:
    content = (shared_data / "sms_spam" / "SMSSpamCollection").read_bytes()
    records = train(write("sms.tsv", content), column_names=["label", "text"])
    assert len(records) == 5_574
    assert not any(record.text.endswith("\r") for record in rows_of(records))
    assert np.bincount(records.label_indices).tolist() == [4_827, 747] and records.label_values == [
        "ham",
        "spam",
    ]  # type: ignore[arg-type]
    assert (
        len(list(csv.reader(io.StringIO(content.decode(), newline=""), delimiter="\t"))) == 5_572
    )  # the twin


def test_bytes_that_are_not_utf8_are_named_with_file_line_and_byte(shared_data: Path) -> None:
    path = shared_data / "sms_spam" / "spam.csv"
    with pytest.raises(UnicodeDecodeError) as caught:
        path.read_bytes().decode()
    line = path.read_bytes()[: caught.value.start].count(b"\n") + 1
    byte = path.read_bytes()[caught.value.start]
    message = refusal(
        lambda: train(str(path), text_column="v2", label_column="v1", encoding="utf-8")
    )
    assert message.startswith(
        f"spam.csv line {line}: byte 0x{byte:02X} is not utf-8; pass --encoding (such as cp1252 for Western "
    )
    records = train(str(path), text_column="v2", label_column="v1", encoding="cp1252")
    assert len(records) == 5_572 and any("£" in record.text for record in rows_of(records))


def test_where_finds_what_grep_finds(shared_data: Path) -> None:
    records = train(str(shared_data / "chnsenticorp" / "train.tsv"), column_names=["text", "label"])
    for row in (0, 4_321, 9_599):
        command = [
            "grep",
            "-nF",
            "-m",
            "1",
            "--",
            records[row].text,
            str(shared_data / "chnsenticorp" / "train.tsv"),
        ]
        found = (
            subprocess.run(command, capture_output=True, check=True).stdout.decode().split(":")[0]
        )
        same = [other for other in range(row + 1) if records[row].text in records[other].text]
        assert str(records.location(same[0])) == f"train.tsv line {found}"


def test_real_multi_label_columns(shared_data: Path, write: Write) -> None:
    names = (
        "anger anticipation disgust fear joy love optimism pessimism sadness surprise trust".split()
    )
    content = (shared_data / "semeval18_ec" / "2018-E-c-En-train.txt").read_bytes()
    records = train(write("e.tsv", content), label_columns=names)
    assert (
        len(records) == 6_838
        and labels_of(records).count(()) == 204
        and records.class_names == tuple(names)
    )
    test = (shared_data / "semeval18_ec" / "2018-E-c-En-test.txt").read_bytes()
    assert (
        refusal(lambda: train(write("t.tsv", test), label_columns=names))
        == "t.tsv line 2: column 'anger' holds 'NONE'; expected 0 or 1."
        " --on_bad_row skip leaves such rows out."
    )


# --- What is refused


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.csv", "text,label\na,1\nb\n", {}, "a.csv line 3: 1 field, expected 2 as in the header"),
        (
            "a.csv",
            'text,label\n"a\nb",1\n\nb,2,3\n',
            {},
            "a.csv line 5: 3 fields, expected 2 as in the header",
        ),
        (
            "a.tsv",
            "a\tb\t1\n",
            {"column_names": ["text", "label"]},
            "a.tsv line 1: 3 fields, expected 2 as in --column_names",
        ),
        (
            "a.csv",
            'text,label\na,1\nb,"2\nc,3\n',
            {},
            "a.csv line 3: a quote opens here and never closes",
        ),
        (
            "a.csv",
            'text,label\n"a\nb","2\nc,3\n',
            {},
            "a.csv line 3: a quote opens here and never closes",
        ),
        ("a.csv", 'text,label\n"so" he said,1\n', {}, "a.csv line 2: text follows"),
        (
            "a.csv",
            b"text,label\na,1\n\xa35,0\n",
            {},
            "a.csv line 3: byte 0xA3 is not utf-8; pass --encoding (such as cp1252 for Western European",
        ),
        (
            "a.jsonl",
            b'{"text": "\xa3", "label": 1}\n',
            {},
            "a.jsonl line 1: byte 0xA3 is not utf-8",
        ),
        (
            "a.csv",
            b"text,label\na,1\n\x81,0\n",
            {"encoding": "cp1252"},
            "a.csv line 3: byte 0x81 is not cp1252; pass the --encoding it",
        ),
        (
            "a.csv",
            "text,label\na,1\n",
            {"encoding": "utf-9"},
            "--encoding utf-9 is not a text encoding",
        ),
        (
            "a.csv",
            "text,label\na,1\n".encode("utf-16"),
            {"encoding": "utf-8"},
            "a.csv is UTF-16, expected UTF-8; convert it",
        ),
        ("a.csv", "text,label\ra,1\r", {}, "a.csv: its lines end with a lone carriage return"),
        ("a.csv", "", {}, "a.csv has no rows."),
        ("a.csv", "\n\n", {}, "a.csv has no rows."),
        ("a.csv", "text,label\n", {}, "a.csv has no rows."),
        ("a.csv", "text,label", {}, "a.csv has no rows."),
        ("a.jsonl", "\n \n", {}, "a.jsonl has no rows."),
        (
            "a.csv",
            "text,text,label\na,b,1\n",
            {},
            "a.csv line 1: the header has two columns 'text'",
        ),
        ("a.csv", "a,1\n", {"column_names": ["text", "text"]}, "--column_names has 'text' twice"),
        (
            "a.tsv",
            "text\tlabel\na\t1\n",
            {"column_names": ["text", "label"]},
            "a.tsv line 1 is a header ('text', 'label'), and --column_names is for files without one",
        ),
        (
            "a.csv",
            "text,label\na,1\n",
            {"delimiter": "||"},
            "--delimiter is '||'; expected one ASCII character",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n',
            {"delimiter": ","},
            "a.jsonl: --delimiter cannot take effect on a .jsonl file",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n',
            {"column_names": ["text"]},
            "a.jsonl: --column_names cannot take effect",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n',
            {"quoting": "none"},
            "a.jsonl: --quoting cannot take effect",
        ),
        (
            "a.txt",
            "a\n",
            {},
            "a.txt is read as one text per line, without labels; for a table pass --delimiter",
        ),
        (
            "a.xlsx",
            "",
            {},
            "a.xlsx: the kind of file is not known by its name, and its lines are not a table; pass --file_format",
        ),
        ("a.parquet", "no parquet", {}, "a.parquet cannot be read: "),
        (
            "a.json",
            '[{"text": "a", "label": 1}, 7]',
            {},
            "a.json row 1: expected a JSON object with keys, found 7",
        ),
        ("a.json", '{\n "txet": "a"\n}', {}, "a.json: expected a list of objects"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": "b" "label": 1}\n',
            {},
            "a.jsonl line 3: not JSON: ",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n7\n',
            {},
            "a.jsonl line 2: expected a JSON object with keys, found 7.",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": NaN}\n',
            {},
            "a.jsonl line 1: not JSON: NaN is not a JSON number",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1, "text": "b"}\n',
            {},
            "a.jsonl line 1: the key 'text' occurs twice",
        ),
        (
            "a.jsonl",
            "[" * 100_000 + "\n",
            {},
            "a.jsonl: not JSON: maximum recursion depth exceeded",
        ),
        ("a.jsonl", '{"a":' * 100_000 + "\n", {}, "a.jsonl line 1: not JSON: "),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"txet": "b", "label": 1}\n',
            {},
            "a.jsonl line 2: the key 'text' is missing. Did you mean 'txet'?",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": null, "label": 1}\n',
            {},
            "a.jsonl line 2: column 'text' is null; expected a text.",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": 3, "label": 1}\n',
            {},
            "a.jsonl line 3: column 'text' holds 3; expected a text.",
        ),
        (
            "a.json",
            '{"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 0}}\n',
            {},
            "a.json line 1: column 'text' holds {'0': 'a', '1': 'b'}; expected a text. With pandas,"
            " write df.to_json(path, orient='records', lines=True).",
        ),
        (
            "a.jsonl",
            '{"text": "\\ud800", "label": 1}\n',
            {},
            "a.jsonl line 1: column 'text' has a lone surrogate; expected a text.",
        ),
        (
            "a.csv",
            "text,label\na,1\nb,\n",
            {},
            "a.csv line 3: label is missing, expected one in every row (column 'label').",
        ),
        (
            "a.csv",
            "text,label\na,1\nb, \n",
            {},
            "a.csv line 3: label is missing, expected one in every row (column 'label').",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": null}\n',
            {},
            "a.jsonl line 2: label is missing, expected one in every row (column 'label').",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}\n',
            {},
            "a.jsonl line 2: the key 'label' is missing.",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": ["x"]}\n{"text": "b", "label": "x"}\n',
            {},
            "a.jsonl line 2: label 'x' is a single label, each of the labels above it is a list of labels (column 'label').",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": [1]}\n',
            {},
            "a.jsonl line 2: label [1] is a list of labels, each of the labels above it is a single label (column 'label').",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": {}}\n',
            {},
            "a.jsonl line 1: label is a dict; expected text, a number or a list of labels",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1e999}\n',
            {},
            "a.jsonl line 1: label inf is not a finite number",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": "\\ud800"}\n',
            {},
            "a.jsonl line 1: label '\\ud800' has a lone surrogate",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": ["x", "x"]}\n',
            {},
            "a.jsonl line 1: label 'x' occurs twice in one row",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": ["x", null]}\n',
            {},
            "a.jsonl line 1: None in the list of labels",
        ),
        (
            "a.csv",
            "text,label\na,x|y\nb,x|\n",
            {"label_delimiter": "|"},
            "a.csv line 3: '' in the list of labels",
        ),
        (
            "a.csv",
            "text,label\na,x|y|x\n",
            {"label_delimiter": "|"},
            "a.csv line 2: label 'x' occurs twice in one row",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 3}\n',
            {"label_delimiter": "|"},
            "a.jsonl line 1: label 3 is not text, and --label_delimiter",
        ),
        (
            "a.csv",
            "text,x,y\na,1,0\nb,0,2\n",
            {"label_columns": ["x", "y"]},
            "a.csv line 3: column 'y' holds '2'; expected 0 or 1.",
        ),
        (
            "a.jsonl",
            '{"text": "a", "x": 0.5}\n',
            {"label_columns": ["x"]},
            "a.jsonl line 1: column 'x' holds 0.5; expected 0 or 1.",
        ),
        (
            "a.jsonl",
            '{"text": "a", "x": [1]}\n',
            {"label_columns": ["x"]},
            "a.jsonl line 1: column 'x' holds [1]; expected 0 or 1.",
        ),
        (
            "a.csv",
            "text,label\na,1\n",
            {"text_column": "txet"},
            "a.csv line 1: there is no column 'txet'. Did you mean 'text'? The columns are 'text', 'label'.",
        ),
        (
            "a.csv",
            "b,label\na,1\n",
            {},
            "a.csv line 1: no column has a usual name for the text. Pass --text_column. The columns are 'b', 'label'.",
        ),
        (
            "a.csv",
            "text,b\na,1\n",
            {},
            "a.csv line 1: no column has a usual name for the label. Pass --label_column. The columns are 'text', 'b'.",
        ),
        (
            "a.csv",
            "v1,v2\na,1\n",
            {},
            "no column has a usual name for the text or the label. Pass --text_column and --label_column. The columns are 'v1', 'v2'.",
        ),
        (
            "a.csv",
            "what a film,1\nbad,0\n",
            {"text_column": "text"},
            "if the file has no header, name its columns with --column_names.",
        ),
        (
            "a.jsonl",
            '{"b": "a", "label": 1}\n',
            {"text_column": "text"},
            "a.jsonl: there is no column 'text'. Name another one with --text_column. The columns are 'b', 'label'.",
        ),
        (
            "a.csv",
            "a,1\n",
            {"column_names": ["_", "label"], "text_column": "_"},
            "a.csv: there is no column '_'. Name another one with --text_column. The columns are 'label'.",
        ),
    ],
)
def test_a_refusal_is_one_line_that_names_the_place(
    write: Write, name: str, content: str | bytes, settings: dict[str, Any], message: str
) -> None:
    assert message in refusal(lambda: train(write(name, content), **settings))


def test_a_path_that_is_no_file_is_refused_with_the_nearest_name(
    write: Write, tmp_path: Path
) -> None:
    write("train.tsv", "text\tlabel\na\t1\n")
    assert refusal(lambda: train(str(tmp_path / "trian.tsv"))).endswith(
        f"trian.tsv: no such file. Did you mean '{tmp_path / 'train.tsv'}'?"
    )
    assert refusal(lambda: train(str(tmp_path / "no" / "train.tsv"))).endswith("no such folder.")
    assert "is a folder without .txt files; expected a file" in refusal(
        lambda: train(str(tmp_path))
    )


def test_parquet_with_anything_but_text_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(["a", None]), "label": [1, 2]}), path)
    assert (
        refusal(lambda: train(path)) == "a.parquet row 1: column 'text' is null; expected a text."
        " --on_bad_row skip leaves such rows out."
    )
    pq.write_table(pa.table({"text": [1, 2], "label": [1, 2]}), path)
    assert "column 'text' is of type int64; expected text." in refusal(lambda: train(path))
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, float("nan")]}), path)
    assert (
        refusal(lambda: train(path))
        == "a.parquet row 1: label nan is not a finite number (column 'label')."
        " --on_bad_row skip leaves such rows out."
    )
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([1, None])}), path)
    assert (
        refusal(lambda: train(path))
        == "a.parquet row 1: label is missing, expected one in every row (column 'label')."
        " --on_bad_row skip leaves such rows out."
    )
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.nulls(2)}), path)
    assert (
        refusal(lambda: train(path))
        == "a.parquet row 0: label is missing, expected one in every row (column 'label')."
        " --on_bad_row skip leaves such rows out."
    )
    assert refusal(lambda: train(path, encoding="cp1252")).startswith(
        "a.parquet: --encoding cannot take effect"
    )
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), path
    )
    assert refusal(lambda: train(path)) == "a.parquet has no rows."


def test_a_delimiter_makes_a_table_of_a_file_with_another_ending(write: Write) -> None:
    assert train(write("a.txt", 'text\tlabel\n"a\t1\n'), delimiter="tab")[0] == Record(
        0, '"a', None, "1"
    )
    assert train(write("Collection", 'label;text\n1;"a;b"\n'), delimiter=";")[0] == Record(
        0, "a;b", None, "1"
    )
    records = train(write("a.txt", "text\tlabel\na\t1\n"))
    assert records[0] == Record(0, "a", None, "1") and records.format_notes == (
        "a.txt: read as utf-8, delimiter tab, unquoted; --file_format txt overrules",
    )


def test_what_is_refused_is_refused_for_its_reason(write: Write) -> None:
    # The twins: the nearest legal neighbours of what is refused above.
    assert [
        record.text
        for record in rows_of(
            train(write("a.csv", 'text,label\n5" pipe,1\n""""",2\n'.replace('""""",2', '"""",2')))
        )
    ] == [
        '5" pipe',
        '"',
    ]
    assert train(write("a.csv", b"text,label\n\xa35,0\n"), encoding="cp1252")[0].text == "£5"
    assert (
        train(write("a.csv", "text,label\na,1\n".encode("utf-16")), encoding="utf-16")[0].text
        == "a"
    )
    assert train(write("a.csv", "text,label\nx\ry,1\n\ue000\r,2\n"))[1].text == "\ue000\r"
    assert (
        train(write("a.csv", "v1,text,,,\n1,a,x,,\n"), label_column="v1")[0].text == "a"
    )  # unnamed columns cannot be confused
    assert train(write("a.jsonl", '{"text": "", "label": 1}\n'))[0].text == ""
    assert train(write("a.csv", "text,label\na,\n"), label_delimiter="|")[0].label == ()
    assert train(write("a.csv", "text;label\na,b;1\n"), delimiter=";")[0].text == "a,b"
    assert train(write("a.csv", "text\tlabel\na,b\t1\n"), delimiter="tab")[0].text == "a,b"
    assert train(write("a.csv", 'text,label\n"a",1\n'), quoting="none")[0].text == '"a"'
    assert train(write("a.tsv", 'text\tlabel\n"a\n\tb"\t1\n'), quoting="double")[0].text == "a\n\tb"
    assert texts_of(write("a.csv", "text,label\na,\n"))[0] == Record(
        0, "a", None, None
    )  # labels are not read at all


# --- ColumnNames


@pytest.mark.parametrize(
    ("header", "settings", "text", "pair", "label"),
    [
        ("id,text,sentence,label", {}, "text", None, "label"),
        ("id,Text,Label", {}, "Text", None, "Label"),
        ("review,target,class", {}, "review", None, "target"),
        ("sentence1,sentence2,score", {}, "sentence1", "sentence2", "score"),
        ("index,question,sentence,label", {}, "question", "sentence", "label"),
        ("question1,question2,label", {}, "question1", "question2", "label"),
        ("question,question2,label", {}, "question", "question2", "label"),
        ("premise,hypothesis,label", {}, "premise", "hypothesis", "label"),
        ("sentence1,sentence2,label", {"text_column": "sentence1"}, "sentence1", None, "label"),
        ("sentence1,other,label", {"text_pair_column": "other"}, "sentence1", "other", "label"),
        (
            "question,sentence,label",
            {"text_pair_column": "sentence"},
            "question",
            "sentence",
            "label",
        ),
        ("content,labels,mine", {"label_column": "mine"}, "content", None, "mine"),
    ],
)
def test_columns_are_those_asked_for_or_the_usual_ones(
    write: Write, header: str, settings: dict[str, Any], text: str, pair: str | None, label: str
) -> None:
    names = header.split(",")
    records = train(
        write("a.csv", header + "\n" + ",".join(f"<{name}>" for name in names) + "\n"), **settings
    )
    assert (records.text_column, records.pair_column, records.label_column) == (text, pair, label)
    assert records[0] == Record(0, f"<{text}>", pair and f"<{pair}>", f"<{label}>")


def test_a_column_named_underscore_is_not_read(write: Write) -> None:
    records = train(write("a.tsv", "x\t1\ty\thello\n"), column_names=["_", "label", "_", "text"])
    assert records[0] == Record(0, "hello", None, "1")


# --- Labels


@pytest.mark.parametrize(
    ("labels", "settings", "kind", "values"),
    [
        (["b", "a", "b"], {}, "text", ["b", "a", "b"]),
        ([2, 10, 2], {}, "text", ["2", "10", "2"]),
        ([9007199254740993, 2**70], {}, "text", ["9007199254740993", str(2**70)]),
        ([1, 0.5, 1.0, "1 "], {}, "text", ["1", "0.5", "1.0", "1"]),
        ([True, False], {}, "text", ["true", "false"]),
        ([["x", "y"], [], ["x"]], {}, "set", [("x", "y"), (), ("x",)]),
        ([[3, 1], [3]], {}, "set", [("3", "1"), ("3",)]),
        (
            ["x | y", "x|y", "", " "],
            {"label_delimiter": "|"},
            "set",
            [("x", "y"), ("x", "y"), (), ()],
        ),
    ],
)
def test_labels_keep_their_kind_and_value(
    write: Write, labels: list[Any], settings: dict[str, Any], kind: str, values: list[Any]
) -> None:
    lines = [json.dumps({"text": "t", "label": label}) for label in labels]
    records = train(write("a.jsonl", "\n".join(lines)), **settings)
    assert (records.label_kind, labels_of(records)) == (kind, values)
    assert records.label_values == list(dict.fromkeys(values))
    assert [type(label) for label in labels_of(records)] == [type(value) for value in values]


def test_labels_of_parquet_keep_their_kind_and_value(tmp_path: Path) -> None:
    columns: list[tuple[Any, str, list[Any]]] = [
        (pa.array([2**63, 1], pa.uint64()), "text", [str(2**63), "1"]),
        (pa.array([1, -1], pa.int8()), "text", ["1", "-1"]),
        (pa.array([Decimal("1.50"), Decimal(2)]), "text", ["1.50", "2.00"]),
        (pa.array([0.5, 2.0], pa.float32()), "text", ["0.5", "2.0"]),
        (pa.array([0.5, 2.0], pa.float16()), "text", ["0.5", "2.0"]),
        (pa.array([True, False]), "text", ["true", "false"]),
        (pa.array([["b", "a"], []]), "set", [("b", "a"), ()]),
        (pa.array(["b", "a"]).dictionary_encode(), "text", ["b", "a"]),
    ]
    for column, kind, values in columns:
        pq.write_table(pa.table({"text": ["s", "t"], "label": column}), tmp_path / "a.parquet")
        records = train(str(tmp_path / "a.parquet"))
        assert (records.label_kind, labels_of(records)) == (kind, values)


def test_numbers_in_csv_stay_text(write: Write) -> None:
    records = train(write("a.csv", "text,label\na,1\nb,0.5\nc,007\n"))
    assert (records.label_kind, records.label_values) == ("text", ["1", "0.5", "007"])


def test_label_columns_make_tuples_of_names_in_the_order_given(write: Write) -> None:
    records = train(
        write("a.csv", "text,x,y,z\na,1,0,1\nb,0,0,0\nc,true,False,1\nd,0,1,0\n"),
        label_columns=["z", "x", "y"],
    )
    assert labels_of(records) == [("z", "x"), (), ("z", "x"), ("y",)]
    assert (records.label_kind, records.class_names, records.label_column) == (
        "set",
        ("z", "x", "y"),
        None,
    )
    assert records.label_values == [("z", "x"), (), ("y",)]
    other = train(
        write("a.jsonl", '{"text": "a", "x": 1, "y": true, "z": 0.0}'),
        label_columns=["x", "y", "z"],
    )
    assert labels_of(other) == [("x", "y")]


def test_more_label_columns_than_a_machine_word_has_bits(write: Write) -> None:
    names = [f"l{at}" for at in range(70)]
    rows = [[int(at in chosen) for at in range(70)] for chosen in ({0, 69}, {69}, {0, 69}, set())]
    path = write(
        "a.jsonl",
        "\n".join(json.dumps({"text": "t", **dict(zip(names, row, strict=True))}) for row in rows),
    )
    assert labels_of(train(path, label_columns=names)) == [
        ("l0", "l69"),
        ("l69",),
        ("l0", "l69"),
        (),
    ]


# --- Records


def test_only_the_first_rows_are_read_where_so_asked(write: Write, tmp_path: Path) -> None:
    rows = [("a", 1), ("b", 2), ("c", None)]
    write("a.csv", "text,label\n" + "".join(f"{text},{label or ''}\n" for text, label in rows))
    write(
        "a.jsonl",
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows),
    )
    pq.write_table(
        pa.table({"text": ["a", "b", "c"], "label": pa.array([1, 2, None])}), tmp_path / "a.parquet"
    )
    for ending in ("csv", "jsonl", "parquet"):
        path = str(tmp_path / f"a.{ending}")
        assert [record.text for record in rows_of(train(path, max_train_samples=2))] == ["a", "b"]
        scored = load_records(
            DataConfig(
                train_file=[path], validation_file=path, max_eval_samples=1, max_train_samples=2
            ),
            "validation",
        )
        assert scored is not None and [record.text for record in rows_of(scored)] == ["a"]
        assert "label is missing" in refusal(lambda path=path: train(path, max_train_samples=9))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("first", "second", "is_noted"),
    [
        ("01", ["neg", "pos"], True),
        ("01", ["1", "pos"], False),
        ("01", ["1.0", "2.0"], False),
        ("01", "23", False),  # numbers
        (["neg", "neg"], ["pos", "pos"], False),  # a file per label
    ],
)
def test_files_without_a_common_label_are_noted(
    write: Write, first: Sequence[str], second: Sequence[str], is_noted: bool
) -> None:
    files = [
        write(name, "text,label\n" + "".join(f"t,{label}\n" for label in labels))
        for name, labels in (("a.csv", first), ("b.csv", second))
    ]
    notes = load_records(DataConfig(train_file=files), "train").format_notes
    note = "a.csv has no label in common with the other files: '0', '1'; 'neg', 'pos'"
    assert notes == ((note,) if is_noted else ())


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.csv", ["text,label", "a,1", "b", "c,0", ",", "d,", "e,1", "f,0"]),
        (
            "a.jsonl",
            [
                '{"text": "a", "label": 1}',
                '{"text": "b"}',
                '{"text": "c", "label": 0}',
                '{"text": null, "label": 1}',
                '{"text": "d", "label": null}',
                '{"text": "e", "label": 1}',
                '{"text": "f", "label": 0}',
            ],
        ),
    ],
)
def test_a_limit_counts_the_rows_that_are_kept(write: Write, name: str, lines: list[str]) -> None:
    path = write(name, "\n".join(lines) + "\n")
    for limit, expected, skipped in ((3, "ace", 3), (2, "ac", 1), (4, "acef", 3), (9, "acef", 3)):
        records = train(path, on_bad_row="skip", max_train_samples=limit)
        assert ("".join(records.texts.to_pylist()), len(records.bad_rows)) == (
            expected,
            skipped,
        )
    few = train(path, on_bad_row="skip", max_train_samples=3, max_bad_rows=1)
    assert len(few.bad_rows) > 1  # which ends the run


def test_without_rows_to_score_there_is_none(write: Write) -> None:
    data = DataConfig(train_file=[write("a.csv", "text,label\na,1\n")])
    assert load_records(data, "validation") is None


def test_the_fingerprint_is_that_of_the_content_alone(write: Write) -> None:
    one = train(write("a.csv", 'text,label\n"a",1\nb,2\n')).fingerprint
    assert one == train(write("b.tsv", "label\ttext\r\n1\ta\r\n2\tb\r\n")).fingerprint
    assert (
        one
        == train(
            write("c.tsv", "sentence\tlabel\na\t1\nb\t2\nc\t3\n"), max_train_samples=2
        ).fingerprint
    )
    others = [
        "text,label\na,1\nb,1\n",
        "text,label\nb,1\na,2\n",
        "text,label\nab,1\n,2\n",
        "text,label\na,2\nb,1\n",
        "text,label\na,1\n",
    ]
    others += ["sentence1,sentence2,label\na,,1\nb,,2\n", "text,label\na,1\nb,2\n,1\n"]
    same_values = [
        train(write("e.csv", f"text,label\na,1\nb,2\nc,{label}\n")).fingerprint for label in (1, 2)
    ]
    assert same_values[0] != same_values[1]
    assert len(
        {one, *(train(write("d.csv", content)).fingerprint for content in others)}
    ) == 1 + len(others)


def test_a_row_that_is_not_there_is_an_index_error(write: Write) -> None:
    records = train(write("a.csv", "text,label\na,1\nb,2\n"))
    assert (
        records[np.int64(1)] == Record(1, "b", None, "2") and type(records[np.int64(1)].row) is int
    )  # type: ignore[index]
    for row in (-1, 2):
        with pytest.raises(IndexError):
            records[row]


def test_texts_in_memory_are_records_too() -> None:
    assert rows_of(records_from_texts(["a", "b"], ["c", "d"])) == [
        Record(0, "a", "c", None),
        Record(1, "b", "d", None),
    ]
    assert (
        refusal(lambda: records_from_texts(["a"], ["b", "c"]))
        == "There are 1 texts and 2 second texts; they go together."
    )
    assert "lone surrogate" in refusal(lambda: records_from_texts(["a\ud800"]))


class Name(str):
    """A subclass of str whose str() is another text."""

    def __str__(self) -> str:
        return "another"


@pytest.mark.parametrize(
    "texts",
    [
        ["a", "b"],
        ("a", "b"),
        (x for x in "ab"),
        map(str, "ab"),
        {"a": 1, "b": 2}.keys(),
        np.array(["a", "b"]),
        np.array(["a", "b"], object),
        [Name("a"), np.str_("b")],
        pd.Series(["a", "b"], index=[7, 3]),
        pd.Series(["a", "b"], dtype="category"),
        pd.DataFrame({"x": ["a", "b"], "y": ["c", "d"]})["x"],
        pa.array(["a", "b"]),
        pa.chunked_array([["a"], ["b"]]),
        pa.array(["a", "b"]).dictionary_encode(),
        datasets.Dataset.from_dict({"x": ["a", "b"]})["x"],
        io.StringIO("a\nb").read().splitlines(),
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_any_iterable_of_texts_is_read_in_its_order(texts: Any) -> None:
    found = records_from_texts(texts)
    assert [type(record.text) for record in rows_of(found)] == [str, str]
    assert rows_of(found) == [Record(0, "a", None, None), Record(1, "b", None, None)]


@pytest.mark.parametrize("text", ["ab", "", Name("ab"), np.str_("ab")])
def test_one_text_is_one_row(text: str) -> None:
    expected = str.__str__(text)
    assert rows_of(records_from_texts(text)) == [Record(0, expected, None, None)]
    assert rows_of(records_from_texts(text, "b")) == [Record(0, expected, "b", None)]
    assert len(records_from_texts([*text])) == len(text)  # the control: letters are texts, too


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], "texts[1] is None (NoneType); expected a text. In pandas: .fillna('')."),
        (["a", b"b"], "texts[1] is b'b' (bytes); expected a text."),
        (["a", "b", 3], "texts[2] is 3 (int); expected a text."),
        ([float("nan")], "texts[0] is nan (float); expected a text. In pandas: .fillna('')."),
        (pd.Series(["a", None], index=[5, 5]), "texts[1] is "),
        ([("a", "b")], "texts[0] is ('a', 'b') (tuple); expected a text."),
        ([["a"]], "texts[0] is ['a'] (list); expected a text."),
        ([{"text": "a"}], "texts[0] is {'text': 'a'} (dict); expected a text."),
        (
            np.array([["a", "b"]]),
            "texts[0] is array(['a', 'b'], dtype='<U1') (ndarray); expected a",
        ),
        (np.array([1.5]), "texts[0] is np.float64(1.5) (float64); expected a text."),
        (pa.array([1]), "texts[0] is 1 (int); expected a text."),
        (b"ab", "texts is of type bytes: expected a text or a list of texts; decode it first."),
        (
            bytearray(b"a"),
            "texts is of type bytearray: expected a text or a list of texts; decode it fir",
        ),
        (
            {"a", "b"},
            "texts is of type set: expected a text or a list of texts; a set has no order.",
        ),
        (
            {"text": "a", "text_pair": "b"},
            "texts is of type dict: expected a text or a list of texts, and second texts as pairs.",
        ),
        (
            pd.DataFrame({"x": ["a"]}),
            "texts is of type DataFrame: expected a text or a list of texts; pa",
        ),
        (
            datasets.Dataset.from_dict({"x": ["a"]}),
            "texts is of type Dataset: expected a text or a list",
        ),
        (
            pa.table({"x": ["a"]}),
            "texts is of type Table: expected a text or a list of texts; pass one ",
        ),
        (None, "texts is of type NoneType: expected a text or a list of texts."),
        (7, "texts is of type int: expected a text or a list of texts."),
        (np.array("a"), "texts is of type ndarray: expected a text or a list of texts."),
        (Path("a.txt"), "texts is of type PosixPath: expected a text or a list of texts."),
    ],
)
def test_what_is_no_text_is_refused_with_its_position_and_type(texts: Any, message: str) -> None:
    told = refusal(lambda: records_from_texts(texts))
    assert told.startswith(message) and "\n" not in told
    if texts is not None:  # second texts likewise
        told = refusal(lambda: records_from_texts("a", texts))
        assert told.startswith(message.replace("texts", "pairs", 1))


def test_texts_and_second_texts_are_as_many() -> None:
    for texts, pairs in ((["a", "b"], "ab"), ("a", ["b", "c"]), ([], ["a"]), (iter("ab"), [])):
        assert "they go together" in refusal(lambda t=texts, p=pairs: records_from_texts(t, p))
    assert len(records_from_texts([])) == len(records_from_texts(iter(()), [])) == 0


def test_txt_is_for_prediction_and_has_no_pairs(write: Write) -> None:
    path = write("a.txt", "a\nb\n")
    trained = ColumnNames("sentence", None, None, None)  # a .txt has but one column
    records = load_texts(path, FileConfig(), trained)
    assert rows_of(records) == [Record(0, "a", None, None), Record(1, "b", None, None)]
    assert (records.label_kind, records.label_values, records.label_indices) == (None, [], None)
    assert "one text per line, no pairs" in refusal(lambda: texts_of(path, text_pair_column="b"))
    assert "--text_column cannot take effect" in refusal(lambda: texts_of(path, text_column="b"))


def _read(records: Records, queue: Any) -> None:
    queue.put([records[row] for row in range(len(records))])


def test_a_forked_worker_reads_the_same(write: Write) -> None:
    records = train(
        write("a.tsv", "text\tlabel\n" + "".join(f"t{row}\t{row % 3}\n" for row in range(500)))
    )
    context = get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=_read, args=(records, queue))
    worker.start()
    assert queue.get() == rows_of(records)
    worker.join(10)
    assert worker.exitcode == 0


def test_local_files_do_not_pay_for_datasets(write: Write) -> None:
    path = write("a.tsv", "text\tlabel\na\t1\n")
    program = (
        "import sys; from bertdist.core.config import DataConfig; from bertdist.data.load_data import load_records;"
        f"load_records(DataConfig(train_file=[{path!r}]), 'train'); print('datasets' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"


# --- The hub, by way of a local folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """hub(train={column: values}, ..., features=...) -> a folder that `load_dataset` takes for a data set."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def hub(features: Any = None, **splits: dict[str, list[Any]]) -> str:
        folder = tmp_path_factory.mktemp("dataset")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
            + "---\n"
        )
        for split, columns in splits.items():
            datasets.Dataset.from_dict(columns, features=features).to_parquet(
                str(folder / f"{split}.parquet")
            )
        return str(folder)

    return hub


def test_class_labels_are_their_names_in_their_order(hub: Callable[..., str]) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    folder = hub(
        features,
        train={"text": ["a", "b", "c"], "label": [1, 0, 1]},
        validation={"text": ["d"], "label": [0]},
        test={"text": ["e"], "label": [-1]},
    )
    records = load_records(DataConfig(dataset_name=folder), "train")
    assert rows_of(records) == [
        Record(0, "a", None, "pos"),
        Record(1, "b", None, "neg"),
        Record(2, "c", None, "pos"),
    ]
    assert (records.label_kind, records.label_values, records.class_names) == (
        "text",
        ["pos", "neg"],
        ("neg", "pos"),
    )
    assert (
        records.name == f"{folder} split 'train'"
        and str(records.location(1)) == f"{folder} split 'train' row 1"
    )
    scored = load_records(DataConfig(dataset_name=folder), "validation")
    assert scored is not None and rows_of(scored) == [Record(0, "d", None, "neg")]
    part = load_records(
        DataConfig(dataset_name=folder, train_split="train[:67%]", max_train_samples=1), "train"
    )
    assert rows_of(part) == [Record(0, "a", None, "pos")]
    message = refusal(
        lambda: load_records(DataConfig(dataset_name=folder, validation_split="test"), "validation")
    )
    assert message.endswith(
        "split 'test' row 0: label is missing; some test splits on the Hub have no labels (column 'label')."
        " --on_bad_row skip leaves such rows out."
    )
    message = refusal(
        lambda: load_records(DataConfig(dataset_name=folder, train_split="trian"), "train")
    )
    assert message == f"{folder} has no split 'trian'. Did you mean 'train'?"


@pytest.mark.parametrize("nested", [False, True])
def test_class_labels_of_parquet_files_are_their_names(nested: bool, tmp_path: Path) -> None:
    """datasets writes their names into the file's metadata; other files have numbers."""
    import datasets

    for file, names in (("train", ["pos", "neg"]), ("dev", ["neg", "pos"])):
        label: Any = datasets.ClassLabel(names=names)
        label = datasets.List(label) if nested else label
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        codes = [names.index(name) for name in ("neg", "pos", "neg")]
        rows = {"text": ["a", "b", "c"], "label": [[x] for x in codes] if nested else codes}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{file}.parquet")
    data = DataConfig(
        train_file=[str(tmp_path / "train.parquet")], validation_file=str(tmp_path / "dev.parquet")
    )
    expected = [("neg",), ("pos",), ("neg",)] if nested else ["neg", "pos", "neg"]
    for split, names in (("train", ("pos", "neg")), ("validation", ("neg", "pos"))):
        records = load_records(data, split)  # type: ignore[arg-type]
        assert records is not None and records.class_names == names
        assert labels_of(records) == expected
    assert labels_of(open_stream(data, 0).head()) == expected
    source = read_source(data, load_records(data, "train"))
    assert source.texts("label") == [list(x) for x in expected] if nested else expected
    plain = pq.read_table(tmp_path / "train.parquet").replace_schema_metadata()
    pq.write_table(plain, tmp_path / "train.parquet")
    codes = [("1",), ("0",), ("1",)] if nested else ["1", "0", "1"]
    assert labels_of(load_records(data, "train")) == codes, "the control"
    stale = pq.read_table(tmp_path / "dev.parquet")
    names = pa.array([["x"], ["y"], ["x"]]) if nested else pa.array(["x", "y", "x"])
    stale = stale.set_column(1, "label", names).replace_schema_metadata(stale.schema.metadata)
    pq.write_table(stale, tmp_path / "train.parquet")
    found = [("x",), ("y",), ("x",)] if nested else ["x", "y", "x"]
    assert labels_of(load_records(data, "train")) == found, "metadata older than the column"


def test_lists_of_class_labels_are_sets(hub: Callable[..., str]) -> None:
    import datasets

    labels = datasets.List(datasets.ClassLabel(names=["joy", "fear"]))
    folder = hub(
        datasets.Features({"text": datasets.Value("string"), "labels": labels}),
        train={"text": ["a", "b"], "labels": [[1, 0], []]},
    )
    records = load_records(DataConfig(dataset_name=folder), "train")
    assert (records.label_kind, labels_of(records), records.class_names) == (
        "set",
        [("fear", "joy"), ()],
        ("joy", "fear"),
    )
    assert (
        load_records(DataConfig(dataset_name=folder), "validation") is None
    )  # it has no such split


def test_a_glue_task_knows_its_columns(hub: Callable[..., str]) -> None:
    columns = {
        "sentence": ["s"],
        "question": ["q"],
        "premise": ["p"],
        "hypothesis": ["h"],
        "text": ["no"],
        "label": [0],
    }
    folder = hub(train=columns, validation_matched=columns | {"premise": ["m"]})
    qnli = load_records(DataConfig(dataset_name=folder, task_name="qnli"), "train")
    assert qnli[0] == Record(0, "q", "s", "0")
    assert load_records(DataConfig(dataset_name=folder, task_name="sst2"), "train")[0] == Record(
        0, "s", None, "0"
    )
    mnli = load_records(DataConfig(dataset_name=folder, task_name="mnli"), "validation")
    assert mnli is not None and mnli[0] == Record(0, "m", "h", "0")
    assert load_records(DataConfig(dataset_name=folder, task_name="qnli"), "validation") is None
    assert (
        load_records(DataConfig(dataset_name=folder), "train")[0].text == "no"
    )  # the twin: without the task
    message = refusal(lambda: load_records(DataConfig(task_name="sst3"), "train"))
    assert message == "--task_name 'sst3' is not a GLUE task. Did you mean 'sst2'?"


def test_nulls_and_numbers_in_place_of_texts_are_refused(hub: Callable[..., str]) -> None:
    folder = hub(
        train={"text": ["a", None], "label": [0, 1]}, other={"text": ["a", "b"], "label": [0, 1]}
    )
    assert refusal(lambda: load_records(DataConfig(dataset_name=folder), "train")).endswith(
        "row 1: column 'text' is null; expected a text. --on_bad_row skip leaves such rows out."
    )
    assert len(load_records(DataConfig(dataset_name=folder, train_split="other"), "train")) == 2


def test_an_unknown_data_set_is_one_line(hub: Callable[..., str]) -> None:
    message = refusal(lambda: load_records(DataConfig(dataset_name="nobody/nothing"), "train"))
    told = "nobody/nothing is neither a local folder nor a data set on the Hub. HF_HUB_OFFLINE is set, and it is not in the cache "
    assert message.startswith(told) and message.endswith(" --train_file takes files.")
    folder = hub(train={"text": ["a"], "label": [0]})
    message = refusal(
        lambda: load_records(DataConfig(dataset_name=folder, dataset_config_name="none"), "train")
    )
    assert message.startswith(f"{folder}/none cannot be read: BuilderConfig 'none' not found.")


# ---- concat_records


def labelled(name: str, labels: list[Any], kind: str, pairs: list[str] | None = None) -> Records:
    values = list(dict.fromkeys(labels))
    plain = records_from_texts([f"{name} {i}" for i in range(len(labels))], pairs)
    codes = np.array([values.index(label) for label in labels], np.int32)
    return replace(
        plain, label_kind=kind, label_values=values, label_indices=codes, label_column="label"
    )


def test_rows_places_and_labels_stay_what_they_were() -> None:
    one, other = labelled("a", ["x", "y", "x"], "text"), labelled("b", ["y", "z"], "text")
    whole = concat_records([one, other.slice(1, 2), one.slice(1, 3)], "both")
    assert [
        (record.text, record.label) for record in map(whole.__getitem__, range(len(whole)))
    ] == [
        ("a 0", "x"),
        ("a 1", "y"),
        ("a 2", "x"),
        ("b 1", "z"),
        ("a 1", "y"),
        ("a 2", "x"),
    ]
    assert [str(whole.location(row)) for row in range(6)] == [
        f"texts row {row}" for row in (0, 1, 2, 1, 1, 2)
    ]
    assert (
        whole.name == "both"
        and whole.lengths().tolist() == [3] * 6
        and concat_records([one], "one") is one
    )
    assert (
        whole.slice(3, 5)[0].text == "b 1" and str(whole.slice(3, 5).location(1)) == "texts row 1"
    )


@pytest.mark.parametrize(
    ("kinds", "labels", "expected"),
    [
        (("text", "text"), (["1", "0"], ["0", "2"]), ("text", ["1", "0", "0", "2"])),
        (("set", "set"), ([("a",), ()], [("a", "b"), ()]), ("set", [("a",), (), ("a", "b"), ()])),
    ],
)
def test_kinds_that_have_one_in_common(kinds: Any, labels: Any, expected: Any) -> None:
    whole = concat_records(
        [labelled("a", labels[0], kinds[0]), labelled("b", labels[1], kinds[1])], "both"
    )
    found = [whole[row].label for row in range(4)]
    assert (whole.label_kind, found) == expected and [type(label) for label in found] == [
        type(label) for label in expected[1]
    ]


def test_kinds_that_have_none_in_common() -> None:
    told = "texts row 0: the labels are lists of labels, those before are single labels; expected one kind in all rows."
    with pytest.raises(DataError, match=told):
        concat_records([labelled("a", ["x"], "text"), labelled("b", [("x",)], "set")], "both")
    with pytest.raises(DataError, match="one has pairs"):
        concat_records(
            [labelled("a", ["x"], "text"), labelled("b", ["x"], "text", ["pair"])], "both"
        )


def test_the_fingerprint_is_that_of_all() -> None:
    one, other = (
        labelled("a", ["x"], "text"),
        replace(labelled("b", ["x"], "text"), fingerprint="b"),
    )
    assert (
        len(
            {
                concat_records(parts, "n").fingerprint
                for parts in ([one, other], [other, one], [one, one])
            }
        )
        == 3
    )


def test_several_text_columns_are_joined_with_a_space(write: Write) -> None:
    """In memory, as a stream, and for prediction."""
    rows = [("A", "b c"), ("", "d"), ("e ", "")]
    table = "title,body,label\n" + "".join(f"{title},{body},x\n" for title, body in rows)
    lines = "".join(json.dumps({"title": t, "body": b, "label": "x"}) + "\n" for t, b in rows)
    expected = ["A b c", " d", "e  "]
    for path in (write("a.csv", table), write("a.jsonl", lines)):
        settings: dict[str, Any] = {"text_column": ["title", "body"]}
        records = train(path, **settings)
        assert [records[row].text for row in range(3)] == expected
        assert (records.text_columns, records.text_column) == (("title", "body"), "title body")
        stream = open_stream(DataConfig(train_file=[path], streaming=True, **settings), 1)
        (window,) = stream.windows()
        assert [window.records[row].text for row in range(3)] == expected
        trained = ColumnNames(("title", "body"), None, None, [])
        texts = load_texts(path, FileConfig(), trained)
        assert [texts[row].text for row in range(3)] == expected
        assert train(path, text_column=["body", "title"])[0].text == "b c A"  # the control
    assert "a.jsonl line 1: column 'title' is null" in refusal(
        lambda: train(write("a.jsonl", lines.replace('"A"', "null")), **settings)
    )


def test_two_columns_of_one_name_matter_where_they_are_read(write: Write) -> None:
    path = write("a.csv", "text,x,label,x\na,1,b,2\n")
    assert train(path)[0] == Record(0, "a", None, "b")
    assert "a.csv line 1: the header has two columns 'x'; rename one" in refusal(
        lambda: train(path, label_column="x")
    )
    named = write("b.csv", "a,1,b,2\n")  # the remedy: without the header, and with names
    columns = ["text", "_", "_", "label"]
    assert train(named, column_names=columns)[0] == Record(0, "a", None, "2")


@pytest.mark.parametrize(
    ("header", "is_refused"),
    [
        ("text,label", True),
        ("Text , LABEL", True),
        ("sentence,sentiment", True),  # usual names, not those given
        ("Kommentar,label", True),
        ("Kommentar,class", True),  # the only row with its label, which is a usual name
        ("Kommentar,b", False),
        ("text,b", False),  # check warns
    ],
)
def test_a_header_is_no_row(write: Write, header: str, is_refused: bool) -> None:
    path = write("a.csv", f"{header}\n" + "x,a\ny,b\n" * 3)
    columns = ["text", "label"]
    if is_refused:
        assert "a.csv line 1 " in refusal(lambda: train(path, column_names=columns))
    else:
        assert train(path, column_names=columns)[0].text == header.split(",")[0]


def test_a_field_of_an_object_is_a_column(write: Write) -> None:
    rows = [{"review": {"text": t, "meta": {"stars": n}}} for t, n in (("a", "x"), ("b", "y"))]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    columns = {"text_column": "review.text", "label_column": "review.meta.stars"}
    expected = [Record(0, "a", None, "x"), Record(1, "b", None, "y")]
    for path in (
        write("a.jsonl", lines),
        write("a.json", json.dumps(rows)),
        write("b.json", json.dumps({"data": {"rows": rows}}, indent=1)),
    ):
        records = train(path, **columns)
        assert rows_of(records) == expected
        stream = open_stream(
            DataConfig(train_file=[path], streaming=True, stream_window=1, **columns), 1
        )
        windows = list(stream.windows())
        assert [window.records[0].text for window in windows] == ["a", "b"]
        (again,) = stream.windows(json.loads(json.dumps(windows[1].state)))  # exact resume
        assert again.records[0].text == "b"
    assert "no column 'review.txt'" in refusal(lambda: train(path, text_column="review.txt"))


def test_notes_on_many_files_are_two_lines(write: Write, tmp_path: Path) -> None:
    for number in range(5):
        write(f"{number}.txt", f"text\tlabel\na\t{number}\nb\tx\n")
    data = DataConfig(train_file=[str(tmp_path / "*.txt")])
    first = "0.txt: read as utf-8, delimiter tab, unquoted; --file_format txt overrules"
    notes = (first, "4 other files are not read as their names say either")
    assert load_records(data, "train").format_notes == notes
    assert open_stream(data, 1).format_notes == notes
    few = DataConfig(train_file=[str(tmp_path / "[0-2].txt")])
    assert len(load_records(few, "train").format_notes) == 3
