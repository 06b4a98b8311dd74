"""A quote that swallows rows of a table is refused, in memory and streamed; texts of many lines are not."""

from pathlib import Path
from typing import Any

import pytest

from bertdist.core.config import DataConfig, PredictConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_records, load_texts, open_stream
from bertdist.data.records import ColumnNames

MESSAGE = "other rows of the table, from a quote that opened by mistake to the next one"

# header and rows, of which the first swallows two others
SWALLOWED = {
    "text first": ["text,label", '"fine,good', "dull,bad", 'poor",bad', "warm,good"],
    "label first": ["label,text", 'good,"fine', "bad,dull", 'bad,poor"', "bad,warm"],
    "a column beyond": [
        "id,text,label",
        '1,"fine,good',
        "2,dull,bad",
        '3,poor",bad',
        "4,warm,good",
    ],
    "numbers": ["text,score", '"fine,0.5', "dull,1.25", 'poor",2.5', "warm,3.5"],
}
KEPT = {
    "prose": ["text,label", '"Overall, good\nthen, bad\nfine, good",good', "dull,bad"],
    "a letter": ["text,label", '"Dear all,\nit is, in short, good\nYours",good', "dull,bad"],
    "two lines": ["text,label", '"fine,good\ndull",bad', "warm,good"],
}


def config(path: Path, lines: list[str], **flags: Any) -> DataConfig:
    path.write_text("\n".join(lines) + "\n")
    return DataConfig(train_file=[str(path)], **flags)


@pytest.mark.parametrize("name", SWALLOWED)
def test_swallowed_rows_are_refused(name: str, tmp_path: Path) -> None:
    data = config(tmp_path / "a.csv", SWALLOWED[name])
    with pytest.raises(DataError, match=rf"^a.csv line 2: column 'text' holds 2 {MESSAGE}"):
        load_records(data, "train")
    with pytest.raises(DataError, match=rf"^a.csv line 2: column 'text' holds 2 {MESSAGE}"):
        open_stream(data, 0).head()


@pytest.mark.parametrize("name", SWALLOWED)
def test_flags_overrule_it(name: str, tmp_path: Path) -> None:
    lines = SWALLOWED[name]
    kept = load_records(config(tmp_path / "a.csv", lines, quoting="double"), "train")
    assert len(kept) == 2 and kept.texts[0].as_py().count("\n") == 2
    every = load_records(config(tmp_path / "b.csv", lines, quoting="none"), "train")
    assert len(every) == 4
    skipped = load_records(config(tmp_path / "c.csv", lines, on_bad_row="skip"), "train")
    assert len(skipped) == 1 and MESSAGE in skipped.bad_rows[0].reason


@pytest.mark.parametrize("name", KEPT)
def test_texts_of_several_lines_are_kept(name: str, tmp_path: Path) -> None:
    records = load_records(config(tmp_path / "a.csv", KEPT[name]), "train")
    assert len(records) == 2 and "\n" in records.texts[0].as_py()


def test_label_columns_and_a_second_text(tmp_path: Path) -> None:
    lines = ["text,joy,fear", '"fine,1,0', "dull,0,1", 'poor",0,0', "warm,1,1"]
    with pytest.raises(DataError, match=f"column 'text' holds 2 {MESSAGE}"):
        load_records(config(tmp_path / "a.csv", lines, label_columns=["joy", "fear"]), "train")
    lines = ["premise,hypothesis,label", 'a,"b,yes', "c,d,no", 'e,f",no', "g,h,yes"]
    with pytest.raises(DataError, match=f"column 'hypothesis' holds 2 {MESSAGE}"):
        load_records(config(tmp_path / "b.csv", lines), "train")


def texts_of(path: Path, lines: list[str], **flags: Any) -> int:
    """The number of texts that prediction reads."""
    path.write_text("\n".join(lines) + "\n")
    settings = PredictConfig(model="m", **flags)
    trained = ColumnNames("text", None, None, [])
    return len(load_texts(str(path), settings, trained, ["good", "bad"]))


@pytest.mark.parametrize(
    "lines",
    [*(lines for name, lines in SWALLOWED.items()), ["id,text", '1,"fine', "x-2,dull", '3,poor"']],
)
def test_prediction_refuses_swallowed_rows_too(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^a.csv line 2: column 'text' holds 2 {MESSAGE}"):
        texts_of(tmp_path / "a.csv", lines)
    assert texts_of(tmp_path / "a.csv", lines, quoting="none") == len(lines) - 1
    assert texts_of(tmp_path / "a.csv", lines, quoting="double") == len(lines) - 3


@pytest.mark.parametrize(
    "lines", [*KEPT.values(), ["id,text", 'a,"fine\nwell, so\nto say, it"', "b,dull"]]
)
def test_prediction_keeps_texts_of_several_lines(lines: list[str], tmp_path: Path) -> None:
    assert texts_of(tmp_path / "a.csv", lines) == 2
