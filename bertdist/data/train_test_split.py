"""Which rows of the training files --validation_split and --test_split hold out.

The part of a row is decided by the row alone: xxh3 of its text (and its second text) with
--split_seed (by default --seed), as a number from 0 to 1, is below the share of the validation
rows, or at least 1 - the share of the test rows, or in between: a training row. So

- rows added later, other files, their order, ranks, workers and --streaming change no row's part;
- rows of the same text up to case and white space are in one part;
- every label is held out with the same probability: of n texts with a label the share is held out
  up to the error of n coin flips, not exactly. docs/decisions/0020-held-out-rows.md says why.
"""

from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from bertdist.core.config import DataConfig, share_of
from bertdist.core.errors import DataError, listed
from bertdist.data.columns import filter_rows
from bertdist.data.records import Records, rows_fingerprint
from bertdist.data.source import RowLocations, select_locations
from bertdist.tasks.labels import has_fractions

Part: TypeAlias = Literal["train", "validation", "test"]
MOST_LABELS = 1_000  # of a check for labels without training rows


class HoldOut(NamedTuple):
    """How the rows of the training files are divided."""

    validation: float  # share, 0: none
    test: float
    seed: int

    def is_in(self, part: Part, records: Records) -> npt.NDArray[np.bool_]:
        """(rows,) whether each row is in a part."""
        texts = normalize_texts(joined_texts(records)).to_pylist()
        digest, seed = xxhash.xxh3_64_intdigest, self.seed
        digests = np.array([digest(text.encode(), seed) for text in texts], np.uint64)
        position = digests / 2.0**64
        if part == "validation":
            return np.asarray(position < self.validation)
        if part == "test":
            return np.asarray(position >= 1 - self.test)
        return np.asarray((position >= self.validation) & (position < 1 - self.test))

    def select(self, part: Part, records: Records) -> Records:
        """The rows of a part, without fingerprint. All labels stay: they are outputs of the model,
        whichever part has them.
        """
        chosen = self.is_in(part, records)
        ends = np.cumsum(records.rows_per_file)
        counts = np.diff(np.concatenate([[0], np.cumsum(chosen)])[[0, *ends]])
        return replace(
            records,
            location=select_locations(records.location, np.flatnonzero(chosen)),
            label_indices=None if records.label_indices is None else records.label_indices[chosen],
            all_labels=True,
            texts=filter_rows(records.texts, chosen),
            pairs=None if records.pairs is None else filter_rows(records.pairs, chosen),
            slices=None
            if records.slices is None or part == "train"
            else filter_rows(records.slices, chosen),
            fingerprint="",
            rows_per_file=tuple(counts.tolist()),
            bad_rows=records.bad_rows if part == "train" else (),
            one_file=False,
            format_notes=records.format_notes if part == "train" else (),
        )

    def flag(self, part: Part) -> str:
        """`--validation_split 0.1`: what holds out a part."""
        return f"--{part}_split {getattr(self, part):g}"


def hold_out_of(data: DataConfig, seed: int) -> HoldOut | None:
    """The division that the flags ask for; None without any."""
    if not data.train_file:
        return None
    validation, test = (share_of(x) or 0.0 for x in (data.validation_split, data.test_split))
    seed = seed if data.split_seed is None else data.split_seed
    return HoldOut(validation, test, seed) if validation or test else None


def divide(records: Records, hold_out: HoldOut, data: DataConfig) -> dict[str, Records]:
    """All rows of the training files -> "train", and "validation" and "test" where they are asked
    for. Raises DataError where a part has no rows.
    """
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    parts: list[Part] = ["train", "validation", "test"]
    found: dict[str, Records] = {}
    for part in parts:
        if part == "train" or getattr(hold_out, part):
            rows = hold_out.select(part, records)
            if not len(rows):
                of = f" of the {len(records):,} row{'s' * (len(records) > 1)}"
                raise no_rows_error(records.name, part, hold_out, of)
            limit = limits.get(part)
            of = f"of {len(records):,} held out of"
            if limit and limit < len(rows):
                rows = replace(rows.slice(0, limit), limit=limit, rows_per_file=())
                of = "held out of"
            rows = replace(rows, fingerprint=rows_fingerprint(rows))
            found[part] = rows if part == "train" else with_note(rows, part, hold_out, of)
    if unseen := _labels_without_rows(found["train"]):
        note = f"No training row has the label{'s' * (len(unseen) > 1)} {listed(unseen)}: "
        note += "all such rows are held out, and the model cannot learn them"
        train = found["train"]
        found["train"] = replace(train, format_notes=(*train.format_notes, note))
    return found


def no_rows_error(name: str, part: Part, hold_out: HoldOut, of: str = "") -> DataError:
    """Of a part of the files `name` without rows."""
    if part != "train":
        return DataError(
            f"{hold_out.flag(part)} holds out none{of} of {name}: give a larger share, or a file "
            f"of its own (--{part}_file)."
        )
    held: list[Part] = ["validation", "test"]
    flags = " and ".join(hold_out.flag(x) for x in held if getattr(hold_out, x))
    return DataError(f"No training row is left{of} of {name} ({flags}): give a smaller share.")


def with_note(rows: Records, part: Part, hold_out: HoldOut, of: str) -> Records:
    """The rows of a part with a sentence on them, for the start of a run."""
    limit = f", --max_eval_samples {rows.limit}" if rows.limit else ""
    note = f"{part.capitalize()} rows: {len(rows):,} {of} {rows.name}"
    return replace(rows, format_notes=(f"{note} ({hold_out.flag(part)}{limit})",))


def _labels_without_rows(records: Records) -> list[str]:
    """Labels, as in messages, that other parts have only; none of numbers."""
    values = records.label_values
    assert records.label_indices is not None
    names = [value for value in values if isinstance(value, str)]
    if len(values) > MOST_LABELS or len(names) < len(values) or has_fractions(names):
        return []
    counts = np.bincount(records.label_indices, minlength=len(values))
    return [repr(name) for name, count in zip(names, counts, strict=True) if not count]


def copied_locations(records: Records) -> RowLocations:
    """The locations of some rows, without what locates all rows of their chunk."""
    locations = [records.location(row) for row in range(len(records))]
    return RowLocations(((0, locations.__getitem__, 0),))


# ---- Texts that count as equal


def joined_texts(records: Records) -> pa.Array:
    """(rows,) large_string: each text, with its second text if there is one."""
    if records.pairs is None:
        return records.texts
    record_separator = pa.scalar("\x1e", pa.large_string())
    return pc.binary_join_element_wise(records.texts, records.pairs, record_separator)


def normalize_texts(texts: pa.Array) -> pa.Array:
    """In lower case, without white space at the ends, single spaces in between."""
    spaced = pc.replace_substring_regex(pc.utf8_lower(texts), r"[\s\pZ]+", " ")
    return pc.utf8_trim_whitespace(spaced)


def text_numbers(records: Records) -> npt.NDArray[np.int64]:
    """(rows,) a number per text: equal for texts that are equal up to case and white space."""
    numbers = normalize_texts(joined_texts(records)).dictionary_encode().indices
    return np.asarray(numbers.to_numpy(zero_copy_only=False).astype(np.int64))
