"""README.md and docs/ are correct: flags exist, files exist, the layout is complete.

The layout is the README's first fenced block with a line for `bertdist/`. Its first column is the
repository's root, deeper columns (drawn lines or spaces) are inside; a line is `name  what it is`
or `name, name  what they are`. Commands are in fenced blocks. docs/log.md and docs/decisions/
describe the past and are not checked.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Program of this repository -> the parser of its flags. `-m bertdist.train` is `bertdist/train.py`.
PROGRAMS = {
    "bertdist/train.py": "train",
    "bertdist/predict.py": "predict",
    "bertdist/check.py": "check",
    "bertdist/eval.py": "evaluate",
    "bertdist/export.py": "export",
    "bertdist/report.py": "report",
    "bertdist/sweep.py": "sweep",
    "bertdist/push.py": "push",
    "bertdist/slurm.py": "slurm",
    "examples/own_loop.py": "train",
    "launch/train.slurm": "train",
    "launch/sweep.slurm": "sweep",
    "launch/multi_node.slurm": "train",
    "launch/smoke.sh": "train",
    "launch/demo.py": "demo",
    "bench/peers.py": "peers",
    "bench/scaling.py": "scaling",
    "bench/reading.py": "reading",
    "bench/compiled.py": "compiled",
    "bench/startup.py": "startup",
    "bench/gpu.py": "gpu",
}
OWN = "train|predict|check|export|report|sweep|push|slurm"  # commands whose script has their name
OTHER_PROGRAMS = {
    "curl",
    "docker",
    "git",
    "pip",
    "make",
    "torchrun",
    "pytest",
    "ruff",
    "mypy",
    "srun",
    "sbatch",
    "salloc",
    "squeue",
    "scancel",
    "scontrol",
}


def documents(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the README and of the pages of docs/."""
    pages = [
        path for folder in ("docs", "docs/guides") for path in sorted((root / folder).glob("*.md"))
    ]
    for path in [root / "README.md", *pages]:
        if path.name != "log.md":
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8")


def blocks(text: str) -> list[list[str]]:
    """The lines of each fenced block."""
    return [
        block.splitlines()
        for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    ]


def tree(text: str) -> list[str]:
    """The paths that the README's tree shows."""
    for lines in blocks(text):
        paths: list[str] = []
        above: list[tuple[int, str]] = []  # (column, folder) from the root to here
        for line in lines:
            if not (match := re.match(r"[\s│├└─|`+-]*", line)) or match.end() == len(line):
                continue
            column = match.end()
            above = [(at, folder) for at, folder in above if at < column]
            names = re.match(r"(?:[^\s,]+, *)*[^\s,]+", line[column:])
            parent = "".join(folder for _, folder in above)
            for name in re.split(r", *", names[0]) if names else []:
                paths.append(parent + name)
                if name.endswith("/"):
                    above = [*(pair for pair in above if pair[0] < column), (column, name)]
        if "bertdist/" in paths:
            return paths
    return []


def wrong_paths(root: Path) -> list[str]:
    """Paths of the README's layout that do not exist."""
    paths = tree((root / "README.md").read_text(encoding="utf-8"))
    return [
        path
        for path in paths
        if not ((root / path).is_dir() if path.endswith("/") else (root / path).is_file())
    ]


def unlisted_paths(root: Path) -> list[str]:
    """Top-level files and folders, packages and scripts that the README's layout lacks.

    Hidden and ignored files and the README itself do not count.
    """
    ignore = root / ".gitignore"
    patterns = (
        [line.strip("/ ") for line in ignore.read_text().splitlines() if line and line[0] != "#"]
        if ignore.exists()
        else []
    )
    paths = [
        path
        for path in root.iterdir()
        if path.name[0] != "." and not any(fnmatch.fnmatch(path.name, p) for p in patterns)
    ]
    paths += [path.parent for path in root.glob("bertdist/*/__init__.py")]
    paths += root.glob("bertdist/[!_]*.py")
    names = [f"{path.relative_to(root)}{'/' if path.is_dir() else ''}" for path in paths]
    return sorted(
        set(names) - set(tree((root / "README.md").read_text(encoding="utf-8"))) - {"README.md"}
    )


def commands(text: str) -> Iterator[str]:
    """Commands of the fenced blocks, split at && and pipes, with module names as paths.

    Lines are joined at backslashes; prompts and comments are removed.
    """
    for lines in blocks(text):
        for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
            line = re.sub(r"^\s*(\$ |> )?|(^|\s)#.*$", "", line)
            line = re.sub(r"-m (bertdist|bench)\.(\w+)", r"\1/\2.py", line)
            line = re.sub(rf"^bertdist ({OWN})\b", r"bertdist/\1.py", line)
            line = re.sub(r"^bertdist evaluate\b", "bertdist/eval.py", line)
            yield from (
                part.strip()
                for part in re.split(r"\s(?:&&|\|\|?|;|&)(?:\s|$)", line)
                if part.strip()
            )


@cache
def flags_of(program: str) -> frozenset[str]:
    """The flags of train, predict, check, demo, a benchmark or `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    from bench import compiled, gpu, peers, reading, scaling, startup
    from bertdist.cli import COMMANDS
    from bertdist.data_quality.config import LabelIssueConfig

    if program == "launch":
        return frozenset(
            word for action in launch_command_parser()._actions for word in action.option_strings
        )
    if program in ("compiled", "gpu", "peers", "reading", "scaling", "startup"):
        parser = {
            "compiled": compiled,
            "gpu": gpu,
            "peers": peers,
            "reading": reading,
            "scaling": scaling,
            "startup": startup,
        }[program].parser()
        return frozenset(word for action in parser._actions for word in action.option_strings)
    if program == "demo":
        return frozenset(
            re.findall(r'"(--\w+)"', (ROOT / "launch" / "demo.py").read_text(encoding="utf-8"))
        )
    sections: set[Any] = set(COMMANDS[program].sections)
    if program in ("check", "sweep", "slurm"):  # they take the flags of training too
        sections |= {*COMMANDS["train"].sections, LabelIssueConfig}
    if program == "slurm":  # it submits these commands
        sections |= {*COMMANDS["predict"].sections, *COMMANDS["sweep"].sections}
    return frozenset(
        f"--{field.name.rstrip('_')}"
        for section in sections
        for field in dataclasses.fields(section)
    ) | {"--config", "--help", "--processes"}


def unknown_flags(root: Path) -> list[str]:
    """`page: --flag (program)` for each flag that its program does not have."""
    problems = []
    for page, text in documents(root):
        for command in commands(text):
            first = next((word for word in command.split() if "=" not in word), "")
            program = next(
                (match for match in re.finditer("|".join(map(re.escape, PROGRAMS)), command)), None
            )
            owner, begin = (
                (PROGRAMS[program[0]], program.end()) if program else ("any", len(command))
            )
            for flag in re.finditer(r"(?<![\w-])--[a-zA-Z][\w-]*", command):
                if flag.start() > begin:
                    known, name = flags_of(owner), owner
                elif "accelerate launch" in command:
                    known, name = flags_of("launch"), "accelerate launch"
                elif first.split("/")[-1] in OTHER_PROGRAMS or " pip " in command:
                    continue
                else:
                    known, name = (
                        frozenset().union(*map(flags_of, {*PROGRAMS.values(), "launch"})),
                        "any program",
                    )
                if flag[0] not in known:
                    problems.append(f"{page}: {flag[0]} ({name})")
    return problems


def missing_files(root: Path) -> list[str]:
    """`page: path` for each missing file that a command or link names; `page: make x` likewise."""
    folders = r"(?:bertdist|accelerate_configs|launch|tests|docs|bench|\.ci)"
    targets = re.findall(
        r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    problems = []
    for page, text in documents(root):
        for command in commands(text):
            named = re.findall(rf"(?<![\w./-]){folders}/[\w./-]+", command)
            problems += [f"{page}: {path}" for path in named if not (root / path).exists()]
            if re.match(r"(\w+=\S+ )*make( |$)", command):
                words = [
                    word
                    for word in command.split("make", 1)[1].split()
                    if "=" not in word and word[0] != "-"
                ]
                problems += [f"{page}: make {word}" for word in words if word not in targets]
        links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
        problems += [
            f"{page}: {link}" for link in links if not (root / page).parent.joinpath(link).exists()
        ]
    return problems


def missing_tests(root: Path) -> list[str]:
    """`page: name` for each test file, and each test, that a page quotes and that does not exist.

    A name may end in `*`, for all tests that begin with it.
    """
    paths = {str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py")}
    sources = "".join((root / path).read_text(encoding="utf-8") for path in paths)
    problems = []
    for page, text in documents(root):
        quoted = " ".join(re.findall(r"`([^`\n]+)`", text))
        for name in re.findall(r"(?<![\w/-])[\w/]*\btest_\w+(?!\w|\.(?!py\b))(?:\.py|\*)?", quoted):
            if name.endswith(".py"):
                exists = name in paths
            elif name.endswith("*"):
                exists = f"def {name[:-1]}" in sources
            else:
                exists = f"def {name}(" in sources
            problems += [] if exists else [f"{page}: {name}"]
    return problems


RULES: list[Callable[[Path], list[str]]] = [
    wrong_paths,
    unlisted_paths,
    unknown_flags,
    missing_files,
    missing_tests,
]


@pytest.mark.parametrize("rule", RULES)
def test_readme_and_docs_are_correct(rule: Callable[[Path], list[str]]) -> None:
    assert (ROOT / "README.md").exists(), "README.md is missing"
    assert rule(ROOT) == []


def test_readme_shows_the_layout_and_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"bertdist/train.py", "bertdist/core/", "bertdist/models/"} <= set(tree(text))
    assert "make demo" in text
    for part in ("accelerate launch", "bertdist/predict.py"):
        assert any(part in command for command in commands(text)), f"README has no {part!r}"


GOOD = """# A project

| from elsewhere | here |
|---|---|
| `--per_device_train_batch_size` | `--train_batch_size` |

```bash
pip install --no-deps -e .   # a comment with --nonsense
make test && make demo
accelerate launch --config_file accelerate_configs/cpu.yaml bertdist/train.py \\
    --model_name_or_path M --train_file train.tsv --output_dir out
CUDA_VISIBLE_DEVICES=3 python -m bertdist.predict --model out/best --text "not --a_flag's" | head
sbatch --nodes 2 launch/train.slurm --config run.yaml --learning_rate=1e-4
```

```
accelerate_configs/
    cpu.yaml            one process
bertdist/               the package
├── core/               errors
├── train.py            the loop, as prose
└── predict.py          texts -> labels
docs/, tests/, launch/
    demo.py, train.slurm
Makefile                `make` lists the targets
```

[The guide](docs/guide.md#resume), [elsewhere](mailto:nobody)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small repository whose README is correct."""
    for name in (
        "accelerate_configs/cpu.yaml",
        "bertdist/__init__.py",
        "bertdist/__main__.py",
        "bertdist/core/__init__.py",
        "bertdist/train.py",
        "bertdist/predict.py",
        "launch/train.slurm",
        "tests/ranks/test_loop.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    (tmp_path / "launch" / "demo.py").write_text("")
    (tmp_path / "tests" / "ranks" / "test_loop.py").write_text("def test_it_ends() -> None:\n")
    (tmp_path / "Makefile").write_text("test: check\n\tpytest\ndemo:\n\tpython\n")
    (tmp_path / ".gitignore").write_text("# made\n/out_*/\n*.egg-info/\ndocs/\n")
    (tmp_path / "README.md").write_text(GOOD.replace("--a_flag", "a flag"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "guide.md").write_text(
        "```\npython bertdist/train.py --train_file x\n```\n[Back](../README.md)\n"
        "`tests/ranks/test_loop.py::test_it_ends`, `test_it_*`\n"
    )
    (tmp_path / "docs" / "log.md").write_text("```\npython bertdist/gone.py --gone\n```\n")
    (tmp_path / "out_1").mkdir()
    return tmp_path


@pytest.mark.parametrize("rule", RULES)
def test_a_correct_readme_passes(rule: Callable[[Path], list[str]], project: Path) -> None:
    assert rule(project) == []


BROKEN = [
    (wrong_paths, "cpu.yaml ", "gpu.yaml ", ["accelerate_configs/gpu.yaml"]),
    (wrong_paths, "├── train.py", "├── train/", ["bertdist/train/"]),
    (wrong_paths, "demo.py, train.slurm", "demo.py, gone.slurm", ["launch/gone.slurm"]),
    (unlisted_paths, "Makefile   ", "", ["Makefile"]),
    (unlisted_paths, "└── predict.py", "└── ", ["bertdist/predict.py"]),
    (unlisted_paths, "├── core/", "├── ", ["bertdist/core/"]),
    (
        unknown_flags,
        "--train_file train.tsv",
        "--train_files train.tsv",
        ["README.md: --train_files (train)"],
    ),
    (
        unknown_flags,
        "--config_file a",
        "--train_file a",
        ["README.md: --train_file (accelerate launch)"],
    ),
    (
        unknown_flags,
        "--model out",
        "--model_name_or_path out",
        ["README.md: --model_name_or_path (predict)"],
    ),
    (
        unknown_flags,
        "make test &&",
        "python -m bench.peers --epochs 1 &&",
        ["README.md: --epochs (peers)"],
    ),
    (
        unknown_flags,
        "--learning_rate=1e-4",
        "--learnin_rate=1e-4",
        ["README.md: --learnin_rate (train)"],
    ),
    (missing_files, "bertdist.predict", "bertdist.predicts", ["README.md: bertdist/predicts.py"]),
    (
        missing_files,
        "accelerate_configs/cpu.yaml",
        "accelerate_configs/gpu.yaml",
        ["README.md: accelerate_configs/gpu.yaml"],
    ),
    (missing_files, "make demo", "make dmo", ["README.md: make dmo"]),
    (missing_files, "docs/guide.md", "docs/gone.md", ["README.md: docs/gone.md"]),
]


@pytest.mark.parametrize(("rule", "correct", "wrong", "problems"), BROKEN)
def test_an_incorrect_readme_is_noticed(
    rule: Callable[[Path], list[str]], correct: str, wrong: str, problems: list[str], project: Path
) -> None:
    text = (project / "README.md").read_text()
    assert correct in text
    (project / "README.md").write_text(text.replace(correct, wrong))
    assert rule(project) == problems


def test_the_pages_of_docs_are_checked_too(project: Path) -> None:
    (project / "docs" / "guide.md").write_text(
        "```\nlaunch/gone.sh\npython bertdist/train.py --gone\n```\n"
    )
    assert unknown_flags(project) == ["docs/guide.md: --gone (train)"]
    assert missing_files(project) == ["docs/guide.md: launch/gone.sh"]


@pytest.mark.parametrize(
    "quoted", ["tests/ranks/test_gone.py", "test_it_end", "test_is_*", "tests/test_loop.py"]
)
def test_a_quoted_test_that_is_gone_is_noticed(project: Path, quoted: str) -> None:
    (project / "docs" / "guide.md").write_text(f"It is tested (`{quoted}`).\n")
    assert missing_tests(project) == [f"docs/guide.md: {quoted}"]
