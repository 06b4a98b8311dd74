"""A header among the rows, as of files that were joined, is refused or skipped, in memory and streamed."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_records, open_stream

MESSAGE = "every column holds its own name: a header, as of joined files; remove that row"

TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "one label": ("text,label\na,1\nb,0\ntext,label\nc,1\n", {}),
    "numbers": ("text,score\na,1.5\nb,0.5\ntext,score\nc,2.5\n", {}),
    "pairs": ("sentence1,sentence2,label\na,b,1\nb,c,0\nsentence1,sentence2,label\nc,d,1\n", {}),
    "label columns": ("text,x,y\na,1,0\nb,0,1\ntext,x,y\nc,1,1\n", {"label_columns": ["x", "y"]}),
    "with its mark": ("text,label\na,1\nb,0\n\ufefftext,label\nc,1\n", {}),
    "label first": ("label,text\n1,a\n0,b\n\ufefflabel,text\n1,c\n", {}),
    "with mark and quotes": ('"text","label"\na,1\nb,0\n\ufeff"text","label"\nc,1\n', {}),
    "no header": ("z,1\na,1\nb,0\ntext,label\nc,1\n", {"column_names": ["text", "label"]}),
}


def config(path: Path, content: str, **flags: Any) -> DataConfig:
    path.write_text(content)
    return DataConfig(train_file=[str(path)], **flags)


@pytest.mark.parametrize("name", TABLES)
def test_a_header_among_the_rows_is_refused(name: str, tmp_path: Path) -> None:
    content, flags = TABLES[name]
    data = config(tmp_path / "a.csv", content, **flags)
    for load in (lambda: load_records(data, "train"), lambda: open_stream(data, 0).head()):
        with pytest.raises(DataError, match=f"^a.csv line 4: {MESSAGE}.") as error:
            load()
        assert str(error.value).endswith(" --on_bad_row skip leaves such rows out.")


@pytest.mark.parametrize("name", TABLES)
def test_it_can_be_skipped(name: str, tmp_path: Path) -> None:
    content, flags = TABLES[name]
    data = config(tmp_path / "a.csv", content, on_bad_row="skip", **flags)
    for records in (load_records(data, "train"), open_stream(data, 0).head()):
        assert records.texts.to_pylist()[-3:] == ["a", "b", "c"]
        assert [(row.line, row.reason) for row in load_records(data, "train").bad_rows] == [
            (4, MESSAGE)
        ]


@pytest.mark.parametrize("as_category", [False, True])
def test_in_parquet_too(as_category: bool, tmp_path: Path) -> None:
    labels = pd.Series(["1", "0", "label", "1"]).astype("category" if as_category else "object")
    pd.DataFrame({"text": ["a", "b", "text", "c"], "label": labels}).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=f"^a.parquet row 2: {MESSAGE}"):
        load_records(DataConfig(train_file=[str(tmp_path / "a.parquet")]), "train")


def test_a_name_in_one_column_is_content(tmp_path: Path) -> None:
    data = config(tmp_path / "a.csv", "text,label\ntext,x\nb,label\nlabel,text\nc,x\nd,label\n")
    assert load_records(data, "train").label_values == ["x", "label", "text"]
