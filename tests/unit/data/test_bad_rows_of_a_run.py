"""bad_rows.jsonl has the rows of this run: also of an earlier start, if there is a checkpoint."""

from pathlib import Path

import pytest
from accelerate import Accelerator

from bertdist.core.args import read_config
from bertdist.data.bad_rows import BadRow, BadRows, collect_bad_rows, read_bad_rows

OLD, NEW = (BadRow(name, 3, "no label", "a") for name in ("old.csv", "new.csv"))


@pytest.mark.parametrize("has_checkpoint", [True, False])
@pytest.mark.parametrize("new", [[NEW], []])
def test_rows_of_a_run_without_checkpoints_are_forgotten(
    has_checkpoint: bool, new: list[BadRow], tmp_path: Path
) -> None:
    path = tmp_path / "bad_rows.jsonl"
    BadRows("skip", 9, path).add_and_write([OLD])
    if has_checkpoint:
        (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    words = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--train_file", "new.csv"]
    config = read_config([*words, "--on_bad_row", "skip"])
    expected = [*([OLD] if has_checkpoint else []), *new]
    assert collect_bad_rows(new, config, Accelerator(cpu=True)).rows == expected
    assert read_bad_rows(path) == expected
