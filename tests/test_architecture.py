"""The rules of the code's structure that a machine can check: packages, imports, third-party libraries, names, docstrings.

Each rule is a function of a folder of modules that returns its violations; the last tests show that every rule can fail.
"""

import ast
import importlib.metadata
import sys
from collections.abc import Callable, Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bertdist"

# A package imports from itself and from packages before it in this list only. The scripts come last, in this order.
PACKAGES = [
    *("core", "distributed", "tasks", "data", "models", "training", "data_quality"),
    "reporting",
]
SCRIPTS = [
    *("train", "predict", "eval", "check", "report", "push", "export", "sweep", "slurm"),
    *("api", "cli", "__main__"),
]
ORDER = {name: position for position, name in enumerate([*PACKAGES, *SCRIPTS])}
ANYWHERE = {"torch", "numpy", "accelerate", "transformers", "bertdist"} | sys.stdlib_module_names
THIRD_PARTY = {  # package -> the other libraries that it may import
    "core": {"IPython", "huggingface_hub", "rich", "yaml", "xxhash", "safetensors"},
    "distributed": {"psutil"},
    "tasks": {"datasets", "evaluate", "scipy", "sklearn"},
    "data": {"aiohttp", "datasets", "fsspec", "pyarrow", "xxhash"},
    "models": {"onnx", "onnxruntime", "safetensors", "tokenizers"},
    "training": {"filelock", "mlflow", "optuna", "rich", "safetensors", "trackio", "wandb"},
    "data_quality": {"cleanlab", "ftfy", "pyarrow", "rensa"},
    "reporting": {
        *("huggingface_hub", "jinja2", "markupsafe", "matplotlib", "pyarrow", "scipy", "yaml"),
    },
    "scripts": {"filelock", "pyarrow", "shtab", "yaml"},
}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below bertdist -> file: `data.readers.csv_reader`, `train`; a package's `__init__` is `data.readers`."""
    paths = {
        path: path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py")
    }
    named = {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): path
        for path, parts in paths.items()
    }
    return dict(sorted((name, path) for name, path in named.items() if name))


def package_of(module: str) -> str:
    """`data.readers.csv_reader` -> `data`; a script is its own package."""
    return module.partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it, also by `importlib.import_module("...")`.

    Imports under `if TYPE_CHECKING:` count too: a reader follows them as well.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "importlib.import_module",
            "import_module",
            "__import__",
        }:
            first = node.args[0] if node.args else None
            constant = isinstance(first, ast.Constant)
            yield str(first.value) if constant else f"{ast.unparse(node)}: not a constant name"  # type: ignore[union-attr]


def own_imports(package: Path) -> dict[str, set[str]]:
    """Module -> modules of bertdist that it imports; a relative import stands as it is written."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for name in imports(path):
            if name.startswith("."):
                graph[module].add(name)
            elif target := _target(name, known):
                graph[module].add(target)
    return graph


def _target(name: str, known: dict[str, Path]) -> str:
    """The module that a dotted name lies in; "" for other libraries and for names of `bertdist` itself."""
    head, *parts = name.split(".")
    if head != "bertdist" or not parts:
        return ""
    lengths = range(len(parts), 0, -1)
    found = (".".join(parts[:length]) for length in lengths)
    expected = ".".join(
        parts[:2] if parts[0] in PACKAGES else parts[:1]
    )  # of a file that is not there
    return next((name for name in found if name in known), expected if parts[0] in ORDER else "")


def hidden_libraries(package: Path) -> list[str]:
    """Direct children of bertdist/ named like another library: a script run by path has bertdist/ first on sys.path."""
    distributions = importlib.metadata.packages_distributions()
    installed = {name for name, owners in distributions.items() if set(owners) != {"bertdist"}}
    children = {module.partition(".")[0] for module in modules(package)}
    return sorted(children & (installed | sys.stdlib_module_names))


def unknown_packages(package: Path) -> list[str]:
    """Direct children of bertdist/ without a place in ORDER."""
    return sorted({package_of(module) for module in modules(package)} - set(ORDER))


def upward_imports(package: Path) -> list[str]:
    """`a -> b`: module a imports b of a later package, of an unknown one, or relatively."""
    found = []
    for module, targets in own_imports(package).items():
        for target in sorted(targets):
            position = ORDER.get(package_of(target), len(ORDER))
            if target.startswith(".") or position > ORDER.get(package_of(module), -1):
                found.append(f"{module} -> {target}")
    return found


def import_cycles(package: Path) -> list[str]:
    """Modules that import each other, directly or through others, also by imports inside functions."""
    try:
        list(TopologicalSorter(own_imports(package)).static_order())
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def misplaced_libraries(package: Path) -> list[str]:
    """`a -> p`: module a imports the third-party library p, which its package may not."""
    found = []
    for module, path in modules(package).items():
        owner = package_of(module) if package_of(module) in PACKAGES else "scripts"
        heads = {name.split(".")[0] for name in imports(path) if not name.startswith(".")}
        wrong = heads - ANYWHERE - THIRD_PARTY[owner]
        found += [f"{module} -> {head}" for head in sorted(wrong)]
    return found


def undocumented(package: Path) -> list[str]:
    """Modules, and public functions and classes of their top level, without a docstring."""
    found = []
    for module, path in modules(package).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [] if ast.get_docstring(tree) else [module]
        for node in tree.body:
            public = isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) and not node.name.startswith("_")
            if public and not (ast.get_docstring(node) or _is_overload(node)):
                found.append(f"{module}.{node.name}")
    return found


def _is_overload(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).endswith("overload") for decorator in decorators)


RULES: list[Callable[[Path], list[str]]] = [
    hidden_libraries,
    unknown_packages,
    upward_imports,
    import_cycles,
    misplaced_libraries,
    undocumented,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_holds(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


def test_every_library_of_the_rules_is_used() -> None:
    used: dict[str, set[str]] = {owner: set() for owner in THIRD_PARTY}
    for module, path in modules(PACKAGE).items():
        owner = package_of(module) if package_of(module) in PACKAGES else "scripts"
        used[owner] |= {name.split(".")[0] for name in imports(path)}
    unused = {owner: libraries - used[owner] for owner, libraries in THIRD_PARTY.items()}
    assert not any(unused.values()), unused


def test_unit_tests_mirror_the_packages() -> None:
    """tests/unit/<package>/test_<module>.py, or test_<module>_<aspect>.py: each names a module of its package."""
    known = modules(PACKAGE)
    unit = PACKAGE.parent / "tests" / "unit"
    tested = [path.relative_to(unit) for path in unit.rglob("test_*.py") if path.parent != unit]
    names = [".".join([*path.parent.parts, path.stem.removeprefix("test_")]) for path in tested]
    assert [name for name in names if not mirrors(name, known)] == [] and len(names) > 40


def mirrors(name: str, known: Collection[str]) -> bool:
    """`data.streaming_windows` mirrors `data.streaming`."""
    return any(name == module or name.startswith(f"{module}_") for module in known if "." in module)


def test_a_test_without_a_module_is_seen() -> None:
    known = ["data", "data.streaming"]
    assert mirrors("data.streaming", known) and mirrors("data.streaming_windows", known)
    assert not mirrors("data.stream", known) and not mirrors("data.survey", known)


GOOD = '''
"""A module."""
import json
import torch
from bertdist import __version__
from bertdist.core.errors import BertdistError
'''
UPWARD = "from bertdist.train import train"
BROKEN = [
    (hidden_libraries, {"datasets": GOOD}, "datasets"),
    (hidden_libraries, {"logging": GOOD}, "logging"),
    (unknown_packages, {"helpers": GOOD}, "helpers"),
    (upward_imports, {"core.args": GOOD + UPWARD}, "core.args -> train"),
    (upward_imports, {"core.args": GOOD + "from bertdist import train"}, "core.args -> train"),
    (
        upward_imports,
        {"core.args": GOOD + "def f():\n    import bertdist.train"},
        "core.args -> train",
    ),
    (
        upward_imports,
        {"core.args": GOOD + "if TYPE_CHECKING:\n    from bertdist.data.batch import collate"},
        "core.args -> data.batch",
    ),
    (upward_imports, {"core.args": GOOD + "from . import errors"}, "core.args -> ..errors"),
    (
        upward_imports,
        {"core.args": GOOD + "import importlib\nimportlib.import_module('bertdist.train')"},
        "core.args -> train",
    ),
    (upward_imports, {"train": GOOD + "from bertdist.check import main"}, "train -> check"),
    (
        import_cycles,
        {
            "data.batch": GOOD + "from bertdist.data.loader import load",
            "data.loader": GOOD + "def load():\n    from bertdist.data.batch import collate",
        },
        "data.batch -> data.loader -> data.batch",
    ),
    (misplaced_libraries, {"core.args": GOOD + "import pyarrow as pa"}, "core.args -> pyarrow"),
    (
        misplaced_libraries,
        {"tasks.tasks": GOOD + "def f():\n    import pandas"},
        "tasks.tasks -> pandas",
    ),
    (misplaced_libraries, {"train": GOOD + "from rich.table import Table"}, "train -> rich"),
    (undocumented, {"tasks.tasks": "import json"}, "tasks.tasks"),
    (undocumented, {"tasks.tasks": GOOD + "class Task:\n    outputs: int"}, "tasks.tasks.Task"),
    (undocumented, {"tasks.tasks": GOOD + "def predict():\n    pass"}, "tasks.tasks.predict"),
]


def write(package: Path, module: str, text: str) -> None:
    path = package / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """A package that keeps every rule."""
    write(tmp_path, "core.errors", '"""A module."""\n')
    write(tmp_path, "train", '"""A script."""\n')
    return tmp_path


@pytest.mark.parametrize(("rule", "texts", "found"), BROKEN)
def test_a_broken_rule_is_seen(
    rule: Callable[[Path], list[str]], texts: dict[str, str], found: str, small_package: Path
) -> None:
    for module, text in texts.items():
        write(small_package, module, text)
    assert rule(small_package) == [found]


@pytest.mark.parametrize("rule", RULES)
def test_a_good_module_breaks_no_rule(
    rule: Callable[[Path], list[str]], small_package: Path
) -> None:
    section = 'class Section:\n    """Settings."""\n'
    write(small_package, "data.batch", GOOD + "import pyarrow\n" + section)
    assert rule(small_package) == []
