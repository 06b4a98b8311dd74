"""Labels that hardly belong together are named: 0/1 with true/false, numbers with names, files without a common label."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator

from bertdist.core.args import read_config
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_splits
from bertdist.data.stats import collect_stats
from bertdist.tasks.tasks import Task, create_task

ALONE = Accelerator(cpu=True)
MODES = pytest.mark.parametrize("mode", [[], ["--streaming"]], ids=["memory", "streaming"])


def load(
    folder: Path, mode: list[str], *labels: Sequence[str], **flags: str
) -> tuple[Task, list[str]]:
    """The task, and the notes, of one file with each of these labels."""
    (folder / "out").mkdir(exist_ok=True)
    paths = [folder / f"{name}.csv" for name in "abc"[: len(labels)]]
    for path, own in zip(paths, labels, strict=True):
        path.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate(own)))
    words = ["--model_name_or_path", "m", "--output_dir", str(folder / "out"), *mode]
    words += [word for name, value in flags.items() for word in (f"--{name}", value)]
    config = read_config([*words, "--train_file", *map(str, paths)])
    rows = load_splits(config).train
    stats = collect_stats(rows, config, ALONE, lambda text: None)
    assert stats is not None
    return create_task(config.task, stats.labels, None), [*rows.format_notes, *stats.notes]


@MODES
def test_zeros_and_ones_beside_true_and_false_are_refused(mode: list[str], tmp_path: Path) -> None:
    bits, words = ["0", "1", "0", "1"], ["true", "False"] * 2
    found = r"b\.csv line 2: label 'true', but '1' in a\.csv line 3: .* --problem_type single_label"
    with pytest.raises(DataError, match=found):
        load(tmp_path, mode, bits, words)
    with pytest.raises(DataError, match=r"a\.csv line 6: label 'true', but '1' in a\.csv line 3"):
        load(tmp_path, mode, bits + words)
    task, _ = load(tmp_path, mode, bits, words, problem_type="single_label_classification")
    assert len(task.labels) == 4
    for own in (bits, words):  # the control
        assert len(load(tmp_path, mode, own, own)[0].labels) == 2


@MODES
def test_numbers_beside_names_are_named(mode: list[str], tmp_path: Path) -> None:
    task, notes = load(tmp_path, mode, ["0", "1"], ["neg", "pos"])
    assert task.reason == (
        "Labels: '0', '1' (first in a.csv line 2) and 'neg', 'pos' (first in b.csv line 2) are "
        "different classes; if not, write them alike."
    )
    assert notes == ["a.csv has no label in common with the other files: '0', '1'; 'neg', 'pos'"]
    assert load(tmp_path, mode, ["1", "other"], ["1", "2"])[0].reason == ""  # the controls
    assert load(tmp_path, mode, ["neg", "pos"], ["neg"])[1] == []


@MODES
def test_files_without_a_common_label_are_noted(mode: list[str], tmp_path: Path) -> None:
    found = load(tmp_path, mode, ["x", "y"], ["x", "y"], ["z", "w"])[1]
    assert found == ["c.csv has no label in common with the other files: 'w', 'z'; 'x', 'y'"]
    for labels in (["x"], ["y"]), (["x", "y"], ["y", "z"]), (["1", "2"], ["3", "4"]):
        assert load(tmp_path, mode, *labels)[1] == []


@MODES
def test_long_labels_are_shown_in_part(mode: list[str], tmp_path: Path) -> None:
    long = "x" * 5000
    for labels in (
        ["1", "true" + long, "1"] * 30,
        ["0.5", long, "1.5", "2.5"],
        [f"{long},{long}y"],
    ):
        quoted = [f'"{label}"' for label in labels]
        with pytest.raises(DataError, match=r"'?(true)?xxx.*\.\.\.") as caught:
            task = load(tmp_path, mode, [*quoted, *quoted[:1], long, f"{long}y"][:99])[0]
            task.encode_label("y" * 5000)
        assert len(str(caught.value)) < 600 and "x" * 30 in str(caught.value)
