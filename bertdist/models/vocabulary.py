"""The ids of a tokenizer, compared with the rows of a model's embeddings.

An embedding may have more rows than the tokenizer has ids: many are padded to a multiple of 64. An
id without a row would be an IndexError in the middle of an epoch, and a device assert on a GPU.
"""

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bertdist.core.errors import ModelError, listed

SHOWN_TOKENS = 3


def missing_tokens(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model: str
) -> list[str]:
    """Tokens that were added to a tokenizer and have no row in the model's embedding, by id.

    model: for the error message. Raises ModelError where tokens of the vocabulary itself have none:
    it belongs to another model.
    """
    rows = getattr(model_config, "vocab_size", None)
    if rows is None:  # CANINE hashes characters
        return []
    ids = tokenizer.get_vocab()
    missing = sorted((token for token, id in ids.items() if id >= rows), key=ids.__getitem__)
    if set(missing) - set(tokenizer.get_added_vocab()):
        raise ModelError(
            f"{model}: the tokenizer has {len(ids):,} tokens with ids up to {ids[missing[-1]]:,}, "
            f"the model's embedding has {rows:,} rows. Use the model's own tokenizer (without "
            "--tokenizer_name), or the model that belongs to this tokenizer."
        )
    return missing


def check_vocabulary(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model: str
) -> list[str]:
    """A note if training will resize the embedding. Raises ModelError as `missing_tokens` does."""
    missing = missing_tokens(model_config, tokenizer, model)
    return [f"{_describe(missing, model_config)}: training resizes it."] if missing else []


def _describe(missing: list[str], model_config: PretrainedConfig) -> str:
    """The missing tokens in words: the beginning of a sentence."""
    count = "1 added token" if len(missing) == 1 else f"{len(missing):,} added tokens"
    return (
        f"The tokenizer has {count} ({listed(missing, SHOWN_TOKENS)}) that the model's embedding "
        f"of {model_config.vocab_size:,} rows lacks"
    )


def resize_embedding(model: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """Give added tokens rows in the embedding, drawn from torch's generator, and return notes.

    Raises ModelError as `missing_tokens` does, and where transformers cannot resize the model.
    """
    missing = missing_tokens(model.config, tokenizer, where)
    if not missing:
        return []
    found, rows = _describe(missing, model.config), max(tokenizer.get_vocab().values()) + 1
    try:
        model.resize_token_embeddings(rows)
    except (RuntimeError, TypeError, ValueError):  # NotImplementedError is a RuntimeError
        raise ModelError(
            f"{where}: {found}, and transformers cannot resize a model of type "
            f"{model.config.model_type!r}."
        ) from None
    return [f"{found}: resized to {rows:,}, the new rows drawn at random."]


def segment_notes(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note where the tokenizer gives pairs segment ids that the model has no row for."""
    rows: int = getattr(model_config, "type_vocab_size", 0)
    segments = tokenizer(["a"], ["b"]).get("token_type_ids") or [[0]]
    if not 0 < rows <= max(segments[0], default=0):
        return []
    return [
        f"Pairs: the tokenizer gives segment ids up to {max(segments[0])}, the model has "
        f"type_vocab_size {rows}: the ids that it lacks are set to 0."
    ]
