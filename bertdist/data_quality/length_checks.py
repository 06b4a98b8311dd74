"""Text lengths: a summary per split, and findings on truncated texts and unknown tokens.

Lengths are in tokens if there is a tokenizer, counted as training does, else in characters and
words. Tokenizing takes about 1 second per 1 to 2 MB of text. In a split of more than SAMPLE_BYTES
only every second, third, ... row is counted, plus its longest rows; `Lengths.rows` says how many.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from bertdist.core.types import IntArray
from bertdist.data.records import Records
from bertdist.data_quality.findings import FindingBuilder

SAMPLE_BYTES = 32 << 20  # of text per split that is tokenized
LONGEST_ROWS = 20  # that are counted in any case
ROWS_PER_BATCH = 1_000
MANY_TRUNCATED = 0.05  # share of rows from which truncation is a warning
MANY_UNKNOWN = 0.01  # share of tokens from which unknown tokens are a warning


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of the rows of a split, special tokens included."""

    split: str
    unit: str  # "tokens" or "characters"
    rows: int  # that were counted
    of: int  # rows of the split
    mean: float
    percentiles: dict[str, int]  # "50" -> the median, ...
    longest: int
    total: int  # of all rows, estimated if not all were counted
    histogram: list[tuple[int, int, int]]  # (from, to, rows), bounds included
    mean_words: float
    max_length: int | None = None  # tokens only
    truncated: float = 0.0  # share of rows
    kept: int = 0  # tokens of all rows after truncation
    for_one_percent: int | None = None  # the max_length that truncates 1% of the rows
    counted: IntArray = field(repr=False, compare=False)  # (rows,) lengths of every k-th row

    def as_dict(self) -> dict[str, Any]:
        """The entry in check.json."""
        return {name: value for name, value in vars(self).items() if name != "counted"}


def measure_lengths(
    build: FindingBuilder, tokenizer: PreTrainedTokenizerBase | None, max_length: int
) -> Lengths:
    """The lengths of one split; adds findings on truncation and unknown tokens."""
    records = build.records
    columns = [column for column in (records.texts, records.pairs) if column is not None]
    words = [pc.mean(pc.count_substring_regex(column, r"\S+")).as_py() for column in columns]
    mean_words, num_rows = float(sum(words)), len(records)
    if tokenizer is None:
        characters = [pc.utf8_length(column).to_numpy() for column in columns]
        lengths = np.stack(characters).sum(0, np.int64)
        return _summarize(build.split, num_rows, lengths, lengths.max(), mean_words, None)
    num_bytes = records.lengths()
    every = max(1, -(-int(num_bytes.sum()) // SAMPLE_BYTES))
    rows = np.arange(0, num_rows, every)
    lengths, unknown = count_tokens(records, rows, tokenizer)
    longest = lengths.max()
    if every > 1:
        by_bytes = np.argsort(-num_bytes, kind="stable")[:LONGEST_ROWS]
        longest = max(longest, count_tokens(records, by_bytes, tokenizer)[0].max())
    summary = _summarize(build.split, num_rows, lengths, longest, mean_words, max_length)
    cut = np.flatnonzero(lengths > max_length)
    cut = cut[np.argsort(-lengths[cut], kind="stable")]
    tokens = dict(zip(rows[cut].tolist(), lengths[cut].tolist(), strict=True))
    needed, limit = summary.for_one_percent or 0, tokenizer.model_max_length
    advice = f"--max_length {needed} would truncate 1%."
    if needed <= max_length:
        advice = "Nothing to do: less than 1% is truncated."
    elif needed > limit:
        advice = f"Truncating only 1% needs {needed:,} tokens; the model's maximum is {limit:,}."
    build.add(
        "truncated",
        "warning" if summary.truncated >= MANY_TRUNCATED else "note",
        f"texts longer than --max_length {max_length}",
        rows[cut],
        f"The rest is never read; the longest has {summary.longest:,} tokens.",
        advice,
        note=lambda row: f"{tokens[row]:,} tokens",
        count=round(summary.truncated * num_rows),
    )
    if unknown > MANY_UNKNOWN * lengths.sum():
        title = "tokens that are not in the vocabulary"
        meaning = f"They all become {tokenizer.unk_token}: the model cannot tell them apart."
        advice = "Use a model for this language and script; check the encoding."
        fields: dict[str, Any] = {"count": unknown, "total": int(lengths.sum()), "unit": "tokens"}
        build.add("unknown_tokens", "warning", title, [], meaning, advice, **fields)
    return summary


def count_tokens(
    records: Records, rows: IntArray, tokenizer: PreTrainedTokenizerBase
) -> tuple[IntArray, int]:
    """(rows,) tokens of some rows, special ones included, untruncated; and the unknown tokens."""
    counted, unknown = [np.zeros(0, np.int64)], 0
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = rows[start : start + ROWS_PER_BATCH]
        encoded = tokenizer(
            records.texts.take(batch).to_pylist(),
            None if records.pairs is None else records.pairs.take(batch).to_pylist(),
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        counted.append(np.array([len(ids) for ids in encoded["input_ids"]], np.int64))
        if tokenizer.unk_token_id is not None:
            unknown += sum(ids.count(tokenizer.unk_token_id) for ids in encoded["input_ids"])
    return np.concatenate(counted), unknown


def _summarize(
    split: str,
    num_rows: int,
    lengths: IntArray,
    longest: int,
    mean_words: float,
    max_length: int | None,
) -> Lengths:
    """lengths: (counted rows,) tokens, or characters if max_length is None."""
    scale, limit = num_rows / len(lengths), max_length or lengths.max()
    percentiles = {
        share: int(np.percentile(lengths, share, method="higher")) for share in (50, 90, 95, 99)
    }
    return Lengths(
        split=split,
        unit="characters" if max_length is None else "tokens",
        rows=len(lengths),
        of=num_rows,
        mean=float(lengths.mean()),
        percentiles={str(share): length for share, length in percentiles.items()},
        longest=int(longest),
        total=round(float(lengths.sum()) * scale),
        histogram=list(_histogram(lengths)),
        mean_words=mean_words,
        max_length=max_length,
        truncated=float((lengths > limit).mean()),
        kept=round(float(np.minimum(lengths, limit).sum()) * scale),
        counted=lengths,
        for_one_percent=None if max_length is None else percentiles[99],
    )


def _histogram(lengths: IntArray) -> Iterable[tuple[int, int, int]]:
    """By powers of two: 1-1, 2-3, 4-7, ... from the shortest to the longest."""
    powers = np.bincount(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    for power in range(int(np.argmax(powers > 0)), len(powers)):
        yield 1 << power, (2 << power) - 1, int(powers[power])
