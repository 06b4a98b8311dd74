"""The wheel is complete: build, install into an empty environment, use from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from rows import write_split

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["bertdist", "accelerate_configs", "launch", "setup.cfg", "pyproject.toml", "README.md"]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command in another folder, with no bertdist on PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def build_wheel(folder: Path, *changes: tuple[str, str]) -> Path:
    """Build a copy of the repository with these (old, new) words in its setup.cfg."""
    copy = folder / "source"
    for name in [*SOURCES, "LICENSE"]:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, copy / name)
    config = (copy / "setup.cfg").read_text()
    for old, new in changes:
        assert old in config
        config = config.replace(old, new)
    (copy / "setup.cfg").write_text(config)
    options = "--no-deps --no-build-isolation --no-index --disable-pip-version-check -q".split()
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, copy, cwd=folder)
    return next(folder.glob("bertdist-*.whl"))


def files_not_in(wheel: Path) -> set[str]:
    """The package's files, and those of accelerate_configs/ and launch/, that a wheel lacks."""
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "bertdist").rglob("*.py")}
    wanted |= {f"bertdist/{path.relative_to(ROOT)}" for path in ROOT.glob("accelerate_configs/*")}
    wanted |= {f"bertdist/launch/{path.name}" for path in ROOT.glob("launch/*.s*")}
    wanted |= {str(x.relative_to(ROOT)) for x in ROOT.glob("bertdist/reporting/templates/*")}
    wanted |= {"bertdist/py.typed"}
    assert len(wanted) > 60, wanted
    with zipfile.ZipFile(wheel) as archive:
        return wanted - set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel; its dependencies are this environment's.

    A .pth file adds this environment's packages; an editable bertdist among them is not found,
    because .pth files in an added folder are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(purelib.strip()) / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    find = "import importlib.util; print(importlib.util.find_spec('bertdist'))"
    assert run(python, "-c", find, cwd=folder) == "None\n", "bertdist must come from the wheel"
    options = "--no-deps --no-index --disable-pip-version-check -q".split()
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    return python


def test_the_wheel_has_every_file(wheel: Path) -> None:
    assert files_not_in(wheel) == set()


def test_a_wheel_without_packages_or_package_data_is_seen(tmp_path: Path) -> None:
    missing = files_not_in(
        build_wheel(
            tmp_path,
            ("packages = find:", "packages = bertdist"),
            ("[options.package_data]", "[nothing]"),
        )
    )
    assert {"bertdist/core/config.py", "bertdist/data/readers/csv_reader.py"} <= missing
    assert "bertdist/train.py" not in missing
    assert {"bertdist/launch/smoke.sh", "bertdist/accelerate_configs/cpu.yaml"} <= missing


def test_the_installed_package_says_where_its_files_are(python: Path, tmp_path: Path) -> None:
    package = Path(run(python, "-c", "import bertdist; print(bertdist.__file__)", cwd=tmp_path))
    assert python.parents[1] in package.parents
    for name in ("accelerate_configs", "launch"):
        folder = Path(run(python, "-m", "bertdist", "info", name, cwd=tmp_path).strip())
        assert folder == package.parent / name
        for path in folder.iterdir():
            assert not path.is_symlink()
            assert path.read_bytes() == (ROOT / name / path.name).read_bytes()
    assert os.access(package.parent / "launch" / "smoke.sh", os.X_OK)
    assert run(python, "-m", "bertdist", cwd=tmp_path).startswith("bertdist ")


AS_MODULES = """
import contextlib, io, json, runpy, sys
for module, words in json.loads(sys.argv[1]):
    sys.argv, said = [module, *words], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    print(json.dumps(said.getvalue()))
"""


def test_train_predict_and_check_run_as_modules(
    python: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """In one process, so that torch is imported once."""
    write_split(tmp_path, 24, 8)
    data = "--train_file train.tsv --validation_file dev.tsv".split()
    options = ["--model_name_or_path", str(tiny_model), *data, "--train_batch_size", "8"]
    options += ["--num_train_epochs", "1", "--output_dir", "out", "--use_cpu"]
    question = ["--model", "out/best", "--text", "a good film"]
    commands = [
        ("bertdist.train", options),
        ("bertdist.predict", question),
        # it ends with exit code 1 for errors in the data; these rows have none
        ("bertdist.check", [*data, "--output", "report.json"]),
    ]
    said = run(python, "-c", AS_MODULES, json.dumps(commands), cwd=tmp_path).splitlines()
    assert json.loads((tmp_path / "out/status.json").read_text())["state"] == "finished"
    label, score, _ = json.loads(said[1]).split("\t")
    assert label in ("negative", "positive") and 0.5 <= float(score) <= 1
    assert json.loads((tmp_path / "report.json").read_text())
