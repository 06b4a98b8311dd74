"""Fine-tune a BERT-family classifier.

    accelerate launch bertdist/train.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.tsv --validation_file dev.tsv --output_dir out

This file is all of training, top to bottom: load the data and the model, resume, then repeat: take
a step, sometimes log, evaluate and save. The modules that a row passes, in their order:

    data/load_data -> data/readers -> data/columns -> data/records -> data/loader (its steps, of
    data/sharding, data/tokenization, data/batch) -> training/micro_batches

and what `train_step` does with it:

    models/classifier -> tasks/tasks (loss) -> training/optimizer (clipping, the update), checked by
    training/nonfinite

Then training/evaluation, training/best_model and training/checkpoint.
"""

import os
import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder
        # that holds bertdist/.
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from bertdist.core.args import parse_or_exit, read_config
    from bertdist.training.resume_check import check_start

    # Before torch is imported, which takes seconds
    parsed_config = parse_or_exit(read_config, check_start)

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bertdist.core.config import (
    OptimConfig,
    RunConfig,
    TrainConfig,
    count_steps,
    duration_in_steps,
    log_interval,
)
from bertdist.core.terminal import EXIT_STOPPED
from bertdist.data.bad_rows import BadRows, collect_bad_rows, record_bad_rows
from bertdist.data.batch import PackedBatch, RankStep
from bertdist.data.load_data import load_splits
from bertdist.data.loader import Loader, MapLoader, create_eval_loader, create_train_loader
from bertdist.data.records import Records
from bertdist.data.stats import (
    DatasetStats,
    collect_stats,
    data_fingerprint,
    pretrained_digests,
)
from bertdist.data.tokenization import load_tokenizer, truncation_notes
from bertdist.distributed.collectives import assert_same_on_all_ranks, raise_on_all_ranks
from bertdist.distributed.launch import launch, reset_torch_modes, run_cli
from bertdist.distributed.preemption import StopSignal
from bertdist.models.classifier import (
    Classifier,
    load_classifier,
    load_model_config,
    pretrained_labels,
)
from bertdist.models.dropout import seed_dropout
from bertdist.tasks.tasks import Task, create_task
from bertdist.training.best_model import BestModel, EarlyStopping
from bertdist.training.checkpoint import Checkpointer, TrainState
from bertdist.training.evaluation import RunEvaluator
from bertdist.training.micro_batches import MicroBatcher, set_comm_hook
from bertdist.training.nonfinite import NonFiniteGuard, nan_aware_scale
from bertdist.training.optimizer import (
    apply_update,
    clip_gradients,
    create_lr_schedule,
    create_optimizer,
    set_learning_rate,
)
from bertdist.training.resume_check import resume_signature
from bertdist.training.run_lock import check_disk_space
from bertdist.training.run_logger import NO_HOOKS, Hooks, RunLogger, open_run
from bertdist.training.run_summary import (
    describe_frozen,
    describe_model,
    describe_optimization,
    show_data,
)
from bertdist.training.throughput import create_meter

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream


@reset_torch_modes()
def train(config: TrainConfig, hooks: Hooks = NO_HOOKS) -> TrainState:
    """Fine-tune as configured; rerunning with the same --output_dir resumes.

    Returns the last state. The caller's autocast, grad mode, default device and default dtype
    change nothing.
    """
    accelerator, config, precision_notes = launch(config)
    stop = StopSignal(config.run.stop_before_time_limit)
    with stop, open_run(config, accelerator, hooks, precision_notes) as log:
        # Data: rows and their labels; nothing is tokenized yet.
        inputs = load_inputs(config, accelerator)
        stats = collect_stats(inputs.rows, config, accelerator, log.say, stop)
        if stats is None:  # a stop was requested while a stream was read
            log.log_summary(TrainState(), stop.reason)
            return TrainState()
        task, loader, eval_loader, bad_rows = create_loaders(inputs, stats, config, accelerator)
        evaluator = create_evaluator(inputs, eval_loader, task, config, accelerator, log)
        plan = StepPlan(config.run, loader.steps_per_epoch, has_eval=eval_loader is not None)
        show_data(log.screen, inputs.rows, stats, inputs.eval_rows, task, inputs.test_rows)

        # Model: a Hugging Face classifier, AdamW, the learning rate as a function of the step.
        classifier, adamw, lr_factor = create_model(inputs, task, plan, config, accelerator, log)
        model, optimizer = accelerator.prepare(classifier, adamw)

        # Resume: a step depends on weights, optimizer and `state`, nothing else.
        checkpointer = create_checkpointer(inputs, task, plan, config, accelerator, log)
        state = checkpointer.restore(classifier, adamw, config.run.resume_from_checkpoint)
        evaluator.repair_best(classifier, state, checkpointer)
        log.start(state, plan.total_steps, config, accelerator, plan.steps_per_epoch)
        early_stopping = EarlyStopping(config.run, state)
        nan_guard = NonFiniteGuard(config.run, classifier, loader, task, accelerator, state, log)
        micro_batcher = MicroBatcher(model, loader, task, state, config.batch, accelerator, log.say)
        if not state.finished:
            model.train()
            take_step = prepare_steps(config, model, classifier, adamw, micro_batcher)
        meter = create_meter(classifier, accelerator, measure=not state.finished)

        # Train until all steps are done, evaluations stop improving, or a stop is requested.
        stop_requested, lr, grad_norm = False, math.nan, torch.tensor(math.nan)
        with log.progress(meter.watch(micro_batcher.steps(plan.total_steps))) as steps:
            while not (state.finished or stop_requested):
                if not state.evaluation_pending:  # else a stop interrupted it, and it comes first
                    step = next(steps)
                    lr = set_learning_rate(optimizer, lr_factor(step.number))
                    seed_dropout(config.run.seed, step.number, accelerator.process_index)
                    loss, grad_norm = take_step(model, optimizer, step, micro_batcher, config.optim)
                    state.advance(step, loss)
                    record_bad_rows(bad_rows, step.bad_rows, accelerator)
                    stop_requested = stop.requested(accelerator)
                    nan_guard.check(step, loss, grad_norm, stop_requested or plan.acts(state.step))
                    if plan.logs(state.step):
                        state.gather_losses(meter, accelerator)
                        log.log_training(state, plan.epoch(state), lr, grad_norm, meter.lap())
                    state.evaluation_pending = plan.evaluates(state.step)
                with meter.paused():
                    if state.evaluation_pending:
                        gain = evaluator.evaluate_step(classifier, state, plan.epoch(state), stop)
                        early_stopping.update(gain)
                        stop_requested |= state.evaluation_pending  # still: a stop interrupted it
                    if early_stopping.triggered or plan.ends(state.step):
                        state.finished = not state.evaluation_pending
                    if state.finished or stop_requested or plan.saves(state.step):
                        state.gather_losses(meter, accelerator)
                        if state.finished or stop_requested:
                            nan_guard.check_end(adamw)
                            log.log_end(state, plan.epoch(state), lr, grad_norm, meter)
                        checkpointer.save(classifier, adamw, state)
        reports = evaluator.write_final_reports(classifier, state, checkpointer)
        log.log_summary(state, stop.reason, *reports)
        # DDP before the process group (open_run ends it): else it joins gloo's thread with the GIL
        # held, which that thread may wait for (torch 2.13).
        model, optimizer = accelerator.free_memory(model, optimizer)
    return state


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    step: RankStep,
    micro_batcher: MicroBatcher,
    config: OptimConfig,
) -> tuple[Tensor, Tensor]:
    """Forward, backward, clip_gradients, optimizer.step() and zero_grad() over this rank's share of
    one step; returns this rank's loss sum () and the gradient's norm ().

    Row losses are summed and divided by the rows of the whole step, so the update is that of one
    big batch, however the step was distributed and split. DDP averages over ranks; nan_aware_scale
    undoes it. If memory runs out on any rank, the step is repeated with smaller micro-batches
    (training/micro_batches.py). If loss or gradient is not finite, `apply_update` skips the update.
    """
    task, accelerator = micro_batcher.task, micro_batcher.accelerator

    def backward(batch: PackedBatch, final: bool) -> Tensor:
        batch = batch.to(accelerator.device)
        # Gradients are exchanged once per step.
        with nullcontext() if final else accelerator.no_sync(model):
            loss = task.loss(model(batch), batch.targets, batch.weights)
            scale = nan_aware_scale(loss, accelerator.num_processes / step.rows)
            accelerator.backward(loss * scale)
        return loss.detach()

    loss = micro_batcher.accumulate_gradients(model, step, backward)
    grad_norm = clip_gradients(model, config.max_grad_norm or math.inf, accelerator)
    apply_update(model, optimizer, grad_norm, accelerator)  # unless the norm is not finite
    return loss, grad_norm


def prepare_steps(
    config: TrainConfig,
    model: nn.Module,
    classifier: Classifier,
    adamw: AdamW,
    micro_batcher: MicroBatcher,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What precedes the first step of every start: DDP's hook, its warm-up, size of micro-batches,
    --torch_compile. Returns `train_step`, or replays of it (--cuda_graphs). A collective.
    """
    set_comm_hook(model, config.run.ddp_comm_hook)
    micro_batcher.warm_up_ddp(model)
    micro_batcher.find_token_budget(classifier, adamw)
    if config.run.torch_compile:
        from bertdist.models.compile import compile_layers

        micro_batcher.say(compile_layers(classifier, micro_batcher.accelerator))
    if config.run.cuda_graphs:
        from bertdist.training.cuda_graph import create_graphed_step

        return create_graphed_step(train_step, classifier, micro_batcher, config.model.max_length)
    return train_step


class Inputs(NamedTuple):
    """What training reads; nothing is tokenized yet."""

    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig  # of the pretrained model
    rows: "Records | Stream"  # to train on
    eval_rows: Records | None  # the validation split
    test_rows: Records | None  # to evaluate at the end
    digests: dict[str, str]  # of tokenizer and model_config

    @property
    def splits(self) -> dict[str, Records]:
        """The splits, by their names in messages; of a stream the first rows."""
        if isinstance(self.rows, Records):
            splits = {"training rows": self.rows}
        else:
            head = self.rows.head()
            splits = {f"first {len(head):,} training rows": head}
        others = {"validation rows": self.eval_rows, "test rows": self.test_rows}
        return splits | {name: rows for name, rows in others.items() if rows}


def load_inputs(config: TrainConfig, accelerator: Accelerator) -> Inputs:
    """Model config, tokenizer and all splits.

    Raises ConfigError, DataError or ModelError on all ranks, also if the ranks' inputs differ.
    """
    from bertdist.models.model_config import check_vocabulary

    with raise_on_all_ranks(accelerator):
        model_config, tokenizer = load_model_config(config.model), load_tokenizer(config.model)
        check_vocabulary(model_config, tokenizer, config.model.model_name_or_path)
        rows, eval_rows, test_rows = load_splits(config)
        digests = pretrained_digests(model_config, tokenizer)
        fingerprint = data_fingerprint(digests, rows, eval_rows, test_rows)
    assert_same_on_all_ranks(accelerator, fingerprint)
    return Inputs(tokenizer, model_config, rows, eval_rows, test_rows, digests)


def create_loaders(
    inputs: Inputs, stats: DatasetStats, config: TrainConfig, accelerator: Accelerator
) -> tuple[Task, Loader, MapLoader | None, BadRows]:
    """The task that the labels make, both splits in steps for this rank, the bad rows so far."""
    tokenizer, model_config, rows, eval_rows, test_rows, _ = inputs
    with raise_on_all_ranks(accelerator):
        scored = [split for split in (eval_rows, test_rows) if split]
        found = [*stats.bad_rows, *(row for split in scored for row in split.bad_rows)]
        bad_rows = collect_bad_rows(found, config, accelerator)
        task = create_task(config.task, stats.labels, pretrained_labels(model_config))
        loader = create_train_loader(rows, stats, tokenizer, task, config, accelerator)
        eval_loader = create_eval_loader(eval_rows, tokenizer, task, config, accelerator)
    return task, loader, eval_loader, bad_rows


def create_model(
    inputs: Inputs,
    task: Task,
    plan: "StepPlan",
    config: TrainConfig,
    accelerator: Accelerator,
    log: RunLogger,
) -> tuple[Classifier, AdamW, Callable[[int], float]]:
    """The pretrained model with a head for the task, its optimizer, and the learning rate factor
    of a step.

    Raises ConfigError or ModelError on all ranks.
    """
    with raise_on_all_ranks(accelerator):
        torch.manual_seed(config.run.seed)  # the new head's weights
        classifier, notes = load_classifier(
            config.model, task, inputs.model_config, tokenizer=inputs.tokenizer
        )
        if accelerator.is_main_process:
            notes += truncation_notes(inputs.splits, inputs.tokenizer, config.model.max_length)
        adamw = create_optimizer(classifier, config.optim)
        lr_factor = create_lr_schedule(config.optim, plan.total_steps)
    steps = f"{plan.total_steps:,} with {config.batch.train_batch_size:,} rows each"
    about = f"{steps} ({plan.describe()}); {describe_optimization(config.optim)}"
    log.screen.block("Steps", about)
    log.screen.block("Model", describe_model(config, classifier))
    if frozen := describe_frozen(config, classifier):
        log.screen.block("Frozen", frozen)
    log.note(*notes)
    log.screen.end_block()
    log.screen.detail(check_disk_space(log.folder, classifier, accelerator))
    return classifier, adamw, lr_factor


def create_evaluator(
    inputs: Inputs,
    eval_loader: MapLoader | None,
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
    log: RunLogger,
) -> RunEvaluator:
    """Raises, on all ranks, ConfigError for metrics that are unknown or do not fit the task, and
    DataError for test rows with other labels.
    """
    tokenizer, test_rows = inputs.tokenizer, inputs.test_rows
    with raise_on_all_ranks(accelerator):
        test_loader = create_eval_loader(test_rows, tokenizer, task, config, accelerator)
        rows, say, codes = inputs.rows, log.say, task.codes
        best_model = BestModel(config, tokenizer, rows, accelerator, say, codes)
        return RunEvaluator(eval_loader, task, config, accelerator, best_model, log, test_loader)


def create_checkpointer(
    inputs: Inputs,
    task: Task,
    plan: "StepPlan",
    config: TrainConfig,
    accelerator: Accelerator,
    log: RunLogger,
) -> Checkpointer:
    """Checkpoints that resume only a run of the same settings and data."""
    rows, digests = (inputs.rows, inputs.eval_rows), inputs.digests
    signature = resume_signature(config, *rows, task, plan.total_steps, digests)
    folder, keep = log.folder / "checkpoints", config.run.save_total_limit
    return Checkpointer(folder, signature, accelerator, keep, log.say, log.flush)


class StepPlan:
    """After which steps to log, evaluate and save: every so many (--log_every, --eval_every,
    --save_every), and at the end.
    """

    def __init__(self, run: RunConfig, steps_per_epoch: int, has_eval: bool) -> None:
        """steps_per_epoch: 0 for a stream of unknown length."""
        total_steps = count_steps(run, steps_per_epoch)
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps

        def interval(duration: str) -> int:  # 0: never
            return duration_in_steps(duration, steps_per_epoch, total_steps)

        self._log = log_interval(run.log_every, steps_per_epoch, total_steps)
        self._save = interval(run.save_every)
        self._evaluate = interval(run.eval_every) if has_eval else 0
        every = {"--eval_every": run.eval_every * has_eval, "--save_every": run.save_every}
        self._auto = [name for name, duration in every.items() if duration.strip() == "auto"]

    def ends(self, step: int) -> bool:
        """Whether all steps are done."""
        return step == self.total_steps

    def logs(self, step: int) -> bool:
        """Whether a log line follows this step."""
        return self._is_due(step, self._log)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows this step.

        Without a validation split at the end only, to keep the last weights.
        """
        return self._is_due(step, self._evaluate)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows this step."""
        return self._is_due(step, self._save)

    def acts(self, step: int) -> bool:
        """Whether any of them follows this step."""
        return self.logs(step) or self.evaluates(step) or self.saves(step)

    def _is_due(self, step: int, interval: int) -> bool:
        return self.ends(step) or (interval > 0 and step % interval == 0)

    def epoch(self, state: TrainState) -> float:
        """Passes over the training rows so far."""
        return state.epochs(self.steps_per_epoch)

    def describe(self) -> str:
        """Epochs, in words."""
        if self.steps_per_epoch:
            epochs = self.total_steps / self.steps_per_epoch
            return (
                f"{self.steps_per_epoch:,} steps per epoch, {epochs:.3g} epoch{'s' * (epochs != 1)}"
            )
        names = " and ".join(self._auto)
        return "the length of an epoch is not known" + f": {names} 10% of the run" * bool(names)


def train_all(config: TrainConfig, train_one: Callable[[TrainConfig], bool]) -> bool:
    """The run of a config, or those of --folds or --seeds; whether all have finished.

    train_one: of a single run.
    """

    def train_and_report(config: TrainConfig) -> bool:
        from bertdist.reporting.after_run import finish_run

        finished = train_one(config)
        if finished:
            finish_run(config)
        return finished

    if config.run.folds:
        from bertdist.training.cross_validation import cross_validate

        return cross_validate(config, train_one)
    if config.run.seeds:
        from bertdist.training.seeds import train_seeds

        return train_seeds(config, train_and_report)
    return train_and_report(config)


def run(config: TrainConfig) -> int:
    """Train, a run per fold or seed, or show the plan of --dry_run; returns the exit code."""
    if config.run.dry_run:
        from bertdist.data_quality.dry_run import dry_run

        return dry_run(config)
    return 0 if train_all(config, lambda run: train(run).finished) else EXIT_STOPPED


if __name__ == "__main__":
    run_cli(run, parsed_config)
