"""Ways to predict the same texts: bertdist's Predictor, pipeline and ONNX Runtime.

All in float32, or what the job asks for, from texts to (label, score), with tokenization. pipeline
and ONNX Runtime get batches of `batch_size` texts in their order, padded to the longest; pipeline
once more with the texts sorted by their length, as a user would do it. Predictor sorts by itself.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.clock import device_name, on_gpu, peak_mib
from bench.contenders import read_rows
from bench.jobs import PredictJob, PredictResult

WARM_UP = 64  # texts of a first call, which is not timed

Answers = list[tuple[str, float]]
Answering = Callable[[Sequence[str]], Answers]


def predict(job: PredictJob) -> PredictResult:
    """Load, predict some texts, then predict all and measure the time."""
    texts, _ = read_rows(job.rows_file, job.rows)
    answer = {
        "bertdist": with_bertdist,
        "float32": with_bertdist,
        "pipeline": with_pipeline,
        "sorted": with_sorted_pipeline,
        "onnx": with_onnx,
    }[job.contender](job)
    answer(texts[:WARM_UP])
    begin = time.perf_counter()
    answers = answer(texts)  # ends with numbers on the host, so a GPU has ended too
    seconds = time.perf_counter() - begin
    device = "cpu" if job.contender == "onnx" else device_name(job.use_cpu)
    return PredictResult(
        seconds=seconds, answers=answers, process_mib=peak_mib(), device=device
    )  # no contender starts a child


def with_bertdist(job: PredictJob) -> Answering:
    """Predictor with its defaults."""
    from bertdist.core.config import RunConfig
    from bertdist.distributed.launch import create_accelerator
    from bertdist.predict import Predictor

    predictor = Predictor(
        job.model,
        max_length=job.max_length,
        accelerator=create_accelerator(
            RunConfig(use_cpu=job.use_cpu, mixed_precision=job.mixed_precision)
        ),
    )
    return lambda texts: [(answer["label"], answer["score"]) for answer in predictor(texts)]


def with_pipeline(job: PredictJob) -> Answering:
    """pipeline("text-classification") with batches."""
    from transformers import pipeline

    answering: Any = pipeline(
        "text-classification",
        model=job.model,
        device=0 if on_gpu(job.use_cpu) else -1,
        dtype=torch.bfloat16 if job.mixed_precision == "bf16" else torch.float32,
    )
    limits = {"batch_size": job.batch_size, "truncation": True, "max_length": job.max_length}
    return lambda texts: [
        (answer["label"], answer["score"]) for answer in answering(list(texts), **limits)
    ]


def with_sorted_pipeline(job: PredictJob) -> Answering:
    """The same, with the texts sorted by length and the answers put back in their order."""
    answering = with_pipeline(job)

    def answer(texts: Sequence[str]) -> Answers:
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        answers = answering([texts[at] for at in order])
        return [found for _, found in sorted(zip(order, answers, strict=True))]

    return answer


def with_onnx(job: PredictJob) -> Answering:
    """ONNX Runtime on the CPU, with as many threads as torch has for the others."""
    import onnxruntime
    from transformers import AutoTokenizer

    assert job.onnx is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(job.onnx, options, providers=["CPUExecutionProvider"])
    inputs = [entry.name for entry in session.get_inputs()]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    names = json.loads(Path(job.model, "config.json").read_text(encoding="utf-8"))["id2label"]

    def answer(texts: Sequence[str]) -> Answers:
        answers: Answers = []
        for at in range(0, len(texts), job.batch_size):
            batch = tokenizer(
                list(texts[at : at + job.batch_size]),
                truncation=True,
                max_length=job.max_length,
                padding=True,
                return_tensors="np",
            )
            (logits,) = session.run(None, {name: batch[name] for name in inputs})
            powers = np.exp(logits - logits.max(1, keepdims=True))
            scores = powers / powers.sum(1, keepdims=True)
            answers += [
                (names[str(best)], float(row[best]))
                for row, best in zip(scores, logits.argmax(1), strict=True)
            ]
        return answers

    return answer
