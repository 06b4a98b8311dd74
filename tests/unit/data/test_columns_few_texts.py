"""A few texts become an Arrow array as many do, without importing pandas."""

import subprocess
import sys

import pyarrow as pa
import pytest

from bertdist.core.errors import DataError
from bertdist.data import columns
from bertdist.data.records import records_from_texts

TEXTS = ["", "a\0b", "é😀", "line\nbreak", "x" * 70_000]


def test_few_texts_equal_many(monkeypatch: pytest.MonkeyPatch) -> None:
    few = records_from_texts(TEXTS)
    monkeypatch.setattr(columns, "FEW_TEXTS", 0)
    many = records_from_texts(TEXTS)
    assert few.texts.equals(many.texts) and few.texts.type == pa.large_string()
    assert few.texts.to_pylist() == TEXTS and few.fingerprint == many.fingerprint
    assert not records_from_texts([*TEXTS[:4], "y"]).texts.equals(many.texts)  # the control


def test_a_lone_surrogate_is_named() -> None:
    with pytest.raises(DataError, match="row 1: column 'text' has a lone surrogate"):
        records_from_texts(["a", "b\ud800"])


def test_few_texts_import_no_pandas() -> None:
    code = (
        "import sys\nfrom bertdist.data import columns, records\n"
        "for columns.FEW_TEXTS in (1000, 0):\n"
        "    records.records_from_texts(['a'])\n"
        "    print('pandas' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\nTrue\n"
