"""Every row judged by a model that has not learned it: rows -> k folds -> k runs of `train` on all folds but one -> logits.

In: rows with labels and the config of a run. Out: logits for every row, from the model of the run that was not given it.

1. Rows are dealt to folds by label, so that each fold has its share of every label; rows with the same text go to the same fold, since
   a model that has learned one of them has learned all. It is a pure function of texts, labels, seed and k.
2. Run i learns from the rows outside fold i, which are written to folds/i/train.jsonl, with the words of the whole task (kind, labels in
   order), so that all models have the same outputs. It is a run like any other, in folds/i: it goes on where it was stopped, and one that
   has finished is not trained again.
3. best/ of run i answers the rows of fold i. No rows are scored while it trains: what picked the best weights would have seen labels.

One module, because that a model has not learned what it judges is one promise, from the cut to the answer.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.config import DataConfig, RunConfig, TrainConfig
from bertdist.console import write_whole
from bertdist.errors import CheckpointError, DataError
from bertdist.places import Kept, Placed
from bertdist.predict import Predictor
from bertdist.ranks import together
from bertdist.records import Records
from bertdist.slurm import StopRequest
from bertdist.tasks import Array, Task
from bertdist.train import train

ProblemType: TypeAlias = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]


def cut(targets: Array, groups: Array, folds: int, seed: int) -> Array:
    """(N,) int64: the fold of each row.

    targets: (N,) ids or numbers, or (N, O) 0/1; groups: (N,) int64, rows of one group stay together. Of every label the folds have equally
    many groups, to one; of several labels a row the rarest ones are dealt so; numbers are dealt from the smallest to the largest.
    """
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    columns = targets[first].reshape(len(first), -1).T  # (1 or O, groups)
    columns = columns[
        np.argsort(-columns.sum(1), kind="stable")
    ]  # the rarest label last: lexsort looks at the last key first
    order = np.lexsort((np.random.default_rng(seed).random(len(first)), *columns))
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[order] = np.arange(len(first)) % folds
    return fold_of_group[group_of_row.reshape(-1)]


def groups_of(records: Records) -> Array:
    """(rows,) int64: rows whose texts are equal but for case and white space have the same number."""
    texts = records.texts.to_pylist()
    pairs = [""] * len(texts) if records.pairs is None else records.pairs.to_pylist()
    seen: dict[tuple[str, str], int] = {}
    keys = (
        (" ".join(text.lower().split()), " ".join(pair.lower().split()))
        for text, pair in zip(texts, pairs, strict=True)
    )
    return np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int64, len(texts))


def answers_out_of_fold(
    config: TrainConfig,
    folds: int,
    records: Records,
    targets: Array,
    task: Task,
    accelerator: Accelerator,
    say: Callable[..., None],
) -> Tensor | None:
    """(rows, outputs) float32 on every rank; None where the run was asked to stop: the same call goes on.

    config: of the run; targets: the labels of all rows in the form of the task. Raises DataError where there are too few rows, and what
    `train` raises, such as CheckpointError where the folders hold other runs.
    """
    fold_of_row = cut(targets, groups_of(records), folds, config.run.seed)
    runs = [
        _run_of_fold(config, Path(config.run.output_dir) / "folds" / str(fold), task, records)
        for fold in range(folds)
    ]
    with together(accelerator):
        _enough(fold_of_row, folds, records)
        if accelerator.is_main_process:
            for fold, run in enumerate(runs):
                _write_rows(_file_of(run), records, np.flatnonzero(fold_of_row != fold))
    found: Tensor | None = None
    for fold, run in enumerate(runs):
        left_out = np.flatnonzero(fold_of_row == fold)
        say(
            f"Fold {fold + 1} of {folds}: a model learns from the other {len(records) - len(left_out):,} rows, in {run.run.output_dir}."
        )
        with _process_group_kept():
            if not train(run).finished:
                return None
        stop = StopRequest(
            config.run.stop_before_time_limit
        )  # of the training's own nobody asks any more
        with together(accelerator):
            model = Path(run.run.output_dir) / "best"
            predictor = Predictor(
                model,
                tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
                accelerator=accelerator,
            )
        logits = predictor.logits(subset(records, left_out))
        found = torch.zeros(len(records), logits.shape[1]) if found is None else found
        found[torch.from_numpy(left_out)] = logits
        stopping = [
            stop.agreed(accelerator) for _ in range(2)
        ]  # on GPUs a call gives the answer of the one before
        stop.close()
        if any(stopping) and fold + 1 < folds:
            say(
                f"Asked to stop ({stop.reason}) after fold {fold + 1} of {folds}; the same command goes on."
            )
            return None
    return found


@contextmanager
def _process_group_kept() -> Iterator[None]:
    """`train` ends the process group with itself, unless accelerate 1.15 believes that somebody else has launched these processes for it.

    A second group would meet at the same store as the first (torchrun), and find its addresses there.
    """
    before = os.environ.get("FORK_LAUNCHED")
    os.environ["FORK_LAUNCHED"] = "1"
    try:
        yield
    finally:
        os.environ.pop("FORK_LAUNCHED") if before is None else os.environ.update(
            FORK_LAUNCHED=before
        )


def subset(records: Records, rows: Array) -> Records:
    """Some rows as rows of their own, without labels; a message about one names its place in the source."""
    texts, pairs = (
        None if column is None else column.take(rows) for column in (records.texts, records.pairs)
    )
    source = Placed(records.name, False, ((0, Kept(records.where, rows), 0),))
    unlabelled = replace(
        records, label_kind=None, label_values=[], label_codes=None, parts=(), bad=()
    )
    return replace(unlabelled, source=source, texts=texts, pairs=pairs, fingerprint="")


def _enough(fold_of_row: Array, folds: int, records: Records) -> None:
    if (texts := int(fold_of_row.max()) + 1) < folds:  # the first fold gets the first text
        raise DataError(
            f"{records.name} has {texts} different texts, too few for --folds {folds}; expected at least one a fold."
        )


def _run_of_fold(config: TrainConfig, folder: Path, task: Task, records: Records) -> TrainConfig:
    """The run that learns from folder/train.jsonl and scores nothing."""
    pair = None if records.pairs is None else "text_pair"
    kind, plain = cast(ProblemType, task.problem_type), RunConfig()
    names = None if kind == "regression" else list(task.labels)
    return replace(
        config,
        data=DataConfig(
            train_file=[str(folder / "train.jsonl")],
            text_column="text",
            text_pair_column=pair,
            label_column="label",
        ),
        task=replace(
            config.task,
            problem_type=kind,
            label_names=names,
            metrics=None,
            metric_for_best_model=None,
        ),
        run=replace(
            config.run,
            output_dir=str(folder),
            eval_every=plain.eval_every,
            early_stopping_patience=None,
            early_stopping_threshold=plain.early_stopping_threshold,
        ),
    )


def _file_of(run: TrainConfig) -> Path:
    assert run.data.train_file is not None
    return Path(run.data.train_file[0])


def _write_rows(path: Path, records: Records, rows: Array) -> None:
    """Texts and labels as JSON lines, which keep every kind of label as it is."""
    assert records.label_codes is not None
    columns = {"text": records.texts.take(rows).to_pylist()}
    if records.pairs is not None:
        columns["text_pair"] = records.pairs.take(rows).to_pylist()
    columns["label"] = [records.label_values[code] for code in records.label_codes[rows]]
    lines = (
        json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False)
        for values in zip(*columns.values(), strict=True)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from None
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
