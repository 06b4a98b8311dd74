"""Texts that are seldom tried are texts like any other: trained, scored and predicted, each row once."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from rows import Files, json_of, rows_by_step, run_main, run_train, step_log, words_of

from bertdist import predict

TEXTS = {
    "a million characters": "good film " * 100_000,
    "a hundred thousand characters without a blank": "x" * 100_000,
    "NUL bytes": "a\0fine\0\0film",
    "emoji": "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 good \U0001f1e9\U0001f1ea",
    "right to left": "\u0641\u064a\u0644\u0645 \u062c\u064a\u062f \u202egood\u202c \u05d8\u05d5\u05d1",
    "only spaces": "   \u00a0\u2003  ",
    "empty": "",
    "combining": "e" + "\u0301" * 500,
    "line ends": "one\r\ntwo\rthree\u2028four\x0bfive\x85six",
    "noncharacters": "\ufffe\uffff\U0010ffff\ufdd0",
    "escape codes": "\x1b[31mred\x1b[0m \x07",
}


def files_of(folder: Path) -> Files:
    """jsonl: the only kind of text file that holds all of these."""
    rows = [{"text": text, "label": label} for text in TEXTS.values() for label in ("no", "yes")]
    path = folder / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Files(path, path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_odd_texts_are_trained_scored_and_predicted(
    tiny_model: Path, tmp_path: Path, n: int, stream: bool
) -> None:
    files, out = files_of(tmp_path), tmp_path / "out"
    settings: dict[str, Any] = {"streaming": True, "stream_window": 16} if stream else {}
    found = run_ranks(
        n,
        run_train,
        words_of(tiny_model, out, files, num_train_epochs=1, max_length=48, **settings),
    )
    rows = [
        row for of_step in rows_by_step([seen for _, seen, _ in found]).values() for row in of_step
    ]
    assert sorted(rows) == list(range(2 * len(TEXTS))), "each row once"
    assert all(math.isfinite(line["loss"]) for line in step_log(out, "train"))
    assert [line["row"] for line in json_of(out / "predictions.jsonl")] == list(
        range(2 * len(TEXTS))
    )
    answers = run_ranks(
        1,
        run_main,
        ["--model", str(out / "best"), "--input", str(files.train), "--use_cpu", "yes"],
        None,
        predict,
    )
    code, said, shown = answers[0]
    lines = [json.loads(line) for line in shown.splitlines()]
    assert code == 0 and [line["row"] for line in lines] == list(range(2 * len(TEXTS))), said
    assert [line["label"] for line in lines] == [
        line["label"] for line in json_of(out / "predictions.jsonl")
    ]


def test_a_lone_surrogate_is_no_text_and_its_line_is_named(
    tiny_model: Path, tmp_path: Path
) -> None:
    """UTF-8 has none. JSON can write one (\\ud800), so the row is refused by file and line, or left out and told."""
    files = files_of(tmp_path)
    with open(files.train, "a") as file:
        file.write('{"text": "a \\ud800 b", "label": "no"}\n')
    words = words_of(
        tiny_model, tmp_path / "out", Files(files.train), max_train_steps=1, max_length=16
    )
    code, said, _ = run_ranks(1, run_main, words)[0]
    line = 2 * len(TEXTS) + 1
    assert code == 1 and said.splitlines()[-1].startswith(f"bertdist: odd.jsonl line {line}: "), (
        said
    )
    code, said, _ = run_ranks(1, run_main, [*words, "--on_bad_row", "skip"])[0]
    assert code == 0, said
    (bad,) = json_of(tmp_path / "out" / "bad_rows.jsonl")
    assert (bad["line"], "\\ud800" in bad["text"]) == (line, True)
