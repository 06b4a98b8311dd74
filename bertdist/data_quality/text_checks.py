"""Checks of single texts (empty, broken or odd ones), and repair of wrongly decoded ones.

Columns are searched by Arrow's vectorised functions; only texts with characters beyond ASCII go
through Python. 1,000,000 ASCII sentences take 0.8 CPU seconds.

Wrong encodings are detected by ftfy (extra `check`), whose heuristic was tuned on real mistakes and
rarely flags a correct text: https://ftfy.readthedocs.io/en/latest/heuristic.html. Without it three
patterns are used instead, and the finding says so.
"""

import importlib.util

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.core.types import IntArray
from bertdist.data_quality.findings import FindingBuilder, Severity

# A very long text has more characters than both: 5,000, and 50 times the median.
LONG_CHARACTERS = 5_000
LONG_FACTOR = 50

NON_ASCII = "[^\\x00-\\x7f]"
PUNCTUATION = r"\p{P}\p{Sm}\p{Sc}\p{Sk}"  # symbols such as emoji (\p{So}) do mean something
URL = r"(?:https?://|www\.)\S+"

# UTF-8 of Latin and Chinese letters read as latin-1 or cp1252; used where ftfy is missing.
MOJIBAKE = "[ÂÃ][\u0080-\u00bf]|â€|ï»¿|å[\u0080-\u00bf]{2}"


# (kind, severity, title, regular expression, meaning, advice)
PATTERN_CHECKS: tuple[tuple[str, Severity, str, str, str, str], ...] = (
    (
        "nul_bytes",
        "warning",
        "NUL bytes",
        "\\x00",
        "A NUL byte is never text: a binary field, UTF-16 read as another encoding, or a damaged "
        "file.",
        "Check how the file was written; UTF-16 needs --encoding utf-16.",
    ),
    (
        "control_characters",
        "warning",
        "control characters",
        "[\\x01-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f]",
        "Terminal codes and other invisible characters; tokenizers drop most of them, so words may "
        "be joined.",
        "Replace them with spaces in the source file.",
    ),
    (
        "c1_controls",
        "warning",
        "cp1252 read as latin-1",
        "[\u0080-\u009f]",
        "Characters U+0080 to U+009F are not text: where cp1252 has quotes, dashes and the euro "
        "sign, latin-1 has these.",
        "Read the source file with --encoding cp1252; --fix restores the intended characters.",
    ),
    (
        "replacement_characters",
        "warning",
        "replacement characters U+FFFD",
        "\ufffd",
        "An earlier program replaced bytes that it could not decode with U+FFFD; the original "
        "characters are lost.",
        "Create the file again from its source with the right encoding.",
    ),
    (
        "only_punctuation",
        "note",
        "only punctuation",
        rf"^\s*[{PUNCTUATION}][\s{PUNCTUATION}]*$",
        "No letter, digit or emoji.",
        "Keep them only if such texts will occur in prediction.",
    ),
    (
        "only_addresses",
        "note",
        "only web addresses",
        rf"^\s*{URL}(?:\s+{URL})*\s*$",
        "The text is nothing but URLs; a model learns their letters.",
        "Drop them, or insert the text of the pages.",
    ),
)


def has_ftfy() -> bool:
    """Whether ftfy is installed (extra `check`)."""
    return importlib.util.find_spec("ftfy") is not None


def check_texts(build: FindingBuilder, texts: pa.Array, column: str) -> None:
    """Add all findings on one text column; column: its name."""

    def add(
        kind: str,
        severity: Severity,
        title: str,
        rows: IntArray,
        meaning: str,
        advice: str,
        pattern: str = "",
    ) -> None:
        examples = build.examples_of_match(texts, rows, pattern)
        details = {"column": column}
        if build.records.pairs is not None:  # each column has its own findings
            title = f"{title}, column {column}"
        build.add(kind, severity, title, rows, meaning, advice, examples=examples, details=details)

    meaning = "Empty or only white space: a model learns to predict the most frequent label."
    advice = "Drop them (--fix does)."
    add("empty_texts", "warning", "empty texts", empty_rows(texts), meaning, advice)
    for kind, severity, title, pattern, meaning, advice in PATTERN_CHECKS:
        shown = "" if pattern.startswith("^") else pattern
        add(kind, severity, title, _matching_rows(texts, pattern), meaning, advice, shown)
    method = (
        "ftfy" if has_ftfy() else "three patterns; install ftfy (extra check) for better results"
    )
    title, rows = "text decoded with the wrong encoding", mojibake_rows(texts)
    meaning = f"UTF-8 that was read as another encoding, such as Ã© for é (detected by {method})."
    advice = (
        "Read the source with its own --encoding; --fix repairs the texts for which only one "
        "repair is possible."
    )
    add("mojibake", "warning", title, rows, meaning, advice, f"{NON_ASCII}{{2}}|{NON_ASCII}")
    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    limit = max(LONG_CHARACTERS, LONG_FACTOR * float(np.median(lengths)))
    rows = np.flatnonzero(lengths > limit)
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    meaning = (
        f"The median text has {np.median(lengths):,.0f} characters, the longest "
        f"{lengths.max():,}; such texts may contain several rows."
    )
    advice = "Check whether quotes swallowed rows; otherwise nothing: --max_length truncates."
    add("very_long_texts", "note", f"more than {limit:,.0f} characters", rows, meaning, advice)


def empty_rows(texts: pa.Array) -> IntArray:
    """Rows whose text is empty or only white space."""
    return _true_rows(pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts)))


def mojibake_rows(texts: pa.Array) -> IntArray:
    """Rows that ftfy calls bad for more than C1 controls and U+FFFD, which have own findings."""
    candidates = _matching_rows(texts, NON_ASCII)
    if not has_ftfy():
        return candidates[_matching_rows(texts.take(pa.array(candidates)), MOJIBAKE)]
    from ftfy.badness import is_bad

    blanks = str.maketrans(dict.fromkeys((*range(0x80, 0xA0), 0xFFFD), " "))
    bad = [row for row in candidates.tolist() if is_bad(texts[row].as_py().translate(blanks))]
    return np.array(bad, np.int64)


def repair(text: str) -> str | None:
    """Undo a wrong decoding; None if nothing is wrong or the repair is not unique.

    A repair counts only if the complete text survives the round trip through the encodings, no
    character is lost, and nothing that looks wrong is left.
    """
    if not has_ftfy():
        return None
    import ftfy
    from ftfy.badness import is_bad

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        restore_byte_a0=False,
        replace_lossy_sequences=False,
        decode_inconsistent_utf8=False,
        fix_c1_controls=True,
    )
    fixed: str = ftfy.fix_encoding(text, config)
    return fixed if fixed != text and "\ufffd" not in fixed and not is_bad(fixed) else None


def repair_rows(texts: pa.Array) -> dict[int, str]:
    """Row -> repaired text, of the rows that can be repaired."""
    repaired = {
        row: repair(texts[row].as_py()) for row in _matching_rows(texts, NON_ASCII).tolist()
    }
    return {row: text for row, text in repaired.items() if text is not None}


def _matching_rows(texts: pa.Array, pattern: str) -> IntArray:
    return _true_rows(pc.match_substring_regex(texts, pattern))


def _true_rows(flags: pa.Array) -> IntArray:
    rows: IntArray = np.flatnonzero(flags.to_numpy(zero_copy_only=False))
    return rows
