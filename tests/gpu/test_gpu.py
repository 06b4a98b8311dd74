"""What only a GPU can show. Skipped, saying so, where there is none; docs/log.md says when it was run on one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.core.args import read_config
from bertdist.data.loader import MapLoader
from bertdist.data.tokenization import Example
from bertdist.distributed.preemption import StopSignal
from bertdist.models.attention import Kernel, build_packing, packed_attention, select_kernel
from bertdist.train import train
from bertdist.training.micro_batches import find_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda")


def attend(
    rows: list[Tensor],
    lengths: list[int],
    kernel: Kernel,
    device: torch.device,
    window: int | None = None,
) -> Tensor:
    firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1].to(device)
    there = [x.to(device) for x in rows]
    return packed_attention(
        torch.nn.Identity(),
        *there,
        None,
        packing=build_packing(lengths, firsts, rows[0].shape[1], kernel),
        sliding_window=window,
    )[0].cpu()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [("padded", torch.float64, 1e-12), ("varlen", torch.bfloat16, 0.02)],
)
def test_attention_on_the_gpu_equals_attention_on_the_cpu(
    kernel: Kernel, dtype: torch.dtype, tolerance: float, first_only: bool, window: int | None
) -> None:
    assert (
        select_kernel(GPU, torch.bfloat16, 8) == "varlen"
        and select_kernel(GPU, torch.float32, 8) == "padded"
    )
    lengths = [9, 7, 7, 3, 1]
    rows = [
        torch.randn(1, sum(lengths), 2, 8, dtype=torch.float64).transpose(1, 2).to(dtype).double()
        for _ in range(3)
    ]
    if first_only:
        rows[0] = rows[0][:, :, torch.tensor([0, *lengths]).cumsum(0)[:-1]]
    there = attend([x.to(dtype) for x in rows], lengths, kernel, GPU, window).double()
    here = attend(rows, lengths, "buckets", torch.device("cpu"), window)
    torch.testing.assert_close(there, here, rtol=0, atol=tolerance)
    if not first_only:
        mixed = attend(rows, [sum(lengths)], "buckets", torch.device("cpu"), window)
        assert (there - mixed).abs().max() > 10 * tolerance, (
            "texts that read each other would have gone unseen"
        )


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_the_gpu_learns(tiny_model: Path, tmp_path: Path, precision: str) -> None:
    words_of = (("great", "good"), ("dull", "bad"))
    rows = [
        (f"{word} {'film ' * (i % 7)}movie", label) for i in range(64) for word, label in words_of
    ]
    (tmp_path / "train.tsv").write_text(
        "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    )
    words = f"--model_name_or_path {tiny_model} --train_file {tmp_path}/train.tsv --validation_file {tmp_path}/train.tsv"
    words += " --learning_rate 1e-3 --train_batch_size 8 --num_train_epochs 8"
    words += f" --output_dir {tmp_path}/out --mixed_precision {precision}"
    progress = train(read_config([*words.split(), "--log_every", "1 steps"]))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert (
        progress.finished
        and [line["accuracy"] for line in lines if line["kind"] == "eval"][-1] > 0.95
    )
    assert all(line["loss"] is not None for line in lines if line["kind"] == "train")


@pytest.fixture
def little_memory() -> Iterator[int]:
    """This process may use 2 GB of the GPU; mem_get_info does not know of it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((2 << 30) / total)
    yield 2 << 30
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_the_size_of_micro_batches_is_found_on_the_gpu(little_memory: int) -> None:
    """50 kB a token, kept: 32,768 tokens fit into 2 GB, 65,536 do not, whatever the device says is free."""
    weight = torch.ones(12_500, device=GPU, requires_grad=True)

    class Rows:
        max_length = 128

        def __getitem__(self, rows: list[int]) -> list[Example]:
            return [Example(row, [1] * 9, [0] * 9, 0, 1.0) for row in rows]

    examples: Any = Rows()
    batches = MapLoader(dataset=examples, rows_per_step=10_000, tokens_per_micro_batch=8192)
    found = find_tokens(lambda batch: (batch.ids[:, None] * weight).sum(), batches, GPU)
    assert found in (16_384, 32_768)


def test_a_step_that_runs_out_of_memory_on_the_gpu_is_retried(
    tiny_model: Path, tmp_path: Path, little_memory: int
) -> None:
    """For real: with sizes that were asked for and do not fit, the run ends with the losses of one that had others from its start."""
    (tmp_path / "train.tsv").write_text(
        "text\tlabel\n" + "".join(f"{'a good film ' * 40}{i}\t{i % 2}\n" for i in range(8192))
    )
    words = f"--model_name_or_path {tiny_model} --train_file {tmp_path}/train.tsv --train_batch_size 8192 --max_train_steps 2 --dropout 0"
    ends = {}
    for tokens in (1_000_000, 4096):
        out = tmp_path / str(tokens)
        flags = f"{words} --output_dir {out} --log_every 1_steps --tokens_per_micro_batch {tokens}".split()
        progress = train(read_config([word.replace("1_steps", "1 steps") for word in flags]))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        assert len(losses) == 2
        ends[tokens] = progress.oom_retries, losses
    assert ends[1_000_000][0] >= 1 and ends[4096][0] == 0
    assert ends[1_000_000][1] == pytest.approx(ends[4096][1], abs=1e-4)


def test_a_stop_takes_effect_one_call_later_on_the_gpu() -> None:
    stop, accelerator = StopSignal(), Accelerator()
    try:
        assert (
            stop._total_of_previous_call(
                torch.ones(1, dtype=torch.int32, device=accelerator.device)
            )
            is False
        )
        assert (
            stop._total_of_previous_call(
                torch.zeros(1, dtype=torch.int32, device=accelerator.device)
            )
            is True
        )
        assert (
            stop._total_of_previous_call(
                torch.zeros(1, dtype=torch.int32, device=accelerator.device)
            )
            is False
        )
    finally:
        stop.close()
