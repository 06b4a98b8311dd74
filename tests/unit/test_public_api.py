"""`import bertdist`: public names, cost, and the function `train` beside its module."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from rows import write_split

import bertdist
from bertdist import api as API

ROOT = Path(__file__).resolve().parents[2]


def run_python(program: str) -> str:
    """What a fresh Python prints; it must print nothing on standard error."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout.strip()


IMPORTED = """
import logging, os, signal, sys
before = dict(os.environ), list(logging.root.handlers), [signal.getsignal(n) for n in (2, 10, 15)]
{imports}
after = dict(os.environ), list(logging.root.handlers), [signal.getsignal(n) for n in (2, 10, 15)]
heavy = {{"torch", "transformers", "accelerate", "datasets", "numpy", "yaml"}} & sys.modules.keys()
print(before == after, sorted(heavy))
"""


def test_importing_bertdist_is_cheap_and_changes_nothing() -> None:
    assert run_python(IMPORTED.format(imports="import bertdist; dir(bertdist)")) == "True []"
    assert run_python(IMPORTED.format(imports="from bertdist import BertdistError")) == "True []"


def test_an_import_that_is_not_cheap_is_noticed() -> None:
    program = IMPORTED.format(imports="import os, numpy; os.environ['SET_BY_IMPORT'] = '1'")
    assert run_python(program) == "False ['numpy']"


def test_every_public_name_is_loaded_and_documented() -> None:
    assert set(bertdist._MODULES) < set(bertdist.__all__) <= set(dir(bertdist))
    assert bertdist.__doc__ is not None
    for name in bertdist.__all__:
        value = getattr(bertdist, name)
        assert name == "__version__" or name in bertdist.__doc__, f"{name} is not documented"
        if name in bertdist._MODULES:
            assert value.__module__ == bertdist._MODULES[name]
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        bertdist.trian  # noqa: B018


ORDERS = [
    "from bertdist import train",
    "import bertdist.train; from bertdist import train",
    "import importlib; importlib.import_module('bertdist.train'); from bertdist import train",
    "from bertdist import train; import bertdist.train; from bertdist import train",
    "import bertdist.data_quality.label_issues; from bertdist import train",
    "import bertdist; import bertdist.train; train = bertdist.train",
    "from bertdist.train import train, run; from bertdist import train",
]


def test_train_is_the_function_in_every_order_of_imports() -> None:
    """Each in a fork that has forgotten bertdist, and nothing else."""

    def imported(accelerator: Accelerator, order: str) -> tuple[str, ...]:
        for name in [name for name in sys.modules if name.partition(".")[0] == "bertdist"]:
            del sys.modules[name]
        names: dict[str, Any] = {}
        exec(order, names)
        train = names["train"]
        assert sys.modules[train.__module__] is not API
        return type(train).__name__, type(sys.modules["bertdist.train"]).__name__, train.__module__

    for order in ORDERS:
        assert run_ranks(1, imported, order) == [("function", "module", "bertdist.api")], order


def test_a_replaced_public_name_stays_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the import system's binding of a submodule is ignored."""
    monkeypatch.setattr(bertdist, "train", len)
    assert bertdist.train is len
    monkeypatch.undo()
    assert inspect.isfunction(bertdist.train)


def test_resource_folders_are_those_of_the_clone() -> None:
    configs, launch = map(bertdist.resource_folder, ("accelerate_configs", "launch"))
    for path in [*configs.iterdir(), *launch.iterdir()]:
        assert path.samefile(ROOT / path.parent.name / path.name)
    assert {path.name for path in configs.iterdir()} == {
        path.name for path in (ROOT / "accelerate_configs").iterdir()
    }
    assert {path.name for path in launch.iterdir()} == {
        path.name
        for path in (ROOT / "launch").iterdir()
        if path.suffix != ".py" and path.name != "__pycache__"
    }
    with pytest.raises(ValueError, match="no resource folder 'tests'"):
        bertdist.resource_folder("tests")


def test_the_loop_of_the_docstring_trains(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch learns the labels, with several micro-batches per step."""
    assert bertdist.__doc__ is not None
    text = bertdist.__doc__.partition("A training loop of your own")[2].partition(":\n")[2]
    names = {name: getattr(bertdist, name) for name in bertdist.__all__}
    for line in IMPORTS.splitlines():
        exec(line, names)
    write_split(tmp_path, 1200, 40)
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tiny_model}\ntrain_file: train.tsv\nvalidation_file: dev.tsv\n"
        "output_dir: out\ntrain_batch_size: 8\ntokens_per_micro_batch: 64\nuse_cpu: true\n"
        "dataloader_num_workers: 0\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # the head's weights
    exec(textwrap.dedent(text), names)
    assert names["step"].number == 149 and len(names["step"].micro_batches) > 1
    assert names["scores"]["accuracy"] > 0.8
    assert not (tmp_path / "out").exists()


IMPORTS = """from contextlib import nullcontext
from accelerate import Accelerator
from torch.optim import AdamW
from bertdist.data.loader import create_eval_loader
from bertdist.data.load_data import load_splits
from bertdist.data.stats import collect_stats
from bertdist.tasks.tasks import create_task
from bertdist.data.tokenization import load_tokenizer"""
