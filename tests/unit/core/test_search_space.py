"""--try of a sweep: what it means, and what is refused before any trial."""

import dataclasses

import pytest

from bertdist.core.args import TRAIN_SECTIONS, read_config
from bertdist.core.errors import ConfigError
from bertdist.core.search_space import (
    TRIED,
    Choices,
    Range,
    as_flags,
    check_space,
    grid_of,
    read_space,
    with_values,
)

CONFIG = read_config(
    ["--model_name_or_path=m", "--output_dir=o", "--train_file=t", "--validation_file=v"]
)


def test_ranges_and_choices() -> None:
    words = [
        "learning_rate=1e-5..5e-4:log",
        "warmup_ratio=0..0.2",
        "weight_decay=0..0.1:0.05",
        "train-batch-size=16,32",
        "max_train_steps=10..30",
        "max_length=32..64:16",
        "eval_every= 1 epoch,200 steps",
        "class_weights=balanced,1 2",
        "model_name_or_path=../models/a,../models/b",
    ]
    space = read_space(words)
    assert space == {
        "learning_rate": Range(1e-5, 5e-4, log=True),
        "warmup_ratio": Range(0.0, 0.2),
        "weight_decay": Range(0.0, 0.1, step=0.05),
        "train_batch_size": Choices((16, 32)),
        "max_train_steps": Range(10, 30),
        "max_length": Range(32, 64, step=16),
        "eval_every": Choices(("1 epoch", "200 steps")),
        "class_weights": Choices(("balanced", "1 2")),
        "model_name_or_path": Choices(("../models/a", "../models/b")),
    }
    is_int = {name: x.is_int for name, x in space.items() if isinstance(x, Range)}
    assert [name for name, whole in is_int.items() if whole] == ["max_train_steps", "max_length"]
    assert read_space([f"{name}={of}" for name, of in space.items()]) == space
    check_space(space, CONFIG)


def test_values_are_settings_of_a_run_by_flags_and_in_python() -> None:
    values = {"learning_rate": 0.1 + 0.2, "class_weights": "1 2", "eval_every": "1 epoch"}
    words = ["--model_name_or_path=m", "--output_dir=o", "--train_file=t", "--validation_file=v"]
    assert read_config([*words, *as_flags(values)]) == with_values(CONFIG, values)
    assert with_values(CONFIG, values).task.class_weights == ["1", "2"]
    assert with_values(CONFIG, {**values, "learning_rate": 0.3}) != with_values(CONFIG, values)


def test_the_grid() -> None:
    space = read_space(["weight_decay=0..0.3:0.1", "train_batch_size=16,32", "max_length=8..9"])
    grid = list(grid_of(space))
    assert len(grid) == 4 * 2 * 2 and len({tuple(x.values()) for x in grid}) == 16
    assert grid[0] == {"weight_decay": 0.0, "train_batch_size": 16, "max_length": 8}
    assert grid[-1] == {"weight_decay": 0.3, "train_batch_size": 32, "max_length": 9}
    with pytest.raises(ConfigError, match="--sampler grid tries all values, and warmup_ratio="):
        grid_of(read_space(["warmup_ratio=0..1"]))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learning_rate", "--try 'learning_rate': expected name=values"),
        ("lerning_rate=1..2", "Unknown setting 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("lr=1e-5,1e-4", "Unknown setting 'lr': the name is --learning_rate"),
        ("seed=1,2", "--try seed: the best seed is luck; `bertdist train --seeds 5`"),
        ("output_dir=a,b", "--try output_dir: each trial has a folder of its own"),
        ("train_file=a,b", "--try train_file: it does not decide how a model learns"),
        ("learning_rate=1e-5", "there is one value only; give it as --learning_rate 1e-5."),
        ("learning_rate=1e-5,1e-5", "a value is given twice."),
        ("learning_rate=1e-5,,1e-4", "a value is empty"),
        ("learning_rate=a,b", "--learning_rate: invalid float value: 'a'."),
        ("learning_rate=1e-4..1e-5", "1e-4 is not below 1e-5."),
        ("learning_rate=0..1:log", "a logarithmic scale begins above 0."),
        ("learning_rate=1..nan", "'nan' is not a number."),
        ("learning_rate=1..2:lgo", "'lgo' is not a number; expected :log, or a step"),
        ("warmup_ratio=0..0.2:0.06", "steps of 0.06 from 0 do not reach 0.2."),
        ("train_batch_size=1.5..3", "'1.5' is not a whole number."),
        ("lr_scheduler_type=linear,lineaR", "invalid choice: 'lineaR'"),
        ("warmup_ratio=0..2", "--warmup_ratio is 2.0; expected from 0 to 1."),
        ("eval_every=1 epoch,epoch", "--try eval_every=epoch: --eval_every is 'epoch'"),
        ("max_length=2,64", "--max_length is 2; expected at least 3."),
    ],
)
def test_mistakes_are_one_line(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_space(read_space([word]), CONFIG)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_are_checked_together() -> None:
    words = ["lr_scheduler_type=linear,constant", "warmup_ratio=0,0.1"]
    with pytest.raises(ConfigError) as error:
        check_space(read_space(words), CONFIG)
    assert str(error.value).startswith(
        "--try lr_scheduler_type=constant warmup_ratio=0.1: --lr_scheduler_type constant has no"
    )
    check_space(read_space([words[0], "weight_decay=0,0.1"]), CONFIG)


def test_epochs_are_not_tried_where_steps_decide() -> None:
    message = "--try num_train_epochs has no effect: --max_train_steps"
    epochs = "num_train_epochs=1,2"
    run = dataclasses.replace(CONFIG.run, max_train_steps=9)
    for words, config in (
        ([epochs], dataclasses.replace(CONFIG, run=run)),
        ([epochs, "max_train_steps=8,9"], CONFIG),
    ):
        with pytest.raises(ConfigError, match=message):
            check_space(read_space(words), config)
    check_space(read_space([epochs]), CONFIG)


def test_all_mistakes_are_told() -> None:
    with pytest.raises(ConfigError) as error:
        read_space(["seed=1,2", "x=1", "max_length=8,9", "max_length=8,9"])
    assert len(str(error.value).splitlines()) == 3


def test_tried_settings_are_settings() -> None:
    names = {field.name for section in TRAIN_SECTIONS for field in dataclasses.fields(section)}
    assert set(TRIED) - names <= {"freeze"}
