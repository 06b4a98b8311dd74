"""The loop's own promises: when it scores, saves, logs and stops, and that best/ holds the best
step's weights.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from rows import (
    Breaking,
    assert_same_tensors,
    best_at,
    checkpoints_of,
    json_of,
    last_checkpoint,
    make_rows,
    run_train,
    some_of,
    step_log,
    tensors_of,
    words_of,
    write_rows,
    write_split,
)
from safetensors.torch import load_file

from bertdist.training import evaluation, micro_batches


def steps_in(out: Path, kind: str) -> list[int]:
    return [line["step"] for line in step_log(out, kind)]


# --- The schedule of log lines, evaluations and checkpoints


@pytest.mark.parametrize(
    ("intervals", "logged", "scored", "saved"),
    [
        (
            {"log_every": "3 steps", "eval_every": "0.5 epochs", "save_every": "50%"},
            [3, 6, 9, 10],
            [2, 4, 6, 8, 10],
            [5, 10],
        ),
        ({"log_every": "never", "eval_every": "never", "save_every": "never"}, [10], [10], [10]),
        (
            {"log_every": "1 epoch", "eval_every": "4 steps", "save_every": "3 steps"},
            [5, 10],
            [4, 8, 10],
            [3, 6, 9, 10],
        ),
    ],
)
def test_things_happen_when_they_are_due(
    tiny_model: Path,
    tmp_path: Path,
    intervals: dict[str, str],
    logged: list[int],
    scored: list[int],
    saved: list[int],
) -> None:
    """38 rows in steps of 8: 5 steps an epoch, the last one of 6 rows; 2 epochs."""
    words = words_of(
        tiny_model,
        tmp_path / "out",
        write_split(tmp_path, 38, 6),
        num_train_epochs=2,
        save_total_limit=9,
        **intervals,
    )
    run_ranks(1, run_train, words)
    assert (steps_in(tmp_path / "out", "train"), steps_in(tmp_path / "out", "eval")) == (
        logged,
        scored,
    )
    assert checkpoints_of(tmp_path / "out") == [f"step_{step:06d}" for step in saved]
    epochs = {line["step"]: line["epoch"] for line in step_log(tmp_path / "out")}
    assert epochs == {step: step / 5 for step in epochs}


def test_a_line_speaks_of_all_steps_since_the_last_one(tiny_model: Path, tmp_path: Path) -> None:
    """Its loss is the sum over rows by the rows, also where the steps have different sizes; its
    tokens are counted from the beginning.
    """
    files = write_split(tmp_path, 38)
    for name, every in (("each", "1 steps"), ("two", "1 epoch")):
        words = words_of(
            tiny_model,
            tmp_path / name,
            files,
            num_train_epochs=2,
            log_every=every,
            learning_rate=0,
            dropout=0,
        )
        run_ranks(1, run_train, words)
    each, both = step_log(tmp_path / "each"), step_log(tmp_path / "two")
    assert len({line["loss"] for line in each}) > 5
    for epoch in (0, 1):
        of_epoch = each[5 * epoch : 5 * epoch + 5]
        total = sum(
            line["loss"] * rows for line, rows in zip(of_epoch, [8, 8, 8, 8, 6], strict=True)
        )
        assert both[epoch]["loss"] == pytest.approx(total / 38)
    tokens = sum(
        len(row["text"].split()) + 2 for row in make_rows(38, seed=1) if "boring" not in row["text"]
    )
    assert both[1]["tokens"] == each[-1]["tokens"] == 2 * both[0]["tokens"] > 2 * tokens


def test_max_train_steps_ends_the_run_and_the_schedule(tiny_model: Path, tmp_path: Path) -> None:
    """4 steps, rates falling to zero over them; more steps than the epochs hold go on into further
    epochs.
    """
    words = words_of(
        tiny_model, tmp_path / "out", write_split(tmp_path, 16), max_train_steps=4, warmup_steps=2
    )
    ((progress, seen, _),) = run_ranks(1, run_train, words)
    assert (progress.step, progress.finished, progress.rows) == (4, True, 32)
    assert [number for number, _ in seen] == [0, 1, 2, 3]
    assert [line["learning_rate"] for line in step_log(tmp_path / "out")] == pytest.approx(
        [0, 0.0005, 0.001, 0.0005]
    )


def test_half_an_epoch_is_a_run(tiny_model: Path, tmp_path: Path) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 38), num_train_epochs=0.5)
    ((progress, _, _),) = run_ranks(1, run_train, words)
    assert (progress.step, progress.finished) == (3, True)


def test_the_throw_away_backward_runs_as_training_does(tiny_model: Path, tmp_path: Path) -> None:
    """With checkpointed activations and with dropout: it is also the first to need memory."""

    def watch(accelerator: Accelerator) -> None:
        single_token_batch = micro_batches.single_token_batch

        def watched(batch: Any) -> Any:
            (model,) = models
            assert model.training, "the model is in evaluation mode"
            return single_token_batch(batch)

        made, models = micro_batches.MicroBatcher.__init__, []

        def make(self: Any, model: Any, *others: Any) -> None:
            model.eval()
            models.append(model)
            made(self, model, *others)

        micro_batches.single_token_batch = watched
        micro_batches.MicroBatcher.__init__ = make  # type: ignore[method-assign]

    run_ranks(
        2,
        run_train,
        words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 16), max_train_steps=1),
        watch,
    )


# --- The best weights


def assert_best_is_the_best(out: Path, key: str, sign: int) -> None:
    """best/ holds what the checkpoint of the best scored step holds, the first of equals."""
    lines = step_log(out, "eval")
    merits = [sign * line[key] for line in lines]
    step = lines[merits.index(max(merits))]["step"]
    saved = load_file(out / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
    kept = load_file(out / "best" / "model.safetensors")
    assert kept.keys() == {name.removeprefix("model.") for name in saved}
    assert all(torch.equal(kept[name.removeprefix("model.")], saved[name]) for name in saved)
    scored = json_of(out / "evaluation.json")
    assert scored["step"] == step and scored["scores"][key] == max(merits) * sign


def overfit(
    model: Path, folder: Path, n: int, breaking: Breaking | None = None, **settings: Any
) -> Path:
    """A run whose dev labels are the wrong ones: its dev loss only grows once the training is
    learned.
    """
    files = write_split(folder, 32, 12)
    rows = make_rows(12, seed=2)
    for row in rows[:8]:
        row["label"] = {"positive": "negative", "negative": "positive"}[row["label"]]
    assert files.dev is not None
    write_rows(files.dev, rows)
    intervals = {
        "eval_every": "1 steps",
        "save_every": "1 steps",
        "save_total_limit": 99,
        "num_train_epochs": 4,
    }
    rates = {"lr_scheduler_type": "constant", "learning_rate": 3e-3}
    settings = {**intervals, **rates, "metric_for_best_model": "loss", **settings}
    run_ranks(n, run_train, words_of(model, folder / "out", files, **settings), breaking)
    return folder / "out"


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_best_holds_the_weights_of_the_best_step(tiny_model: Path, tmp_path: Path, n: int) -> None:
    out = overfit(tiny_model, tmp_path, n)
    assert_best_is_the_best(out, "loss", -1)
    assert 1 < json_of(out / "evaluation.json")["step"] < 16, (
        "a run whose best step is neither the first nor the last shows more"
    )


def test_best_by_a_metric_where_more_is_better(tiny_model: Path, tmp_path: Path) -> None:
    out = overfit(
        tiny_model, tmp_path, 1, metric_for_best_model="accuracy", metrics=["f1", "accuracy"]
    )
    assert_best_is_the_best(out, "accuracy", 1)


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_score_that_is_never_a_number_leaves_the_choice_to_the_loss(
    tiny_model: Path, tmp_path: Path, n: int
) -> None:
    """The dev rows have one label, so there is no roc_auc: no early stop, and best by the loss."""
    files, out = write_split(tmp_path, 32), tmp_path / "out"
    rows = [{**row, "label": "negative"} for row in make_rows(12, seed=2)]
    files = files._replace(dev=write_rows(tmp_path / "dev.tsv", rows))
    each_step = {"eval_every": "1 steps", "save_every": "1 steps", "save_total_limit": 99}
    settings = {"metrics": ["roc_auc", "accuracy"], "early_stopping_patience": 1}
    settings |= {"num_train_epochs": 2, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    results = run_ranks(n, run_train, words_of(tiny_model, out, files, **each_step, **settings))
    assert steps_in(out, "eval") == list(range(1, 9))
    assert {line["roc_auc"] for line in step_log(out, "eval")} == {None}
    assert_best_is_the_best(out, "loss", -1)
    said = results[0][2]
    assert said.count("roc_auc is undefined (a label has no row, or has all rows)") == 1
    step = json_of(out / "evaluation.json")["step"]
    assert {progress.best_step for progress, _, _ in results} == {step} and step > 1
    assert f"best weights (step {step}, of the lowest loss) in" in said
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON


def test_last_weights_kept_as_best_are_seen(tiny_model: Path, tmp_path: Path) -> None:
    def keep_every_time(accelerator: Accelerator) -> None:
        improvement = evaluation.improvement
        evaluation.improvement = lambda *scores: abs(improvement(*scores)) + 1

    out = overfit(tiny_model, tmp_path, 1, keep_every_time)
    with pytest.raises(AssertionError):
        assert_best_is_the_best(out, "loss", -1)


def test_without_validation_rows_the_last_weights_are_the_best(
    tiny_model: Path, tmp_path: Path
) -> None:
    ((progress, _, _),) = run_ranks(
        1,
        run_train,
        words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 16), max_train_steps=3),
    )
    saved, kept = (
        tensors_of(tmp_path / "out" / name) for name in ("checkpoints/step_000003", "best")
    )
    assert progress.best_step == 3 and all(
        torch.equal(tensor, saved[name.replace(": ", ": model.")]) for name, tensor in kept.items()
    )
    assert not (tmp_path / "out" / "evaluation.json").exists()


# --- Early stopping


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_early_stopping_ends_a_run_that_gets_no_better(
    tiny_model: Path, tmp_path: Path, n: int
) -> None:
    """With a learning rate of 0 the first score is the best for ever: 1 + 2 evaluations, and the
    end.
    """
    settings = {
        "learning_rate": 0,
        "eval_every": "2 steps",
        "early_stopping_patience": 2,
        "num_train_epochs": 9,
    }
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 16, 6), **settings)
    results = run_ranks(n, run_train, words)
    assert {
        (progress.step, progress.finished, progress.best_step) for progress, _, _ in results
    } == {(6, True, 2)}
    assert steps_in(tmp_path / "out", "eval") == [2, 4, 6]
    assert json_of(tmp_path / "out" / "status.json") == {
        "state": "finished",
        "step": 6,
        "reason": "early stopping after 2 evaluations without improvement",
    }
    finished = (
        "Finished: 6 of 18 steps (early stopping after 2 evaluations without improvement), best "
        "weights (step 2) in "
    )
    assert finished in results[0][2]
    again = run_ranks(n, run_train, words)
    assert [seen for _, seen, _ in again] == [[]] * n and finished in again[0][2]


STOPPED = {"eval_every": "2 steps", "num_train_epochs": 6, "log_every": "4 steps"}


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_the_steps_before_an_early_stop_have_their_line(
    tiny_model: Path, tmp_path: Path, n: int
) -> None:
    files = write_split(tmp_path, 16, 6)
    words = words_of(tiny_model, tmp_path / "out", files, **STOPPED, early_stopping_patience=2)
    run_ranks(n, run_train, words, best_at(2))
    assert steps_in(tmp_path / "out", "eval") == [2, 4, 6]
    run_ranks(n, run_train, words_of(tiny_model, tmp_path / "whole", files, **STOPPED))
    lines, whole = (step_log(tmp_path / name, "train") for name in ("out", "whole"))
    assert [line["step"] for line in lines] == [4, 6] and lines[0] == whole[0]
    # The line of a longer run speaks of two more steps.
    assert [line["step"] for line in whole] == [4, 8, 12]
    assert lines[1]["loss"] != whole[1]["loss"] and lines[1]["grad_norm"] > 0
    each = words_of(tiny_model, tmp_path / "each", files, **{**STOPPED, "log_every": "2 steps"})
    run_ranks(n, run_train, each)
    assert lines[1] == step_log(tmp_path / "each", "train")[2]


@pytest.mark.parametrize(
    ("change", "steps", "reason"),
    [
        ({"early_stopping_patience": 3}, 8, "early stopping after 3 evaluations without "),
        ({"early_stopping_patience": None}, 12, ""),
        ({"metric_for_best_model": "f1_macro"}, 12, ""),
    ],
)
def test_a_run_that_stopped_early_goes_on_when_it_may(
    tiny_model: Path, tmp_path: Path, change: dict[str, Any], steps: int, reason: str
) -> None:
    """With every step as in a run that had these settings from the start."""
    files = write_split(tmp_path, 16, 6)
    settings = {**STOPPED, "early_stopping_patience": 2}
    first = words_of(tiny_model, tmp_path / "out", files, **settings)
    ((stopped, _, _),) = run_ranks(1, run_train, first, best_at(2))
    assert (stopped.step, stopped.finished) == (6, True)
    breaking = best_at(2) if "early_stopping_patience" in change else best_at(2, 8, 10, 12)
    second, whole = (
        words_of(tiny_model, tmp_path / out, files, **{**settings, **change})
        for out in ("out", "whole")
    )
    ((state, seen, said),) = run_ranks(1, run_train, second, breaking)
    assert (state.step, state.finished, seen[0][0]) == (steps, True, 6)
    assert json_of(tmp_path / "out" / "status.json")["reason"].startswith(reason)
    assert "Settings changed since then:" in said and "no effect" not in said
    if "early_stopping_patience" in change:
        run_ranks(1, run_train, whole, breaking)
        one, other = (tensors_of(last_checkpoint(tmp_path / out)) for out in ("out", "whole"))
        assert_same_tensors(one, other)
        assert json_of(tmp_path / "out" / "evaluation.json") == json_of(
            tmp_path / "whole" / "evaluation.json"
        )


def test_changes_after_the_last_step_have_no_effect_and_it_is_told(
    tiny_model: Path, tmp_path: Path
) -> None:
    files = write_split(tmp_path, 16, 6)
    words = words_of(tiny_model, tmp_path / "out", files, num_train_epochs=1)
    run_ranks(1, run_train, words)
    ((_, seen, said),) = run_ranks(1, run_train, [*words, "--metric_for_best_model", "loss"])
    assert seen == [] and "They have no effect: the run has finished." in said


def test_early_stopping_waits_while_it_gets_better(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"early_stopping_patience": 2, "num_train_epochs": 9}
    out = overfit(tiny_model, tmp_path, 1, **settings)
    losses = [line["loss"] for line in step_log(out, "eval")]
    stale = 0
    for at, loss in enumerate(losses):
        stale = 0 if loss < min(losses[:at], default=float("inf")) else stale + 1
        assert (stale == 2) == (at == len(losses) - 1), losses
    assert len(losses) < 36


def test_a_threshold_makes_small_gains_count_for_nothing(tiny_model: Path, tmp_path: Path) -> None:
    settings = {
        "early_stopping_patience": 1,
        "early_stopping_threshold": 100,
        "num_train_epochs": 9,
    }
    out = overfit(tiny_model, tmp_path, 1, **settings)
    assert steps_in(out, "eval") == [1, 2]
