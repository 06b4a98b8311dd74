"""Blocks of bytes do not depend on how they were delivered."""

import io
from pathlib import Path

import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers.text_lines import (
    Buffer,
    first_bytes,
    local_stamp,
    open_local,
    read_all,
    reading,
)


class OneByOne(io.BytesIO):
    """Gives a byte a read."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(1 if size else 0)


@pytest.mark.parametrize("stream", [io.BytesIO, OneByOne])
def test_a_buffer_gives_as_many_bytes_as_were_asked_for(stream: type[io.BytesIO]) -> None:
    buffer = Buffer(stream(b"abcdef"))
    assert buffer.first(2) == (b"ab", False)
    assert buffer.first(4) == (b"abcd", False)
    buffer.drop(3)
    assert buffer.first(2) == (b"de", False)
    assert buffer.first(3) == (b"def", True)  # it says so before a read that gives nothing
    buffer.drop(3)
    assert buffer.first(1) == (b"", True)
    assert read_all(stream(b"abc")) == b"abc" and read_all(stream(b"")) == b""


def test_a_local_file_is_opened_anywhere_and_has_a_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 300_000)
    with open_local(str(path), 299_998) as file:
        assert file.read() == b"xx"
    stamps = {local_stamp(str(path))}
    for content in (b"y" + b"x" * 299_999, b"x" * 299_999 + b"y", b"x" * 300_001, b""):
        path.write_bytes(content)
        stamps.add(local_stamp(str(path)))
    assert len(stamps) == 5


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^there cannot be read: gone\.$"), reading("there"):
        raise OSError("gone")
    with pytest.raises(DataError, match="cannot be read"):
        first_bytes("there", lambda at: open_local(str(tmp_path / "there"), at), 9)
