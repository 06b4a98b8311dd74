"""Rows held out of the training files: which, in memory and streams, with other flags, in messages."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bertdist.core.args import read_config
from bertdist.core.errors import ConfigError, DataError
from bertdist.data.in_memory import records_from_texts
from bertdist.data.load_data import load_parts, load_splits
from bertdist.data.records import Records
from bertdist.data.streaming import Stream
from bertdist.data.train_test_split import HoldOut, text_numbers

LABELS = ["bad", "good", "mixed"]


def write(path: Path, rows: int, start: int = 0, extra: Sequence[str] = ()) -> str:
    """Rows of three labels, in shares of 6, 3 and 1, every text once and every fifth in capitals again."""
    lines = []
    for row in range(start, start + rows):
        text, label = f"text number {row}", LABELS[[0, 0, 0, 0, 0, 0, 1, 1, 1, 2][row * 7 % 10]]
        lines.append(f"{text}\t{label}")
        lines += [f"{text.upper()} \t{label}"] * (row % 5 == 0)
    path.write_text("\n".join(["text\tlabel", *lines, *extra, ""]), encoding="utf-8")
    return str(path)


def splits(*words: str) -> tuple[Records | Stream, Records | None]:
    config = read_config(["--model_name_or_path=m", "--output_dir=o", *words])
    return load_splits(config)[:2]


def in_memory(*words: str) -> tuple[Records, Records]:
    train, validation = splits(*words)
    assert isinstance(train, Records) and validation is not None
    return train, validation


def texts(records: Records) -> list[str]:
    return records.texts.to_pylist()  # type: ignore[no-any-return]


def streamed(stream: Records | Stream) -> list[Records]:
    assert isinstance(stream, Stream)
    return [window.records for window in stream.windows() if len(window.records)]


def test_every_row_is_in_one_part_and_located_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "t.tsv", 1000)
    config = read_config(
        f"--model_name_or_path=m --output_dir=o --train_file {file} --validation_split 0.1 --test_split 0.2".split()
    )
    parts = load_parts(config.data, config.task, config.run.seed)
    assert list(parts) == ["train", "validation", "test"]
    assert sum(map(len, parts.values())) == 1200
    lines = (tmp_path / "t.tsv").read_text().split("\n")
    seen = []
    for records in parts.values():
        for row in range(len(records)):
            location, record = records.location(row), records[row]
            assert location.line is not None
            assert lines[location.line - 1] == f"{record.text}\t{record.label}"
            seen.append(location.line)
    assert sorted(seen) == list(range(2, 1202))
    shares = {
        name: len({text.strip().lower() for text in texts(rows)}) for name, rows in parts.items()
    }
    assert shares["validation"] == pytest.approx(100, abs=30)  # 3 standard deviations
    assert shares["test"] == pytest.approx(200, abs=38)
    assert (
        sum(shares.values()) == 1000
    )  # texts that are equal up to case and white space are together
    alone = load_parts(
        read_config(
            [
                "--model_name_or_path=m",
                "--output_dir=o",
                "--train_file",
                file,
                "--validation_split=0.1",
            ]
        ).data,
        config.task,
        42,
    )
    assert texts(alone["validation"]) == texts(parts["validation"])  # whatever --test_split


def test_the_part_of_a_row_is_decided_by_seed_and_text_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "t.tsv", 300)
    _, held = in_memory("--train_file", file, "--validation_split", "0.2")
    # Rows before and after, another order, other labels, another file: the same rows are held out.
    rows = (tmp_path / "t.tsv").read_text().splitlines()[1:]
    more = [f"another text {row}\tbad" for row in range(500)]
    turned = [row.replace("\tbad", "\tgood") for row in reversed(rows)]
    (tmp_path / "u.tsv").write_text("\n".join(["text\tlabel", *more, *turned]) + "\n")
    _, later = in_memory("--train_file", str(tmp_path / "u.tsv"), "--validation_split", "0.2")
    assert set(texts(held)) == {text for text in texts(later) if not text.startswith("another")}
    # The control: another seed.
    _, other = in_memory("--train_file", file, "--validation_split", "0.2", "--seed", "43")
    assert set(texts(other)) != set(texts(held))
    # A larger share holds out the same rows and more.
    _, larger = in_memory("--train_file", file, "--validation_split", "0.3")
    assert set(texts(held)) < set(texts(larger))
    # Written down once: a release that holds out other rows would mix training and validation rows.
    held_out = [text for text in texts(held) if text.islower()][:6]
    assert held_out == FIRST_HELD_OUT, held_out


FIRST_HELD_OUT = [f"text number {row}" for row in (2, 6, 10, 20, 27, 32)]


def test_labels_are_held_out_by_their_shares(tmp_path: Path) -> None:
    """Within the binomial error of every label: |z| < 4, for 20 seeds and 3 labels."""
    file = write(tmp_path / "t.tsv", 3000)
    (tmp_path / "t.tsv").write_text(
        "\n".join(line for line in Path(file).read_text().split("\n") if "TEXT" not in line)
    )
    scores = []
    for seed in range(20):
        train, held = in_memory(
            "--train_file", file, "--validation_split", "0.1", "--seed", str(seed)
        )
        for label in LABELS:
            counts = [sum(record.label == label for record in rows) for rows in (train, held)]
            number = sum(counts)
            scores.append((counts[1] - 0.1 * number) / np.sqrt(number * 0.1 * 0.9))
    assert max(map(abs, scores)) < 4 and 0.8 < np.std(scores) < 1.2  # and not less: it is binomial


@pytest.mark.parametrize("name", ["t.tsv", "t.jsonl"])
def test_a_stream_holds_out_the_same_rows(tmp_path: Path, name: str) -> None:
    files = [write(tmp_path / "a.tsv", 300), write(tmp_path / "b.tsv", 200, start=300)]
    if name.endswith("jsonl"):
        for at, file in enumerate(files):
            rows = [line.split("\t") for line in Path(file).read_text().splitlines()[1:]]
            lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
            files[at] = file.replace(".tsv", ".jsonl")
            Path(files[at]).write_text("\n".join(lines) + "\n")
    words = ["--train_file", *files, "--validation_split", "0.1", "--test_split", "0.1"]
    train, held = in_memory(*words)
    stream, same = splits(*words, "--streaming", "--stream_window", "64")
    assert isinstance(stream, Stream) and same is not None
    assert same.fingerprint == held.fingerprint and texts(same) == texts(held)
    assert [same.location(row) for row in range(len(same))] == [
        held.location(row) for row in range(len(held))
    ]
    test = [
        load_splits(read_config(["--model_name_or_path=m", "--output_dir=o", *words, *more])).test
        for more in ([], ["--streaming"])
    ]
    assert test[0] is not None and test[1] is not None and texts(test[0]) == texts(test[1])
    assert test[0].fingerprint == test[1].fingerprint != held.fingerprint
    windows = streamed(stream)
    assert sorted(text for rows in windows for text in texts(rows)) == sorted(texts(train))
    where = {text: str(train.location(row)) for row, text in enumerate(texts(train))}
    assert all(
        str(rows.location(row)) == where[text]
        for rows in windows
        for row, text in enumerate(texts(rows))
    )
    assert stream.fingerprint != splits(*words[:-2], "--streaming")[0].fingerprint  # type: ignore[union-attr]
    state = [window.state for window in stream.windows()][2]  # a resume reads the same rows
    assert [texts(window.records) for window in stream.windows(state)] == [
        texts(rows) for rows in windows[2:]
    ]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_limits_take_the_first_rows_of_their_part(tmp_path: Path, streaming: list[str]) -> None:
    words = ["--train_file", write(tmp_path / "t.tsv", 500), "--validation_split", "0.2"]
    train, held = in_memory(*words)
    limited, few = splits(
        *words, "--max_train_samples", "50", "--max_eval_samples", "20", *streaming
    )
    assert few is not None and texts(few) == texts(held)[:20]
    rows = [limited] if isinstance(limited, Records) else streamed(limited)
    assert [text for part in rows for text in texts(part)] == texts(train)[:50]
    assert few.format_notes == (
        "Validation rows: 20 held out of t.tsv (--validation_split 0.2, --max_eval_samples 20)",
    )
    assert held.format_notes == (
        f"Validation rows: {len(held):,} of 600 held out of t.tsv (--validation_split 0.2)",
    )


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_bad_rows_are_left_out_of_all_parts_and_counted_once(
    tmp_path: Path, streaming: list[str]
) -> None:
    file = write(tmp_path / "t.tsv", 100, extra=["no label", "one too many\tbad\tx"])
    words = ["--train_file", file, "--validation_split", "0.3", "--on_bad_row", "skip"]
    train, held = splits(*words, *streaming)
    assert held is not None and held.bad_rows == ()
    if isinstance(train, Records):
        bad, rows = list(train.bad_rows), len(train)
    else:
        windows = list(train.windows())
        bad, rows = (
            [row for w in windows for row in w.bad_rows],
            sum(len(w.records) for w in windows),
        )
    assert [row.line for row in bad] == [122, 123] and rows + len(held) == 120
    with pytest.raises(DataError, match=r"t\.tsv line 122"):
        train, _ = splits(*words[:-2], *streaming)


def test_weights_know_the_rows_left_of_each_file(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.tsv", 50), write(tmp_path / "b.tsv", 80, start=50)]
    train, held = in_memory(
        "--train_file", *files, "--validation_split", "0.2", "--train_weights", "1", "2"
    )
    of_file = [
        sum(train.location(row).file == name for row in range(len(train)))
        for name in ("a.tsv", "b.tsv")
    ]
    assert train.rows_per_file == tuple(of_file) and sum(of_file) == len(train) < 156
    assert len(train) + len(held) == 156


def test_pairs_are_held_out_together(tmp_path: Path) -> None:
    rows = [f"premise {row % 7}\thypothesis {row % 40}\tyes" for row in range(400)]
    rows += [f"premise {row % 7}\thypothesis {row % 41}\tno" for row in range(400)]
    (tmp_path / "p.tsv").write_text("\n".join(["premise\thypothesis\tlabel", *rows]) + "\n")
    train, held = in_memory("--train_file", str(tmp_path / "p.tsv"), "--validation_split", "0.3")
    assert train.pairs is not None and held.pairs is not None
    pairs = [set(zip(texts(x), x.pairs.to_pylist(), strict=True)) for x in (train, held)]  # type: ignore[union-attr]
    assert not pairs[0] & pairs[1] and len(held) > 100
    assert set(texts(train)) & set(texts(held))  # the control: a text alone may be in both


def test_multi_label_columns(tmp_path: Path) -> None:
    rows = [f"text {row},{row % 2},{row % 3 // 2}" for row in range(200)]
    (tmp_path / "m.csv").write_text("\n".join(["text,toxic,rude", *rows]) + "\n")
    words = ["--train_file", str(tmp_path / "m.csv"), "--label_columns", "toxic", "rude"]
    train, held = in_memory(*words, "--validation_split", "0.2")
    assert held.label_kind == "set" and held.class_names == ("toxic", "rude")
    for rows_of in (train, held):
        for record in map(rows_of.__getitem__, range(len(rows_of))):
            number = int(record.text.split()[1])
            assert record.label == ("toxic",) * (number % 2) + ("rude",) * (number % 3 // 2)
    _, same = splits(*words, "--validation_split", "0.2", "--streaming")
    assert same is not None and same.fingerprint == held.fingerprint


def only(text: str) -> Records:
    return records_from_texts([text])


def test_a_label_that_only_other_parts_have_is_an_output_and_is_said(tmp_path: Path) -> None:
    file = write(tmp_path / "t.tsv", 40)
    seed = next(
        seed
        for seed in range(99)
        if HoldOut(0.2, 0, seed).is_in("validation", only("a rare text"))[0]
    )
    Path(file).write_text(Path(file).read_text() + "a rare text\todd\n")
    train, held = in_memory("--train_file", file, "--validation_split", "0.2", "--seed", str(seed))
    stats = train.label_stats()
    assert dict(zip(stats.values, stats.counts, strict=True))["odd"] == 0
    assert train.format_notes[-1] == (
        "No training row has the label 'odd': all such rows are held out, and the model cannot learn them"
    )
    assert "odd" in [held[row].label for row in range(len(held))]
    other, _ = in_memory("--train_file", file, "--validation_split", "0.2", "--seed", str(seed + 1))
    assert ("odd" in [other[row].label for row in range(len(other))]) == (not other.format_notes)


def test_texts_are_equal_up_to_case_and_white_space() -> None:
    numbers = text_numbers(records_from_texts(["A b", "a  B ", "a\u00a0b", "ab"]))
    assert numbers.tolist() == [0, 0, 0, 1]


FILE = ["--train_file", "t.tsv"]
HUB = ["--dataset_name", "d"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*FILE, "--validation_split", "dev"], "--validation_split is 'dev', and --train_file is a file; expected the share"),
        ([*FILE, "--validation_split", "1"], "--validation_split is '1', and --train_file"),
        ([*FILE, "--validation_split", "nan"], "--validation_split is 'nan'"),
        ([*FILE, "--test_split", "10%"], "--test_split is '10%'"),
        ([*FILE, "--validation_split", "-0.1"], "expected"),
        ([*FILE, "--validation_split", "0.5", "--test_split", "0.5"], "leave no training rows"),
        ([*FILE, "--validation_split", "0.1", "--validation_file", "v.tsv"], "--validation_split and --validation_file both name rows"),
        ([*HUB, "--validation_split", "0.1"], "--validation_split 0.1: a share is for --train_file; of hub data name a split"),
        ([*FILE, "--early_stopping_patience", "2"], "give --validation_file, or a share as --validation_split"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(["--model_name_or_path=m", "--output_dir=o", *words])
    assert message in str(error.value)


def test_flags_of_evaluations_go_with_a_share() -> None:
    words = "--validation_split 0.1 --early_stopping_patience 2 --metrics accuracy"
    config = read_config(["--model_name_or_path=m", "--output_dir=o", *FILE, *words.split()])
    assert config.data.validation_split == "0.1"
    assert read_config(
        ["--model_name_or_path=m", "--output_dir=o", *HUB, "--validation_split", "dev"]
    )


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_parts_without_rows(tmp_path: Path, streaming: list[str]) -> None:
    (tmp_path / "t.tsv").write_text("text\tlabel\none\tyes\none\tno\n")
    words = ["--train_file", str(tmp_path / "t.tsv"), *streaming]
    with pytest.raises(
        DataError, match=r"--validation_split 1e-06 holds out none.* give a larger share"
    ):
        splits(*words, "--validation_split", "0.000001")
    with pytest.raises(DataError, match=r"No training row is left.*--validation_split 0.999999"):
        train, _ = splits(*words, "--validation_split", "0.999999")
        assert isinstance(train, Stream)
        train.head()
