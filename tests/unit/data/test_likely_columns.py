"""Which columns hold texts and labels by their values, as messages suggest them."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError, NoLabelsError
from bertdist.data.likely_columns import describe_likely
from bertdist.data.load_data import check_files, load_records, open_stream

ROWS = 30
COLUMNS: dict[str, list[Any]] = {
    "id": list(range(ROWS)),
    "airline": ["Virgin"] * ROWS,  # one value
    "retweets": [row % 4 for row in range(ROWS)],
    "gold_sentiment": ["", "good", "bad"] * 10,  # not in every row
    "airline_sentiment": ["positive", "negative", "neutral"] * 10,
    "confidence": [row / 7 for row in range(ROWS)],
    "message": [f"flight number {row} was late" for row in range(ROWS)],
    "place": ["Rome", "Paris"] * 15,
    "date": [f"2015-02-{row:02}" for row in range(ROWS)],
}
LABELS = "'airline_sentiment' (negative, neutral, positive)"
OTHERS = "'place' (Paris, Rome) or 'retweets' (0, 1, 2, 3)"


def test_a_label_has_few_values_and_a_text_is_long() -> None:
    def likely(*lacking: str, **columns: Any) -> str:
        return describe_likely(lambda: columns or COLUMNS, lacking)

    label = f"label in {LABELS} or {OTHERS}"
    assert likely("text", "label") == f" By their values: text in 'message'; {label}."
    assert likely("label") == f" By their values: {label}."
    arrays = {name: pa.chunked_array([pa.array(column)]) for name, column in COLUMNS.items()}
    assert likely("label", **arrays) == likely("label")
    assert likely("label", a=["x", "y", "z", "x"], b=[0.5, 0.25, 0.5, 0.25]) == ""  # 3 of 4 rows
    assert likely("text", a=["1", "22"], b=[1, 2]) == "" and likely("text", a=["a"]) == ""
    assert likely("text", a=["long text", None, math.nan], b=["x", "y", "z"]).endswith("'a'.")
    assert "'message'" not in describe_likely(lambda: COLUMNS, ["text"], {"message"})

    def fails() -> dict[str, Any]:
        raise DataError("line 3: another error")

    assert describe_likely(fails, ["text"]) == ""


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_the_message_of_every_command_suggests_columns(kind: str, tmp_path: Path) -> None:
    rows = [{name: column[row] for name, column in COLUMNS.items()} for row in range(ROWS)]
    file = tmp_path / f"a.{kind}"
    lines = [json.dumps(row) for row in rows]
    if kind == "csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        lines = [",".join(COLUMNS), *lines]
    text = f"[{','.join(lines)}]" if kind == "json" else "\n".join(lines)
    file.write_text(text + "\n", encoding="utf-8")
    data = DataConfig(train_file=[str(file)])
    found = f" Pass --text_column and --label_column. By their values: text in 'message'; label in {LABELS} or {OTHERS}. The 9 columns are "
    for read in (lambda: load_records(data, "train"), lambda: open_stream(data, 1)):
        with pytest.raises(DataError) as caught:
            read()
        assert found in str(caught.value)
    with pytest.raises(DataError) as caught:
        check_files(data.train_file or [], data)  # before torch is imported
    assert found in str(caught.value)
    named = DataConfig(train_file=[str(file)], text_column=["message"], label_column="label")
    with pytest.raises(NoLabelsError) as error:
        load_records(named, "train")
    assert (
        f"there is no column 'label'. Name another one with --label_column. By their values: label in {LABELS}"
        in str(error.value)
    )
    near = DataConfig(train_file=[str(file)], text_column=["mesage"])
    with pytest.raises(DataError, match=r"Did you mean 'message'\? The"):  # the control
        load_records(near, "train")
