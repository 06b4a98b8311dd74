"""Broken and odd texts are found where they were planted; only unique repairs are made."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_checks import check_rows, clean_rows, get_finding, kinds

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data.in_memory import records_from_texts
from bertdist.data_quality import text_checks
from bertdist.data_quality.findings import Finding, FindingBuilder
from bertdist.data_quality.report import check_data
from bertdist.data_quality.text_checks import check_texts, mojibake_rows, repair

pytest.importorskip("ftfy", reason="wrong encodings are judged by ftfy (the extra `check`)")

GOOD = [
    "naïve café",
    "Größe, “quoted” – and so on…",
    "你好，世界",
    "Привет",
    "I ♥ it 😀",
    "SÃO PAULO É AQUI, não é?",
    "tab\tand\nline",
]
PLANTED = [
    ("empty_texts", "warning", ["", "  ", "\u00a0\u3000\n"]),
    ("nul_bytes", "warning", ["a\0b"]),
    ("control_characters", "warning", ["red \x1b[31malert", "a\x7fb"]),
    ("c1_controls", "warning", ["it\x92s fine", "100 \x80"]),
    ("replacement_characters", "warning", ["caf\ufffd"]),
    ("only_punctuation", "note", ["...", "?! -- :)", "。！"]),
    ("only_addresses", "note", ["https://example.org/a?b=c", " www.example.org http://x.y "]),
    ("mojibake", "warning", ["cafÃ© au lait", "donâ€™t", "å¥½å¥½"]),
]


def findings_of(texts: list[str]) -> list[Finding]:
    records, found = records_from_texts(texts), list[Finding]()
    check_texts(FindingBuilder("train", records, 3, found), records.texts, "text")
    return found


def findings_in(texts: list[str]) -> list[tuple[str, str, int]]:
    found = findings_of(texts)
    return [(finding.kind, finding.severity, finding.count) for finding in found]


@pytest.mark.parametrize(("kind", "severity", "texts"), PLANTED, ids=[kind for kind, *_ in PLANTED])
def test_planted_problems_are_found(kind: str, severity: str, texts: list[str]) -> None:
    clean = [row["text"] for row in clean_rows(20)]
    assert (kind, severity, len(texts)) in findings_in([*clean, *texts, *clean])
    assert [found for found, *_ in findings_in(texts)] == [kind]  # and nothing else


def test_good_texts_have_no_finding() -> None:
    assert findings_in([*GOOD, *(row["text"] for row in clean_rows(20))]) == []


def test_very_long_texts_are_longer_than_all_others() -> None:
    clean = [row["text"] for row in clean_rows(20)]
    assert findings_in([*clean, "word " * 1_100]) == [("very_long_texts", "note", 1)]
    assert findings_in([*clean, "word " * 900]) == []


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("cafÃ© au lait", "café au lait"),
        ("donâ€™t", "don’t"),
        ("it\x92s fine", "it’s fine"),
        ("Â£10 â€“ now", "£10 – now"),
        ("å¥½", "好"),
        ("cafÃ© olé", None),  # one part is wrong and one is right: not sure
        ("caf\ufffd", None),
        *((text, None) for text in GOOD),
    ],
)
def test_only_unique_repairs_are_made(text: str, meant: str | None) -> None:
    assert repair(text) == meant


def test_a_text_without_a_unique_repair_is_still_a_finding() -> None:
    assert mojibake_rows(pa.array(["cafÃ© olé", "fine"], pa.large_string())).tolist() == [0]


def test_without_ftfy_patterns_are_used_and_the_finding_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_checks, "has_ftfy", lambda: False)
    (finding,) = findings_of(["cafÃ©", "donâ€™t", "å¥½å¥½", *GOOD[:-2]])
    assert (finding.kind, finding.count) == ("mojibake", 3) and "install ftfy" in finding.meaning
    assert repair("cafÃ©") is None


def test_bytes_that_are_not_utf8_in_a_parquet_file_are_one_line(tmp_path: Path) -> None:
    rows = clean_rows(40)
    surrogate = b"lone \xed\xa0\x80 surrogate"
    raw = pa.array(
        [*(row["text"].encode() for row in rows), surrogate, b"\xff\xfe"], pa.large_binary()
    ).view(pa.large_string())
    table = pa.table({"text": raw, "label": [*(row["label"] for row in rows), "bad", "good"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^a.parquet row 40: column 'text' is not UTF-8"):
        check_data(DataConfig(train_file=[str(tmp_path / "a.parquet")]))
    found = check_data(DataConfig(train_file=[str(tmp_path / "a.parquet")], on_bad_row="skip"))
    assert kinds(found) == [("skipped_rows", "warning", "train", 2)]  # and nothing of the others
    assert found.splits["train"].texts.to_pylist() == [row["text"] for row in rows]
    assert [row.line for row in found.splits["train"].bad_rows] == [40, 41]


def test_an_excerpt_starts_at_the_match(tmp_path: Path) -> None:
    rows = clean_rows(40)
    rows[9]["text"] = "word " * 60 + "cafÃ© at the end"
    assert "cafÃ©" in get_finding(check_rows(tmp_path, rows), "mojibake").examples[0].text


def test_both_columns_of_a_pair_are_checked(tmp_path: Path) -> None:
    rows = [
        {"sentence1": row["text"], "sentence2": row["text"][::-1], "label": row["label"]}
        for row in clean_rows(40)
    ]
    assert kinds(check_rows(tmp_path, rows)) == []
    rows[4]["sentence2"] = ""
    found = check_rows(tmp_path, rows)
    assert kinds(found) == [("empty_texts", "warning", "train", 1)]
    assert dict(get_finding(found, "empty_texts").details) == {"column": "sentence2"}
