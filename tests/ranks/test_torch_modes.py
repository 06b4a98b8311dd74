"""A program that trains or predicts within a mode of torch gets the same bits as outside of it."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import Files, assert_same_tensors, last_checkpoint, tensors_of, words_of, write_split
from rows import train_module as train

from bertdist import predict
from bertdist.core.args import read_config

Mode = Callable[[], Any]


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_split(tmp_path_factory.mktemp("modes"), 16, 8)


def run_within(
    accelerator: Accelerator, words: list[str], out: Path, modes: list[Mode], guarded: bool
) -> list[Any]:
    """Train and predict within the modes; the predictions."""
    train_function, predictor = train.train, predict.Predictor
    if not guarded:  # the functions without their decorator
        train_function = train_function.__wrapped__
        predictor.predict_logits = predictor.predict_logits.__wrapped__  # type: ignore[attr-defined,method-assign]
        predictor.predict_records = predictor.predict_records.__wrapped__  # type: ignore[attr-defined,method-assign]
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode())
        train_function(read_config(words))
        return predictor(out)(["it was good", "so dull a film"])


def train_within(
    model: Path, out: Path, files: Files, *modes: Mode, guarded: bool = True
) -> list[Any]:
    words = words_of(model, out, files, max_train_steps=2)
    return run_ranks(1, run_within, words, out, list(modes), guarded)[0]  # type: ignore[no-any-return]


def test_the_modes_of_a_caller_change_no_bit(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    plain, within, broken = tmp_path / "plain", tmp_path / "within", tmp_path / "broken"
    expected = train_within(tiny_model, plain, files)
    modes = autocast, torch.inference_mode, lambda: torch.device("meta")
    assert train_within(tiny_model, within, files, *modes) == expected
    for folder in (last_checkpoint, lambda out: out / "best"):
        assert_same_tensors(tensors_of(folder(plain)), tensors_of(folder(within)))
    found = train_within(tiny_model, broken, files, autocast, guarded=False)
    assert found != expected, "negative control: autocast changes what is computed"
    with pytest.raises(AssertionError):
        assert_same_tensors(tensors_of(plain / "best"), tensors_of(broken / "best"))


def test_without_the_guard_there_is_no_gradient(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    with pytest.raises(RankError, match="does not require grad"):
        train_within(tiny_model, tmp_path / "out", files, torch.no_grad, guarded=False)
