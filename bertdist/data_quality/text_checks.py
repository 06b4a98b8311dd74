"""Texts that are empty, broken or odd -> findings; and repair of broken ones where there is no doubt.

In: the texts of a split as Arrow. Out: findings, whose rows are told by Arrow's own vectorised functions; only texts with other than ASCII
characters go through Python. 1,000,000 sentences of ASCII: 0.8 processor seconds.
One module, because a search for broken bytes and their repair must agree on what is broken.

Broken encodings are judged by ftfy (the extra `check`), whose heuristic was made on real mistakes and seldom names a good text;
without it three patterns stand in for it, and the findings say so. https://ftfy.readthedocs.io/en/latest/heuristic.html
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.core.terminal import excerpt
from bertdist.data_quality.findings import Example, Finding, Severity

Rows = npt.NDArray[np.int64]

BEFORE = 40  # characters of an excerpt that stand before what it is to show

LONG_CHARACTERS, LONG_TIMES = (
    5_000,
    50,
)  # a very long text has more characters than both: this, and so many times the median

WORDLESS = r"^\s*[\p{P}\p{Sm}\p{Sc}\p{Sk}][\s\p{P}\p{Sm}\p{Sc}\p{Sk}]*$"  # symbols such as emoji (\p{So}) do say something

ADDRESS = r"(?:https?://|www\.)\S+"

_SURE = "[ÂÃ][\u0080-\u00bf]|â€|ï»¿|å[\u0080-\u00bf]{2}"  # the stand-in: UTF-8 of Latin and Chinese letters read as latin-1 or cp1252


@dataclass(frozen=True)
class _Look:
    kind: str
    severity: Severity
    title: str
    pattern: str
    meaning: str
    advice: str


LOOKS = (
    _Look(
        "nul_bytes", "warning", "NUL bytes", "\\x00",
        "A NUL byte is never text: a binary field, UTF-16 read as something else, or a damaged file.",
        "Look at how the file was written; UTF-16 wants --encoding utf-16.",
    ),
    _Look(
        "control_characters", "warning", "control characters", "[\\x01-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f]",
        "Terminal codes and other characters that nobody reads; tokenizers drop most of them, so words may grow together.",
        "Replace them with blanks where the file is made.",
    ),
    _Look(
        "c1_controls", "warning", "cp1252 read as latin-1", "[\u0080-\u009f]",
        "Characters U+0080 to U+009F are no text: where cp1252 has quotes, dashes and the euro sign, latin-1 has these.",
        "Read the file it came from with --encoding cp1252; --fix puts in the characters that were meant.",
    ),
    _Look(
        "replacement_characters", "warning", "replacement characters U+FFFD", "\ufffd",
        "A program before this one met bytes that it could not read and put in U+FFFD; what stood there is lost.",
        "Make the file again from its source with the right encoding.",
    ),
    _Look(
        "only_punctuation", "note", "only punctuation", WORDLESS,
        "No letter, digit or emoji.", "Keep them only if such rows will be asked about.",
    ),
    _Look(
        "only_addresses", "note", "only web addresses", rf"^\s*{ADDRESS}(?:\s+{ADDRESS})*\s*$",
        "The text is nothing but addresses; a model learns their letters.", "Drop them, or put in the text of the pages.",
    ),
)  # fmt: skip


def has_ftfy() -> bool:
    """Whether ftfy is installed (the extra `check`)."""
    return importlib.util.find_spec("ftfy") is not None


def check_texts(split: str, texts: pa.Array, column: str, num_examples: int) -> list[Finding]:
    """Findings on one column of texts: (rows,) large_string."""

    def finding(
        kind: str,
        severity: Severity,
        title: str,
        rows: Rows,
        meaning: str,
        advice: str,
        pattern: str | None = None,
    ) -> list[Finding]:
        if not len(rows):
            return []
        examples = tuple(
            Example(
                split=split, row=int(row), text=excerpt(_from(texts[int(row)].as_py(), pattern))
            )
            for row in rows[:num_examples]
        )
        return [
            Finding(
                kind=kind,
                severity=severity,
                split=split,
                title=title,
                count=len(rows),
                total=len(texts),
                meaning=meaning,
                advice=advice,
                examples=examples,
                details={"column": column},
            )
        ]

    found = finding(
        "empty_texts", "warning", "empty texts", empty_rows(texts),
        "No text, or only blanks: a model learns to answer such rows with the most frequent label.", "Drop them: --fix does.",
    )  # fmt: skip
    for look in LOOKS:
        shown = None if look.pattern.startswith("^") else look.pattern
        found += finding(
            look.kind,
            look.severity,
            look.title,
            _matching(texts, look.pattern),
            look.meaning,
            look.advice,
            shown,
        )
    judged = (
        "ftfy"
        if has_ftfy()
        else "three patterns; install ftfy (the extra check) for a better judgement"
    )
    found += finding(
        "mojibake", "warning", "text decoded with the wrong encoding", mojibake_rows(texts),
        f"UTF-8 that was read as another encoding, such as Ã© for é (by {judged}).",
        "Read the source with its own --encoding; --fix repairs the texts where only one repair is possible.",
        "[^\\x00-\\x7f]{2}|[^\\x00-\\x7f]",
    )  # fmt: skip
    characters = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    limit = max(LONG_CHARACTERS, LONG_TIMES * float(np.median(characters)))
    rows = np.flatnonzero(characters > limit)
    found += finding(
        "very_long_texts", "note", f"more than {limit:,.0f} characters", rows[np.argsort(-characters[rows], kind="stable")],
        f"The median text has {np.median(characters):,.0f} characters, the longest {characters.max():,}; such rows may hold several.",
        "See whether quotes swallowed rows; else nothing: --max_length truncates.",
    )  # fmt: skip
    return found


def empty_rows(texts: pa.Array) -> Rows:
    """Rows whose text is empty or only blanks."""
    return _true(pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts)))


def other_than_ascii(texts: pa.Array) -> Rows:
    """Rows with any character that is not ASCII."""
    return _matching(texts, "[^\\x00-\\x7f]")


def mojibake_rows(texts: pa.Array) -> Rows:
    """Rows that ftfy calls bad for more than C1 controls and U+FFFD, which are findings of their own."""
    suspects = other_than_ascii(texts)
    if not has_ftfy():
        return suspects[_matching(texts.take(pa.array(suspects)), _SURE)]
    from ftfy.badness import is_bad

    without = str.maketrans(dict.fromkeys((*range(0x80, 0xA0), 0xFFFD), " "))
    return np.array(
        [row for row in suspects.tolist() if is_bad(texts[row].as_py().translate(without))],
        np.int64,
    )


def repaired(text: str) -> str | None:
    """What the text was before it was decoded wrongly; None where nothing is wrong, or more than one answer is possible.

    Sure is a repair that takes the whole text through encodings and back, loses no character, and leaves nothing that looks wrong.
    """
    if not has_ftfy():
        return None
    import ftfy
    from ftfy.badness import is_bad

    whole = ftfy.TextFixerConfig(
        unescape_html=False,
        restore_byte_a0=False,
        replace_lossy_sequences=False,
        decode_inconsistent_utf8=False,
        fix_c1_controls=True,
    )
    fixed: str = ftfy.fix_encoding(text, whole)
    return fixed if fixed != text and "\ufffd" not in fixed and not is_bad(fixed) else None


def repairs(texts: pa.Array, rows: Sequence[int]) -> dict[int, str]:
    """Row -> its text as it was meant, of those rows that can be repaired."""
    found = {row: repaired(texts[row].as_py()) for row in rows}
    return {row: text for row, text in found.items() if text is not None}


def _matching(texts: pa.Array, pattern: str) -> Rows:
    return _true(pc.match_substring_regex(texts, pattern))


def _true(flags: pa.Array) -> Rows:
    rows: Rows = np.flatnonzero(flags.to_numpy(zero_copy_only=False))
    return rows


def _from(text: str, pattern: str | None) -> str:
    """The text from shortly before what the pattern finds, so that an excerpt shows it."""
    match = re.search(pattern, text) if pattern else None
    return (
        text
        if match is None or match.start() < BEFORE
        else "..." + text[match.start() - BEFORE // 2 :]
    )
