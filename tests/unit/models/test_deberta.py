"""DeBERTa's own parts: rows of the table by distance, groups of texts, and that nothing is as large as all pairs of tokens.

That its logits and gradients are those of the padded model: tests/unit/models/test_architectures.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from bertdist.models import deberta
from bertdist.models.attention import Kernel, Packing, build_packing

CPU = torch.device("cpu")
V3 = {
    "relative_attention": True,
    "position_buckets": 32,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
}
V3 |= {"position_biased_input": False, "type_vocab_size": 0}


def model_of(**settings: Any) -> Any:
    """A random classifier in float64, not yet prepared."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    torch.manual_seed(0)
    config = DebertaV2Config(**(sizes | {"initializer_range": 0.2} | V3 | settings))
    return AutoModelForSequenceClassification.from_config(config).eval().double()


def packing_of(lengths: list[int], kernel: Kernel = "buckets") -> Packing:
    return build_packing(lengths, torch.tensor([0, *lengths]).cumsum(0)[:-1], 2, kernel)


def logits_of(model: Any, lengths: list[int]) -> Tensor:
    ids = torch.arange(sum(lengths))[None] % 50 + 5
    found: Tensor = model(
        input_ids=ids, position_ids=torch.zeros_like(ids), packing=packing_of(lengths)
    ).logits
    return found


# ---- Distances


def test_rows_of_a_short_table_by_hand() -> None:
    encoder = model_of(position_buckets=-1, max_relative_positions=3).deberta.encoder
    rows, low, high = deberta._RelativePositions(encoder).rows(5, CPU)
    assert (low, high) == (
        0,
        6,
    )  # 2 x 3 rows: distances -3 to 2, and what is farther counts as the farthest
    assert rows.tolist() == [
        [3, 2, 1, 0, 0],
        [4, 3, 2, 1, 0],
        [5, 4, 3, 2, 1],
        [5, 5, 4, 3, 2],
        [5, 5, 5, 4, 3],
    ]


@pytest.mark.parametrize(("buckets", "longest_distance"), [(32, -1), (4, 64), (-1, 512), (-1, 16)])
def test_rows_are_those_of_hugging_face(buckets: int, longest_distance: int) -> None:
    encoder = model_of(
        position_buckets=buckets, max_relative_positions=longest_distance
    ).deberta.encoder
    distances = deberta._RelativePositions(encoder)
    table = encoder.rel_embeddings.num_embeddings
    for longest in (7, 3, 100, 1, 64, 65, 300):  # in any order
        rows, low, high = distances.rows(longest, CPU)
        expected = (encoder.get_rel_pos(torch.zeros(longest, 1))[0] + table // 2).clamp(
            0, table - 1
        )
        assert torch.equal(rows + low, expected)
        assert (low, high) == (expected.min(), expected.max() + 1)


def test_only_needed_rows_are_projected() -> None:
    model = model_of()
    deberta.prepare(model)
    seen: list[int] = []
    for layer in model.deberta.encoder.layer:
        layer.attention.self.key_proj.register_forward_hook(
            lambda module, args, out: seen.append(args[0].shape[-2])
        )
    logits_of(model, [9, 5, 5, 2])
    assert seen == [21, 2 * 9 - 1] * 2  # tokens, then rows of 64


# ---- Groups


def test_groups_by_hand() -> None:
    for kernel, expected in (("buckets", [slice(0, 1), slice(1, 3)]), ("padded", [slice(None)])):
        texts = deberta._PaddedGroups(packing_of([20, 3, 2], kernel), None, CPU)  # type: ignore[arg-type]
        assert [group.texts for group in texts.groups] == expected
    last = deberta._PaddedGroups(packing_of([20, 3, 2]), None, CPU).groups[-1]
    assert last.pad_index.tolist() == [[20, 21, 22], [23, 24, 0]]
    assert last.mask.tolist() == [[True, True, True], [True, True, False]]
    assert last.unpad_index.tolist() == [0, 1, 2, 3, 4]
    assert last.pad(torch.arange(25.0)[None, :, None])[1, :2, 0].tolist() == [23, 24]


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(
                    self.numbers, tensor.untyped_storage().size() // tensor.element_size()
                )
        return out


@pytest.mark.parametrize("texts", [100, 200])
def test_no_tensor_is_as_large_as_all_pairs_of_tokens(texts: int) -> None:
    model = model_of(max_position_embeddings=64)
    deberta.prepare(model)
    with Largest() as largest:
        logits_of(model, [4] * texts).sum().backward()
    tokens = 4 * texts
    assert (
        largest.numbers == tokens * 48
    )  # the feed-forward's; all pairs are 8 times as many for 400 tokens, and for each head
