"""Fine-tune a BERT-family classifier.

    accelerate launch bertdist/train.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.tsv --validation_file dev.tsv --output_dir out

This file is the whole of training, top to bottom: open the data, build the model, begin or go on, and then repeat: take a step,
now and then score, now and then save. Each noun is one module; read them in the order of the data's way:

    records -> encoding -> batching -> classifier -> tasks (loss) -> optim -> evaluation -> checkpoint
"""

import os
import sys

if __name__ == "__main__" and not __package__:
    # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder that holds bertdist/.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from bertdist.core.args import read_config
from bertdist.core.config import TrainConfig, config_to_yaml, duration_in_steps
from bertdist.data.batch import PackedBatch, Step, single_token_batch
from bertdist.data.loader import create_eval_loader, create_train_loader
from bertdist.data.loading import collect_skipped_rows, load_splits, record_skipped_rows
from bertdist.data.sharding import prefetch_to_device
from bertdist.data.stats import collect_stats, create_task, data_fingerprint
from bertdist.data.streaming import AnyLoader
from bertdist.data.tokenization import load_tokenizer
from bertdist.data_quality.dry_run import dry_run
from bertdist.distributed.collectives import assert_same_on_all_ranks, raise_on_all_ranks
from bertdist.distributed.launch import (
    EXIT_STOPPED,
    check_world,
    create_accelerator,
    launch_fingerprint,
    run_cli,
)
from bertdist.distributed.preemption import StopSignal
from bertdist.distributed.watchdog import open_watchdog
from bertdist.models.classifier import (
    Classifier,
    load_classifier,
    load_model_config,
    pretrained_labels,
)
from bertdist.models.compile import compile_layers
from bertdist.models.cpu_layers import zero_grad
from bertdist.models.dropout import seed_dropout
from bertdist.tasks.tasks import Task
from bertdist.training.account import keep_score, record_training, tell_end, tell_meter
from bertdist.training.best_model import BestModel
from bertdist.training.checkpoint import Checkpointer, TrainState
from bertdist.training.cuda_graph import Take, graphed_step
from bertdist.training.evaluation import Evaluator, evaluate_split
from bertdist.training.nonfinite import NonFiniteGuard, nan_aware_scale, step_if_finite
from bertdist.training.optimizer import create_lr_schedule, create_optimizer, set_learning_rate
from bertdist.training.resume_check import resume_signature
from bertdist.training.run_lock import check_disk_space, lock_run_folder
from bertdist.training.run_logger import RunLogger, describe_data, environment, notes_of, open_log
from bertdist.training.step import MicroBatcher
from bertdist.training.throughput import ThroughputMeter, matmul_rate, model_flops

if __name__ == "__main__" and not __package__:
    # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder that holds bertdist/.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def train(config: TrainConfig) -> TrainState:
    """Train as the config says, going on where an earlier run in the same folder stopped; returns how far it came."""
    accelerator = create_accelerator(config.run)
    check_world(accelerator.num_processes)
    config = replace(
        config, run=replace(config.run, mixed_precision=accelerator.mixed_precision)
    )  # where the launcher decided it
    assert_same_on_all_ranks(accelerator, launch_fingerprint(config))
    run, out = config.run, Path(config.run.output_dir)
    with (
        StopSignal(run.stop_before_time_limit) as stop,
        lock_run_folder(out, accelerator) as held,
        open_log(out, accelerator) as log,
        open_watchdog(out, accelerator, run) as watchdog,
    ):
        log.say(
            *held,
            f"{accelerator.num_processes} process(es) on {accelerator.device.type}, precision {accelerator.mixed_precision}.",
        )

        # Data: two splits of rows, and the task that their labels make. Nothing is tokenized yet.
        with raise_on_all_ranks(accelerator):
            settings, tokenizer = load_model_config(config.model), load_tokenizer(config.model)
            train_rows, dev_rows = load_splits(config)
        assert_same_on_all_ranks(
            accelerator, data_fingerprint(settings, tokenizer, train_rows, dev_rows)
        )
        if (known := collect_stats(train_rows, config, accelerator, log.say, stop)) is None:
            return leave_early(log, stop, accelerator)
        with raise_on_all_ranks(accelerator):
            skipped_rows = collect_skipped_rows(known, dev_rows, config, accelerator)
            task = create_task(config.task, known.labels, pretrained_labels(settings))
            train_batches = create_train_loader(
                train_rows, known, tokenizer, task, config, accelerator
            )
            dev_batches = create_eval_loader(dev_rows, tokenizer, task, config, accelerator)
            judge = (
                Evaluator(config.task, task, config.data.task_name)
                if dev_rows and accelerator.is_main_process
                else None
            )
        per_epoch = train_batches.steps_per_epoch
        total_steps = run.max_train_steps or max(1, math.ceil(run.num_train_epochs * per_epoch))
        log.say(*describe_data(train_rows, known, dev_rows, task, per_epoch, total_steps))

        # Model: a Hugging Face classifier, its optimizer, and the learning rate as a function of the step.
        with raise_on_all_ranks(accelerator):
            torch.manual_seed(run.seed)  # the new head's weights
            classifier, notes = load_classifier(config.model, task, settings)
            adamw = create_optimizer(classifier, config.optim)
            schedule = create_lr_schedule(config.optim, total_steps)
        log.say(*notes, check_disk_space(out, classifier, accelerator))
        model, optimizer = accelerator.prepare(classifier, adamw)

        # Begin, or go on where an interrupted run stopped.
        signature = resume_signature(config, train_rows, dev_rows, task, total_steps)
        checkpoints = Checkpointer(
            out / "checkpoints", signature, accelerator, run.save_total_limit, log.say, log.to_disk
        )
        progress = watchdog.progress = (
            checkpoints.restore(classifier, adamw, run.resume_from_checkpoint) or TrainState()
        )
        with raise_on_all_ranks(accelerator):
            log.begin(
                progress.step,
                {
                    "config.yaml": config_to_yaml(config),
                    "environment.json": environment(accelerator),
                },
                progress.evaluation_pending,
            )
            log.status("finished" if progress.finished else "running", progress.step)
        best = BestModel(run, tokenizer, task, accelerator, notes_of(config, train_rows))
        due = {
            name: duration_in_steps(getattr(run, f"{name}_every"), per_epoch, total_steps)
            for name in ("log", "eval", "save")
        }
        room = MicroBatcher(
            model,
            train_batches,
            config.batch.tokens_per_micro_batch,
            progress,
            accelerator,
            log.say,
        )
        losses: list[
            Tensor
        ] = []  # this rank's loss sum () of each step since they were last brought together
        if not progress.finished:
            warm_up(model, train_batches, progress, task, accelerator)
            room.find(
                lambda batch: task.loss(classifier(batch), batch.targets, batch.weights),
                classifier,
                adamw,
            )
            stepper = choose_step(
                config, classifier, room.rebatch(train_batches), accelerator, log.say
            )
            log.open_progress(progress.step, total_steps)
        meter = open_meter(classifier, accelerator, progress)
        nan = NonFiniteGuard(run, classifier, train_batches, task, accelerator, progress, log)
        for step in owed_first(
            progress,
            meter.watch(
                steps_left(room.rebatch(train_batches), progress, total_steps, accelerator.device)
            ),
        ):
            if step is not None:
                set_learning_rate(optimizer, schedule(step.number))
                seed_dropout(run.seed, step.number, accelerator.process_index)
                loss, grad_norm = stepper(
                    model, optimizer, step, task, accelerator, config.optim.max_grad_norm, room
                )
                losses.append(loss)
                progress.advance(step)
                record_skipped_rows(skipped_rows, step, accelerator)
                log.advance()
            progress.finished = progress.step == total_steps
            stopping = stop.requested(accelerator)
            if step is not None:
                at_once = (
                    stopping
                    or progress.finished
                    or any(is_due(progress.step, every) for every in due.values())
                )
                nan.check(step, loss, grad_norm, at_once)

            if step is not None and (progress.finished or is_due(progress.step, due["log"])):
                gather_losses(progress, losses, meter, accelerator)
                rate = config.optim.learning_rate * schedule(step.number)
                record_training(
                    log,
                    progress,
                    per_epoch,
                    learning_rate=rate,
                    grad_norm=grad_norm.item(),
                    **meter.lap(),
                )

            if dev_batches and (progress.finished or is_due(progress.step, due["eval"])):
                with meter.paused():
                    evaluation = nan.check_evaluation(
                        evaluate_split(
                            classifier, room.rebatch(dev_batches), judge, accelerator, stop
                        ),
                        dev_batches,
                    )
                    keep_score(evaluation, classifier, log, best, progress, per_epoch)
                    stopping = stopping or progress.evaluation_pending

            if progress.finished or stopping or is_due(progress.step, due["save"]):
                gather_losses(progress, losses, meter, accelerator)
                tell_meter(log, progress, meter, stopping)
                with meter.paused():
                    if progress.finished and not dev_batches:
                        best.keep(classifier, None, progress)
                    checkpoints.save(classifier, adamw, progress)
            if progress.finished or stopping:
                break
        tell_end(log, progress, best, total_steps, stop.reason)
        # DDP goes before the process group: else it joins gloo's thread with the GIL held, which that thread may wait for (torch 2.13).
        model, optimizer = accelerator.free_memory(model, optimizer)
        accelerator.end_training()
    return progress


def leave_early(log: RunLogger, stop: StopSignal, accelerator: Accelerator) -> TrainState:
    """Asked to stop before the first step."""
    reason = stop.reason or "another rank was asked to stop"
    log.status("preempted", 0, reason)
    log.say(f"Asked to stop ({reason}) before the first step; the same command begins again.")
    accelerator.end_training()
    return TrainState()


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    step: Step,
    task: Task,
    accelerator: Accelerator,
    max_grad_norm: float,
    room: MicroBatcher,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over this rank's share; returns this rank's loss sum () and the gradient's norm ().

    Row losses are summed and divided by the rows of the whole step, so the update is that of one big batch, however the step was
    dealt and cut. DDP averages over ranks; nan_aware_scale undoes it. Where memory runs out on any rank, the step is begun again with
    micro-batches of half the tokens (see room.py).
    """

    def backward(batch: PackedBatch, final: bool) -> Tensor:
        batch = batch.to(accelerator.device)
        with nullcontext() if final else accelerator.no_sync(model):  # gradients travel once a step
            loss = task.loss(model(batch), batch.targets, batch.weights)
            accelerator.backward(
                loss * nan_aware_scale(loss, accelerator.num_processes / step.rows)
            )
        return loss.detach()

    total = room.accumulate(model, step, backward)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    assert grad_norm is not None
    step_if_finite(
        model, optimizer, grad_norm, accelerator
    )  # left out where loss or gradient is not finite
    return total, grad_norm


def choose_step(
    config: TrainConfig,
    classifier: Classifier,
    batches: AnyLoader,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> Take:
    """What takes the steps of this run: train_step, or replays of it (--cuda_graphs); its layers compiled (--torch_compile), or not."""
    if config.run.torch_compile:
        say(compile_layers(classifier, accelerator))
    if config.run.cuda_graphs:
        return graphed_step(
            train_step, classifier, batches, accelerator, config.model.max_length, say
        )
    return train_step


def steps_left(
    batches: AnyLoader, progress: TrainState, total_steps: int, device: torch.device
) -> Iterator[Step]:
    """This rank's shares of the steps that are still to be taken, on the device."""
    return prefetch_to_device(
        batches.steps(
            progress.step,
            progress.step if progress.finished else total_steps,
            progress.reader_state,
        ),
        device,
    )


def owed_first(progress: TrainState, steps: Iterator[Step]) -> Iterator[Step | None]:
    """The steps; before them None, where the last step was taken by a process that was stopped in the evaluation that follows it."""
    if progress.evaluation_pending:
        progress.evaluation_pending = False
        yield None
    yield from steps


def warm_up(
    model: nn.Module, batches: AnyLoader, progress: TrainState, task: Task, accelerator: Accelerator
) -> None:
    """One backward that is thrown away, before the first step of every start, fresh or resumed.

    DDP puts its gradient buckets in another order after its first backward, and sums are rounded in that order: without this a
    resumed run of 3 ranks or more differs from one that never stopped. One token does: any text brings the order about.
    """
    model.train()
    for first in replace(batches, workers=0).steps(
        progress.step, progress.step + 1, progress.reader_state
    ):
        batch = single_token_batch(first.share[0]).to(accelerator.device)
        accelerator.backward(task.loss(model(batch), batch.targets, batch.weights))
    zero_grad(model)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return bool(every) and step % every == 0


def open_meter(
    classifier: Classifier, accelerator: Accelerator, progress: TrainState
) -> ThroughputMeter:
    """A meter whose clock starts; before that all ranks measure at the same time what their devices can do."""
    mine = (
        0.0 if progress.finished else matmul_rate(accelerator.device, accelerator.mixed_precision)
    )
    rate = accelerator.reduce(
        torch.tensor([mine], device=accelerator.device), reduction="sum"
    ).item()
    flops = model_flops(classifier.model, "first tokens" if classifier.first_tokens_only else "all")
    return ThroughputMeter(flops, classifier.packed or classifier.padding_changes_logits, rate)


def gather_losses(
    progress: TrainState, losses: list[Tensor], meter: ThroughputMeter, accelerator: Accelerator
) -> None:
    """Add up the ranks' losses and the meters' figures of the steps since the last call; one collective, however many steps.

    Step by step, not as one running sum: so what is logged does not depend on when a checkpoint was written.
    """
    if losses:
        mine = torch.cat(
            [torch.stack(losses)[:, None], meter.take().to(accelerator.device)], dim=1
        )  # (steps, 1 + figures)
        every = accelerator.gather(mine[None]).cpu().double()  # (ranks, steps, 1 + figures)
        meter.add(every[:, :, 1:])
        total = every[:, :, :2].sum(0).tolist()  # gloo's own sum of 3 ranks rounds by place
        for entry, (loss, tokens) in zip(
            progress.unlogged_steps[-len(losses) :], total, strict=True
        ):
            entry[:] = (
                (loss, entry[1]) if math.isfinite(loss) else (0.0, 0.0)
            )  # a step that was left out, see nonfinite.py
            progress.tokens += int(tokens)
        losses.clear()


def main() -> None:
    """The command line. Exit codes: see `run_cli`."""
    run_cli(_main)


def _main(arguments: Sequence[str]) -> int:
    config = read_config(arguments)
    if config.run.dry_run:
        return dry_run(config)
    return 0 if train(config).finished else EXIT_STOPPED


if __name__ == "__main__":
    main()
