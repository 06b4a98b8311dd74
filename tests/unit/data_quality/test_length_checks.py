"""Lengths are those of training, and truncation is reported with the length to use."""

from pathlib import Path
from typing import Any

import pytest
from data_checks import check_rows, clean_rows, get_finding, kinds
from transformers import AutoTokenizer

from bertdist.data.tokenization import encode
from bertdist.data_quality import length_checks


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def short_rows(count: int) -> list[dict[str, str]]:
    return [{**row, "text": row["text"][:20]} for row in clean_rows(count)]


def test_lengths_are_those_of_training(tmp_path: Path, tokenizer: Any) -> None:
    found = check_rows(tmp_path, short_rows(60), tokenizer=tokenizer, max_length=16)
    records, told = found.splits["train"], found.lengths["train"]
    ids = [len(ids) for ids, _ in encode([records[row] for row in range(60)], tokenizer, 512)]
    assert told.counted.tolist() == ids and (told.total, told.longest, told.rows) == (
        sum(ids),
        max(ids),
        60,
    )
    assert (
        told.kept
        == sum(len(ids) for ids, _ in encode([records[row] for row in range(60)], tokenizer, 16))
        != told.total
    )
    assert told.truncated == sum(length > 16 for length in ids) / 60
    assert sum(rows for *_, rows in told.histogram) == 60
    for low, high, rows in told.histogram:
        assert rows == sum(low <= length <= high for length in ids)


def test_truncation_names_the_length_that_would_truncate_one_percent(
    tmp_path: Path, tokenizer: Any
) -> None:
    found = check_rows(tmp_path, short_rows(200), tokenizer=tokenizer, max_length=16)
    assert [kind for kind, *_ in kinds(found)] == ["truncated"] and get_finding(
        found, "truncated"
    ).severity == "warning"
    need = found.lengths["train"].for_one_percent
    assert (
        need is not None
        and f"--max_length {need} would truncate 1%" in get_finding(found, "truncated").advice
    )
    assert (
        (found.lengths["train"].counted > need).mean()
        <= 0.01
        < (found.lengths["train"].counted >= need).mean() + 0.005
    )
    assert kinds(check_rows(tmp_path, short_rows(200), tokenizer=tokenizer, max_length=64)) == []


def test_few_truncated_rows_are_a_note_that_names_the_models_maximum(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = short_rows(300)
    rows[5]["text"] = "a " * 700
    found = check_rows(tmp_path, rows, tokenizer=tokenizer, max_length=64)
    assert kinds(found) == [("truncated", "note", "train", 1)]
    assert (
        get_finding(found, "truncated").examples[0].note == "702 tokens"
        and "less than 1%" in get_finding(found, "truncated").advice
    )
    rows[6:20] = [{"text": f"{row} " * 700, "label": "good"} for row in range(14)]
    found = check_rows(tmp_path, rows, tokenizer=tokenizer, max_length=64)
    assert "the model's maximum is 512" in get_finding(found, "truncated").advice


def test_unknown_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = short_rows(200)
    for row in rows[:60]:
        row["text"] = f"好 {row['text']}"
    found = check_rows(tmp_path, rows, tokenizer=tokenizer, max_length=64)
    assert (
        kinds(found) == [("unknown_tokens", "warning", "train", 60)]
        and get_finding(found, "unknown_tokens").unit == "tokens"
    )


def test_without_a_tokenizer_characters_and_words_are_counted(tmp_path: Path) -> None:
    found = check_rows(
        tmp_path, [{"text": "ein Über fünf", "label": "a"}, {"text": "zwei", "label": "b"}] * 20
    )
    told = found.lengths["train"]
    assert (told.unit, told.mean, told.mean_words, told.longest, told.max_length) == (
        "characters",
        8.5,
        2.0,
        13,
        None,
    )


def test_both_texts_of_a_pair_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    pair = {"sentence1": "ein Über fünf", "sentence2": "zwei  drei", "label": "a"}
    rows = [pair, {**pair, "sentence2": "sechs", "label": "b"}] * 20
    found = check_rows(tmp_path, rows).lengths["train"]
    assert (found.mean_words, found.mean, found.longest) == (4.5, 20.5, 23)
    counted = check_rows(tmp_path, rows, tokenizer=tokenizer, max_length=64).lengths["train"]
    assert counted.mean_words == 4.5
    one = [{"text": row["sentence1"], "label": row["label"]} for row in rows]
    assert check_rows(tmp_path, one).lengths["train"].mean_words == 3.0  # the control


def test_a_large_split_is_sampled_and_its_longest_rows_counted(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = short_rows(200)
    rows[1]["text"] = "a " * 100
    whole = check_rows(tmp_path, rows, tokenizer=tokenizer, max_length=64)
    monkeypatch.setattr(length_checks, "SAMPLE_BYTES", 1_000)
    part = check_rows(tmp_path, rows, tokenizer=tokenizer, max_length=64)
    told = part.lengths["train"]
    assert (
        told.rows < 50 and told.of == 200 and told.longest == whole.lengths["train"].longest == 102
    )
    assert abs(told.total / whole.lengths["train"].total - 1) < 0.2
    assert (
        any(f"counted in {told.rows} of its 200 rows" in note for note in part.notes)
        and whole.notes == []
    )
