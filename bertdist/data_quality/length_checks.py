"""How long the texts are, in tokens where there is a tokenizer, else in characters and words -> a summary and findings.

In: the Records of a split, a tokenizer or None, --max_length. Out: `Lengths`: percentiles, a histogram, the share that is truncated,
and the max_length that would truncate 1%. One module, because check and --dry_run must count the same tokens as training does.

Tokenizing takes about a second for 1 or 2 MB of text. Of a split of more than TEXT_BYTES every second, third, ... row is counted, and
its longest rows besides; the summary says of how many.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from bertdist.core.terminal import excerpt
from bertdist.data.records import Records
from bertdist.data_quality.findings import Example, Finding

TEXT_BYTES = 32 << 20  # of text that is tokenized of a split

LONGEST = 20  # rows that are counted in any case

ROWS_AT_ONCE = 1_000

MANY_TRUNCATED = 0.05  # share of rows from which truncation is a warning

MANY_UNKNOWN = 0.01  # share of tokens from which unknown pieces are a warning

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of the rows of a split, special tokens counted."""

    split: str
    unit: str  # "tokens" or "characters"
    rows: int  # that were counted
    of: int  # rows of the split
    mean: float
    percentiles: dict[str, int]  # "50" -> the median, ...
    longest: int
    total: int  # of all rows, estimated where not all were counted
    histogram: list[tuple[int, int, int]]  # (from, to, rows), ends included
    mean_words: float
    max_length: int | None = None  # tokens only
    truncated: float = 0.0  # share of rows
    kept: int = 0  # tokens of all rows that truncation leaves
    for_one_percent: int | None = None  # the max_length that truncates 1% of the rows
    counted: Ints = field(
        repr=False, compare=False
    )  # (rows,) the lengths themselves, of every k-th row of the split

    def as_dict(self) -> dict[str, Any]:
        """For check.json."""
        return {name: value for name, value in vars(self).items() if name != "counted"}


def measure(
    split: str,
    records: Records,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    num_examples: int,
) -> tuple[Lengths, list[Finding]]:
    """Count; the findings are on truncation and on pieces that the tokenizer does not know."""
    words = pc.count_substring_regex(records.texts, r"\S+").to_numpy(zero_copy_only=False)
    if tokenizer is None:
        lengths = pc.utf8_length(records.texts).to_numpy(zero_copy_only=False).astype(np.int64)
        if records.pairs is not None:
            lengths = lengths + pc.utf8_length(records.pairs).to_numpy(zero_copy_only=False)
        return _summary(split, "characters", records, lengths, lengths, float(words.mean())), []
    every = max(1, -(-int(records.lengths().sum()) // TEXT_BYTES))
    rows = np.arange(0, len(records), every)
    lengths, unknown = count_tokens(records, rows, tokenizer)
    longest = np.argsort(-records.lengths(), kind="stable")[:LONGEST]
    extremes, _ = count_tokens(records, longest, tokenizer) if every > 1 else (lengths, 0)
    summary = _summary(split, "tokens", records, lengths, extremes, float(words.mean()), max_length)
    findings = []
    if summary.truncated:
        cut = np.flatnonzero(lengths > max_length)
        cut = cut[np.argsort(-lengths[cut], kind="stable")]
        limit = tokenizer.model_max_length
        need = summary.for_one_percent or 0
        advice = f"--max_length {need} would truncate 1%."
        if need > limit:
            advice = (
                f"To truncate only 1% would need {need:,} tokens, and the model takes {limit:,}."
            )
        findings.append(
            Finding(
                kind="truncated",
                severity="warning" if summary.truncated >= MANY_TRUNCATED else "note",
                split=split,
                title=f"texts longer than --max_length {max_length}",
                count=round(summary.truncated * len(records)),
                total=len(records),
                meaning=f"What stands behind is never read; the longest has {summary.longest:,} tokens.",
                advice=advice if need > max_length else "Nothing: less than 1% is truncated.",
                examples=_examples(
                    split, records, rows[cut[:num_examples]], lengths[cut[:num_examples]]
                ),
            )
        )
    if unknown > MANY_UNKNOWN * lengths.sum():
        findings.append(
            Finding(
                kind="unknown_tokens",
                severity="warning",
                split=split,
                title="pieces that the tokenizer does not know",
                count=unknown,
                total=int(lengths.sum()),
                unit="tokens",
                meaning=f"They all become {tokenizer.unk_token}: the model cannot tell them apart.",
                advice="Take a model for this language and script; see whether the encoding is right.",
            )
        )
    return summary, findings


def count_tokens(
    records: Records, rows: Ints, tokenizer: PreTrainedTokenizerBase
) -> tuple[Ints, int]:
    """(rows,) tokens of some rows, special ones counted and nothing truncated; and how many of all are unknown."""
    counted, unknown = [], 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        taken = rows[start : start + ROWS_AT_ONCE]
        texts = records.texts.take(taken).to_pylist()
        pairs = None if records.pairs is None else records.pairs.take(taken).to_pylist()
        encoded = tokenizer(
            texts,
            pairs,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        counted.append(np.array([len(ids) for ids in encoded["input_ids"]], np.int64))
        if tokenizer.unk_token_id is not None:
            unknown += sum(ids.count(tokenizer.unk_token_id) for ids in encoded["input_ids"])
    return np.concatenate(counted) if counted else np.zeros(0, np.int64), unknown


def _examples(split: str, records: Records, rows: Ints, lengths: Ints) -> tuple[Example, ...]:
    return tuple(
        Example(
            split=split,
            row=row,
            text=excerpt(records.texts[row].as_py()),
            note=f"{length:,} tokens",
        )
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
    )


def _summary(
    split: str,
    unit: str,
    records: Records,
    lengths: Ints,
    extremes: Ints,
    mean_words: float,
    max_length: int | None = None,
) -> Lengths:
    scale = len(records) / len(lengths)
    kept = lengths if max_length is None else np.minimum(lengths, max_length)
    return Lengths(
        split=split,
        unit=unit,
        rows=len(lengths),
        of=len(records),
        mean=float(lengths.mean()),
        percentiles={
            str(share): int(np.percentile(lengths, share, method="higher"))
            for share in (50, 90, 95, 99)
        },
        longest=int(max(lengths.max(), extremes.max())),
        total=round(float(lengths.sum()) * scale),
        histogram=list(_histogram(lengths)),
        mean_words=mean_words,
        max_length=max_length,
        truncated=float((lengths > max_length).mean()) if max_length is not None else 0.0,
        kept=round(float(kept.sum()) * scale),
        counted=lengths,
        for_one_percent=int(np.percentile(lengths, 99, method="higher"))
        if max_length is not None
        else None,
    )


def _histogram(lengths: Ints) -> Iterable[tuple[int, int, int]]:
    """By powers of two: 1-1, 2-3, 4-7, ... from the shortest to the longest."""
    powers = np.bincount(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    for power in range(int(np.argmax(powers > 0)), len(powers)):
        yield 1 << power, (2 << power) - 1, int(powers[power])
