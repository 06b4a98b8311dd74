"""A user's mistake is told in one line that names file, line and what was expected; exit code 1, no traceback.

One mistake goes through a real process (test_wrong_names.py has another); the others through `main` in a forked child, whose
exit code and standard error are those of a process: what is no BertdistError would end the child with a traceback, and the test.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import Command, run_ranks
from rows import Files, make_rows, run_main, words_of, write_rows, write_split

ROOT = Path(__file__).resolve().parents[2]


def mistake(words: list[str], n: int = 1) -> str:
    """The last line that is said; it is the only complaint, and nothing was trained."""
    first, *others = run_ranks(n, run_main, words)
    assert first[0] == 1 and others == [(1, "", "")] * (n - 1), first
    *before, last = first[1].splitlines()
    assert last.startswith("bertdist: ") and not [
        line for line in before if line.startswith("bertdist: ")
    ], first[1]
    return last


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_split(tmp_path, 20, 6)


# --- The mistakes of the issue, in forked children


def test_a_wrong_column(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    words = words_of(tiny_model, tmp_path / "out", files, text_column="txt")
    assert (
        mistake(words)
        == "bertdist: train.tsv line 1: there is no column 'txt'. Did you mean 'text'? The columns are 'text', 'label'."
    )


def test_an_unknown_label_in_validation(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    assert files.dev is not None
    rows = make_rows(6)
    rows[3]["label"] = "postive"
    write_rows(files.dev, rows)
    told = "bertdist: dev.tsv line 5: unknown label 'postive'; expected one of the training labels. Did you mean 'positive'?"
    assert mistake(words_of(tiny_model, tmp_path / "out", files)) == told
    assert mistake(words_of(tiny_model, tmp_path / "out", files), n=2) == told


@pytest.mark.parametrize(
    ("content", "kind"), [("", "tsv"), ("text\tlabel\n", "tsv"), ("", "jsonl"), ("\n\n", "csv")]
)
def test_an_empty_file(tiny_model: Path, tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / f"empty.{kind}"
    path.write_text(content)
    assert (
        mistake(words_of(tiny_model, tmp_path / "out", Files(path)))
        == f"bertdist: empty.{kind} has no rows."
    )


def test_a_byte_that_is_not_utf_8(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    lines = files.train.read_bytes().split(b"\n")
    lines[6] = "a café film\tpositive".encode("latin-1")
    files.train.write_bytes(b"\n".join(lines))
    told = mistake(words_of(tiny_model, tmp_path / "out", files))
    advice = (
        "pass --encoding (such as cp1252 for Western European, cp1251 for Cyrillic, gb18030 for Chinese, "
        "cp932 for Japanese text), or convert the file to UTF-8."
    )
    assert told == f"bertdist: train.tsv line 7: byte 0xE9 is not utf-8; {advice}"


def test_the_spam_file_as_it_is_in_the_world(
    tiny_model: Path, tmp_path: Path, shared_data: Path
) -> None:
    path = shared_data / "sms_spam" / "spam.csv"
    settings: dict[str, Any] = {
        "text_column": "v2",
        "label_column": "v1",
        "max_train_samples": 40,
        "max_train_steps": 1,
    }
    told = mistake(
        words_of(tiny_model, tmp_path / "out", Files(path), encoding="utf-8", **settings)
    )
    assert "spam.csv line " in told and "is not utf-8; pass --encoding " in told
    # Without the flag it is found to be cp1252.
    ((code, said, _),) = run_ranks(
        1, run_main, words_of(tiny_model, tmp_path / "out", Files(path), **settings)
    )
    assert code == 0 and "bertdist: " not in said, said


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_a_row_without_a_label(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    files = write_split(tmp_path, 20, kind=kind)
    rows: list[dict[str, Any]] = [*make_rows(20)]
    rows[4]["label"] = None if kind in ("jsonl", "parquet") else ""
    write_rows(files.train, rows)
    told = mistake(words_of(tiny_model, tmp_path / "out", files))
    place = {"tsv": "line 6", "csv": "line 6", "jsonl": "line 5", "parquet": "row 4"}[kind]
    assert (
        told.startswith(f"bertdist: train.{kind} {place}: ")
        and "label" in told
        and "expected" in told
    )


def test_a_file_that_is_not_there(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    told = mistake(
        words_of(tiny_model, tmp_path / "out", files._replace(train=tmp_path / "trian.tsv"))
    )
    assert (
        told
        == f"bertdist: {tmp_path / 'trian.tsv'}: no such file. Did you mean '{tmp_path / 'train.tsv'}'?"
    )


def test_a_missing_model_folder(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    told = mistake(words_of(tmp_path / "tiny_modle", tmp_path / "out", files))
    assert told.startswith(
        f"bertdist: --model_name_or_path {tmp_path / 'tiny_modle'}: there is no such folder."
    )


def test_a_folder_that_holds_no_model(tmp_path: Path, files: Files) -> None:
    (tmp_path / "hollow").mkdir()
    told = mistake(words_of(tmp_path / "hollow", tmp_path / "out", files))
    assert told.startswith(
        f"bertdist: --model_name_or_path {tmp_path / 'hollow'}: the folder holds no config.json that can be read"
    )


def test_a_model_of_the_hub_without_a_network(tmp_path: Path, files: Files) -> None:
    told = mistake(words_of(Path("google-bert/bert-base-uncasde"), tmp_path / "out", files))
    assert told.startswith(
        "bertdist: --model_name_or_path google-bert/bert-base-uncasde is neither a folder here nor a model "
    )


def test_a_run_of_other_settings_in_the_same_folder(
    tiny_model: Path, tmp_path: Path, files: Files
) -> None:
    words = words_of(tiny_model, tmp_path / "out", files, max_train_steps=2)
    assert run_ranks(1, run_main, words)[0][0] == 0

    def told(*more: str) -> list[str]:
        ((code, said, _),) = run_ranks(1, run_main, [*words, *more])
        assert code == 1
        return [line for line in said.splitlines() if line.startswith("bertdist: ")]

    assert told("--learning_rate", "0.5") == [
        f"bertdist: {tmp_path / 'out' / 'checkpoints' / 'step_000002'} belongs to a run with other settings:",
        "bertdist:   setting        before  now  effect",
        "bertdist:   learning_rate  0.001   0.5  the steps done so far used another value",
        "bertdist: Use the old settings, or another --output_dir.",
    ]
    write_rows(files.train, make_rows(20, seed=99))
    assert told()[2].startswith("bertdist:   training_rows  20 rows, ")


# --- I8: what cannot take effect is told

CANNOT = [
    (
        {"early_stopping_patience": 2, "eval_every": "never"},
        "--early_stopping_patience needs evaluations, and --eval_every is 'never'.",
    ),
    (
        {"warmup_steps": 3, "warmup_ratio": 0.1},
        "--warmup_steps and --warmup_ratio both name the warmup; give one.",
    ),
    ({"warmup_steps": 99, "max_train_steps": 5}, "--warmup_steps is 99, but the run has 5 steps."),
    (
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
        "--lr_scheduler_type constant has no warmup; use constant_with_warmup.",
    ),
    ({"eval_every": "sometimes"}, "--eval_every is 'sometimes'; it takes '200 steps'"),
    ({"train_batch_size": 0}, "--train_batch_size is 0; expected at least 1."),
    ({"save_total_limit": 1}, "--save_total_limit is 1; expected at least 2."),
    ({"adam_beta2": 1}, "--adam_beta2"),
    ({"learning_rate": "nan"}, "--learning_rate"),
    ({"learning_rate": "inf"}, "--learning_rate"),
    ({"max_length": 1000}, "--max_length is 1000; the tokenizer of "),
    (
        {"quoting": "double", "train_file": "{jsonl}"},
        "train.jsonl: --quoting cannot take effect on a .jsonl file; remove it.",
    ),
    (
        {"label_columns": ["label"], "label_delimiter": ","},
        "--label_columns replaces --label_column and --label_delimiter; give one of them.",
    ),
    (
        {"problem_type": "multi_label_classification"},
        "--problem_type is multi_label_classification, but the label column holds single ",
    ),
    ({"problem_type": "regression"}, "expected a number, found 'negative'"),
    (
        {"class_weights": [1, 2, 3]},
        "--class_weights has 3 numbers for 2 labels; the order is: negative, positive.",
    ),
    (
        {"label_names": ["good", "bad"]},
        "--label_names lacks 'negative', which the training split has.",
    ),
    ({"metrics": ["acuracy"]}, "accuracy"),
    (
        {"metric_for_best_model": "f2"},
        "--metric_for_best_model f2: not among the scores that are computed.",
    ),
    ({"report_to": ["wandbb"]}, "--report_to wandbb: not a tracker of accelerate."),
    ({"mixed_precision": "fp16"}, "--mixed_precision fp16"),
    (
        {"resume_from_checkpoint": "nowhere"},
        "--resume_from_checkpoint nowhere: there is no such folder.",
    ),
    (
        {"dataset_name": "imdb"},
        "--train_file and --dataset_name both name training rows; give one.",
    ),
    (
        {"per_device_train_batch_size": 8},
        "--train_batch_size is rows per step over all devices",
    ),
    # without rows to score, nothing can stop early and nothing is scored
    ({"validation_file": None, "early_stopping_patience": 2}, "--early_stopping_patience"),
    ({"validation_file": None, "metrics": ["accuracy"]}, "--metrics"),
    ({"validation_file": None, "metric_for_best_model": "accuracy"}, "--metric_for_best_model"),
    ({"validation_file": None, "max_eval_samples": 5}, "--max_eval_samples"),
    ({"validation_file": None, "eval_every": "5 steps"}, "--eval_every"),
    # what is for data of the hub, beside a file
    ({"dataset_config_name": "sst2"}, "--dataset_config_name"),
    ({"validation_file": None, "validation_split": "test"}, "--validation_split"),
    ({"train_split": "train[:10%]"}, "--train_split"),
    ({"early_stopping_threshold": 0.1}, "--early_stopping_threshold"),
]


@pytest.mark.parametrize(
    ("settings", "told"), CANNOT, ids=[" ".join(settings) for settings, _ in CANNOT]
)
def test_what_cannot_take_effect_is_told(
    tiny_model: Path, tmp_path: Path, files: Files, settings: dict[str, Any], told: str
) -> None:
    jsonl = write_rows(tmp_path / "train.jsonl", make_rows(20))
    settings = {
        name: str(jsonl) if value == "{jsonl}" else value for name, value in settings.items()
    }
    assert told in mistake(
        words_of(tiny_model, tmp_path / "out", files, **{"max_train_steps": 2, **settings})
    )


def test_the_same_settings_where_they_can_take_effect(
    tiny_model: Path, tmp_path: Path, files: Files
) -> None:
    """The negative control: nothing above is refused for itself."""
    settings = {
        "early_stopping_patience": 2,
        "early_stopping_threshold": 0.1,
        "warmup_steps": 1,
        "metrics": ["accuracy"],
        "metric_for_best_model": "accuracy",
        "max_eval_samples": 5,
        "class_weights": [1, 2],
        "label_names": ["negative", "positive"],
        "problem_type": "single_label_classification",
        "eval_every": "1 steps",
        "quoting": "double",
    }
    ((code, said, _),) = run_ranks(
        1, run_main, words_of(tiny_model, tmp_path / "out", files, max_train_steps=2, **settings)
    )
    assert code == 0 and "bertdist: " not in said, said


def test_all_problems_of_a_command_line_are_told_at_once(
    tiny_model: Path, tmp_path: Path, files: Files
) -> None:
    words = words_of(
        tiny_model,
        tmp_path / "out",
        files,
        train_batch_size=0,
        eval_every="often",
        save_total_limit=1,
    )
    ((code, said, _),) = run_ranks(1, run_main, words)
    assert (
        code == 1
        and len(said.splitlines()) == 3
        and all(line.startswith("bertdist: --") for line in said.splitlines())
    )


# --- Real processes


def real(*command: str | Path) -> tuple[int, str]:
    """(exit code, standard error and output) of a process started in the root of the repository."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_an_unknown_flag_in_a_real_process(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    words = words_of(tiny_model, tmp_path / "out", files, lerning_rate=3)
    assert real("bertdist/train.py", *words) == (
        1,
        "bertdist: Unknown setting --lerning_rate. Did you mean --learning_rate?\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_wrong_column_in_a_script(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    """The script in a fork that ends as Python does: what is no SystemExit is a traceback and code 1."""
    words = words_of(tiny_model, tmp_path / "out", files, label_column="lable")
    script, said = str(ROOT / "bertdist" / "train.py"), tmp_path / "said"
    run = Command(lambda: runpy.run_path(script, run_name="__main__"), [script, *words], said)
    told = "bertdist: train.tsv line 1: there is no column 'lable'. Did you mean 'label'? The columns are 'text', 'label'."
    assert run.wait() == 1 and said.read_text().splitlines() == [told], said.read_text()


def test_a_world_that_the_launch_lost(tiny_model: Path, tmp_path: Path, files: Files) -> None:
    """Of a task of `srun` alone; tests/runs/test_launch.py has `accelerate launch`."""

    def as_a_task(accelerator: Accelerator) -> None:
        os.environ["SLURM_NTASKS"] = "2"

    words = words_of(tiny_model, tmp_path / "out", files)
    ((code, said, _),) = run_ranks(1, run_main, words, as_a_task)
    complaints = [line for line in said.splitlines() if line.startswith("bertdist: ")]
    assert code == 1 and len(complaints) == 1, said
    assert complaints[0].startswith("bertdist: SLURM_NTASKS is 2, but this run has 1 process: ")
    assert not (tmp_path / "out").exists()
