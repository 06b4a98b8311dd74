"""Known problems of real data sets are found, with the counts that their sources state."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_checks import check_rows, clean_rows, get_finding, kinds
from rows import write_rows
from transformers import AutoTokenizer

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data_quality import report
from bertdist.data_quality.findings import ExampleRow, Finding
from bertdist.data_quality.report import DataReport, check_data

EMOTIONS = (
    "anger anticipation disgust fear joy love optimism pessimism sadness surprise trust".split()
)


def test_a_report_is_plain_data(tmp_path: Path) -> None:
    rows = clean_rows(60)
    found = check_rows(tmp_path, [*rows, rows[3]], clean_rows(20, 1))
    told = json.loads(json.dumps(found.as_dict()))
    assert (
        told["counts"] == {"error": 0, "warning": 1, "note": 0}
        and told["problem_type"] == "single_label_classification"
    )
    assert told["splits"]["validation"]["rows"] == 20 and told["splits"]["train"][
        "label_counts"
    ] == {"good": 31, "bad": 30}
    assert told["findings"][0]["examples"][0]["where"] == "train.jsonl line 4"
    assert set(told["splits"]["train"]["lengths"]["percentiles"]) == {"50", "90", "95", "99"}


def test_checks_without_their_package_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_rows(tmp_path, clean_rows(40)).notes == []
    monkeypatch.setattr(report, "has_rensa", lambda: False)
    monkeypatch.setattr(report, "has_ftfy", lambda: False)
    found = check_rows(tmp_path, clean_rows(40))
    assert ["rensa" in note or "ftfy" in note for note in found.notes] == [
        True,
        True,
    ] and found.groups.near is None


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"train.jsonl line 1: the key 'text' is missing|there is no column 'text'"
        r"|no column has a usual name",
    ):
        check_rows(tmp_path, [{"a": "b", "c": "d"}])
    train = write_rows(tmp_path / "train.tsv", clean_rows(40))
    (tmp_path / "test.tsv").write_text("text\tlabel\nonly one field\n")
    with pytest.raises(DataError, match=r"^test.tsv line 2: 1 field, expected 2"):
        check_data(DataConfig(train_file=[str(train)]), test_file=str(tmp_path / "test.tsv"))


def test_skipped_rows_are_reported_with_their_reasons(tmp_path: Path) -> None:
    lines = [
        "text\tlabel",
        *(f"{row['text']}\t{row['label']}" for row in clean_rows(40)),
        "one field",
        "a\tb\tc",
        "another field",
        "none\t",
    ]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    data = DataConfig(train_file=[str(tmp_path / "train.tsv")], on_bad_row="skip", max_bad_rows=4)
    found = check_data(data)
    assert kinds(found) == [("skipped_rows", "warning", "train", 4)]
    told = get_finding(found, "skipped_rows")
    assert (
        told.total == 44
        and told.meaning.startswith("1 field, expected 2 as in the header (2); ")
        and "--max_bad_rows" not in told.advice
    )
    assert [example.note[:31] for example in told.examples] == [
        "train.tsv line 42: 1 field, exp",
        "train.tsv line 43: 3 fields, ex",
        "train.tsv line 44: 1 field, exp",
    ]
    (shown, *_) = found.as_dict()["findings"][0]["examples"]
    assert (shown["where"], shown["text"]) == ("train", "one field")
    many = check_data(replace(data, max_bad_rows=3))
    assert (
        get_finding(many, "skipped_rows").severity == "error"
        and "training fails at more than 3 in all its files (--max_bad_rows)"
        in get_finding(many, "skipped_rows").advice
    )
    with pytest.raises(DataError, match=r"^train.tsv line 42: 1 field"):  # the control
        check_data(replace(data, on_bad_row="fail", max_bad_rows=100))


def real(
    folder: Path, train: str, dev: str | None = None, test: str | None = None, **settings: Any
) -> DataReport:
    data = DataConfig(
        train_file=[str(folder / train)],
        validation_file=str(folder / dev) if dev else None,
        **settings,
    )
    return check_data(data, test_file=str(folder / test) if test else None)


def test_sst2(shared_data: Path) -> None:
    pytest.importorskip("rensa", reason="near duplicates need the extra `check`")
    found = real(shared_data / "sst2", "train.tsv", "dev.tsv", "test.tsv")
    assert get_finding(found, "duplicates").count == 371  # rows beyond the first of their text
    assert (
        get_finding(found, "conflicting_labels").count,
        get_finding(found, "conflicting_labels").details["rows"],
    ) == (5, 10)  # texts, and their rows
    assert not [
        finding for finding in found.findings if finding.kind == "leaks"
    ]  # no sentence of dev or test stands in train as it is
    assert get_finding(found, "alike_leaks", "train/test").count == 2
    assert not [finding for finding in found.findings if finding.severity == "error"]
    assert (
        get_finding(found, "near_duplicates").count > 40_000
    )  # phrases of the same sentences, and the sentences themselves


def test_chnsenticorp(shared_data: Path) -> None:
    found = real(
        shared_data / "chnsenticorp",
        "train.tsv",
        "dev.tsv",
        column_names=["text", "label"],
    )
    assert len(found.splits["train"]) == 9_600
    assert get_finding(found, "duplicates").count == 1_351  # rows beyond the first of their text
    assert get_finding(found, "conflicting_labels").count == 24  # texts
    assert (
        get_finding(found, "leaks", "train/validation").count == 338
        and get_finding(found, "leaks", "train/validation").severity == "error"
    )
    with pytest.raises(DataError, match=r"^test\.tsv line 1 is a header \('qid', 'text_a'\)"):
        real(
            shared_data / "chnsenticorp",
            "train.tsv",
            test="test.tsv",
            column_names=["text", "label"],
        )


def test_smsspamcollection_and_its_spreadsheet(shared_data: Path) -> None:
    found = real(
        shared_data / "sms_spam",
        "SMSSpamCollection",
        column_names=["label", "text"],
        delimiter="tab",
    )
    assert (
        len(found.splits["train"]) == 5_574 and get_finding(found, "duplicates").count == 403
    )  # rows beyond the first of their text
    assert not [
        finding
        for finding in found.findings
        if finding.kind in ("overflow_columns", "swallowed_rows")
    ]
    found = real(
        shared_data / "sms_spam", "spam.csv", text_column="v2", label_column="v1", encoding="cp1252"
    )
    assert (
        len(found.splits["train"]) == 5_572 and get_finding(found, "overflow_columns").count == 50
    )
    assert get_finding(found, "duplicates").count == 403
    with pytest.raises(
        DataError,
        match=r"^spam.csv line \d+: byte 0x.. is not utf-8; pass --encoding \(such as cp1252 ",
    ):
        real(
            shared_data / "sms_spam",
            "spam.csv",
            text_column="v2",
            label_column="v1",
            encoding="utf-8",
        )


def test_odd_quotes_of_smsspamcollection(
    shared_data: Path,
) -> None:
    found = real(
        shared_data / "sms_spam",
        "SMSSpamCollection",
        column_names=["label", "text"],
        delimiter="tab",
    )
    assert (
        get_finding(found, "odd_quotes").severity == "note"
        and "so nothing is lost" in get_finding(found, "odd_quotes").meaning
    )


def test_semeval(shared_data: Path) -> None:
    names = [f"2018-E-c-En-{split}.txt" for split in ("train", "dev", "test")]
    found = real(
        shared_data / "semeval18_ec",
        *names,
        delimiter="tab",
        text_column="Tweet",
        label_columns=EMOTIONS,
    )
    assert (
        get_finding(found, "rows_without_a_label").count == 204
        and get_finding(found, "rows_without_a_label").details["most_labels"] == 6
    )
    assert "column 'anger' holds 'NONE'" in get_finding(found, "unreadable_labels", "test").meaning
    assert get_finding(found, "no_labels", "test").count == 3_259


def test_newsgroups_have_messages_of_more_than_50_000_tokens(
    shared_data: Path, tmp_path: Path, tiny_model: Path
) -> None:
    # With BERT's own vocabulary the longest has 52,947; this tokenizer's pieces are mostly letters.
    rows = []
    with tarfile.open(shared_data / "newsgroups20" / "20news-bydate.tar.xz") as archive:
        for member in archive:
            if member.isfile() and (member.size > 100_000 or len(rows) < 200):
                opened = archive.extractfile(member)
                assert opened is not None
                rows.append(
                    {
                        "text": opened.read().decode("utf-8", "replace"),
                        "label": member.name.split("/")[-2],
                    }
                )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = check_rows(tmp_path, rows, tokenizer=tokenizer, max_length=512)
    assert found.lengths["train"].longest > 50_000 and get_finding(found, "truncated").examples[
        0
    ].note.endswith(" tokens")
    assert "very_long_texts" in [kind for kind, *_ in kinds(found)]


def test_a_finding_is_plain_data() -> None:
    finding = Finding(
        kind="leaks",
        severity="warning",
        split="train",
        title="t",
        count=1,
        total=10,
        meaning="m",
        advice="a",
        examples=[
            ExampleRow(where="v row 4", row=4, text="x", note="n", like="t row 7"),
            ExampleRow(where="v row 5", row=5, text="y"),
        ],
        details={"k": 1},
    )
    entry = json.loads(json.dumps(finding.as_dict()))
    assert entry["examples"] == [
        {"where": "v row 4", "row": 4, "text": "x", "note": "n", "like": "t row 7"},
        {"where": "v row 5", "row": 5, "text": "y", "note": ""},
    ]
    assert (entry["kind"], entry["share"], entry["details"], entry["unit"]) == (
        "leaks",
        0.1,
        {"k": 1},
        "rows",
    )


def test_rows_skipped_in_all_files_together_are_an_error_as_in_training(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in clean_rows(40))]
        (tmp_path / f"{name}.tsv").write_text("\n".join([*lines, "a", "b"]) + "\n")
    data = DataConfig(
        train_file=[str(tmp_path / "train.tsv")],
        validation_file=str(tmp_path / "dev.tsv"),
        on_bad_row="skip",
    )

    def severities(data: DataConfig) -> dict[str, str]:
        found = check_data(data, test_file=str(tmp_path / "test.tsv"), near_threshold=0).findings
        return {each.split: each.severity for each in found if each.kind == "skipped_rows"}

    assert severities(replace(data, max_bad_rows=5)) == dict.fromkeys(
        ("train", "validation", "test"), "error"
    )
    assert severities(replace(data, max_bad_rows=6)) == dict.fromkeys(
        ("train", "validation", "test"), "warning"
    )
