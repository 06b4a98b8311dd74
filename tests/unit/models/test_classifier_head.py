"""The output layer of a loaded model: its rows follow the label names, and are drawn anew where the labels are others."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from bertdist.core.config import ModelConfig
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.classifier import (
    Classifier,
    load_classifier,
    load_model_config,
    load_trained_classifier,
    pretrained_labels,
)
from bertdist.tasks.labels import LabelStats
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task, create_task

NAMES = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
    "embedding_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
OTHER_SIZES: dict[str, dict[str, Any]] = {  # of families with other words for them
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
    "funnel": {"d_model": 16, "block_sizes": [1], "n_head": 2, "d_head": 8, "d_inner": 16},
}
PADDED = ("mpnet", "squeezebert", "xlnet", "funnel")  # heads that no other family has


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def made(model_type: str, names: tuple[str, ...] = NAMES) -> Path:
        sizes = SIZES
        if model_type in OTHER_SIZES:
            sizes = {"vocab_size": 40, "initializer_range": 0.2, **OTHER_SIZES[model_type]}
        config = AutoConfig.for_model(model_type, **sizes, id2label=dict(enumerate(names)))
        folder = tmp_path_factory.mktemp("model")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return folder

    return made


def load(folder: Path, task: Task) -> tuple[Classifier, list[str]]:
    """The classifier, and the notes on its output layer."""
    torch.manual_seed(7)
    config = ModelConfig(model_name_or_path=str(folder), max_length=8)
    model, notes = load_classifier(config, task)
    return model.eval(), [note for note in notes if "padded" not in note and "Padding" not in note]


def texts() -> PackedBatch:
    rows = [[1, 5, 6, 7, 2], [1, 9, 2], [1, 11, 30, 2]]
    return collate([Example(i, ids, [0] * len(ids), 0, 1.0) for i, ids in enumerate(rows)])


def by_name(model: Classifier, names: tuple[str, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        logits = model(texts())
    return {name.upper(): logits[:, i] for i, name in enumerate(names)}


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *PADDED])
def test_the_rows_follow_the_names(folder_of: Callable[..., Path], model_type: str) -> None:
    folder = folder_of(model_type)
    same, notes = load(folder, SingleLabel(NAMES))
    assert notes == []
    before = by_name(same, NAMES)
    names = ("entailment", "contradiction", "neutral")
    moved, notes = load(folder, SingleLabel(names))
    assert len(notes) == 1 and "CONTRADICTION, NEUTRAL, ENTAILMENT" in notes[0]
    after = by_name(moved, names)
    for name in NAMES:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)
    # the control: in the old order every label would have another's logits
    wrong = dict(zip(NAMES, after.values(), strict=True))
    assert all((wrong[name] - before[name]).abs().max() > 1e-3 for name in NAMES)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *PADDED])
def test_other_labels_draw_it_anew(folder_of: Callable[..., Path], model_type: str) -> None:
    folder = folder_of(model_type)
    old, _ = load(folder, SingleLabel(NAMES))
    new, notes = load(folder, SingleLabel(("bad", "fine", "good")))
    again, _ = load(folder, SingleLabel(("bad", "fine", "good")))
    (note,) = notes
    layer = note.removeprefix("New weights, to be trained: ").split(",")[0]
    assert note == (
        f"New weights, to be trained: {layer}, as the labels of the model are others: "
        "CONTRADICTION, NEUTRAL, ENTAILMENT."
    )
    weights, fresh, same = (model.model.state_dict() for model in (old, new, again))
    assert not torch.equal(weights[f"{layer}.weight"], fresh[f"{layer}.weight"])
    assert fresh[f"{layer}.weight"].abs().max() > 0 and not fresh[f"{layer}.bias"].any()
    for name, weight in fresh.items():
        assert torch.equal(weight, same[name])  # from the seed
        assert name.startswith(layer) or torch.equal(weight, weights[name])


@pytest.mark.parametrize(
    ("names", "task", "kept"),
    [
        (("LABEL_0", "LABEL_1"), SingleLabel(("0", "1")), True),
        (("LABEL_0", "LABEL_1"), SingleLabel(("LABEL_0", "LABEL_1")), True),
        (("LABEL_0", "LABEL_1"), SingleLabel(("bad", "good")), False),
        (("Bad", "Good"), SingleLabel(("bad", "good")), True),
        (("bad", "good"), MultiLabel(("bad", "good")), True),
        (("bad", "good"), MultiLabel(("good", "fine")), False),
        (("a", "a"), SingleLabel(("a", "a")), True),  # as a trained model may have it
        (("score",), Regression(("label",)), True),
        (("spam",), MultiLabel(("ham",)), False),
    ],
)
def test_which_labels_are_the_same(
    folder_of: Callable[..., Path], names: tuple[str, ...], task: Task, kept: bool
) -> None:
    folder = folder_of("bert", names)
    with torch.random.fork_rng():
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
    model, notes = load(folder, task)
    assert torch.equal(model.model.classifier.weight, plain.classifier.weight) is kept
    assert (notes == []) is kept


def test_a_model_keeps_its_own_order_for_labels_in_another_case(
    folder_of: Callable[..., Path],
) -> None:
    from bertdist.core.config import TaskConfig

    folder = folder_of("bert")
    names = pretrained_labels(load_model_config(ModelConfig(model_name_or_path=str(folder))))
    values = ["entailment", "neutral", "contradiction"]
    labels = LabelStats("text", [*values], [1, 1, 1])
    task = create_task(TaskConfig(), labels, names)
    assert task.labels == ("contradiction", "neutral", "entailment")
    assert load(folder, task)[1] == []
    asked = create_task(TaskConfig(label_names=values), labels, names)
    assert asked.labels == tuple(values)  # a given order wins, and the rows follow it
    assert len(load(folder, asked)[1]) == 1


def test_a_trained_folder_is_loaded_as_it_is(folder_of: Callable[..., Path]) -> None:
    for names in (NAMES, ("LABEL_0", "LABEL_1"), ("b", "a")):
        folder = folder_of("bert", names)
        model, task, _ = load_trained_classifier(str(folder))
        assert task.labels == names
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(model.model.classifier.weight, plain.classifier.weight)
