"""The snippets of docs/serving.md run as they stand, one after the other, on a folder `out`."""

import asyncio
import importlib.util
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bertdist import export as script
from bertdist.core.config import ModelConfig
from bertdist.data.tokenization import load_tokenizer
from bertdist.models.classifier import load_classifier, save_classifier
from bertdist.models.export_config import ExportConfig
from bertdist.tasks.tasks import SingleLabel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BLOCKS = {  # by a word that only the block has
    word: next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if word in block)
    for word in ("pipeline(", "predictor.probabilities", "import onnxruntime", "architectures", "FastAPI(")
}  # fmt: skip
NEEDS = {"import onnxruntime": "onnx", "architectures": "onnx", "FastAPI(": "fastapi"}
PIP = {"onnx": "pip install 'bertdist[onnx]'", "fastapi": "pip install fastapi httpx"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """out/best, and the export of it."""
    folder, config = (
        tmp_path_factory.mktemp("served"),
        ModelConfig(model_name_or_path=str(tiny_model)),
    )
    tokenizer, task = load_tokenizer(config), SingleLabel(("negative", "positive"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _ = load_classifier(config, task, tokenizer=tokenizer)
    best = folder / "out" / "best"
    best.mkdir(parents=True)
    metadata = {"max_length": 128, "text_column": "text", "text_pair_column": None}
    save_classifier(model, tokenizer, best, metadata)
    if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        script.export(ExportConfig(model=str(best), output_dir=str(folder / "exported")))
    return folder


def test_every_python_block_of_the_page_is_run() -> None:
    assert PAGE.read_text().count("```python\n") == len(set(BLOCKS.values())) == len(BLOCKS)


def run_block(word: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(BLOCKS[word], f"docs/serving.md {word}", "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("word", [word for word in BLOCKS if word != "FastAPI("])
def test_a_snippet_runs(
    word: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name := NEEDS.get(word):
        pytest.importorskip(name, reason=PIP[name])
    monkeypatch.chdir(folder)
    run_block(word)
    if word != "architectures":
        assert re.search("negative|positive", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore")  # of starlette's client
def test_the_server_answers_batches_and_refuses_what_is_too_much(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason=PIP["fastapi"])
    client_of = pytest.importorskip("fastapi.testclient", reason=PIP["fastapi"]).TestClient
    monkeypatch.chdir(folder)
    server = run_block("FastAPI(")
    predictor, texts = server["predictor"], ["good", "a bad film", "so it was"]
    expected = dict(zip(texts, predictor(texts), strict=True))
    sizes: list[int] = []
    busy, calls = threading.Event(), predictor.__call__

    def watched(given: list[str]) -> Any:
        sizes.append(len(given))
        busy.wait(5)
        if "broken" in given:
            raise RuntimeError("broken")
        return calls(given)

    server["predictor"] = watched
    with client_of(server["app"], raise_server_exceptions=False) as client:
        post = lambda *texts: client.post("/predict", json={"texts": list(texts)})  # noqa: E731
        answers: dict[str, Any] = {}
        threads = [
            threading.Thread(target=lambda t=text: answers.update({t: post(t).json()}))
            for text in texts
        ]
        threads[0].start()
        while not sizes:
            pass
        for thread in threads[1:]:
            thread.start()
        while server["queue"].qsize() < 2:
            pass
        busy.set()
        for thread in threads:
            thread.join()
        assert sizes == [1, 2]  # the two that waited were computed together
        assert {text: answer for text, (answer,) in answers.items()} == {
            text: {"label": answer["label"], "score": pytest.approx(answer["score"], abs=1e-6)}
            for text, answer in expected.items()
        }
        for given in ([], [""] * 65, ["x" * 20_001], [3], "good"):
            assert client.post("/predict", json={"texts": given}).status_code == 422
        assert post("broken").status_code == 500 and post("good").status_code == 200

        def full(request: Any) -> None:
            raise asyncio.QueueFull

        server["queue"] = SimpleNamespace(put_nowait=full)
        assert post("good").status_code == 503
