"""A bf16 step on a CPU: activations stay bf16 from layer to layer, and products have few shapes.

Under `torch.autocast("cpu", torch.bfloat16)` products are bf16, and what follows them takes the
type of its inputs. Two things cost more there than the products:

1. Embeddings leave their norm in float32, so every residual sum, norm and input of a product is
   float32 again, and is cast before each product. `keep_bf16` casts once, behind the embeddings.
   Norms, softmax and the sum of a loss are still computed in float32, and weights and their
   gradients stay float32.
2. oneDNN generates code for each new number of rows of a product, 3 to 10 ms each time, where the
   product takes 0.3 to 1 ms; micro-batches without padding have a new number of tokens in almost
   every step. `round_up` adds texts that nobody reads, so that the numbers of tokens and of texts
   are round. Texts do not see each other, and the added ones have no gradient: exact.

Legend: T tokens, N texts.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertdist.data.batch import PackedBatch

# tokens and texts are rounded up to a multiple; from MANY_TOKENS on to a coarser one
TOKENS, MANY_TOKENS, TOKENS_OF_MANY, TEXTS = 32, 2048, 128, 4


def in_use(device: torch.device) -> bool:
    """Whether the CPU computes under bf16 autocast now."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16


def keep_bf16(model: Any) -> None:
    """Let the embeddings of a packed classifier leave as bf16 where the CPU computes in bf16."""

    def cast(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(torch.bfloat16) if in_use(output.device) else output

    model.base_model.embeddings.register_forward_hook(cast)


def round_up(batch: PackedBatch) -> PackedBatch:
    """The batch with 1 to TEXTS more texts behind its own; targets and weights stay the same."""
    tokens, texts = len(batch.ids), len(batch.lengths)
    more_texts = TEXTS - texts % TEXTS
    multiple = TOKENS if tokens < MANY_TOKENS else TOKENS_OF_MANY
    more = -(tokens + more_texts) % multiple + more_texts
    lengths = np.full(more_texts, more // more_texts)
    lengths[: more % more_texts] += 1
    ends = lengths.cumsum()
    # positions that a text of this batch has, too
    positions = (np.arange(more) - np.repeat(ends - lengths, lengths)) % max(batch.lengths)
    return replace(
        batch,
        ids=torch.cat([batch.ids, batch.ids[:1].expand(more)]),
        positions=torch.cat([batch.positions, torch.from_numpy(positions)]),
        token_type_ids=F.pad(batch.token_type_ids, (0, more)),
        cu_seqlens=torch.cat([batch.cu_seqlens, torch.from_numpy(ends) + tokens]),
        row_numbers=F.pad(batch.row_numbers, (0, more_texts), value=-1),
        lengths=(*batch.lengths, *lengths.tolist()),
    )
