"""How a text file is written, guessed from its beginning: encoding, delimiter, quoting.

In: the first bytes of a file (HEAD_BYTES are enough). Out: a guess, or none where none is safe; then the strict readers say what is wrong.
One module, because all three are one question, asked once, and answered in one sentence.

Rules, each the more careful choice:
1. What is UTF-8 is UTF-8. A byte order mark of UTF-16 or UTF-32 says what it says.
2. Else cp1252, where the characters above ASCII are at least MIN_SPECIAL, and either next to none of the text (English with a few signs),
   or the letters of one western language, inside words. Polish, Czech, Turkish or Cyrillic in their own code pages look otherwise.
3. Else an East Asian encoding, where charset-normalizer knows no other and the text consists of its characters.
4. A delimiter stays the ending's own unless another one, and only one, gives all lines the same number of fields. Quotes stay text in tsv
   files (and where they do, ChnSentiCorp keeps 454 rows) unless only reading them as quotes gives all lines the same number of fields.
"""

import codecs
import re
from collections import Counter
from dataclasses import replace

from bertdist.data.readers.csv_reader import blank_at, is_clean, judge, scan, with_line_end
from bertdist.data.readers.text_lines import FileFormat, Lines, hide_returns, line_ends

HEAD_BYTES = 1 << 20

MIN_SPECIAL = 8  # fewer characters above ASCII prove nothing

DELIMITERS = {",": "csv", "\t": "tsv", ";": "csv", "|": "csv"}  # delimiter -> whose quoting it has

_LETTERS = {  # https://en.wikipedia.org/wiki/Windows-1252: letters above ASCII of the languages that are written in it
    "German": "äöüßéèà",
    "French": "àâæçéèêëîïôœùûüÿ",
    "Spanish": "áéíóúüñ",
    "Portuguese": "ãõáéíóúâêôàçü",
    "Italian": "àèéìíîòóùú",
    "Dutch": "áéíóúëïöüèçê",
    "Swedish, Finnish": "åäöéü",
    "Danish, Norwegian": "æøåéöäüòóô",
    "Catalan": "àçèéíïòóúü",
}

_INSIDE_WORDS = "’–—·"  # signs that may stand between two letters

_EAST_ASIAN = {
    "gb18030": {"gb18030", "gbk", "gb2312", "hz"},
    "big5": {"big5", "cp950", "big5hkscs"},
    "cp932": {"cp932", "shift_jis", "shift_jis_2004", "shift_jisx0213"},
}

_EAST_ASIAN_TEXT = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef\u2010-\u203f]")


def guess_encoding(head: bytes, is_all: bool) -> str | None:
    """The encoding of a file that begins with `head`; None where no guess is safe."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_all)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    whole = head if is_all else head[: head.rfind(b"\n") + 1]
    if b"\0" in whole:
        return None
    return "cp1252" if _is_western(whole) else _east_asian(whole)


def _is_western(data: bytes) -> bool:
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    special = re.findall(r"[^\x00-\x7f]", text)
    utf8 = re.findall(
        rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", data
    )
    if len(special) < MIN_SPECIAL or 4 * sum(map(len, utf8)) > len(
        special
    ):  # UTF-8 with a few wrong bytes is another matter
        return False
    if len(special) < len(text) / 200:
        return True
    letters = Counter(char.lower() for char in special if char.isalpha())
    num_letters = sum(letters.values())
    fitting = max(sum(letters[char] for char in alphabet) for alphabet in _LETTERS.values())
    strange = len(
        re.findall(rf"(?<=[^\W\d_])[^\w\s\x00-\x7f{_INSIDE_WORDS}](?=[^\W\d_])", text)
    )  # a sign within a word
    strange += len(re.findall(r"(?<=[a-z])[À-ÞŠŽŸ](?=[a-z])", text)) + sum(
        char in "¤¹²³¦¬" for char in special
    )
    return fitting >= 0.98 * num_letters and strange <= 0.02 * len(special)


def _east_asian(data: bytes) -> str | None:
    from charset_normalizer import from_bytes  # 0.1 s that others need not pay

    found = {match.encoding for match in from_bytes(data, threshold=0.1)}
    for name, family in _EAST_ASIAN.items():
        if found and found <= family:
            try:
                special = re.findall(r"[^\x00-\x7f]", data.decode(name))
            except UnicodeDecodeError:
                return None
            fitting = sum(_EAST_ASIAN_TEXT.match(char) is not None for char in special)
            return (
                name if len(special) >= 8 * MIN_SPECIAL and fitting >= 0.98 * len(special) else None
            )
    return None


def guess_table(
    form: FileFormat, head: bytes, is_all: bool, *, delimiter: bool, quoting: bool
) -> FileFormat | None:
    """`form` with the delimiter and quoting of a table that begins with `head` (UTF-8), as far as they are to be guessed.

    `form` has the kind of its ending, with that kind's own delimiter and quoting; another kind means that the ending tells nothing. Then
    None says that this is no table. Else what is not sure stays as it is.
    """
    whole = head if is_all else head[: head.rfind(b"\n") + 1]
    lines = hide_returns(Lines(whole, 1, {}))
    known = form.kind in ("csv", "tsv")
    if b"\0" in whole:
        return form if known else None
    forms = [form] if known else []
    if known and quoting and not form.quoted:
        forms.append(replace(form, quoted=True))
    for each in forms:
        if _is_even(each, lines, is_all):
            return each
    if not delimiter:
        return form if known else None
    fitting = []
    for sign, kind in DELIMITERS.items():
        for quoted in ([True] if kind == "csv" else [False, True]) if quoting else [form.quoted]:
            other = replace(form, kind=form.kind if known else kind, delimiter=sign, quoted=quoted)
            if (sign != form.delimiter or not known) and _is_even(other, lines, is_all):
                fitting.append(other)
                break
    return fitting[0] if len(fitting) == 1 else form if known else None


def _is_even(form: FileFormat, lines: Lines, is_all: bool) -> bool:
    """Whether there are at least two rows, and all have the same number of fields, more than one, and as many as --column_names."""
    data, at = with_line_end(lines.data), 0
    while at < len(lines.data) and (blank := blank_at(data, at)):
        at += blank
    row = judge(form, data, at, 1, len(data), is_all) if at < len(lines.data) else None
    if (
        row is None
        or row.fault
        or not row.end
        or not 1 < len(row.fields) == (len(form.column_names) or len(row.fields))
    ):
        return False
    found = scan(form, lines, len(row.fields), len(data), is_all)
    if (
        form.quoted
        and form.delimiter == "\t"
        and not is_clean(form, lines.data[: found.stop], len(data))
    ):
        return False  # a quote within a field: rather text everywhere
    return len(found.rows.starts) > 1 and not found.bad


def head_as_utf8(head: bytes, codec: str, is_all: bool) -> bytes:
    """The whole lines of a file's beginning in UTF-8, whatever bytes are wrong in them."""
    ends = line_ends(head, codec)
    whole = head if is_all or not len(ends) else head[: ends[-1]]
    return whole.decode(codec, "replace").encode(errors="replace").removeprefix(codecs.BOM_UTF8)
