"""What labels are: numbers or names, and what a column of them means.

A label is text as it is in the source, without blanks around it, or a tuple of such names.
`infer_problem_type` decides from the distinct labels of a training split; its rules are in
docs/guides/tasks.md ("Numbers or classes?").
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from bertdist.core.errors import ConfigError, DataError, listed
from bertdist.core.terminal import excerpt

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"

# Different whole numbers written with a point (1.0, as pandas writes a column of integers with a
# gap) that are read as classes; more of them are numbers to predict.
MOST_CLASSES_WITH_POINT = 20

# Separators of joined labels. The first ones are hardly used inside one label.
_SEPARATORS = (",", ";", "|", "\t", "/", "+", "&", " ")

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+(?:\.0*)?")
_CANONICAL = re.compile(r"(-?(?:0|[1-9][0-9]{0,99}))(?:\.0*)?")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,99}")

LabelValue = str | tuple[str, ...]  # numbers as text: 1 and "1" are one label in every file format
LabelKind = Literal["text", "set"]


def quoted(label: Any) -> str:
    """A label in a message: quoted, with escapes, and cut where it is long."""
    return excerpt(repr(label), 60)


def is_number(label: str) -> bool:
    """Whether a label is spelled as a finite number: digits, a point, an exponent.

    Neither Python's other spellings (1_000, inf, nan) nor digits of other scripts.
    """
    return _NUMBER.fullmatch(label) is not None and math.isfinite(float(label))


def is_integer(label: str) -> bool:
    """Whether a label is the usual spelling of an integer: not 007, +1 or 1.0."""
    return _INTEGER.fullmatch(label) is not None


def has_fractions(labels: Iterable[str]) -> bool:
    """Whether a label is a number that is not spelled as a whole one: 0.5, 1e3, but not 2.0."""
    return any(is_number(label) and not _WHOLE.fullmatch(label) for label in labels)


def canonical(label: str) -> str:
    """One spelling for labels that mean the same: 1 for 1.0, true for True; others as they are."""
    if match := _CANONICAL.fullmatch(label):
        return "0" if match[1] == "-0" else match[1]
    return label.lower() if label.lower() in ("true", "false") else label


def label_names(labels: Iterable[str]) -> dict[str, str]:
    """The name of each distinct label as a class.

    As spelled, but canonical where all are numbers, or where the same label has two spellings.
    """
    distinct = list(dict.fromkeys(labels))
    numbers = all(map(is_number, distinct))
    spellings = Counter(map(canonical, distinct))
    return {
        label: canonical(label) if numbers or spellings[canonical(label)] > 1 else label
        for label in distinct
    }


class LabelIndex:
    """The position of each label among some names: by its spelling, else by its canonical one.

    codes: what a file may have instead of each name.
    """

    def __init__(self, names: Sequence[str], codes: Sequence[str] = ()) -> None:
        self.names = names
        self._exact = {x: i for some in (names, codes) for i, x in reversed([*enumerate(some)])}
        self._canonical = {canonical(name): i for name, i in self._exact.items()}

    def find(self, label: str) -> int | None:
        """None: there is no such name."""
        if (exact := self._exact.get(label)) is not None:
            return exact
        return self._canonical.get(canonical(label))


class LabelStats(NamedTuple):
    """The labels of a training split, which define its task."""

    kind: LabelKind
    values: list[LabelValue]  # distinct
    counts: list[int]  # rows of each
    class_names: tuple[str, ...] | None = None  # names that the source defines, in its order
    column: str = "label"
    locate: Callable[[LabelValue], str] = repr  # file and line of a label's first row
    limit: int | None = None  # --max_train_samples, where it left rows out

    @property
    def names(self) -> list[str]:
        """All names in the values."""
        return [name for value in self.values for name in _names_of(value)]


class LabelNames(NamedTuple):
    """--label_names: the names of the outputs, and the codes that files may have for them."""

    names: list[str]
    codes: list[str]


def read_label_names(given: Sequence[str], labels: Iterable[str]) -> LabelNames:
    """`0=negative 1=positive` are names for the codes 0 and 1; otherwise each item is a name.

    labels: of the training split, by which names that contain "=" are told from codes: where one
    of them is a label, or all labels are among the names, there are no codes. Raises ConfigError.
    """
    distinct = list(dict.fromkeys(labels))
    signed = [item for item in given if "=" in item]
    index, plain = LabelIndex(distinct), LabelIndex(given)
    is_covered = bool(distinct) and all(plain.find(label) is not None for label in distinct)
    if not signed or is_covered or not {*signed}.isdisjoint(distinct):
        return LabelNames(list(given), [])
    if others := [item for item in given if "=" not in item]:
        raise ConfigError(
            f"--label_names has names for codes ({signed[0]}) and names alone ({others[0]}): give "
            "a code for all of them, or for none."
        )
    pairs = []
    for item in given:
        cuts = [at for at, character in enumerate(item) if character == "="]
        known = [at for at in cuts if index.find(item[:at].strip()) is not None]
        if len(known) > 1:
            shown = " and ".join(repr(item[:at]) for at in known[:2])
            raise ConfigError(f"--label_names {item}: both {shown} are labels of the files.")
        at = (known or cuts)[0]
        pairs.append((item[:at].strip(), item[at + 1 :].strip()))
    codes, names = [code for code, _ in pairs], [name for _, name in pairs]
    _check_codes(codes, names)
    in_files = LabelIndex(names, codes)
    if missing := sorted(label for label in distinct if in_files.find(label) is None):
        unknown = [repr(code) for code in codes if index.find(code) is None]
        hint = f" No row has the label {listed(unknown, 3)}." if unknown else ""
        raise ConfigError(
            f"--label_names has no name for {missing[0]!r}, which the training split has.{hint}"
        )
    return LabelNames(names, codes)


def _check_codes(codes: Sequence[str], names: Sequence[str]) -> None:
    for what, items in (("code", codes), ("name", names)):
        if "" in items:
            raise ConfigError(f"--label_names has an empty {what}; expected CODE=NAME.")
        if repeated := [item for item, count in Counter(items).items() if count > 1]:
            raise ConfigError(f"--label_names has the {what} {repeated[0]!r} twice.")
    for code, name in zip(codes, names, strict=True):
        if name != code and name in codes:
            raise ConfigError(
                f"--label_names {code}={name}: {name!r} is the code of another label, and a file "
                "may have codes or names; choose another name."
            )


def match_labels(names: Collection[str], others: Sequence[str]) -> tuple[str, ...] | None:
    """`names` in the order of `others`; None if they are not the same labels up to case."""
    keys: tuple[Callable[[str], str], ...] = (str, canonical, _folded)
    for key in keys:
        by_key = {key(name): name for name in names}
        if len(by_key) == len(names) == len(others) and by_key.keys() == set(map(key, others)):
            return tuple(by_key[key(other)] for other in others)
    return None


def match_to_model(
    names: Iterable[str], model_names: Sequence[str], codes: Sequence[str] = ()
) -> dict[str, str]:
    """The model's name for each label.

    That of its spelling, else its canonical one, else that up to case, blanks and Unicode form; a
    whole number is output N of a model with names such as LABEL_0. codes: other names of the same
    labels. Labels that match none, or several, are left out.
    """
    index, folded = LabelIndex(model_names, codes), Counter(map(_folded, model_names))
    by_folded = {_folded(name): name for name in model_names if folded[_folded(name)] == 1}
    if model_names and all(name == f"LABEL_{i}" for i, name in enumerate(model_names)):
        by_folded |= {str(i): name for i, name in enumerate(model_names)}
    found = {}
    for name in names:
        position = index.find(name)
        match = (
            by_folded.get(_folded(canonical(name))) if position is None else model_names[position]
        )
        if match is not None:
            found[name] = match
    return found


def is_multi_hot(labels: Iterable[Any], outputs: int | None = None) -> bool:
    """Whether labels are lists of one length that hold only 0 and 1.

    outputs: their length; None: any from 2 on. As lists of names, two names "0" and "1" in every
    row would teach nothing, and three such names in a row must repeat one.
    """
    lengths = set()
    for label in labels:
        if not isinstance(label, tuple) or not set(label) <= {"0", "1"}:
            return False
        lengths.add(len(label))
    return len(lengths) == 1 and max(lengths) >= 2 and outputs in (None, *lengths)


class Inferred(NamedTuple):
    """A problem type, and a sentence that says why, and how to get another; "" if asked for."""

    problem_type: str
    reason: str = ""


def infer_problem_type(
    requested: str,
    labels: Mapping[Any, int],
    names: Sequence[str] | None = None,
    locate: Callable[[Any], str] = str,
) -> Inferred:
    """The problem type of a training split.

    requested: --problem_type. labels: the distinct labels, and the rows of each. names: class names
    that are given; labels that are all among them are classes. locate: label -> file and line of
    its first row, for messages.
    Raises DataError for labels that are no answer, ConfigError if `requested` does not fit them.
    """
    is_set = any(isinstance(label, tuple) for label in labels)
    if requested != "auto":
        one_each = is_set and all(len(label) == 1 for label in labels)
        if (requested == MULTI_LABEL) != is_set and not (requested == SINGLE_LABEL and one_each):
            content = "lists of labels"
            if not is_set:
                content = "single values; --label_delimiter or --label_columns make lists of labels"
            raise ConfigError(
                f"--problem_type is {requested}, but the label column holds {content}."
            )
        return Inferred(requested)
    if is_set:
        row_of = {
            str(name): label for label in labels if isinstance(label, tuple) for name in label
        }
        if (joined := find_joined(row_of)) is not None:  # by another separator than the one given
            where = locate(row_of[joined[1]])
            raise DataError(_describe_joined(*joined, where, MULTI_LABEL))
        return _infer_set(labels, locate)
    if names is not None:
        index = LabelIndex(names)
        if all(index.find(label) is not None for label in labels):
            return Inferred(SINGLE_LABEL)
    numbers = [label for label in labels if is_number(label)]
    spelled = {canonical(label): label for label in labels}
    if spelled.keys() <= {"0", "1", "true", "false"} and numbers and len(numbers) < len(labels):
        raise DataError(_describe_truth_values(spelled, locate))
    if not numbers or len(numbers) < len(labels):
        if (joined := find_joined(labels)) is not None:
            raise DataError(_describe_joined(*joined, locate(joined[1]), SINGLE_LABEL))
        if odd := non_numeric_labels(labels):
            raise DataError(_describe_odd(odd, labels, locate))
        return Inferred(SINGLE_LABEL, _describe_numbers_and_names(labels, numbers, locate))
    found, other = REGRESSION, SINGLE_LABEL
    different = len(set(map(canonical, numbers)))
    if has_fractions(numbers):
        what = "numbers with fractions, to be predicted as numbers"
    elif different > MOST_CLASSES_WITH_POINT and any("." in label for label in numbers):
        what = f"{different:,} different numbers with a point, to be predicted as numbers"
    else:
        found, other, what = SINGLE_LABEL, REGRESSION, "whole numbers, each a class"
    return Inferred(found, f"Labels: {what} (--problem_type {other} overrules this).")


def _describe_truth_values(spelled: Mapping[str, str], locate: Callable[[Any], str]) -> str:
    """spelled: canonical label -> one spelling."""
    word = spelled.get("true") or spelled["false"]
    number = spelled.get("1") or spelled["0"]
    return (
        f"{locate(word)}: label {word!r}, but {number!r} in {locate(number)}: numbers and truth "
        "values are different labels. Write one of them in all rows, or keep each as a class with "
        f"--problem_type {SINGLE_LABEL}."
    )


def _describe_numbers_and_names(
    labels: Mapping[Any, int], numbers: Sequence[str], locate: Callable[[Any], str]
) -> str:
    """A sentence where there are several of both; else ""."""
    names = [label for label in labels if not is_number(label)]
    if min(len(names), len(numbers)) < 2:
        return ""
    groups = (
        f"{listed(list(map(quoted, group)), 3)} (first in {locate(group[0])})"
        for group in (numbers, names)
    )
    return f"Labels: {' and '.join(groups)} are different classes; if not, write them alike."


def describe_differing(files: Sequence[tuple[str, Iterable[Any]]]) -> str:
    """A sentence on the first file of which no label is one of another file; else "".

    files: name and distinct labels of each. Not where each file has one label, or all labels are
    numbers.
    """
    names = [
        {canonical(name) for label in labels for name in _names_of(label)} for _, labels in files
    ]
    files_of = Counter(name for own in names for name in own)
    for (file, _), own in zip(files, names, strict=True):
        others = files_of.keys() - own
        is_named = not all(map(is_number, files_of))
        is_alone = all(files_of[name] == 1 for name in own)
        if min(len(own), len(others)) > 1 and is_named and is_alone:
            shown, theirs = (listed(sorted(map(quoted, labels)), 3) for labels in (own, others))
            return f"{file} has no label in common with the other files: {shown}; {theirs}"
    return ""


def _names_of(label: Any) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (label,)


def _infer_set(labels: Mapping[Any, int], locate: Callable[[Any], str]) -> Inferred:
    if is_multi_hot(labels):
        outputs = len(next(iter(labels)))
        return Inferred(
            MULTI_LABEL,
            f"Labels: lists of {outputs} zeros and ones, one for each label "
            "(--label_names names them).",
        )
    names = {name for label in labels for name in label}
    if has_fractions(names) and all(map(is_number, names)):
        first = next(label for label in labels if has_fractions(label))
        raise DataError(
            f"{locate(first)}: a list of numbers with fractions ({_shown(first)}); expected "
            "names of labels, or a 0 or 1 for each label. Probabilities are no labels here; if "
            f"these numbers are names, pass --problem_type {MULTI_LABEL}."
        )
    for label in labels:
        if len(set(label)) < len(label):
            raise DataError(
                f"{locate(label)}: a list of {len(label)} zeros and ones "
                f"({_shown(label)}); expected lists of zeros and ones of one length in all "
                "rows, or lists of label names."
            )
    overrule = ""
    if all(len(label) == 1 for label in labels):
        overrule = f" with one label in each row (--problem_type {SINGLE_LABEL} overrules this)"
    return Inferred(MULTI_LABEL, f"Labels: lists of labels{overrule}.")


def _shown(label: Sequence[str]) -> str:
    return listed([excerpt(name, 60) for name in label])


def non_numeric_labels(labels: Mapping[Any, int]) -> list[str]:
    """The labels that are no numbers, where nearly all others are.

    With fractions among the numbers: where fewer than half of the rows have such a label. With
    whole numbers, which may be names: where at most one row in 20 has one, and each of them is
    rarer than half of the rows of a number on average.
    """
    numbers = {label: count for label, count in labels.items() if is_number(label)}
    others = {label: count for label, count in labels.items() if label not in numbers}
    if not numbers or not others:
        return []
    number_rows, other_rows = sum(numbers.values()), sum(others.values())
    if has_fractions(numbers):
        return list(others) if other_rows < number_rows else []
    is_rare = max(others.values()) * 2 < number_rows / len(numbers)
    return list(others) if is_rare and other_rows * 20 <= number_rows + other_rows else []


def _describe_odd(odd: list[str], labels: Mapping[Any, int], locate: Callable[[Any], str]) -> str:
    rows, total = sum(labels[label] for label in odd), sum(labels.values())
    also = listed([f"{quoted(label)} ({locate(label)})" for label in odd[1:5]], 3)
    also = f"; also {also}" if also else ""
    return (
        f"{locate(odd[0])}: label {quoted(odd[0])} is not a number, as those of "
        f"{total - rows:,} of {total:,} rows are{also}. Correct these labels, or leave their rows "
        f"out with --on_bad_row skip, or keep all labels as classes with --problem_type "
        f"{SINGLE_LABEL}."
    )


def find_joined(labels: Iterable[str]) -> tuple[str, str] | None:
    """The separator and the first of labels that look like several labels joined by it.

    They do where nearly all labels with the separator consist of parts that are labels by
    themselves, or (with , ; | or tab) parts of other such labels, or more than half of which are
    labels by themselves. So 'Paris, France' does not.
    Also where all labels are as many zeros and ones ('1 0 0'), or numbers with a comma ('0,5').
    """
    labels = set(labels) if not isinstance(labels, Mapping) else labels
    for separator in _SEPARATORS:
        joined = {
            label: [part.strip() for part in label.split(separator)]
            for label in labels
            if separator in label
        }
        if not joined:
            continue
        if len(joined) == len(labels) and is_multi_hot(map(tuple, joined.values())):
            return separator, next(iter(joined))
        if separator == "," and all(is_number(label.replace(",", ".", 1)) for label in labels):
            return separator, next(iter(joined))
        parts_of = Counter(part for parts in joined.values() for part in set(parts))
        known = alone = {part for part in parts_of if part in labels and part not in joined}
        if separator in ",;|\t":
            known = alone | {part for part, count in parts_of.items() if count > 1}
        elif separator == " ":  # words are joined by blanks too
            known = alone = set(filter(is_integer, alone))
        good = [
            label
            for label, parts in joined.items()
            if len(set(parts)) == len(parts)
            and all(parts)
            and (known.issuperset(parts) or len(alone.intersection(parts)) * 2 > len(parts))
        ]
        if good and len(good) * 10 >= len(joined) * 9:
            return separator, good[0]
    return None


def _describe_joined(separator: str, label: str, where: str, problem_type: str) -> str:
    shown = {" ": "space", "\t": "tab"}.get(separator, separator)
    is_number_too = separator == "," and is_number(label.replace(",", ".", 1))
    decimal = " Numbers must have a decimal point." if is_number_too else ""
    return (
        f"{where}: label {quoted(label)} looks like several labels joined by {shown!r}. "
        f"Pass --label_delimiter {shown!r} to split them, or --problem_type {problem_type} to keep "
        f"each as one class.{decimal}"
    )


LIKENESS = "case, blanks, invisible characters or Unicode form"


def alike_labels(names: Iterable[str]) -> list[list[str]]:
    """The groups of labels that differ only in LIKENESS."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe_alike(names: Iterable[str]) -> str:
    """One line on `alike_labels`; "" if there are none."""
    alike = alike_labels(names)
    if not alike:
        return ""
    differ = " or ".join(dict.fromkeys(_difference(*group[:2]) for group in alike))
    shown = "; ".join(" and ".join(map(_as_ascii, group[:3])) for group in alike[:3])
    more = f"; and {len(alike) - 3:,} more" if len(alike) > 3 else ""
    return f"Labels that differ only in {differ} are trained as different labels: {shown}{more}."


def describe_near_miss(label: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown label that is alike one of the names, else ""."""
    for name in names:
        if _folded(name) == _folded(label):
            difference = _difference(name, label)
            differs = f"It differs from {_as_ascii(label)} only in {difference}."
            return f" Did you mean {_as_ascii(name)}? {differs}"
    return ""


def _as_ascii(label: str) -> str:
    return excerpt(ascii(label), 60)


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", _visible(name)).casefold().split())


def _visible(name: str) -> str:
    """Without zero-width spaces, soft hyphens, byte order marks and the like."""
    return "".join(char for char in name if unicodedata.category(char) != "Cf")


def _difference(one: str, other: str) -> str:
    """In what two names differ that are alike."""
    forms: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")
    for form in forms:
        if unicodedata.normalize(form, one) == unicodedata.normalize(form, other):
            return f"Unicode form ({_form(one, form)} and {_form(other, form)})"
    if one.split() == other.split():
        return "blanks"
    if one.casefold() == other.casefold():
        return "case"
    is_visible = _visible(one) == _visible(other)
    return "invisible characters" if is_visible else LIKENESS


def _form(name: str, composed: Literal["NFC", "NFKC"]) -> str:
    decomposed: Literal["NFD", "NFKD"] = "NFD" if composed == "NFC" else "NFKD"
    if unicodedata.normalize(composed, name) == name:
        return composed
    return decomposed if unicodedata.normalize(decomposed, name) == name else f"not {composed}"


def confusions(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The wrong predictions of an evaluation.json, the most frequent ones first: `label`,
    `predicted`, `rows`.
    """
    if "confusion" not in report:
        return list(report.get("confusions", []))
    labels = report["labels"]
    wrong = [
        {"label": labels[i], "predicted": labels[j], "rows": rows}
        for i, row in enumerate(report["confusion"])
        for j, rows in enumerate(row)
        if rows and i != j
    ]
    return sorted(wrong, key=lambda entry: -entry["rows"])
