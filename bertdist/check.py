"""Check data before training: labels, tables, texts, duplicates, leaks and lengths.

    bertdist check --train_file train.tsv --validation_file dev.tsv \
        --model_name_or_path google-bert/bert-base-uncased
    bertdist check --train_file train.tsv --output check.json --fix clean.parquet

With --folds or --model it finds label issues instead (`data_quality.label_issues`). The exit code
is 0 if nothing is worse than a warning, 1 if there are errors in the data or in the arguments.
"""

import os
import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder
        # above.
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from bertdist.core.args import parse_or_exit
    from bertdist.data_quality.config import check_start, read_check_arguments

    # Before torch is imported, which takes seconds
    parsed_config = parse_or_exit(read_check_arguments, check_start)

from collections.abc import Iterator, Sequence
from pathlib import Path

from bertdist.core.atomic_io import to_json
from bertdist.core.config import DataConfig, ModelConfig, TaskConfig, TrainConfig
from bertdist.core.errors import DataError
from bertdist.core.output_files import write_output
from bertdist.core.terminal import (
    EXIT_STOPPED,
    Cell,
    encodable,
    excerpt,
    process_rank,
    show,
    show_table,
)
from bertdist.data.tokenization import load_tokenizer
from bertdist.data_quality.cleaning import dropped_path, write_cleaned
from bertdist.data_quality.config import (
    DEFAULT_FIX_KINDS,
    CheckConfig,
    LabelIssueConfig,
)
from bertdist.data_quality.findings import ExampleRow, Finding, counts, percent, summary
from bertdist.data_quality.length_checks import Lengths
from bertdist.data_quality.report import REFUSED_ROWS, DataReport, check_data
from bertdist.distributed.launch import run_cli

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
SHOWN_LABELS = 24  # more than a screen has lines for are in check.json only
BAR_WIDTH = 30  # characters of the longest bar


def check(config: CheckConfig, data: DataConfig) -> DataReport:
    """Check all splits as the flags say. Raises BertdistError."""
    tokenizer = None
    if config.model_name_or_path is not None or config.tokenizer_name is not None:
        model = ModelConfig(
            model_name_or_path=config.model_name_or_path or "",
            model_revision=config.model_revision,
            tokenizer_name=config.tokenizer_name,
            max_length=config.max_length,
        )
        tokenizer = load_tokenizer(model)
        if model.model_name_or_path:
            from bertdist.models.classifier import load_model_config
            from bertdist.models.model_config import check_vocabulary

            model_config = load_model_config(model)
            show(*check_vocabulary(model_config, tokenizer, model.model_name_or_path))
    return check_data(
        data,
        test_file=data.test_file,
        tokenizer=tokenizer,
        max_length=config.max_length,
        task=TaskConfig(problem_type=config.problem_type),
        near_threshold=config.near_threshold,
        num_examples=config.examples,
        seed=config.seed,
        without_refused=True,
    )


def show_report(report: DataReport) -> None:
    """Print splits, labels, lengths and findings as tables."""
    rows = []
    for name, records in report.splits.items():
        columns = [records.text_column, *([records.pair_column] if records.pair_column else [])]
        label = records.label_column or "none"
        if records.label_column is None and records.class_names:
            label = f"{len(records.class_names)} columns"
        texts = ", ".join(excerpt(column, 30) for column in columns)
        source = excerpt(records.name, 60)
        rows.append([name, f"{len(records):,}", source, texts, excerpt(label, 30)])
    show_table("Splits", ["split", "rows", "source", "text", "label"], rows, right=[1])
    _show_labels(report)
    _show_lengths(list(report.lengths.values()))
    if report.findings:
        cells = list(map(_finding_cells, report.findings))
        show_table("Findings", ["count", "finding"], cells, lines=True)
    show(*report.notes)
    show(f"{summary(report.findings)}.")


def _show_labels(report: DataReport) -> None:
    labels = {name: own for name, own in report.labels.items() if own is not None}
    ranges = {name: own.summary() for name, own in labels.items() if own.numbers is not None}
    if ranges:
        shown = {"least": "min", "most": "max"}
        header = ["split", *(shown.get(name, name) for name in next(iter(ranges.values())))]
        rows = [[name, *(f"{n:.4g}" for n in of.values())] for name, of in ranges.items()]
        show_table("Regression targets", header, rows, right=range(1, len(header)))
    frequencies = {name: own.counts() for name, own in labels.items() if own.numbers is None}
    if "train" not in frequencies:
        return
    names = list(frequencies["train"])  # labels that only other splits have are findings
    rows = []
    for name in names[:SHOWN_LABELS]:
        row = [excerpt(name, 40)]
        for split, counted in frequencies.items():
            count = counted.get(name, 0)
            row.append(f"{count:,}  {count / len(report.splits[split]):6.1%}")
        rows.append(row)
    more = f" (the {SHOWN_LABELS} most frequent of {len(names):,})" * (len(names) > SHOWN_LABELS)
    header = ["label", *frequencies]
    show_table(f"Rows per label{more}", header, rows, right=range(1, len(header)))
    sizes = {name: own.sizes() for name, own in labels.items() if own.multi}
    if sizes:
        listed = (
            f"{name} mean {size.mean():.2f}, max {size.max()}" for name, size in sizes.items()
        )
        show(f"Labels per row: {'; '.join(listed)}.")


def _show_lengths(lengths: Sequence[Lengths]) -> None:
    train = lengths[0]
    rows = []
    for entry in lengths:
        numbers = [*entry.percentiles.values(), entry.longest]
        row = [entry.split, f"{entry.mean_words:,.1f}", f"{entry.mean:,.1f}"]
        row += [f"{number:,}" for number in numbers]
        rows.append([*row, *([f"{entry.truncated:.1%}"] if entry.max_length else [])])
    header = ["split", "mean words", "mean", *(f"{share}%" for share in train.percentiles), "max"]
    if train.max_length:
        header.append(f"> {train.max_length}")
    show_table(
        f"Lengths in {train.unit}: mean, percentiles and maximum",
        header,
        rows,
        right=range(1, len(header)),
    )
    if not train.max_length:
        show("No tokenizer: pass --model_name_or_path to count tokens.")
    most = max(count for _, _, count in train.histogram)
    bars, full, less = [], encodable("█", "#"), encodable("·", ".")
    for low, high, count in train.histogram:
        bar = full * round(BAR_WIDTH * count / most) or less * (count > 0)
        bars.append([f"{low:,} to {high:,}", f"{count:,}", bar])
    title = f"Rows of {train.split} per number of {train.unit}"
    show_table(title, [train.unit, "rows", ""], bars, right=[0, 1])


def _finding_cells(finding: Finding) -> list[Cell]:
    share = "" if finding.share is None else f"\n{percent(finding.share)}"
    severity = (finding.severity, STYLES[finding.severity])
    return [[severity, (f"\n{finding.quantity}{share}", "")], list(_finding_text(finding))]


def _finding_text(finding: Finding) -> Iterator[tuple[str, str]]:
    """(text, style) parts."""
    yield f"{finding.split}: {finding.title}", "bold"
    yield f"\n{finding.meaning}", ""
    yield f"\n{encodable('→', '->')} {finding.advice}", "green"
    for example in finding.examples:
        yield f"\n{example.where}", "cyan"
        yield f"  {example.note}" if example.note else "", ""
        if example.like and not example.like_text:
            yield from _other_row(example)
        yield f"\n  {example.text or '(empty)'}", "dim"
        if example.like_text:
            yield from _other_row(example)
            yield f"\n  {example.like_text}", "dim"


def _other_row(example: ExampleRow) -> Iterator[tuple[str, str]]:
    yield "\nand ", ""
    yield example.like, "cyan"
    yield f"  {example.like_note}" if example.like_note else "", ""


def check_labels(config: LabelIssueConfig, train_config: TrainConfig) -> int:
    """Find label issues (--model, --folds); returns the exit code."""
    # Imported here: a data report needs nothing of what training loads.
    from bertdist.data_quality.label_issues import find_label_issues
    from bertdist.predict import Predictor
    from bertdist.train import train

    def train_fold(config: TrainConfig) -> bool:
        return train(config).finished

    return 0 if find_label_issues(config, train_config, train_fold, Predictor) else EXIT_STOPPED


def check_rows(config: CheckConfig, data: DataConfig) -> int:
    """Show and write the data report, and with --fix the cleaned rows; returns the exit code.

    Under a launcher only rank 0 does anything.
    """
    if process_rank() != 0:
        return 0
    report = check(config, data)
    show_report(report)
    if config.output is not None:
        write_output(config.output, to_json(report.as_dict(), indent=1))
        show(f"Written: {config.output}.")
    refused = [x for x in report.findings if x.kind == REFUSED_ROWS and x.split == "train"]
    if config.fix is not None and refused:
        raise DataError(
            f"--fix {config.fix} would lose the {refused[0].quantity} that cannot be read: correct "
            "them in the source file, or let it leave them out with --on_bad_row skip, which lists "
            f"them in {dropped_path(Path(config.fix))}. Nothing was written to {config.fix}."
        )
    if config.fix is not None:
        path, kinds = Path(config.fix), config.fix_kinds or list(DEFAULT_FIX_KINDS)
        done = write_cleaned(report, kinds, path, config.near_threshold)
        total = len(report.splits["train"]) + done.skipped
        numbers = {f"dropped ({kind})": count for kind, count in done.dropped.items()}
        numbers |= {"repaired (encoding)": done.repaired, "skipped (bad rows)": done.skipped}
        listed = [f"{what}: {count:,}" for what, count in numbers.items() if count]
        columns = f"{done.columns} column{'s' * (done.columns != 1)}"
        changes = "No row was dropped or changed."
        if listed:
            changes = f"Rows {', '.join(listed)}; all of them are in {dropped_path(path)}."
        show(
            *(f"{note}." for note in done.notes),
            f"Written: {path}, {done.rows:,} of {total:,} rows with {columns}.",
            changes,
            f"To train on them: {done.flags}",
        )
    return 1 if counts(report.findings)["error"] else 0


def run(config: tuple[CheckConfig, DataConfig] | tuple[LabelIssueConfig, TrainConfig]) -> int:
    """Check rows, or labels; returns the exit code: 1 if there are errors in the data."""
    first, second = config
    if isinstance(first, LabelIssueConfig):
        assert isinstance(second, TrainConfig)
        return check_labels(first, second)
    assert isinstance(second, DataConfig)
    return check_rows(first, second)


if __name__ == "__main__":
    run_cli(run, parsed_config)
