"""What differs between runs: settings, rows, software and machines.

    differences = differing_settings([{"seed": 42, ...}, {"seed": 43, ...}])
    [(each.name, each.values) for each in differences]     # [("seed", ("42", "43"))]

A setting that is new decides what is learned, unless it is listed in DECIDES_NOTHING.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from bertdist.core.args import TRAIN_SECTIONS
from bertdist.core.config import plain_duration

NOT_SET = "not set"
SEED = "seed"
# Settings of a run that change neither its weights nor which of them are the best.
DECIDES_NOTHING = frozenset(
    (
        *("dry_run", "verbose", "report_to", "log_every", "save_every"),
        *("save_total_limit", "resume_from_checkpoint", "stop_before_time_limit", "rank_timeout"),
        *("accept_changed_data", "max_bad_rows", "detect_anomaly", "tokens_per_micro_batch"),
        *("dataloader_num_workers", "gradient_checkpointing", "metrics", "test_file", "use_cpu"),
        *("slice_column", "report", "project", "run_name", "seeds", "push_to_hub"),
    )
)
FOLDER = "output_dir"  # differs always
# Rows that are other ones where --validation_split or --test_split draws them with another seed.
DRAWN_ROWS = ("training rows", "validation rows")


@dataclass(frozen=True)
class SettingDifference:
    """A setting, or a fact of the machine, of which not all runs have the same."""

    name: str
    values: tuple[str, ...]  # of each run, in one line; NOT_SET where it has none
    decides: bool  # whether it decides what is learned, and which weights are kept


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> tuple[SettingDifference, ...]:
    """settings: of each run, as in config.yaml. Those that decide what is learned come first; the
    folder of the run is left out.
    """
    differences = [
        SettingDifference(name, values, name not in DECIDES_NOTHING)
        for name, values in _differing([_with_defaults(each) for each in settings])
    ]
    return tuple(sorted(differences, key=lambda each: not each.decides))


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With those that config.yaml leaves out, as that of an earlier version does; comparable."""
    fields = (field for section in TRAIN_SECTIONS for field in dataclasses.fields(section))
    values = {**{field.name: field.default for field in fields}, **settings}
    return {name: plain_duration(value) for name, value in values.items() if name != FOLDER}


def differing_facts(facts: Sequence[Mapping[str, Any]]) -> tuple[SettingDifference, ...]:
    """facts: of each run, as in environment.json; packages by their names, the command left out."""
    flat = []
    for each in facts:
        packages = each.get("packages")
        own = packages if isinstance(packages, Mapping) else {}
        others = {k: v for k, v in each.items() if k not in ("packages", "command")}
        flat.append({**others, **own})
    return tuple(SettingDifference(name, values, False) for name, values in _differing(flat))


def differ_by_seed_only(differences: Iterable[SettingDifference]) -> bool:
    """Whether the seed is all that decides; with it may go the rows that it draws."""
    decisive = {each.name for each in differences if each.decides}
    return SEED in decisive and decisive <= {SEED, *DRAWN_ROWS}


def groups_by_settings(
    settings: Sequence[Mapping[str, Any]], differences: Iterable[SettingDifference]
) -> tuple[tuple[int, ...], ...]:
    """Runs that differ by the seed only, together: positions in `settings`."""
    names = [each for each in differences if each.decides and each.name not in (SEED, *DRAWN_ROWS)]
    groups: dict[tuple[str, ...], list[int]] = {}
    for run in range(len(settings)):
        groups.setdefault(tuple(each.values[run] for each in names), []).append(run)
    return tuple(map(tuple, groups.values()))


def _differing(values: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Names of which not all runs have the same value, in the order in which they come first."""
    names = dict.fromkeys(name for each in values for name in each)
    found = ((name, tuple(_in_one_line(each.get(name)) for each in values)) for name in names)
    return [(name, shown) for name, shown in found if len(set(shown)) > 1]


def _in_one_line(value: Any) -> str:
    if value is None:
        return NOT_SET
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(each, str | int) for each in value):
        return ", ".join(map(str, value))
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("...").strip()
