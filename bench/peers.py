"""bertdist compared with its peers on this machine: same rows, weights, seed, learning rate, batch.

    python -m bench.peers                # training: MiniLM-L6 and the reviews of launch/demo.py
    python -m bench.peers --random_bert_base --steps 20 --steps_padded 8
    python -m bench.peers --prediction   # Predictor, pipeline, ONNX Runtime
    python -m bench.peers --prediction --mixed_precision bf16   # the same in bf16, beside float32
    python -m bench.peers --accuracy     # bertdist and Trainer, one epoch, several seeds; slow
    python -m bench.peers --accuracy_in_bf16 # bertdist in float32 and in bf16, the same way

Contenders take turns, each round beginning with the next (a b c, b c a, c a b), each run in its own
process. Each invocation replaces its own section of --output, one per kind of machine
(machine.kind), and the table of all of them. The contenders are in bench/contenders.py and
bench/prediction.py; this process only starts them, and stays small (bench/jobs.py).
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from bench import figures, machine, page
from bench.flops import read_shape
from bench.jobs import (
    CONTENDERS,
    FLOAT32,
    PREDICTORS,
    BenchError,
    Child,
    Killed,
    PredictJob,
    PredictResult,
    TrainResult,
    run_child,
)
from bench.stage import HINT, Stage, log, stage

PADDED = "de"  # the contenders that run --steps_padded


class Section(NamedTuple):
    """One section of the page."""

    name: str
    parts: list[str]  # Markdown; empty ones are dropped
    record: dict[str, Any]  # figures for page.json, and bars for the chart


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description="bertdist compared with its peers.",
        allow_abbrev=False,
    )
    add = found.add_argument
    mode = found.add_mutually_exclusive_group().add_argument
    mode("--prediction", action="store_true", help="Compare prediction instead of training.")
    mode(
        "--accuracy",
        action="store_true",
        help="Compare a and b on --validation_file after one epoch, for --seeds seeds. Slow.",
    )
    mode(
        "--accuracy_in_bf16",
        action="store_true",
        help="Compare a in float32 and in bf16 the same way: the same rows in the same order.",
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
        help="Rows of --train_file to use: a fixed random choice.",
    )
    add(
        "--batch_size",
        type=positive,
        default=32,
        help="Rows per optimizer step, and per batch of pipeline and ONNX Runtime.",
    )
    add(
        "--learning_rate",
        type=float,
        default=5e-5,
        help="Peak learning rate; decays linearly to 0.",
    )
    add(
        "--max_length",
        type=positive,
        default=128,
        help="Maximum text length in tokens; d pads to it.",
    )
    add(
        "--seed",
        type=int,
        default=42,
        help="Seed of the first repetition; each repetition uses the next.",
    )
    add(
        "--steps",
        type=positive,
        default=200,
        help="Steps of a, b and c: one epoch. Fewer than 200 shrink the groups of c.",
    )
    add("--steps_padded", type=positive, default=8, help="The same for d and e, which are slow.")
    add(
        "--untimed_steps",
        type=positive,
        default=3,
        help="Steps at the start of a run that are not timed.",
    )
    add("--repetitions", type=positive, default=3, help="Rounds over all contenders.")
    add(
        "--contenders",
        default=",".join(CONTENDERS),
        help="Some of: " + "; ".join(f"{key} {name}" for key, name in CONTENDERS.items()),
    )
    add("--prediction_rows", type=positive, default=2_000, help="Texts to predict.")
    add(
        "--predictor_steps",
        type=positive,
        default=30,
        help="Training steps of the model whose predictions are compared.",
    )
    add("--seeds", type=positive, default=3, help="Seeds of --accuracy.")
    add(
        "--loss_rows",
        type=positive,
        default=256,
        help="Rows that the final loss is computed on, for all.",
    )
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        default="no",
        help="Precision of matrix products, in training or prediction.",
    )
    add("--use_cpu", action="store_true", help="Use the CPU even if there is a GPU.")
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
    """argparse type: an integer of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer of at least 1")
    return int(word)


def training(at: Stage) -> Section:
    """Train all contenders in turns."""
    args, shape, on_cpu = at.args, read_shape(at.model), {"use_cpu": at.args.use_cpu}
    asked = args.contenders.split(",")
    if unknown := [key for key in asked if key not in CONTENDERS]:
        raise BenchError(
            f"--contenders {args.contenders}: unknown contender {unknown[0]!r}; "
            f"expected some of {','.join(CONTENDERS)}."
        )
    dtype = "float32" if args.mixed_precision == "no" else "bfloat16"
    matmul: list[float] = []  # before each round and after the last

    def measure_matmul() -> None:
        matmul.append(at.run_job("matmul", dtype=dtype, **on_cpu)["flops_per_second"])

    runs, killed = take_turns(at, asked, measure_matmul)
    measure_matmul()
    found = {
        key: [figures.timed_figures(run, args.untimed_steps, shape) for run in of]
        for key, of in runs.items()
    }
    timed = {key: len(of[0].stamps) - args.untimed_steps for key, of in runs.items()}
    device = next(iter(runs.values()))[0].device
    parts = [
        at.heading(f"Training, {machine.kind(device)}, {dtype}", device),
        describe_training(args),
        figures.training_table(CONTENDERS, found, timed, max(matmul)),
        f"A product of 2048 x 2048 matrices in {dtype}: "
        f"{', '.join(f'{rate / 1e9:,.0f}' for rate in matmul)} GFLOP/s before each round and after "
        "the last; 100 % of matmul is the highest.",
        figures.ratio_table(CONTENDERS, found),
        *(f"{key}, {CONTENDERS[key]}: {why}." for key, why in killed.items()),
    ]
    spreads = {
        key: figures.spread([one.tokens_per_second for one in of]) for key, of in found.items()
    }
    record: dict[str, Any] = {
        "title": f"{at.title}, {machine.kind(device)}, {dtype}",
        "unit": "real tokens/s in training",
    }
    record |= {"bars": page.bars(CONTENDERS, spreads), "matmul": matmul}
    record["runs"] = {key: [asdict(one) for one in of] for key, of in found.items()}
    return Section(
        f"training-{page.slug(f'{machine.kind(device)} {dtype} {at.title}')}", parts, record
    )


def take_turns(
    at: Stage, asked: Sequence[str], before_round: Callable[[], None]
) -> tuple[dict[str, list[TrainResult]], dict[str, str]]:
    """(runs of each contender, one per repetition; message for each that was killed).

    Raises BenchError if contenders trained different rows.
    """
    args = at.args
    runs: dict[str, list[TrainResult]] = {key: [] for key in asked}
    killed: dict[str, str] = {}
    for repetition in range(args.repetitions):
        before_round()
        first = repetition % len(runs)
        for key in [*runs][first:] + [*runs][:first]:
            try:
                runs[key].append(
                    at.train(
                        key,
                        args.steps_padded if key in PADDED else args.steps,
                        args.seed + repetition,
                    )
                )
            except Killed as error:
                log(f"{key} {CONTENDERS[key]}: {error}")
                killed[key] = str(error)
                del runs[key]
        if not runs:
            raise BenchError(
                "Every contender was killed, probably because memory ran out;"
                " use a smaller --batch_size."
            )
        figures.assert_same_rows({key: found[-1] for key, found in runs.items()})
    return runs, killed


def describe_training(args: argparse.Namespace) -> str:
    """How the figures were measured."""
    return (
        f"{args.batch_size} rows per step, texts of at most {args.max_length} tokens. "
        f"{args.repetitions} repetitions in turns, each run in its own process: median (min-max). "
        f"{args.steps} steps, or {args.steps_padded} with padding to a fixed length (d, e); "
        f"the first {args.untimed_steps} are not timed. Contenders of equally many steps train "
        "the same rows, each once; that is checked in every repetition. Peak memory is that of the "
        "process plus its largest child, a loader worker: shared pages count twice. The final loss "
        f"is without dropout, over the same rows for all, at most {args.loss_rows}; compare it "
        "at the same number of steps."
    )


def prediction(at: Stage) -> Section:
    """Train a classifier, then predict with all contenders in turns."""
    args = at.args
    log("training the model whose predictions are compared")
    steps = max(args.predictor_steps, args.untimed_steps + 1)
    at.train("a", steps, args.seed, keep="predictor", precision="no")
    model, onnx = str(at.folder / "predictor" / "best"), None
    in_bf16 = args.mixed_precision == "bf16"
    skipped = " ONNX Runtime was not run: onnx and onnxruntime are not installed." * (not in_bf16)
    if not in_bf16 and importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        onnx, skipped = str(at.folder / "model.onnx"), ""
        at.run_job("export", model=model, path=onnx)
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
    names = {**FLOAT32, **PREDICTORS} if in_bf16 else PREDICTORS
    names = {key: name for key, name in names.items() if key != "onnx" or onnx}
    precisions = {key: "bf16" if in_bf16 and key not in FLOAT32 else "no" for key in names}
    runs: dict[str, list[PredictResult]] = {key: [] for key in names}
    for repetition in range(args.repetitions):
        first = repetition % len(names)
        for key in [*names][first:] + [*names][:first]:
            asked = {**asdict(job), "contender": key, "mixed_precision": precisions[key]}
            found = PredictResult(**at.run_job("predict", **asked))
            runs[key].append(found)
            rate, memory = len(found.answers) / found.seconds, found.process_mib
            log(f"{names[key]}: {rate:,.0f} rows/s, {memory:,.0f} MiB")
        if not in_bf16:
            figures.assert_same_answers({key: of[-1] for key, of in runs.items()})
    device, dtype = runs["bertdist"][0].device, "bfloat16" if in_bf16 else "float32"
    agree = (
        "Other labels, and the largest difference of the score of a label, are those to float32."
        if in_bf16
        else "All give the same labels, and scores within 1e-4; that is checked in every "
        "repetition."
    )
    parts = [
        at.heading(
            f"Prediction, {machine.kind(device)}, {dtype}",
            device,
            ["onnxruntime"] if "onnx" in names else [],
        ),
        f"{job.rows:,} texts, from text to label and score; loading and a first call on 64 texts "
        f"are not timed. {args.repetitions} repetitions in turns, each run in its own process: "
        f"median (min-max). The others get batches of {args.batch_size}, padded to the longest, in "
        "the order of the texts or sorted by their length, sorting included. Accuracy is that of a "
        f"model after {steps} steps on rows of this file, to compare only. {agree}"
        f"{skipped if device == 'cpu' or in_bf16 else ' ONNX Runtime ran on the CPU.'}",
        figures.prediction_table(names, runs, at.labels_of(job.rows)),
    ]
    spreads = {
        key: figures.spread([len(run.answers) / run.seconds for run in of])
        for key, of in runs.items()
    }
    record: dict[str, Any] = {
        "title": f"{at.title}, {machine.kind(device)}, {dtype}",
        "unit": "rows/s in prediction",
    }
    # The overview compares with the first of them: bertdist in the precision of the section.
    ordered = sorted(spreads, key=lambda key: key in FLOAT32)
    record["bars"] = page.bars(names, {key: spreads[key] for key in ordered})
    record["runs"] = {
        key: [
            {"seconds": run.seconds, "rows": len(run.answers), "process_mib": run.process_mib}
            for run in of
        ]
        for key, of in runs.items()
    }
    kind = page.slug(f"{machine.kind(device)} {'bfloat16 ' * in_bf16}{at.title}")
    return Section(f"prediction-{kind}", parts, record)


Compared = dict[str, tuple[str, str, str | None]]  # key -> (name, contender, precision)
PEERS: Compared = {key: (CONTENDERS[key], key, None) for key in "ab"}
PRECISIONS: Compared = {
    "no": ("bertdist, float32", "a", "no"),
    "bf16": ("bertdist, bf16", "a", "bf16"),
}


def accuracy(at: Stage) -> Section:
    """Accuracy of each contender, or of each precision, after one epoch over all rows, for several
    seeds.
    """
    args, dev_file = at.args, str(at.folder / "dev.jsonl")
    if not Path(args.validation_file).is_file():
        raise BenchError(f"--validation_file {args.validation_file}: there is no such file; {HINT}")
    source = {
        "text_column": args.text_column,
        "label_column": args.label_column,
        "labels": at.labels,
    }
    dev = at.run_job(
        "rows",
        file=str(Path(args.validation_file).resolve()),
        rows=None,
        rows_file=dev_file,
        **source,
    )
    compared = PRECISIONS if args.accuracy_in_bf16 else PEERS
    names = {key: name for key, (name, _, _) in compared.items()}
    seeds = [args.seed + i for i in range(args.seeds)]
    runs: dict[str, list[TrainResult]] = {key: [] for key in compared}
    for seed in seeds:
        for key, (name, contender, precision) in compared.items():
            steps = -(-at.rows // args.batch_size)
            runs[key].append(at.train(contender, steps, seed, dev_file, precision=precision))
            log(f"{name}: accuracy {runs[key][-1].accuracy:.4f}")
        figures.assert_same_rows({key: of[-1] for key, of in runs.items()})
    device = next(iter(runs.values()))[0].device
    values = {
        key: [run.accuracy for run in of if run.accuracy is not None] for key, of in runs.items()
    }
    subject = "Accuracy in float32 and bf16" if args.accuracy_in_bf16 else "Accuracy"
    subject = f"{subject} after one epoch, {machine.kind(device)}"
    differ = (
        "Both have the same rows per step and the same dropout per seed: what differs is rounding."
        if args.accuracy_in_bf16
        else "The two have different row orders and dropout per seed: they agree only within the "
        "spread."
    )
    parts = [
        at.heading(subject, device),
        f"{at.rows:,} rows, each once, {args.batch_size} per step, learning rate "
        f"{args.learning_rate:g}; accuracy of the last weights, in float32, on {dev['rows']:,} "
        f"other rows. {differ}",
        figures.accuracy_table(names, seeds, values),
    ]
    kind = "accuracy-bf16" if args.accuracy_in_bf16 else "accuracy"
    return Section(
        f"{kind}-{page.slug(f'{machine.kind(device)} {at.title}')}",
        parts,
        {"title": at.title, "seeds": seeds, "accuracy": values},
    )


def main(words: Sequence[str] | None = None, child: Child = run_child) -> int:
    """Command line; returns exit code 0, or 1 after a user's mistake, with one line."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    of_accuracy = args.accuracy or args.accuracy_in_bf16
    run = prediction if args.prediction else accuracy if of_accuracy else training
    try:
        with stage(args, words, child) as at:
            name, parts, record = run(at)
        section = "\n\n".join(part for part in parts if part)
        print(section)
        log(page.write(Path(args.output), name, section, record))
    except BenchError as error:
        log(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
