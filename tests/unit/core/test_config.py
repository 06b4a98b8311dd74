"""Flags and YAML: the same names and values in both, and every problem is reported at once."""

import dataclasses
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertdist.core import args
from bertdist.core.args import read_config, read_predict_config
from bertdist.core.config import (
    ALL_LAYERS,
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PredictConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    config_to_yaml,
    duration_in_steps,
    setting,
)
from bertdist.core.errors import BertdistError, ConfigError
from bertdist.core.other_flags import TRAIN_ANSWERS

SECTIONS = [ModelConfig, DataConfig, TaskConfig, BatchConfig, OptimConfig, RunConfig]
NEEDED = [
    "--model_name_or_path=m",
    "--train_file=t.tsv",
    "--validation_file=d.tsv",
    "--output_dir=o",
]


def value_of(config: TrainConfig, name: str) -> Any:
    """The value of a setting, whatever its section."""
    (value,) = [values[name] for values in dataclasses.asdict(config).values() if name in values]
    return value


def problems(words: Sequence[str], read: Callable[[Sequence[str]], Any] = read_config) -> list[str]:
    """The lines of what is wrong with the words."""
    with pytest.raises(ConfigError) as caught:
        read(words)
    return str(caught.value).split("\n")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], list[str]]:
    """Text of a YAML file -> the words that name it."""

    def write(text: str) -> list[str]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return ["--config", str(tmp_path / "run.yaml")]

    return write


# ---- --help


def undocumented(sections: Sequence[Any], shown: str) -> list[str]:
    """Flags that --help does not show, or shows without a sentence or its default."""
    text, found = " ".join(shown.split()), []
    for section in sections:
        for field in dataclasses.fields(section):
            sentence = " ".join(field.metadata["help"].split())
            default = field.default not in (None, "", False) and "Default:" not in sentence
            found_default = not default or f"Default: {field.default}." in text
            told = (
                sentence.endswith(".")
                and not sentence[:1].islower()
                and sentence in text
                and found_default
            )
            if not (told and f"--{field.name} " in f"{text} "):
                found.append(field.name)
    return found


@pytest.mark.parametrize(
    ("read", "sections"), [(read_config, SECTIONS), (read_predict_config, [PredictConfig])]
)
def test_help_has_a_sentence_and_a_default_for_every_flag(
    read: Callable[[Sequence[str]], Any],
    sections: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as exit:
        read(["--help", "all"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0
    assert undocumented(sections, shown) == []
    assert "\n  --config FILE" in shown

    @dataclasses.dataclass
    class Silent:
        colour: str = setting("red", "")
        shade: str = setting("dark", "How dark it is.")

    assert undocumented([Silent], shown) == ["colour", "shade"]  # the control: neither is told


def test_every_setting_belongs_to_one_section() -> None:
    names = [field.name for section in SECTIONS for field in dataclasses.fields(section)]
    assert len(names) == len(set(names)) >= 50


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_config(NEEDED).run.seed = 1  # type: ignore[misc]


# ---- Flags


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 0.0001),
        (["--learning-rate=1e-4"], "learning_rate", 0.0001),
        (["--use_cpu"], "use_cpu", True),
        (["--use_cpu", "no"], "use_cpu", False),
        (["--metrics", "accuracy", "f1"], "metrics", ["accuracy", "f1"]),
        (["--label_names", "-1", "0", "1"], "label_names", ["-1", "0", "1"]),
        (["--text_pair_column=-x"], "text_pair_column", "-x"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        ([], "max_length", 128),
        ([], "dropout", None),
        ([], "eval_every", "auto"),
    ],
)
def test_a_flag_sets_its_value(words: list[str], name: str, value: Any) -> None:
    found = value_of(read_config([*NEEDED, *words]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--max_lenght=4", "Unknown setting --max_lenght. Did you mean --max_length?"),
        ("--max-lenght=4", "Unknown setting --max-lenght. Did you mean --max_length?"),
        ("--zzz", "Unknown setting --zzz. --help lists them."),
        ("--learning_r=1", "Unknown setting --learning_r. Did you mean --learning_rate?"),
        ("-x", "Unexpected argument '-x': every value follows its flag."),
        ("stray", "Unexpected argument 'stray': every value follows its flag."),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest_one(word: str, line: str) -> None:
    assert problems([*NEEDED, word]) == [line]


@pytest.mark.parametrize("start", ["--see", "--learn", "--output", "--use", "--conf"])
def test_no_flag_may_be_abbreviated(start: str) -> None:
    # Each of them is the beginning of one flag only, which argparse would take if it were let.
    assert problems([*NEEDED, f"{start}=1"])[0].startswith(f"Unknown setting {start}")


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["--folds", "5", "--label-column=l", "x"], None, {"folds", "label_column"}),
        (
            ["--folds=5", "CONFIG"],
            "seed: 3\nlabel-names: [a, b]\nmodel:\noutput: ''\n",
            {"folds", "seed", "label_names", "output"},
        ),
        (["CONFIG"], "[", set()),
        (["CONFIG"], "[" * 5000, set()),
        (["--config", "nowhere.yaml"], None, set()),
        (["--seed", "3", "--config"], None, {"seed"}),
        ([], None, set()),
    ],
    ids=["line", "both", "no YAML", "deep", "no file", "no value", "nothing"],
)
def test_names_are_available_before_parsing(
    words: list[str], text: str | None, expected: set[str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text or "")
    for config in ([f"--config={tmp_path / 'run.yaml'}"], ["--config", str(tmp_path / "run.yaml")]):
        given = [part for word in words for part in (config if word == "CONFIG" else [word])]
        assert args.given_setting_names(given) - {"config"} == expected


def test_yaml_of_any_depth_is_one_line(file: Callable[[str], list[str]]) -> None:
    assert ["not YAML: maximum recursion depth" in line for line in problems(file("[" * 5000))] == [
        True
    ]


@pytest.mark.parametrize("word", ["max_steps", "fp16", "deepspeed"])
def test_flags_of_other_programs_are_answered_with_ours(
    word: str, file: Callable[[str], list[str]]
) -> None:
    answer = TRAIN_ANSWERS[word]
    assert problems([*NEEDED, f"--{word}=1"]) == [f"Unknown setting --{word}: {answer}."]
    words = file(f"seed: 1\n{word}: 1\n")
    assert problems([*words, *NEEDED]) == [
        f"{words[1]} line 2: Unknown setting '{word}': {answer}."
    ]


def test_all_unknown_flags_are_named_at_once() -> None:
    lines = problems(["--max_lenght=4", "--batch_sise=3", "--fp16", *NEEDED])
    assert [line.split()[2].strip(".:") for line in lines] == [
        "--max_lenght",
        "--batch_sise",
        "--fp16",
    ]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--max_length", "3.5"], "'3.5'"),
        (["--max_length", "long"], "'long'"),
        (["--seed"], "expected one argument"),
        (["--config"], "expected one argument"),
        (["--lr_scheduler_type", "cos"], "'cos'"),
        (["--mixed_precision", "fp8"], "'fp8'"),
        (["--use_cpu", "maybe"], "got maybe"),
        (["--learning_rate", "fast"], "'fast'"),
        (["--learning_rate", "nan"], "--learning_rate is nan; expected at least 0."),
        (["--dropout", "1.5"], "--dropout is 1.5; expected from 0 to 1."),
        (["--seed", "-1"], "--seed is -1; expected from 0 to 4294967295."),
        (["--max_length", "2"], "--max_length is 2; expected at least 3."),
        (["--train_batch_size", "0"], "--train_batch_size is 0; expected at least 1."),
        (["--tokens_per_micro_batch", "0"], "--tokens_per_micro_batch is 0; expected at least 1."),
        (["--max_train_steps", "0"], "--max_train_steps is 0; expected at least 1."),
        (["--save_total_limit", "1"], "--save_total_limit is 1; expected at least 2."),
        (
            ["--label_smoothing_factor", "-0.1"],
            "--label_smoothing_factor is -0.1; expected from 0 to 1.",
        ),
        (
            ["--eval_every", "10 parrots"],
            "--eval_every is '10 parrots'; it takes '200 steps', '0.5 epochs', '10%' or 'never'.",
        ),
        (["--save_every", "steps"], "or 'never'. Did you mean '1 steps'?"),
        (["--eval_every", "epoch"], "--eval_every is 'epoch'; it takes '200 steps', '0.5 epochs'"),
        (["--eval_every", "epoch"], "or 'never'. Did you mean '1 epoch'?"),
        (["--eval_every", "no"], "or 'never'. Did you mean 'never'?"),
        (["--eval_every", "500"], "or 'never'. Did you mean '500 steps'?"),
        (["--warmup_steps", "0.1"], "'0.1'. --warmup_ratio 0.1 is the warmup as a share of all"),
        (["--mixed_precision", "fp8"], "It takes no, bf16, fp16 or auto."),
        (["--num_train_epochs", "-1"], "-1; expected more than 0. --max_train_steps sets"),
        (["--num_train_epochs", "nan"], "--num_train_epochs is nan; expected more than 0."),
        (["--num_train_epochs", "inf"], "--num_train_epochs is inf; expected more than 0."),
        (["--max_train_steps", "-1"], "at least 1. Leave the flag out for its default."),
        (["--max_train_samples", "0"], "at least 1. Leave the flag out for its default."),
        (["--resume_from_checkpoint", "latest"], "'latest'; it takes a folder. Without the flag"),
        (["--resume_from_checkpoint", "True"], "'True'; it takes a folder. Without the flag"),
        (["--log_every", "-5 steps"], "--log_every is '-5 steps'; it takes '200 steps'"),
        (
            ["--eval_every", "0 steps"],
            "--eval_every is '0 steps'; expected more than 0, or 'never'.",
        ),
        (["--save_every", "0%"], "--save_every is '0%'; expected more than 0, or 'never'."),
        (["--log_every", "0.00 epochs"], "--log_every is '0.00 epochs'; expected more than 0"),
        (["--log_every", "0.5 steps"], "--log_every is '0.5 steps'; expected whole steps."),
        (
            ["--class_weights", "heavy", "light"],
            "--class_weights is 'heavy light'; expected 'balanced' or one number per label: 0, or from 1e-10 to 1e+10.",
        ),
        (["--class_weights", "1", "-2"], "--class_weights is '1 -2'; expected"),
        (["--class_weights", "1", "inf"], "--class_weights is '1 inf'; expected"),
        (["--class_weights", "nan", "1"], "--class_weights is 'nan 1'; expected"),
        (["--class_weights", "1e300", "1"], "--class_weights is '1e300 1'; expected"),
        (["--class_weights", "1e-300", "1"], "--class_weights is '1e-300 1'; expected"),
        (
            ["--class_weights", "0", "0.0"],
            "--class_weights is '0 0.0'; without one above 0 nothing is learned.",
        ),
        (["--dropout", "1"], "--dropout is 1; expected less than 1."),
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor is 1; expected less than 1."),
        (
            ["--warmup_steps", "5", "--warmup_ratio", "0.1"],
            "--warmup_steps and --warmup_ratio both name the warmup; give one.",
        ),
        (
            ["--lr_scheduler_type", "constant", "--warmup_steps", "5"],
            "--lr_scheduler_type constant has no warmup; use constant_with_warmup.",
        ),
        (
            ["--early_stopping_patience", "2", "--eval_every", "never"],
            "--early_stopping_patience needs evaluations, and --eval_every is 'never'.",
        ),
        (["--max_bad_rows", "5"], "--max_bad_rows needs --on_bad_row skip."),
        (
            ["--max_bad_rows", "-1", "--on_bad_row", "skip"],
            "--max_bad_rows is -1; expected at least 0.",
        ),
        (
            ["--dataset_name", "d"],
            "--train_file and --dataset_name both name training rows; give one.",
        ),
        (
            ["--label_columns", "a", "b", "--label_delimiter", ","],
            "--label_columns replaces --label_column and --label_delimiter; give one of them.",
        ),
        (["--stream_window", "8"], "--stream_window needs --streaming."),
        (["--stream_sharding", "by_file"], "--stream_sharding needs --streaming."),
        (["--stream_sharding", "files", "--streaming"], "(choose from 'by_row', 'by_file')"),
        (["--stream_window", "0", "--streaming"], "--stream_window is 0; expected at least 1."),
        (
            ["--train_weights", "1", "2"],
            "--train_weights has 2 numbers for 1 --train_file; one each.",
        ),
        (["--train_weights", "0"], "--train_weights is 0.0; expected numbers above 0."),
        (
            ["--stream_sharding", "by_file", "--streaming", "--train_weights", "1"],
            "--train_weights needs --stream_sharding by_row",
        ),
        (
            ["--max_train_samples", "5", "--streaming", "--train_weights", "1"],
            "--max_train_samples takes the first rows of all files, and",
        ),
        (
            ["--max_train_samples", "5", "--streaming", "--stream_sharding", "by_file"],
            "--max_train_samples takes the first rows of all files, and with --stream_sharding by_file each rank reads other files: remove one of them.",
        ),
    ],
)
def test_an_invalid_value_is_one_line_that_shows_it(words: list[str], shown: str) -> None:
    (line,) = problems([*NEEDED, *words])
    assert shown in line
    assert words[0].split("=")[0] in line


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--dropout", "0.99"], "dropout", 0.99),
        (["--max_length", "3"], "max_length", 3),
        (["--seed", "4294967295"], "seed", 4294967295),
        (["--save_total_limit", "2"], "save_total_limit", 2),
        (["--class_weights", "balanced"], "class_weights", ["balanced"]),
        (["--class_weights", "0", "2.5"], "class_weights", ["0", "2.5"]),
        (["--class_weights", "1e10", "1e-10"], "class_weights", ["1e10", "1e-10"]),
        (["--warmup_steps", "0", "--lr_scheduler_type", "constant"], "warmup_steps", 0),
        (["--eval_every", " never "], "eval_every", " never "),
        (["--eval_every", "10 %"], "eval_every", "10 %"),
        (["--max_bad_rows", "0", "--on_bad_row", "skip"], "max_bad_rows", 0),
    ],
)
def test_the_ends_of_a_range_are_in_it(words: list[str], name: str, value: Any) -> None:
    assert value_of(read_config([*NEEDED, *words]), name) == value


@pytest.mark.parametrize("name", ["num_train_epochs", "learning_rate"])
def test_an_infinite_number_is_refused(name: str) -> None:
    (line,) = problems([*NEEDED, f"--{name}=inf"])
    assert f"--{name} is inf" in line


def test_all_problems_are_reported_at_once() -> None:
    lines = problems(["--dropout=2", "--seed=-1", "--eval_every=often", "--validation_file=v.tsv"])
    starts = [
        "--model_name_or_path is missing",
        "--output_dir is missing",
        "No training rows",
        "--validation_file needs --train_file",
    ]
    starts += ["--dropout is 2.0", "--seed is -1", "--eval_every is 'often'"]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


# ---- The YAML file


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),  # YAML 1.1 would say False
        ("text_pair_column: no", "text_pair_column", "no"),
        ("text_pair_column: 12", "text_pair_column", "12"),
        ("text_pair_column: 1_000", "text_pair_column", "1_000"),
        ("text_pair_column: 2001-01-01", "text_pair_column", "2001-01-01"),
        ("text_pair_column: 'null'", "text_pair_column", "null"),
        ('text_pair_column: "~"', "text_pair_column", "~"),
        ('text_pair_column: "a\\tb"', "text_pair_column", "a\tb"),
        ("text_pair_column: 'a: b # c'", "text_pair_column", "a: b # c"),
        ("text_pair_column: -x", "text_pair_column", "-x"),
        ("text_pair_column: über", "text_pair_column", "über"),
        ("learning_rate: 1e-4", "learning_rate", 0.0001),  # YAML 1.1 would say the string '1e-4'
        ("learning_rate: 0.0001", "learning_rate", 0.0001),
        ("learning-rate: 1e-4", "learning_rate", 0.0001),
        ("--learning_rate: 1e-4", "learning_rate", 0.0001),
        ("seed: '7'", "seed", 7),
        ("seed: 010", "seed", 10),
        ("dropout: ~", "dropout", None),
        ("dropout: null", "dropout", None),
        ("dropout:", "dropout", None),
        ("dropout: 0", "dropout", 0.0),
        ("use_cpu: yes", "use_cpu", True),
        ("use_cpu: true", "use_cpu", True),
        ("use_cpu: False", "use_cpu", False),
        ("metrics: accuracy", "metrics", ["accuracy"]),
        ("metrics: [accuracy, f1]", "metrics", ["accuracy", "f1"]),
        ("metrics:\n- accuracy\n- f1", "metrics", ["accuracy", "f1"]),
        ("metrics: []", "metrics", None),
        (
            "label_names: [no, yes, 'null', ~, 01, 1.0]",
            "label_names",
            ["no", "yes", "null", "~", "01", "1.0"],
        ),
        ("label_names: [-1, 0, 1]", "label_names", ["-1", "0", "1"]),
        ("eval_every: 10%", "eval_every", "10%"),
        ("max_length: &x 3\nseed: *x", "seed", 3),
        ("", "seed", 42),
        ("# nothing\n", "seed", 42),
    ],
)
def test_a_scalar_of_the_file_is_its_text(
    text: str, name: str, value: Any, file: Callable[[str], list[str]]
) -> None:
    found = value_of(read_config([*file(text), *NEEDED]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("position", ["before", "after"])
def test_flags_win_over_the_file(position: str, file: Callable[[str], list[str]]) -> None:
    words = file("seed: 1\nmetrics: [accuracy, f1]\nuse_cpu: yes\nmax_length: 9")
    flags = ["--seed=2", "--metrics", "mcc", "--use_cpu=no"]
    config = read_config(
        [*NEEDED, *words, *flags] if position == "before" else [*NEEDED, *flags, *words]
    )
    assert [value_of(config, name) for name in ("seed", "metrics", "use_cpu", "max_length")] == [
        2,
        ["mcc"],
        False,
        9,
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "seed: 1\n\nmax_lenght: 3",
            ["{} line 3: Unknown setting 'max_lenght'. Did you mean 'max_length'?"],
        ),
        ("seed: 1\nfoo: 3", ["{} line 2: Unknown setting 'foo'. --help lists them."]),
        ("seed: 1\nlearning_rate: 1\nseed: 2", ["{} line 3: 'seed' is given a second time."]),
        ("seed: 1\n--seed: 2", ["{} line 2: 'seed' is given a second time."]),
        ("max-length: 5\nmax_length: 6", ["{} line 2: 'max_length' is given a second time."]),
        ("metrics: {a: b}", ["{} line 1: 'metrics' must be one value or a list of values."]),
        ("train_weights: [1, two]", ["--config {}: --train_weights is '1 two'; expected numbers."]),
        ("metrics: [a, [b]]", ["{} line 1: 'metrics' must be one value or a list of values."]),
        (
            "save_steps: 100\nseed: 1\nseed: 2\nsede: 3",
            [
                "{} line 1: Unknown setting 'save_steps': --save_every takes '200 steps'.",
                "{} line 3: 'seed' is given a second time.",
                "{} line 4: Unknown setting 'sede'. Did you mean 'seed'?",
            ],
        ),
        ("config: other.yaml", ["{} line 1: Unknown setting 'config'. --help lists them."]),
        (
            "seed: 1\n[a, b]: 2",
            ["{} line 2: expected the name of a setting, not a list or mapping."],
        ),
        ("- seed", ["--config {}: expected lines of `name: value`."]),
        ("seed", ["--config {}: expected lines of `name: value`."]),
    ],
)
def test_problems_in_the_file_have_file_and_line(
    text: str, lines: list[str], file: Callable[[str], list[str]]
) -> None:
    words = file(text)
    assert problems([*words, *NEEDED]) == [line.format(words[1]) for line in lines]


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\tseed: 1", "seed: 1\n---\nseed: 2", "seed: *x", "a: \x00"]
)
def test_a_file_that_is_not_yaml_is_one_line(text: str, file: Callable[[str], list[str]]) -> None:
    words = file(text)
    (line,) = problems([*words, *NEEDED])
    assert line.startswith(f"--config {words[1]}: not YAML: ")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"text_column: \xfc")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        (line,) = problems(["--config", str(path), *NEEDED])
        assert line.startswith(f"--config {path}: cannot be read (")


@pytest.mark.parametrize("items", [["-neg", "+pos"], ["--use_cpu", "x"], ["x", "--"]])
def test_a_list_of_the_file_may_hold_words_that_look_like_flags(
    items: list[str], file: Callable[[str], list[str]]
) -> None:
    config = read_config([*file(yaml.safe_dump({"label_names": items})), *NEEDED])
    assert value_of(config, "label_names") == items
    assert value_of(config, "use_cpu") is False


# ---- config_to_yaml

FULL = [  # every setting has a value here in one of them
    "--text_column=-t --text_pair_column=p --label_column=l --label_delimiter=; --column_names _ -t p l --delimiter=tab --quoting=none",
    "--label_columns a b --max_train_samples 5 --max_eval_samples 6 --validation_file=v.tsv --test_file=e.tsv --encoding=latin-1 --dropout=0.1",
    "--accept_changed_data --on_nan skip --max_nan_steps 3 --detect_anomaly",
    "--on_bad_row skip --max_bad_rows 7 --streaming --stream_window 64 --stream_sharding by_file",
    "--train_weights 0.5 --file_format json --json_field data",
    "--problem_type=regression --label_names 1 01 no --class_weights 1 2 --metrics mse --metric_for_best_model=loss --positive_label no --use_cpu",
    "--label_smoothing_factor 0.1 --train_batch_size 8 --tokens_per_micro_batch 64 --dataloader_num_workers 0 --gradient_checkpointing",
    "--learning_rate 1e-5 --weight_decay 1e-8 --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-6 --max_grad_norm 0 --warmup_steps 3",
    "--warmup_ratio 0.1 --lr_scheduler_type cosine --layerwise_lr_decay 0.9 --seed 3 --num_train_epochs 0.5 --mixed_precision no",
    "--max_train_steps 7 --eval_every never --save_every 10% --log_every=1steps --save_total_limit 3 --resume_from_checkpoint=c",
    "--early_stopping_patience 2 --early_stopping_threshold 0.1 --stop_before_time_limit 1 --rank_timeout 9",
    "--report_to tensorboard --tokenizer_name=t",
    "--model_revision=v1 --max_length 9 --dry_run",
    "--torch_compile --cuda_graphs --verbose --ddp_comm_hook bf16",
    "--test_split 0.1 --mixed_precision auto --freeze embeddings 4",
    "--test_split 0.1 --split_seed 7 --seeds 3",
    "--project p --run_name r --slice_column s --push_to_hub u/m --report",
    "--calibrate --tune_thresholds --threshold_for precision_at_recall=0.9 --validation_file=v.tsv",
]
HUB = "--model_name_or_path=m --output_dir=o --dataset_name=d --dataset_config_name=c --train_split=t --validation_split=v --test_split=e".split()
GLUE = "--model_name_or_path=m --output_dir=o --task_name=sst2".split()
FOLDS = "--model_name_or_path=m --output_dir=o --train_file=t.tsv --folds=3".split()


@pytest.mark.parametrize(
    "words", [NEEDED, HUB, GLUE, FOLDS, *([*NEEDED, *line.split()] for line in FULL)]
)
def test_a_written_config_reads_back_the_same(
    words: list[str], file: Callable[[str], list[str]]
) -> None:
    if "--column_names" in words:
        words = [
            word for word in words if word != "-t"
        ]  # a flag to argparse where a list is given word by word
    config = read_config(words)
    assert read_config(file(config_to_yaml(config))) == config
    # The control: a file that lacks one value is another config.
    changed = yaml.safe_load(config_to_yaml(config)) | {"seed": 12345}
    assert read_config(file(yaml.safe_dump(changed))) != config


def test_the_round_trips_try_every_setting() -> None:
    tried = {
        word.split("=")[0]
        for words in (*map(str.split, FULL), NEEDED, HUB, GLUE, FOLDS)
        for word in words
        if word.startswith("--")
    }
    assert tried == {
        f"--{field.name}" for section in SECTIONS for field in dataclasses.fields(section)
    }


ODD = ["no", "null", "~", "1e-4", "0x1", "=", "- a", "a: b", "{", "&x", "!t", "\n", "'"]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the file is written anew each time
@given(
    # Without NEL, which PyYAML folds as a line end and does not write back (PyYAML 6.0).
    text=st.one_of(
        st.text(min_size=1, max_size=8).filter(lambda text: "\x85" not in text),
        st.sampled_from(ODD),
    ),
    names=st.lists(
        st.text(string.printable + "ü世", min_size=1).filter(lambda word: word[0] != "-"),
        min_size=1,
        max_size=3,
    ),
)
def test_any_text_survives_the_written_file(
    text: str, names: list[str], file: Callable[[str], list[str]]
) -> None:
    config = read_config([*NEEDED, f"--text_pair_column={text}"])
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, label_names=names))
    assert read_config(file(config_to_yaml(config))) == config


# ---- duration_in_steps


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("200 steps", 200),
        ("1 step", 1),
        ("1step", 1),
        (" 7  steps ", 7),
        ("1 epoch", 40),
        ("0.5 epochs", 20),
        ("2epochs", 80),
        ("10%", 12),
        ("100 %", 120),
        ("0.5%", 1),  # 0.6 of a step
        ("0.1%", 1),  # never less than one
        ("0 steps", 1),
        ("0.01 epochs", 1),
        ("auto", 40),
        ("never", 0),
        (" never ", 0),
    ],
)
def test_durations_are_steps(duration: str, steps: int) -> None:
    assert duration_in_steps(duration, steps_per_epoch=40, total_steps=120) == steps


def test_without_the_length_of_an_epoch_the_default_is_a_share_of_the_run() -> None:
    assert duration_in_steps("auto", steps_per_epoch=0, total_steps=120) == 12


def test_a_duration_that_was_not_checked_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="ten steps"):
        duration_in_steps("ten steps", 1, 1)


# ---- read_predict_config


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            [],
            [
                "--model is missing: the folder of a trained classifier, such as out/best.",
                "Give the texts with either --text or --input.",
            ],
        ),
        (
            ["--model=m", "--text", "a", "--input=f.csv"],
            ["Give the texts with either --text or --input."],
        ),
        (
            ["--model=m", "--text", "a", "--output=f.jsonl"],
            ["--output needs --input; predictions for --text are printed."],
        ),
        (
            ["--model=m", "--text", "a", "--text_column", "b", "--delimiter=;"],
            [
                "--text_column is for the files of --input.",
                "--delimiter is for the files of --input.",
            ],
        ),
        (
            ["--model=m", "--text", "a", "b", "--text_pair", "c"],
            ["--text_pair has 1 texts and --text has 2; expected as many."],
        ),
        (
            ["--model=m", "--input=f", "--text_pair", "c"],
            ["--text_pair has 1 texts and --text has 0; expected as many."],
        ),
        (
            ["--model=m", "--text", "a", "--max_length=2"],
            ["--max_length is 2; expected at least 3."],
        ),
        (
            ["--model=m", "--text", "a", "--modle=m"],
            ["Unknown setting --modle. Did you mean --model?"],
        ),
        (
            ["--model=m", "--text", "a", "--mode=m"],
            ["Unknown setting --mode. Did you mean --model?"],
        ),
        (
            ["--model=m", "--text", "a", "--learning_rate=1"],
            ["Unknown setting --learning_rate: it is a setting of training."],
        ),
    ],
)
def test_all_problems_of_a_prediction_are_reported_at_once(
    words: list[str], lines: list[str]
) -> None:
    assert problems(words, read_predict_config) == lines


def test_a_prediction_is_read_from_flags_and_file(file: Callable[[str], list[str]]) -> None:
    config = read_predict_config(
        [*file("model: out/best\nmax_length: 9\ntext: [no, 'b c']"), "--max_length=7"]
    )
    assert config == PredictConfig(model="out/best", text=["no", "b c"], max_length=7)


def test_odd_arguments_are_a_bertdist_error() -> None:
    for words in (
        ["--"],
        ["="],
        ["--="],
        ["---"],
        [""],
        ["\n"],
        ["--seed", "--seed"],
        ["--config=a", "--config=b"],
    ):
        with pytest.raises(BertdistError):
            read_config([*NEEDED, *words])


def test_a_list_for_a_setting_of_one_value_is_refused_with_its_line(
    file: Callable[[str], list[str]],
) -> None:
    words = file("metrics: [accuracy, f1_macro]\nseed: [1, 2]\n")
    assert problems([*words, *NEEDED]) == [
        f"{words[1]} line 2: 'seed' takes one value, not a list."
    ]
    assert read_config([*file("metrics: [accuracy, f1_macro]\n"), *NEEDED]).task.metrics == [
        "accuracy",
        "f1_macro",
    ]


@pytest.mark.parametrize(
    ("read", "flag"),
    [(read_predict_config, "model"), (read_config, "model_name_or_path")],
)
def test_the_folder_of_a_run_means_its_best_model(
    read: Callable[[Sequence[str]], Any],
    flag: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def value(folder: Path) -> Any:
        rest = ["--text=a"] if flag == "model" else NEEDED[1:]
        config = read([f"--{flag}={folder}", *rest])
        return getattr(getattr(config, "model", config), flag, None) or config.model

    out = tmp_path / "out"
    (out / "best").mkdir(parents=True)
    assert value(out) == str(out) and capsys.readouterr().err == ""  # there is no model yet
    (out / "best" / "config.json").write_text("{}")
    assert value(out) == str(out / "best")
    line = f"--{flag} {out} is the folder of a run: using {out / 'best'}.\n"
    assert capsys.readouterr().err == line
    for state, step, end in (
        ("running", 500, " of step 500; the run has not finished"),
        ("preempted", None, "; the run has not finished"),
        ("finished", 500, ""),
    ):
        status = {"state": state, "step": 800, "reason": ""}
        (out / "status.json").write_text(json.dumps(status))
        (out / "best" / "config.json").write_text(json.dumps({"bertdist": {"step": step}}))
        assert value(out) == str(out / "best")
        assert capsys.readouterr().err == line.replace(".\n", f"{end}.\n")
    assert value(out / "best") == str(out / "best")
    (out / "config.json").write_text("{}")  # a model of its own
    assert value(out) == str(out) and capsys.readouterr().err == ""


def test_a_leading_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/out\ntrain_file: [~/a.csv, '~b/c~.csv']\n")
    config = read_config(["--config=~/run.yaml", "--model_name_or_path", "~/m"])
    assert config.run.output_dir == str(tmp_path / "out")
    assert config.model.model_name_or_path == str(tmp_path / "m")
    # The control: ~b is no user here, and names a file.
    assert config.data.train_file == [str(tmp_path / "a.csv"), "~b/c~.csv"]
    words = ["--model=m", "--text", "~/x"]
    assert read_predict_config(words).text == ["~/x"]


def test_a_leading_tilde_is_the_home_folder_in_python_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    data = DataConfig(train_file=["~/a.csv", "~b/c.csv"], validation_file="~/b", text_column="~/t")  # type: ignore[arg-type]
    assert (data.train_file, data.validation_file) == ([f"{home}/a.csv", "~b/c.csv"], f"{home}/b")
    assert data.text_column == ["~/t"]  # no path
    run = RunConfig(output_dir="~/out", resume_from_checkpoint=Path("~/x"))  # type: ignore[arg-type]
    assert (run.output_dir, run.resume_from_checkpoint) == (f"{home}/out", f"{home}/x")
    assert ModelConfig(model_name_or_path="~/m").model_name_or_path == f"{home}/m"
    assert PredictConfig(model="~/m", output="~/o", text=["~/x"]) == PredictConfig(
        model=f"{home}/m", output=f"{home}/o", text=["~/x"]
    )
    assert dataclasses.replace(run, output_dir="~").output_dir == home


@pytest.mark.parametrize(
    ("words", "expected", "layers"),
    [
        ([], None, None),
        (["embeddings"], ["embeddings"], 0),
        (["embeddings", "4"], ["4"], 4),
        (["4"], ["4"], 4),
        (["12", "3"], ["12"], 12),
        (["encoder", "2"], ["encoder"], ALL_LAYERS),
    ],
)
def test_freeze_names_all_that_lies_below(
    words: list[str], expected: list[str] | None, layers: int | None
) -> None:
    flags = ["--model_name_or_path=m", "--train_file=a.csv", "--output_dir=o"]
    model = read_config([*flags, *(["--freeze", *words] if words else [])]).model
    assert (model.freeze, model.frozen_layers) == (expected, layers)
    if words:
        in_python = [int(word) if word.isdecimal() else word for word in words]
        for given in [in_python, *(in_python if len(words) == 1 else [])]:
            assert ModelConfig(freeze=given) == ModelConfig(freeze=expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("embeding", "from 1. Did you mean 'embeddings'?"),
        ("backbone", "from 1. Did you mean 'encoder'?"),
        ("none", "from 1. The head is always trained; without the flag all weights are."),
        ("0", "from 1. The head is always trained; without the flag all weights are."),
        ("1.5", "from 1."),
    ],
)
def test_other_words_of_freeze_are_answered(word: str, end: str) -> None:
    flags = ["--model_name_or_path=m", "--train_file=a.csv", "--output_dir=o"]
    with pytest.raises(ConfigError) as error:
        read_config([*flags, "--freeze", "embeddings", word])
    start = f"--freeze is {word!r}; expected embeddings, encoder (all but the head), or the number"
    assert str(error.value) == f"{start} of the first layers to freeze, {end}"
