"""The readers under a small share of `python -m bench.fuzz`: only a BertdistError may come out."""

from pathlib import Path
from typing import Any

import pytest

from bench import fuzz
from bertdist.core.errors import DataError
from bertdist.data import bad_rows

INPUTS = 25  # of each reader; 100,000 in all by `python -m bench.fuzz`


@pytest.mark.parametrize("which", range(14))
def test_only_a_bertdist_error_comes_out_of_a_reader(which: int, tmp_path: Path) -> None:
    reader = fuzz.readers(tmp_path)[which]
    read, refused = fuzz.fuzz(reader, INPUTS)
    assert read + refused >= INPUTS // 2


def test_every_reader_is_tried(tmp_path: Path) -> None:
    assert len(fuzz.readers(tmp_path)) == 14


def test_what_else_comes_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: a reader that does not look at the types of what it reads."""
    monkeypatch.setattr(bad_rows, "validated", lambda row: row.file.lower() and row)
    assert fuzz.main(["--reader", "bad_rows.jsonl", "--inputs", "5000"]) == 1
    assert "AttributeError" in capsys.readouterr().out


def test_an_error_for_the_user_is_no_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise DataError("no")

    monkeypatch.setattr(fuzz, "load_records", refuse)
    assert fuzz.main(["--reader", "csv", "--inputs", "100"]) == 0
    assert "12 refused" in capsys.readouterr().out
