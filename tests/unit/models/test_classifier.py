"""A packed model is the padded Hugging Face model: logits, loss and every gradient; its folder is a plain Hugging Face folder.

Legend: T tokens, N texts, O outputs.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerBase,
    pipeline,
)

from bertdist.core import hub
from bertdist.core.config import ModelConfig
from bertdist.core.errors import BertdistError, ConfigError, ModelError
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.in_memory import records_from_texts
from bertdist.data.loader import MapLoader
from bertdist.data.tokenization import Example, create_dataset, encode, load_tokenizer
from bertdist.models import attention
from bertdist.models import classifier as classifier_module
from bertdist.models.classifier import (
    Classifier,
    load_classifier,
    load_model_config,
    load_trained_classifier,
    pretrained_labels,
    save_classifier,
)
from bertdist.models.dropout import Dropout, seed_dropout
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task

TASK = SingleLabel(("bad", "fine", "good"))
TEXTS = [
    "a great movie",
    "bad",
    "so dull and so poor a film, the worst",
    "it was good",
    "not fine",
    "the best film is warm, fun and good!",
]
PAIRS = [
    "it was great",
    "a dull film and so bad",
    "bad",
    "so",
    "this is the worst movie",
    "great fun",
]
TARGETS = [2, 0, 0, 2, 0, 1]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def load(folder: Path, task: Task = TASK, **settings: Any) -> tuple[Classifier, list[str]]:
    """What `load_classifier` makes of a folder, with a head drawn from seed 0."""
    config = ModelConfig(model_name_or_path=str(folder), **settings)
    torch.manual_seed(0)
    model, notes = load_classifier(config, task)
    return model.eval(), notes


def padded_twin(model: Classifier, folder: Path) -> Any:
    """The same weights as a plain padded Hugging Face model, with the attention that is written out in Python."""
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=model.model.config.num_labels, attn_implementation="eager"
    )
    plain.load_state_dict(model.model.state_dict())
    return plain.eval()


def packed(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[str] | None) -> PackedBatch:
    records = records_from_texts(TEXTS, pairs)
    encoded = encode([records[row] for row in range(len(TEXTS))], tokenizer, 64)
    return collate(
        [
            Example(row, ids, segments, TARGETS[row], 1.0)
            for row, (ids, segments) in enumerate(encoded)
        ]
    )


def padded(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[str] | None) -> dict[str, Tensor]:
    found = tokenizer(
        TEXTS, None if pairs is None else list(pairs), padding=True, return_tensors="pt"
    )
    assert (found["attention_mask"] == 0).any()  # there is something to leave out
    return dict(found)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name.removeprefix("model."): weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


# Logits of size 2 after some twenty sums of 32 to 64 products, and gradients relative to their size: five times what is measured.
TOLERANCES = {torch.float32: (5e-6, 2e-4), torch.float64: (1e-14, 3e-13)}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to the size of its tensor.

    A tensor counts as no smaller than a thousandth of the largest: a bias of the keys moves all scores of a softmax alike, so its
    gradient is zero but for rounding.
    """
    assert a.keys() == b.keys()
    size = max(gradient.abs().max() for gradient in b.values()) / 1000
    return max(
        ((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=size)).item() for name in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_packed_logits_loss_and_gradients_equal_padded_ones(
    pairs: Sequence[str] | None,
    dtype: torch.dtype,
    tiny_model: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model, _ = load(tiny_model)
    assert model.packed
    plain = padded_twin(model, tiny_model).to(dtype)
    model.to(dtype)
    logits, expected = model(packed(tokenizer, pairs)), plain(**padded(tokenizer, pairs)).logits
    assert logits.shape == (6, 3)
    assert expected.std() > 0.3  # the texts do not all get one answer
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCES[dtype][0])
    loss, wanted = (
        F.cross_entropy(x, torch.tensor(TARGETS), reduction="sum") for x in (logits, expected)
    )
    torch.testing.assert_close(loss, wanted, rtol=TOLERANCES[dtype][0], atol=0)
    found, twin = gradients(model, loss), gradients(plain, wanted)
    assert found.keys() == {name for name, _ in plain.named_parameters()}
    assert largest(found, twin) < TOLERANCES[dtype][1]


def wrong_ends(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> PackedBatch:
    real = attention.build_packing
    monkeypatch.setattr(
        attention, "build_packing", lambda lengths, *rest: real(sorted(lengths), *rest)
    )
    return batch


def no_restart(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> PackedBatch:
    return replace(batch, positions=torch.arange(len(batch.ids)))


def no_segments(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> PackedBatch:
    return replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids))


def last_tokens(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> PackedBatch:
    return replace(batch, cu_seqlens=torch.cat([batch.cu_seqlens[1:], batch.cu_seqlens[-1:]]) - 1)


@pytest.mark.parametrize("broken", [wrong_ends, no_restart, no_segments, last_tokens])
def test_wrong_packing_is_detected(
    broken: Callable[[PackedBatch, pytest.MonkeyPatch], PackedBatch],
    tiny_model: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The control: texts that see each other, positions that go on, segments left out, the wrong tokens kept.
    model, _ = load(tiny_model)
    plain = padded_twin(model, tiny_model)
    logits = model(broken(packed(tokenizer, PAIRS), monkeypatch))
    expected = plain(**padded(tokenizer, PAIRS)).logits
    assert (logits - expected).abs().max() > 0.05  # 10,000 times what is let pass
    loss, wanted = (
        F.cross_entropy(x, torch.tensor(TARGETS), reduction="sum") for x in (logits, expected)
    )
    assert largest(gradients(model, loss), gradients(plain, wanted)) > 0.05


def test_order_and_other_texts_do_not_change_logits(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, _ = load(tiny_model)
    model.double()
    examples = create_dataset(records_from_texts(TEXTS), tokenizer, None, 64)
    batched = model(collate(examples[list(range(6))]))
    for order in ([5, 4, 3, 2, 1, 0], [2], [3, 0]):
        torch.testing.assert_close(
            model(collate(examples[order])), batched[order], rtol=0, atol=1e-12
        )


# ---- A step is its rows, however it is dealt and cut


def step_gradients(
    model: Classifier, tokenizer: PreTrainedTokenizerBase, ranks: int, tokens: int
) -> dict[str, Tensor]:
    """Gradients of one step of six rows: summed losses of all ranks' micro-batches, over its rows."""
    records = replace(
        records_from_texts(TEXTS),
        label_kind="text",
        label_values=["bad", "fine", "good"],
        label_indices=torch.tensor(TARGETS).numpy(),
    )
    examples = create_dataset(records, tokenizer, TASK, 64)
    model.zero_grad()
    for rank in range(ranks):
        (step,) = MapLoader(
            dataset=examples,
            rows_per_step=6,
            tokens_per_micro_batch=tokens,
            rank=rank,
            ranks=ranks,
        ).steps(0, 1)
        for batch in step.micro_batches:
            (
                F.cross_entropy(model(batch), batch.targets, reduction="none") * batch.weights
            ).sum().div(step.rows).backward()
    return {
        name.removeprefix("model."): weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])  # 8: two ranks have nothing to do
@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_gradient_of_a_step_equals_that_of_one_padded_batch(
    ranks: int, tokens: int, tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, _ = load(tiny_model)
    plain = padded_twin(model, tiny_model).double()
    wanted = gradients(
        plain, plain(**padded(tokenizer, None), labels=torch.tensor(TARGETS)).loss
    )  # Hugging Face's own mean
    found = step_gradients(model.double(), tokenizer, ranks, tokens)
    assert largest(found, wanted) < 1e-12
    without = {
        name: gradient * 6 for name, gradient in found.items()
    }  # the control: not divided by the rows
    assert largest(without, wanted) > 1


def test_a_text_of_weight_zero_has_zero_gradients(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, _ = load(tiny_model)
    batch = packed(tokenizer, None)
    idle = replace(batch, weights=torch.zeros(6))
    found = gradients(model, TASK.loss(model(idle), idle.targets, idle.weights))
    assert found.keys() == {
        name.removeprefix("model.") for name, _ in model.named_parameters()
    }  # every weight joins the exchange
    assert all((gradient == 0).all() for gradient in found.values())


# ---- Architectures that are no family: padded, or one length at a time

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SIZES |= {"initializer_range": 0.2}
XLNET = {
    "vocab_size": 60,
    "d_model": 32,
    "n_layer": 2,
    "n_head": 2,
    "d_inner": 48,
    "initializer_range": 0.2,
}
FUNNEL = {
    "vocab_size": 60,
    "d_model": 32,
    "n_head": 2,
    "d_head": 16,
    "d_inner": 48,
    "block_sizes": [1, 1],
    "initializer_range": 0.2,
}
PADDED: dict[str, dict[str, Any]] = {"mpnet": SIZES, "roformer": SIZES, "funnel": FUNNEL}
READERS: dict[str, dict[str, Any]] = {
    "fnet": SIZES,
    "xlnet": XLNET,
}  # of padding: FNet mixes all places, XLNet's head reads the last
OTHERS = PADDED | READERS
LENGTHS = (11, 9, 9, 6, 3)


def other(kind: str, folder: Path, **settings: Any) -> tuple[Classifier, list[str]]:
    """A random model with a head of an architecture that is no family, in float64."""
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, id2label=dict(enumerate(TASK.labels)), **OTHERS[kind])
    ).save_pretrained(folder)
    model, notes = load(folder, max_length=32, **settings)
    assert not model.packed
    return model.double(), notes


def batch_by_hand(segments: bool, texts: Sequence[int] = range(5)) -> PackedBatch:
    """Texts of LENGTHS; text i is the same in any batch."""
    examples = []
    for row in texts:
        ids = torch.randint(
            5, 60, (LENGTHS[row],), generator=torch.Generator().manual_seed(row)
        ).tolist()
        examples.append(
            Example(row, ids, [int(segments and k > 2) for k in range(len(ids))], row % 3, 1.0)
        )
    return collate(examples)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_equal_each_text_alone(kind: str, tmp_path: Path) -> None:
    model, notes = other(kind, tmp_path)
    said = {
        False: f"Models of type {kind!r} run padded to the longest text of a micro-batch; the results are the same.",
        True: f"Padding changes the predictions of models of type {kind!r}: only texts of equal length run together.",
    }
    assert notes == [said[kind in READERS]]
    has_segments = kind in ("roformer", "funnel", "fnet", "xlnet")
    batch = batch_by_hand(has_segments)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval().double()
    expected = []
    for ids, segments in zip(
        batch.ids.split(batch.lengths), batch.token_type_ids.split(batch.lengths), strict=True
    ):
        expected.append(
            plain(
                input_ids=ids[None], **({"token_type_ids": segments[None]} if has_segments else {})
            ).logits
        )
    logits, wanted = model(batch), torch.cat(expected)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
    losses = [F.cross_entropy(x, batch.targets) for x in (logits, wanted)]
    assert largest(gradients(model, losses[0]), gradients(plain, losses[1])) < 1e-12


@pytest.mark.parametrize("kind", READERS)
def test_texts_of_equal_length_run_together(kind: str, tmp_path: Path) -> None:
    model, _ = other(kind, tmp_path)
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    expected = model(batch_by_hand(False))
    assert sorted(shapes) == [(1, 3), (1, 6), (1, 11), (2, 9)]
    model.padding_changes_logits = False  # the control: padded, answers change
    assert (model(batch_by_hand(False)) - expected).abs().max() > 0.01
    assert shapes[-1] == (5, 11)


@pytest.mark.parametrize("kind", PADDED)
def test_unmasked_padding_is_detected(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = other(kind, tmp_path)
    expected = model(batch_by_hand(False))
    real = attention.padded_layout
    monkeypatch.setattr(
        attention, "padded_layout", lambda lengths: (real(lengths)[0], real(lengths)[1] | True)
    )
    assert (model(batch_by_hand(False)) - expected).abs().max() > 0.01  # the control
    assert load(tmp_path, max_length=32)[
        0
    ].padding_changes_logits  # and loading would have found it


def test_a_packed_family_has_no_note_on_padding(tiny_model: Path) -> None:
    model, notes = load(tiny_model)
    assert model.packed and not model.padding_changes_logits
    assert not any("padded" in note for note in notes)


def test_the_padding_check_changes_no_state(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    config = AutoConfig.for_model("mpnet", **SIZES)
    model = AutoModelForSequenceClassification.from_config(config).train()
    assert not torch.equal(torch.get_rng_state(), state)  # the weights
    state = torch.get_rng_state()
    assert Classifier(model).training and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    "kind", ["mpnet", "roformer", "fnet"]
)  # not Funnel, which pools tokens, nor XLNet, which lays them out (L, N)
def test_dropout_of_a_text_does_not_depend_on_the_other_texts(kind: str, tmp_path: Path) -> None:
    model, _ = other(kind, tmp_path, dropout=0.3)
    model.train()
    seed_dropout(1, 2, 0)
    batched = model(batch_by_hand(False))
    for rows in ([1], [3, 2], [4, 0, 1]):
        torch.testing.assert_close(
            model(batch_by_hand(False, rows)), batched[rows], rtol=0, atol=1e-12
        )
    seed_dropout(1, 3, 0)
    assert (model(batch_by_hand(False)) - batched).abs().max() > 0.01


@pytest.mark.parametrize("kind", OTHERS)
def test_dropout_takes_effect_in_other_architectures(kind: str, tmp_path: Path) -> None:
    model, _ = other(kind, tmp_path, dropout=0.25)
    assert {module.p for module in model.modules() if isinstance(module, Dropout)} == {0.25}


def test_gradient_checkpointing_that_cannot_take_effect_is_an_error(tmp_path: Path) -> None:
    other("roformer", tmp_path / "roformer", gradient_checkpointing=True)
    with pytest.raises(
        ConfigError,
        match=r"^--gradient_checkpointing cannot take effect: transformers does not support it for mpnet\.$",
    ):
        other("mpnet", tmp_path / "mpnet", gradient_checkpointing=True)


def test_a_model_that_cannot_classify_texts_is_a_one_line_error(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "t5",
        vocab_size=60,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=None,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"^A model of type 't5' does not classify plain texts: \S[^\n]*$"
    ):
        load(tmp_path)


def test_texts_that_a_model_refuses_are_a_one_line_error(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1}
    config = AutoConfig.for_model("t5", **sizes, num_heads=2, decoder_start_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    end = config.eos_token_id  # T5 reads its answer there
    for ids, accepted in ([5, 6, end], True), ([5, 6, 7], False):
        batch = collate([Example(0, ids, [0] * len(ids), 0, 1.0)])
        if accepted:
            assert model(batch).isfinite().all()
            continue
        with pytest.raises(
            ModelError, match=r"^A model of type 't5' does not classify these texts: .*<eos>[^\n]*$"
        ):
            model(batch)


# ---- Settings


def test_dropout_takes_effect_everywhere(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(tiny_model, dropout=0.25)
    assert {module.p for module in model.modules() if isinstance(module, Dropout)} == {0.25}
    assert len([module for module in model.modules() if isinstance(module, Dropout)]) >= 6
    assert not [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert model.model.config.attention_probs_dropout_prob == 0.25
    asked: list[float] = []
    real = attention.bucketed_attention
    monkeypatch.setattr(
        attention, "bucketed_attention", lambda *args: asked.append(args[6]) or real(*args)
    )
    batch, found = packed(tokenizer, None), []
    for step in (0, 0, 1):
        seed_dropout(0, step, 0)
        found.append(model.train()(batch))
    assert torch.equal(found[0], found[1])  # a function of seed, step and row
    assert not torch.equal(found[0], found[2])
    assert asked == [0.25] * 6
    assert torch.equal(model.eval()(batch), model(batch))
    assert asked[6:] == [0.0] * 4


def test_dropout_zero_is_the_model_without_dropout(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, _ = load(tiny_model, dropout=0.0)
    batch = packed(tokenizer, None)
    assert torch.equal(model.train()(batch), model.eval()(batch))
    own, _ = load(tiny_model)
    assert {module.p for module in own.modules() if isinstance(module, Dropout)} == {
        0.1
    }  # None keeps the model's own


def test_dropout_that_cannot_take_effect_is_an_error(tiny_model: Path) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_model), dropout=0.1)
    settings = load_model_config(config)
    for name in [name for name in vars(settings) if "dropout" in name]:
        delattr(settings, name)
    with pytest.raises(
        ConfigError, match=r"^--dropout cannot take effect: the config of bert names no dropout\.$"
    ):
        load_classifier(config, TASK, settings)


def test_weights_are_float32_whatever_the_checkpoint_holds(
    tiny_model: Path, tmp_path: Path
) -> None:
    AutoModelForSequenceClassification.from_pretrained(
        tiny_model, dtype=torch.bfloat16
    ).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        torch.bfloat16
    }
    model, _ = load(tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_new_head_is_drawn_from_the_seed(tiny_model: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        config = ModelConfig(model_name_or_path=str(tiny_model))
        torch.manual_seed(seed)
        heads.append(load_classifier(config, TASK)[0].model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_example_of_load_classifier_runs(tiny_model: Path) -> None:
    """The lines of its docstring, with a folder in place of the Hub's name."""
    lines = (load_classifier.__doc__ or "").splitlines()
    code = "\n".join(line[8:] for line in lines if line.startswith(" " * 8))
    assert code.count("\n") == 7 and "google-bert/bert-base-uncased" in code
    names = dict(globals())
    exec(code.replace("google-bert/bert-base-uncased", str(tiny_model)), names)
    assert names["logits"].shape == (2, 2)
    names["loss"].backward()
    assert all(weight.grad is not None for weight in names["classifier"].parameters())


# ---- Save and load


@pytest.fixture
def exported(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> tuple[Classifier, Path]:
    model, _ = load(tiny_model)
    save_classifier(model, tokenizer, tmp_path / "best", {"max_length": 64})
    return model, tmp_path / "best"


def test_a_saved_folder_is_loaded_by_hugging_face(
    exported: tuple[Classifier, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    model, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fine", "2": "good"}
    assert config["label2id"] == {"bad": 0, "fine": 1, "good": 2}
    assert (config["problem_type"], config["bertdist"]) == (
        "single_label_classification",
        {"max_length": 64},
    )
    assert attention.NAME not in (folder / "config.json").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert plain.config._attn_implementation == "sdpa"
    torch.testing.assert_close(
        plain(**padded(tokenizer, None)).logits, model(packed(tokenizer, None)), rtol=0, atol=1e-5
    )
    assert not [
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pkl", ".pt", ".py")
    ]


TASKS: list[Task] = [TASK, MultiLabel(("dull", "fun")), Regression(("stars",))]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.problem_type)
def test_the_hugging_face_pipeline_gives_the_same_predictions(
    task: Task, tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, _ = load(tiny_model, task)
    save_classifier(model, tokenizer, tmp_path, {})
    answers = list(task.to_records(model(packed(tokenizer, None)).detach()))
    found = pipeline("text-classification", model=str(tmp_path), device="cpu")(TEXTS, top_k=None)
    for answer, entries in zip(answers, found, strict=True):
        wanted = {entry["label"]: entry["score"] for entry in answer.get("labels", [answer])}
        above = {
            entry["label"]: entry["score"]
            for entry in entries
            if task.problem_type != TASKS[1].problem_type or entry["score"] > 0.5
        }
        best = (
            above
            if task.problem_type != TASK.problem_type
            else dict([max(above.items(), key=lambda entry: entry[1])])
        )
        assert best == pytest.approx(wanted, abs=1e-6)
    assert {entry["label"] for entries in found for entry in entries} == set(task.labels)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.problem_type)
def test_a_trained_classifier_is_loaded_with_its_task(
    task: Task, tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, _ = load(tiny_model, task)
    save_classifier(model, tokenizer, tmp_path, {"max_length": 64, "text_column": "grün"})
    again, its_task, notes = load_trained_classifier(str(tmp_path))
    assert (its_task, notes) == (task, {"max_length": 64, "text_column": "grün"})
    weights = model.model.state_dict()
    assert all(
        torch.equal(weight, weights[name]) for name, weight in again.model.state_dict().items()
    )
    # not equal to the bit: where a weight lies in memory decides the order in which a product of one column is summed (torch 2.13)
    torch.testing.assert_close(
        again.eval()(packed(tokenizer, None)), model(packed(tokenizer, None)), rtol=0, atol=1e-6
    )


def test_a_base_model_is_no_trained_classifier(tiny_model: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_trained_classifier(str(tiny_model))
    new = "New weights, to be trained: classifier.bias, classifier.weight."
    assert str(caught.value) == f"--model {tiny_model} is not a trained classifier. {new}"


def test_a_head_of_another_size_names_both_shapes(
    exported: tuple[Classifier, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(number): f"label {number}" for number in range(7)}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    problem = (
        r"the output layer is not that of config.json, which has 7 labels \(id2label\): "
        r"classifier.bias has the shape \(\d,\) in the file, \(7,\) in this model.$"
    )
    with pytest.raises(ModelError, match=problem):
        load_trained_classifier(str(folder))


def test_another_number_of_labels_gets_a_new_head(
    exported: tuple[Classifier, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    old, folder = exported
    model, notes = load(folder, SingleLabel(("no", "yes")))
    assert notes == [
        "New weights, to be trained: classifier.bias, classifier.weight. classifier.bias has the "
        "shape (3,) in the file, (2,) in this model."
    ]
    assert model(packed(tokenizer, None)).shape == (6, 2)
    assert model.model.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(model.model.bert.pooler.dense.weight, old.model.bert.pooler.dense.weight)
    same, notes = load_classifier(
        ModelConfig(model_name_or_path=str(folder)),
        TASK,
    )
    assert notes == []  # the control: as many labels keep the trained head
    assert torch.equal(same.model.classifier.weight, old.model.classifier.weight)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({0: "bad", 1: "good"}, ("bad", "good")),
        ({1: "good", 0: "bad"}, ("bad", "good")),
        ({0: "LABEL_0", 1: "LABEL_1"}, None),
        ({i: f"l{i}" for i in range(11)}, tuple(f"l{i}" for i in range(11))),
    ],
)
def test_the_labels_of_a_model_are_its_names_in_order(
    names: dict[int, str], found: tuple[str, ...] | None, tmp_path: Path
) -> None:
    config = AutoConfig.for_model("bert", id2label=names)
    assert pretrained_labels(config) == found
    config.save_pretrained(tmp_path)
    assert (
        pretrained_labels(load_model_config(ModelConfig(model_name_or_path=str(tmp_path)))) == found
    )


# ---- What cannot be loaded


def complaint(folder: Path | str) -> str:
    config = ModelConfig(model_name_or_path=str(folder))
    with pytest.raises(BertdistError) as caught:
        load_classifier(config, TASK)
    assert isinstance(caught.value, ModelError)
    message = str(caught.value)
    assert message.startswith(f"--model_name_or_path {folder}")
    assert "\n" not in message
    return message


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_a_missing_folder_is_a_one_line_error_with_a_suggestion(copy: Path) -> None:
    wrong = copy.with_name("copi")
    assert (
        complaint(wrong)
        == f"--model_name_or_path {wrong}: there is no such folder. Did you mean '{copy}'?"
    )


@pytest.mark.parametrize("problem", ["refused", ""])
def test_a_hub_that_is_not_reachable_is_not_asked_again(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loaders would ask for half a minute, with a line each time."""
    asked: list[bool] = []

    def load(name: str, **options: Any) -> None:
        asked.append(options["local_files_only"])
        raise OSError("not in the cache")

    monkeypatch.setattr(hub, "probe_hub", lambda name: None)
    monkeypatch.setattr(hub, "_problems", {hub.constants.ENDPOINT: problem})
    monkeypatch.setattr(AutoConfig, "from_pretrained", load)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(classifier_module, "find_adapter_config_file", load)
    for read in (load_model_config, load_tokenizer):
        with pytest.raises(ModelError):
            read(ModelConfig(model_name_or_path="owner/name"))
    assert asked == [bool(problem)] * 3


def test_an_unknown_hub_name_is_a_one_line_error() -> None:
    message = complaint("no-such-owner/model")
    assert "neither a folder here nor a model on the Hub" in message
    assert (
        "Offline, give a folder that holds config.json, model.safetensors and the tokenizer;"
        in message
    )


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"model_type": "no such type"}'])
def test_a_folder_without_a_config_is_a_one_line_error(text: str | None, copy: Path) -> None:
    (copy / "config.json").unlink() if text is None else (copy / "config.json").write_text(text)
    assert "the folder holds no config.json that can be read" in complaint(copy)


def test_a_vision_model_is_a_one_line_error(copy: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(copy)
    complaint(copy)


def test_a_folder_without_weights_is_a_one_line_error(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    complaint(copy)


@pytest.mark.parametrize("beside", [False, True])
def test_a_pickle_is_never_loaded(
    beside: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was to be read")

    monkeypatch.setattr(torch, "load", refuse)
    if beside:
        load(copy)  # the safetensors are taken
    else:
        (copy / "model.safetensors").unlink()
        complaint(copy)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights_are_a_one_line_error(size: int, copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:size])
    complaint(copy)


def test_weights_of_another_shape_are_a_one_line_error(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    message = complaint(copy)
    assert message.endswith(
        "6 weights of the model do not have the shape that config.json says, the first is bert.encoder.layer.0.intermediate.dense.bias."
    )


def test_missing_weights_are_a_one_line_error(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    lost = [name for name in weights if "layer.1.attention" in name]
    save_file(
        {name: weight for name, weight in weights.items() if name not in lost},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    message = complaint(copy)
    assert message.endswith(
        f"{len(lost)} weights of the model are missing, the first is bert.{min(lost)}."
    )


def test_a_missing_pooler_is_a_new_weight(copy: Path) -> None:
    # Masked language models are published without one.
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if "pooler" not in name},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    _, notes = load(copy)
    assert notes == [
        "New weights, to be trained: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight."
    ]


def test_weights_that_only_other_programs_read_have_a_remedy(tmp_path: Path) -> None:
    BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    config, task = ModelConfig(model_name_or_path=str(tmp_path)), SingleLabel(("a", "b"))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        ModelError, match=r"pytorch_model\.bin is a pickle, which is not read: load"
    ):
        load_classifier(config, task)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        ModelError, match="is a Git LFS pointer, not the weights: run `git lfs pull`"
    ):
        load_classifier(config, task)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ModelError, match=r"holds an adapter .*: merge it into its base"):
        load_classifier(config, task)
