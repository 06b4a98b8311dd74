"""Recall and precision of label issues on labels that were made wrong on purpose.

    python -m bench.label_noise --model_name_or_path demo/model  # SST-2 beside the repository
    python -m bench.label_noise --train_file train.tsv --rows 5000 --share 0.1

1. A share of the first rows with different texts, drawn by seed, gets another label at random. They
   are written with the original label in a column that bertdist does not read.
2. `--folds` ranks all rows by cross-validation. Then a model is trained on all rows, wrong labels
   included, and `--model` ranks them with it. Both use every ranking; the folds are trained once.
3. Printed is the share of the wrong labels in the first 5, 10 and 20% of each ranking, and the
   precision and recall of the rows marked as issues. Rows that were wrong before count as right.

Without an idle core it takes longer; the results are the same.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.jobs import BenchError
from bench.peers import positive
from bench.stage import log
from bertdist.core.config import DataConfig
from bertdist.core.errors import BertdistError
from bertdist.data.load_data import load_records
from bertdist.data_quality.config import RANKINGS

SST2 = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "sst2" / "train.tsv"
HEADS = (0.05, 0.1, 0.2)  # of the ranking


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.label_noise",
        description="Recall of label issues.",
        allow_abbrev=False,
    )
    add = found.add_argument
    add(
        "--train_file",
        default=str(SST2),
        help="Labelled rows. Default: SST-2's training rows in ../shared/data.",
    )
    add("--text_column", help="Default: as in training (text, sentence, ...).")
    add("--label_column", help="Default: as in training (label, ...).")
    add("--delimiter", help="As in training.")
    add("--model_name_or_path", default="demo/model", help="Model to start from.")
    add(
        "--rows",
        type=positive,
        default=10_000,
        help="Rows with different texts, from the first on.",
    )
    add("--share", type=float, default=0.05, help="Share of the labels that are made wrong.")
    add("--seed", type=int, default=7, help="Of the rows whose labels are made wrong.")
    add("--folds", type=positive, default=3, help="Folds.")
    add("--num_train_epochs", default="2", help="Epochs of every model.")
    add("--learning_rate", default="1e-4", help="Learning rate of every model.")
    add(
        "--output_dir",
        default="demo/label_noise",
        help="Folder for rows, runs and rankings; existing files are reused.",
    )
    add("--only", choices=["folds", "model"], help="Run only one of the two.")
    return found


def write_noisy(args: argparse.Namespace, path: Path) -> None:
    """Lines {"text", "label", "was"}: `was` is the original label.

    Raises BenchError and BertdistError.
    """
    if not Path(args.train_file).is_file():
        raise BenchError(f"--train_file {Path(args.train_file).name}: there is no such file.")
    data = DataConfig(
        train_file=[args.train_file],
        text_column=args.text_column,
        label_column=args.label_column,
        delimiter=args.delimiter,
    )
    records = load_records(data, "train")
    rows: dict[str, str] = {}
    for row in range(len(records)):
        record = records[row]
        rows.setdefault(record.text.strip(), str(record.label))
        if len(rows) == args.rows:
            break
    labels = sorted(set(rows.values()))
    random = np.random.default_rng(args.seed)
    wrong = set(random.permutation(len(rows))[: round(args.share * len(rows))].tolist())
    with open(path, "w", encoding="utf-8") as file:
        for row, (text, label) in enumerate(rows.items()):
            others = [other for other in labels if other != label]
            given = others[int(random.integers(len(others)))] if row in wrong else label
            file.write(
                json.dumps({"text": text, "label": given, "was": label}, ensure_ascii=False) + "\n"
            )


def figures(noisy: Path, ranking: Path) -> list[float]:
    """Recall in each of HEADS, then precision and recall of the marked rows."""
    rows = [json.loads(line) for line in noisy.read_text(encoding="utf-8").splitlines()]
    entries = [json.loads(line) for line in ranking.read_text(encoding="utf-8").splitlines()]
    wrong = np.array([row["label"] != row["was"] for row in rows])
    order = np.array([entry["row"] for entry in entries])
    assert sorted(order) == list(range(len(rows))), "every row once"
    marked = np.array([entry["row"] for entry in entries if entry["issue"]], dtype=int)
    heads = [float(wrong[order[: round(head * len(rows))]].sum() / wrong.sum()) for head in HEADS]
    return [
        *heads,
        float(wrong[marked].mean()) if len(marked) else 0.0,
        float(wrong[marked].sum() / wrong.sum()),
    ]


def run(*words: Any) -> float:
    """Run a command of bertdist; returns seconds. Raises BenchError."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise BenchError(
            f"{words[0]} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        )
    return time.perf_counter() - began


def main(words: Sequence[str] | None = None) -> None:
    """Make the rows, rank them, print the table."""
    args = parser().parse_args(words)
    out = Path(args.output_dir)
    noisy = out / "noisy.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not noisy.exists():
            write_noisy(args, noisy)
        rows = [json.loads(line) for line in noisy.read_text(encoding="utf-8").splitlines()]
        wrong = sum(row["label"] != row["was"] for row in rows)
        log(f"{len(rows):,} rows, {wrong:,} labels made wrong.")
        data = ["--train_file", noisy, "--text_column", "text", "--label_column", "label"]
        training = [
            "--model_name_or_path",
            args.model_name_or_path,
            "--learning_rate",
            args.learning_rate,
            "--warmup_ratio",
            "0.06",
        ]
        training += ["--num_train_epochs", args.num_train_epochs]
        print(
            "| predicted by | ranked by | "
            + " | ".join(f"in the first {head:.0%}" for head in HEADS)
            + " | precision | recall | seconds |"
        )
        print("|---" * (5 + len(HEADS)) + "|", flush=True)
        for source in ("folds", "model"):
            if args.only not in (None, source):
                continue
            if source == "model":
                run("bertdist.train", *data, *training, "--output_dir", out / "whole")
            for ranking in RANKINGS:
                how = ["--folds", args.folds, *training, "--output_dir", out / "folded"]
                how = how if source == "folds" else ["--model", out / "whole" / "best"]
                file = out / f"{source}_{ranking}.jsonl"
                seconds = run("bertdist.check", *data, *how, "--rank_by", ranking, "--output", file)
                shown = " | ".join(f"{figure:.3f}" for figure in figures(noisy, file))
                print(f"| {source} | {ranking} | {shown} | {seconds:.0f} |", flush=True)
    except (BenchError, BertdistError) as error:
        log(f"bench: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
