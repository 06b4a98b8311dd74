"""Several `Records` as one: files that are learned from together, and pieces of a stream that make a window.

One module, because what labels of different sources have in common must be the same however the rows came.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pyarrow as pa
import xxhash

from bertdist.columns import Codes, LabelKind, LabelValue
from bertdist.errors import DataError
from bertdist.places import Placed
from bertdist.records import Records


def join(found: Sequence[Records], name: str) -> Records:
    """Several records as one, in their order. Raises DataError where their labels are of different kinds, or only some are pairs."""
    first = found[0]
    if len(found) == 1:
        return first
    for other in found:
        if (other.pairs is None) != (first.pairs is None):
            raise DataError(
                f"{other.name} and {first.name} differ: one has pairs of texts. Name --text_column, and --text_pair_column."
            )
        if other.class_names != first.class_names:
            names = f"{other.class_names} and {first.class_names}"
            raise DataError(
                f"{other.name} and {first.name} differ in the names of their labels: {names}."
            )
    starts = [0, *accumulate(map(len, found))]
    kind, values, codes = _joined_labels(found)
    return replace(
        first,
        source=Placed(
            name,
            first.source.has_header,
            tuple((at, one.source.where, 0) for at, one in zip(starts, found, strict=False)),
        ),
        label_kind=kind,
        label_values=values,
        label_codes=codes,
        texts=pa.concat_arrays([one.texts for one in found]),
        pairs=None if first.pairs is None else pa.concat_arrays([one.pairs for one in found]),
        fingerprint=xxhash.xxh3_128_hexdigest(" ".join(one.fingerprint for one in found).encode()),
        bad=tuple(row for one in found for row in one.bad),
        guessed=tuple(told for one in found for told in one.guessed),
    )


def _joined_labels(
    found: Sequence[Records],
) -> tuple[LabelKind | None, list[LabelValue], Codes | None]:
    first = found[0]
    if first.label_codes is None:
        return None, [], None
    kind = first.label_kind
    seen: list[LabelValue] = []
    for one in found:
        kind = common_kind(kind, seen, one.label_kind, one.label_values, one.where(0))
        seen += one.label_values
    places: dict[LabelValue, int] = {}
    codes = []
    for one in found:
        assert one.label_codes is not None
        of_value = [
            places.setdefault(as_kind(kind, value), len(places)) for value in one.label_values
        ]
        codes.append(np.array(of_value, np.int32)[one.label_codes])
    return kind, list(places), np.concatenate(codes)


def common_kind(
    kind: LabelKind | None,
    values: Iterable[LabelValue],
    other: LabelKind | None,
    others: Iterable[LabelValue],
    where: str,
) -> LabelKind | None:
    """The kind of label that rows share with others, which begin at `where`: numbers take in whole numbers, and so do texts that are some.

    Raises DataError where they share none.
    """
    kinds = {kind, other}
    if len(kinds) == 1:
        return kind
    if kinds == {"integer", "number"}:
        return "number"
    if kinds == {"text", "integer"} and all(
        re.fullmatch(r"-?\d+", str(value)) for value in [*values, *others]
    ):
        return "text"
    raise DataError(
        f"{where}: the labels are of kind {other!r}, those before of kind {kind!r}; expected one kind in all rows."
    )


def as_kind(kind: LabelKind | None, value: LabelValue) -> LabelValue:
    """A label as one of a common kind."""
    if kind == "text":
        return str(value)
    return float(value) if kind == "number" and isinstance(value, int) else value
