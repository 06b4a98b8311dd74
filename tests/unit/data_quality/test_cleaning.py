"""--fix writes rows that can be trained on, and lists every other row with the reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_checks import check_rows, clean_rows, kinds

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data.splits import load_records
from bertdist.data_quality.cleaning import dropped_path, write_cleaned
from bertdist.data_quality.config import DEFAULT_FIX_KINDS, FIX_KINDS
from bertdist.data_quality.report import DataReport, check_data

pytest.importorskip("rensa", reason="near duplicates need the extra `check`")
pytest.importorskip("ftfy", reason="repairs need the extra `check`")


def fix(
    found: DataReport,
    folder: Path,
    kinds: tuple[str, ...] = DEFAULT_FIX_KINDS,
    delimiter: str | None = None,
) -> tuple[Any, ...]:
    """(rows written as (text, label), what was told, counts)."""
    path = folder / "clean.parquet"
    counted = write_cleaned(found, list(kinds), path, 0.8)
    records = found.splits["train"]
    named = {
        "text_column": records.text_column,
        "label_column": records.label_column,
        "text_pair_column": records.pair_column,
    }
    again = load_records(
        DataConfig(train_file=[str(path)], **named, label_delimiter=delimiter), "train"
    )
    told = [
        json.loads(line) for line in dropped_path(path).read_text(encoding="utf-8").splitlines()
    ]
    return [again[row][1:] for row in range(len(again))], told, counted


def dirty(folder: Path, ending: str = "tsv") -> tuple[list[dict[str, Any]], DataReport]:
    """40 rows, of which 33 are good: see the test below."""
    train, dev = clean_rows(40), clean_rows(10, 1)
    train[3]["text"] = "  "
    train[5] = {**train[4], "label": "good"}  # row 4 is bad
    train[9] = dict(train[8])
    train[11] = {"text": dev[0]["text"].upper(), "label": "good"}
    train[13]["text"] = "cafÃ© " + train[13]["text"]
    train[15]["text"] = train[12]["text"] + "s"
    train[17]["text"] = dev[1]["text"] + "s"
    train[19] = {
        "text": train[13]["text"].replace("Ã©", "é"),
        "label": train[13]["label"],
    }  # the same as row 13 once that is mended
    return train, check_rows(folder, train, dev, ending=ending)


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_every_problem_drops_its_rows(tmp_path: Path, ending: str) -> None:
    train, found = dirty(tmp_path, ending)
    rows, told, counted = fix(found, tmp_path)
    dropped = {
        3: "empty",
        4: "conflicts",
        5: "conflicts",
        9: "duplicates",
        11: "leaks",
        19: "duplicates",
    }
    mended = {**train[13], "text": train[13]["text"].replace("Ã©", "é")}
    assert rows == [
        (row["text"], None, row["label"])
        for number, row in enumerate([*train[:13], mended, *train[14:]])
        if number not in dropped
    ]
    assert {line["row"]: line["kind"] for line in told if line["action"] == "dropped"} == dropped
    assert [(line["row"], line["kind"]) for line in told if line["action"] == "changed"] == [
        (13, "encoding")
    ]
    assert counted == {
        "encoding": 1,
        "empty": 1,
        "conflicts": 2,
        "duplicates": 2,
        "leaks": 1,
        "rows": 34,
    }
    lines = {"tsv": 5, "jsonl": 4, "parquet": None}
    assert (told[0]["file"], told[0]["line"], told[0]["row"]) == (
        f"train.{ending}",
        lines[ending],
        3,
    )
    assert "cafÃ©" in told[-2]["text"] or "cafÃ©" in told[-3]["text"]


def test_cleaned_rows_have_no_finding(tmp_path: Path) -> None:
    _, found = dirty(tmp_path)
    assert len(found.findings) > 6
    fix(found, tmp_path, FIX_KINDS)
    data = DataConfig(
        train_file=[str(tmp_path / "clean.parquet")],
        validation_file=str(tmp_path / "validation.tsv"),
    )
    assert kinds(check_data(data)) == []


@pytest.mark.parametrize(
    ("kind", "dropped"),
    [
        ("empty", [3]),
        ("conflicts", [4, 5]),
        ("duplicates", [5, 9]),
        ("near_duplicates", [15, 19]),
        ("near_leaks", [17]),
    ],
)
def test_only_the_requested_kinds_are_corrected(
    tmp_path: Path, kind: str, dropped: list[int]
) -> None:
    _, found = dirty(tmp_path)
    rows, told, counted = fix(found, tmp_path, (kind,))
    assert [line["row"] for line in told] == dropped and counted == {
        kind: len(dropped),
        "rows": 40 - len(dropped),
    }
    assert len(rows) == 40 - len(dropped)


def test_labels_of_every_kind_keep_their_column(tmp_path: Path) -> None:
    texts = [row["text"] for row in clean_rows(40)]
    sets = [["a", "b"], ["b"], []]
    many = [{"text": text, "labels": sets[row % 3]} for row, text in enumerate(texts)]
    assert [row[2] for row in fix(check_rows(tmp_path, many), tmp_path)[0]] == [
        tuple(sets[row % 3]) for row in range(40)
    ]
    joined = [{"text": row["text"], "labels": ";".join(row["labels"])} for row in many]
    found = check_rows(tmp_path, joined, label_delimiter=";")
    assert [row[2] for row in fix(found, tmp_path, delimiter=";")[0]] == [
        tuple(sets[row % 3]) for row in range(40)
    ]
    path = tmp_path / "lists.csv"  # a list beside joined labels may hold their delimiter
    cells = ['"[""a;b"", ""c""]"', "a;c", '"[""a;b""]"', "c"]
    path.write_text("text,label\n" + "".join(f"{t},{cells[i % 4]}\n" for i, t in enumerate(texts)))
    found = check_data(DataConfig(train_file=[str(path)], label_delimiter=";"), near_threshold=0)
    written = fix(found, tmp_path, delimiter=";")[0]
    assert [row[2] for row in written[:4]] == [("a;b", "c"), ("a", "c"), ("a;b",), ("c",)]
    for label in (3, 2.5):
        numbers = [{"text": text, "score": label + row % 2} for row, text in enumerate(texts)]
        assert [row[2] for row in fix(check_rows(tmp_path, numbers), tmp_path)[0]] == [
            str(row["score"]) for row in numbers
        ]
        write_cleaned(check_rows(tmp_path, numbers), ["empty"], tmp_path / "n.parquet", 0.8)
        scores = pq.read_table(tmp_path / "n.parquet")["score"].to_pylist()
        assert scores == [row["score"] for row in numbers]  # numbers, as in the source
    columns = [{"text": text, "a": row % 2, "b": 1} for row, text in enumerate(texts)]
    found = check_rows(tmp_path, columns, label_columns=["a", "b"])
    write_cleaned(found, ["empty"], tmp_path / "c.parquet", 0.8)
    again = load_records(
        DataConfig(train_file=[str(tmp_path / "c.parquet")], label_columns=["a", "b"]), "train"
    )
    assert [again[row].label for row in range(4)] == [("b",), ("a", "b"), ("b",), ("a", "b")]


def test_pairs_keep_both_columns(tmp_path: Path) -> None:
    rows = [
        {"sentence1": row["text"], "sentence2": row["text"][::-1], "label": row["label"]}
        for row in clean_rows(40)
    ]
    rows.append(dict(rows[7]))
    found, _, counted = fix(check_rows(tmp_path, rows), tmp_path)
    assert (
        found == [(row["sentence1"], row["sentence2"], row["label"]) for row in rows[:40]]
        and counted["duplicates"] == 1
    )


def test_nothing_left_is_one_line(tmp_path: Path) -> None:
    found = check_rows(tmp_path, [{"text": " ", "label": "a"}, {"text": "", "label": "b"}])
    with pytest.raises(DataError, match=r"^--fix would leave none of the 2 rows"):
        fix(found, tmp_path)
    assert not (tmp_path / "clean.parquet").exists()
