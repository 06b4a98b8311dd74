"""What README.md and docs/ tell to type can be typed: flags are known, files exist, and the README's tree is the repository's.

How to write them so that this can read it: the tree is the README's first fenced block with a line for `bertdist/`; its first column
is the repository's root, deeper columns are inside (drawn lines or spaces, as you like), and a line is `name  what it is` or
`name, name  what they are`. Commands stand in fenced blocks. docs/log.md and docs/decisions/ tell what was, and are not read.
"""

import dataclasses
import fnmatch
import re
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Programs of this repository -> whose flags they take. `-m bertdist.train` is `bertdist/train.py`.
PROGRAMS = {
    "bertdist/train.py": "train",
    "bertdist/predict.py": "predict",
    "bertdist/check.py": "check",
    "launch/train.slurm": "train",
    "launch/multi_node.slurm": "train",
    "launch/smoke.sh": "train",
    "launch/demo.py": "demo",
    "bench/peers.py": "peers",
    "bench/scaling.py": "scaling",
    "bench/reading.py": "reading",
    "bench/compiled.py": "compiled",
}
OTHERS = {
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
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
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
            for name in re.split(r", *", names[0]) if names else []:
                paths.append("".join(folder for _, folder in above) + name)
                if name.endswith("/"):
                    above = [*above, (column, name)]
        if "bertdist/" in paths:
            return paths
    return []


def wrong_paths(root: Path) -> list[str]:
    """What the README's tree shows and the repository does not have."""
    paths = tree((root / "README.md").read_text(encoding="utf-8"))
    return [
        path
        for path in paths
        if not ((root / path).is_dir() if path.endswith("/") else (root / path).is_file())
    ]


def untold_paths(root: Path) -> list[str]:
    """What stands at the top of the repository, or is a module, and is not in the README's tree; hidden and ignored files and the
    README aside."""
    ignore = root / ".gitignore"
    patterns = (
        [line.strip("/ ") for line in ignore.read_text().splitlines() if line and line[0] != "#"]
        if ignore.exists()
        else []
    )
    here = [
        path
        for path in root.iterdir()
        if path.name[0] != "." and not any(fnmatch.fnmatch(path.name, p) for p in patterns)
    ]
    there = [path for path in root.glob("bertdist/*.py") if path.name != "__init__.py"]
    names = [f"{path.relative_to(root)}{'/' if path.is_dir() else ''}" for path in here + there]
    return sorted(
        set(names) - set(tree((root / "README.md").read_text(encoding="utf-8"))) - {"README.md"}
    )


def commands(text: str) -> Iterator[str]:
    """Lines of the fenced blocks, joined at backslashes, without prompts and comments, cut at && and pipes; module names as paths."""
    for lines in blocks(text):
        for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
            line = re.sub(r"^\s*(\$ |> )?|(^|\s)#.*$", "", line)
            line = re.sub(r"-m (bertdist|bench)\.(\w+)", r"\1/\2.py", line)
            yield from (
                part.strip()
                for part in re.split(r"\s(?:&&|\|\|?|;|&)(?:\s|$)", line)
                if part.strip()
            )


@cache
def flags_of(program: str) -> frozenset[str]:
    """The flags that train, predict, demo, a benchmark or `accelerate launch` knows."""
    from accelerate.commands.launch import launch_command_parser

    from bench import compiled, peers, reading, scaling
    from bertdist.core.config import PredictConfig, TrainConfig
    from bertdist.data_quality.config import CheckConfig, LabelIssueConfig

    if program == "launch":
        return frozenset(
            word for action in launch_command_parser()._actions for word in action.option_strings
        )
    if program in ("compiled", "peers", "reading", "scaling"):
        parser = {"compiled": compiled, "peers": peers, "reading": reading, "scaling": scaling}[
            program
        ].parser()
        return frozenset(word for action in parser._actions for word in action.option_strings)
    if program == "demo":
        return frozenset(
            re.findall(r'"(--\w+)"', (ROOT / "launch" / "demo.py").read_text(encoding="utf-8"))
        )
    known = {"train": typing.get_type_hints(TrainConfig).values(), "predict": [PredictConfig]}
    known["check"] = [CheckConfig, LabelIssueConfig, *known["train"]]
    sections = known[program]
    return frozenset(
        f"--{field.name}" for section in sections for field in dataclasses.fields(section)
    ) | {"--config", "--help"}


def unknown_flags(root: Path) -> list[str]:
    """`page: --flag (program)` for each flag that the program in front of it does not know."""
    found = []
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
                elif first.split("/")[-1] in OTHERS or " pip " in command:
                    continue
                else:
                    known, name = (
                        frozenset().union(*map(flags_of, {*PROGRAMS.values(), "launch"})),
                        "any program",
                    )
                if flag[0] not in known:
                    found.append(f"{page}: {flag[0]} ({name})")
    return found


def missing_files(root: Path) -> list[str]:
    """`page: path` for each file of the repository that a command or a link names and that is not there; `page: make x` likewise."""
    folders = r"(?:bertdist|accelerate_configs|launch|tests|docs|bench|\.ci)"
    targets = re.findall(
        r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    found = []
    for page, text in documents(root):
        for command in commands(text):
            named = re.findall(rf"(?<![\w./-]){folders}/[\w./-]+", command)
            found += [f"{page}: {path}" for path in named if not (root / path).exists()]
            if re.match(r"(\w+=\S+ )*make( |$)", command):
                words = [
                    word
                    for word in command.split("make", 1)[1].split()
                    if "=" not in word and word[0] != "-"
                ]
                found += [f"{page}: make {word}" for word in words if word not in targets]
        links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
        found += [
            f"{page}: {link}" for link in links if not (root / page).parent.joinpath(link).exists()
        ]
    return found


RULES: list[Callable[[Path], list[str]]] = [wrong_paths, untold_paths, unknown_flags, missing_files]


@pytest.mark.parametrize("rule", RULES)
def test_the_readme_holds(rule: Callable[[Path], list[str]]) -> None:
    assert (ROOT / "README.md").exists(), "README.md is missing"
    assert rule(ROOT) == []


def test_the_readme_shows_the_tree_and_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bertdist/train.py" in tree(text)
    assert "make demo" in text
    for words in ("accelerate launch", "bertdist/predict.py"):
        assert any(words in command for command in commands(text)), (
            f"no block of the README says {words!r}"
        )


GOOD = """# A project

| from elsewhere | here |
|---|---|
| `--per_device_train_batch_size` | `--train_batch_size` |

```bash
pip install --no-deps -e .   # a comment with --nonsense
make test && make demo
accelerate launch --config_file accelerate_configs/cpu.yaml bertdist/train.py \\
    --model_name_or_path M --train_file train.tsv --output_dir out
CUDA_VISIBLE_DEVICES=3 python -m bertdist.predict --model out/best --text "not --a_flag's fault" | head
sbatch --nodes 2 launch/train.slurm --config run.yaml --learning_rate=1e-4
```

```
accelerate_configs/
    cpu.yaml            one process
bertdist/               the package
├── train.py            the loop, as prose
└── predict.py          texts -> labels
launch/
    demo.py, train.slurm
Makefile                `make` lists the targets
```

[The guide](docs/guide.md#resume), [elsewhere](mailto:nobody)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small repository whose README is right."""
    for name in (
        "accelerate_configs/cpu.yaml",
        "bertdist/__init__.py",
        "bertdist/train.py",
        "bertdist/predict.py",
        "launch/train.slurm",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "launch" / "demo.py").write_text("")
    (tmp_path / "Makefile").write_text("test: check\n\tpytest\ndemo:\n\tpython\n")
    (tmp_path / ".gitignore").write_text("# made\n/out_*/\n*.egg-info/\ndocs/\n")
    (tmp_path / "README.md").write_text(GOOD.replace("--a_flag", "a flag"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "guide.md").write_text(
        "```\npython bertdist/train.py --train_file x\n```\n[Back](../README.md)\n"
    )
    (tmp_path / "docs" / "log.md").write_text("```\npython bertdist/gone.py --gone\n```\n")
    (tmp_path / "out_1").mkdir()
    return tmp_path


@pytest.mark.parametrize("rule", RULES)
def test_a_readme_that_is_right_breaks_no_rule(
    rule: Callable[[Path], list[str]], project: Path
) -> None:
    assert rule(project) == []


BROKEN = [
    (wrong_paths, "cpu.yaml ", "gpu.yaml ", ["accelerate_configs/gpu.yaml"]),
    (wrong_paths, "├── train.py", "├── train/", ["bertdist/train/"]),
    (wrong_paths, "demo.py, train.slurm", "demo.py, gone.slurm", ["launch/gone.slurm"]),
    (untold_paths, "Makefile   ", "", ["Makefile"]),
    (untold_paths, "└── predict.py", "└── ", ["bertdist/predict.py"]),
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


@pytest.mark.parametrize(("rule", "right", "wrong", "found"), BROKEN)
def test_a_readme_that_is_wrong_is_seen(
    rule: Callable[[Path], list[str]], right: str, wrong: str, found: list[str], project: Path
) -> None:
    text = (project / "README.md").read_text()
    assert right in text
    (project / "README.md").write_text(text.replace(right, wrong))
    assert rule(project) == found


def test_the_pages_of_docs_are_read_too(project: Path) -> None:
    (project / "docs" / "guide.md").write_text(
        "```\nlaunch/gone.sh\npython bertdist/train.py --gone\n```\n"
    )
    assert unknown_flags(project) == ["docs/guide.md: --gone (train)"]
    assert missing_files(project) == ["docs/guide.md: launch/gone.sh"]
