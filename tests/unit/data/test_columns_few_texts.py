"""Texts become an Arrow array without importing pandas, which costs 0.3 s of a start."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from bertdist.core.errors import DataError
from bertdist.data.columns import text_array
from bertdist.data.in_memory import records_from_texts

TEXTS = ["", "a\0b", "é😀", "line\nbreak", "x" * 70_000]


@pytest.mark.parametrize("texts", [TEXTS, [], [""], TEXTS * 1000])
def test_the_array_is_that_of_arrow(texts: list[str]) -> None:
    found = text_array(texts)
    found.validate(full=True)
    assert found.equals(pa.array(texts, pa.large_string()))
    assert not found.equals(pa.array([*texts, "y"], pa.large_string()))  # the control


def test_a_lone_surrogate_is_named() -> None:
    with pytest.raises(DataError, match="row 1: column 'text' has a lone surrogate"):
        records_from_texts(["a", "b\ud800"])


PROGRAM = """
import sys
from bertdist.core.config import DataConfig
from bertdist.data.in_memory import records_from_texts
from bertdist.data.load_data import load_records
records_from_texts(["a", "b"])
for file in sys.argv[1:]:
    load_records(DataConfig(train_file=[file]), "train")
    print(file[-3:], "pandas" in sys.modules)
import pyarrow
pyarrow.array(["a"])
print("control", "pandas" in sys.modules)
"""


def test_reading_imports_no_pandas(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.csv", "a.tsv")]
    files[0].write_text('text,label\n"a, b",0\nb,1\n', encoding="utf-8")
    files[1].write_text("text\tlabel\na\tx\nb\ty\n", encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, *map(str, files)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == "csv False\ntsv False\ncontrol True\n", found.stderr
