"""A training loop of your own with bertdist's parts: rows, steps without padding, exact gradients.

    python examples/own_loop.py --config run.yaml
    accelerate launch examples/own_loop.py --config run.yaml    # on any number of devices

The flags are those of `bertdist train`; files and checkpoints are up to you.
"""

import sys
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import AdamW

from bertdist import Evaluator, create_train_loader, load_classifier, read_config
from bertdist.data.load_data import load_splits
from bertdist.data.loader import create_eval_loader
from bertdist.data.stats import collect_stats
from bertdist.data.tokenization import load_tokenizer
from bertdist.tasks.tasks import create_task


def main(arguments: list[str]) -> dict[str, float]:
    """Train for --num_train_epochs; returns the scores on the validation rows."""
    config = read_config(arguments)
    accelerator = Accelerator(cpu=config.run.use_cpu)
    torch.manual_seed(config.run.seed)  # weights of the new head

    rows, eval_rows, _ = load_splits(config)
    stats = collect_stats(rows, config, accelerator, accelerator.print)
    assert stats is not None
    task = create_task(config.task, stats.labels, None)
    tokenizer = load_tokenizer(config.model)
    loader = create_train_loader(rows, stats, tokenizer, task, config, accelerator)
    classifier, notes = load_classifier(config.model, task, tokenizer=tokenizer)
    accelerator.print(*notes)
    optimizer: Any = AdamW(classifier.parameters(), lr=config.optim.learning_rate)
    model, optimizer = accelerator.prepare(classifier, optimizer)

    last = int(config.run.num_train_epochs * loader.steps_per_epoch)
    for step in loader.steps(0, last):  # the same rows on any number of devices
        for batch in step.micro_batches:  # this rank's share, packed without padding
            final = batch is step.micro_batches[-1]
            with nullcontext() if final else accelerator.no_sync(model):
                batch = batch.to(accelerator.device)
                loss = task.loss(model(batch), batch.targets, batch.weights)  # sum over rows
                accelerator.backward(loss * accelerator.num_processes / step.rows)
        accelerator.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step.number + 1} of {last}", end="\r")

    eval_loader = create_eval_loader(eval_rows, tokenizer, task, config, accelerator)
    evaluation = Evaluator(eval_loader, task, config, accelerator).evaluate(classifier)
    assert evaluation is not None
    accelerator.print(evaluation.scores)
    return evaluation.scores


if __name__ == "__main__":
    main(sys.argv[1:])
