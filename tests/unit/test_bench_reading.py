"""What bench.reading measures is what a loader worker does, and its limit is where reading and training take the same time."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from rows import make_rows, write_rows

from bench import reading
from bertdist.core.config import ModelConfig
from bertdist.data.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("rows") / "train.tsv", make_rows(60)))


def words(file: str, model: Path, *more: str) -> list[str]:
    return [
        "--train_file",
        file,
        "--model_name_or_path",
        str(model),
        "--megabytes",
        "1",
        "--repetitions",
        "2",
        *more,
    ]


def test_reading_and_encoding_are_told_apart_by_hand() -> None:
    read, encoded = reading.split(
        [10.0, 7.0], [4.0, 4.0], 4
    )  # read + encode = 10, read + encode / 4 = 4
    assert (read, encoded) == ([2.0, 3.0], [8.0, 4.0])


def test_at_the_limit_both_take_the_same_time() -> None:
    read, encoded, trained, workers = 1000.0, 50.0, 10.0, 4
    ranks = reading.most_ranks(read, encoded, trained, workers)
    assert ranks == 95
    assert 1 / read + 1 / (ranks * workers * encoded) == pytest.approx(1 / (ranks * trained))
    assert (
        reading.most_ranks(read, encoded, 201.0, workers) < 0
    )  # tokenizing alone is too slow: more workers, not more files


@pytest.mark.parametrize("kind", reading.KINDS)
def test_every_kind_of_file_holds_the_same_rows(
    kind: str, file: str, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny_model)))
    args = reading.parser().parse_args(words(file, tiny_model))
    args.megabytes = 0
    rows = reading.read_rows(args, tokenizer, 2)
    assert len(rows.texts) == len(rows.labels) == 30
    assert {len(rows.tokens), rows.texts[0].count("  ")} == {30, 0}
    path = reading.write_file(tmp_path, kind, rows)
    assert reading.seconds_a_row(path, rows, tokenizer, 128, 1) > 0  # it asserts that all rows came
    reading.write_file(
        tmp_path,
        kind,
        reading.Rows(texts=rows.texts[1:], labels=rows.labels[1:], tokens=[], task=rows.task),
    )
    with pytest.raises(AssertionError):
        reading.seconds_a_row(path, rows, tokenizer, 128, 1)


def test_reading_writes_its_section(
    file: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_few(args: Any, *rest: Any) -> Any:
        return read_rows(Namespace(**{**vars(args), "megabytes": 0.05}), *rest)

    read_rows = reading.read_rows
    monkeypatch.setattr(reading, "read_rows", read_few)
    assert (
        reading.main(
            words(
                file,
                tiny_model,
                "--texts_a_row",
                "3",
                "--tflops",
                "60",
                "--output",
                str(tmp_path / "page.md"),
            )
        )
        == 0
    )
    text = (tmp_path / "page.md").read_text()
    assert "<!-- bench: reading -->" in text and "### Rows of" in text
    for kind in reading.KINDS:
        assert len(re.findall(rf"^\| {re.escape(kind)} \|", text, flags=re.MULTILINE)) == 2
    assert capsys.readouterr().out.strip() in text


@pytest.mark.parametrize("missing", ["--train_file", "--model_name_or_path", "--text_column"])
def test_reading_tells_what_is_missing(
    missing: str, file: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reading.main(words(file, tiny_model, missing, "gone")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ") and "gone" in line
