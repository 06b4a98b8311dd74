"""Raw bytes become UTF-8 lines, and a line that holds bytes of another encoding is the only one that is told."""

import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers.text_lines import (
    FileFormat,
    Lines,
    codec_of,
    excerpts_of,
    hide_returns,
    line_ends,
    rows_of_lines,
    utf8_lines,
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
def test_lines_are_cut_before_they_are_decoded(encoding: str) -> None:
    text = "one\r\n\ntwo a\nthree"
    raw = text.encode(encoding)
    ends = line_ends(raw, encoding).tolist()
    assert [
        raw[start:end].decode(encoding)
        for start, end in zip([0, *ends], [*ends, len(raw)], strict=True)
    ] == text.splitlines(True)
    assert utf8_lines(form_of(encoding), raw, encoding, 1, False) == Lines(text.encode(), 1, {})


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
def test_a_byte_order_mark_is_no_text(encoding: str, raw: bytes, codec: str, mark: int) -> None:
    assert codec_of(form_of(encoding), raw) == (codec, mark)


def test_what_is_no_encoding_is_refused() -> None:
    for name in ("utf-9", "hex", "rot13"):
        with pytest.raises(DataError, match=f"--encoding {name} is not a text encoding"):
            codec_of(form_of(name), b"abcd")


@pytest.mark.parametrize(
    ("codec", "bad", "byte"),
    [
        ("utf-8", b"\xe4", "E4"),
        ("cp1252", b"\x81", "81"),
        ("utf-16-le", b"\0\xd8", "00"),
        ("gb18030", b"\x81\n", "81"),
    ],
)
def test_only_lines_with_wrong_bytes_are_told(codec: str, bad: bytes, byte: str) -> None:
    line = "good\n".encode(codec)
    raw = line * 2 + bad + line + line + bad
    found = utf8_lines(form_of(codec), raw, codec, 11, True)
    lines = found.data.split(b"\n")
    broken = [at for at, text in enumerate(lines) if b"\\x" in text]
    assert sorted(found.broken) == broken and len(broken) == 2
    assert found.broken[2].startswith(f"byte 0x{byte} is not {codec}; pass ")
    assert {text for at, text in enumerate(lines) if at not in broken} <= {b"good", b""}
    with pytest.raises(DataError, match=rf"^a\.csv line 13: byte 0x{byte} is not {codec}"):
        utf8_lines(form_of(codec), raw, codec, 11, False)


def test_a_stand_in_is_a_character_that_is_not_there() -> None:
    lines = hide_returns(Lines("a\rb\r\n\ue000\r".encode(), 1, {}))
    assert lines.stand_in == "\ue001" and lines.data == "a\ue001b\r\n\ue000\ue001".encode()
    rows = rows_of_lines(lines.data, blank=True)
    assert excerpts_of(lines, rows, [0, 1]) == [
        r"a\rb",
        r"\ue000\r".replace(r"\r", ""),
    ]
