"""What only a GPU can show. Skipped, saying so, where there is none; docs/log.md says when it was run on one."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from bertdist.attention import pack, packed_attention
from bertdist.config import read_config
from bertdist.slurm import StopRequest
from bertdist.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda")


def test_attention_on_the_gpu_equals_attention_on_the_cpu() -> None:
    lengths = [9, 7, 7, 3, 1]
    rows = [torch.randn(1, sum(lengths), 2, 8, dtype=torch.float64).transpose(1, 2) for _ in range(3)]
    there, _ = packed_attention(torch.nn.Identity(), *(x.to(GPU) for x in rows), None, packing=pack(lengths, GPU))
    here, _ = packed_attention(torch.nn.Identity(), *rows, None, packing=pack(lengths, torch.device("cpu")))
    mixed, _ = packed_attention(torch.nn.Identity(), *rows, None, packing=pack([sum(lengths)], torch.device("cpu")))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-12)
    assert (there.cpu() - mixed).abs().max() > 1e-3, "texts that read each other would have gone unseen"


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_the_gpu_learns_and_goes_on(tiny_model: Path, tmp_path: Path, precision: str) -> None:
    words_of = (("great", "good"), ("dull", "bad"))
    rows = [(f"{word} {'film ' * (i % 7)}movie", label) for i in range(64) for word, label in words_of]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    words = f"--model_name_or_path {tiny_model} --train_file {tmp_path}/train.tsv --validation_file {tmp_path}/train.tsv"
    words += f" --learning_rate 1e-3 --output_dir {tmp_path}/out --num_train_epochs 8 --mixed_precision {precision}"
    progress = train(read_config([*words.split(), "--log_every", "1 steps"]))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert progress.finished and [line["accuracy"] for line in lines if line["kind"] == "eval"][-1] > 0.95
    assert all(line["loss"] is not None for line in lines)


def test_a_stop_is_answered_one_call_late_on_the_gpu() -> None:
    stop, accelerator = StopRequest(), Accelerator()
    try:
        assert stop._answer_of_previous_call(torch.ones(1, dtype=torch.int32, device=accelerator.device)) is False
        assert stop._answer_of_previous_call(torch.zeros(1, dtype=torch.int32, device=accelerator.device)) is True
        assert stop._answer_of_previous_call(torch.zeros(1, dtype=torch.int32, device=accelerator.device)) is False
    finally:
        stop.close()
