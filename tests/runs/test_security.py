"""Nothing in a model folder, a checkpoint, a data folder, a config or a text is executed.

Every payload writes a file when it runs; each has a control that does run it, in a way that this
project does not use.
"""

import contextlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
import yaml
from accelerate import Accelerator
from forked import run_ranks
from rows import Files, last_checkpoint, make_rows, run_main, words_of, write_rows, write_split
from transformers import AutoConfig, AutoTokenizer

from bertdist import check, predict


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "ran")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that a payload writes."""
    return tmp_path / "payload_ran"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_split(tmp_path, 16, 6)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def answering_yes(accelerator: Accelerator) -> None:
    """Whoever asks at the terminal gets a yes."""
    sys.stdin = io.StringIO("y\n" * 99)


def start(words: list[str], program: Any = None, n: int = 1) -> tuple[Any, str, str]:
    more = (program,) if program else ()
    return run_ranks(n, run_main, words, answering_yes, *more)[0]  # type: ignore[no-any-return]


def code_that_marks(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').write('ran')\n"


# ---- Pickles

PICKLES = (
    "pytorch_model.bin training_args.bin optimizer.pt scheduler.pt rng_state.pth "
    "custom_checkpoint_0.pkl random_states_0.pkl"
).split()


def plant(folder: Path, mark: Path) -> None:
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))


def test_no_pickle_of_a_model_folder_is_loaded(
    model: Path, files: Files, tmp_path: Path, mark: Path
) -> None:
    plant(model, mark)
    code, said, _ = start(words_of(model, tmp_path / "out", files, max_train_steps=1))
    assert code == 0 and not mark.exists(), said
    best = tmp_path / "out" / "best"
    plant(best, mark)
    assert (
        start(["--model", str(best), "--text", "a fine film", "--use_cpu", "yes"], predict)[0] == 0
        and not mark.exists()
    )
    (model / "model.safetensors").unlink()  # now a pickle is all there is
    code, said, _ = start(words_of(model, tmp_path / "other", files, max_train_steps=1))
    assert code == 1 and "bertdist: --model_name_or_path" in said and not mark.exists()
    with contextlib.suppress(Exception):  # the control
        torch.load(model / "pytorch_model.bin", weights_only=False)
    assert mark.exists()


def test_no_pickle_of_a_checkpoint_is_loaded(
    model: Path, files: Files, tmp_path: Path, mark: Path
) -> None:
    words = words_of(
        model,
        tmp_path / "out",
        files,
        max_train_steps=2,
        save_every="1 steps",
        lr_scheduler_type="constant",
    )
    assert start(words)[0] == 0
    plant(last_checkpoint(tmp_path / "out"), mark)
    code, said, _ = start([*words, "--max_train_steps", "3"])
    assert code == 0 and "(step 2)." in said and not mark.exists()
    for name in (
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    ):  # a pickle in the place of a file
        newest = max(
            path for path in (tmp_path / "out" / "checkpoints").iterdir() if path.name[5:].isdigit()
        )
        (newest / name).write_bytes(pickle.dumps(Payload(mark)))
        code, said, _ = start([*words, "--max_train_steps", "3"])
        assert code == 0 and "Skipping damaged checkpoint" in said and not mark.exists(), said


# ---- Code of a model folder


@pytest.mark.parametrize("kind", ["bert", "of_its_own"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_module_of_a_model_folder_is_imported(
    model: Path, files: Files, tmp_path: Path, mark: Path, kind: str, file: str
) -> None:
    (model / "evil.py").write_text(
        code_that_marks(mark) + "from transformers import BertConfig, BertTokenizerFast\n"
        "class Config(BertConfig):\n    model_type = 'of_its_own'\nclass Model: pass\n"
        "class Tokenizer(BertTokenizerFast): pass\n"
    )
    settings = json.loads((model / file).read_text())
    if file == "config.json":
        settings |= {"model_type": kind}
        settings["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModelForSequenceClassification": "evil.Model",
        }
    else:
        settings |= {
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
            "tokenizer_class": "EvilTokenizer",
        }
    (model / file).write_text(json.dumps(settings))
    code, said, _ = start(words_of(model, tmp_path / "out", files, max_train_steps=1))
    assert not mark.exists(), said
    if file == "config.json" and kind == "of_its_own":
        assert code == 1 and said.splitlines()[-1].startswith("bertdist: --model_name_or_path"), (
            said
        )

    def trust(accelerator: Accelerator) -> None:
        loader: Any = AutoConfig if file == "config.json" else AutoTokenizer
        with contextlib.suppress(Exception):
            loader.from_pretrained(model, trust_remote_code=True)

    run_ranks(1, trust)  # the control
    assert mark.exists()


# ---- Code beside the data


def test_no_script_beside_the_data_is_run(
    model: Path, files: Files, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "train.py",
        "dev.py",
        "__init__.py",
        f"{tmp_path.name}.py",
        "dataset.py",
        "csv.py",
        "sitecustomize.py",
    ):
        (tmp_path / name).write_text(code_that_marks(mark))
    monkeypatch.chdir(tmp_path)
    assert (
        start(words_of(model, tmp_path / "out", files, max_train_steps=1))[0] == 0
        and not mark.exists()
    )
    script = tmp_path / "hub" / "reviews"
    script.mkdir(parents=True)
    (script / "reviews.py").write_text(code_that_marks(mark))
    write_rows(script / "train.jsonl", make_rows(8))
    for name in (str(script), str(script / "reviews.py")):
        for stream in ([], ["--streaming", "yes"]):
            words = [
                "--model_name_or_path",
                str(model),
                "--output_dir",
                str(tmp_path / "other"),
                "--use_cpu",
                "yes",
                "--max_train_steps",
                "1",
            ]
            code, said, _ = start([*words, "--dataset_name", name, *stream])
            assert not mark.exists() and code in (0, 1) and (code == 0 or "bertdist: " in said), (
                said
            )


def test_no_metric_of_the_current_folder_is_run(
    model: Path, files: Files, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("accuracy", "f1_macro"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(code_that_marks(mark))
        (tmp_path / f"{name}.py").write_text(code_that_marks(mark))
    monkeypatch.chdir(tmp_path)
    words = words_of(
        model, tmp_path / "out", files, max_train_steps=1, metrics=["accuracy", "f1_macro"]
    )
    assert start(words)[0] == 0 and not mark.exists()

    def bare_name(accelerator: Accelerator) -> None:
        with contextlib.suppress(Exception):
            evaluate.load("accuracy")

    run_ranks(1, bare_name)  # the control
    assert mark.exists()


# ---- A config


@pytest.mark.parametrize(
    "text",
    [
        "output_dir: !!python/object/apply:os.system ['echo ran > {mark}']\n",
        "? !!python/object/apply:os.system ['echo ran > {mark}']\n: 3\n",
        "!!python/object/apply:os.system ['echo ran > {mark}']\n",
    ],
)
def test_no_object_of_a_config_is_created(
    model: Path, files: Files, tmp_path: Path, mark: Path, text: str
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text.replace("{mark}", str(mark)))
    code, said, _ = start(
        ["--config", str(config), *words_of(model, tmp_path / "out", files, max_train_steps=1)]
    )
    assert code == 1 and "bertdist: " in said and not mark.exists(), said
    with contextlib.suppress(Exception):  # the control
        yaml.unsafe_load(config.read_text())
    assert mark.exists()


# ---- Texts

HOSTILE = [
    "=cmd|'/C calc'!A0",
    "[bold red on white]markup[/] [link=file:///etc/passwd]x[/link] [/]",
    "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b5n",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "{{7*7}} ${7*7} %s %n {0}",
    "\u202egnirts\u2066",
]


def commands_in(text: str) -> list[str]:
    """What a terminal would obey."""
    return [
        char for char in text if (ord(char) < 32 and char not in "\n\t\r") or 127 <= ord(char) < 160
    ]


def hostile_files(folder: Path) -> Files:
    rows = [{"text": text, "label": label} for text in HOSTILE for label in ("[red]a", "\x1b[31mb")]
    return Files(
        write_rows(folder / "hostile.jsonl", rows),
        write_rows(folder / "[red]dev\x1b[31m.jsonl", rows),
    )


def test_texts_and_labels_reach_the_terminal_as_text(model: Path, tmp_path: Path) -> None:
    files = hostile_files(tmp_path)
    words = words_of(model, tmp_path / "out", files, max_train_steps=1)
    code, said, _ = start(words)
    assert code == 0 and "[red]a" in said and commands_in(said) == [], (
        "labels in the tables, the file's name in a sentence"
    )
    code, said, _ = start(
        [*words, "--label_names", "x", "y", "--output_dir", str(tmp_path / "other")]
    )
    assert code == 1 and "\\x1b[31mb" in said and commands_in(said) == [], "a label in a complaint"
    assert commands_in("\x1b[31m") == ["\x1b"], "the control"


def test_check_shows_texts_as_text(tmp_path: Path) -> None:
    files = hostile_files(tmp_path)
    code, said, shown = start(
        ["--train_file", str(files.train), "--validation_file", str(files.dev)], check
    )
    assert code in (0, 1) and "[red]a" in shown and commands_in(shown + said) == [], shown + said


def test_predictions_keep_texts_out_of_the_terminal(model: Path, tmp_path: Path) -> None:
    files = hostile_files(tmp_path)
    assert start(words_of(model, tmp_path / "out", files, max_train_steps=1))[0] == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines()
    assert len(lines) == 2 * len(HOSTILE)
    for line in lines:
        assert commands_in(line.decode()) == [] and json.loads(line)["label"] in (
            "[red]a",
            "\x1b[31mb",
        )
    answers = start(
        ["--model", str(tmp_path / "out" / "best"), "--text", *HOSTILE, "--use_cpu", "yes"], predict
    )
    assert answers[0] == 0 and commands_in(answers[2]) == []
