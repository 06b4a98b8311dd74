"""What a user types: check with --fix, and training on what it wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_checks import clean_rows
from forked import run_ranks
from rows import run_main, train_module, words_of, write_rows, write_split

from bertdist import check

ROOT = Path(__file__).resolve().parents[2]


def command(program: Any, *words: object) -> tuple[Any, str, str]:
    """(exit code, standard error, standard output) of a command."""
    return run_ranks(1, run_main, list(map(str, words)), None, program)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("script", ["train", "check", "predict"])
def test_a_script_run_by_path_imports_the_package_around_it(script: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "bertdist"
    shutil.copytree(ROOT / "bertdist", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "core" / "args.py").open("a") as file:
        file.write("print('the copy')\n")
    done = subprocess.run(
        [sys.executable, copy / f"{script}.py", "--help"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "--help all" in done.stdout, done.stderr
    assert "the copy" in done.stdout


def test_check_then_train_on_what_it_cleaned(tiny_model: Path, tmp_path: Path) -> None:
    rows = clean_rows(48)
    rows[4] = {**rows[3], "label": "bad"}
    train, dev = (
        write_rows(tmp_path / "train.tsv", [*rows, rows[7], {"text": " ", "label": "good"}]),
        clean_rows(9, 1),
    )
    held = write_rows(tmp_path / "dev.tsv", [*dev, rows[9]])
    clean, report = tmp_path / "clean.parquet", tmp_path / "check.json"
    words = [
        "--train_file",
        train,
        "--validation_file",
        held,
        "--model_name_or_path",
        tiny_model,
        "--output",
        report,
        "--fix",
        clean,
    ]
    code, said, shown = command(check, *words)
    assert (code, said) == (1, "")
    assert "train/validation: rows of validation that are also in train" in shown
    assert "\x1b" not in shown
    assert json.loads(report.read_text(encoding="utf-8"))["counts"]["error"] == 1
    assert command(check, *words[:1], clean, *words[2:6])[0] == 0
    files = write_split(tmp_path / "unused", 1)._replace(train=clean, dev=held)
    train_words = words_of(tiny_model, tmp_path / "out", files, num_train_epochs=1)
    code, said, shown = command(train_module, *train_words, "--dry_run")
    assert code == 0 and "6 steps per epoch of 8 rows" in shown, said
    assert not (tmp_path / "out").exists()
    code, said, _ = command(train_module, *train_words)
    assert code == 0 and "45 rows of clean.parquet" in said, said
