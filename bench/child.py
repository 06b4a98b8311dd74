"""Child process of `bench.jobs.run_child`: `python -m bench.child KIND job.json answer.json`."""

import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.flops import BERT_BASE
from bench.jobs import PredictJob, TrainJob

MATMUL_SIZE = 2048
MATMUL_SECONDS = 2.0  # products are repeated for this time, the fastest counts


def rows(job: dict[str, Any]) -> dict[str, Any]:
    """Convert a file that bertdist can read to JSON lines, in a fixed random order.

    Labels become "0", "1", ... in bertdist's order, or that of "labels" (names of the training
    rows' labels).
    """
    import numpy as np

    from bertdist.core.config import DataConfig, TaskConfig
    from bertdist.data.load_data import load_records
    from bertdist.tasks.tasks import create_task

    source = load_records(
        DataConfig(
            train_file=[job["file"]],
            text_column=job["text_column"],
            label_column=job["label_column"],
        ),
        "train",
    )
    assert source is not None and source.label_indices is not None and source.label_kind is not None
    asked = TaskConfig(problem_type="single_label_classification", label_names=job.get("labels"))
    task = create_task(asked, source.label_stats())
    number = {value: str(task.labels.index(str(value))) for value in source.label_values}
    order = np.random.default_rng(0).permutation(len(source))[: job["rows"]]
    with open(job["rows_file"], "w", encoding="utf-8") as file:
        for record in (source[int(row)] for row in order):
            assert record.label is not None
            file.write(json.dumps({"text": record.text, "label": number[record.label]}) + "\n")
    return {"rows": len(order), "labels": list(task.labels)}


def random_bert_base(job: dict[str, Any]) -> dict[str, Any]:
    """BERT-base from random weights, with the tokenizer of another model."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=max(BERT_BASE.vocabulary, len(tokenizer)))).save_pretrained(
        job["folder"]
    )  # its defaults are BERT-base
    tokenizer.save_pretrained(job["folder"])
    return {}


def matmul(job: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of a square matrix product in the precision of the run: the machine's peak."""
    import torch

    from bench.clock import on_gpu

    device = torch.device("cuda" if on_gpu(job["use_cpu"]) else "cpu")
    size = job.get("size", MATMUL_SIZE)
    left, right = (
        torch.randn(size, size, device=device, dtype=getattr(torch, job["dtype"])) for _ in range(2)
    )
    seconds, end = float("inf"), time.perf_counter() + job.get("seconds", MATMUL_SECONDS)
    while time.perf_counter() < end:
        begin = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - begin)
    return {"flops_per_second": 2 * size**3 / seconds}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train one contender."""
    from bench.contenders import train

    return asdict(
        train(TrainJob(**{name: value for name, value in job.items() if name != "threads"}))
    )


def export(job: dict[str, Any]) -> dict[str, Any]:
    """Export a trained folder to ONNX."""
    from bertdist.models.onnx import export_onnx

    export_onnx(job["model"], Path(job["path"]))
    return {}


def predict(job: dict[str, Any]) -> dict[str, Any]:
    """Predict with one contender."""
    from bench.prediction import predict

    return asdict(predict(PredictJob(**job)))


def gpu(job: dict[str, Any]) -> dict[str, Any]:
    """A job of bench.gpu."""
    from bench.gpu_jobs import run

    return run(job)


KINDS = {
    function.__name__: function
    for function in (rows, random_bert_base, matmul, train, export, predict, gpu)
}


def main() -> None:
    """Run one job; a failure ends with a traceback, whose last line the parent shows."""
    kind, job_file, answer_file = sys.argv[1:]
    # If memory runs out, Linux should kill this process first.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    Path(answer_file).write_text(json.dumps(KINDS[kind](job)), encoding="utf-8")


if __name__ == "__main__":
    main()
