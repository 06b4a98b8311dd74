"""What a text loses to dropout is its own affair: not its company's, its order's, its padding's, its micro-batch's.

Legend: T tokens, N texts, L tokens of one text, H heads, W width of a site.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bertdist.models import dropout
from bertdist.models.attention import BucketLayout
from bertdist.models.dropout import (
    Dropout,
    DropoutMasks,
    keep_scale,
    replace_dropouts,
    seed_dropout,
    seed_torch,
)

LENGTHS, ROWS = [5, 3, 1], [7, 0, 2]
WIDTH, HEADS = 24, 2


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed_dropout(3, 4, 0)


def drawn(row: int, sizes: Sequence[int] = (512, 512), p: float = 0.5) -> list[Tensor]:
    """One text's masks at some sites."""
    masks = DropoutMasks([row], [1])
    return [masks.draw([size], p) for size in sizes]


# ---- Noise


def test_masks_of_a_text_do_not_depend_on_the_other_texts() -> None:
    sizes = [[5, 8, 3], [16, 2, 40]]  # of three texts, at two sites
    alone = [[DropoutMasks([row], [1]).draw([sizes[0][i]], 0.5) for i, row in enumerate(ROWS)]]
    masks = DropoutMasks(ROWS, LENGTHS)
    batched = [masks.draw(size, 0.5).split(size) for size in sizes]
    assert all(torch.equal(a, b) for a, b in zip(batched[0], alone[0], strict=True))
    order = [2, 0, 1]
    other = DropoutMasks([ROWS[i] for i in order], [LENGTHS[i] for i in order])
    for site, size in enumerate(sizes):
        for i, part in zip(
            order,
            other.draw([size[i] for i in order], 0.5).split([size[i] for i in order]),
            strict=True,
        ):
            assert torch.equal(part, batched[site][i])


def test_masks_differ_by_row_step_seed_and_layer() -> None:
    first = drawn(5)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(5), strict=True))
    found = [first[0], first[1], drawn(6)[0], drawn(-1)[0]]
    for seed, step in ((3, 5), (4, 4), (4, 3)):
        seed_dropout(seed, step, 0)
        found.append(drawn(5)[0])
    for i, a in enumerate(found):
        for b in found[:i]:
            assert abs((a == b).float().mean() - 0.5) < 5 * 0.5 / math.sqrt(
                512
            )  # as far apart as coins


def test_the_rank_changes_only_torchs_own_draws() -> None:
    found = []
    for rank in (0, 0, 1):
        seed_dropout(3, 4, rank)
        found.append((drawn(5)[0], torch.rand(8)))
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


def test_generators_have_the_seed_that_manual_seed_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states, on_gpus = [], []
    for seed, seeded_by in (
        (2**63 + 5, seed_torch),
        (2**63 + 5, torch.manual_seed),
        (5, seed_torch),
    ):
        seeded_by(seed)
        states.append((torch.get_rng_state(), torch.initial_seed()))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]
    assert not torch.equal(states[0][0], states[2][0]), "the control"

    monkeypatch.setattr(torch.cuda, "manual_seed_all", on_gpus.append)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        seed_torch(7 + in_use)
    assert on_gpus == [8]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_met(p: float) -> None:
    size = 1_000_000
    lost = 1 - drawn(1, [size], p)[0].double().mean().item()
    error = math.sqrt(p * (1 - p) / size)
    assert abs(lost - p) < 5 * error
    assert abs(lost - 1.02 * p) > 5 * error  # the control: a fiftieth more would be seen
    assert keep_scale(p) == pytest.approx(1 / (1 - p), rel=1e-3 * (p / (1 - p)))


def test_neighbours_are_independent() -> None:
    keep = drawn(1, [1_000_000])[0].double() - 0.5
    for lag in (1, 2, 3, 4, 5, 16, 384):
        assert abs((keep[lag:] * keep[:-lag]).mean() / 0.25) < 5 / math.sqrt(len(keep))


def test_nothing_and_everything() -> None:
    assert drawn(1, [1000], 0.0)[0].all() and keep_scale(0.0) == 1
    assert not drawn(1, [1000], 1.0)[0].any()
    x = torch.randn(1, sum(LENGTHS), WIDTH)
    for p, expected in ((0.0, x), (1.0, torch.zeros_like(x))):
        assert torch.equal(layer(p)(x), expected)
    assert keep_scale(0.5) == 2


def test_shared_masks_are_the_same_in_every_micro_batch() -> None:
    tables = [
        DropoutMasks(rows, lengths).draw_shared(500, 0.5)
        for rows, lengths in ((ROWS, LENGTHS), ([9], [4]), ([-1], [2]))
    ]
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])
    assert not any(torch.equal(tables[0], drawn(row, [500])[0]) for row in (-1, 0, 1))
    masks = DropoutMasks(ROWS, LENGTHS)
    assert not torch.equal(masks.draw_shared(500, 0.5), masks.draw_shared(500, 0.5))  # another site
    seed_dropout(3, 5, 0)
    assert not torch.equal(DropoutMasks(ROWS, LENGTHS).draw_shared(500, 0.5), tables[0])


def draws(masks: DropoutMasks) -> list[Tensor]:
    return [masks.draw([100, 101, 102], 0.5), masks.draw_shared(100, 0.5)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_recomputation_draws_the_same_masks() -> None:
    masks, plain = DropoutMasks(ROWS, LENGTHS), DropoutMasks(ROWS, LENGTHS)
    assert same(draws(masks), draws(plain))
    first, again = masks.replay_contexts()
    with first:
        inside = draws(masks)
    assert same(inside, draws(plain))
    after = draws(masks)
    with again:
        assert same(draws(masks), inside)
        draws(masks)  # however much is drawn there
    assert same(after, draws(plain))
    assert same(draws(masks), draws(plain))  # and what comes next is as if nothing had been
    assert not same(draws(masks), inside)  # the control: no second context, other masks


# ---- Dropout


def layer(p: float = 0.4, rows: list[int] = ROWS, lengths: list[int] = LENGTHS) -> Dropout:
    masks = DropoutMasks(rows, lengths)
    return Dropout(p, lambda: masks).train()


def padded(x: Tensor, lengths: list[int]) -> Tensor:
    """(1, T, W) -> (N, longest, W), 9 where there is no token."""
    return nn.utils.rnn.pad_sequence(x[0].split(lengths), batch_first=True, padding_value=9.0)


def real(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([text[:length] for text, length in zip(x, lengths, strict=True)])[None]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), sites=st.integers(1, 3))
def test_padded_and_packed_texts_have_the_same_masks(lengths: list[int], sites: int) -> None:
    rows = list(range(3, 3 + len(lengths)))
    one, other = layer(0.4, rows, lengths), layer(0.4, rows, lengths)
    for _ in range(sites):
        x = torch.randn(1, sum(lengths), WIDTH, dtype=torch.float64)
        found = one(x)
        assert torch.equal(real(other(padded(x, lengths)), lengths), found)
        assert torch.equal(found, torch.where(found == 0, 0.0, x * keep_scale(0.4)))


def test_a_packed_mask_equals_drawn_masks() -> None:
    x = torch.randn(1, sum(LENGTHS), WIDTH)
    keep = DropoutMasks(ROWS, LENGTHS).draw([length * WIDTH for length in LENGTHS], 0.4).view_as(x)
    assert torch.equal(layer()(x), x * (keep * torch.tensor(keep_scale(0.4))))
    assert not torch.equal(layer(rows=[7, 0, 3])(x), layer()(x))  # the control: another row


@pytest.mark.parametrize("shape", [(3, WIDTH), (3, 1, WIDTH), (1, 3, WIDTH)])
def test_masks_of_first_tokens_are_their_texts_draws(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    expected = DropoutMasks(ROWS, LENGTHS).draw([WIDTH] * 3, 0.4)
    assert torch.equal(layer()(x).flatten() != 0, expected)
    alone = layer(rows=[0], lengths=[3])(torch.ones(1, WIDTH))
    assert torch.equal(layer()(x).flatten()[WIDTH : 2 * WIDTH], alone[0])  # the text of row 0


def test_attention_masks_are_the_same_padded_and_packed() -> None:
    longest = max(LENGTHS)
    found = layer()(torch.ones(3, HEADS, longest, longest)) != 0
    (masks,) = BucketLayout(LENGTHS, HEADS).draw_masks(
        DropoutMasks(ROWS, LENGTHS), 0.4, first_only=False, dtype=torch.float32
    )
    keeps = masks != 0
    assert torch.equal(masks, keeps * torch.tensor(keep_scale(0.4)))
    for text, packed, length in zip(found, keeps.unflatten(0, (3, HEADS)), LENGTHS, strict=True):
        assert torch.equal(text[:, :length, :length], packed[:, :length, :length])
    alone = layer(rows=[0], lengths=[3])(torch.ones(1, HEADS, 3, 3)) != 0
    assert torch.equal(alone[0], found[1, :, :3, :3])


def test_a_table_has_the_same_mask_in_every_micro_batch() -> None:
    table = torch.ones(64, WIDTH)
    assert torch.equal(layer()(table), layer(rows=[5, 6], lengths=[2, 2])(table))
    assert 0 < (layer()(table) == 0).float().mean() < 1


def test_without_masks_dropout_is_torchs_own() -> None:
    module, own, x = Dropout(0.4, lambda: None), nn.Dropout(0.4), torch.randn(1, 9, WIDTH)
    torch.manual_seed(0)
    expected = own(x)
    torch.manual_seed(0)
    assert torch.equal(module.train()(x), expected)
    assert torch.equal(layer().eval()(x), x)


def test_the_gradient_has_the_mask_of_the_values() -> None:
    x = torch.randn(1, sum(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer()(x)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, (out != 0).double() * keep_scale(0.4))


def test_every_dropout_of_a_model_is_replaced_and_nothing_else() -> None:
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2), nn.LayerNorm(4)), Own(0.3)
    )
    names = list(model.state_dict())
    masks = DropoutMasks(ROWS, LENGTHS)
    replace_dropouts(model, lambda: masks)
    assert [module.p for module in model.modules() if isinstance(module, Dropout)] == [0.1, 0.2]
    assert [type(module) for module in model.modules() if isinstance(module, nn.Dropout)] == [Own]
    assert list(model.state_dict()) == names
    kept = model[1].train()(torch.ones(3, WIDTH))
    assert torch.equal(kept != 0, DropoutMasks(ROWS, LENGTHS).draw([WIDTH] * 3, 0.1).view(3, WIDTH))


def test_sixteen_bits_are_enough_for_small_rates() -> None:
    for p in (1e-3, 0.01, 0.1, 0.3):
        assert abs(dropout._threshold(p) / dropout._LEVELS - p) <= 1 / 131_072
