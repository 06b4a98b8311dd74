"""Small data sets made by rule, runs over them, and what a run left behind.

files = write_split(folder, train=23, dev=9)                       # train.tsv and dev.tsv, the same
rows in every process words = words_of(tiny_model, folder / "out", files, seed=7)        # a command
line run_ranks(3, run_train, words)                                     # bertdist.train.train, on
three forked ranks step_log(folder / "out"), tensors_of(folder / "out" / "best")      # what is to
be compared
"""

import contextlib
import csv
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

# What a run imports where it needs it, here before the ranks are forked: evaluate and scikit-learn
# take longer than a whole run, the others a quarter of a short one.
import bertdist.core.time_limit
import bertdist.data.readers.csv_reader
import bertdist.data.readers.jsonl_reader
import bertdist.data.readers.parquet_reader
import bertdist.distributed.host_memory
import bertdist.distributed.launcher
import bertdist.models.model_config
import bertdist.tasks.metrics  # noqa: F401
from bertdist import cli
from bertdist.core.args import read_config
from bertdist.core.errors import DataError
from bertdist.data.bad_rows import BadRow
from bertdist.data.batch import RankStep
from bertdist.data.in_memory import records_from_texts
from bertdist.data.records import Records
from bertdist.data.source import Chunk, ReaderState, locate_rows
from bertdist.distributed.launch import configure_process
from bertdist.training import evaluation, throughput
from bertdist.training.throughput import MEASURED

# The module: `from bertdist import train` is the function.
train_module: Any = importlib.import_module("bertdist.train")

EVERY_FAULT = bool(
    os.environ.get("BERTDIST_EVERY_FAULT")
)  # else tests of faults take some, so that CI spends three minutes on them


def some_of(chosen: Sequence[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test: the `chosen` ones, and with BERTDIST_EVERY_FAULT=1 all other `cases`, which take no way through the code
    that the chosen ones together do not take.
    """
    return [*chosen, *(case for case in cases if EVERY_FAULT and case not in chosen)]


RANKS = some_of([1, 3], [2])
GOOD = "best fine fun good great warm".split()
BAD = "bad dull poor worst boring".split()
OTHER = "a an and but film is it movie not of so the this very was".split()

Breaking = Callable[
    [Accelerator], None
]  # called on every rank before a run: breaks a promise of the product there


@dataclass(frozen=True)
class MemoryRows:
    """A DataSource of rows in memory, in pieces of the given sizes, which come again and again; in
    each piece one row was left out.

    Reading fails before row `broken`.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    sizes: tuple[int, ...] = (3,)  # one of them above 0
    broken: int | None = None
    bytes: int | None = None
    columns: tuple[str, ...] = ("text", "label")
    features: Any = None
    has_header: bool = False
    quoted_table: None = None

    @property
    def fingerprint(self) -> str:
        return repr((self.name, self.rows))

    def column_names(self) -> list[str]:
        return list(self.columns)

    def chunks(self, wanted: Sequence[str], place: ReaderState | None = None) -> Iterator[Chunk]:
        at, number = (place["row"], place["piece"]) if place else (0, 0)
        while at < len(self.rows):
            some = self.rows[at : at + self.sizes[number % len(self.sizes)]]
            if self.broken is not None and self.broken < at + len(some):
                raise DataError(f"{self.name} row {self.broken}: no more can be read.")
            columns = {name: [row[name] for row in some] for name in wanted}
            yield self._chunk(columns, at, number, BadRow(self.name, number, "no row", ""))
            at, number = at + len(some), number + 1
        end = BadRow(self.name, -1, "end", "")
        yield self._chunk({name: [] for name in wanted}, at, number, end)

    def _chunk(self, columns: dict[str, Any], at: int, number: int, skipped: BadRow) -> Chunk:
        state, rows = {"row": at, "piece": number}, len(next(iter(columns.values())))
        location = locate_rows(self.name, at)
        return Chunk(columns, rows, state, location, lambda rows: [""] * len(rows), (skipped,))


def not_utf8(texts: Sequence[str], wrong: Sequence[int]) -> pa.Array:
    """(texts,) string, of which the `wrong` ones have a byte that is not UTF-8: what a parquet or
    Arrow file may hold.
    """
    raw = [text.encode() + b" \xd9" * (row in wrong) for row, text in enumerate(texts)]
    return pa.array(raw, pa.large_binary()).view(pa.large_string())


class Files(NamedTuple):
    """The two files of a run."""

    train: Path
    dev: Path | None = None


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of `text` and `label`, of 2 to 40 words: some of the label's mood, few of the other, the
    rest neither.
    """
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = ("negative", "positive")[random.integers(2)]
        length = (
            int(random.integers(2, 10)) if random.random() < 0.7 else int(random.integers(10, 41))
        )
        moods = (GOOD, BAD) if label == "positive" else (BAD, GOOD)
        kinds = random.choice(3, size=length, p=[0.3, 0.05, 0.65])
        kinds[random.integers(length)] = 0
        words = [str(random.choice((*moods, OTHER)[kind])) for kind in kinds]
        rows.append({"text": " ".join(words), "label": label})
    return rows


def labelled_records(
    values: Sequence[Any], codes: Sequence[int], pairs: Sequence[str] | None = None
) -> Records:
    """Records with labels, as a source gives them: row i has values[codes[i]]."""
    return replace(
        records_from_texts([f"text {i}" for i in range(len(codes))], pairs),
        label_kind="text",
        label_values=list(values),
        label_indices=np.array(codes, dtype=np.int32),
        label_column="label",
    )


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """By the file's ending: tsv, csv, jsonl or parquet."""
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(
                file, delimiter="," if path.suffix == ".csv" else "\t", lineterminator="\n"
            )
            writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    return path


def write_split(folder: Path, train: int, dev: int = 0, kind: str = "tsv") -> Files:
    """A file to learn from and, with dev, one to score."""
    folder.mkdir(parents=True, exist_ok=True)
    learned = write_rows(folder / f"train.{kind}", make_rows(train, seed=1))
    return Files(
        learned, write_rows(folder / f"dev.{kind}", make_rows(dev, seed=2)) if dev else None
    )


def words_of(model: Path, out: Path, files: Files, **settings: Any) -> list[str]:
    """The words of a command line, without the program; lists become several words, None leaves a
    setting out.
    """
    usual = {
        "use_cpu": True,
        "learning_rate": 1e-3,
        "train_batch_size": 8,
        "dataloader_num_workers": 0,
        "log_every": "1 steps",
        "report": False,  # a second; tests of reports write them
    }
    paths = {
        "model_name_or_path": model,
        "output_dir": out,
        "train_file": files.train,
        "validation_file": files.dev,
    }
    words = []
    for name, value in {**usual, **paths, **settings}.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


Seen = list[tuple[int, list[int]]]  # (step, this rank's rows) in the order they were trained


def run_train(
    accelerator: Accelerator, words: Sequence[str], breaking: Breaking | None = None
) -> tuple[Any, Seen, str]:
    """Train on this rank; (progress, what was trained, what was said)."""
    be_quick()
    if breaking is not None:
        breaking(accelerator)
    seen: Seen = []
    train_step = train_module.train_step

    def watched(model: Any, optimizer: Any, step: RankStep, *rest: Any) -> Any:
        seen.append(
            (
                step.number,
                [
                    row
                    for batch in step.micro_batches
                    for row in batch.row_numbers.tolist()
                    if row >= 0
                ],
            )
        )
        return train_step(model, optimizer, step, *rest)

    train_module.train_step = watched
    with contextlib.redirect_stderr(io.StringIO()) as said:
        progress = train_module.train(read_config(words))
    return progress, seen, said.getvalue()


def skip_updates(steps: Collection[int]) -> Breaking:
    """These steps (from 1) run without their optimizer step."""

    def breaking(accelerator: Accelerator) -> None:
        apply_update, count = train_module.apply_update, iter(range(1, 99))

        def some(model: Any, optimizer: Any, *rest: Any) -> None:
            if next(count) in steps:
                model.zero_grad(set_to_none=True)
            else:
                apply_update(model, optimizer, *rest)

        train_module.apply_update = some

    return breaking


def clip_with_torch(accelerator: Accelerator) -> None:
    """As on a GPU, and with a scaler: bertdist's norm on a CPU is equal to rounding only."""
    train_module.clip_gradients = lambda model, max_norm, accelerator: accelerator.clip_grad_norm_(
        model.parameters(), max_norm
    )


def at_step(number: int, act: Callable[[], None]) -> Breaking:
    """Act on every rank before step `number` is taken."""

    def breaking(accelerator: Accelerator) -> None:
        train_step = train_module.train_step

        def watched(model: Any, optimizer: Any, step: RankStep, *rest: Any) -> Any:
            if step.number == number:
                act()
            return train_step(model, optimizer, step, *rest)

        train_module.train_step = watched

    return breaking


def on_rank(rank: int, act: Callable[[], None]) -> Breaking:
    """Act on one rank only."""

    def breaking(accelerator: Accelerator) -> None:
        if accelerator.process_index == rank:
            act()

    return breaking


def best_at(*steps: int) -> Breaking:
    """Scores by step: each of `steps` is better than all before it, no other one is."""

    def breaking(accelerator: Any) -> None:
        evaluate_split, evaluate_step = (
            evaluation.evaluate_split,
            evaluation.RunEvaluator.evaluate_step,
        )
        now = [0]

        def with_step(self: Any, model: Any, state: Any, *rest: Any) -> Any:
            now[0] = state.step
            return evaluate_step(self, model, state, *rest)

        def with_score(*args: Any) -> Any:
            found = evaluate_split(*args)
            score = float(now[0] if now[0] in steps else -now[0])
            return found and replace(found, selection_score=score)

        evaluation.RunEvaluator.evaluate_step = with_step  # type: ignore[method-assign]
        evaluation.evaluate_split = with_score

    return breaking


def both(*breakings: Breaking) -> Breaking:
    """One after the other."""

    def breaking(accelerator: Accelerator) -> None:
        for each in breakings:
            each(accelerator)

    return breaking


def die() -> None:
    """Without a word."""
    os._exit(9)


def be_quick() -> None:
    """Leave out what a run spends on itself. tests/unit/training/test_throughput.py and the launched runs measure
    the rate in earnest.
    """
    configure_process()  # as the scripts do
    throughput.matmul_rate = lambda *unused: 1e12  # type: ignore[assignment]


def run_main(
    accelerator: Accelerator,
    words: Sequence[str],
    breaking: Breaking | None = None,
    program: Any = train_module,
) -> tuple[Any, str, str]:
    """The command line on this rank, with all that follows from it: (exit code, standard error,
    standard output).
    """
    be_quick()
    if breaking is not None:
        breaking(accelerator)
    sys.argv = [program.__name__, *words]
    code: Any = 0
    with (
        contextlib.redirect_stderr(io.StringIO()) as said,
        contextlib.redirect_stdout(io.StringIO()) as answered,
    ):
        try:
            cli.main([program.__name__.rpartition(".")[2], *words])
        except SystemExit as end:
            code = end.code
    return code, said.getvalue(), answered.getvalue()


def rows_by_step(seen_by_rank: Sequence[Seen]) -> dict[int, list[int]]:
    """What each rank trained -> step: its rows on all ranks, sorted; a row that came twice stands
    there twice.
    """
    steps: dict[int, list[int]] = {}
    for seen in seen_by_rank:
        for number, rows in seen:
            steps.setdefault(number, []).extend(rows)
    return {number: sorted(rows) for number, rows in sorted(steps.items())}


def step_log(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """metrics.jsonl without what tells of the machine. kind None: the lines about steps, without
    the one about the process.
    """
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = ("train", "eval") if kind is None else (kind,)
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in lines
        if line["kind"] in wanted
    ]


def json_of(path: Path) -> Any:
    """One JSON file, or the lines of a .jsonl file."""
    text = path.read_text(encoding="utf-8")
    return (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(text)
    )


def checkpoints_of(out: Path) -> list[str]:
    """Names of what stands in checkpoints/, hidden things too."""
    return sorted(os.listdir(out / "checkpoints"))


def last_checkpoint(out: Path) -> Path:
    """The newest folder of checkpoints/."""
    return max((out / "checkpoints").glob("step_*"), key=lambda path: path.name)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by file and name."""
    return {
        f"{path.name}: {name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one and one.keys() == other.keys()
    differing = {
        name: (one[name] - other[name]).abs().max().item()
        for name in one
        if not torch.equal(one[name], other[name])
    }
    assert not differing, (
        f"{len(differing)} of {len(one)} tensors differ: {dict(list(differing.items())[:3])}"
    )


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders hold the same to the last bit: step log, last checkpoint, best weights,
    predictions and scores.
    """
    assert step_log(one) == step_log(other)
    assert step_log(one, "meter") == step_log(other, "meter")
    assert last_checkpoint(one).name == last_checkpoint(other).name
    assert (
        json_of(last_checkpoint(one) / "state.json")["train_state"]
        == json_of(last_checkpoint(other) / "state.json")["train_state"]
    )
    assert_same_tensors(tensors_of(last_checkpoint(one)), tensors_of(last_checkpoint(other)))
    assert_same_tensors(tensors_of(one / "best"), tensors_of(other / "best"))
    for name in ("predictions.jsonl", "evaluation.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
