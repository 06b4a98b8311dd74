"""How fast rows are read and tokenized, and from how many ranks on `--stream_sharding by_file`
pays.

    python -m bench.reading                                    # SST-2's training rows beside the
    repository
    python -m bench.reading --train_file demo/data/train.tsv --output docs/streaming.md

1. Read. The rows are written as tsv, csv, jsonl, jsonl.gz and parquet and go through
`StreamLoader` (bertdist/data/streaming.py) as in a loader worker of
   one rank of many (--stream_sharding by_row): pieces, columns, windows, plan, dealing; of the
   encoding only this rank's share. Processor
   seconds of one process, in turns: what else the machine does counts little.
2. Encoded. The same as the only rank, which encodes all: what it takes longer is the tokenizer, and
cutting into micro-batches.
3. The limit. With rows, each of w loader workers of each of W ranks reads all rows and encodes one
of W w. They keep up with ranks that
   train t rows/s each as long as W t (1 / read + 1 / (W w encoded)) <= 1, so up to W = read / t (1
   - t / (w encoded)) ranks. With files
   a rank reads only what it trains. t is computed: tokens/s that were measured, or operations
   (bench/flops.py) at an assumed rate.
"""

import argparse
import csv
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bench import machine, page
from bench.figures import format_number, format_spread, markdown, spread
from bench.flops import BERT_BASE, training_flops
from bench.jobs import BenchError
from bench.peers import positive
from bench.scaling import SST2
from bench.stage import HINT, PACKAGES, log
from bertdist.core.config import DataConfig, ModelConfig, TaskConfig
from bertdist.data.load_data import load_records, open_stream
from bertdist.data.records import Records
from bertdist.data.streaming import StreamLoader
from bertdist.data.tokenization import create_dataset, encode, load_tokenizer
from bertdist.tasks.labels import LabelStats
from bertdist.tasks.tasks import Task, create_task

KINDS = ("tsv", "csv", "jsonl", "jsonl.gz", "parquet")
MANY = 64  # ranks, of which one is measured
ROWS_A_RANK = 32
TOKENS = 8192  # of a micro-batch


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.reading", description="Reading and tokenizing.", allow_abbrev=False
    )
    add = found.add_argument
    add(
        "--train_file",
        default=str(SST2),
        help="Texts and labels. Default: SST-2's training rows in ../shared/data, where they are.",
    )
    add("--text_column", help="Default: as in training (text, sentence, ...).")
    add("--model_name_or_path", default="demo/model", help="Folder of the tokenizer.")
    add("--max_length", type=positive, default=128, help="Longest text in tokens.")
    add(
        "--texts_a_row",
        type=positive,
        nargs="+",
        default=[1, 8],
        help="How many of the texts a row has, for longer rows too.",
    )
    add("--megabytes", type=positive, default=8, help="Text of each file; the rows are repeated.")
    add("--repetitions", type=positive, default=3, help="Of each measurement, in turns.")
    add("--workers", type=positive, default=4, help="Loader workers of a rank, for the limit.")
    add(
        "--tokens_per_second",
        type=float,
        default=1905.0,
        help="Measured rate of training. Default: MiniLM-L6, docs/benchmarks.md.",
    )
    add(
        "--tflops",
        type=float,
        nargs="+",
        default=[60.0, 200.0],
        help="Useful TFLOP/s of a rank, assumed, for BERT-base.",
    )
    add(
        "--output",
        help="Page whose section 'Reading' is replaced; without it the tables are only printed.",
    )
    return found


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What every file holds."""

    texts: list[str]
    labels: list[str]
    tokens: list[int]  # of some of the texts
    task: Task


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One kind of file; seconds a row, of the processor, one figure a repetition."""

    kind: str
    stored: float  # bytes a row
    read: list[float]
    encoded: list[float]


def read_rows(args: argparse.Namespace, tokenizer: Any, texts_a_row: int) -> Rows:
    """The file's texts, several joined to a row, repeated until there are enough; raises BenchError
    and BertdistError.
    """
    records = load_records(
        DataConfig(train_file=[args.train_file], text_column=args.text_column), "train"
    )
    assert isinstance(records, Records) and records.label_kind is not None
    found = [records[row] for row in range(len(records))]
    texts = [
        " ".join(" ".join(record.text.split()) for record in found[at : at + texts_a_row])
        for at in range(0, len(found), texts_a_row)
    ]
    labels = [str(record.label) for record in found[::texts_a_row]]
    size = sum(len(text.encode()) for text in texts)
    times = max(1, int(args.megabytes * 1_000_000) // max(size, 1))
    some = [record._replace(text=text) for record, text in zip(found, texts[:2000], strict=False)]
    tokens = [len(ids) for ids, _ in encode(some, tokenizer, args.max_length)]
    names = sorted(set(labels))
    task = create_task(
        TaskConfig(label_names=names), LabelStats("text", [*names], [1] * len(names))
    )
    return Rows(texts=texts * times, labels=labels * times, tokens=tokens, task=task)


def write_file(folder: Path, kind: str, rows: Rows) -> Path:
    """The rows as one kind of file, with columns text and label."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(
            pa.table({"text": rows.texts, "label": rows.labels}), path, row_group_size=50_000
        )
        return path
    with (
        gzip.open(path, "wt", encoding="utf-8")
        if path.suffix == ".gz"
        else open(path, "w", encoding="utf-8", newline="") as file
    ):
        if kind == "tsv":
            file.writelines(
                f"{text}\t{label}\n"
                for text, label in [("text", "label"), *zip(rows.texts, rows.labels, strict=True)]
            )
        elif kind == "csv":
            csv.writer(file, lineterminator="\n").writerows(
                [("text", "label"), *zip(rows.texts, rows.labels, strict=True)]
            )
        else:
            both = zip(rows.texts, rows.labels, strict=True)
            file.writelines(
                json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n"
                for text, label in both
            )
    return path


def seconds_a_row(path: Path, rows: Rows, tokenizer: Any, max_length: int, ranks: int) -> float:
    """Processor seconds for each row of the file, as rank 0 of so many."""
    size = MANY * ROWS_A_RANK
    window = -(-DataConfig.stream_window // size) * size
    stream = open_stream(
        DataConfig(train_file=[str(path)], streaming=True, stream_window=window), 0
    )
    batches = StreamLoader(
        stream=stream,
        task=rows.task,
        dataset=create_dataset(stream.head(), tokenizer, rows.task, max_length),
        rows_per_step=size,
        tokens_per_micro_batch=TOKENS,
        ranks=ranks,
    )
    begin = time.process_time()
    seen = sum(step.rows for step in batches.steps(0, -(-len(rows.texts) // size)))
    seconds = time.process_time() - begin
    assert seen == len(rows.texts), (seen, len(rows.texts))
    return seconds / seen


def measure(rows: Rows, tokenizer: Any, max_length: int, repetitions: int) -> list[Measured]:
    """Every kind of file, in turns."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        paths = {kind: write_file(Path(name), kind, rows) for kind in KINDS}
        for path in paths.values():  # what is imported and compiled when it is first used
            seconds_a_row(path, rows, tokenizer, max_length, MANY)
        taken: dict[tuple[str, int], list[float]] = {
            (kind, ranks): [] for kind in KINDS for ranks in (1, MANY)
        }
        for _ in range(repetitions):
            for (kind, ranks), seconds in taken.items():
                seconds.append(seconds_a_row(paths[kind], rows, tokenizer, max_length, ranks))
        for kind in KINDS:
            read, encoded = split(taken[kind, 1], taken[kind, MANY], MANY)
            found.append(
                Measured(
                    kind=kind,
                    stored=paths[kind].stat().st_size / len(rows.texts),
                    read=read,
                    encoded=encoded,
                )
            )
    return found


def split(
    alone: Sequence[float], of_many: Sequence[float], many: int
) -> tuple[list[float], list[float]]:
    """Seconds a row of the only rank (read + encode) and of one of many (read + encode / many) ->
    (read, encode), each repetition.
    """
    encode_seconds = [
        (one - other) * many / (many - 1) for one, other in zip(alone, of_many, strict=True)
    ]
    return [
        other - seconds / many for other, seconds in zip(of_many, encode_seconds, strict=True)
    ], encode_seconds


def most_ranks(read: float, encoded: float, trained: float, workers: int) -> float:
    """Ranks up to which loader workers that read all rows keep up; rates in rows a second."""
    return read / trained * (1 - trained / (workers * encoded))


def rate_table(found: Sequence[Measured], text_bytes: float) -> str:
    """Rows a second of one process."""
    lines = [
        ["file", "stored bytes per row", "read, rows/s", "read, MB of text/s", "encoded, rows/s"]
    ]
    for kind in found:
        read = [1 / seconds for seconds in kind.read]
        cells = [
            kind.kind,
            format_number(kind.stored),
            format_spread(read),
            format_spread([rate * text_bytes / 1e6 for rate in read]),
        ]
        lines.append([*cells, format_spread([1 / seconds for seconds in kind.encoded])])
    return markdown(lines)


def limit_table(found: Sequence[Measured], rates: dict[str, float], workers: int) -> str:
    """Up to how many ranks --stream_sharding by_row keeps up."""
    lines = [
        [
            "file",
            *(f"{name}: {format_number(rate)} rows/s per rank" for name, rate in rates.items()),
        ]
    ]
    for kind in found:
        read, encoded = (1 / spread(seconds).median for seconds in (kind.read, kind.encoded))
        ranks = [most_ranks(read, encoded, rate, workers) for rate in rates.values()]
        lines.append(
            [
                kind.kind,
                *(f"{int(most):,}" if most >= 1 else "none: more workers" for most in ranks),
            ]
        )
    return markdown(lines)


def compute(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(section, record)."""
    if not Path(args.train_file).is_file():
        raise BenchError(
            f"--train_file {machine.shorten_path(args.train_file)}: there is no such file. "
            f"demo/data/train.tsv will do; {HINT}"
        )
    if not Path(args.model_name_or_path, "config.json").is_file():
        raise BenchError(
            f"--model_name_or_path {args.model_name_or_path}: no config.json there, "
            f"expected a model folder; {HINT}"
        )
    tokenizer = load_tokenizer(
        ModelConfig(model_name_or_path=args.model_name_or_path, max_length=args.max_length)
    )
    parts = [
        "## Reading",
        f"{machine.describe_machine('cpu', 1, PACKAGES)}. Processor seconds of one process, a "
        f"loader worker's work; {args.repetitions} repetitions in turns: median (min-max). None of "
        "the rates of training was measured with a GPU.",
        f"```bash\n{machine.command('bench.reading', words)}\n```",
    ]
    record: dict[str, Any] = {}
    for texts_a_row in args.texts_a_row:
        rows = read_rows(args, tokenizer, texts_a_row)
        size = float(np.mean([len(text.encode()) for text in rows.texts]))
        tokens = float(np.mean(rows.tokens))
        rates = {"measured, MiniLM-L6 on 2 cores": args.tokens_per_second / tokens}
        for tflops in args.tflops:
            rates[f"assumed, BERT-base at {tflops:g} TFLOP/s"] = (
                tflops * 1e12 * len(rows.tokens) / training_flops(BERT_BASE, rows.tokens)
            )
        found = measure(rows, tokenizer, args.max_length, args.repetitions)
        log(f"{texts_a_row} texts a row: measured")
        record[str(texts_a_row)] = {
            "tokens": tokens,
            "bytes": size,
            "rates": rates,
            "kinds": [vars(kind) for kind in found],
        }
        name = machine.shorten_path(str(Path(args.train_file).resolve()))
        many = "a text" if texts_a_row == 1 else f"{texts_a_row} texts, concatenated,"
        parts += [
            f"### Rows of {tokens:.0f} tokens",
            f"{len(rows.texts):,} rows, each {many} of {name}, {format_number(size)} bytes of text "
            "on average.",
            rate_table(found, size),
            f"Number of ranks up to which `--stream_sharding by_row` keeps up, with {args.workers} "
            "loader workers per rank on separate cores; beyond, reading is the limit and "
            "`by_file` is faster:",
            limit_table(found, rates, args.workers),
        ]
    return "\n\n".join(parts), record


def main(words: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, or 1 with one line for what a user can mend."""
    return page.run_command("reading", parser(), compute, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
