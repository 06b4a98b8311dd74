"""bertdist beside its peers on this machine: the same rows, weights, seed, learning rate and batch size.

    python -m bench.peers                    # training: MiniLM-L6 and the reviews of `launch/demo.py --prepare_only`
    python -m bench.peers --random_bert_base --steps 20 --steps_padded 8
    python -m bench.peers --prediction       # Predictor, pipeline, ONNX Runtime
    python -m bench.peers --accuracy         # bertdist and Trainer, one epoch, several seeds; slow

Contenders take turns (a b c d e a b c d e ...), each run in a process of its own. Each invocation replaces its own section of --output.
Who the contenders are: bench/contenders.py and bench/prediction.py. This process starts them and does sums; it stays small (bench/jobs.py).
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench import figures, machine, page
from bench.flops import read_shape
from bench.jobs import (
    CONTENDERS,
    PREDICTORS,
    BenchError,
    Child,
    Killed,
    Predicted,
    PredictJob,
    Trained,
    run_child,
)
from bench.stage import MAKE, Stage, say, stage

PADDED = "de"  # the contenders that run --steps_padded


class Section(NamedTuple):
    """What an invocation puts on the page."""

    name: str
    parts: list[str]  # of markdown; empty ones are left out
    record: dict[str, Any]  # figures for page.json, and bars for the chart


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.peers", description="bertdist beside its peers.", allow_abbrev=False
    )
    add = found.add_argument
    mode = found.add_mutually_exclusive_group().add_argument
    mode("--prediction", action="store_true", help="Compare prediction instead of training.")
    mode(
        "--accuracy",
        action="store_true",
        help="Compare a and b on --validation_file after one epoch, for --seeds seeds. Slow.",
    )
    add(
        "--model_name_or_path",
        default="demo/model",
        help="Model folder. Default: MiniLM-L6 as launch/demo.py unpacks it.",
    )
    add(
        "--random_bert_base",
        action="store_true",
        help="BERT-base from random weights, with the tokenizer of --model_name_or_path.",
    )
    add("--title", help="What the tables call the model. Default: from the folder's name.")
    add(
        "--train_file",
        default="demo/data/train.tsv",
        help="Rows of text and label. Default: the reviews of launch/demo.py.",
    )
    add("--validation_file", default="demo/data/validation.tsv", help="Rows for --accuracy.")
    add("--text_column", help="Default: as in training (text, sentence, ...).")
    add("--label_column", help="Default: as in training (label, ...).")
    add(
        "--rows",
        type=positive,
        default=10_000,
        help="Rows taken of --train_file, at random, always the same.",
    )
    add(
        "--batch_size",
        type=positive,
        default=32,
        help="Rows of an optimizer step, and of a batch of pipeline and ONNX Runtime.",
    )
    add("--learning_rate", type=float, default=5e-5, help="Highest learning rate; linear to 0.")
    add("--max_length", type=positive, default=128, help="Longest text in tokens; what d pads to.")
    add(
        "--seed",
        type=int,
        default=42,
        help="Of the first repetition; each repetition takes the next.",
    )
    add(
        "--steps",
        type=positive,
        default=200,
        help="Steps of a, b and c: an epoch of so many. Fewer than 200 shrink the groups of c.",
    )
    add("--steps_padded", type=positive, default=8, help="The same for d and e, which are slow.")
    add(
        "--untimed_steps",
        type=positive,
        default=3,
        help="First steps of a run, which are not timed.",
    )
    add("--repetitions", type=positive, default=3, help="Rounds over all contenders.")
    add(
        "--contenders",
        default=",".join(CONTENDERS),
        help="Some of: " + "; ".join(f"{key} {name}" for key, name in CONTENDERS.items()),
    )
    add("--prediction_rows", type=positive, default=2_000, help="Texts to answer.")
    add(
        "--predictor_steps",
        type=positive,
        default=30,
        help="Steps that train the model whose answers are compared.",
    )
    add("--seeds", type=positive, default=3, help="Seeds of --accuracy.")
    add(
        "--loss_rows",
        type=positive,
        default=256,
        help="The final loss is that of the first so many rows, for all.",
    )
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        default="no",
        help="Precision of matrix products in training.",
    )
    add("--use_cpu", action="store_true", help="The CPU even where there is a GPU.")
    add(
        "--threads",
        type=positive,
        default=machine.cores(),
        help="Threads of each contender. Default: all cores.",
    )
    add(
        "--output",
        default="docs/benchmarks.md",
        help="Page whose section is replaced; .json and .svg are written beside it.",
    )
    return found


def positive(word: str) -> int:
    """A whole number of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def training(at: Stage) -> Section:
    """Train in turns."""
    args, shape, on_cpu = at.args, read_shape(at.model), {"use_cpu": at.args.use_cpu}
    asked = args.contenders.split(",")
    if unknown := [key for key in asked if key not in CONTENDERS]:
        raise BenchError(
            f"--contenders {args.contenders}: {unknown[0]!r} is none; expected some of {','.join(CONTENDERS)}."
        )
    dtype = "float32" if args.mixed_precision == "no" else "bfloat16"
    matmul = [at.ask("matmul", dtype=dtype, **on_cpu)["flops_per_second"]]
    runs, killed = take_turns(at, asked)
    matmul.append(at.ask("matmul", dtype=dtype, **on_cpu)["flops_per_second"])
    found = {
        key: [figures.figures_of(run, args.untimed_steps, shape) for run in of]
        for key, of in runs.items()
    }
    timed = {key: len(of[0].stamps) - args.untimed_steps for key, of in runs.items()}
    device = next(iter(runs.values()))[0].device
    parts = [
        at.heading(f"Training, {kind_of(device)}, {dtype}", device),
        told_of_training(args),
        figures.training_table(CONTENDERS, found, timed, sum(matmul) / 2),
        f"A product of 2048 x 2048 matrices in {dtype}: {matmul[0] / 1e9:,.0f} GFLOP/s before all runs, {matmul[1] / 1e9:,.0f} after; "
        "100 % in the last column is their mean.",
        figures.ratio_table(CONTENDERS, found),
        *(f"{key}, {CONTENDERS[key]}: {why}." for key, why in killed.items()),
    ]
    spreads = {
        key: figures.spread([one.tokens_per_second for one in of]) for key, of in found.items()
    }
    record: dict[str, Any] = {
        "title": f"{at.title}, {kind_of(device)}, {dtype}",
        "unit": "real tokens/s in training",
    }
    record |= {"bars": page.bars(CONTENDERS, spreads), "matmul": matmul}
    record["runs"] = {key: [asdict(one) for one in of] for key, of in found.items()}
    return Section(f"training-{page.slug(f'{kind_of(device)} {dtype} {at.title}')}", parts, record)


def take_turns(at: Stage, asked: Sequence[str]) -> tuple[dict[str, list[Trained]], dict[str, str]]:
    """(runs of each contender, one a repetition; what became of those that were killed). Raises BenchError where rows differ."""
    args = at.args
    runs: dict[str, list[Trained]] = {key: [] for key in asked}
    killed: dict[str, str] = {}
    for repetition in range(args.repetitions):
        for key in list(runs):
            try:
                runs[key].append(
                    at.train(
                        key,
                        args.steps_padded if key in PADDED else args.steps,
                        args.seed + repetition,
                    )
                )
            except Killed as error:
                say(f"{key} {CONTENDERS[key]}: {error}")
                killed[key] = str(error)
                del runs[key]
        if not runs:
            raise BenchError(
                "Every contender was killed, most likely for want of memory; give a smaller --batch_size."
            )
        figures.assert_same_rows({key: found[-1] for key, found in runs.items()})
    return runs, killed


def told_of_training(args: argparse.Namespace) -> str:
    """How the table came about."""
    return (
        f"{args.batch_size} rows a step, texts of at most {args.max_length} tokens. {args.repetitions} repetitions in turns, each run in "
        f"its own process: median (least-most). {args.steps} steps, or {args.steps_padded} where rows are padded to a fixed length (d, e); "
        f"the first {args.untimed_steps} are not timed. Contenders with as many steps train the same rows, each once; that is checked in "
        "every repetition. Peak memory is that of the process and, added to it, of its largest child, a loader worker: pages that both "
        f"share count twice. The final loss is without dropout, over the same rows for all, at most {args.loss_rows}; compare it at the "
        "same number of steps."
    )


def prediction(at: Stage) -> Section:
    """Train a classifier, then let it answer in turns."""
    args = at.args
    say("training the model whose answers are compared")
    at.train("a", max(args.predictor_steps, args.untimed_steps + 1), args.seed, keep="predictor")
    model, onnx = str(at.folder / "predictor" / "best"), None
    skipped = " ONNX Runtime was not run: onnx and onnxruntime are not installed."
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        onnx, skipped = str(at.folder / "model.onnx"), ""
        at.ask("export", model=model, path=onnx)
    job = PredictJob(
        contender="",
        model=model,
        onnx=onnx,
        rows_file=at.rows_file,
        rows=min(args.prediction_rows, at.rows),
        batch_size=args.batch_size,
        max_length=args.max_length,
        threads=args.threads,
        use_cpu=args.use_cpu,
    )
    runs: dict[str, list[Predicted]] = {key: [] for key in PREDICTORS if key != "onnx" or onnx}
    for _ in range(args.repetitions):
        for key in runs:
            found = Predicted(**at.ask("predict", **asdict(replace(job, contender=key))))
            runs[key].append(found)
            say(
                f"{PREDICTORS[key]}: {len(found.answers) / found.seconds:,.0f} rows/s, {found.process_mib:,.0f} MiB"
            )
        figures.assert_same_answers({key: of[-1] for key, of in runs.items()})
    say(f"all {job.rows} answers agree: the same labels, scores within 1e-4")
    device = runs["bertdist"][0].device
    parts = [
        at.heading(
            f"Prediction, {kind_of(device)}, float32", device, ["onnxruntime"] if onnx else []
        ),
        f"{job.rows:,} texts, from text to label and score; loading, and a first call on 64 texts, are not timed. {args.repetitions} "
        f"repetitions in turns, each run in its own process: median (least-most). pipeline and ONNX Runtime: batches of {args.batch_size} "
        "in the order of the texts, padded to the longest. All give the same labels, and scores within 1e-4; that is checked in every "
        f"repetition.{skipped if device == 'cpu' else ' ONNX Runtime ran on the CPU.'}",
        figures.prediction_table(PREDICTORS, runs),
    ]
    spreads = {
        key: figures.spread([len(run.answers) / run.seconds for run in of])
        for key, of in runs.items()
    }
    record: dict[str, Any] = {
        "title": f"{at.title}, {kind_of(device)}, float32",
        "unit": "rows/s in prediction",
    }
    record["bars"] = page.bars(PREDICTORS, spreads)
    record["runs"] = {
        key: [
            {"seconds": run.seconds, "rows": len(run.answers), "process_mib": run.process_mib}
            for run in of
        ]
        for key, of in runs.items()
    }
    return Section(f"prediction-{page.slug(f'{kind_of(device)} {at.title}')}", parts, record)


def accuracy(at: Stage) -> Section:
    """One epoch over all rows, for several seeds: what each contender has learned."""
    args, dev_file = at.args, str(at.folder / "dev.jsonl")
    if not Path(args.validation_file).is_file():
        raise BenchError(f"--validation_file {args.validation_file}: there is no such file; {MAKE}")
    source = {
        "text_column": args.text_column,
        "label_column": args.label_column,
        "labels": at.labels,
    }
    dev = at.ask(
        "rows",
        file=str(Path(args.validation_file).resolve()),
        rows=None,
        rows_file=dev_file,
        **source,
    )
    seeds = [args.seed + i for i in range(args.seeds)]
    runs: dict[str, list[Trained]] = {"a": [], "b": []}
    for seed in seeds:
        for key, of in runs.items():
            of.append(at.train(key, -(-at.rows // args.batch_size), seed, dev_file))
            say(f"accuracy {of[-1].accuracy:.4f}")
        figures.assert_same_rows({key: of[-1] for key, of in runs.items()})
    device = runs["a"][0].device
    values = {
        key: [run.accuracy for run in of if run.accuracy is not None] for key, of in runs.items()
    }
    parts = [
        at.heading(f"Accuracy after one epoch, {kind_of(device)}", device),
        f"{at.rows:,} rows, each once, {args.batch_size} a step, learning rate {args.learning_rate:g}; accuracy of the last weights on "
        f"{dev['rows']:,} other rows. The two draw other orders and other dropout from a seed, so they can only agree within the spread.",
        figures.accuracy_table(CONTENDERS, seeds, values),
    ]
    return Section(
        f"accuracy-{page.slug(f'{kind_of(device)} {at.title}')}",
        parts,
        {"title": at.title, "seeds": seeds, "accuracy": values},
    )


def kind_of(device: str) -> str:
    """ "CPU" or "GPU"."""
    return "CPU" if device == "cpu" else "GPU"


def main(words: Sequence[str] | None = None, child: Child = run_child) -> int:
    """The command line; exit code 0, or 1 with one line for what a user can mend."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    run = prediction if args.prediction else accuracy if args.accuracy else training
    try:
        with stage(args, words, child) as at:
            name, parts, record = run(at)
        section = "\n\n".join(part for part in parts if part)
        print(section)
        say(page.write(Path(args.output), name, section, record))
    except BenchError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
