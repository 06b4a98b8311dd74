"""The house rules that a machine can check: names, floors, doors, sizes, docstrings.

Each rule is a function of a folder of modules that returns what breaks it; the last tests show that every rule can fail.
"""

import ast
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bertdist"

FLOORS = [  # a module imports from lower floors only
    ["errors"],
    [
        "words",
        "dropout",
        "embedding",
        "linear",
        "pieces",
        "places",
        "addresses",
        "findings",
        "label_noise",
        "beats",
        "anomaly",
    ],
    [
        "config",
        "scores",
        "slurm",
        "console",
        "attention_cpu",
        "text_files",
        "file_bytes",
        "columns",
        "ranks",
        "meter",
        "remote",
        "arrival",
    ],
    ["command_line", "row_ends", "watchdog", "run_folder", "whole_folder", "hub_names"],
    ["separated", "json_lines", "guess", "parquet_files", "check_config"],
    ["file_rows"],
    ["arrow_files", "hub"],
    ["tasks", "records", "optim", "attention", "doubts_config"],
    ["mixture", "joined", "encoding", "deberta", "labels", "duplicates", "text_health"],
    ["stream", "batch", "families", "lengths", "overlap", "tables"],
    ["batching", "survey", "sources", "same_run"],
    ["stream_batches", "classifier", "checkpoint", "inspection"],
    ["memory", "known", "compiled", "graphed"],
    ["begin"],
    ["evaluation", "room", "dry_run"],
    ["best", "fix", "nonfinite"],
    ["account"],
    ["train", "predict"],
    ["folds"],
    ["doubts"],
    ["check", "sweep", "report"],
]
LEVEL = {module: level for level, floor in enumerate(FLOORS) for module in floor}
DOORS = {  # a third-party package comes in through these modules only, so that an upgrade touches known files
    "transformers": set(
        """
            attention begin best check_config classifier config deberta doubts_config dry_run encoding families inspection
            lengths optim words
        """.split()
    ),
    "accelerate": set(
        """
            begin best checkpoint compiled doubts evaluation folds graphed known nonfinite predict ranks room run_folder slurm
            survey train watchdog
        """.split()
    ),
    "datasets": {"hub", "scores", "sources"},
    "evaluate": {"scores"},
    "sklearn": {"scores"},
    "scipy": {"scores"},
    "rich": {"console"},
    "pyarrow": set(
        """
            arrow_files columns duplicates file_bytes fix hub joined json_lines lengths parquet_files pieces records remote
            separated tables text_files text_health
        """.split()
    ),
    "xxhash": {
        "file_bytes",
        "file_rows",
        "hub",
        "joined",
        "records",
        "remote",
        "stream",
        "whole_folder",
    },
    "huggingface_hub": {"hub_names"},
    "fsspec": {"addresses"},
    "aiohttp": {"addresses"},
    "charset_normalizer": {"guess"},
    "rensa": {"duplicates"},
    "ftfy": {"text_health"},
    "cleanlab": {"label_noise"},
    "safetensors": {"checkpoint", "classifier", "whole_folder"},
    "yaml": {"config", "words"},
    "psutil": {"beats", "memory", "slurm", "watchdog"},
    "filelock": {"run_folder"},
}
OPEN = {"torch", "numpy", "bertdist"} | sys.stdlib_module_names  # enter anywhere
MOST_LINES_OF_A_FILE = 300
MOST_LINES_OF_A_FUNCTION = 60
# Longer for a reason that stands here, and no longer than this.
LONGER = {
    "train.train": 95,  # the whole of training as prose, from the top to the bottom
}


def modules(package: Path) -> list[str]:
    return sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")


def tree(package: Path, module: str) -> ast.Module:
    return ast.parse((package / f"{module}.py").read_text(encoding="utf-8"))


def imports(package: Path, module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in the file, also by `importlib.import_module("...")`."""
    for node in ast.walk(tree(package, module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = "." * node.level + (node.module or "")
            yield from (f"{here}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "importlib.import_module",
            "import_module",
            "__import__",
        }:
            first = node.args[0] if node.args else None
            yield (
                str(first.value)
                if isinstance(first, ast.Constant)
                else f"{ast.unparse(node)}: an import that cannot be read"
            )


def hidden_packages(package: Path) -> list[str]:
    """Modules with the name of another package: `accelerate launch bertdist/train.py` puts bertdist/ first on sys.path."""
    installed = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if set(owners) != {"bertdist"}
    }
    return sorted(set(modules(package)) & (installed | sys.stdlib_module_names))


def homeless_modules(package: Path) -> list[str]:
    """Modules without a floor."""
    return sorted(set(modules(package)) - set(LEVEL))


def imports_upwards(package: Path) -> list[str]:
    """`a -> b`: a imports b from its own floor or a higher one, or in a way that a script run by its path cannot."""
    found = []
    for module in modules(package):
        for name in imports(package, module):
            head, _, rest = name.partition(".")
            used = rest.partition(".")[0]
            own = head == "bertdist" and (used in LEVEL or (package / f"{used}.py").exists())
            if name.startswith(".") or (
                own and LEVEL.get(used, len(FLOORS)) >= LEVEL.get(module, -1)
            ):
                found.append(f"{module} -> {name}")
    return found


def wrong_doors(package: Path) -> list[str]:
    """`a -> p`: a imports the third-party package p, whose door is elsewhere, or which has no door at all."""
    found = []
    for module in modules(package):
        heads = {name.split(".")[0] for name in imports(package, module)} - OPEN
        found += [
            f"{module} -> {head}"
            for head in sorted(heads)
            if head and module not in DOORS.get(head, set())
        ]
    return found


def too_long(package: Path) -> list[str]:
    """Files and functions that are longer than one can hold in mind."""
    found = []
    for module in modules(package):
        lines = len((package / f"{module}.py").read_text(encoding="utf-8").splitlines())
        if lines > LONGER.get(module, MOST_LINES_OF_A_FILE):
            found.append(f"{module}: {lines} lines")
        for node in ast.walk(tree(package, module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, lines = f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1
                found += (
                    [f"{name}: {lines} lines"]
                    if lines > LONGER.get(name, MOST_LINES_OF_A_FUNCTION)
                    else []
                )
    return found


def undocumented(package: Path) -> list[str]:
    """Modules, and public functions and classes of their top level, without a docstring."""
    found = []
    for module in modules(package):
        body = tree(package, module)
        found += [] if ast.get_docstring(body) else [module]
        for node in body.body:
            named = isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) and not node.name.startswith("_")
            if (
                named
                and not ast.get_docstring(node)
                and not _is_told_by_its_fields(node)
                and not _is_overload(node)
            ):
                found.append(f"{module}.{node.name}")
    return found


def _is_overload(node: ast.AST) -> bool:
    return any(
        ast.unparse(item).endswith("overload") for item in getattr(node, "decorator_list", [])
    )


def _is_told_by_its_fields(node: ast.AST) -> bool:
    """A section of settings needs no docstring where every field has its sentence: `name: type = HfArg(..., help="...")`."""
    fields = [item for item in getattr(node, "body", []) if isinstance(item, ast.AnnAssign)]
    calls = [field.value for field in fields if isinstance(field.value, ast.Call)]
    helps = [call for call in calls if any(word.arg == "help" for word in call.keywords)]
    return bool(fields) and len(helps) == len(fields)


RULES: list[Callable[[Path], list[str]]] = [
    hidden_packages,
    homeless_modules,
    imports_upwards,
    wrong_doors,
    too_long,
    undocumented,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_rule_holds(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


def test_floors_and_doors_name_each_module_once() -> None:
    named = [module for floor in FLOORS for module in floor]
    assert len(named) == len(set(named))
    assert set().union(*DOORS.values()) <= set(named)


GOOD = '''
"""A module."""
import json
import torch
from bertdist import __version__
from bertdist.errors import BertdistError
'''
BROKEN = [
    (hidden_packages, "datasets", GOOD, "datasets"),
    (hidden_packages, "logging", GOOD, "logging"),
    (homeless_modules, "helpers", GOOD, "helpers"),
    (
        imports_upwards,
        "config",
        GOOD + "from bertdist.train import train",
        "config -> bertdist.train.train",
    ),
    (imports_upwards, "config", GOOD + "from bertdist import train", "config -> bertdist.train"),
    (
        imports_upwards,
        "config",
        GOOD + "def f():\n    import bertdist.train",
        "config -> bertdist.train",
    ),
    (imports_upwards, "console", GOOD + "import bertdist.config", "console -> bertdist.config"),
    (imports_upwards, "config", GOOD + "from . import errors", "config -> ..errors"),
    (
        imports_upwards,
        "config",
        GOOD + "import importlib\nimportlib.import_module('bertdist.train')",
        "config -> bertdist.train",
    ),
    (
        imports_upwards,
        "errors",
        '"""A module."""\nfrom bertdist.helpers import help_me',
        "errors -> bertdist.helpers.help_me",
    ),
    (wrong_doors, "tasks", GOOD + "from transformers import AutoModel", "tasks -> transformers"),
    (wrong_doors, "tasks", GOOD + "def f():\n    import pandas as pd", "tasks -> pandas"),
    (too_long, "tasks", GOOD + "\n" * 300, "tasks: 306 lines"),
    (too_long, "tasks", GOOD + "def f():\n" + "    pass\n" * 60, "tasks.f: 61 lines"),
    (undocumented, "tasks", "import json", "tasks"),
    (undocumented, "tasks", GOOD + "class Task:\n    outputs: int", "tasks.Task"),
    (
        undocumented,
        "tasks",
        GOOD + "class Task:\n    outputs: int = HfArg(help='Outputs.')\n    other: int",
        "tasks.Task",
    ),
    (undocumented, "tasks", GOOD + "class Task(Protocol):\n    pass", "tasks.Task"),
    (undocumented, "tasks", GOOD + "def answer():\n    pass", "tasks.answer"),
]


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house in order."""
    (tmp_path / "errors.py").write_text('"""A module."""\n')
    return tmp_path


@pytest.mark.parametrize(("rule", "module", "text", "found"), BROKEN)
def test_a_broken_rule_is_seen(
    rule: Callable[[Path], list[str]], module: str, text: str, found: str, house: Path
) -> None:
    if "helpers" in found:
        (house / "helpers.py").write_text('"""A module without a floor."""\n')
    (house / f"{module}.py").write_text(text)
    assert rule(house) == [found]


@pytest.mark.parametrize("rule", RULES)
def test_a_good_module_breaks_no_rule(rule: Callable[[Path], list[str]], house: Path) -> None:
    (house / "config.py").write_text(
        GOOD + "class Section:\n    seed: int = HfArg(default=1, help='Decides the order.')\n"
    )
    assert rule(house) == []
