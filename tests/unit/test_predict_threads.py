"""Threads may share a Predictor."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertdist import Predictor
from bertdist.core.config import ModelConfig
from bertdist.data.tokenization import load_tokenizer
from bertdist.models.classifier import load_classifier, save_classifier
from bertdist.tasks.tasks import SingleLabel

THREADS = 4
WORDS = "a bad best dull film fine good it not of so the was".split()


@pytest.fixture
def predictor(tmp_path: Path, tiny_model: Path) -> Predictor:
    config = ModelConfig(model_name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(config)
    model, _ = load_classifier(config, SingleLabel(("bad", "good")), tokenizer=tokenizer)
    save_classifier(model, tokenizer, tmp_path, {"max_length": 32})
    return Predictor(tmp_path)


def answers_of_threads(predictor: Predictor, parts: list[list[str]]) -> tuple[list[Any], int]:
    """Each thread's answers, and how many threads were in the model at once."""
    inside, most, forward = 0, 0, predictor.model.forward
    counted = threading.Lock()

    def watched(batch: Any) -> torch.Tensor:
        nonlocal inside, most
        with counted:
            inside += 1
            most = max(most, inside)
        time.sleep(0.005)
        logits = forward(batch)
        with counted:
            inside -= 1
        return logits

    predictor.model.forward = watched  # type: ignore[method-assign]
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(predictor.probabilities, parts)), most


@pytest.mark.filterwarnings("ignore:--max_length 32 truncates")
def test_threads_get_the_answers_of_their_texts(predictor: Predictor) -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, size=n)) for n in random.integers(1, 60, 48)]
    parts = [texts[start : start + 4] for start in range(0, len(texts), 4)]
    expected = [predictor.probabilities(part) for part in parts]
    found, most = answers_of_threads(predictor, parts)
    assert all(map(np.array_equal, found, expected)) and most == 1
    predictor._lock = contextlib.nullcontext()  # type: ignore[assignment]  # the control
    assert answers_of_threads(predictor, parts)[1] > 1
