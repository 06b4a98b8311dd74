"""A look at the data before GPUs are paid for.

    python -m bertdist.check --train_file train.tsv --validation_file dev.tsv --model_name_or_path google-bert/bert-base-uncased
    python -m bertdist.check --train_file train.tsv --output check.json --fix clean.parquet

What it looks for is told module by module: labels, tables, text_health, duplicates and overlap, lengths. Exit code 0: nothing worse than a
warning; 1: errors, or one line for what a user can mend.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bertdist.core.args import names_given
from bertdist.core.atomic_io import atomic_write, to_json
from bertdist.core.config import DataConfig, ModelConfig
from bertdist.core.errors import DataError
from bertdist.core.terminal import Cell, excerpt, show, show_table
from bertdist.data.tokenization import load_tokenizer
from bertdist.data_quality.cleaning import dropped_path, write_fixed
from bertdist.data_quality.config import USUAL_FIX_KINDS, CheckConfig, read_check_config
from bertdist.data_quality.findings import Finding, counts, percent
from bertdist.data_quality.length_checks import Lengths
from bertdist.data_quality.report import DataReport, check_data
from bertdist.distributed.launch import run_cli

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}

SHOWN_LABELS = 24  # more labels than a screen has lines are in check.json only

BAR = 30  # characters of the longest bar


def check(config: CheckConfig, data: DataConfig) -> DataReport:
    """What the command line does, short of showing it."""
    for flag, path in (("output", config.output), ("fix", config.fix)):
        if path is not None and not Path(path).parent.is_dir():
            raise DataError(f"--{flag} {path}: there is no folder {Path(path).parent}.")
    tokenizer = None
    if config.model_name_or_path is not None or config.tokenizer_name is not None:
        model = ModelConfig(
            model_name_or_path=config.model_name_or_path or "",
            model_revision=config.model_revision,
            tokenizer_name=config.tokenizer_name,
            max_length=config.max_length,
        )
        tokenizer = load_tokenizer(model)
    return check_data(
        data,
        test_file=config.test_file,
        tokenizer=tokenizer,
        max_length=config.max_length,
        problem_type=config.problem_type,
        near_threshold=config.near_threshold,
        num_examples=config.examples,
    )


def show_inspection(found: DataReport) -> None:
    """Splits, labels, lengths and findings as tables on standard output."""
    show_table(
        "Splits",
        ["split", "rows", "source", "text", "label"],
        [
            [
                name,
                f"{len(records):,}",
                excerpt(records.name, 60),
                excerpt(records.text_column, 30)
                + (f", {excerpt(records.pair_column, 30)}" if records.pair_column else ""),
                excerpt(
                    records.label_column
                    or (f"{len(records.class_names)} columns" if records.class_names else "none"),
                    30,
                ),
            ]
            for name, records in found.splits.items()
        ],
        right=[1],
    )
    _show_labels(found)
    _show_lengths(list(found.lengths.values()))
    if found.findings:
        show_table(
            "Findings",
            ["how many", "what"],
            [_row(finding, found) for finding in found.findings],
            lines=True,
        )
    show(*found.notes)
    number = counts(found.findings)
    show(
        ", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in number.items())
        + "."
    )


def _show_labels(found: DataReport) -> None:
    numbers = {
        name: labels.range()
        for name, labels in found.labels.items()
        if labels is not None and labels.numbers is not None
    }
    if numbers:
        header = ["split", *next(iter(numbers.values()))]
        rows = [[name, *(f"{value:.4g}" for value in of.values())] for name, of in numbers.items()]
        show_table("Labels are numbers", header, rows, right=range(1, len(header)))
    given = {
        name: labels.counts()
        for name, labels in found.labels.items()
        if labels is not None and labels.numbers is None
    }
    if "train" not in given:
        return
    names = list(given["train"])  # labels of other splits that train lacks are findings
    rows = [
        [
            excerpt(name, 40),
            *(
                _share(counts_of.get(name, 0), len(found.splits[split]))
                for split, counts_of in given.items()
            ),
        ]
        for name in names
    ]
    more = f" (the first {SHOWN_LABELS} of {len(names)})" if len(names) > SHOWN_LABELS else ""
    show_table(
        f"Rows by label{more}",
        ["label", *given],
        rows[:SHOWN_LABELS],
        right=range(1, len(given) + 1),
    )
    sets = {
        name: labels.sizes()
        for name, labels in found.labels.items()
        if labels is not None and labels.several
    }
    if sets:
        show(
            "Labels a row: "
            + "; ".join(
                f"{name} {sizes.mean():.2f}, at most {sizes.max()}" for name, sizes in sets.items()
            )
            + "."
        )


def _show_lengths(lengths: Sequence[Lengths]) -> None:
    unit = lengths[0].unit
    told = [
        [
            entry.split,
            f"{entry.mean_words:,.1f}",
            f"{entry.mean:,.1f}",
            *(f"{value:,}" for value in entry.percentiles.values()),
            f"{entry.longest:,}",
            *([f"{entry.truncated:.1%}"] if entry.max_length else []),
        ]
        for entry in lengths
    ]
    limit = [f"> {lengths[0].max_length}"] if lengths[0].max_length else []
    header = [
        "split",
        "words",
        "mean",
        *(f"{share}%" for share in lengths[0].percentiles),
        "longest",
        *limit,
    ]
    show_table(f"Lengths in {unit}", header, told, right=range(1, len(header)))
    if not limit:
        show("No tokenizer: --model_name_or_path counts tokens.")
    histogram = lengths[0].histogram
    most = max(rows for _, _, rows in histogram)
    bars = [
        [f"{low:,} to {high:,}", f"{rows:,}", "█" * round(BAR * rows / most) or "·" * (rows > 0)]
        for low, high, rows in histogram
    ]
    show_table(f"Rows of {lengths[0].split} by {unit}", [unit, "rows", ""], bars, right=[0, 1])


def _share(count: int, total: int) -> str:
    return f"{count:,}  {count / total:6.1%}"


def _row(finding: Finding, found: DataReport) -> list[Cell]:
    unit = finding.unit.removesuffix("s") if finding.count == 1 else finding.unit
    share = "" if finding.share is None else f"\n{percent(finding.share)}"
    return [
        [(finding.severity, STYLES[finding.severity]), (f"\n{finding.count:,} {unit}{share}", "")],
        list(_told(finding, found)),
    ]


def _told(finding: Finding, found: DataReport) -> Iterator[tuple[str, str]]:
    yield f"{finding.split}: {finding.title}", "bold"
    yield f"\n{finding.meaning}", ""
    yield f"\n→ {finding.advice}", "green"
    for example in finding.examples:
        yield f"\n{found.where.get((example.split, example.row), example.split)}", "cyan"
        if told := [example.note] * bool(example.note) + [
            f"like {found.where[example.like]}" for _ in (1,) if example.like is not None
        ]:
            yield f"  {', '.join(told)}", ""
        yield f"\n  {example.text or '(empty)'}", "dim"


def main() -> None:
    """The command line. Exit codes: see `run_cli`; also 1 where there are errors in the data."""
    run_cli(_main)


def _main(arguments: Sequence[str]) -> int:
    if {"model", "folds"} & names_given(arguments):
        # With all that training imports, which a check of the data does not need.
        from bertdist.data_quality.label_issues import show_label_issues

        return show_label_issues(arguments)
    config, data = read_check_config(arguments)
    found = check(config, data)
    show_inspection(found)
    if config.output is not None:
        atomic_write(Path(config.output), to_json(found.as_dict(), indent=1))
        show(f"Written: {config.output}.")
    if config.fix is not None:
        path, kinds = Path(config.fix), config.fix_kinds or list(USUAL_FIX_KINDS)
        mended = write_fixed(found, kinds, path, data.label_delimiter, config.near_threshold)
        left = mended.pop("rows")
        told = ", ".join(f"{kind} {count:,}" for kind, count in mended.items())
        show(
            f"Written: {path}, {left:,} of {len(found.splits['train']):,} rows ({told}), and {dropped_path(path)}."
        )
    return 1 if counts(found.findings)["error"] else 0


if __name__ == "__main__":
    main()
