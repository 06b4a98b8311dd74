"""What all runs of an invocation share: the model, the rows, and the child that does the work.

In: flags. Out: a `Stage` that trains one contender once and says how it went. Standard library only, like `bench.jobs`.
"""

import argparse
import datetime
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.jobs import CONTENDERS, BenchError, Child, Trained, TrainJob, trained

MAKE = "for the default, run: python launch/demo.py --prepare_only"
PACKAGES = ("bertdist", "torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all runs of an invocation share."""

    args: argparse.Namespace  # bench.peers.parser
    words: Sequence[str]  # the command line they were read from
    child: Child
    folder: Path  # of this invocation, removed at its end
    model: str
    title: str
    rows_file: str
    rows: int
    labels: list[str]

    def ask(self, kind: str, **job: Any) -> dict[str, Any]:
        """A child's answer."""
        return self.child(kind, {**job, "threads": self.args.threads})

    def train(
        self,
        contender: str,
        steps: int,
        seed: int,
        dev_file: str | None = None,
        keep: str | None = None,
    ) -> Trained:
        """One training run; its folder goes, or is kept under a name."""
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
            mixed_precision=args.mixed_precision,
            use_cpu=args.use_cpu,
            loss_rows=args.loss_rows,
            dev_file=dev_file,
            output_dir=str(output),
        )
        if job.steps <= args.untimed_steps:
            made = f"{job.rows} rows make {job.steps} steps of {args.batch_size}"
            raise BenchError(
                f"{made}, and --untimed_steps {args.untimed_steps} leaves none to time; give more rows or steps."
            )
        try:
            found = trained(self.ask("train", **asdict(job)))
        finally:
            if not keep:
                shutil.rmtree(output, ignore_errors=True)
        seconds = found.stamps[-1] - found.stamps[args.untimed_steps - 1]
        tokens = sum(sum(step.lengths) for step in found.seen[args.untimed_steps :])
        told = f"{tokens / seconds:,.0f} real tokens/s, {found.process_mib + found.child_mib:,.0f} MiB, final loss {found.loss:.4f}"
        say(f"seed {seed}, {contender} {CONTENDERS[contender]}: {told}")
        return found

    def heading(self, subject: str, device: str, extra: Sequence[str] = ()) -> str:
        """What every section begins with: title, machine, command, date."""
        words = machine.described(device, self.args.threads, [*PACKAGES, *extra])
        today = datetime.date.today().isoformat()
        return f"## {subject}: {self.title}\n\n{words}. {today}.\n\n```bash\n{machine.command('bench.peers', self.words)}\n```"


@contextmanager
def stage(args: argparse.Namespace, words: Sequence[str], child: Child) -> Iterator[Stage]:
    """Open model and rows, in a folder of this invocation; raises BenchError where they are not there."""
    given, file = Path(args.model_name_or_path), Path(args.train_file)
    if not (given / "config.json").is_file():
        raise BenchError(
            f"--model_name_or_path {given}: no config.json there, expected a model folder; {MAKE}"
        )
    if not file.is_file():
        raise BenchError(f"--train_file {file}: there is no such file; {MAKE}")
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
        found = at.ask(
            "rows", file=str(file.resolve()), rows=args.rows, rows_file=rows_file, **source
        )
        if args.random_bert_base:
            model, title = str(folder / "bert_base"), "BERT-base from random weights"
            at.ask("random_bert_base", tokenizer=at.model, folder=model)
        yield replace(
            at, model=model, title=args.title or title, rows=found["rows"], labels=found["labels"]
        )


def say(message: str) -> None:
    """Progress; the tables go to standard output."""
    print(f"bench: {message}", file=sys.stderr, flush=True)
