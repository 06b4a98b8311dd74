"""Floating point operations of the useful part of a training step: real tokens, without padding.

6 x (weights of the encoder's linear layers) x (real tokens)
+ 12 x (sum of the squares of the texts' lengths) x hidden x layers

A product with W weights is 2 W operations per token forward and 4 W backward
(https://arxiv.org/abs/2001.08361, section 2.1); the two products of attention are 4 L^2 x hidden
per layer forward and twice that backward. Embeddings, norms and the head are left out.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a BERT."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int = 512

    @property
    def linear_weights(self) -> int:
        """Of the encoder: query, key, value, output, and two matrices of the feed-forward."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)

    @property
    def embedding_weights(self) -> int:
        """Tokens, positions, two segments."""
        return (self.vocabulary + self.positions + 2) * self.hidden

    @property
    def weights(self) -> int:
        """All parameters but the classification head: with biases, norms and the pooler."""
        layer = (
            4 * self.hidden**2
            + 2 * self.hidden * self.intermediate
            + 9 * self.hidden
            + self.intermediate
        )
        return (
            self.embedding_weights
            + 2 * self.hidden
            + self.layers * layer
            + self.hidden**2
            + self.hidden
        )


BERT_BASE = Shape(layers=12, hidden=768, intermediate=3072, vocabulary=30522)


def read_shape(folder: str | Path) -> Shape:
    """From a BERT's config.json. Raises OSError, ValueError or KeyError."""
    found = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    return Shape(
        layers=found["num_hidden_layers"],
        hidden=found["hidden_size"],
        intermediate=found["intermediate_size"],
        vocabulary=found["vocab_size"],
        positions=found["max_position_embeddings"],
    )


def training_flops(shape: Shape, lengths: Iterable[float]) -> float:
    """Operations of one forward and backward pass over texts of these lengths in tokens."""
    tokens = squares = 0.0
    for length in lengths:
        tokens += length
        squares += length * length
    return 6 * shape.linear_weights * tokens + 12 * squares * shape.hidden * shape.layers
