"""Which file, and how it is written: an address and the user's words about it -> File, whose columns are then read strictly.

In: an address, and the flags that describe the file (delimiter, quoting, encoding, names of the columns). Out: a `File`; what the flags do
not say is guessed from the file's beginning. `open_file` reads a file of this machine whole, `file_rows.FileRows` any file in pieces too.
One module, because what a flag means, and that it cannot take effect, must be the same for every file.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from bertdist.errors import DataError, did_you_mean
from bertdist.file_bytes import OpenBytes, OpenRandom, first_bytes, open_local
from bertdist.file_rows import File, FileRows
from bertdist.guess import HEAD_BYTES, guess_encoding, guess_table, head_as_utf8
from bertdist.pieces import Column
from bertdist.text_files import Form, codec_of, twice_in

KINDS = ("csv", "tsv", "jsonl", "json", "parquet", "txt")
PACKED = (".gz", ".zst")  # endings of what an opener unpacks; the ending before it is the file's
READ_BYTES = (
    1 << 30
)  # of a file that is read whole; a row longer than a block is refused; pyarrow's limit is 2 GiB

Reader: TypeAlias = Callable[
    [Sequence[str]], dict[str, Column]
]  # names of columns -> those columns


def open_file(file: File, rows: int | None = None) -> tuple[list[str], Reader]:
    """The names of the file's columns, and a function that reads the first `rows` rows of some of them. Raises DataError."""
    source = FileRows(file, block_bytes=READ_BYTES)
    return source.column_names(), lambda wanted: source.whole(wanted, rows).columns


def find_file(
    path: str,
    *,
    delimiter: str | None,
    quoting: str,
    encoding: str | None,
    column_names: list[str] | None,
    open_bytes: OpenBytes | None = None,
    open_random: OpenRandom | None = None,
) -> File:
    """The file behind `path`; what is not said of how it is written is guessed from its first bytes.

    Without openers it is a file of this machine. Raises DataError when it is not there, of no known kind, or described by settings that
    cannot take effect.
    """
    name = path.split("?")[0].rstrip("/").rsplit("/", 1)[-1] if open_bytes else _existing(path).name
    plain = (
        name[: -len(Path(name).suffix)] if open_bytes and name.lower().endswith(PACKED) else name
    )
    kind = Path(plain).suffix.lower().removeprefix(".")
    tab = delimiter in ("tab", "\\t", "\t")
    if delimiter is not None and (
        kind == "txt" or kind not in KINDS
    ):  # many data sets call their tables train.txt, or nothing at all
        kind = "tsv" if tab else "csv"
    given = {
        "--delimiter": delimiter is not None,
        "--column_names": bool(column_names),
        "--quoting": quoting != "auto",
    }
    given = given if kind in KINDS and kind not in ("csv", "tsv") else {}
    given["--encoding"] = kind == "parquet" and (encoding or "utf-8").lower() not in (
        "utf-8",
        "utf8",
    )
    if idle := [flag for flag, is_given in given.items() if is_given]:
        raise DataError(f"{name}: {idle[0]} cannot take effect on a .{kind} file; remove it.")
    sign = "\t" if tab else delimiter or ("," if kind == "csv" else "\t")
    if len(sign) != 1 or not sign.isascii() or sign in '"\r\n\0':
        raise DataError(
            f"--delimiter is {sign!r}; expected one ASCII character that is no quote and no line end, or 'tab'."
        )
    if twice := twice_in([column for column in column_names or () if column != "_"]):
        raise DataError(
            f"--column_names has {twice!r} twice; a column that is not to be read is named '_'."
        )
    quoted = kind == "csv" if quoting == "auto" else quoting == "double"
    form = Form(
        name=name,
        kind=kind,
        delimiter=sign,
        quoted=quoted,
        encoding=encoding or "utf-8",
        column_names=tuple(column_names or ()),
    )
    opener = open_bytes or partial(open_local, path)
    settled = (
        form
        if kind == "parquet"
        else _guess(form, opener, encoding is None, delimiter is None, quoting == "auto")
    )
    if settled is None:
        suffix = Path(plain).suffix
        raise DataError(
            f"{path}: the ending {suffix!r} is not known; expected .{', .'.join(KINDS)}, or a table and its --delimiter."
        )
    described = {each.name: getattr(settled, each.name) for each in fields(Form)}
    random = open_random or partial(pa.OSFile, path)
    return File(
        **described, path=path, open_bytes=opener, open_random=random, guessed=settled != form
    )


def _existing(path: str) -> Path:
    place = Path(path)
    if place.is_dir():
        raise DataError(f"{path} is a folder; expected a file.")
    if not place.exists():
        near = (
            sorted(file.name for file in place.parent.iterdir()) if place.parent.is_dir() else None
        )
        raise DataError(
            f"{path}: no such {'folder' if near is None else 'file'}.{did_you_mean(place.name, near or ())}"
        )
    return place


def _guess(
    form: Form, open_bytes: OpenBytes, encoding: bool, delimiter: bool, quoting: bool
) -> Form | None:
    """`form` as far as it is to be guessed, guessed; None where the file is of no known kind."""
    head, is_all = first_bytes(form.name, open_bytes, HEAD_BYTES)
    if encoding:
        form = replace(form, encoding=guess_encoding(head, is_all) or "utf-8")
    if form.kind in ("jsonl", "json", "txt") or not (delimiter or quoting):
        return form
    codec, mark = codec_of(form, head)
    return guess_table(
        form, head_as_utf8(head[mark:], codec, is_all), is_all, delimiter=delimiter, quoting=quoting
    )
