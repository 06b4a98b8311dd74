"""Raw bytes become lines of UTF-8, and only the lines that cannot be decoded are reported."""

import io

import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers import text_lines
from bertdist.data.readers.text_lines import (
    Buffer,
    FileFormat,
    Lines,
    decode_lines,
    escape_carriage_returns,
    line_ends,
    read_all,
    reading,
    resolve_codec,
    row_excerpts,
    rows_of_lines,
)

ENCODINGS = [
    "utf-8",
    "utf-16-le",
    "utf-16-be",
    "utf-32-le",
    "cp1252",
    "gb18030",
    "cp037",
    "shift_jis",
]


def form_of(encoding: str) -> FileFormat:
    return FileFormat(name="a.csv", kind="csv", encoding=encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lines_are_split_before_they_are_decoded(encoding: str) -> None:
    text = "one\r\n\ntwo a\nthree"
    raw = text.encode(encoding)
    ends = line_ends(raw, encoding).tolist()
    assert [
        raw[start:end].decode(encoding)
        for start, end in zip([0, *ends], [*ends, len(raw)], strict=True)
    ] == text.splitlines(True)
    assert decode_lines(form_of(encoding), raw, encoding, 1, False) == Lines(text.encode(), 1, {})


def test_half_of_a_wide_character_is_no_newline() -> None:
    raw = "\u0a0aa\n\u010a".encode("utf-16-le")  # 0A 0A ..., 0A 01
    assert line_ends(raw, "utf-16-le").tolist() == [6]
    assert raw.count(b"\n") == 4  # the twin: what bytes alone would say


@pytest.mark.parametrize(
    ("encoding", "raw", "codec", "mark"),
    [
        ("utf-8", b"\xef\xbb\xbfab", "utf-8", 3),
        ("UTF8", b"abcd", "utf-8", 0),
        ("utf-8-sig", b"\xef\xbb\xbfab", "utf-8", 3),
        ("utf-16", b"\xff\xfea\0", "utf-16-le", 2),
        ("utf-16", b"\xfe\xff\0a", "utf-16-be", 2),
        ("utf-16", b"a\0b\0", "utf-16-le", 0),
        ("utf-32", b"\xff\xfe\0\0", "utf-32-le", 4),
        ("latin-1", b"\xef\xbb\xbfab", "iso8859-1", 0),
        ("gb18030", "\ufeffa".encode("gb18030"), "gb18030", 4),
    ],
)
def test_a_byte_order_mark_is_not_text(encoding: str, raw: bytes, codec: str, mark: int) -> None:
    assert resolve_codec(form_of(encoding), raw) == (codec, mark)


def test_unknown_encodings_are_refused() -> None:
    for name in ("utf-9", "hex", "rot13"):
        with pytest.raises(DataError, match=f"--encoding {name} is not a text encoding"):
            resolve_codec(form_of(name), b"abcd")


@pytest.mark.parametrize(
    ("codec", "bad", "byte"),
    [
        ("utf-8", b"\xe4", "E4"),
        ("cp1252", b"\x81", "81"),
        ("utf-16-le", b"\0\xd8", "00"),
        ("gb18030", b"\x81\n", "81"),
    ],
)
def test_only_lines_with_wrong_bytes_are_reported(codec: str, bad: bytes, byte: str) -> None:
    line = "good\n".encode(codec)
    raw = line * 2 + bad + line + line + bad
    found = decode_lines(form_of(codec), raw, codec, 11, True)
    lines = found.data.split(b"\n")
    broken = [at for at, text in enumerate(lines) if b"\\x" in text]
    assert sorted(found.broken) == broken and len(broken) == 2
    assert found.broken[2].startswith(f"byte 0x{byte} is not {codec}; pass ")
    assert {text for at, text in enumerate(lines) if at not in broken} <= {b"good", b""}
    with pytest.raises(DataError, match=rf"^a\.csv line 13: byte 0x{byte} is not {codec}"):
        decode_lines(form_of(codec), raw, codec, 11, False)


def test_the_placeholder_is_a_character_that_the_lines_do_not_contain() -> None:
    lines = escape_carriage_returns(Lines("a\rb\r\n\ue000\r".encode(), 1, {}))
    assert lines.cr_placeholder == "\ue001" and lines.data == "a\ue001b\r\n\ue000\ue001".encode()
    rows = rows_of_lines(lines.data, blank=True)
    assert row_excerpts(lines, rows, [0, 1]) == [
        r"a\rb",
        r"\ue000\r".replace(r"\r", ""),
    ]


class OneByOne(io.BytesIO):
    """One byte per read."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(1 if size else 0)


@pytest.mark.parametrize("stream", [io.BytesIO, OneByOne])
def test_a_buffer_returns_as_many_bytes_as_requested(stream: type[io.BytesIO]) -> None:
    buffer = Buffer(stream(b"abcdef"))
    assert buffer.first(2) == (b"ab", False)
    assert buffer.first(4) == (b"abcd", False)
    buffer.drop(3)
    assert buffer.first(2) == (b"de", False)
    assert buffer.first(3) == (b"def", True)  # it says so before a read that returns nothing
    buffer.drop(3)
    assert buffer.first(1) == (b"", True)
    assert read_all(stream(b"abc"), "a", None) == b"abc" == read_all(stream(b"abc"), "a", 3)
    assert read_all(stream(b""), "a", None) == b""


def test_what_cannot_be_read_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^there cannot be read: gone\.$"), reading("there"):
        raise OSError("gone")


def test_a_file_and_a_line_that_do_not_fit_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "PART_BYTES", 4)
    monkeypatch.setattr(text_lines, "free_host_bytes", lambda: 40)
    assert read_all(io.BytesIO(b"abc\n" * 5), "a.csv.gz", 4) == b"abc\n" * 5
    with pytest.raises(
        DataError, match=r"^a\.csv\.gz has more than 20 bytes, half of the free mem"
    ):
        read_all(io.BytesIO(b"abc\n" * 6), "a.csv.gz", 4)
    with pytest.raises(DataError, match=r"^a\.csv\.gz: a line is longer than 8 bytes"):
        read_all(io.BytesIO(b"abc\n" + b"x" * 9), "a.csv.gz", 8)
