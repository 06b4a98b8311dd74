"""Which rows hold the same text, and which nearly the same: within a split and between splits.

In: the Records of one or several splits. Out: `Sameness`: for every row the number of its text and of its text up to case and blanks,
and pairs of near duplicates. What that means for training (conflicts, leaks) is said by `overlap.py`.
One module, because "the same" must mean the same for duplicates, conflicts, leaks and --fix.

Near duplicates, in the order of the work (1,000,000 sentences of 94 bytes: 21 processor seconds and 2.5 GB; all of one template: 80):
1. Every text in lower case with single blanks is a set of shingles: its runs of 5 bytes. Bytes, because short sentences have too few
   words for a change of one not to look like another text, and because Chinese has no blanks; 5, because such a shingle fits into 40
   bits as it is, so that a comparison of two sets is exact and not one of hashes.
2. rensa makes 64 MinHash values of each set, and marks the texts of which 4 values in a row (one of 16 bands) are those of another
   text. Two texts that are 0.8 alike are marked with probability 0.9998, 0.7 alike with 0.99, 0.3 alike with 0.12
   (chapter 3 of http://www.mmds.org).
3. Of the marked texts those with an equal band lie in one bucket, in the order of their length, and each is compared with the 4 behind
   it: never all with all, so a popular bucket (a template, a disclaimer) costs no more a text than any other. A text of which all is known
   that is asked (whether a text of this split, of that split is near) or that was compared 12 times in vain is not compared again.
4. A pair counts if the Jaccard similarity of its two sets of shingles, computed exactly, is at least the threshold: what is reported is
   true; what is in a popular bucket and differs from its 4 neighbours may be missed.

Rows that hold the same text -> findings: duplicates, contradicting labels, and rows of one split that stand in another.

In: `Sameness` and the labels of the splits. Out: findings. How they count: `duplicates` are rows beyond the first of their text,
`conflicting_labels` are texts, leaks are rows of the split that is scored.
One module beside `duplicates.py`, which tells what is the same and nothing about what that does to training.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.core.terminal import excerpt
from bertdist.data.records import Records
from bertdist.data_quality.findings import Example, Finding, Severity
from bertdist.data_quality.label_checks import SplitLabels

SHINGLE = 5  # bytes; with 24 bits for the number of a pair a shingle fills 64

BANDS, BAND_VALUES = 16, 4

NEIGHBOURS = 4  # texts of a bucket that each text is compared with

DOUBT = 0.2  # an estimate from 64 values is off by 0.05 (one standard deviation)

IN_VAIN = 12  # comparisons after which a text is not compared again on its own account

SHINGLES_AT_ONCE = 1 << 17  # 1 MB: in the cache of a core a comparison takes a fifth of the time

SEED = 42

Ints = npt.NDArray[np.int64]

Shingles = npt.NDArray[np.uint64]

Bits = npt.NDArray[np.uint8]


class Pairs(NamedTuple):
    """Near duplicates: numbers of two different texts (up to case and blanks), and how alike they are."""

    left: Ints  # (pairs,)
    right: Ints  # (pairs,)
    similarity: npt.NDArray[np.float64]  # (pairs,) Jaccard


@dataclass(frozen=True, kw_only=True)
class Sameness:
    """Texts by number; a pair of texts counts as one text. Splits are in the order in which they were given."""

    texts: Mapping[str, Ints]  # split -> (rows,) number of each row's text
    plain: Mapping[str, Ints]  # split -> (rows,) number of each row's text up to case and blanks
    plain_of: Ints  # (texts,) plain number of each text
    plain_texts: pa.Array  # (plain texts,) large_string, in lower case with single blanks
    pairs: Pairs | None  # None: not looked for


def can_find_near_duplicates() -> bool:
    """Whether rensa is installed (the extra `check`)."""
    return importlib.util.find_spec("rensa") is not None


def compare_texts(splits: Mapping[str, Records], near_threshold: float) -> Sameness:
    """Number the texts of all splits together; near_threshold 0: near duplicates are not looked for."""
    columns = [_joined(records) for records in splits.values()]
    encoded = pa.chunked_array(columns).combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    plain = _plain(encoded.dictionary).dictionary_encode()
    plain_of = plain.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum([len(records) for records in splits.values()])[:-1]
    texts = dict(zip(splits, np.split(codes, ends), strict=True))
    return Sameness(
        texts=texts,
        plain={name: plain_of[numbers] for name, numbers in texts.items()},
        plain_of=plain_of,
        plain_texts=plain.dictionary,
        pairs=_near_pairs(
            plain.dictionary, [plain_of[numbers] for numbers in texts.values()], near_threshold
        )
        if near_threshold
        else None,
    )


def repeated(numbers: Ints) -> npt.NDArray[np.bool_]:
    """(rows,): whether an earlier row has the same text."""
    later = np.ones(len(numbers), bool)
    later[np.unique(numbers, return_index=True)[1]] = False
    return later


def _joined(records: Records) -> pa.Array:
    if records.pairs is None:
        return records.texts
    return pc.binary_join_element_wise(
        records.texts, records.pairs, pa.scalar("\x1e", pa.large_string())
    )  # the record separator


def _plain(texts: pa.Array) -> pa.Array:
    """In lower case, without blanks at the ends, and with one blank where there are several."""
    return pc.utf8_trim_whitespace(
        pc.replace_substring_regex(pc.utf8_lower(texts), r"[\s\pZ]+", " ")
    )


def _near_pairs(texts: pa.Array, of_split: Sequence[Ints], threshold: float) -> Pairs:
    splits = np.zeros(len(texts), np.uint8)  # a bit for each split that has the text
    for bit, numbers in enumerate(of_split):
        splits[numbers] |= np.uint8(1 << bit)
    marked, digests = _digests(texts)
    search = _Search(texts, splits, marked, digests, threshold)
    by_length = np.argsort(_lengths(texts)[marked], kind="stable")
    for band in _bands(digests).T:
        order = by_length[np.argsort(band[by_length], kind="stable")]
        for step in range(1, NEIGHBOURS + 1):
            same = band[order[:-step]] == band[order[step:]]
            search.compare(order[:-step][same], order[step:][same])
    return search.pairs()


class _Search:
    """What has been compared so far. Places are numbers of marked texts."""

    def __init__(
        self,
        texts: pa.Array,
        splits: Bits,
        marked: Ints,
        digests: npt.NDArray[np.uint32],
        threshold: float,
    ) -> None:
        self.texts, self.marked, self.digests, self.threshold = texts, marked, digests, threshold
        self.splits = splits[marked]  # a bit for each split that has the text
        self.answered = np.zeros_like(
            self.splits
        )  # a bit for each split in which a near duplicate has been found
        self.in_vain = np.zeros_like(self.splits)  # comparisons that found nothing
        self.found: list[Pairs] = []

    def compare(self, left: Ints, right: Ints) -> None:
        """(pairs,) places each. Only what can still tell something, and is likely to, is compared in full."""
        new = (self.splits[right] & ~self.answered[left]) | (
            self.splits[left] & ~self.answered[right]
        )
        left, right = (
            side[(new != 0) & (np.minimum(self.in_vain[left], self.in_vain[right]) < IN_VAIN)]
            for side in (left, right)
        )
        likely = np.zeros(len(left), bool)
        for part in _parts(len(left), 1 << 18):
            estimate = (self.digests[left[part]] == self.digests[right[part]]).mean(1)
            likely[part] = estimate >= self.threshold - DOUBT
        left, right = left[likely], right[likely]
        similarity = jaccard(self.texts, self.marked[left], self.marked[right])
        near = similarity >= self.threshold
        for one, other in ((left, right), (right, left)):
            np.bitwise_or.at(self.answered, one[near], self.splits[other[near]])
            vain = np.bincount(one[~near], minlength=len(self.in_vain))
            self.in_vain = np.minimum(self.in_vain + vain, IN_VAIN).astype(np.uint8)
        self.found.append(
            Pairs(self.marked[left[near]], self.marked[right[near]], similarity[near])
        )

    def pairs(self) -> Pairs:
        """Every pair once, the text with the smaller number on the left."""
        empty = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        left, right, similarity = (
            np.concatenate(parts) for parts in zip(empty, *self.found, strict=True)
        )
        low, high = np.minimum(left, right), np.maximum(left, right)
        _, once = np.unique(low * len(self.texts) + high, return_index=True)
        return Pairs(low[once], high[once], similarity[once])


def _digests(texts: pa.Array) -> tuple[Ints, npt.NDArray[np.uint32]]:
    """The texts that have a band in common with another, and their MinHash values: (marked texts,) and (marked texts, 64)."""
    import rensa

    values_of_text = BANDS * BAND_VALUES

    def digests(rows: Ints) -> Any:
        values, counts = shingles(texts.take(pa.array(rows)))
        ends = np.concatenate([[0], counts.cumsum()]).astype(np.uint64)
        return rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            _mixed(values), ends, values_of_text, SEED
        )

    filled = np.flatnonzero(_lengths(texts) >= SHINGLE).astype(np.int64)
    pieces = _cut(filled, _lengths(texts)[filled])
    index = rensa.RMinHashLSH(
        threshold=0.8, num_perm=values_of_text, num_bands=BANDS
    )  # the threshold plays no part in what is used here
    for at, rows in enumerate(pieces):
        index.insert_matrix(digests(rows), at << 32)
    kept, found = [np.zeros(0, np.int64)], [np.zeros((0, values_of_text), np.uint32)]
    for rows in pieces:
        marked = rows[np.array(index.query_duplicate_flags_matrix(digests(rows)), bool)]
        for part in _parts(len(marked), 20_000):  # as Python numbers they take 30 times the memory
            kept.append(marked[part])
            found.append(np.array(digests(marked[part]).to_rows(), np.uint32))
    return np.concatenate(kept), np.concatenate(found)


def _bands(digests: npt.NDArray[np.uint32]) -> Shingles:
    """(texts, BANDS): one number for each band of four values."""
    halves = digests.view(np.uint64).reshape(len(digests), BANDS, BAND_VALUES // 2)
    return _mixed(halves[:, :, 0]) ^ (halves[:, :, 1] * np.uint64(0x9E3779B97F4A7C15))


def jaccard(texts: pa.Array, left: Ints, right: Ints) -> npt.NDArray[np.float64]:
    """(pairs,): shared shingles / all shingles of two texts each, exactly."""
    similarity = np.zeros(len(left))
    lengths = _lengths(texts)
    for places in _cut(np.arange(len(left)), lengths[left] + lengths[right]):
        sides = []
        for side in (left, right):
            values, counts = shingles(texts.take(pa.array(side[places])))
            keys = np.sort(
                np.repeat(np.arange(len(places), dtype=np.uint64) << np.uint64(8 * SHINGLE), counts)
                | values
            )
            sides.append(
                keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
            )
        both = np.sort(np.concatenate(sides), kind="stable")  # merges two sorted runs
        shared = both[1:][both[1:] == both[:-1]]
        total, common = (
            np.bincount((keys >> np.uint64(8 * SHINGLE)).astype(np.int64), minlength=len(places))
            for keys in (both, shared)
        )
        similarity[places] = common / np.maximum(1, total - common)
    return similarity


def shingles(texts: pa.Array) -> tuple[Shingles, Ints]:
    """(all shingles,) uint64: the runs of 5 bytes of each text, as one number each, and (texts,) how many a text has.

    A text of fewer bytes is one shingle, an empty one none.
    """
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[
        texts.offset : texts.offset + len(texts) + 1
    ]
    buffer = texts.buffers()[2]
    if buffer is None or offsets[-1] == offsets[0]:
        return np.zeros(0, np.uint64), np.zeros(len(texts), np.int64)
    text = np.zeros(offsets[-1] - offsets[0] + SHINGLE - 1, np.uint64)
    text[: 1 - SHINGLE] = np.frombuffer(buffer, np.uint8)[offsets[0] : offsets[-1]]
    values = np.zeros(len(text) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):
        values = (values << np.uint64(8)) | text[place : place + len(values)]
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    keep = np.ones(len(values), bool)
    for back in range(1, SHINGLE):  # what begins in the last bytes of a text ends in the next one
        keep[(starts + lengths - back)[lengths > back]] = False
    for length in range(1, SHINGLE):
        values[starts[lengths == length]] >>= np.uint64(8 * (SHINGLE - length))
    return values[keep], np.where(lengths > 0, np.maximum(lengths - SHINGLE + 1, 1), 0)


def _mixed(values: Shingles) -> Shingles:
    """Numbers that look random (the finalizer of splitmix64), as MinHash wants its input."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _lengths(texts: pa.Array) -> Ints:
    lengths: Ints = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _cut(rows: Ints, lengths: Ints) -> list[Ints]:
    """Rows in pieces of about SHINGLES_AT_ONCE bytes, and of fewer rows than 24 bits count."""
    ends = np.flatnonzero(np.diff(lengths.cumsum() // SHINGLES_AT_ONCE)) + 1
    return [piece[part] for piece in np.split(rows, ends) for part in _parts(len(piece), 1 << 23)]


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


LEAK_IS_ERROR = (
    0.01  # share of a split: from there on its score says something else than it seems to
)

SPREAD = 0.25  # of the range of a regression's numbers: rows of one text that differ more contradict each other


def check_overlap(
    splits: Mapping[str, Records],
    labels: Mapping[str, SplitLabels | None],
    same: Sameness,
    num_examples: int,
) -> list[Finding]:
    """All findings on texts that occur more than once. splits, labels: by name, train first."""
    found: list[Finding] = []
    for name, records in splits.items():
        found += _duplicates(name, records, same, num_examples)
        if (given := labels[name]) is not None:
            found += _conflicts(name, records, same.texts[name], given, num_examples)
    names = list(splits)
    for at, first in enumerate(names):
        for second in names[at + 1 :]:
            found += _leaks(first, second, splits, same, num_examples)
    if same.pairs is not None:
        found += _near(splits, labels, same, num_examples)
    return found


def _example(
    split: str, records: Records, row: int, note: str = "", like: tuple[str, int] | None = None
) -> Example:
    text, pair = (
        records.texts[row].as_py(),
        None if records.pairs is None else records.pairs[row].as_py(),
    )
    return Example(
        split=split,
        row=int(row),
        text=excerpt(text if pair is None else f"{text} | {pair}"),
        note=note,
        like=like,
    )


def _duplicates(split: str, records: Records, same: Sameness, num_examples: int) -> list[Finding]:
    found = []
    later = repeated(same.texts[split])
    alike = repeated(same.plain[split]) & ~later
    for kind, rows, title, meaning in (
        (
            "duplicates",
            later,
            "the same text again",
            "Rows beyond the first of their text: these texts count several times.",
        ),
        (
            "alike_texts",
            alike,
            "the same text up to case and blanks",
            "An uncased model reads them as the same text.",
        ),
    ):
        if rows.any():
            numbers = same.texts[split] if kind == "duplicates" else same.plain[split]
            values, times = np.unique(numbers[rows], return_counts=True)
            often = values[np.argsort(-times, kind="stable")][:num_examples]
            examples = []
            for value in often:
                holders = np.flatnonzero(numbers == value)
                examples.append(_example(split, records, holders[0], f"{len(holders)} times"))
            found.append(
                Finding(
                    kind=kind,
                    severity="warning" if kind == "duplicates" and rows.mean() >= 0.01 else "note",
                    split=split,
                    title=title,
                    count=int(rows.sum()),
                    total=len(records),
                    meaning=meaning,
                    advice="Keep one of each (--fix does) unless the data really come so often."
                    if kind == "duplicates"
                    else "Nothing for a cased model; for an uncased one make them one before --fix.",
                    examples=tuple(examples),
                    details={"texts": len(values), "most_times": int(times.max()) + 1},
                )
            )
    return found


def conflicting(numbers: Ints, labels: SplitLabels) -> Ints:
    """Numbers of the texts that have contradicting labels, those of most rows first. numbers: (rows,) each row's text."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(numbers[order]) != 0]))
    values = labels.numbers[order] if labels.numbers is not None else labels.codes[order]
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    apart = SPREAD * (values.max() - values.min()) if labels.numbers is not None else 0
    times = np.diff(np.append(starts, len(order)))
    hit = np.flatnonzero(high - low > apart)
    found: Ints = numbers[order][starts[hit]][np.argsort(-times[hit], kind="stable")]
    return found


def _conflicts(
    split: str, records: Records, numbers: Ints, labels: SplitLabels, num_examples: int
) -> list[Finding]:
    texts = conflicting(numbers, labels)
    if not len(texts):
        return []
    examples: list[Example] = []
    for text in texts[:num_examples]:
        rows = np.flatnonzero(numbers == text)
        _, firsts = np.unique(labels.codes[rows], return_index=True)
        examples += [
            _example(split, records, row, labels.name(row)) for row in rows[np.sort(firsts)][:2]
        ]
    severity: Severity = "warning"
    return [
        Finding(
            kind="conflicting_labels",
            severity=severity,
            split=split,
            title="texts with contradicting labels",
            count=len(texts),
            total=len(np.unique(numbers)),
            unit="texts",
            meaning="What one row teaches another one takes back, and no model can score both."
            if labels.numbers is None
            else "Numbers of one text that are more than a quarter of the whole range apart.",
            advice="Settle them by hand; --fix drops all their rows.",
            examples=tuple(examples),
            details={"rows": int(np.isin(numbers, texts).sum())},
        )
    ]


def _leaks(
    first: str, second: str, splits: Mapping[str, Records], same: Sameness, num_examples: int
) -> list[Finding]:
    exact = np.isin(same.texts[second], same.texts[first])
    alike = np.isin(same.plain[second], same.plain[first]) & ~exact
    found = []
    for kind, rows, what in (
        ("leaks", exact, ""),
        ("alike_leaks", alike, " up to case and blanks"),
    ):
        if rows.any():
            found.append(
                Finding(
                    kind=kind,
                    severity="error"
                    if first == "train" and rows.mean() >= LEAK_IS_ERROR
                    else "warning",
                    split=f"{first}/{second}",
                    title=f"rows of {second} that stand in {first}{what}",
                    count=int(rows.sum()),
                    total=len(rows),
                    meaning=f"{second.capitalize()} rows that were seen before: the score of {second} is too good. "
                    f"From {LEAK_IS_ERROR:.0%} of the rows on it is an error."
                    if first == "train"
                    else f"What picks the best weights on {first} has seen these rows of {second}.",
                    advice=f"Take them out of {first} (--fix does)."
                    if first == "train"
                    else f"Take them out of {first}.",
                    examples=_both(first, second, rows, same, splits, kind, num_examples),
                )
            )
    return found


def _both(
    first: str,
    second: str,
    rows: np.ndarray,
    same: Sameness,
    splits: Mapping[str, Records],
    kind: str,
    num: int,
) -> tuple[Example, ...]:
    numbers = same.texts if kind == "leaks" else same.plain
    examples = []
    for row in np.flatnonzero(rows)[:num]:
        other = int(np.argmax(numbers[first] == numbers[second][row]))
        examples.append(_example(second, splits[second], row, like=(first, other)))
    return tuple(examples)


def near_rows(same: Sameness, split: str, other: str) -> Ints:
    """(rows of split,): the row of `other` whose text is nearly the same, -1 where there is none."""
    assert same.pairs is not None
    holder = np.full(len(same.plain_texts), -1, np.int64)  # a row of `other` for each plain text
    numbers = same.plain[other]
    holder[numbers[::-1]] = np.arange(len(numbers))[::-1]  # the first of them
    partner = np.full(len(same.plain_texts), -1, np.int64)
    for one, two in ((same.pairs.left, same.pairs.right), (same.pairs.right, same.pairs.left)):
        known = holder[two] >= 0
        partner[one[known]] = holder[two[known]]
    rows: Ints = partner[same.plain[split]]
    return rows


def _near(
    splits: Mapping[str, Records],
    labels: Mapping[str, SplitLabels | None],
    same: Sameness,
    num_examples: int,
) -> list[Finding]:
    found = []
    names = list(splits)
    for at, first in enumerate(names):
        for second in names[at:]:
            partner = near_rows(same, second, first)
            if first != second:  # rows that are told as leaks already
                partner[np.isin(same.plain[second], same.plain[first])] = -1
            rows = np.flatnonzero(partner >= 0)
            if not len(rows):
                continue
            mine, theirs = labels[second], labels[first]
            details = {}
            if mine is not None and theirs is not None and mine.numbers is None:
                ours, other = mine.names_of(rows), theirs.names_of(partner[rows])
                details["with_another_label"] = sum(
                    one != two for one, two in zip(ours, other, strict=True)
                )
            examples = _near_examples(first, second, rows, partner, splits, num_examples)
            within = first == second
            found.append(
                Finding(
                    kind="near_duplicates" if within else "near_leaks",
                    severity="note" if within else "warning",
                    split=first if within else f"{first}/{second}",
                    title="rows that are nearly another row"
                    if within
                    else f"rows of {second} that are nearly a row of {first}",
                    count=len(rows),
                    total=len(partner),
                    meaning="Their runs of 5 bytes, in lower case, are nearly the same set (Jaccard similarity at least the threshold)"
                    + (
                        f"; {details['with_another_label']:,} have another label than the row they are like."
                        if details
                        else "."
                    ),
                    advice="See whether they are templates or copies; --fix_kinds near_duplicates keeps one of each."
                    if within
                    else f"See whether {second} still asks something new; --fix_kinds near_leaks drops such rows of {first}.",
                    examples=examples,
                    details=details,
                )
            )
    return found


def _near_examples(
    first: str,
    second: str,
    rows: Ints,
    partner: Ints,
    splits: Mapping[str, Records],
    num_examples: int,
) -> tuple[Example, ...]:
    examples: list[Example] = []
    told: set[int] = set()
    for row in rows.tolist():
        other = int(partner[row])
        if len(examples) >= 2 * num_examples:
            break
        if first == second and {row, other} & told:
            continue
        told |= {row, other}
        examples += [
            _example(second, splits[second], row, like=(first, other)),
            _example(first, splits[first], other),
        ]
    return tuple(examples)


def first_of_near(same: Sameness, split: str) -> Sequence[bool]:
    """(rows,): whether no earlier row that is kept is nearly this one; rows that are not kept keep nobody out."""
    assert same.pairs is not None
    numbers = same.plain[split]
    first = np.full(len(same.plain_texts), len(numbers), np.int64)
    np.minimum.at(first, numbers, np.arange(len(numbers)))
    neighbours: dict[int, list[int]] = {}
    for one, two in zip(same.pairs.left.tolist(), same.pairs.right.tolist(), strict=True):
        neighbours.setdefault(one, []).append(two)
        neighbours.setdefault(two, []).append(one)
    dropped: set[int] = set()
    for text in sorted(neighbours, key=lambda number: int(first[number])):
        if first[text] < len(numbers) and text not in dropped:
            dropped.update(other for other in neighbours[text] if first[other] > first[text])
    return [number not in dropped for number in numbers.tolist()]
