"""The examples run as they are, and training in several processes from Python."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from rows import EVERY_FAULT, make_rows, tensors_of, words_of, write_split

import bertdist

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_notebook_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setenv("OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "train_in_a_notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    outputs = [str(cell.get("outputs", "")) for cell in notebook.cells]
    assert "Run(" in outputs[5] and "Evaluation(" in outputs[9]
    streams = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [text for text in streams if "'name': 'stderr'" in text]
    training = notebook.cells[5]["outputs"]
    said = "".join(output["text"] for output in training if output["output_type"] == "stream")
    assert "train_rows" in said and "Finished: 15 steps" in said and said.count("\n") <= 15
    (panel,) = (x["data"] for x in training if x["output_type"] == "display_data")
    assert panel["text/plain"].count("best") == 2 and "step 15/15" in panel["text/html"]
    assert not [text for text in outputs if "Warning" in text or "Loading weights" in text]
    assert "Run(" in outputs[5] and "accuracy" in outputs[6] and "'label'" in outputs[-1]
    assert bertdist.Run(tmp_path / "out").scores["loss"] > 0
    assert all(
        not cell.get("outputs")
        for cell in nbformat.read(EXAMPLES / "train_in_a_notebook.ipynb", 4).cells
    )


def test_a_loop_of_ones_own_trains(tiny_model: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = words_of(
        tiny_model, tmp_path / "out", write_split(tmp_path, 160, 40), num_train_epochs=6
    )
    words = [*words, "--learning_rate", "3e-3", "--use_cpu"]
    assert module.main(words)["accuracy"] > 0.8
    untrained = module.main([*words, "--num_train_epochs", "0.01"])
    assert untrained["accuracy"] < 0.8  # the control


@pytest.mark.skipif(
    not EVERY_FAULT,
    reason="a launch of half a minute; tests/runs and tests/slurm launch the same module: with BERTDIST_EVERY_FAULT=1 only",
)
def test_two_processes_train_from_python(tiny_model: Path, tmp_path: Path, capfd: Any) -> None:
    rows = {"train_rows": make_rows(40), "validation_rows": make_rows(12, seed=1)}
    settings: dict[str, Any] = {"model_name_or_path": tiny_model, "use_cpu": True}
    settings |= {"max_train_steps": 3, "train_batch_size": 8}
    two = bertdist.train(**settings, **rows, output_dir=tmp_path / "two", processes=2)
    assert "2 processes" in capfd.readouterr().out and two.finished
    one = bertdist.train(**settings, **rows, output_dir=tmp_path / "one")
    assert two.scores == pytest.approx(one.scores, abs=1e-5)
    for name, tensor in tensors_of(two.folder / "best").items():
        assert (tensor - tensors_of(one.folder / "best")[name]).abs().max() < 1e-5
