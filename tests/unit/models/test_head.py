"""A temperature is folded into the layer that makes the logits, of every family; where there is none, it is refused."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from bertdist.core.errors import ModelError
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.classifier import load_trained_classifier
from bertdist.models.head import divide_output

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
    "id2label": {0: "a", 1: "b", 2: "c"},
    "problem_type": "single_label_classification",
}
TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def made(model_type: str) -> Path:
        config = AutoConfig.for_model(model_type, **SIZES)
        folder = tmp_path_factory.mktemp("model")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_config(config)
            for name, weight in model.named_parameters():
                if name.endswith("bias"):  # which begin as 0
                    torch.nn.init.normal_(weight)
            model.save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "mpnet", "squeezebert"])
def test_the_saved_model_has_divided_logits(
    model_type: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    classifier, _, _ = load_trained_classifier(str(folder_of(model_type)))
    before = {name: weight.clone() for name, weight in classifier.model.state_dict().items()}
    logits = classifier.probe_logits()
    divide_output(classifier.output_layer(), TEMPERATURE)
    assert torch.allclose(classifier.probe_logits(), logits / TEMPERATURE, rtol=1e-5, atol=1e-7)
    changed = {
        name
        for name, weight in classifier.model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert {name.rpartition(".")[2] for name in changed} <= {"weight", "bias"}
    assert len({name.rpartition(".")[0] for name in changed}) == 1
    classifier.model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([text.ids for text in classifier.probes((12, 12))])
    with torch.no_grad():
        found = plain(input_ids=ids).logits
    assert torch.allclose(found, logits / TEMPERATURE, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, logits, rtol=1e-2, atol=1e-6), "the control"


def test_a_layer_that_does_not_make_the_logits_is_refused(
    folder_of: Callable[[str], Path],
) -> None:
    classifier, _, _ = load_trained_classifier(str(folder_of("bert")))
    assert classifier.output_layer() is classifier.model.classifier
    classifier.model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match="'bert': extra does not make its logits"):
        classifier.output_layer()
    del classifier.model.extra

    class Squashed(torch.nn.Linear):  # what makes the logits is not linear
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args).tanh()

    classifier.model.classifier.__class__ = Squashed
    with pytest.raises(ModelError, match="classifier does not make its logits"):
        classifier.output_layer()
    classifier.model.classifier = torch.nn.Identity()
    with pytest.raises(ModelError, match="'bert': it has no output layer"):
        classifier.output_layer()


def test_each_weight_is_rounded_once() -> None:
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    divide_output(layer, 3.3)
    assert torch.equal(layer.weight, (before.double() / 3.3).float())
    divide_output(layer, 1.0)
    assert torch.equal(layer.weight, (before.double() / 3.3).float())
