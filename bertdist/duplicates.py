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
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.records import Records

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
