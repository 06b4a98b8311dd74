"""What is detected is certain: no code page is taken for another, GLUE's tsv files keep their quotes.

The samples are sentences written for these tests. Each case has a near one that is not detected.
"""

import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from bertdist.core.config import FileConfig
from bertdist.core.errors import DataError
from bertdist.data.readers.file_reader import DataFile, FileReader, inspect_file
from bertdist.data.readers.sniffing import detect_encoding

SENTENCES = {
    "en": "The ticket was £5 and the film “not bad at all”. It’s a café, naïve and simple, said the critic to his friend.\tpos\n"
    + "plain\tneg\n" * 200,
    "de": "Der Kaffee schmeckt großartig, und die Bedienung war überaus höflich. Schöne Grüße aus München!\tpos\n",
    "fr": "Le café était très bon, mais le serveur n’a pas été aimable à l’égard de ma mère. Où est passée l’élégance ?\tneg\n",
    "es": "¿Qué tal la película? El niño pequeño lloró todo el día, ¡qué lástima! Mañana será otra ocasión.\tneg\n",
    "pt": "O filme não é tão ruim, mas a atuação do protagonista é péssima. A canção é ótima, três vezes.\tneg\n",
    "sv": "Filmen var väldigt bra, men slutet gjorde mig besviken. Åtminstone är skådespelarna förträffliga.\tpos\n",
    "pl": "Film był bardzo dobry, ale zakończenie zupełnie mnie rozczarowało. Żółta łódź płynęła po jeziorze.\tpos\n",
    "cs": "Příliš žluťoučký kůň úpěl ďábelské ódy. Film byl skvělý a herci výborní, doporučuji všem přátelům.\tpos\n",
    "sl": "Film je bil zelo dober, čeprav je konec malo žalosten. Všeč mi je bila glavna igralka, ki je čudovita.\tpos\n",
    "hu": "A film nagyon jó volt, de a vége csalódást okozott. Őszintén szólva, gyönyörű felvételek és különös fény.\tpos\n",
    "tr": "Film çok güzeldi ama sonu beni hayal kırıklığına uğrattı. Işıklar içinde, şöyle böyle değil.\tpos\n",
    "ru": "Фильм был очень хорошим, но конец меня разочаровал. Всем советую посмотреть.\tpos\n",
    "el": "Η ταινία ήταν πολύ καλή, αλλά το τέλος με απογοήτευσε. Τη συστήνω σε όλους.\tpos\n",
    "zh": "这部电影非常好看，演员的表演也很出色，但是结尾让我有点失望。房间很干净，服务员态度也不错。\tpos\n",
    "ja": "この映画はとても面白かったです。最後のシーンには感動しました。みんなに薦めたい。\tpos\n",
    "ko": "이 영화는 정말 재미있었어요. 마지막 장면이 감동적이었습니다. 모두에게 추천합니다.\tpos\n",
}


@pytest.mark.parametrize(
    ("language", "encoding", "expected"),
    [
        ("en", "cp1252", "cp1252"),
        *((language, "utf-8", "utf-8") for language in SENTENCES),
        ("zh", "utf-16", "utf-16"),
        ("de", "utf-32", "utf-32"),
        *((language, "cp1252", None) for language in ("de", "fr", "es", "pt", "sv")),
        ("zh", "gb18030", None),
        ("ja", "cp932", None),
        ("de", "mac_roman", None),
        ("de", "cp850", None),
        ("fr", "mac_roman", None),
        ("pl", "cp1250", None),
        ("pl", "iso8859_2", None),
        ("cs", "cp1250", None),
        ("sl", "cp1250", None),
        ("hu", "cp1250", None),
        ("tr", "cp1254", None),
        ("ru", "cp1251", None),
        ("ru", "koi8_r", None),
        ("el", "cp1253", None),
        ("ja", "euc_jp", None),
        ("ko", "euc_kr", None),
    ],
)
def test_an_encoding_is_detected_only_where_that_is_safe(
    language: str, encoding: str, expected: str | None
) -> None:
    content = (SENTENCES[language] * 30).encode(encoding)
    assert detect_encoding(content, True) == expected
    assert detect_encoding(content[:-3], False) == expected  # the head may end within a character


@pytest.mark.parametrize(
    ("language", "encoding", "byte"),
    [
        ("zh", "gb18030", "0xD5"),
        ("ja", "cp932", "0x82"),
        ("ko", "euc_kr", "0xC0"),
        ("ru", "cp1251", "0xD4"),
        ("de", "cp1252", "0xDF"),
    ],
)
def test_an_uncertain_encoding_is_refused_with_line_byte_and_remedy(
    tmp_path: Path, language: str, encoding: str, byte: str
) -> None:
    content = ("plain\tneg\n" + SENTENCES[language] * 30).encode(encoding)
    columns = {"column_names": ["text", "label"]}
    file = found(tmp_path / "a.tsv", content, **columns)
    message = (
        rf"^a\.tsv line 2: byte {byte} is not utf-8; pass --encoding \(such as cp1252 for Western "
        r"European, cp1251 for Cyrillic, gb18030 for Chinese, cp932 for Japanese text\)"
    )
    with pytest.raises(DataError, match=message):
        FileReader(file).read(["text"])
    file = found(tmp_path / "a.tsv", content, encoding=encoding, **columns)  # the remedy
    texts = FileReader(file).read(["text"]).columns["text"]
    assert texts[1].as_py() == SENTENCES[language].split("\t")[0]  # type: ignore[union-attr]


def test_too_little_is_no_evidence() -> None:
    assert detect_encoding(b"text,label\n\xa35,1\n", True) is None
    assert (
        detect_encoding(
            b"text,label\n" + (b"\xa35 is a lot of money,1\n" + b"plain,0\n" * 30) * 8, True
        )
        == "cp1252"
    )


def test_utf8_with_a_few_wrong_bytes_is_no_cp1252() -> None:
    content = ("It’s a café.\tpos\n" + "plain enough\tneg\n" * 50) * 20
    assert detect_encoding(content.encode() + b"\x92\tneg\n" * 9, True) is None
    assert (
        detect_encoding(content.encode("cp1252") + b"plain\tneg\n\x92\tneg\n" * 9, True) == "cp1252"
    )


def found(path: Path, content: str | bytes, **flags: Any) -> DataFile:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return inspect_file(str(path), FileConfig(**flags))


@pytest.mark.parametrize(
    ("name", "content", "flags", "delimiter", "quoted"),
    [
        ("a.csv", "text,label\na,1\nb,2\n", {}, ",", True),
        ("a.csv", "text;label\na,b;1\nb;2\n", {}, ";", True),
        ("a.csv", 'text;label\n"a;\nb";1\nb;2\n', {}, ";", True),
        ("a.csv", 'text\tlabel\na, b\t1\n"b\t2\n', {}, "\t", False),
        ("a.csv", "text|label\na|1\n", {}, "|", True),
        ("a.csv", "a;b,c\na;b,c\n", {}, ",", True),  # the ending decides
        ("a.tsv", "a\tb,c\na\tb,c\n", {}, "\t", False),
        ("a.tsv", "text,label\na,1\n", {}, ",", True),
        ("a.tsv", 'text\tlabel\n"a\t1\nb"\t2\n', {}, "\t", False),  # quotes are text, as in GLUE
        (
            "a.tsv",
            'text\tlabel\n"a\tb"\t1\n"c"\t2\n',
            {},
            "\t",
            True,
        ),  # only quotes make two fields of it
        (
            "a.tsv",
            'text\tlabel\n"a\tb"\t1\n5" c\t2\n',
            {},
            "\t",
            False,
        ),  # a quote within a field: not sure
        ("a.tsv", 'text\tlabel\n"a\tb"\t1\n', {"quoting": "none"}, "\t", False),
        ("a.csv", "text;label\na;1\n", {"delimiter": ","}, ",", True),
        ("a.csv", "text\nHello; world\nBye; moon\n", {}, ",", True),  # one column
        ("a.csv", "text;label\na;1\nb\n", {}, ",", True),  # no delimiter fits all lines
        ("a.csv", "text;a|label\nx;y|1\n", {}, ",", True),  # two delimiters do
        ("a.tsv", "Hello, world\nBye, moon\n", {"column_names": ["text"]}, "\t", False),
        ("a.tsv", "Hello, world\nBye, moon\n", {"column_names": ["text", "more"]}, ",", True),
        ("sms", "ham\tHi, you\nspam\tWin; now\n", {"column_names": ["label", "text"]}, "\t", False),
        ("a.data", "text;label\na,b;1\n", {}, ";", True),
    ],
)
def test_a_delimiter_is_detected_where_only_one_fits(
    tmp_path: Path, name: str, content: str, flags: dict[str, Any], delimiter: str, quoted: bool
) -> None:
    file = found(tmp_path / name, content, **flags)
    assert (file.delimiter, file.quoted) == (delimiter, quoted)
    usual = {"csv": (",", True), "tsv": ("\t", False)}.get(name.rsplit(".", 1)[-1])
    given = "delimiter" in flags or "quoting" in flags
    assert (file.note is None) == (given or usual == (delimiter, quoted))


def test_what_is_detected_is_described_in_one_sentence(tmp_path: Path) -> None:
    assert (
        found(tmp_path / "a.csv", "text;label\na;1\n").note
        == "a.csv: read as utf-8, delimiter ';', quoted"
    )
    assert (
        found(tmp_path / "b.tsv", (SENTENCES["en"] * 9).encode("cp1252")).note
        == "b.tsv: read as cp1252, delimiter tab, unquoted"
    )
    line = '{"text": "It’s fine", "label": 1}\n' + '{"text": "plain", "label": 0}\n' * 20
    assert (
        found(tmp_path / "c.jsonl", (line * 9).encode("cp1252")).note == "c.jsonl: read as cp1252"
    )
    assert (
        found(tmp_path / "d.csv", "text,label\na,1\n".encode("utf-16")).note
        == "d.csv: read as utf-16, delimiter ',', quoted"
    )
    assert (
        found(
            tmp_path / "e.csv",
            (SENTENCES["en"] * 9).encode("cp1252"),
            encoding="cp1252",
            delimiter="tab",
        ).note
        is None
    )


def test_what_is_not_a_table_is_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.md", "# Title\n\nSome text, and more.\n"),
        ("a.bin", b"\0,\0\0\n\0,\0\0\n"),
        ("LICENSE", "Apache\n2.0\n"),
    ):
        with pytest.raises(DataError, match=r"is not known by its name, .*pass --file_format"):
            found(tmp_path / name, content)


TABLE = "text\tlabel\n" + "a, b\t1\nc\t0\n" * 5
QUOTED = 'text\tlabel\n"say ""a"""\t1\n'
JSONL = '{"text": "a", "label": 1}\n' * 3
TXT = "; --file_format txt overrules"


@pytest.mark.parametrize(
    ("name", "content", "flags", "kind", "note"),
    [
        ("a.txt", TABLE, {}, "tsv", f"utf-8, delimiter tab, unquoted{TXT}"),
        ("a.txt", TABLE[11:] + "a\tb\tc\n", {}, "tsv", f"utf-8, delimiter tab, unquoted{TXT}"),
        ("a.txt", TABLE, {"file_format": "txt"}, "txt", None),
        ("a.txt", TABLE, {"file_format": "tsv"}, "tsv", None),
        ("a.txt", "a\tb\n" + "plain\n" * 5, {}, "txt", None),  # the first line alone has a tab
        ("a.txt", "a\tb\n", {}, "txt", None),
        ("a.txt", "text,label\na,1\nb, c,1\n", {}, "csv", f"utf-8, delimiter ',', quoted{TXT}"),
        ("a.txt", "Text, label\nA, b\n", {}, "txt", "one text per line; --file_format csv or tsv"),
        (
            "a.txt",
            "Hello, you\nBye, all\n",
            {},
            "txt",
            "one text per line; --file_format csv or tsv",
        ),
        ("a.txt", "nr;review\n1;b\n", {}, "txt", "one text per line; --file_format csv or tsv"),
        (
            "a.txt",
            "id;review\n1;b\n",
            {"text_column": ["review"]},
            "csv",
            f"utf-8, delimiter ';', quoted{TXT}",
        ),
        ("a.txt", "A plain text.\n\nAnother.\n", {}, "txt", None),
        ("a.txt", JSONL, {}, "jsonl", f"jsonl, utf-8{TXT}"),
        ("a.csv", JSONL, {}, "jsonl", "jsonl, utf-8; --file_format csv overrules"),
        ("a.json", JSONL, {}, "jsonl", None),
        ("a.ndjson", JSONL, {}, "jsonl", None),
        ("a.jsonl", '{"rows": [{"text": "a"}]}\n', {}, "jsonl", None),
        ("a.json", '{"rows": [{"text": "a"}]}\n', {}, "json", "one JSON document, held in memory"),
        ("a.json", '{"text": "a", "label": ["x"]}\n', {}, "jsonl", None),
        ("a.json", '{"a": {"rows": [{"text": "a"}]}}\n', {}, "json", "one JSON document"),
        ("a.tsv", f"{QUOTED}b\t0\n", {}, "tsv", "unquoted; quotes around fields are text"),
        (
            "a.tsv",
            'text\tlabel\r\n"a\rb ""c"""\tx\r\nd\ty\r\n',
            {},
            "tsv",
            "unquoted; quotes around fields are text",
        ),
        ("a.tsv", f"{QUOTED}b\t0\n", {"quoting": "none"}, "tsv", None),
        ("a.tsv", f'{QUOTED}"b\t0\n', {}, "tsv", None),  # no table if read with quotes
        ("a.tsv", 'text\tlabel\nan "a" b\t1\n', {}, "tsv", None),  # quotes within a text
        ("a.json", '{"columns": ["text"], "data": [["a"]]}', {}, "json", "one JSON document"),
        ("a.json", '{"text": "a", "x": {"y": [{"z": "a"}]}}\n', {}, "jsonl", None),
        ("a.jsonl", "[\n" + JSONL, {}, "json", "one JSON document, held in memory"),
        (
            "a.json",
            '{\n"data": [\n{"text": "a"},\n',
            {},
            "json",
            "one JSON document, held in memory",
        ),
        ("a.jsonl", '{"text" "a"}\n' + JSONL, {}, "jsonl", None),  # a damaged first line
        ("a.csv", b"PAR1\0", {}, "parquet", "parquet"),
        ("a.csv", TABLE.encode("utf-16-le"), {}, "csv", "utf-16-le, delimiter tab, unquoted"),
        ("a.csv", gzip.compress(b"text,label\na,1\n", mtime=0), {}, "csv", None),
        ("a.csv.gz", b"text,label\na,1\n", {}, "csv", None),
        ("a.csv", "sep=;\r\ntext;label\r\na,b;1\r\n", {}, "csv", None),
        ("a.txt", '"sep=|"\ntext|label\na|1\n', {}, "csv", TXT),
    ],
)
def test_the_kind_of_a_file_is_that_of_its_content(
    tmp_path: Path,
    name: str,
    content: str | bytes,
    flags: dict[str, Any],
    kind: str,
    note: str | None,
) -> None:
    file = found(tmp_path / name, content, **flags)
    assert file.kind == kind
    assert file.note is None if note is None else note in str(file.note), file.note
    assert file.note is None or file.note.startswith(f"{name}: read as ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04......[Content_Types].xml", "an Excel workbook (.xlsx); save it as CSV UTF-8"),
        (b"PK\x03\x04......a.csv", "a zip archive; unpack it with unzip"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an Excel workbook (.xls)"),
        (b"BZh91AY", "a bzip2 file"),
        (gzip.compress(b"\0" * 257 + b"ustar", mtime=0), "a tar archive"),
        (b"<!DOCTYPE html>", "a web page, not data"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_a_file_of_another_kind_is_refused_whatever_its_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    for name in ("a.csv", "a.txt", "a.xlsx", "a.jsonl"):
        with pytest.raises(DataError) as caught:
            found(tmp_path / name, content)
        assert f"{name} is {message}" in str(caught.value)


def test_the_line_of_excel_is_no_row(tmp_path: Path) -> None:
    for flags, first in (({}, 3), ({"column_names": ["text", "n"]}, 2)):
        header = "" if flags else "text;n\r\n"
        file = found(tmp_path / "a.csv", f"sep=;\r\n{header}a,b;1\r\nc;2\r\n", **flags)
        reader = FileReader(file)
        for chunk in (reader.read(["text"]), *reader.chunks(["text"])):
            assert chunk.columns["text"].to_pylist() == ["a,b", "c"]  # type: ignore[union-attr]
            assert chunk.location(0).line == first


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Every reader opens the file again, and a pipe gives its first bytes once."""
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.csv is not a regular file; write its rows to a file"):
        inspect_file(str(tmp_path / "a.csv"), FileConfig())


def test_a_byte_further_down_is_an_error_with_its_line(tmp_path: Path) -> None:
    content = (SENTENCES["en"] * 1000).encode("cp1252") + b"last \x81\tneg\n"
    file = found(tmp_path / "a.tsv", content, column_names=["text", "label"])
    assert len(content) > 1 << 20 and file.encoding == "cp1252"
    with pytest.raises(
        DataError,
        match=r"^a\.tsv line 201001: byte 0x81 is not cp1252; pass the --encoding it was written in",
    ):
        FileReader(file).read(["text"])


@pytest.mark.parametrize(
    ("path", "names", "told", "rows"),
    [
        ("sms_spam/spam.csv", None, "spam.csv: read as cp1252, delimiter ',', quoted", 5_572),
        (
            "sms_spam/SMSSpamCollection",
            ["label", "text"],
            "SMSSpamCollection: read as utf-8, delimiter tab, unquoted",
            5_574,
        ),
        ("chnsenticorp/train.tsv", ["text", "label"], None, 9_600),
        ("sst2/train.tsv", None, None, 67_349),
        ("stsb/train.tsv", None, None, 5_749),
        ("cola/train.tsv", ["_", "label", "_", "text"], None, 8_551),
    ],
)
def test_real_files_need_no_flags(
    shared_data: Path, path: str, names: list[str] | None, told: str | None, rows: int
) -> None:
    file = inspect_file(str(shared_data / path), FileConfig(column_names=names))
    assert file.note == told
    source = FileReader(file)
    assert source.read(source.column_names()).num_rows == rows
