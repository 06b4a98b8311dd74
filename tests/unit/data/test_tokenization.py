"""Texts -> ids: what the tokenizer says of the whole text, however long it is and in whatever company; labels -> targets."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bertdist.core.config import DataConfig, ModelConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError, ModelError
from bertdist.data import tokenization
from bertdist.data.in_memory import records_from_texts
from bertdist.data.load_data import load_records
from bertdist.data.records import Record, Records
from bertdist.data.tokenization import LONG_TEXT, Example, create_dataset, encode, load_tokenizer
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task

EACH_TIME = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # what is patched stays


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def byte_level() -> PreTrainedTokenizerBase:
    """A tokenizer of RoBERTa's kind: blanks are part of the tokens, and runs of them have tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ġ", "Ġ"),
        ("ĠĠ", "ĠĠ"),
        ("ĠĠĠĠ", "ĠĠĠĠ"),
        ("Ġ" * 8, "Ġ" * 8),
        ("g", "o"),
        ("o", "d"),
        ("go", "od"),
        ("Ġ", "good"),
        ("Ġ", "a"),
    ]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def unigram() -> PreTrainedTokenizerBase:
    """A tokenizer of XLM-R's and ALBERT's kind: SentencePiece pieces of words that begin with ▁."""
    pieces = [
        ("<s>", 0.0),
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        *((piece, -4.0) for piece in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    pieces += [("▁good", -2.0), ("▁go", -3.0), ("od", -3.0), ("▁▁", -3.5)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=3))
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=512, model_input_names=["input_ids"], **special
    )


@pytest.fixture(scope="module")
def kinds(tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    return {"wordpiece": tokenizer, "byte level": byte_level(), "unigram": unigram()}


def record(text: str, pair: str | None = None) -> Record:
    return Record(0, text, pair, None)


def whole(
    text: str, pair: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int]]:
    """What the tokenizer says of the whole text, alone."""
    # A list of one: given bare, transformers 5.23 takes an empty second text for none.
    found = tokenizer(
        [text], None if pair is None else [pair], truncation=True, max_length=max_length
    )
    (ids,) = found["input_ids"]
    (segments,) = found.get("token_type_ids", [[0] * len(ids)])
    return ids, segments


def ids_of(words: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found: list[int] = tokenizer.convert_tokens_to_ids(words.split())
    return found


# ---- Short texts


@pytest.mark.parametrize(
    ("text", "pair", "max_length", "pieces", "segments"),
    [
        ("Good movie!", None, 128, "[CLS] good movie ! [SEP]", [0] * 5),
        ("", None, 128, "[CLS] [SEP]", [0] * 2),
        ("good movie so fun", None, 5, "[CLS] good movie so [SEP]", [0] * 5),
        ("good", "not bad", 128, "[CLS] good [SEP] not bad [SEP]", [0, 0, 0, 1, 1, 1]),
        (
            "good good good good",
            "bad bad",
            7,
            "[CLS] good good [SEP] bad bad [SEP]",
            [0, 0, 0, 0, 1, 1, 1],
        ),  # the longer text gives way
        ("good", "bad bad bad bad", 6, "[CLS] good [SEP] bad bad [SEP]", [0, 0, 0, 1, 1, 1]),
        ("goods dogs", None, 128, "[CLS] good ##s d ##o ##g ##s [SEP]", [0] * 8),
        ("世", None, 128, "[CLS] [UNK] [SEP]", [0] * 3),
    ],
)
def test_ids_by_hand(
    text: str,
    pair: str | None,
    max_length: int,
    pieces: str,
    segments: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert encode([record(text, pair)], tokenizer, max_length) == [
        (ids_of(pieces, tokenizer), segments)
    ]


@EACH_TIME
@given(
    rows=st.lists(
        st.tuples(st.text("agod .\t\n世é", max_size=30), st.text("agod ", max_size=30)),
        min_size=1,
        max_size=5,
    ),
    size=st.integers(3, 20),
)
def test_a_text_has_the_ids_it_has_alone(
    rows: list[tuple[str, str]], size: int, kinds: dict[str, PreTrainedTokenizerBase]
) -> None:
    for each in kinds.values():
        assert encode([record(text) for text, _ in rows], each, size) == [
            whole(text, None, each, size) for text, _ in rows
        ]
        if size >= 5:  # a pair has up to four special tokens
            assert encode([record(*row) for row in rows], each, size) == [
                whole(*row, each, size) for row in rows
            ]


def test_a_family_without_segments_has_zeros(kinds: dict[str, PreTrainedTokenizerBase]) -> None:
    ((ids, segments),) = encode([record("good", "a")], kinds["byte level"], 16)
    assert "token_type_ids" not in kinds["byte level"]("good", "a")
    assert segments == [0] * len(ids)


def test_nothing_is_padded(tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = encode([record("good"), record("good " * 200)], tokenizer, 128)
    assert (len(short[0]), len(long[0])) == (3, 128)
    assert tokenizer.pad_token_id not in short[0] + long[0]


# ---- Long texts are cut before they are tokenized, and it is not to be seen

LONG = {  # longer than 2,000 characters
    "words": "good movie " * 300,
    "one word": "a" * 2500,
    "one blank early": "a " + "b" * 2500,
    "one blank late": "b" * 2500 + " a",
    "words of 500": ("b" * 500 + " ") * 6,
    "words of 101, each unknown": ("b" * 101 + " ") * 50,
    "words around the end of the first cut": "a " * 990 + "goodgood " * 300,
    "tabs": "good\tmovie\t" * 300,
    "lines": "good\nmovie\n" * 300,
    "carriage returns": "good\r\nmovie\r\n" * 300,
    "one blank, then tabs": "good " + "good\tmovie\t" * 300,
    "wide blanks": "good\u3000movie\u00a0" * 300,
    "blanks only": " " * 2500,
    "blanks, then words": " " * 2500 + "good movie " * 10,
    "words, then blanks": "good movie " * 10 + " " * 2500,
    "words far apart": ("good" + " " * 99) * 30,
    "runs of blanks": "".join("good" + " " * (i % 40) for i in range(150)),
    "tabs and blanks": "good \t \t movie\n \n" * 200,
    "no blanks, Chinese": "今天天气很好我们去看电影" * 300,
    "few blanks, Chinese": ("今天天气很好我们去看电影" * 60 + " ") * 4,
    "controls, which vanish": "\x00\x01" * 1500 + "good movie",
    "accents, which vanish": "e\u0301" * 900 + " good" * 300,
    "blank before an accent": "good \u0301" * 500,
    "punctuation": "!?," * 1000,
    "special words": "good [SEP] [MASK] <mask> </s> " * 100,
    "special word at the end of a cut": "good " * 399 + "[MASK]" + " good" * 200,
    "blanks before a special word": "good" + " " * 3000 + "<mask> good",
    "emoji": "😀 " * 1500,
    "joined emoji": "👨‍👩‍👧" * 500 + " good" * 200,
    "apostrophes": "good's a 's " * 300,
    "exactly as long as is not cut": "a " * 1000,
    "one longer": "a " * 1000 + "a",
}


@pytest.mark.parametrize("kind", ["wordpiece", "byte level", "unigram"])
@pytest.mark.parametrize("name", LONG)
def test_a_long_text_has_the_ids_of_the_whole_text(
    name: str, kind: str, kinds: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "LONG_TEXT", 2000)
    each, text = kinds[kind], LONG[name]
    assert len(text) >= 2000
    for max_length in (3, 20, 128, 512):
        assert encode([record("good"), record(text)], each, max_length)[1] == whole(
            text, None, each, max_length
        )


@pytest.mark.parametrize(
    "text", ["good movie " * 2200, "movie" * 5000, "good\t" * 4500 + "so " * 300]
)
def test_a_text_above_the_real_limit_has_the_ids_of_the_whole_text(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(text) > LONG_TEXT
    for max_length in (3, 128, 512):
        assert encode([record(text)], tokenizer, max_length) == [
            whole(text, None, tokenizer, max_length)
        ]


PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "   ",
        " " * 9,
        " " * 18,
        "\t",
        "\n",
        "a",
        "good",
        "世",
        "é",
        "e\u0301",
        ".",
        "'s",
        "\u00a0",
        "[MASK]",
        "<mask>",
        "\x00",
    ]
)


@pytest.mark.parametrize("kind", ["wordpiece", "byte level", "unigram"])
@EACH_TIME
@given(pieces=st.lists(PIECES, max_size=60), max_length=st.integers(3, 12))
@example(
    pieces=["good", " " * 18, " " * 18, "a"], max_length=4
)  # the cut falls into a run of blanks
@example(pieces=["good", " " * 18, " " * 18, "<mask>"], max_length=4)
def test_a_cut_anywhere_is_not_to_be_seen(
    pieces: list[str],
    max_length: int,
    kind: str,
    kinds: dict[str, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        tokenization, "LONG_TEXT", 10
    )  # the first cut falls after ten characters, the next after twenty, ...
    text = "".join(pieces)
    assert encode([record(text)], kinds[kind], max_length) == [
        whole(text, None, kinds[kind], max_length)
    ]


@pytest.mark.parametrize("kind", ["wordpiece", "byte level", "unigram"])
def test_a_careless_cut_would_be_seen(
    kind: str, kinds: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The control of the tests above: cut in the middle of a word; cut before there are enough words.
    for careless, text in (
        (lambda text, *rest: text[:25], "good good good good good good"),
        (lambda text, *rest: text[:9], "good good good"),
    ):
        monkeypatch.setattr(tokenization, "LONG_TEXT", 10)
        monkeypatch.setattr(tokenization, "_cut", careless)
        assert encode([record(text)], kinds[kind], 64) != [whole(text, None, kinds[kind], 64)]


def test_a_tokenizer_that_keeps_the_end_of_a_text_gets_its_end(tiny_model: Path) -> None:
    left = AutoTokenizer.from_pretrained(tiny_model, truncation_side="left")
    text = "good " * 5000 + "very bad movie"
    expected = ids_of("[CLS] very bad movie [SEP]", left)
    assert whole(text, None, left, 5)[0] == expected
    assert encode([record(text)], left, 5)[0][0] == expected


def test_real_texts_are_cut_without_a_trace(
    shared_data: Path, kinds: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "LONG_TEXT", 200)
    texts = [
        (shared_data / name / "dev.tsv").read_text(encoding="utf-8")[:20_000]
        for name in ("sst2", "chnsenticorp")
    ]
    for each in kinds.values():
        for text in texts:
            for max_length in (16, 300):
                assert encode([record(text)], each, max_length) == [
                    whole(text, None, each, max_length)
                ]


def test_a_long_text_costs_what_its_head_costs(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def read(texts: Any, *rest: Any, **settings: Any) -> Any:
        seen.append(sum(map(len, [texts] if isinstance(texts, str) else texts)))
        return tokenizer(texts, *rest, **settings)

    read.truncation_side = tokenizer.truncation_side  # type: ignore[attr-defined]
    ((ids, _),) = encode([record("good movie " * 30_000)], read, 128)  # type: ignore[arg-type]  # a tokenizer, to encode
    assert (len(ids), sum(seen) <= 2 * LONG_TEXT) == (128, True)
    seen.clear()
    monkeypatch.setattr(tokenization, "LONG_TEXT", 10**9)
    encode([record("good movie " * 30_000)], read, 128)  # type: ignore[arg-type]
    assert sum(seen) == 330_000  # the control


# ---- Examples


def labelled(values: list[Any], codes: Sequence[int]) -> Records:
    """Rows 'good a', 'good aa', ... with labels."""
    plain = records_from_texts([f"good {'a' * i}" for i in range(1, len(codes) + 1)])
    return dataclasses.replace(
        plain, label_kind="text", label_values=values, label_indices=np.array(codes, dtype=np.int32)
    )


@pytest.mark.parametrize(
    ("task", "values", "codes", "targets", "kind"),
    [
        (SingleLabel(("neg", "pos")), ["pos", "neg"], [0, 1, 0], [1, 0, 1], np.int64),
        (Regression(("score",)), ["0.5", 2], [0, 1, 1], [0.5, 2.0, 2.0], np.float32),
        (Regression(("score",)), ["1", "2"], [0, 1, 1], [1.0, 2.0, 2.0], np.float32),
        (
            MultiLabel(("a", "b")),
            [("b",), (), ("b", "a")],
            [0, 1, 2],
            [[0, 1], [0, 0], [1, 1]],
            np.float32,
        ),
    ],
)
def test_labels_become_targets(
    task: Task,
    values: list[Any],
    codes: list[int],
    targets: list[Any],
    kind: type,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = create_dataset(labelled(values, codes), tokenizer, task, 16)
    assert examples.targets.dtype == kind
    assert examples.targets.tolist() == targets
    assert (len(examples), examples.weights.tolist(), examples.weights.dtype) == (
        3,
        [1.0] * 3,
        np.float32,
    )


def test_examples_are_made_of_the_rows_asked_for_in_their_order(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = SingleLabel(("neg", "pos"), class_weights=(0.5, 2.0))
    examples = create_dataset(labelled(["pos", "neg"], [0, 1, 0]), tokenizer, task, 16)
    ids = [ids_of(f"[CLS] good a{' ##a' * i} [SEP]", tokenizer) for i in range(3)]
    expected = [
        Example(2, ids[2], [0] * 6, 1, 2.0),
        Example(0, ids[0], [0] * 4, 1, 2.0),
        Example(2, ids[2], [0] * 6, 1, 2.0),
    ]
    assert examples[[2, 0, 2]] == expected
    assert examples[np.array([2, 0, 2])] == expected  # type: ignore[index]
    assert examples[[1]][0].weight == 0.5


def test_rows_without_labels_are_examples_too(tokenizer: PreTrainedTokenizerBase) -> None:
    for task, records in (
        (None, labelled(["x"], [0, 0])),
        (SingleLabel(("a", "b")), records_from_texts(["good", "bad"])),
    ):
        examples = create_dataset(records, tokenizer, task, 16)
        assert (examples.targets.tolist(), examples.weights.tolist()) == ([0, 0], [1.0, 1.0])


@pytest.fixture
def dev(tmp_path: Path) -> Callable[[str], Records]:
    """The text of dev.tsv -> its Records."""

    def write(text: str) -> Records:
        (tmp_path / "dev.tsv").write_text(text, encoding="utf-8")
        found = load_records(
            DataConfig(train_file=["unused"], validation_file=str(tmp_path / "dev.tsv")),
            "validation",
        )
        assert found is not None
        return found

    return write


def test_an_unknown_label_names_file_and_line(
    dev: Callable[[str], Records], tokenizer: PreTrainedTokenizerBase
) -> None:
    task = SingleLabel(("negative", "positive"))
    records = dev("text\tlabel\ngood\tpositive\nbad\tnegativ\nbad\tpositiv\nbad\tnegativ\n")
    with pytest.raises(DataError) as caught:
        create_dataset(records, tokenizer, task, 16)
    assert (
        str(caught.value)
        == "dev.tsv line 3: unknown label 'negativ'; expected one of the training labels. Did you mean 'negative'?"
    )
    create_dataset(dev("text\tlabel\ngood\tpositive\nbad\tnegative\n"), tokenizer, task, 16)


def test_a_number_that_is_none_names_file_and_line(
    dev: Callable[[str], Records], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError) as caught:
        create_dataset(
            dev("text\tlabel\ngood\t1.5\nbad\thigh\n"), tokenizer, Regression(("label",)), 16
        )
    assert str(caught.value) == "dev.tsv line 3: expected a number, found 'high'."


# ---- load_tokenizer


def test_a_tokenizer_is_the_models_own_or_the_one_named(tiny_model: Path, tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path / "other")
    (tmp_path / "model").mkdir()  # without a tokenizer
    assert load_tokenizer(ModelConfig(model_name_or_path=str(tiny_model))).cls_token == "[CLS]"
    named = load_tokenizer(
        ModelConfig(
            model_name_or_path=str(tmp_path / "model"), tokenizer_name=str(tmp_path / "other")
        )
    )
    assert named.mask_token == "<mask>"


def test_more_tokens_than_the_tokenizer_can_are_an_error(tiny_model: Path) -> None:
    load_tokenizer(ModelConfig(model_name_or_path=str(tiny_model), max_length=512))
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(ModelConfig(model_name_or_path=str(tiny_model), max_length=513))
    assert (
        str(caught.value)
        == f"--max_length is 513; the tokenizer of {tiny_model} supports at most 512 tokens."
    )


BROKEN: dict[str, dict[str, str]] = {
    "empty": {},
    "no tokenizer": {"config.json": '{"model_type": "bert"}'},
    "torn": {"config.json": '{"model_type": "bert"}', "tokenizer.json": '{"version": "1.0", "mod'},
    "empty file": {"config.json": '{"model_type": "bert"}', "tokenizer.json": ""},
    "other json": {"config.json": '{"model_type": "bert"}', "tokenizer.json": "{}"},
    "torn settings": {"config.json": '{"model_type": "bert"}', "tokenizer_config.json": '{"a": '},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_without_a_tokenizer_is_one_line(name: str, tmp_path: Path) -> None:
    for file, text in BROKEN[name].items():
        (tmp_path / file).write_text(text)
    with pytest.raises(BertdistError) as caught:
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    assert isinstance(caught.value, ModelError)
    assert (
        str(caught.value)
        == f"{tmp_path} has no tokenizer that can be read; expected tokenizer.json or vocab.txt."
    )


@pytest.mark.parametrize("unknown", ["<unk>", "[UNK]"])
def test_a_vocabulary_without_the_unknown_token_is_one_line(unknown: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    words = ["[PAD]", unknown, "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = ModelConfig(model_name_or_path=str(tmp_path), max_length=16)
    if unknown == "[UNK]":
        assert load_tokenizer(config)("a bad film").input_ids == [2, 5, 1, 7, 3]
        return
    with pytest.raises(ModelError) as caught:
        load_tokenizer(config)
    assert str(caught.value).startswith(f"The tokenizer of {tmp_path} fails on a character that")
    assert "Missing [UNK] token" in str(caught.value) and "unk_token" in str(caught.value)


def test_a_name_that_is_no_folder_is_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(model_name_or_path="no-such/model"))
    assert str(caught.value).startswith(
        "No tokenizer 'no-such/model', neither a folder here nor on the Hub. HF_HUB_OFFLINE is set, "
    )
    assert "\n" not in str(caught.value)


def test_a_text_without_tokens_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that adds no special tokens gives an empty text no ids; the model needs one."""
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
        pad_token="?",
    )
    rows = create_dataset(records_from_texts(["a", ""]), bare, None, 8)
    assert rows[[0]][0].ids == [0]
    with pytest.raises(DataError, match=r"row 1.*has no tokens.*--tokenizer_name"):
        rows[[0, 1]]
