"""NaN and Inf in a loss or gradient (--on_nan): no weight changes, all ranks know, rows are named.

The fault is injected into what the model computes for one row, on whatever rank that is.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    RANKS,
    Breaking,
    Files,
    assert_same_run,
    assert_same_tensors,
    at_step,
    both,
    checkpoints_of,
    clip_with_torch,
    die,
    json_of,
    last_checkpoint,
    run_main,
    run_train,
    skip_updates,
    some_of,
    step_log,
    tensors_of,
    words_of,
    write_split,
)
from rows import train_module as train
from safetensors.torch import load_file
from torch import Tensor, nn

from bertdist import predict
from bertdist.core.errors import NonFiniteError
from bertdist.models.classifier import Classifier
from bertdist.models.cpu_layers import ReusedGradientEmbedding
from bertdist.tasks.tasks import SingleLabel
from bertdist.training import nonfinite, optimizer

STEPS = 10  # 5 an epoch of 38 rows, 2 epochs
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "save_every": "3 steps",
    "eval_every": "4 steps",
    "tokens_per_micro_batch": 60,
}
HEADER = 2  # row 0 stands in line 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_split(tmp_path_factory.mktemp("nan"), 38, 12)


class _Poisoned(torch.autograd.Function):
    """Identity in the forward pass, infinite gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


def make_nonfinite(rows: set[int], how: str) -> Breaking:
    """Logits of these rows: NaN, so large that the loss is Inf, or with an infinite gradient."""

    def breaking(accelerator: Accelerator) -> None:
        forward = Classifier.forward

        def changed(self: Classifier, batch: Any) -> Tensor:
            logits = forward(self, batch)
            if not self.training:
                return logits
            parts = []
            for one, row in zip(logits, batch.row_numbers.tolist(), strict=True):
                if row in rows:
                    one = {
                        "nan": one * math.nan,
                        "inf": one + one.new_tensor([math.inf, 0.0]),
                        "gradient": _Poisoned.apply(one),
                    }[how]
                parts.append(one)
            return torch.stack(parts)

        Classifier.forward = changed  # type: ignore[method-assign]

    return breaking


def make_operation_nonfinite(rows: set[int], how: str) -> Breaking:
    """An operation makes NaN for these rows in its forward pass, or only in its backward pass."""

    def breaking(accelerator: Accelerator) -> None:
        forward = Classifier.forward

        def changed(self: Classifier, batch: Any) -> Tensor:
            logits = forward(self, batch)
            if not self.training:  # also the comparison with transformers when it is loaded
                return logits
            here = torch.tensor([[float(row in rows)] for row in batch.row_numbers.tolist()])
            if how == "nan":
                sign = 1 - 2 * here + 0 * logits
                return logits + sign.log()  # HERE_NAN: log(-1), of the others log(1)
            zero = logits - logits.detach() + 1 - here
            # 0 times the infinite slope at 0
            return logits + zero.sqrt() * (1 - here)  # HERE_GRADIENT

        Classifier.forward = changed  # type: ignore[method-assign]

    return breaking


def steps_with(rows: set[int], seen: list[Any]) -> list[int]:
    """Steps, from 1, that had any of the rows."""
    return sorted({number + 1 for of_rank in seen for number, had in of_rank[1] if rows & set(had)})


@pytest.mark.parametrize(
    ("n", "how"),
    some_of([(1, "gradient"), (2, "inf"), (3, "nan")], [(1, "nan"), (2, "gradient")]),
)
def test_nonfinite_row_stops_all_ranks_and_is_named(
    tiny_model: Path, files: Files, tmp_path: Path, n: int, how: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RankError) as caught:
        run_ranks(
            n, run_train, words_of(tiny_model, out, files, **SETTINGS), make_nonfinite({17}, how)
        )
    assert str(caught.value).count(NonFiniteError.__name__) >= n
    (line,) = json_of(out / "nan_rows.jsonl")
    assert (line["row"], line["where"]) == (17, f"train.tsv line {17 + HEADER}")
    assert line["text"] and ("nan" in str(line["loss"]) or "inf" in str(line["loss"])) == (
        how != "gradient"
    )
    size = 6 if line["step"] % 5 == 0 else 8  # of the last step of an epoch
    message = (
        f"Step {line['step']}: the loss or gradient is NaN or infinite, "
        f"in these of its {size} rows: train.tsv line 19 (loss "
    )
    assert message in str(caught.value)
    assert json_of(out / "status.json")["state"] == "failed"
    for folder in (out / "checkpoints").glob("step_*"):  # what was saved before is whole
        assert int(folder.name[5:]) < line["step"] and all(
            tensor.isfinite().all() for tensor in tensors_of(folder).values()
        )


def test_row_of_a_stream_is_named_by_its_line(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    words = words_of(
        tiny_model, tmp_path / "out", files, **{**SETTINGS, "streaming": True, "stream_window": 8}
    )
    with pytest.raises(RankError, match=r"in these of its \d+ rows: train\.tsv line 19 \(loss "):
        run_ranks(2, run_train, words, make_nonfinite({17}, "nan"))
    (line,) = json_of(tmp_path / "out" / "nan_rows.jsonl")
    assert (line["row"], line["where"]) == (17, f"train.tsv line {17 + HEADER}")


class Skipped:
    """Runs with --on_nan skip over rows 3 and 17 that give NaN, on n ranks."""

    def __init__(self, model: Path, files: Files, folder: Path) -> None:
        self.model, self.files, self.folder = model, files, folder
        self.kept: dict[tuple[int, str], tuple[Path, list[Any]]] = {}

    def words(self, out: Path, **settings: Any) -> list[str]:
        return words_of(self.model, out, self.files, **{**SETTINGS, "on_nan": "skip", **settings})

    def run(self, n: int, how: str = "nan") -> tuple[Path, list[Any]]:
        if (n, how) not in self.kept:
            out = self.folder / f"{n}_{how}"
            self.kept[n, how] = (
                out,
                run_ranks(n, run_train, self.words(out), make_nonfinite({3, 17}, how)),
            )
        return self.kept[n, how]


@pytest.fixture(scope="module")
def skipped(tiny_model: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Skipped:
    return Skipped(tiny_model, files, tmp_path_factory.mktemp("skipped"))


@pytest.mark.parametrize("n", RANKS)
def test_skipped_steps_are_the_same_on_any_number_of_ranks(skipped: Skipped, n: int) -> None:
    out, ranks = skipped.run(n)
    lines, seen = json_of(out / "nan_rows.jsonl"), [(None, had, None) for _, had, _ in ranks]
    assert sorted({line["step"] for line in lines}) == steps_with({3, 17}, seen)
    assert sorted(line["row"] for line in lines) == [3, 3, 17, 17], "once an epoch each"
    assert ranks[0][0].nan_steps == len({line["step"] for line in lines}) and ranks[0][0].finished
    assert ranks[0][2].count("The step is skipped (--on_nan skip).") == ranks[0][0].nan_steps
    logged = [line["step"] for line in json_of(out / "metrics.jsonl") if line["kind"] == "nan"]
    assert logged == sorted({line["step"] for line in lines})
    assert all(tensor.isfinite().all() for tensor in tensors_of(out / "best").values())
    one = skipped.run(1)[0]
    assert (out / "nan_rows.jsonl").read_bytes() == (one / "nan_rows.jsonl").read_bytes()
    for mine, other in zip(step_log(out), step_log(one), strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(("n", "killed"), some_of([(1, 4), (3, 8)], [(1, 8), (2, 4)]))
def test_resume_between_skipped_steps_equals_uninterrupted(
    skipped: Skipped, tmp_path: Path, n: int, killed: int
) -> None:
    """Killed after NaN steps that no checkpoint includes: skipped again, and no line repeated."""
    out = tmp_path / "out"
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(
            n,
            run_train,
            skipped.words(out),
            both(make_nonfinite({3, 17}, "nan"), at_step(killed, die)),
        )
    run_ranks(n, run_train, skipped.words(out), make_nonfinite({3, 17}, "nan"))
    straight = skipped.run(n)[0]
    assert_same_run(out, straight)
    assert (out / "nan_rows.jsonl").read_bytes() == (straight / "nan_rows.jsonl").read_bytes()
    assert [line for line in json_of(out / "metrics.jsonl") if line["kind"] == "nan"] == [
        line for line in json_of(straight / "metrics.jsonl") if line["kind"] == "nan"
    ]


@pytest.mark.parametrize("n", RANKS)
def test_a_skipped_step_changes_nothing_but_itself(
    skipped: Skipped, tmp_path: Path, n: int
) -> None:
    """Bit for bit the weights of a run with finite rows and the same steps skipped by hand."""
    out, _ = skipped.run(n)
    steps = sorted({line["step"] for line in json_of(out / "nan_rows.jsonl")})
    run_ranks(n, run_train, skipped.words(tmp_path / "by_hand"), skip_updates(steps))
    for mine, other in zip(
        sorted((out / "checkpoints").iterdir()),
        sorted((tmp_path / "by_hand" / "checkpoints").iterdir()),
        strict=True,
    ):
        mine_all, others = tensors_of(mine), tensors_of(other)
        assert mine_all.keys() == others.keys()
        assert all(torch.equal(mine_all[name], others[name]) for name in mine_all)
    if n > 1:
        return
    run_ranks(n, run_train, skipped.words(tmp_path / "control"), skip_updates(steps[1:]))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "control", tmp_path / "by_hand")


def unguarded(accelerator: Accelerator) -> None:
    """Negative control: no check at all."""

    def always_step(
        model: Any, optimizer: Any, grad_norm: Tensor, accelerator: Accelerator
    ) -> None:
        optimizer.step()
        nonfinite.zero_grad(model)

    train.apply_update = always_step


def test_without_the_check_one_row_makes_all_weights_nan(skipped: Skipped, tmp_path: Path) -> None:
    words = skipped.words(tmp_path / "out", max_nan_steps=99, eval_every="never")
    with pytest.raises(RankError, match="has become NaN or infinite: the weights are not saved"):
        run_ranks(1, run_train, words, both(unguarded, make_nonfinite({17}, "nan")))
    weights = load_file(last_checkpoint(tmp_path / "out") / "model.safetensors")
    assert all(tensor.isnan().any() for name, tensor in weights.items() if "weight" in name)


def test_without_the_scale_an_infinite_loss_is_not_seen(skipped: Skipped, tmp_path: Path) -> None:
    """The derivative of an infinite loss can be finite, and then so is the gradient norm."""

    def plain(accelerator: Accelerator) -> None:
        train.nan_aware_scale = lambda loss, scale: scale

    def infinite(accelerator: Accelerator) -> None:
        loss = SingleLabel.loss
        SingleLabel.loss = lambda self, *rest: loss(self, *rest) + math.inf  # type: ignore[method-assign]

    words = skipped.words(
        tmp_path / "a", max_train_steps=2, num_train_epochs=None, eval_every="never"
    )
    ((progress, *_),) = run_ranks(1, run_train, words, both(plain, infinite))
    assert progress.nan_steps == 0, "not noticed"
    words = skipped.words(
        tmp_path / "b", max_train_steps=2, num_train_epochs=None, eval_every="never"
    )
    with pytest.raises(RankError, match="each of the 2 steps was skipped"):
        run_ranks(1, run_train, words, infinite)


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_too_many_nonfinite_steps_in_a_row_end_the_run(
    skipped: Skipped, tmp_path: Path, n: int
) -> None:
    everything = set(range(38))
    with pytest.raises(RankError, match=r"Consecutive skipped steps: 3 \(--max_nan_steps 2\)\."):
        run_ranks(
            n,
            run_train,
            skipped.words(tmp_path / "out", max_nan_steps=2),
            make_nonfinite(everything, "nan"),
        )
    lines = json_of(tmp_path / "out" / "nan_rows.jsonl")
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8 + [3] * 8
    with pytest.raises(
        RankError, match=r"Consecutive skipped steps: 3"
    ):  # the same command: the same error, no repeated line
        run_ranks(
            n,
            run_train,
            skipped.words(tmp_path / "out", max_nan_steps=2),
            make_nonfinite(everything, "nan"),
        )
    assert json_of(tmp_path / "out" / "nan_rows.jsonl") == lines


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_run_that_skipped_every_step_has_not_finished(
    skipped: Skipped, tmp_path: Path, n: int
) -> None:
    words, breaking = skipped.words(tmp_path / "out"), make_nonfinite(set(range(38)), "nan")
    words += ["--max_train_steps", "2"]
    with pytest.raises(RankError) as caught:
        run_ranks(n, run_train, words, breaking)
    assert str(caught.value).count("Nothing was trained: each of the 2 steps was skipped") >= n
    assert json_of(tmp_path / "out" / "status.json")["state"] == "failed"
    assert not [*(tmp_path / "out").glob("checkpoints/step_*")]
    (progress, _, _), *_ = run_ranks(n, run_train, words)  # the control: the same without NaN
    assert progress.finished and not progress.nan_steps


# ---- --detect_anomaly


def ends(words: list[str], n: int, *breakings: Breaking) -> str:
    """The last line printed: exit code 1 on all ranks, one line from rank 0."""
    first, *others = run_ranks(n, run_main, words, both(*breakings))
    assert first[0] == 1 and others == [(1, "", "")] * (n - 1), (first, others)
    *before, last = first[1].splitlines()
    assert last.startswith("bertdist: ") and not [
        line for line in before if "bertdist: " in line or "Traceback" in line
    ], first[1]
    return last


LINES = {
    line.partition("# HERE_")[2][:3]: number
    for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
}


@pytest.mark.parametrize(
    ("n", "how"), some_of([(3, "gradient")], [(1, "nan"), (2, "nan"), (2, "gradient")])
)
def test_detect_anomaly_names_the_operation_in_one_line(
    tiny_model: Path, files: Files, tmp_path: Path, n: int, how: str
) -> None:
    out = tmp_path / "out"
    last = ends(
        words_of(tiny_model, out, files, **SETTINGS, detect_anomaly=True),
        n,
        make_operation_nonfinite({17}, how),
    )
    (line,) = json_of(out / "nan_rows.jsonl")
    assert line["row"] == 17 and "train.tsv line 19 (loss " in last, last
    what = {
        "nan": "aten.log in the forward pass makes the first NaN",
        "gradient": "SqrtBackward0 in the backward pass makes the first NaN",
    }
    operation = f"{what[how]} (test_nan.py, line {LINES[how[:3].upper()]}, in changed); stack in "
    assert operation in last and "--detect_anomaly" not in last, last
    (stack,) = (out / "stacks").iterdir()
    assert stack.name == f"nan_step_{line['step']:06d}.txt" and str(stack) in last
    assert "in changed" in stack.read_text() and "train.py" in stack.read_text()
    assert (
        json_of(out / "status.json")["state"] == "failed"
        and what[how] in json_of(out / "status.json")["reason"]
    )


def test_without_the_flag_no_operation_is_named(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    """Negative control: the same fault, and the message suggests the flag."""
    last = ends(
        words_of(tiny_model, tmp_path / "out", files, **SETTINGS),
        2,
        make_operation_nonfinite({17}, "nan"),
    )
    assert (
        "aten" not in last
        and last.endswith("--detect_anomaly names the operation.")
        and not (tmp_path / "out" / "stacks").exists()
    )


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_torchs_anomaly_mode_alone_raises_on_one_rank(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    """Negative control: with torch's mode alone one rank raises, during the gradient exchange."""

    def anomaly_mode(accelerator: Accelerator) -> None:
        torch.autograd.set_detect_anomaly(True)
        nonfinite.find_anomaly = lambda compute: None
        train.nan_aware_scale = lambda loss, scale: scale

    with pytest.raises(RankError, match=r"Function '[A-Za-z0-9]+' returned nan values"):
        ends(
            words_of(tiny_model, tmp_path / "out", files, **SETTINGS),
            n,
            anomaly_mode,
            make_operation_nonfinite({17}, "nan"),
        )


@pytest.mark.parametrize("n", some_of([3], [1]))
def test_detect_anomaly_changes_no_step(skipped: Skipped, tmp_path: Path, n: int) -> None:
    """With --on_nan skip operations are named; the run is bit for bit the one without the flag."""
    ranks = run_ranks(
        n,
        run_train,
        skipped.words(tmp_path / "out", detect_anomaly=True),
        make_nonfinite({3, 17}, "nan"),
    )
    assert (
        ranks[0][2].count("aten.mul in the forward pass makes the first NaN")
        == ranks[0][0].nan_steps
        > 0
    )
    assert_same_run(tmp_path / "out", skipped.run(n)[0])


# ---- Evaluation and prediction


def nonfinite_evaluations_from(step: int, rows: set[int]) -> Breaking:
    """Evaluations after `step` optimizer steps get NaN for these rows."""

    def breaking(accelerator: Accelerator) -> None:
        forward, steps = Classifier.forward, [0]
        train_step = train.train_step

        def counted(*given: Any) -> Any:
            steps[0] += 1
            return train_step(*given)

        def changed(self: Classifier, batch: Any) -> Tensor:
            logits = forward(self, batch)
            chosen = torch.tensor(
                [
                    [not self.training and steps[0] >= step and row in rows]
                    for row in batch.row_numbers.tolist()
                ]
            )
            return logits.masked_fill(chosen, math.nan)

        Classifier.forward, train.train_step = changed, counted  # type: ignore[method-assign]

    return breaking


WHY = "Its weights are broken, or the precision is too small for it (--mixed_precision no)."


@pytest.mark.parametrize("n", RANKS)
def test_nonfinite_evaluation_stops_all_ranks(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    words = words_of(tiny_model, tmp_path / "out", files, **SETTINGS)
    last = ends(words, n, nonfinite_evaluations_from(8, {0, 5, 7, 11}))
    where = "dev.tsv line 2, dev.tsv line 7, dev.tsv line 9, and more"
    message = (
        f"Evaluation after step 8: the model gives NaN or Inf for 4 of 12 rows: {where}. {WHY}"
    )
    assert last == f"bertdist: {message} To continue without its scores: --on_nan skip."
    assert [line["step"] for line in step_log(tmp_path / "out", "eval")] == [4]
    assert json_of(tmp_path / "out" / "status.json")["state"] == "failed"


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_nonfinite_evaluation_has_no_scores(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    """With --on_nan skip. Otherwise argmax over NaN gives some label, and maybe a best score."""
    words = words_of(
        tiny_model, tmp_path / "out", files, **SETTINGS, on_nan="skip", learning_rate=1e-2
    )
    ranks = run_ranks(n, run_train, words, nonfinite_evaluations_from(8, {5}))
    assert (
        ranks[0][0].finished
        and ranks[0][2].count("Its scores count as undefined (--on_nan skip).") == 2
    )
    lines = {
        line["step"]: {line[name] is None for name in ("loss", "accuracy")}
        for line in step_log(tmp_path / "out", "eval")
    }
    assert lines == {4: {False}, 8: {True}, 10: {True}} and ranks[0][0].best_step == 4


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_nonfinite_prediction_writes_nothing(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    run_ranks(
        1,
        run_train,
        words_of(tiny_model, tmp_path / "out", files, max_train_steps=1, eval_every="never"),
    )
    words = [
        "--model",
        str(tmp_path / "out" / "best"),
        "--input",
        str(files.dev),
        "--use_cpu",
        "--output",
        str(tmp_path / "answers.jsonl"),
    ]
    first, *others = run_ranks(n, run_main, words, nonfinite_evaluations_from(0, {5}), predict)
    assert first == (
        1,
        "bertdist: Prediction: the model gives NaN or Inf for 1 of 12 rows: dev.tsv line 7. "
        f"{WHY}\n",
        "",
    )
    assert others == [(1, "", "")] * (n - 1) and not (tmp_path / "answers.jsonl").exists()
    assert [
        code
        for code, *_ in run_ranks(n, run_main, words, nonfinite_evaluations_from(0, set()), predict)
    ] == [0] * n, "negative control"
    assert len(json_of(tmp_path / "answers.jsonl")) == 12


# ---- As on a GPU: the host checks only where it waits anyway. The CPU's fused AdamW reads
# `found_inf` too.


def check_late(accelerator: Accelerator) -> None:
    nonfinite.is_on_cpu = optimizer.is_on_cpu = lambda tensor: False


def usual_tables(accelerator: Accelerator) -> None:
    ReusedGradientEmbedding.forward = nn.Embedding.forward  # type: ignore[method-assign]
    clip_with_torch(accelerator)


@pytest.mark.parametrize("n", some_of([3], [1]))
def test_late_check_finds_the_same_steps_with_the_same_weights(
    skipped: Skipped, tmp_path: Path, n: int
) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    run_ranks(
        n, run_train, skipped.words(straight), both(usual_tables, make_nonfinite({3, 17}, "nan"))
    )
    words, as_on_a_gpu = skipped.words(out, log_every="5 steps"), both(usual_tables, check_late)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(
            n, run_train, words, both(as_on_a_gpu, make_nonfinite({3, 17}, "nan"), at_step(7, die))
        )
    run_ranks(n, run_train, words, both(as_on_a_gpu, make_nonfinite({3, 17}, "nan")))
    assert (out / "nan_rows.jsonl").read_bytes() == (straight / "nan_rows.jsonl").read_bytes()
    assert_same_tensors(tensors_of(last_checkpoint(out)), tensors_of(last_checkpoint(straight)))


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_late_check_stops_before_anything_is_saved(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    out = tmp_path / "out"
    words = words_of(
        tiny_model,
        out,
        files,
        **{**SETTINGS, "log_every": "10 steps", "eval_every": "never", "save_every": "5 steps"},
    )
    with pytest.raises(RankError, match=NonFiniteError.__name__):
        run_ranks(n, run_train, words, both(usual_tables, check_late, make_nonfinite({17}, "nan")))
    assert [line["row"] for line in json_of(out / "nan_rows.jsonl")] == [17]
    assert checkpoints_of(out) == [], (
        "row 17 is in the first epoch, and the first checkpoint would be at its end"
    )
