"""Outputs that a user names: checked before the work, never an input, written through links and in place."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bertdist.core import output_files
from bertdist.core.args import read_config, read_predict_config
from bertdist.core.errors import BertdistError, ConfigError
from bertdist.core.output_files import check_outputs, write_output
from bertdist.data_quality.cleaning import dropped_path
from bertdist.data_quality.config import read_check_config, read_label_issue_config

ROOT = Path(__file__).resolve().parents[3]


def problem(*words: Any, read: Callable[[Sequence[str]], Any] = read_predict_config) -> str:
    """What is wrong with the words; "" if nothing is."""
    try:
        read([str(word) for word in words])
    except ConfigError as error:
        return str(error)
    return ""


# ---- Before the work


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: in.csv, other.csv and a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("in.csv", "other.csv"):
        Path(name).write_text("text,label\na,b\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def test_an_output_that_cannot_be_written_is_named_with_the_reason(folder: Path) -> None:
    Path("loop").symlink_to("loop")
    Path("nowhere").symlink_to("gone/out.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for path, reason in (
            ("gone/out.jsonl", "there is no folder gone"),
            ("nowhere", "there is no folder gone"),
            ("model", "it is a folder; name a file"),
            ("new/", "it is a folder; name a file"),
            ("loop", "too many symbolic links"),
            ("socket", "it is a socket; name a file"),
            ("x" * 300, "File name too long"),
            ("in.csv/out.jsonl", "there is no folder in.csv"),
        ):
            assert problem("--model=m", "--input=in.csv", "--output", path) == (
                f"--output {path}: {reason}."
            )
    for path in ("out.jsonl", "other.csv", "/dev/null", str(folder / "out.jsonl")):  # the control
        assert problem("--model=m", "--input=in.csv", "--output", path) == ""


def test_what_may_not_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"other.csv"}
    monkeypatch.setattr(os, "access", lambda path, _: str(path) not in refused)
    words = ("--model=m", "--input=in.csv", "--output")
    assert problem(*words, "other.csv") == "--output other.csv: it is not writable."
    refused.add("model")
    assert problem(*words, "model/x") == "--output model/x: the folder model is not writable."
    assert problem(*words, "new.jsonl") == ""


def test_an_output_is_never_an_input_by_any_name(folder: Path) -> None:
    Path("link.csv").symlink_to("in.csv")
    os.link("in.csv", "hard.csv")
    for given, output in (
        ("in.csv", "in.csv"),
        ("in.csv", "./model/../in.csv"),
        ("in.csv", folder / "in.csv"),
        ("in.csv", "link.csv"),
        ("link.csv", "in.csv"),
        ("in.csv", "hard.csv"),
    ):
        found = problem("--model=m", f"--input={given}", "--output", output)
        assert found == (f"--output {output} would replace --input {given}: name another file.")
    for output in ("model/config.json", folder / "model/config.json"):
        found = problem("--model=model", "--input=in.csv", "--output", output)
        assert found.startswith(f"--output {output} would replace a file of --model model")
    Path("run.yaml").write_text("max_length: 9\n")
    words = ("--config", "run.yaml", "--model=m", "--input=in.csv", "--output")
    assert problem(*words, "run.yaml").startswith("--output run.yaml would replace --config run")
    assert problem(*words, "run.jsonl") == ""  # the control
    Path("model/old.jsonl").write_text("")
    assert problem("--model=model", "--input=in.csv", "--output=model/old.jsonl") == ""
    assert problem("--model=model", "--input=https://x/in.csv", "--output=in.csv") == ""


def test_a_check_replaces_no_input_and_no_other_output(folder: Path) -> None:
    Path("c.parquet").write_text("")
    for words, found in (
        (
            "--train_file *.csv --output other.csv",
            "--output other.csv would replace --train_file other.csv",
        ),
        (
            "--train_file in.csv other.csv --output other.csv",
            "--output other.csv would replace --train_file",
        ),
        (
            "--train_file in.csv --test_file other.csv --output other.csv",
            "--output other.csv would rep",
        ),
        (
            "--train_file c.parquet --fix c.parquet",
            "--fix c.parquet would replace --train_file c.parquet",
        ),
        (
            "--train_file in.csv --fix gone/c.parquet",
            "--fix gone/c.parquet: there is no folder gon",
        ),
        (
            "--train_file in.csv --fix f.csv --output ./f.csv.dropped.jsonl",
            "the .dropped.jsonl of --fix f.csv.dropped.jsonl is --output as well: name another fi",
        ),
        (
            "--train_file in.csv --fix other.csv",
            "--fix other.csv would replace other.csv, which it did not write: name another file, "
            "or remove that one.",
        ),
        ("--train_file in.csv --fix f.parquet --output report.json", ""),
        ("--train_file in.csv --output /dev/stdout --fix f.parquet", ""),
    ):
        said = problem(*words.split(), read=read_check_config)
        assert said.startswith(found) and bool(said) == bool(found), said
    assert Path("f.parquet.dropped.jsonl") == dropped_path(Path("f.parquet"))
    words = ["--model=m", "--train_file=in.csv", "--output"]
    assert "would replace --train_file" in problem(*words, "in.csv", read=read_label_issue_config)
    assert problem(*words, "issues.jsonl", read=read_label_issue_config) == ""


def test_training_reads_nothing_inside_its_output_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    Path("out/rows.csv").write_text("text,label\na,b\n")
    Path("link").symlink_to("out")
    for words in (
        "--train_file out/rows.csv --model_name_or_path m --output_dir out",
        "--train_file link/rows.csv --model_name_or_path m --output_dir out",
        "--train_file in.csv out/*.csv --model_name_or_path m --output_dir ./out",
        "--train_file in.csv --validation_file out/rows.csv --model_name_or_path m --output_dir link",
        "--train_file in.csv --model_name_or_path model --output_dir .",
    ):
        said = problem(*words.split(), read=read_config)
        assert "is inside --output_dir" in said and "\n" not in said, words
    words = "--train_file in.csv --model_name_or_path model --output_dir out"
    assert problem(*words.split(), read=read_config) == ""


# ---- Writing


def test_a_regular_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    for mode in (0o600, 0o664, 0o755):
        path.chmod(mode)
        before = path.stat().st_ino
        write_output(path, b"new\n")
        assert path.read_text() == "new\n" and path.stat().st_mode & 0o777 == mode
        assert path.stat().st_ino != before and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "real.jsonl"
    for there in (True, False):  # also a link to a file that is not there yet
        if there:
            target.write_text("old")
        second, link = tmp_path / "second", tmp_path / "out.jsonl"
        second.symlink_to("data/real.jsonl")
        link.symlink_to("second")
        check_outputs({"--output": str(link)}, [])
        write_output(link, b"new")
        assert target.read_text() == "new" and link.is_symlink() and second.is_symlink()
        for path in (target, second, link):
            path.unlink()


def test_devices_and_pipes_are_written_in_place(tmp_path: Path) -> None:
    write_output("/dev/null", b"new")
    assert Path("/dev/null").is_char_device()
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    write_output(link, b"new")
    assert link.is_symlink() and Path("/dev/null").is_char_device()
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    thread.start()
    write_output(fifo, b"new" * 50_000)  # more than a pipe holds
    thread.join(10)
    assert read == [b"new" * 50_000] and fifo.is_fifo()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "link", "/proc/self/fd/1"])
def test_standard_output_keeps_what_was_printed_and_its_order(name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    path = name if name != "link" else str(tmp_path / "link")
    script = (
        "import sys\nfrom bertdist.core.output_files import write_output\n"
        f"print('before')\nwrite_output({path!r}, b'written\\n')\nprint('after')\n"
    )
    with open(tmp_path / "all", "w") as file:
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=file, check=True)
    assert (tmp_path / "all").read_text() == "before\nwritten\nafter\n"


def test_a_disk_that_is_full_is_one_line() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(BertdistError, match=r"^Cannot write /dev/full: No space left on device\.$"):
        write_output("/dev/full", b"new")


def test_the_control_replacing_a_link_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(output_files, "target_of", lambda path: path)
    write_output(tmp_path / "link", json.dumps("new").encode())
    assert (tmp_path / "real").read_text() == "old" and not (tmp_path / "link").is_symlink()
