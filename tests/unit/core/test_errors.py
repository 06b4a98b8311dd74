"""Every user's mistake is one exception type, and its message ends with a hint that helps."""

import pytest

from bertdist.core.errors import (
    BertdistError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    did_you_mean,
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
            (str(number) for number in range(21)),
            f" Known: {', '.join(repr(str(number)) for number in range(20))}, ....",
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
