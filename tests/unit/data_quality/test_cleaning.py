"""--fix writes rows that can be trained on, and lists every other row with the reason."""

import csv
import gzip
import io
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_checks import check_rows, clean_rows, kinds
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from rows import write_rows

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_records
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
    done = write_cleaned(found, list(kinds), path, 0.8)
    counted = {**done.dropped, "rows": done.rows}
    if "encoding" in kinds:
        counted["encoding"] = done.repaired
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


# ---- All columns, in every format


COLUMNS: dict[str, list[Any]] = {
    "id": [f"{2**53 + row:020d}" for row in range(40)],  # text with zeros in front
    "day": [date(2020, 2, 1 + row % 28) for row in range(40)],
    "text": [row["text"] for row in clean_rows(40)],
    "number": [2**60 + row for row in range(40)],
    "share": [None if row % 7 == 0 else row / 7 for row in range(40)],
    "seen": [row % 3 == 0 for row in range(40)],
    "tags": [["a", 'b "c"'][: row % 3] for row in range(40)],
    "label": ["bad", "good"] * 20,
    "note": ['say "hi"', "two\nlines\r\nof it", "a\ttab, a comma", "", "😀"] * 8,
}
LABELS: dict[str, list[Any]] = {
    "words": ["bad", "good"] * 20,
    "numbers": [3, 1] * 20,
    "scores": [row / 8 for row in range(40)],
    "bools": [True, False] * 20,
    "lists": [["a", "b, c"], ["b, c"], []] * 13 + [["a"]],
    "vectors": [[0, 1], [1, 1], [0, 0], [1, 0]] * 10,
}
ENDINGS = ["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz"]


def read_table(path: Path) -> list[dict[str, Any]]:
    """The cells of a file, read by the standard library or pyarrow."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.split("\n")[:-1]]
    delimiter = "," if ".csv" in path.name else "\t"
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))


def as_cell(value: Any, ending: str) -> Any:
    """A value of parquet, as another format has it."""
    if ending == "parquet":
        return value
    value = str(value) if isinstance(value, date) else value
    if ending.startswith("jsonl") or isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("ending", ENDINGS)
def test_all_columns_are_written_as_they_were(tmp_path: Path, ending: str) -> None:
    columns = {name: [*values, values[2]] for name, values in COLUMNS.items()}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = check_data(DataConfig(train_file=[str(tmp_path / "t.parquet")]))
    path = tmp_path / f"clean.{ending}"
    done = write_cleaned(found, ["duplicates"], path, 0.8)
    assert (done.rows, done.columns, done.dropped) == (40, 9, {"duplicates": 1})
    rows = read_table(path)
    assert list(rows[0]) == list(COLUMNS)  # in the order of the input
    for name, values in COLUMNS.items():
        assert [row[name] for row in rows] == [as_cell(x, ending) for x in values], name
    if ending == "parquet":
        types = [pa.table(COLUMNS).schema.field(name).type for name in COLUMNS]
        assert pq.read_schema(path).types == types
    again = check_data(DataConfig(train_file=[str(path)]))
    assert kinds(again) == [] and len(again.splits["train"]) == 40


@pytest.mark.parametrize("source", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", list(LABELS))
def test_labels_survive_every_format(tmp_path: Path, source: str, kind: str) -> None:
    """From every format into every format: the same texts and labels for training."""
    rows = [
        {"x": f"{row:03d}", "text": text, "label": label}
        for row, (text, label) in enumerate(zip(COLUMNS["text"], LABELS[kind], strict=True))
    ]
    rows[3]["text"] = 'the "first\nsecond" line'
    rows[5]["text"] = '"quoted" all\tover'
    names = list(rows[0])
    file = tmp_path / f"t.{source}"
    if source == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif source == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(file, "w", newline="") as out:
            writer = csv.writer(out, delimiter="," if source == "csv" else "\t")
            writer.writerows([names, *([as_cell(row[x], "csv") for x in names] for row in rows)])
    data = DataConfig(train_file=[str(file)], quoting="double" if source == "tsv" else "auto")
    found = check_data(data, near_threshold=0)
    expected = [record.label for record in found.splits["train"]]
    assert len(set(expected)) >= 2
    for ending in ENDINGS[:4]:
        done = write_cleaned(found, ["duplicates"], tmp_path / f"clean.{ending}", 0)
        flags = done.flags.split()[2:]
        again = load_records(
            DataConfig(
                train_file=[str(tmp_path / f"clean.{ending}")],
                quoting="double" if flags == ["--quoting", "double"] else "auto",
            ),
            "train",
        )
        assert flags in ([], ["--quoting", "double"])
        assert [record.text for record in again] == [row["text"] for row in rows]
        assert [record.label for record in again] == expected
        assert again.label_kind == found.splits["train"].label_kind


def test_a_tsv_without_quoting_stays_one(tmp_path: Path) -> None:
    """Quotes around fields would be text where such a file is read."""
    rows = clean_rows(40)
    rows[3]["text"] = '"a" quote, and "another'
    train = [*rows, rows[7]]
    lines = ["text\tlabel", *("\t".join(row.values()) for row in train)]
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    found = check_data(DataConfig(train_file=[str(tmp_path / "t.tsv")]))
    done = write_cleaned(found, ["duplicates"], tmp_path / "clean.tsv", 0.8)
    assert (tmp_path / "clean.tsv").read_text() == "\n".join(lines[:-1]) + "\n"
    assert done.flags == f"--train_file {tmp_path / 'clean.tsv'}"
    write_cleaned(found, ["duplicates"], tmp_path / "clean.csv", 0.8)  # the control
    assert '"""a"" quote' in (tmp_path / "clean.csv").read_text()


def test_rows_of_several_files_and_skipped_ones(tmp_path: Path) -> None:
    """Skipped rows are listed with their reason, and of two files every row has its columns."""
    first, second = clean_rows(30), clean_rows(30, 1)
    lines = ["id,text,label", *(f"{n},{row['text']},{row['label']}" for n, row in enumerate(first))]
    lines.insert(5, "a,b")
    lines.insert(9, "9,no label,")
    lines.append(lines[2])
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    objects = [{**row, "deep": {"n": n}} for n, row in enumerate(second)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects) + "{x\n")
    files = [str(tmp_path / name) for name in ("a.csv", "b.jsonl")]
    found = check_data(DataConfig(train_file=files, on_bad_row="skip"))
    done = write_cleaned(found, ["duplicates"], tmp_path / "c.jsonl", 0.8)
    assert (done.rows, done.skipped, done.columns) == (60, 3, 4)
    rows = read_table(tmp_path / "c.jsonl")
    assert rows == [*({"id": str(n), **row} for n, row in enumerate(first)), *objects]
    listed = [
        json.loads(line) for line in dropped_path(tmp_path / "c.jsonl").read_text().split("\n")[:-1]
    ]
    assert [(x["file"], x["line"], x["action"]) for x in listed] == [
        ("a.csv", 34, "dropped"),
        ("a.csv", 6, "skipped"),
        ("a.csv", 10, "skipped"),
        ("b.jsonl", 31, "skipped"),
    ]
    assert listed[1]["reason"].startswith("2 fields, expected 3") and listed[1]["text"] == "a,b"
    write_cleaned(found, ["duplicates"], tmp_path / "c.csv", 0.8)
    table = read_table(tmp_path / "c.csv")
    assert list(table[0]) == ["id", "text", "label", "deep"]
    assert (table[0]["deep"], table[-1]["deep"], table[-1]["id"]) == ("", '{"n": 29}', "")


def test_a_repair_changes_its_column_only(tmp_path: Path) -> None:
    """Also a field of an object, and one of two joined columns."""
    rows = [
        {"title": f"t {n}", "review": {"text": row["text"], "by": "cafÃ©"}, "label": row["label"]}
        for n, row in enumerate(clean_rows(40))
    ]
    rows[6]["review"]["text"] = "un cafÃ© noir"  # type: ignore[index]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    expected = json.loads(json.dumps(rows))
    expected[6]["review"]["text"] = "un café noir"
    for source in ("jsonl", "parquet"):
        data = DataConfig(
            train_file=[str(tmp_path / f"t.{source}")], text_column=["title", "review.text"]
        )
        done = write_cleaned(check_data(data), ["encoding"], tmp_path / "c.jsonl", 0.8)
        assert done.repaired == 1 and read_table(tmp_path / "c.jsonl") == expected
        write_cleaned(check_data(data), ["encoding"], tmp_path / "c.parquet", 0.8)
        assert read_table(tmp_path / "c.parquet") == expected
        with pytest.raises(DataError, match=r"--fix .*c\.csv: read again, these rows would not be"):
            write_cleaned(check_data(data), ["encoding"], tmp_path / "c.csv", 0.8)
        assert not (tmp_path / "c.csv").exists()


def test_columns_without_a_name_are_named(tmp_path: Path) -> None:
    rows = [f"{n},{row['text']},x,{row['label']}" for n, row in enumerate(clean_rows(40))]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    data = DataConfig(train_file=[str(tmp_path / "t.csv")], column_names=["_", "text", "_", "y"])
    found = check_data(replace(data, label_column="y"))
    done = write_cleaned(found, ["empty"], tmp_path / "c.csv", 0.8)
    assert done.notes == ("t.csv: 2 columns named _ are not written",)
    assert list(read_table(tmp_path / "c.csv")[0]) == ["text", "y"]
    data = replace(data, column_names=["id", "text", "_", "label"])
    done = write_cleaned(check_data(data), ["empty"], tmp_path / "d.csv", 0.8)
    assert done.notes == ("t.csv: 1 column named _ is not written",)
    data = replace(data, column_names=["id", "text", "z", "label"])  # the control
    done = write_cleaned(check_data(data), ["empty"], tmp_path / "e.csv", 0.8)
    assert done.notes == () and done.columns == 4


def test_the_names_of_class_labels_are_written(tmp_path: Path) -> None:
    rows = clean_rows(40)
    columns: dict[str, Any] = {"id": Value("int64"), "text": Value("string")}
    features = Features({**columns, "label": ClassLabel(names=["neg", "pos"])})
    values = {"id": range(40), "text": [row["text"] for row in rows], "label": [0, 1] * 20}
    dataset = Dataset.from_dict(values, features=features)
    DatasetDict(train=dataset).save_to_disk(tmp_path / "hub")
    found = check_data(DataConfig(dataset_name=str(tmp_path / "hub")))
    done = write_cleaned(found, ["empty"], tmp_path / "c.parquet", 0.8)
    expected = [{**row, "id": n, "label": ["neg", "pos"][n % 2]} for n, row in enumerate(rows)]
    assert done.columns == 3 and read_table(tmp_path / "c.parquet") == expected


def test_a_file_that_has_changed_is_not_written(tmp_path: Path) -> None:
    found = check_rows(tmp_path, clean_rows(40))
    write_rows(tmp_path / "train.jsonl", clean_rows(40, 1))
    with pytest.raises(DataError, match=r"train\.jsonl has changed while it was read"):
        write_cleaned(found, ["empty"], tmp_path / "c.csv", 0.8)
    assert not (tmp_path / "c.csv").exists()


def test_rows_that_are_dropped_do_not_make_names_of_labels_zeros_and_ones(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"{text}", "label": [number % 2, 1 - number % 2]}
        for number, text in enumerate(row["text"] for row in clean_rows(30))
    ]
    rows.append({"text": " ", "label": [1]})
    found = check_rows(tmp_path, rows, ending="jsonl")
    with pytest.raises(DataError, match="which training would read as zeros and ones"):
        fix(found, tmp_path)
    assert not (tmp_path / "clean.parquet").exists()
    rows[0]["label"] = [1]
    written, _, counted = fix(check_rows(tmp_path, rows, ending="jsonl"), tmp_path)
    assert counted["rows"] == 30 and written[0][-1] == ("1",), "the control: one is left"
