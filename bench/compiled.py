"""Whether --torch_compile makes a training step faster on a CPU: eager and compiled in turns.

    python -m bench.compiled    # SST-2's training rows beside the repository, demo/model
    python -m bench.compiled --train_file demo/data/train.tsv --threads 2

The fastest of all rounds counts for each step. Timed are forward, backward, clipping and AdamW, in
seconds of processor time: with one thread they are what a step costs however busy the machine is;
with several, threads that wait for each other count too.
"""

import argparse
import sys
from collections.abc import Sequence
from time import process_time
from typing import Any

import torch
from accelerate import Accelerator

from bench.jobs import BenchError
from bench.peers import positive
from bench.scaling import SST2
from bench.stage import log
from bertdist.core.config import DataConfig, ModelConfig, OptimConfig, TaskConfig
from bertdist.core.errors import BertdistError
from bertdist.data.batch import PackedBatch
from bertdist.data.load_data import load_records
from bertdist.data.loader import MapLoader
from bertdist.data.tokenization import create_dataset, load_tokenizer
from bertdist.distributed.launch import keep_freed_memory
from bertdist.models.classifier import load_classifier
from bertdist.models.compile import Backend, compile_layers
from bertdist.models.cpu_layers import zero_grad
from bertdist.models.dropout import seed_dropout
from bertdist.tasks.tasks import Task, create_task
from bertdist.training.optimizer import create_optimizer


def parser() -> argparse.ArgumentParser:
    """The flags."""
    result = argparse.ArgumentParser(
        prog="python -m bench.compiled", description="Eager and compiled steps.", allow_abbrev=False
    )
    add = result.add_argument
    rows = "Rows. Default: SST-2's training rows in ../shared/data, if they are there."
    add("--train_file", default=str(SST2), help=rows)
    add("--model_name_or_path", default="demo/model", help="Folder of the model.")
    add("--batch_size", type=positive, default=32, help="Rows per step.")
    add("--steps", type=positive, default=6, help="Steps, each with its own rows.")
    add("--rounds", type=positive, default=10, help="Times that each step is timed in each way.")
    add("--threads", type=positive, default=1, help="Threads of torch.")
    return result


def compare(args: argparse.Namespace, backend: Backend = "inductor") -> tuple[float, float, str]:
    """Processor seconds of all steps, eager and compiled, and a note.

    Raises BenchError and BertdistError.
    """
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = ModelConfig(model_name_or_path=args.model_name_or_path)
    rows = load_records(DataConfig(train_file=[args.train_file]), "train")
    task = create_task(TaskConfig(), rows.label_stats(), None)
    examples = create_dataset(rows, load_tokenizer(config), task, config.max_length)
    batches = MapLoader(
        dataset=examples,
        rows_per_step=args.batch_size,
        tokens_per_micro_batch=1 << 20,
        shuffle=True,
    )
    steps = [
        step.micro_batches[0] for step in batches.steps(0, min(args.steps, batches.steps_per_epoch))
    ]
    classifier, _ = load_classifier(config, task)
    # learning rate 0: every round has the same steps
    adamw = create_optimizer(classifier.train(), OptimConfig(learning_rate=0.0))
    message = compile_layers(classifier, Accelerator(cpu=True), backend)
    if "cannot" in message:
        raise BenchError(message)
    compiled = {
        layer: layer.forward
        for layer in classifier.modules()
        if "forward" in vars(layer) and layer.forward.__module__ == "bertdist.models.compile"
    }
    fastest: dict[tuple[int, bool], float] = {}
    for turn in range(args.rounds):
        for number, batch in enumerate(steps):
            for fast in (turn % 2 == 0, turn % 2 == 1):
                for layer, forward in compiled.items():
                    vars(layer).pop("forward", None)
                    if fast:
                        layer.forward = forward
                time = seconds(classifier, adamw, batch, task, number)
                fastest[number, fast] = min(time, fastest.get((number, fast), time))
    eager, quick = (
        sum(time for (_, fast), time in fastest.items() if fast == which) for which in (False, True)
    )
    tokens = sum(len(batch.ids) for batch in steps) / len(steps)
    return eager, quick, f"{message} {len(steps)} steps of {tokens:.0f} tokens."


def seconds(
    classifier: Any, adamw: torch.optim.Optimizer, batch: PackedBatch, task: Task, number: int
) -> float:
    """Processor time of one step."""
    seed_dropout(1, number, 0)
    begin = process_time()
    (task.loss(classifier(batch), batch.targets, batch.weights) / len(batch.lengths)).backward()
    torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
    adamw.step()
    zero_grad(classifier)
    return process_time() - begin


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, or 1 with one line for a user's mistake."""
    args = parser().parse_args(arguments)
    try:
        eager, quick, message = compare(args)
    except (BenchError, BertdistError) as error:
        log(str(error))
        return 1
    print(
        f"{message}\nProcessor time with {args.threads} thread(s): eager {eager:.3f} s, "
        f"compiled {quick:.3f} s, {quick / eager:.3f} times."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
