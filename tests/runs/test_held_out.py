"""--validation_split of a run: the same rows for any ranks, in memory and streamed; a resume with another share."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import run_ranks
from rows import Files, json_of, make_rows, run_train, step_log, words_of, write_rows

from bertdist.core.errors import CheckpointError

ROWS = 48


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rows = tmp_path_factory.mktemp("rows"), make_rows(ROWS, seed=4)
    return [
        write_rows(folder / "a.tsv", rows[: ROWS // 2]),
        write_rows(folder / "b.tsv", rows[ROWS // 2 :]),
    ]


def words(model: Path, out: Path, files: list[Path], **settings: Any) -> list[str]:
    usual = {"validation_split": 0.3, "num_train_epochs": 1, "early_stopping_patience": 3}
    return words_of(model, out, Files(files[0], None), **{**usual, "train_file": files, **settings})


def test_ranks_and_streams_hold_out_the_same_rows(
    tiny_model: Path, files: list[Path], tmp_path: Path
) -> None:
    (one,) = run_ranks(1, run_train, words(tiny_model, tmp_path / "one", files))
    two = run_ranks(2, run_train, words(tiny_model, tmp_path / "two", files))
    streamed = {"streaming": True, "stream_sharding": "by_file"}
    run_ranks(2, run_train, words(tiny_model, tmp_path / "by_file", files, **streamed))
    truths = [
        [entry["truth"] for entry in json_of(tmp_path / name / "predictions.jsonl")]
        for name in ("one", "two", "by_file")
    ]
    held = len(truths[0])
    assert truths[0] == truths[1] == truths[2] and 4 < held < 24
    trained = [sorted(row for _, rows in seen for row in rows) for _, seen, _ in (one, *two)]
    assert trained[0] == sorted(trained[1] + trained[2]) == list(range(ROWS - held))
    said = " ".join(one[2].split())
    assert f"Validation rows: {held} of {ROWS} held out of 2 files (--validation_split 0.3)" in said
    # The control: the same files without a share are trained whole, and nothing is evaluated.
    whole = words(
        tiny_model, tmp_path / "all", files, validation_split=None, early_stopping_patience=None
    )
    ((_, seen, _),) = run_ranks(1, run_train, whole)
    assert sum(len(rows) for _, rows in seen) == ROWS
    assert step_log(tmp_path / "one", "eval") and not step_log(tmp_path / "all", "eval")

    def tell(accelerator: Accelerator, arguments: list[str]) -> str:
        with pytest.raises(CheckpointError) as error:
            run_train(accelerator, arguments)
        return str(error.value)

    # Rows that were trained on are not evaluated on after a resume, whatever else is accepted.
    other = words(
        tiny_model, tmp_path / "one", files, validation_split=0.2, accept_changed_data=True
    )
    assert (
        "validation_split  0.3     0.2  rows that were trained on" in run_ranks(1, tell, other)[0]
    )
