"""What only a GPU can show. Skipped, saying so, where there is none; docs/log.md says when it was run on one."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.attention import Kernel, kernel_of, pack, packed_attention
from bertdist.config import read_config
from bertdist.slurm import StopRequest
from bertdist.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda")


def attend(rows: list[Tensor], lengths: list[int], kernel: Kernel, device: torch.device, window: int | None = None) -> Tensor:
    firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1].to(device)
    there = [x.to(device) for x in rows]
    return packed_attention(
        torch.nn.Identity(), *there, None, packing=pack(lengths, firsts, rows[0].shape[1], kernel), sliding_window=window
    )[0].cpu()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), [("padded", torch.float64, 1e-12), ("varlen", torch.bfloat16, 0.02)])
def test_attention_on_the_gpu_equals_attention_on_the_cpu(
    kernel: Kernel, dtype: torch.dtype, tolerance: float, first_only: bool, window: int | None
) -> None:
    assert kernel_of(GPU, torch.bfloat16, 8) == "varlen" and kernel_of(GPU, torch.float32, 8) == "padded"
    lengths = [9, 7, 7, 3, 1]
    rows = [torch.randn(1, sum(lengths), 2, 8, dtype=torch.float64).transpose(1, 2).to(dtype).double() for _ in range(3)]
    if first_only:
        rows[0] = rows[0][:, :, torch.tensor([0, *lengths]).cumsum(0)[:-1]]
    there = attend([x.to(dtype) for x in rows], lengths, kernel, GPU, window).double()
    here = attend(rows, lengths, "buckets", torch.device("cpu"), window)
    torch.testing.assert_close(there, here, rtol=0, atol=tolerance)
    if not first_only:
        mixed = attend(rows, [sum(lengths)], "buckets", torch.device("cpu"), window)
        assert (there - mixed).abs().max() > 10 * tolerance, "texts that read each other would have gone unseen"


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
