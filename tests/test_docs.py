"""The pages of docs/: every command, block of Python and YAML in them is read by what it is for, quoted messages are in the code, and the
pages that are made of the code have every flag and name.

`make docs` builds the site; it needs the extra `docs`, so no test does. tests/test_readme.py has paths, links and test names.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from rows import make_rows, write_rows

import bertdist
from bertdist.cli import COMMANDS, OTHER_COMMANDS
from bertdist.core.args import read_config, read_settings
from bertdist.core.errors import BertdistError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NO_COMMANDS = ("log.md",)  # what was run once, on versions of its time
ANY = ("...", "$@")  # a command with these is a part of one


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    kind: str  # bash, python, yaml, ""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page} line {self.line}"


def blocks_of(page: str, text: str) -> Iterator[Block]:
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


@cache
def all_blocks() -> list[Block]:
    pages = [page for page in PAGES if page.name not in NO_COMMANDS]
    return [
        block
        for page in pages
        for block in blocks_of(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))
    ]


def commands_of(block: str) -> Iterator[list[str]]:
    """The words of each `bertdist` command of a block, however it is started."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    for line in lines:
        words = shlex.split(re.sub(r"\$(\w+)", r"\1", line), comments=True)
        parts: list[list[str]] = [[]]
        for word in words:
            parts.append([]) if word in ("|", "&&", "||", ";", "&") else parts[-1].append(word)
        for part in parts:
            yield from filter(None, [_own_command(part)])


def _own_command(words: list[str]) -> list[str] | None:
    modules = {"eval": "evaluate"}
    for i, word in enumerate(words):
        if word == "bertdist" and i == 0 and len(words) > 1:
            return words[1:]
        name = re.fullmatch(r"(?:bertdist/(\w+)\.py|bertdist\.(\w+))", word)
        if name and (name[2] is None or words[i - 1] == "-m"):
            found = name[1] or name[2]
            return [modules.get(found, found), *words[i + 1 :]]
        if word.startswith("launch/") and word.endswith(".slurm"):
            script = Path(word).stem
            return [script if script in COMMANDS else "train", *words[i + 1 :]]
    return None


def problem_of(words: list[str], yaml_file: Path) -> str:
    """What the command's own parser says of a command; "" if it takes it. Files need not exist."""
    name, *rest = words
    if name in OTHER_COMMANDS or name.startswith("-"):
        return ""
    if name not in COMMANDS:
        return f"there is no command {name!r}"
    if any(word in ANY for word in rest) or "--help" in rest:
        return ""
    for flag in ("--processes", "--config_file"):
        if flag in rest:
            at = rest.index(flag)
            rest = rest[:at] + rest[at + 2 :]
    rest = [str(yaml_file) if rest[i - 1] == "--config" else word for i, word in enumerate(rest)]
    try:
        COMMANDS[name].read(rest)
    except BertdistError as error:
        return str(error)
    return ""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run.yaml, in a folder without files of other names."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    text = "model_name_or_path: m\ntrain_file: a.csv\noutput_dir: new\nvalidation_file: b.csv\n"
    file.write_text(text)
    (tmp_path / "out").mkdir()  # of a run, which a command may write beside
    return file


def wrong_commands(found: list[Block], settings: Path) -> list[str]:
    return [
        f"{block.where}: bertdist {shlex.join(words)}: {problem}"
        for block in found
        if block.kind in ("bash", "sh", "")
        for words in commands_of(block.text)
        if (problem := problem_of(words, settings))
    ]


def test_every_command_is_taken_by_its_parser(settings: Path) -> None:
    found = all_blocks()
    assert sum(1 for block in found for _ in commands_of(block.text)) > 40
    assert wrong_commands(found, settings) == []


def test_a_wrong_command_is_found(settings: Path) -> None:
    texts = [
        "bertdist train --config run.yaml --learning_rat 1\n",
        "bertdist train --config run.yaml --learning_rate fast\n",
        "bertdist trian --config run.yaml\n",
        "python bertdist/train.py --config run.yaml --eval_every 5\n",
        "accelerate launch -m bertdist.eval --modle out --input x.csv\n",
        "cat x | bertdist predict --model out\n",
    ]
    found = wrong_commands([Block("p", 1, "bash", text) for text in texts], settings)
    assert len(found) == len(texts) and "Unknown setting --learning_rat" in found[0]


# ---- Python


def undefined_names(code: str) -> set[str]:
    """Names of `bertdist` that a block uses and that do not exist: imports, attributes, keywords of
    `bertdist.train` and `bertdist.evaluate`. Raises SyntaxError.
    """
    missing = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bertdist":
            module = importlib.import_module(str(node.module))
            missing |= {alias.name for alias in node.names if not hasattr(module, alias.name)}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bertdist":
            missing |= set() if hasattr(bertdist, node.attr) else {f"bertdist.{node.attr}"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            known = CALLS[ast.unparse(node.func)]()
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            missing |= {f"{ast.unparse(node.func)}({name}=)" for name in given - known}
    return missing


def _keywords(call: str, sections: list[Any]) -> set[str]:
    own = set(inspect.signature(getattr(bertdist, call)).parameters)
    return own | {field.name for section in sections for field in dataclasses.fields(section)}


CALLS: dict[str, Callable[[], set[str]]] = {
    f"bertdist.{name}": lambda name=name: _keywords(name, COMMANDS[name].sections)  # type: ignore[misc]
    for name in ("train", "evaluate")
}


def test_every_block_of_python_compiles_and_names_what_exists() -> None:
    found = [block for block in all_blocks() if block.kind == "python"]
    assert len(found) >= 5
    wrong = {block.where: undefined_names(block.text) for block in found}
    assert {where: names for where, names in wrong.items() if names} == {}


def test_a_wrong_block_of_python_is_found() -> None:
    code = "import bertdist\nfrom bertdist import Predicter\nbertdist.train(lerning_rate=1)\nbertdist.tune()"
    assert undefined_names(code) == {"Predicter", "bertdist.train(lerning_rate=)", "bertdist.tune"}
    with pytest.raises(SyntaxError):
        undefined_names("x = = 1")


NOT_RUN = {  # page -> why a block of it is compiled only
    "docs/own_loop.md": "parts of examples/own_loop.py, which tests/runs/test_examples.py runs",
    "docs/serving.md": "tests/unit/test_serving_page.py runs them",
    "docs/coming_from_trainer.md": "a script of transformers' Trainer, before",
}


@pytest.fixture(scope="module")
def example(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """What the blocks train and read: a run of a tiny model, and the folder of their files."""
    folder = tmp_path_factory.mktemp("pages")
    rows, words = make_rows(24), {"use_cpu": True, "dataloader_num_workers": 0}
    with contextlib.redirect_stderr(io.StringIO()):
        run = bertdist.train(
            model_name_or_path=str(tiny_model),
            train_rows=rows[:16],
            validation_rows=rows[16:],
            output_dir=str(folder / "out"),
            max_train_steps=2,
            **words,
        )
    (folder / "out" / "sst2").symlink_to(folder / "out")
    for name in ("train.csv", "dev.tsv", "test.tsv", "test.csv", "new.csv", "reviews.csv"):
        write_rows(folder / name, rows)
    return run, folder


def test_blocks_of_python_run(
    example: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny model in place of the one that is named; each call of train is checked as it stands, and gives the one run."""
    run, folder = example
    monkeypatch.chdir(folder)

    def train(train_rows: Any = None, validation_rows: Any = None, **settings: Any) -> Any:
        given = {"train_file": "train.csv"} if train_rows is not None else {}
        if validation_rows is not None:
            given["validation_file"] = "dev.tsv"
        read_settings({**settings, **given})
        return run

    monkeypatch.setattr(bertdist, "train", train)
    rows, left = make_rows(12), set()
    ran = 0
    for page in dict.fromkeys(block.page for block in all_blocks()):
        names = {"frame": rows, "dev": rows, "test": rows, "name": "google-bert/bert-base-uncased"}
        names["data"] = {"train": rows, "validation": rows}  # type: ignore[assignment]
        for block in (x for x in all_blocks() if x.page == page and x.kind == "python"):
            if page in NOT_RUN and "bertdist.train(" not in block.text:
                left.add(page)
                continue
            exec(compile(block.text, block.where, "exec"), names)
            ran += 1
    assert left == set(NOT_RUN) and ran >= 5
    assert "label" in capsys.readouterr().out  # what a Predictor answered


# ---- YAML


def test_every_block_of_yaml_is_read_as_a_config(tmp_path: Path) -> None:
    found = [block for block in all_blocks() if block.kind == "yaml"]
    assert found
    for block in found:
        file = tmp_path / "run.yaml"
        file.write_text(block.text, encoding="utf-8")
        assert isinstance(yaml.safe_load(block.text), dict), block.where
        config = read_config(["--config", str(file)])
        assert config.model.model_name_or_path, block.where
    file.write_text("model_name_or_path: m\neval_evry: 10%\n")  # the control
    with pytest.raises(BertdistError, match="eval_evry"):
        read_config(["--config", str(file)])


# ---- Messages


@cache
def messages() -> list[str]:
    """Every string of the code, with … for what is filled in."""
    texts: list[str] = []
    for path in sorted((ROOT / "bertdist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "…" for x in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [text.replace("\n", " ") for text in texts if " " in text]


def missing_messages(page: str) -> list[str]:
    """Quoted messages (`> ...`) that no string of the code is; … stands for anything."""
    return [quote for quote in re.findall(r"^> (.+)$", page, re.MULTILINE) if not _is_said(quote)]


def _is_said(quote: str) -> bool:
    parts = re.split(r"[…\s]*…[…\s]*", quote.strip(" …"))
    pattern = re.compile(".*".join(map(re.escape, parts)))
    return any(pattern.search(text) for text in messages() if parts[0] in text)


def test_every_quoted_message_is_one_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^> ", page, re.MULTILINE)) > 25
    assert missing_messages(page) == []


def test_a_quoted_message_that_is_gone_is_found() -> None:
    quotes = [
        "> No training rows: pass --train_file.",
        "> Out of memory in step …; it is repeated.",
    ]
    assert missing_messages("\n".join(quotes)) == [quote[2:] for quote in quotes]


# ---- What docs/hooks.py makes


@pytest.fixture(scope="module")
def made() -> Any:
    """The module docs/hooks.py, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_a_command_has_every_flag(made: Any) -> None:
    from bertdist.core.flags import flags_of

    for name, command in COMMANDS.items():
        page = made.flag_page(name)
        for section in command.sections:
            for flag in flags_of(section):
                assert f"### `--{flag.name}" in page, flag.name
    assert "### `--freeze TEXT ...` { #freeze }" in made.flag_page("train")
    assert r"Rows to evaluate on after training and every --eval\_every." in made.flag_page("train")


def test_the_page_of_python_has_every_public_name(made: Any) -> None:
    page = made.python_page()
    for name in bertdist.__all__:
        assert name == "__version__" or re.search(rf"^::: bertdist[\w.]*\.{name}$", page, re.M)


def test_links_out_of_the_site_become_paths(made: Any) -> None:
    text = "[a loop](../examples/own_loop.py), [log](log.md), [x](https://a.b/c), [top](#a)"
    expected = "a loop (`examples/own_loop.py`), [log](log.md), [x](https://a.b/c), [top](#a)"
    assert made.without_other_links(text, Path()) == expected
    assert made.without_other_links("[R](../../README.md#x)", Path("decisions")) == (
        "[R](../index.md#x)"
    )
    text = "[a](docs/log.md#x) [b](examples/x.py) ![c](docs/pictures/c.png) [d](https://e.f)"
    expected = "[a](log.md#x) [b](../examples/x.py) ![c](pictures/c.png) [d](https://e.f)"
    assert made.relative_to_docs(text) == expected
    assert made.relative_to_docs('<img src="docs/pictures/c.png">') == '<img src="pictures/c.png">'


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load(re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text()))["nav"]

    def leaves(entries: Any) -> Iterator[str]:
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, str):
                yield entry
            else:
                yield from (leaf for value in entry.values() for leaf in leaves(value))

    named = set(leaves(nav))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    folders = tuple(name for name in named if name.endswith("/"))
    assert {page for page in pages - named if not page.startswith(folders)} == set()
    made_pages = {"index.md", "changelog.md"}
    assert {name for name in named - pages if not name.endswith("/")} == made_pages


# ---- Pictures


def test_a_picture_shows_what_is_left_on_the_terminal() -> None:
    from bench.pictures import screen_of

    output = "a\r\n\x1b[?25lstep 1\r\x1b[2K\x1b[1A\x1b[2Kb\r\n\x1b[1mstep 2\x1b[0m\r\n\x1b[?25h"
    assert screen_of(output) == "b\n\x1b[1mstep 2\x1b[0m"
    assert screen_of(output.replace("\x1b[1A", "")) != screen_of(output)  # the control


def test_pictures_are_small_and_name_no_place() -> None:
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert {path.name for path in pictures} >= {"terminal.svg", "report_light.png"}
    assert max(path.stat().st_size for path in pictures) < 300_000
    text = (ROOT / "docs" / "pictures" / "terminal.svg").read_text()
    assert "@font-face" not in text and "/tmp" not in text and "bin/python" not in text
