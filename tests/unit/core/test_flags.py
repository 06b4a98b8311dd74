"""Config dataclasses -> flags and their help: what is shown fits 80 columns and is complete."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from bertdist.core.args import TRAIN_SECTIONS, read_config, read_predict_config
from bertdist.core.config import PredictConfig, setting
from bertdist.core.errors import ConfigError
from bertdist.core.flags import create_parser, flags_of, help_request, help_text
from bertdist.data_quality.config import (
    CheckConfig,
    LabelIssueConfig,
    read_check_arguments,
    read_check_config,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One field of every kind."""

    _argument_group_name = "sample"

    name: str = setting("x", "A name.")
    count: int | None = setting(None, "A count.", brief="How many")
    ratio: float = setting(0.5, "A ratio.")
    verbose: bool = setting(False, "Say more.")
    kind: Literal["a", "b"] | None = setting(None, "A kind.")
    files: list[str] | None = setting(None, "Files.")
    shares: list[float] | None = setting(None, "Shares.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--name", "y", "--count", "3"], {"name": "y", "count": 3}),
        (["--ratio=1e-3", "--verbose"], {"ratio": 0.001, "verbose": True}),
        (["--verbose", "No"], {"verbose": False}),
        (["--verbose=T"], {"verbose": True}),
        (["--kind", "b"], {"kind": "b"}),
        (["--files", "a", "b", "--shares", "1", "2.5"], {"files": ["a", "b"], "shares": [1, 2.5]}),
    ],
)
def test_every_kind_of_field_is_a_flag(words: list[str], expected: dict[str, Any]) -> None:
    found = vars(create_parser([Sample]).parse_args(words))
    assert found.pop("config") is None
    assert found == dataclasses.asdict(Sample(**expected))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "many"], "--count: invalid int value: 'many'. Whole."),
        (["--kind", "c"], "--kind: invalid choice: 'c' (choose from"),
        (["--verbose", "maybe"], "--verbose: expected yes or no, got maybe. --help says"),
        (["--files"], "--files: expected at least one argument. --help says what each"),
    ],
)
def test_a_wrong_value_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create_parser([Sample], {"--count": "Whole."}).parse_args(words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_values_in_help_say_their_kind() -> None:
    assert {flag.name: flag.value for flag in flags_of(Sample)} == {
        "name": "TEXT",
        "count": "N",
        "ratio": "X",
        "verbose": "",
        "kind": "a|b",
        "files": "TEXT ...",
        "shares": "X ...",
    }


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        ([], None),
        (["--seed", "1"], None),
        (["--help"], "usual"),
        (["-h", "--seed"], "usual"),
        (["--seed", "1", "--help", "all"], "all"),
        (["--help=all"], "all"),
        (["--help", "nosuch"], "nosuch"),
        (["--help=seed", "all"], "seed"),
    ],
)
def test_help_is_asked_for(words: list[str], request_: str | None) -> None:
    assert help_request(words) == request_


@pytest.mark.parametrize("sections", [TRAIN_SECTIONS, [PredictConfig], [CheckConfig], [Sample]])
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits_the_terminal(
    sections: list[Any], everything: bool, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_text("bertdist train", "About.", sections, everything).split("\n")
    assert max(map(len, lines)) <= min(columns, 100)
    assert lines[:2] == ["About.", ""] and lines[-1]


def test_short_help_has_the_usual_flags_and_full_help_all() -> None:
    short = help_text("p", "", [Sample], everything=False)
    assert "  --count N      How many\n" in short and "--ratio" not in short
    assert short.endswith(
        "p --help all lists all 8 flags and their defaults;\n--help NAME explains one of them."
    )
    full = help_text("p", "", [Sample], everything=True)
    assert "sample:\n  --name TEXT\n      A name. Default: x.\n" in full
    assert "  --verbose\n      Say more.\n" in full  # no default that says nothing
    for flag in flags_of(Sample):
        assert f"  --{flag.name}" in full


def test_training_has_about_15_usual_flags() -> None:
    usual = [flag for section in TRAIN_SECTIONS for flag in flags_of(section) if flag.brief]
    assert 12 <= len(usual) <= 20
    for flag in (*usual, *flags_of(PredictConfig), *flags_of(LabelIssueConfig)):
        assert len(flag.brief) <= 46 and not flag.brief.endswith("."), flag


@pytest.mark.parametrize(
    "read", [read_config, read_predict_config, read_check_config, read_check_arguments]
)
def test_help_is_printed_and_exits_with_0(
    read: Callable[[Sequence[str]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(["--nonsense", "--help"])
    assert ended.value.code == 0 and "--config FILE" in capsys.readouterr().out


def test_help_explains_one_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("learning_rate", "learning-rate"):
        with pytest.raises(SystemExit) as ended:
            read_config(["--help", word])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and out.startswith("  --learning_rate X\n      ")
        assert len(out.splitlines()) < 6


@pytest.mark.parametrize(
    ("word", "hint"),
    [("nosuch", ""), ("learning_rat", " Did you mean 'learning_rate'?")],
)
def test_help_with_an_unknown_word_is_an_error(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_config(["--help", word])
    said = f"bertdist: --help {word}: there is no such flag.{hint} Known: bertdist train --help, "
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and error.startswith(said)


def test_flags_are_read_without_torch_or_transformers() -> None:
    code = (
        "import sys, bertdist.cli\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'evaluate', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr
    control = subprocess.run(
        [sys.executable, "-c", f"import pyarrow\n{code}"], capture_output=True, text=True
    )
    assert control.stdout == "['pyarrow']\n"
