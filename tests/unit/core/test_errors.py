"""Every user's mistake is one exception type, and its message ends with a hint that helps."""

from pathlib import Path

import pytest

from bertdist.core.errors import (
    BertdistError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    did_you_mean,
    did_you_mean_path,
)


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError, CheckpointError])
def test_every_error_of_a_user_is_caught_as_one(kind: type[BertdistError]) -> None:
    with pytest.raises(BertdistError, match=r"^what was found$"):
        raise kind("what was found")


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        (ConfigError, True),
        (DataError, False),
        (ModelError, False),
        (CheckpointError, False),
        (BertdistError, False),
    ],
)
def test_only_errors_that_all_ranks_see_are_shared(kind: type[BertdistError], shared: bool) -> None:
    assert kind("x").on_all_ranks is shared


def test_marking_one_error_as_shared_leaves_its_kind_alone() -> None:
    error = DataError("x")
    error.on_all_ranks = True
    assert not DataError("y").on_all_ranks


@pytest.mark.parametrize(
    ("word", "known", "end"),
    [
        ("max_lenght", ["max_length", "min_length", "seed"], " Did you mean 'max_length'?"),
        ("POSITIVE", ["negative", "positive"], " Did you mean 'positive'?"),
        ("zebra", ["one", "two"], " Known: 'one', 'two'."),
        ("zebra", ["one", "one", "two"], " Known: 'one', 'two'."),
        ("zebra", [], ""),
        (
            "zebra",
            ["zest", "one", "zoo", "bar", *"12345"],  # of many the nearest ones
            " Known: 'bar', 'zest', 'one', 'zoo', '1', '2', '3', '4', ....",
        ),
    ],
)
def test_a_hint_names_the_nearest_word_or_the_known_ones(
    word: str, known: list[str], end: str
) -> None:
    assert did_you_mean(word, known) == end


def test_no_word_is_near_to_everything() -> None:
    # The control of the test above: a hint that always found a neighbour would name one here too.
    assert "Did you mean" not in did_you_mean("qqqq", ["learning_rate", "seed", "max_length"])


@pytest.mark.parametrize(
    ("path", "is_folder", "end"),
    [
        ("outt", True, " Did you mean 'out'?"),
        ("outt", False, " Did you mean 'out'?"),
        ("runs/frist/best", True, " Did you mean 'runs/first/best'?"),
        ("runs/frist/worst", True, " Did you mean 'runs/first'?"),
        ("./rusn/first", True, " Did you mean 'runs/first'?"),
        ("trian.tsv", False, " Did you mean 'train.tsv'?"),
        ("trian.tsv", True, ""),  # a file is no folder
        ("tests.tsv", False, ""),  # a folder no table
        ("zebra", False, ""),
        ("out", True, ""),  # it exists
    ],
)
def test_a_path_that_resembles_the_missing_one_is_named(
    path: str, is_folder: bool, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "runs/first/best", "tests"):
        Path(folder).mkdir(parents=True)
    Path("train.tsv").write_text("")
    assert did_you_mean_path(path, is_folder) == end
