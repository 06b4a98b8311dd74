"""Which columns are read where several have usual names, and whether a .txt has a header."""

from pathlib import Path

import pytest

from bertdist.core.config import DataConfig, PredictConfig
from bertdist.data.load_data import load_records, load_texts, open_stream
from bertdist.data.records import ColumnNames

ROWS = "text,label\na,1\nb,0\n"


@pytest.mark.parametrize(
    ("header", "flags", "note"),
    [
        ("text,label,Score,class", {}, "label in 'label', not 'Score', 'class' (--label_column)"),
        (
            "tweet,content,target,id",
            {},
            "text in 'tweet', not 'content' (--text_column)",
        ),
        ("tweet,content,target,id", {"text_column": ["content"]}, ""),
        ("text,label,score,class", {"label_column": "score"}, ""),
        ("text,label,id,x", {}, ""),
        ("premise,hypothesis,label,idx", {}, ""),
    ],
)
def test_columns_that_were_not_taken_are_named(
    header: str, flags: dict[str, list[str]], note: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(header + "\n" + "a,b,1,2\nc,d,0,3\n")
    data = DataConfig(train_file=[str(path)], **flags)  # type: ignore[arg-type]
    notes = (f"Columns by their usual names: {note}",) if note else ()
    assert load_records(data, "train").format_notes == open_stream(data, 0).format_notes == notes


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("text, image\nhello, world\n", ["text, image", "hello, world"]),
        ("text,label\nhello,1\n", ["hello"]),
        ("text,id\nhello,1\n", ["hello"]),
    ],
)
def test_the_first_text_of_a_txt_is_no_header(
    content: str, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    trained = ColumnNames("text", None, None, [])
    assert load_texts(str(path), PredictConfig(model="m"), trained).texts.to_pylist() == texts
    asked = PredictConfig(model="m", text_column=["text"])  # the control
    assert load_texts(str(path), asked, trained).texts.to_pylist() == ["hello"]
