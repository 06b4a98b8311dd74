"""`--try` of `bertdist sweep`: which values of which settings of training are tried.

space = read_space(["learning_rate=1e-5..5e-4:log", "train_batch_size=16,32"])
check_space(space, config)       # each value, by the checks that the flags of train have
with_values(config, {"learning_rate": 3e-5, "train_batch_size": 16})

a..b         any number from a to b; whole numbers for a setting of whole numbers
a..b:log     the same, drawn evenly on a logarithmic scale
a..b:0.05    a, a + 0.05, ... up to b
x,y,z        these values, such as eval_every="1 epoch,200 steps"
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

from bertdist.core.args import TRAIN_SECTIONS, config_problems, unknown_setting
from bertdist.core.config import TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.core.flags import Flag, create_parser, flags_of

# The settings that decide how a model learns, not on what and not where.
TRIED = (
    *("model_name_or_path", "model_revision", "max_length", "dropout", "freeze"),
    *("class_weights", "label_smoothing_factor", "train_batch_size"),
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "layerwise_lr_decay"),
    *("num_train_epochs", "max_train_steps", "mixed_precision", "eval_every"),
    *("early_stopping_patience", "early_stopping_threshold"),
)
_REFUSED = {
    "output_dir": "each trial has a folder of its own in it",
    "seed": "the best seed is luck; `bertdist train --seeds 5` shows the spread",
    "seeds": "`bertdist train --seeds 5` compares seeds",
    "folds": "a trial is one run; give rows to compare on as --validation_file",
}
_NOT_TRIED = "it does not decide how a model learns, or its scores would not compare"

Value: TypeAlias = str | int | float


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float  # int for a setting of whole numbers
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_int(self) -> bool:
        """Whether only whole numbers are tried."""
        return isinstance(self.low, int)

    def ends(self) -> list[Value]:
        """The lowest and the highest value."""
        return [self.low, self.high]

    def grid(self) -> list[Value] | None:
        """All values; None if there is no end of them."""
        if self.log or (self.step is None and not self.is_int):
            return None
        step = Decimal(str(self.step or 1))
        number = int((Decimal(str(self.high)) - Decimal(str(self.low))) / step)
        kind = int if self.is_int else float
        return [kind(Decimal(str(self.low)) + step * k) for k in range(number + 1)]

    def __str__(self) -> str:
        how = ":log" if self.log else f":{self.step}" if self.step is not None else ""
        return f"{self.low}..{self.high}{how}"


@dataclass(frozen=True)
class Choices:
    """Some values."""

    values: tuple[Value, ...]

    def ends(self) -> list[Value]:
        """All of them: each is checked."""
        return list(self.values)

    def grid(self) -> list[Value] | None:
        """All of them."""
        return list(self.values)

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Dimension: TypeAlias = Range | Choices
Space: TypeAlias = dict[str, Dimension]


def shown(value: Value) -> str:
    """A value as it is shown: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_space(words: Sequence[str]) -> Space:
    """The words of --try. Raises ConfigError with one line per problem."""
    flags = {flag.name: flag for section in TRAIN_SECTIONS for flag in flags_of(section)}
    space: Space = {}
    problems = []
    for word in words:
        name, equals, text = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not equals:
            problems.append(
                f"--try {word!r}: expected name=values, such as learning_rate=1e-5..5e-4:log."
            )
        elif name not in flags:
            problems.append(f"--try {word}: {unknown_setting(name, [*flags])}")
        elif name in _REFUSED or name not in TRIED:
            problems.append(f"--try {name}: {_REFUSED.get(name, _NOT_TRIED)}.")
        elif name in space:
            problems.append(f"--try {name} is given a second time.")
        else:
            try:
                space[name] = _read_values(text, flags[name])
            except ConfigError as error:
                problems.append(f"--try {word}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return space


def _read_values(text: str, flag: Flag) -> Dimension:
    is_number = flag.type in (int, float) and not flag.many
    if is_number and ".." in text:
        return _read_range(text, flag)
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise ConfigError("a value is empty; expected a..b, or values with commas between them.")
    values = [_parse(part, flag) for part in parts]
    if len(set(values)) < len(values):
        raise ConfigError("a value is given twice.")
    if len(values) == 1:
        raise ConfigError(f"there is one value only; give it as --{flag.name} {text}.")
    return Choices(tuple(values))


def _read_range(text: str, flag: Flag) -> Range:
    ends, colon, how = text.partition(":")
    low_text, _, high_text = ends.partition("..")
    low, high = (_number(part, flag) for part in (low_text, high_text))
    if not low < high:
        raise ConfigError(f"{low_text.strip()} is not below {high_text.strip()}.")
    if how == "log":
        if low <= 0:
            raise ConfigError("a logarithmic scale begins above 0.")
        return Range(low, high, log=True)
    if not colon:
        return Range(low, high)
    step = _number(how, flag, "expected :log, or a step such as a..b:0.05")
    if step <= 0 or (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise ConfigError(
            f"steps of {how.strip()} from {low_text.strip()} do not reach {high_text.strip()}."
        )
    return Range(low, high, step=step)


def _number(text: str, flag: Flag, expected: str = "") -> float:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        value = Decimal("NaN")
    whole = flag.type is int
    if not value.is_finite() or (whole and value % 1):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{text.strip()!r} is not {kind}{'; ' * bool(expected)}{expected}.")
    return int(value) if whole else float(value)


def _parse(text: str, flag: Flag) -> Value:
    """A value as the flag takes it; of a flag of several values the text."""
    words = text.split() if flag.many else [text]
    namespace = create_parser(TRAIN_SECTIONS).parse_args([f"--{flag.name}={words[0]}"])
    value = getattr(namespace, flag.name)
    return text if flag.many else value


def with_values(config: TrainConfig, values: Mapping[str, Value]) -> TrainConfig:
    """The config with some settings replaced."""
    flags = {flag.name: flag for section in TRAIN_SECTIONS for flag in flags_of(section)}
    sections = {}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        own: dict[str, Any] = {
            name: str(value).split() if flags[name].many else value
            for name, value in values.items()
            if hasattr(section, name)
        }
        sections[field.name] = dataclasses.replace(section, **own)
    return TrainConfig(**sections)


def as_flags(values: Mapping[str, Value]) -> list[str]:
    """The values as words of a command line; numbers keep all their digits."""
    flags = {flag.name: flag for section in TRAIN_SECTIONS for flag in flags_of(section)}
    words = []
    for name, value in values.items():
        words += [f"--{name}", *str(value).split()] if flags[name].many else [f"--{name}={value}"]
    return words


def check_space(space: Space, config: TrainConfig) -> None:
    """Raise ConfigError if the config, or a value of the space with it, would be refused.

    Ends of ranges and choices, each alone and then in pairs, with the first values of the other
    settings: no check is about three of them.
    """
    has_steps = "max_train_steps" in space or config.run.max_train_steps is not None
    if "num_train_epochs" in space and has_steps:
        raise ConfigError(
            "--try num_train_epochs has no effect: --max_train_steps says how long a run is."
        )
    first = {name: dimension.ends()[0] for name, dimension in space.items()}
    alone = [{name: value} for name, of in space.items() for value in of.ends()]
    pairs = (
        {one: x, other: y}
        for one, other in itertools.combinations(space, 2)
        for x, y in itertools.product(space[one].ends(), space[other].ends())
    )
    before = _problems(config, first)
    problems: dict[str, None] = {}
    for values in alone:
        problems |= dict.fromkeys(
            f"--try {_words(values)}: {problem}"
            for problem in _problems(config, {**first, **values})
            if problem not in before
        )
    if not (problems or before):
        for values in pairs:
            if found := _problems(config, {**first, **values}):
                problems = {f"--try {_words(values)}: {found[0]}": None}
                break
    if lines := [*before, *problems]:
        raise ConfigError("\n".join(lines))


def _problems(config: TrainConfig, values: Mapping[str, Value]) -> list[str]:
    return list(config_problems(with_values(config, values)))


def _words(values: Mapping[str, Value]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def grid_of(space: Space) -> Iterable[dict[str, Value]]:
    """All combinations, the last setting first. Raises ConfigError for a range without steps."""
    grids: dict[str, list[Value]] = {}
    for name, dimension in space.items():
        values = dimension.grid()
        if values is None:
            raise ConfigError(
                f"--sampler grid tries all values, and {name}={dimension} has no end of them: give "
                "a step (a..b:step), or values with commas between them."
            )
        grids[name] = values
    return [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
