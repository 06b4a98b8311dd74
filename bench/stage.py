"""What all runs of one benchmark invocation share: the model, the rows, and the child process.

`with stage(args, words, child) as at:` prepares them; `at.train(...)` trains one contender once.
Standard library only, like bench.jobs.
"""

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.jobs import CONTENDERS, BenchError, Child, TrainJob, TrainResult, parse_train_result

HINT = "for the default, run: python launch/demo.py --prepare_only"
PACKAGES = ("bertdist", "torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Model, rows and child process of one invocation."""

    args: argparse.Namespace  # bench.peers.parser
    words: Sequence[str]  # the command line
    child: Child
    folder: Path  # temporary
    model: str
    title: str
    rows_file: str
    rows: int
    labels: list[str]
    load: machine.Load = field(default_factory=machine.Load)  # of the machine since the start

    def run_job(self, kind: str, **job: Any) -> dict[str, Any]:
        """Run a job in a child process; returns its answer."""
        return self.child(kind, {**job, "threads": self.args.threads})

    def labels_of(self, rows: int) -> list[str]:
        """Labels of the first rows, as they are trained: "0", "1", ..."""
        with open(self.rows_file, encoding="utf-8") as file:
            return [json.loads(line)["label"] for line, _ in zip(file, range(rows), strict=False)]

    def train(
        self,
        contender: str,
        steps: int,
        seed: int,
        dev_file: str | None = None,
        keep: str | None = None,
        precision: str | None = None,
    ) -> TrainResult:
        """One training run; its folder is deleted unless `keep` names it. precision: by default
        --mixed_precision.
        """
        args, output = self.args, self.folder / (keep or "run")
        job = TrainJob(
            contender=contender,
            model=self.model,
            rows_file=self.rows_file,
            labels=len(self.labels),
            rows=min(self.rows, steps * args.batch_size),
            batch_size=args.batch_size,
            untimed_steps=args.untimed_steps,
            learning_rate=args.learning_rate,
            seed=seed,
            max_length=args.max_length,
            mixed_precision=precision or args.mixed_precision,
            use_cpu=args.use_cpu,
            loss_rows=args.loss_rows,
            dev_file=dev_file,
            output_dir=str(output),
        )
        if job.steps <= args.untimed_steps:
            raise BenchError(
                f"{job.rows} rows make {job.steps} steps of {args.batch_size}, and --untimed_steps"
                f" {args.untimed_steps} leaves none to time; use more rows or steps."
            )
        try:
            result = parse_train_result(self.run_job("train", **asdict(job)))
        finally:
            if not keep:
                shutil.rmtree(output, ignore_errors=True)
        seconds = result.stamps[-1] - result.stamps[args.untimed_steps - 1]
        tokens = sum(sum(step.lengths) for step in result.seen[args.untimed_steps :])
        memory = result.process_mib + result.child_mib
        log(
            f"seed {seed}, {contender} {CONTENDERS[contender]}: "
            f"{tokens / seconds:,.0f} real tokens/s, {memory:,.0f} MiB, "
            f"final loss {result.loss:.4f}"
        )
        return result

    def heading(self, subject: str, device: str, extra: Sequence[str] = ()) -> str:
        """Start of a section: title, machine and its load since the start, date, command."""
        about = machine.describe_machine(device, self.args.threads, [*PACKAGES, *extra])
        today = datetime.date.today().isoformat()
        command = machine.command("bench.peers", self.words)
        machine_and_load = f"{about}. {today}. {self.load.describe()}"
        return f"## {subject}: {self.title}\n\n{machine_and_load}\n\n```bash\n{command}\n```"


@contextmanager
def stage(args: argparse.Namespace, words: Sequence[str], child: Child) -> Iterator[Stage]:
    """Open model and rows, in a temporary folder; raises BenchError if they do not exist."""
    given, file = Path(args.model_name_or_path), Path(args.train_file)
    if not (given / "config.json").is_file():
        raise BenchError(
            f"--model_name_or_path {given}: no config.json there, expected a model folder; {HINT}"
        )
    if not file.is_file():
        raise BenchError(f"--train_file {file}: there is no such file; {HINT}")
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        folder, rows_file, model = Path(name), str(Path(name, "rows.jsonl")), str(given.resolve())
        title = "MiniLM-L6" if str(given) == "demo/model" else given.resolve().name
        at = Stage(
            args=args,
            words=words,
            child=child,
            folder=folder,
            model=model,
            title=title,
            rows_file=rows_file,
            rows=0,
            labels=[],
        )
        source = {"text_column": args.text_column, "label_column": args.label_column}
        source_rows = at.run_job(
            "rows", file=str(file.resolve()), rows=args.rows, rows_file=rows_file, **source
        )
        if args.random_bert_base:
            model, title = str(folder / "bert_base"), "BERT-base from random weights"
            at.run_job("random_bert_base", tokenizer=at.model, folder=model)
        yield replace(
            at,
            model=model,
            title=args.title or title,
            rows=source_rows["rows"],
            labels=source_rows["labels"],
        )


def log(message: str) -> None:
    """Print progress to standard error; the tables go to standard output."""
    print(f"bench: {message}", file=sys.stderr, flush=True)
