"""A comparison of runs on the terminal: the answer, scores, settings that differ, changed rows.

show_comparison(comparison)
"""

from collections.abc import Sequence

from bertdist.core.terminal import excerpt, show, show_table
from bertdist.reporting.comparison import Comparison, SplitComparison
from bertdist.reporting.differing_settings import SettingDifference
from bertdist.reporting.score_differences import Difference, Score
from bertdist.reporting.verdict import shown, towards

NAME_COLUMNS, VALUE_COLUMNS = 30, 40
MOST_COLUMNS = 3  # runs that are columns; more are rows
SHOWN_SETTINGS = 15


def show_comparison(comparison: Comparison) -> None:
    """Print it to standard output."""
    show(*comparison.verdict)
    for split in comparison.splits:
        show("", *(note for note in split.notes if note not in comparison.verdict[0]))
        _show_scores(comparison, split)
    _show_settings(comparison)
    _show_changes(comparison)


def _show_scores(comparison: Comparison, split: SplitComparison) -> None:
    names = [excerpt(name, NAME_COLUMNS) for name in comparison.names]
    if not split.scores:
        rows = [[name, *map(shown, values)] for name, values in split.reported.items()]
        show_table(
            f"Scores, each run on its own {split.name} rows",
            ["score", *names],
            rows,
            _from(1, names),
        )
        return
    title = f"Scores on the same {split.rows:,} {split.name} rows"
    if len(names) == 2:
        header = ["score", *names, "difference", "95% interval", f"{names[1]} better"]
        rows = [
            [each.name, *map(shown, each.values), *_cells(split.differences[each.name][0])]
            for each in split.scores
        ]
        show_table(title, header, rows, range(1, len(header)))
        return
    header = ["run", *(each.name for each in split.scores)]
    table = zip(names, *(map(shown, each.values) for each in split.scores), strict=True)
    show_table(title, header, list(map(list, table)), range(1, len(header)))
    if split.main is not None and not comparison.seeds_only:
        _show_pairs(names, split.main, split.differences[split.main.name])


def _show_pairs(names: Sequence[str], score: Score, pairs: Sequence[Difference]) -> None:
    """The differences to the best run."""
    best = max(range(len(names)), key=lambda run: score.sign * score.values[run])
    rows = []
    for pair in pairs:
        if best in (pair.a, pair.b) and pair.interval is not None:
            other = pair.a if pair.b == best else pair.b
            low, high = towards(pair, best, score.sign)
            lead = abs(pair.value)
            sure = "yes" if pair.is_sure else "not sure"
            rows.append([names[other], shown(lead), f"{shown(low)} to {shown(high)}", sure])
    header = [f"{names[best]} against", f"lead in {score.name}", "95% interval", "better"]
    show_table(f"The best run, {names[best]}, against the others", header, rows, (1, 2))


def _cells(pair: Difference) -> list[str]:
    ends = pair.interval or ()
    interval = " to ".join(f"{end:.3g}" for end in ends)
    probability = "" if pair.probability is None else f"{pair.probability:.1%}"
    return [f"{pair.value:+.4g}", interval, probability]


def _show_settings(comparison: Comparison) -> None:
    names = [excerpt(name, NAME_COLUMNS) for name in comparison.names]
    decisive = [each for each in comparison.settings if each.decides]
    if decisive:
        shown_ones = decisive[:SHOWN_SETTINGS]
        if len(names) <= MOST_COLUMNS:
            header = ["setting", *names]
            rows = [[x.name, *(excerpt(v, VALUE_COLUMNS) for v in x.values)] for x in shown_ones]
        else:
            header = ["setting", "values"]
            rows = [[each.name, _by_value(each, names)] for each in shown_ones]
        show_table("Settings that differ", header, rows)
    others = [each.name for each in (*comparison.settings, *comparison.facts) if not each.decides]
    if more := len(decisive) - SHOWN_SETTINGS:
        others = [f"{more} settings"] * (more > 0) + others
    if others:
        show(f"Also different: {', '.join(others)}.")


def _by_value(difference: SettingDifference, names: Sequence[str]) -> str:
    """`1e-05: a, b; 2e-05: c`."""
    groups: dict[str, list[str]] = {}
    for name, value in zip(names, difference.values, strict=True):
        groups.setdefault(value, []).append(name)
    return "; ".join(
        f"{excerpt(x, VALUE_COLUMNS)}: {', '.join(runs)}" for x, runs in groups.items()
    )


def _show_changes(comparison: Comparison) -> None:
    split = comparison.splits[0]
    for each in split.changes:
        a, b = comparison.names[each.a], comparison.names[each.b]
        if each.p_value is None:
            show(f"From {a} to {b}: {each.gained:,} numbers are nearer, {each.lost:,} farther.")
        else:
            show(
                f"From {a} to {b}: {each.gained:,} rows turn right, {each.lost:,} turn wrong "
                f"(McNemar's exact test: p = {each.p_value:.2g})."
            )


def _from(first: int, names: Sequence[str]) -> range:
    return range(first, first + len(names))
