"""I1, I3 and I5 for rows that are never held together: windows of a stream, files of a rank, mixtures."""

import gzip
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    Files,
    assert_same_run,
    assert_same_tensors,
    at_step,
    checkpoints_of,
    die,
    last_checkpoint,
    make_rows,
    rows_by_step,
    run_train,
    some_of,
    step_log,
    tensors_of,
    words_of,
    write_rows,
    write_split,
)
from servers import s3_server
from undisturbed import run_on_ranks_in_turn

from bertdist.data import streaming as stream
from bertdist.training.checkpoint import TrainState

ROWS, STEP, EPOCHS = 38, 8, 2  # five steps an epoch, the last of 6 rows
STEPS = 10
STREAM = {
    "streaming": True,
    "stream_window": 16,
    "num_train_epochs": EPOCHS,
    "eval_every": "4 steps",
    "save_every": "3 steps",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_split(tmp_path_factory.mktemp("files"), ROWS, 12)


def words(model: Path, out: Path, files: Any, **settings: Any) -> list[str]:
    return words_of(
        model,
        out,
        files,
        **{**STREAM, "log_every": "2 steps", "tokens_per_micro_batch": 60, **settings},
    )


# --- Windows


def test_a_window_that_holds_all_rows_is_a_run_over_rows_in_memory(
    tiny_model: Path, tmp_path: Path, files: Any
) -> None:
    run_ranks(2, run_train, words(tiny_model, tmp_path / "stream", files, stream_window=40))
    plain = words(tiny_model, tmp_path / "memory", files, streaming=None, stream_window=None)
    run_ranks(2, run_train, [word for word in plain if word != "--streaming"])
    assert step_log(tmp_path / "stream") == step_log(tmp_path / "memory")
    assert_same_tensors(
        tensors_of(last_checkpoint(tmp_path / "stream")),
        tensors_of(last_checkpoint(tmp_path / "memory")),
    )


@pytest.fixture(scope="module")
def straight(
    tiny_model: Path, files: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Path, Any]]:
    """Ranks -> run folder and rows of every step of a run that nobody disturbed."""
    found = {}
    for n in (1, 2, 3):
        out = tmp_path_factory.mktemp("straight") / "out"
        found[n] = (
            out,
            rows_by_step(
                [seen for _, seen, _ in run_ranks(n, run_train, words(tiny_model, out, files))]
            ),
        )
    return found


def test_every_row_once_an_epoch_in_steps_that_do_not_know_the_ranks(
    straight: dict[int, tuple[Path, Any]],
) -> None:
    steps = straight[1][1]
    assert straight[2][1] == straight[3][1] == steps
    assert [len(rows) for rows in steps.values()] == [8, 8, 8, 8, 6] * EPOCHS
    for epoch in range(EPOCHS):
        assert sorted(
            row for number in range(5 * epoch, 5 * epoch + 5) for row in steps[number]
        ) == list(range(ROWS))
    assert all(max(steps[number]) < 16 for number in (0, 1, 5, 6)), (
        "the first window is that of the first rows"
    )
    assert steps[0] != steps[5], "each epoch has its own order"


@pytest.mark.parametrize(("n", "workers"), some_of([(1, 1), (3, 2)], [(1, 2)]))
def test_workers_change_nothing(
    tiny_model: Path, tmp_path: Path, files: Any, straight: Any, n: int, workers: int
) -> None:
    run_ranks(
        n, run_train, words(tiny_model, tmp_path / "out", files, dataloader_num_workers=workers)
    )
    assert_same_run(tmp_path / "out", straight[n][0])


@pytest.mark.parametrize(("n", "first", "second"), some_of([(1, 1, 6), (3, 3, 8)], [(2, 4, 5)]))
def test_resume_equals_uninterrupted(
    tiny_model: Path, tmp_path: Path, files: Any, straight: Any, n: int, first: int, second: int
) -> None:
    """Killed in the middle of a window, asked to stop in another, gone on with other workers."""
    given = words(tiny_model, tmp_path / "out", files)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(n, run_train, given, at_step(first, die))
    run_ranks(
        n,
        run_train,
        [*given, "--dataloader_num_workers", "2"],
        at_step(second, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    )
    run_ranks(n, run_train, given)
    assert_same_run(tmp_path / "out", straight[n][0])


def test_stopped_on_4_ranks_it_goes_on_with_2_then_3_then_1(
    tiny_model: Path, tmp_path: Path, files: Any, straight: Any
) -> None:
    """In the middle of a window, at its end, and in the next epoch; the control is that of rows in memory (test_resume.py)."""
    given = words(tiny_model, tmp_path / "out", files)
    steps, _ = run_on_ranks_in_turn(given, [4, 2, 3, 1], [0, 3, 6])
    assert steps == straight[1][1]
    for mine, expected in zip(step_log(tmp_path / "out"), step_log(straight[1][0]), strict=True):
        assert mine == pytest.approx(expected, abs=1e-5)


def test_a_place_that_is_not_kept_is_seen(
    tiny_model: Path, tmp_path: Path, files: Any, straight: Any
) -> None:
    """A resume that begins the stream anew takes other rows."""

    def forget(accelerator: Accelerator) -> None:
        advance = TrainState.advance
        TrainState.advance = lambda self, step, loss: advance(  # type: ignore[method-assign]
            self, replace(step, next_reader_state=None), loss
        )

    given = words(tiny_model, tmp_path / "out", files)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(
            1,
            run_train,
            given,
            lambda accelerator: (forget(accelerator), at_step(7, die)(accelerator))[1],
        )
    seen = rows_by_step([seen for _, seen, _ in run_ranks(1, run_train, given)])
    assert seen[6] != straight[1][1][6]


# --- Files of a rank


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of 3 to 19 rows, and the same as .gz."""
    folder = tmp_path_factory.mktemp("many")
    for number, count in enumerate((19, 3, 7, 5, 11)):
        path = write_rows(folder / f"train{number}.tsv", make_rows(count, seed=number))
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder


def test_ranks_read_files_of_their_own(tiny_model: Path, tmp_path: Path, many: Path) -> None:
    """45 rows on 3 ranks, which take 3, 3 and 2 a step: the third has 15 rows and is the last one, after 8 steps."""
    given = words_of(
        tiny_model,
        tmp_path / "out",
        pattern_of(many),
        streaming=True,
        stream_sharding="by_file",
        num_train_epochs=2,
        seed=5,
    )
    found = run_ranks(3, run_train, given)
    steps = rows_by_step([seen for _, seen, _ in found])
    assert found[0][0].step == len(steps) == 16
    for epoch in (0, 1):
        assert (
            Counter(
                row for number in range(8 * epoch, 8 * epoch + 8) for row in steps[number]
            ).most_common(1)[0][1]
            == 1
        )
        assert sum(len(steps[number]) for number in range(8 * epoch, 8 * epoch + 8)) == 45
    assert len(steps[0]) == 8 and len(steps[7]) < 3, "ranks that ran out wait for the last"


def pattern_of(folder: Path) -> Any:
    return Files(folder / "train*.tsv")


def kill_and_compare(
    n: int, straight: list[str], killed: list[str], steps: Sequence[int], outs: Sequence[Path]
) -> None:
    """Killed before each of `steps`, with another number of loader workers at each start, a run ends as the one that nobody disturbed."""
    run_ranks(n, run_train, straight)
    for workers, step in enumerate([*steps, -1]):
        given = [*killed, "--dataloader_num_workers", str((workers + 1) % 3)]
        if step < 0:
            run_ranks(n, run_train, given)
        else:
            with pytest.raises(RankError, match="ended with status 9"):
                run_ranks(n, run_train, given, at_step(step, die))
    assert step_log(outs[0]) == step_log(outs[1])
    assert_same_tensors(*(tensors_of(last_checkpoint(out)) for out in outs))


@pytest.mark.parametrize("n", some_of([3], [1, 2]))
def test_own_files_go_on_where_they_were(
    tiny_model: Path, tmp_path: Path, many: Path, n: int
) -> None:
    settings = {
        "streaming": True,
        "stream_sharding": "by_file",
        "num_train_epochs": 2,
        "save_every": "2 steps",
        "stream_window": 4,
    }
    outs, files = [tmp_path / "straight", tmp_path / "out"], Files(many / "train*.tsv.gz")
    straight, killed = (words_of(tiny_model, out, files, **settings) for out in outs)
    kill_and_compare(n, straight, killed, [3, 11], outs)


def test_own_files_do_not_go_on_with_other_ranks_in_an_epoch(
    tiny_model: Path, tmp_path: Path, many: Path
) -> None:
    settings = {"streaming": True, "stream_sharding": "by_file", "save_every": "2 steps"}
    given = words_of(tiny_model, tmp_path / "out", pattern_of(many), **settings)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(3, run_train, given, at_step(3, die))
    with pytest.raises(
        RankError, match="was written by 3 processes with --stream_sharding by_file"
    ):
        run_ranks(2, run_train, given)


def test_own_files_go_on_with_other_ranks_between_two_epochs(
    tiny_model: Path, tmp_path: Path, many: Path
) -> None:
    settings = {
        "streaming": True,
        "stream_sharding": "by_file",
        "max_train_steps": 16,
        "save_every": "1 epoch",
    }
    given = words_of(tiny_model, tmp_path / "out", pattern_of(many), **settings)
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(3, run_train, given, at_step(9, die))
    steps = rows_by_step([seen for _, seen, _ in run_ranks(2, run_train, given)])
    epochs = [[row for number in range(8, end) for row in steps[number]] for end in range(9, 17)]
    assert min(steps) == 8 and any(len(epoch) == len(set(epoch)) == 45 for epoch in epochs), (
        "each of two ranks reads half of the files"
    )


# --- Mixtures


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_decide_what_is_learned(tiny_model: Path, tmp_path: Path, streaming: bool) -> None:
    """8 and 24 rows, equal weights: 16 of the 32 rows of an epoch are the small file's, each twice."""
    small, large = (
        write_rows(tmp_path / "small.tsv", make_rows(8, 1)),
        write_rows(tmp_path / "large.tsv", make_rows(24, 2)),
    )
    settings = {"train_file": [small, large], "train_weights": [1, 1], "num_train_epochs": 3}
    given = words_of(tiny_model, tmp_path / "out", pattern_of(tmp_path), **settings)
    given += ["--streaming", "--stream_window", "16"] if streaming else []
    one = rows_by_step([seen for _, seen, _ in run_ranks(1, run_train, given)])
    assert len(one) == 12 and all(len(rows) == 8 for rows in one.values())
    if not streaming:
        every = [
            Counter(row for number in range(4 * epoch, 4 * epoch + 4) for row in one[number])
            for epoch in range(3)
        ]
        assert all(sum(times for row, times in of.items() if row < 8) == 16 for of in every)
        assert all(sum(of[row] for of in every) == 6 for row in range(8)) and all(
            sum(of[row] for of in every) == 2 for row in range(8, 32)
        )


def mixture_in(folder: Path | str) -> dict[str, Any]:
    """Two globs, of which one has the small files."""
    return {
        "train_file": [f"{folder}/train[13].tsv.gz", f"{folder}/train[024].tsv.gz"],
        "train_weights": [1, 2],
        "streaming": True,
        "stream_window": 16,
        "save_every": "2 steps",
    }


@pytest.mark.parametrize("n", some_of([2], [1, 3]))
def test_a_mixture_goes_on_where_it_was(
    tiny_model: Path, tmp_path: Path, many: Path, n: int
) -> None:
    outs = [tmp_path / "straight", tmp_path / "out"]
    straight, killed = (
        words_of(tiny_model, out, pattern_of(many), **mixture_in(many)) for out in outs
    )
    kill_and_compare(n, straight, killed, [3, 9], outs)


@pytest.mark.parametrize("sharding", some_of(["by_row"], ["by_file"]))
def test_files_of_a_bucket_go_on_where_they_were(
    tiny_model: Path, tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, sharding: str
) -> None:
    """s3:// on three ranks: the run over the same local files that nobody disturbed."""
    outs = [tmp_path / "straight", tmp_path / "out"]
    with s3_server(monkeypatch) as s3:
        s3.create_bucket(Bucket="rows")
        for path in many.glob("*.gz"):
            s3.upload_file(str(path), "rows", path.name)
        words = []
        for out, folder in zip(outs, [many, "s3://rows"], strict=True):
            settings = {**mixture_in(folder), "num_train_epochs": 1}
            if sharding == "by_file":
                settings |= {"train_weights": None, "stream_sharding": sharding}
            words.append(words_of(tiny_model, out, pattern_of(many), **settings))
        kill_and_compare(3, *words, [3], outs)


def test_a_window_that_is_lost_is_seen(
    tiny_model: Path, tmp_path: Path, files: Any, straight: Any
) -> None:
    def lose(accelerator: Accelerator) -> None:
        windows = stream.Stream.windows
        stream.Stream.windows = lambda self, state=None: (
            window for window in windows(self, state) if window.state["window"] != 1
        )

    given = [*words(tiny_model, tmp_path / "out", files), "--max_train_steps", "6"]
    assert (
        rows_by_step([seen for _, seen, _ in run_ranks(1, run_train, given, lose)])[2]
        != straight[1][1][2]
    )


# --- A run in steps


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_run_in_steps_reads_nothing_beforehand(tiny_model: Path, tmp_path: Path, n: int) -> None:
    """Evaluation and checkpoint intervals are in epochs by default, which nobody has asked for."""
    settings = {
        "streaming": True,
        "max_train_steps": 20,
        "label_names": ["negative", "positive"],
        "save_total_limit": 99,
    }
    files = write_split(tmp_path, 45, 6)

    def evaluated(out: str, **more: Any) -> tuple[list[int], str]:
        words = words_of(tiny_model, tmp_path / out, files, **{**settings, **more})
        said = run_ranks(n, run_train, words)[0][2]
        return [line["step"] for line in step_log(tmp_path / out, "eval")], said

    steps, said = evaluated("out")
    assert (
        "20 with 8 rows each (the length of an epoch is not known: --eval_every and --save_every "
        "10% of the run)" in said
    )
    assert "once, for" not in said and not (tmp_path / "out" / "survey.json").exists()
    assert steps == list(range(2, 21, 2))
    assert [int(name[5:]) for name in checkpoints_of(tmp_path / "out")] == steps
    # Controls: an epoch that was asked for, and one that is known.
    controls: list[dict[str, Any]] = [{"eval_every": "1 epoch"}, {"label_names": None}]
    for number, more in enumerate(controls):
        steps, said = evaluated(f"control {number}", **more)
        assert "once, for" in said and "is not known" not in said
        assert steps == [6, 12, 18, 20]
