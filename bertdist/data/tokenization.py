"""Records -> token ids and targets. `TokenizedDataset` tokenizes rows when they are accessed.

All truncation happens here. One tokenizer call per list of rows: 32 sentences of SST-2 cost about
1.5 ms.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bertdist.core.config import ModelConfig
from bertdist.core.errors import ConfigError, DataError, ModelError
from bertdist.core.terminal import excerpt
from bertdist.core.types import Array
from bertdist.data.records import Record, Records
from bertdist.tasks.tasks import Task

# Characters; longer texts are cut before they are tokenized.
LONG_TEXT = 20_000

# `truncation_notes` tokenizes at most so many rows and bytes of a split.
COUNTED_ROWS, COUNTED_BYTES = 1_000, 1 << 19
TRUNCATED_SHARE = 0.01  # of the rows; up to it nothing is said

# In tokenizer_config.json of a saved model: the limit of the pretrained tokenizer.
PRETRAINED_MAX_LENGTH = "pretrained_max_length"


class Example(NamedTuple):
    """One row, ready for the model."""

    row: int
    ids: list[int]
    token_type_ids: list[int]  # 0 for the first text, 1 for the second
    target: Any  # int, (outputs,) float32, or float; 0 without labels
    weight: float  # of the row's loss


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """The rows of a split, tokenized when they are accessed. Safe to use in forked workers."""

    records: Records
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    targets: Array  # (rows,) or (rows, outputs)
    weights: Array  # (rows,) float32
    vocab_size: int | None = None  # of a trained model whose tokenizer has more ids; None: no check

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, rows: Sequence[int]) -> list[Example]:
        records = [self.records[int(row)] for row in rows]
        encoded = encode(records, self.tokenizer, self.max_length)
        for row, (ids, _) in zip(rows, encoded, strict=True):
            if not ids:
                raise DataError(
                    f"{self.records.location(int(row))}: the text has no tokens, as the tokenizer "
                    "adds no special tokens; use a tokenizer that does (--tokenizer_name), or "
                    "leave such rows out."
                )
        if self.vocab_size is not None:
            self._check_ids(rows, encoded, self.vocab_size)
        first, targets, weights = self.records.first_row, self.targets, self.weights
        return [
            Example(first + int(row), ids, token_type_ids, targets[row], float(weights[row]))
            for row, (ids, token_type_ids) in zip(rows, encoded, strict=True)
        ]

    @cached_property
    def token_counts(self) -> tuple[Array, Array]:
        """(rows,) int32 tokens of each row after truncation, and (rows,) bool: truncated.

        Counted once, at first use.
        """
        counts = np.concatenate([np.zeros(0, np.int64), *self._count_tokens()])
        return np.minimum(counts, self.max_length).astype(np.int32), counts > self.max_length

    def _count_tokens(self) -> Iterator[Array]:
        for start in range(0, len(self), COUNTED_ROWS):
            rows = [self.records[row] for row in range(start, min(start + COUNTED_ROWS, len(self)))]
            counts = np.array(_count_tokens(rows, self.tokenizer))
            for i in np.flatnonzero(counts <= self.max_length):  # a text without blanks may be cut
                if max(len(rows[i].text), len(rows[i].pair or "")) > LONG_TEXT:
                    (counts[i],) = _count_tokens([rows[i]], self.tokenizer, None)
            yield counts

    def _check_ids(
        self, rows: Sequence[int], encoded: list[tuple[list[int], list[int]]], size: int
    ) -> None:
        for row, (ids, _) in zip(rows, encoded, strict=True):
            if (largest := max(ids, default=0)) >= size:
                token = self.tokenizer.convert_ids_to_tokens(largest)
                raise DataError(
                    f"{self.records.location(int(row))}: the tokenizer gives {token!r} the id "
                    f"{largest:,}; the model was trained with {size:,} ids, without it."
                )


def create_dataset(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None,
    max_length: int,
    vocab_size: int | None = None,
) -> TokenizedDataset:
    """Checks every label of the split. task None: rows without labels, for prediction.

    Raises DataError with the location of the first row whose label is not of the task.
    """
    targets: Array = np.zeros(len(records), dtype=np.int64)
    weights: Array = np.ones(len(records), dtype=np.float32)
    if task is not None and records.label_indices is not None:
        target_of_value = []
        for value in records.label_values:
            try:
                target_of_value.append(task.encode_label(value))
            except DataError as error:
                raise DataError(f"{records.locate_label(value)}: {error}") from None
        table = np.array(target_of_value)
        table = table.astype(np.int64 if table.dtype.kind == "i" else np.float32)
        targets = table[records.label_indices]
        weights = task.row_weights(targets)
    return TokenizedDataset(
        records=records,
        tokenizer=tokenizer,
        max_length=max_length,
        targets=targets,
        weights=weights,
        vocab_size=vocab_size,
    )


def encode(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """(ids, token_type_ids) of each record, at most max_length ids, special tokens included.

    Of a pair the longer text is truncated first. A single text of more than LONG_TEXT characters
    is cut before it is tokenized, where that cannot change the ids (`_cut`).
    """
    pairs = None if records[0].pair is None else [record.pair for record in records]
    texts = [record.text for record in records]
    if pairs is None and tokenizer.truncation_side == "right":
        texts = [
            text if len(text) <= LONG_TEXT else _cut(text, tokenizer, max_length) for text in texts
        ]
    encoded = tokenizer(
        texts,
        pairs,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )
    ids = encoded["input_ids"]
    token_type_ids = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
    return list(zip(ids, token_type_ids, strict=True))


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """The shortest of text[:20k], text[:40k], ... that still has max_length tokens or more.

    It ends before a blank: no supported tokenizer merges a word with the blank after it, so the
    text after that cannot change those ids. 1,000,000 characters: 1.6 s without the cut, 3 ms with.
    """
    size = LONG_TEXT
    while size < len(text):
        words = text[: max(text.rfind(" ", 0, size), 0)].rstrip()
        encoded = tokenizer(words, add_special_tokens=False, truncation=True, max_length=max_length)
        if len(encoded["input_ids"]) >= max_length:
            return words
        size *= 2
    return text


def truncation_notes(
    splits: Mapping[str, Records], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[str]:
    """One line per split of which more than 1% of the rows are truncated to max_length.

    A row with fewer bytes than max_length has fewer tokens, so mostly nothing is tokenized. Of
    many longer rows a random sample is, always the same, and the line says "about".
    """
    notes = []
    for name, records in splits.items():
        num_bytes = records.lengths()
        special = tokenizer.num_special_tokens_to_add(records.pairs is not None)
        # 2: SentencePiece begins each text with a token of its own
        long = np.flatnonzero(num_bytes + special + 2 > max_length)
        if len(long) <= TRUNCATED_SHARE * len(records):
            continue
        every = max(len(long) / COUNTED_ROWS, num_bytes[long].sum() / COUNTED_BYTES, 1)
        size = max(1, int(len(long) / every))
        some = np.random.default_rng(0).choice(long, size, replace=False)
        longest = int(num_bytes.argmax())
        # If none of the first is truncated, the share is lower, but for one case in a million.
        first = some[: math.ceil(14 * len(long) / len(records) / TRUNCATED_SHARE)]
        for rows in (first, some):
            lengths = _count_tokens([records[int(row)] for row in (*rows, longest)], tokenizer)
            truncated = sum(n > max_length for n in lengths[:-1])
            if not truncated or len(first) == len(some):
                break
        share = truncated / len(rows) * len(long) / len(records)
        if share > TRUNCATED_SHARE:
            about = "about " if every > 1 else ""
            more = "more than " if num_bytes[longest] > LONG_TEXT else ""
            notes.append(
                f"--max_length {max_length} truncates {about}{share:.1%} of the {name}; the "
                f"longest has {more}{max(lengths):,} tokens."
            )
    return notes


def _count_tokens(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    characters: int | None = LONG_TEXT,
) -> list[int]:
    """Tokens of each row, untruncated, but of so many characters at most."""
    pairs = None if records[0].pair is None else [(row.pair or "")[:characters] for row in records]
    encoded = tokenizer(
        [row.text[:characters] for row in records],
        pairs,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [len(ids) for ids in encoded["input_ids"]]


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or --tokenizer_name.

    Raises ModelError, also where --tokenizer_name has other ids than the model's own tokenizer, and
    ConfigError if --max_length is more than the tokenizer's limit.
    """
    from bertdist.core.hub import check_folder, explain_hub_error, from_cache, probe_hub

    name = config.tokenizer_name or config.model_name_or_path
    flag = "--tokenizer_name" if config.tokenizer_name else "--model_name_or_path"
    check_folder(name, f"{flag} {name}")
    probe_hub(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=config.model_revision,
            trust_remote_code=False,
            local_files_only=from_cache(),
        )
        # transformers 5.23 makes an empty one if there are no files.
        is_usable = len(tokenizer) > len(tokenizer.all_special_tokens)
    except Exception as error:  # damaged files raise a dozen kinds, some of them plain Exception
        if not Path(name).is_dir():
            reason = explain_hub_error(error, name)
            raise ModelError(
                f"No tokenizer {name!r}, neither a folder here nor on the Hub. {reason}"
            ) from None
        is_usable = False
    if not is_usable:
        raise ModelError(
            f"{name} has no tokenizer that can be read; expected tokenizer.json or vocab.txt."
        )
    try:
        tokenizer("\U0002ebe0")  # the last of its block, in hardly any vocabulary
    except Exception as error:
        raise ModelError(
            f"The tokenizer of {name} fails on a character that it does not know "
            f"({excerpt(str(error), 100)}); name its unknown token in tokenizer_config.json "
            "(unk_token)."
        ) from None
    # what `save_tokenizer` replaced
    limit = tokenizer.init_kwargs.get(PRETRAINED_MAX_LENGTH)
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    if config.max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"--max_length is {config.max_length}; the tokenizer of {name} supports at most "
            f"{tokenizer.model_max_length} tokens."
        )
    if config.tokenizer_name and config.model_name_or_path:
        _compare_with_own(tokenizer, config)
    return tokenizer


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_length: int | None,
    has_token_types: bool = True,
) -> None:
    """Save a tokenizer that truncates to max_length by itself, as `pipeline(..., truncation=True)`
    asks of it. has_token_types False: it gives no token_type_ids.
    """
    limit, names = tokenizer.model_max_length, tokenizer.model_input_names
    settings = dict(tokenizer.init_kwargs)
    if max_length is not None:
        tokenizer.init_kwargs[PRETRAINED_MAX_LENGTH] = limit
        tokenizer.model_max_length = max_length
    if not has_token_types:
        kept = [name for name in names if name != "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = kept
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.model_max_length, tokenizer.model_input_names = limit, names
        tokenizer.init_kwargs = settings


def _compare_with_own(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Raise ModelError if --tokenizer_name has other ids than the model's own tokenizer."""
    try:
        own = load_tokenizer(replace(config, tokenizer_name=None, max_length=0)).get_vocab()
    except ModelError:
        return  # the model has none
    ids = tokenizer.get_vocab()
    moved = [token for token, id in own.items() if ids.get(token, id) != id]
    if moved:
        first = min(moved, key=own.__getitem__)
        raise ModelError(
            f"--tokenizer_name {config.tokenizer_name} ({len(ids):,} tokens) is not a tokenizer of "
            f"{config.model_name_or_path} ({len(own):,} tokens): {len(moved):,} tokens that both "
            f"have differ in their ids, {first!r} is {ids[first]} and {own[first]}."
        )
