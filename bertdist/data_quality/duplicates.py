"""Texts that occur more than once: duplicates, near duplicates, contradicting labels, and leaks.

`group_texts` numbers the texts of all splits; rows with equal numbers have equal texts.
`check_duplicates` turns that into findings: `duplicates` counts the rows beyond the first of their
text, `conflicting_labels` counts texts, leaks count rows of the later split (validation, test).

Near duplicates (1,000,000 sentences of 94 bytes: 21 CPU seconds and 2.5 GB; 80 seconds if all are
from one template):

1. Every text, in lower case with single spaces, is a set of shingles: its runs of 5 bytes. Bytes,
   because short sentences have too few words for a change of one not to look like another text, and
   because Chinese has no spaces; 5, because such a shingle fits into 40 bits as it is, so that two
   sets are compared exactly and not by hashes.
2. rensa computes 64 MinHash values per set and marks the texts of which 4 values in a row (one of
   16 bands) equal those of another text. Two texts of similarity 0.8 are marked with probability
   0.9998, 0.7 with 0.99, 0.3 with 0.12 (http://www.mmds.org, chapter 3).
3. Marked texts with an equal band form a bucket, sorted by length, and each is compared with the
   next 4: never all with all, so a text in a popular bucket (a template, a disclaimer) costs no
   more than any other. A text is not compared again once a near duplicate is known in every split,
   or after 12 comparisons without a result.
4. A pair counts if the exact Jaccard similarity of its sets is at least the threshold. So every
   reported pair is real; in a popular bucket a pair that is not among the 4 neighbours is missed.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.core.types import BoolArray, IntArray
from bertdist.data.records import Records
from bertdist.data.train_test_split import joined_texts, normalize_texts
from bertdist.data_quality.findings import CONTEXT_CHARACTERS, ExampleRow, FindingBuilder, Severity
from bertdist.data_quality.label_checks import SplitLabels

LEAK_ERROR_SHARE = 0.01  # share of a split from which its score is meaningless
SHINGLE_BYTES = 5  # with 24 bits for the number of a pair a shingle fills 64
BANDS, BAND_VALUES = 16, 4
NUM_VALUES = BANDS * BAND_VALUES
NEIGHBOURS = 4  # texts of a bucket that each text is compared with
MAX_MISSES = 12  # comparisons without a result, after which a text is not compared again
ESTIMATE_MARGIN = 0.2  # an estimate from 64 values has a standard deviation of 0.05
BYTES_PER_CHUNK = 1 << 17  # 1 MB of shingles: in a core's cache a comparison takes a fifth the time
SEED = 42

LATE_DIFFERENCE = 80  # characters that two near duplicates share, from which on they are left out
CONFLICT_SPREAD = 0.25  # of the range of regression targets: a larger difference contradicts

Shingles = npt.NDArray[np.uint64]


class NearPairs(NamedTuple):
    """Near duplicates: the numbers of two different normalized texts."""

    left: IntArray  # (pairs,)
    right: IntArray  # (pairs,)


@dataclass(frozen=True, kw_only=True)
class TextGroups:
    """The texts of all splits, numbered. Both texts of a pair row count as one text."""

    exact: Mapping[str, IntArray]  # split -> (rows,) number of the text
    normalized: Mapping[str, IntArray]  # split -> (rows,) number up to case and white space
    normalized_texts: pa.Array  # (normalized texts,) large_string
    near: NearPairs | None  # None: not searched
    near_threshold: float = 0.0  # from which on they are


def has_rensa() -> bool:
    """Whether rensa, which near duplicates need, is installed (extra `check`)."""
    return importlib.util.find_spec("rensa") is not None


def group_texts(splits: Mapping[str, Records], near_threshold: float) -> TextGroups:
    """Number the texts of all splits. near_threshold: Jaccard similarity; 0: no near duplicates."""
    columns = [joined_texts(records) for records in splits.values()]
    encoded = pa.chunked_array(columns).combine_chunks().dictionary_encode()
    numbers = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum([len(records) for records in splits.values()])[:-1]
    exact = dict(zip(splits, np.split(numbers, ends), strict=True))
    distinct = normalize_texts(encoded.dictionary).dictionary_encode()
    number_of_exact = distinct.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    normalized = {name: number_of_exact[numbers] for name, numbers in exact.items()}
    near = None
    if near_threshold:
        near = _find_near_pairs(distinct.dictionary, list(normalized.values()), near_threshold)
    return TextGroups(
        exact=exact,
        normalized=normalized,
        normalized_texts=distinct.dictionary,
        near=near,
        near_threshold=near_threshold,
    )


def is_repeat(numbers: IntArray) -> BoolArray:
    """(rows,): whether an earlier row has the same number."""
    repeat = np.ones(len(numbers), bool)
    repeat[np.unique(numbers, return_index=True)[1]] = False
    return repeat


def conflicting_texts(numbers: IntArray, labels: SplitLabels) -> IntArray:
    """The texts that have contradicting labels, those of most rows first. numbers: (rows,)."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(numbers[order]) != 0]))
    values = labels.numbers[order] if labels.numbers is not None else labels.codes[order]
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    allowed = CONFLICT_SPREAD * np.ptp(values) if labels.numbers is not None else 0
    sizes = np.diff(np.append(starts, len(order)))
    conflicts = np.flatnonzero(high - low > allowed)
    by_size = np.argsort(-sizes[conflicts], kind="stable")
    texts: IntArray = numbers[order][starts[conflicts]][by_size]
    return texts


def near_duplicate_rows(groups: TextGroups, split: str, other: str) -> IntArray:
    """(rows of split,): a row of `other` whose text is a near duplicate, -1 if there is none."""
    assert groups.near is not None
    first_row = np.full(len(groups.normalized_texts), -1, np.int64)  # of `other`, per text
    numbers = groups.normalized[other]
    first_row[numbers[::-1]] = np.arange(len(numbers))[::-1]
    partner = np.full(len(groups.normalized_texts), -1, np.int64)
    left, right = groups.near
    for one, two in ((left, right), (right, left)):
        occurs = first_row[two] >= 0
        partner[one[occurs]] = first_row[two[occurs]]
    rows: IntArray = partner[groups.normalized[split]]
    return rows


def near_duplicates_to_drop(groups: TextGroups, split: str) -> BoolArray:
    """(rows,): rows that are a near duplicate of an earlier row that is kept."""
    assert groups.near is not None
    numbers = groups.normalized[split]
    first_row = np.full(len(groups.normalized_texts), len(numbers), np.int64)
    np.minimum.at(first_row, numbers, np.arange(len(numbers)))
    neighbours: dict[int, list[int]] = {}
    for one, two in zip(groups.near.left.tolist(), groups.near.right.tolist(), strict=True):
        neighbours.setdefault(one, []).append(two)
        neighbours.setdefault(two, []).append(one)
    dropped: set[int] = set()
    for text in sorted(neighbours, key=lambda number: int(first_row[number])):
        if first_row[text] < len(numbers) and text not in dropped:
            later = (other for other in neighbours[text] if first_row[other] > first_row[text])
            dropped.update(later)
    return np.array([number in dropped for number in numbers.tolist()], bool)


# The search for near duplicates.


def _find_near_pairs(texts: pa.Array, splits: Sequence[IntArray], threshold: float) -> NearPairs:
    """splits: the numbers of the texts in each split."""
    marked, digests = _marked_texts(texts)  # below, indices are into `marked`
    bits = np.zeros(len(texts), np.uint8)  # one bit per split that has the text
    for bit, numbers in enumerate(splits):
        bits[numbers] |= np.uint8(1 << bit)
    in_splits = bits[marked]
    matched = np.zeros_like(in_splits)  # one bit per split with a near duplicate
    misses = np.zeros_like(in_splits)  # comparisons without a result
    results = [NearPairs(np.zeros(0, np.int64), np.zeros(0, np.int64))]

    def compare(left: IntArray, right: IntArray) -> None:
        """Compare exactly the pairs that may add a result and look near; (pairs,) each."""
        new = (in_splits[right] & ~matched[left]) | (in_splits[left] & ~matched[right])
        wanted = (new != 0) & (np.minimum(misses[left], misses[right]) < MAX_MISSES)
        left, right = left[wanted], right[wanted]
        likely = np.zeros(len(left), bool)
        for part in _slices(len(left), 1 << 18):
            estimate = (digests[left[part]] == digests[right[part]]).mean(1)
            likely[part] = estimate >= threshold - ESTIMATE_MARGIN
        left, right = left[likely], right[likely]
        near = jaccard(texts, marked[left], marked[right]) >= threshold
        for one, other in ((left, right), (right, left)):
            np.bitwise_or.at(matched, one[near], in_splits[other[near]])
            missed = misses + np.bincount(one[~near], minlength=len(misses))
            misses[:] = np.minimum(missed, MAX_MISSES)
        results.append(NearPairs(marked[left[near]], marked[right[near]]))

    by_length = np.argsort(_byte_lengths(texts)[marked], kind="stable")
    for band in _bands(digests).T:
        order = by_length[np.argsort(band[by_length], kind="stable")]
        for step in range(1, NEIGHBOURS + 1):
            same = band[order[:-step]] == band[order[step:]]
            compare(order[:-step][same], order[step:][same])
    left, right = map(np.concatenate, zip(*results, strict=True))
    low, high = np.minimum(left, right), np.maximum(left, right)
    _, once = np.unique(low * len(texts) + high, return_index=True)
    return NearPairs(low[once], high[once])


def _marked_texts(texts: pa.Array) -> tuple[IntArray, npt.NDArray[np.uint32]]:
    """The texts that share a band with another, and their MinHash values: (n,) and (n, 64)."""
    import rensa

    def digests(rows: IntArray) -> Any:
        values, counts = shingles(texts.take(pa.array(rows)))
        ends = np.concatenate([[0], counts.cumsum()]).astype(np.uint64)
        return rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            _mix(values), ends, NUM_VALUES, SEED
        )

    lengths = _byte_lengths(texts)
    rows = np.flatnonzero(lengths >= SHINGLE_BYTES).astype(np.int64)
    chunks = _chunks(rows, lengths[rows])
    # The threshold has no effect on the methods that are used here.
    index = rensa.RMinHashLSH(threshold=0.8, num_perm=NUM_VALUES, num_bands=BANDS)
    for number, rows in enumerate(chunks):
        index.insert_matrix(digests(rows), number << 32)
    marked = [np.zeros(0, np.int64)]
    values = [np.zeros((0, NUM_VALUES), np.uint32)]
    for rows in chunks:
        flagged = rows[np.array(index.query_duplicate_flags_matrix(digests(rows)), bool)]
        for part in _slices(
            len(flagged), 20_000
        ):  # as Python numbers they take 30 times the memory
            marked.append(flagged[part])
            values.append(np.array(digests(flagged[part]).to_rows(), np.uint32))
    return np.concatenate(marked), np.concatenate(values)


def _bands(digests: npt.NDArray[np.uint32]) -> Shingles:
    """(texts, BANDS): one number per band of four values."""
    halves = digests.view(np.uint64).reshape(len(digests), BANDS, BAND_VALUES // 2)
    return _mix(halves[:, :, 0]) ^ (halves[:, :, 1] * np.uint64(0x9E3779B97F4A7C15))


def jaccard(texts: pa.Array, left: IntArray, right: IntArray) -> npt.NDArray[np.float64]:
    """(pairs,): shared shingles / all shingles of two texts each, exactly."""
    similarity = np.zeros(len(left))
    lengths = _byte_lengths(texts)
    bits = np.uint64(8 * SHINGLE_BYTES)
    for pairs in _chunks(np.arange(len(left)), lengths[left] + lengths[right]):
        sides = []
        for side in (left, right):
            values, counts = shingles(texts.take(pa.array(side[pairs])))
            pair_numbers = np.arange(len(pairs), dtype=np.uint64) << bits
            keys = np.sort(np.repeat(pair_numbers, counts) | values)
            if len(keys):
                keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
            sides.append(keys)
        both = np.sort(np.concatenate(sides), kind="stable")  # merges two sorted runs
        shared = both[1:][both[1:] == both[:-1]]
        total, common = (
            np.bincount((keys >> bits).astype(np.int64), minlength=len(pairs))
            for keys in (both, shared)
        )
        similarity[pairs] = common / np.maximum(1, total - common)
    return similarity


def shingles(texts: pa.Array) -> tuple[Shingles, IntArray]:
    """(all shingles,) uint64: the runs of 5 bytes, one number each; (texts,): how many per text.

    A shorter text is one shingle, an empty one none.
    """
    begin, end = texts.offset, texts.offset + len(texts) + 1
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[begin:end]
    buffer = texts.buffers()[2]
    if buffer is None or offsets[-1] == offsets[0]:
        return np.zeros(0, np.uint64), np.zeros(len(texts), np.int64)
    content = np.frombuffer(buffer, np.uint8)[offsets[0] : offsets[-1]]
    padded = np.zeros(len(content) + SHINGLE_BYTES - 1, np.uint64)
    padded[: len(content)] = content
    values = np.zeros(len(content), np.uint64)
    for byte in range(SHINGLE_BYTES):
        values = (values << np.uint64(8)) | padded[byte : byte + len(values)]
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    keep = np.ones(len(values), bool)
    # What begins in the last bytes of a text ends in the next text.
    for back in range(1, SHINGLE_BYTES):
        keep[(starts + lengths - back)[lengths > back]] = False
    for length in range(1, SHINGLE_BYTES):
        values[starts[lengths == length]] >>= np.uint64(8 * (SHINGLE_BYTES - length))
    return values[keep], np.where(lengths > 0, np.maximum(lengths - SHINGLE_BYTES + 1, 1), 0)


def _mix(values: Shingles) -> Shingles:
    """Numbers that look random, as MinHash needs: the finalizer of splitmix64.

    https://prng.di.unimi.it/splitmix64.c
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _byte_lengths(texts: pa.Array) -> IntArray:
    lengths: IntArray = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _chunks(rows: IntArray, lengths: IntArray) -> list[IntArray]:
    """Rows in chunks of about BYTES_PER_CHUNK bytes, and of fewer rows than 24 bits count."""
    ends = np.flatnonzero(np.diff(lengths.cumsum() // BYTES_PER_CHUNK)) + 1
    chunks = np.split(rows, ends)
    return [chunk[part] for chunk in chunks for part in _slices(len(chunk), 1 << 23)]


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


# Findings.


def check_duplicates(
    builders: Mapping[str, FindingBuilder],
    labels: Mapping[str, SplitLabels | None],
    groups: TextGroups,
) -> None:
    """Add all findings on texts that occur more than once. Splits are by name, train first."""
    names = list(builders)
    for index, first in enumerate(names):
        build, own = builders[first], labels[first]
        _find_repeats(build, groups)
        if own is not None:
            _find_conflicts(build, groups.exact[first], own)
        for second in names[index:]:
            if first != second:
                _find_leaks(builders, first, second, groups)
            if groups.near is not None:
                _find_near(builders, first, second, labels, groups)


def _example(build: FindingBuilder, row: int, note: str = "", start: int = 0) -> ExampleRow:
    """A row with both of its texts, from character `start` on."""
    text = _text(build.records, row)
    return build.example(row, note, f"...{text[start:]}" if start else text)


def _text(records: Records, row: int) -> str:
    record = records[int(row)]
    return record.text if record.pair is None else f"{record.text} | {record.pair}"


def _shown_from(one: str, other: str) -> int:
    """The character from which two texts are shown, so that an excerpt has where they differ."""
    pairs = zip(one, other, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return 0 if same < LATE_DIFFERENCE else same - CONTEXT_CHARACTERS


def _label_note(labels: SplitLabels | None, row: int) -> str:
    return "" if labels is None or labels.numbers is not None else labels.name(row)


def _pair(one: ExampleRow, other: ExampleRow) -> ExampleRow:
    """Two rows as one example."""
    text = other.text if other.text != one.text else ""
    return replace(one, like=other.where, like_text=text, like_note=other.note)


def _find_repeats(build: FindingBuilder, groups: TextGroups) -> None:
    """Texts that occur more than once in one split."""

    def add(
        kind: str, numbers: IntArray, rows: BoolArray, title: str, meaning: str, advice: str
    ) -> None:
        if not rows.any():
            return
        texts, repeats = np.unique(numbers[rows], return_counts=True)
        examples = []
        for text in texts[np.argsort(-repeats, kind="stable")][: build.num_examples]:
            same = np.flatnonzero(numbers == text)
            examples.append(_example(build, same[0], f"{len(same)} times"))
        severity: Severity = "warning" if kind == "duplicates" and rows.mean() >= 0.01 else "note"
        details = {"texts": len(texts), "most_times": int(repeats.max()) + 1}
        shown: dict[str, Any] = {"examples": examples, "details": details}
        build.add(kind, severity, title, np.flatnonzero(rows), meaning, advice, **shown)

    exact, normalized = groups.exact[build.split], groups.normalized[build.split]
    title, repeats = "duplicate texts", is_repeat(exact)
    meaning = "Rows beyond the first with the same text: these texts count several times."
    advice = "Keep one of each (--fix does) unless the data really repeat that often."
    add("duplicates", exact, repeats, title, meaning, advice)
    title = "duplicate texts up to case and white space"
    meaning = "An uncased model reads them as the same text."
    advice = "Nothing to do for a cased model; for an uncased one normalize them before --fix."
    add("alike_texts", normalized, is_repeat(normalized) & ~repeats, title, meaning, advice)


def _find_conflicts(build: FindingBuilder, numbers: IntArray, labels: SplitLabels) -> None:
    texts = conflicting_texts(numbers, labels)
    examples: list[ExampleRow] = []
    for text in texts[: build.num_examples]:
        rows = np.flatnonzero(numbers == text)
        _, firsts = np.unique(labels.codes[rows], return_index=True)
        two = rows[np.sort(firsts)][:2]
        if labels.numbers is not None:
            values = labels.numbers[rows]
            two = rows[[values.argmin(), values.argmax()]]
        examples.append(_pair(*(_example(build, row, labels.name(row)) for row in two)))
    meaning = "The rows of such a text teach opposite answers, and no model can score on all."
    if labels.numbers is not None:
        meaning = "Numbers of one text that differ by more than a quarter of the full range."
    build.add(
        "conflicting_labels",
        "warning",
        "texts with contradicting labels",
        [],
        meaning,
        "Correct them by hand; --fix drops all their rows.",
        count=len(texts),
        total=len(np.unique(numbers)),
        unit="texts",
        examples=examples,
        details={"rows": int(np.isin(numbers, texts).sum())},
    )


def _find_leaks(
    builders: Mapping[str, FindingBuilder], first: str, second: str, groups: TextGroups
) -> None:
    """Rows of `second` whose text is also in `first`."""
    build = replace(builders[second], split=f"{first}/{second}")
    meaning = f"The best weights are chosen on {first}, which has these rows of {second}."
    advice = f"Remove them from {first}."
    if first == "train":
        meaning = (
            f"The model is trained on these {second} rows: the score of {second} is too good. From "
            f"{LEAK_ERROR_SHARE:.0%} of the rows on this is an error."
        )
        advice = "Remove them from train (--fix does)."
    exact = np.isin(groups.exact[second], groups.exact[first])
    same_normalized = np.isin(groups.normalized[second], groups.normalized[first]) & ~exact
    title = f"rows of {second} that are also in {first}"
    for kind, numbers, leaked, suffix in (
        ("leaks", groups.exact, exact, ""),
        ("alike_leaks", groups.normalized, same_normalized, " up to case and white space"),
    ):
        rows = np.flatnonzero(leaked)
        examples = []
        for row in rows[: build.num_examples]:
            like = int(np.argmax(numbers[first] == numbers[second][row]))
            examples.append(_pair(_example(build, row), _example(builders[first], like)))
        is_error = first == "train" and leaked.mean() >= LEAK_ERROR_SHARE
        severity: Severity = "error" if is_error else "warning"
        build.add(kind, severity, title + suffix, rows, meaning, advice, examples=examples)


def _find_near(
    builders: Mapping[str, FindingBuilder],
    first: str,
    second: str,
    labels: Mapping[str, SplitLabels | None],
    groups: TextGroups,
) -> None:
    """Rows of `second` that are near duplicates of rows of `first`, which may be the same split."""
    build, same = builders[second], first == second
    partner = near_duplicate_rows(groups, second, first)
    if not same:  # without rows that are reported as leaks
        partner[np.isin(groups.normalized[second], groups.normalized[first])] = -1
    rows = np.flatnonzero(partner >= 0)
    meaning = (
        "Texts that differ in little: of all sequences of 5 bytes in the two, in lower case, at "
        f"least {groups.near_threshold:.0%} are in both (--near_threshold)."
    )
    details = {}
    own, other = labels[second], labels[first]
    if own is not None and other is not None and own.numbers is None:
        pairs = zip(own.names_of(rows), other.names_of(partner[rows]), strict=True)
        details["with_another_label"] = sum(one != two for one, two in pairs)
        if number := details["with_another_label"]:
            meaning += f" In {number:,} of these rows the label is not that of the near duplicate."
    examples: list[ExampleRow] = []  # each row of a split once
    shown: set[int] = set()
    for row, like in zip(rows.tolist(), partner[rows].tolist(), strict=True):
        if len(examples) >= build.num_examples:
            break
        if not (same and {row, like} & shown):
            shown |= {row, like}
            notes = [_label_note(own, row), _label_note(other, like)]
            if notes[0] == notes[1]:
                notes = ["", ""]
            start = _shown_from(_text(build.records, row), _text(builders[first].records, like))
            one = _example(build, row, notes[0], start)
            examples.append(_pair(one, _example(builders[first], like, notes[1], start)))
    fields: dict[str, Any] = {"examples": examples, "details": details}
    if same:
        advice = "Check for templates or copies; --fix_kinds near_duplicates keeps one of each."
        title = "near duplicates"
        build.add("near_duplicates", "note", title, rows, meaning, advice, **fields)
        return
    build = replace(build, split=f"{first}/{second}")
    title = f"rows of {second} that are near duplicates of rows of {first}"
    advice = (
        f"Check whether {second} still tests something new; --fix_kinds near_leaks drops such rows "
        f"of {first}."
    )
    build.add("near_leaks", "warning", title, rows, meaning, advice, **fields)
