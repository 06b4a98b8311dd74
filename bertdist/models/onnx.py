"""A trained classifier as an ONNX graph: exported by torch, quantized and run by ONNX Runtime.

    export_onnx("out/best", folder / ONNX_FILE)          # float32
    quantize(float32_file, folder / ONNX_FILE)           # int8
    save_settings("out/best", tokenizer, folder, 128, inputs)  # config.json and the tokenizer
    OnnxClassifier(folder).logits(records)               # as users of the folder compute them

The graph takes what the tokenizer gives (input_ids, attention_mask, token_type_ids; int64, texts x
tokens) and returns logits (texts x outputs, float32). tokenizer.json truncates and pads by itself,
so that the `tokenizers` library and numpy are all that ONNX Runtime needs beside it.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from bertdist.core.config import ModelConfig
from bertdist.core.errors import ModelError
from bertdist.core.types import Array
from bertdist.data.records import Records
from bertdist.data.tokenization import Example, create_dataset, save_tokenizer
from bertdist.models.classifier import load_model_config, quiet_transformers
from bertdist.models.model_config import reset_outputs

ONNX_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx_data"  # beside it, of graphs that are too large for one file
# A protobuf file holds less than 2 GiB.
EXTERNAL_FROM = (2 << 30) - (64 << 20)
# Texts of a comparison, in their order: of different lengths, padded to the longest; positions.
BATCH, BATCH_POSITIONS = 32, 1 << 14
OPSET = 18


def load_plain(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of a trained folder, unchanged. Raises ModelError."""
    from bertdist.core.hub import from_cache

    config = load_model_config(ModelConfig(model_name_or_path=model), "--model")
    reset_outputs(config)
    try:
        with quiet_transformers():
            return AutoModelForSequenceClassification.from_pretrained(
                model,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=from_cache(),
            ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"--model {model}: {str(error).splitlines()[0]}") from None


class _Logits(nn.Module):
    """A model with positional arguments that returns one tensor."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export_onnx(model: str, file: Path) -> list[str]:
    """Write the graph, in float32, for any number of texts and tokens; the names of its inputs.

    Raises ModelError.
    """
    plain = load_plain(model)
    names = ["input_ids", "attention_mask"]
    takes_types = "token_type_ids" in inspect.signature(plain.forward).parameters
    if takes_types and (getattr(plain.config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    ids = torch.full((2, 8), 1)  # torch follows the shapes, not the values
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    example = (ids, mask, torch.zeros_like(ids))[: len(names)]
    axes = {name: {0: "texts", 1: "tokens"} for name in names} | {"logits": {0: "texts"}}
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                _Logits(plain, names).eval(),  # eval on the outside, whose mode is put back
                example,
                str(file),
                input_names=names,
                output_names=["logits"],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # of the model's code and of the exporter: a dozen kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"torch.onnx (torch {torch.__version__}) cannot export a model of type "
            f"{plain.config.model_type!r}: {reason}"
        ) from error
    if sum(weight.nbytes for weight in plain.state_dict().values()) >= EXTERNAL_FROM:
        _join_weights(file)
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch's tracer and of the quantizer: the graph is compared."""
    # With a handler, logging makes none, which would keep the stderr of this moment.
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)


def _join_weights(file: Path) -> None:
    """Put the weights, of which torch has written a file each, into one beside the graph."""
    import onnx

    graph = onnx.load(file, load_external_data=False)
    entries = (entry for tensor in graph.graph.initializer for entry in tensor.external_data)
    parts = {entry.value for entry in entries if entry.key == "location"}
    onnx.load_external_data_for_model(graph, str(file.parent))
    onnx.save_model(graph, file, save_as_external_data=True, location=WEIGHTS_FILE)
    for name in parts:
        (file.parent / name).unlink()


def quantize(source: Path, target: Path) -> None:
    """Weights of matrix products and embeddings as int8, activations as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    size = sum(path.stat().st_size for path in source.parent.glob(f"{source.name}*"))
    with _quiet():
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            use_external_data_format=size // 2 >= EXTERNAL_FROM,
        )


def save_settings(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_length: int,
    inputs: Sequence[str],
) -> None:
    """Write config.json, and a tokenizer that gives these inputs; its tokenizer.json truncates to
    max_length and pads.
    """
    import tokenizers

    load_model_config(ModelConfig(model_name_or_path=model), "--model").save_pretrained(folder)
    save_tokenizer(tokenizer, folder, max_length, "token_type_ids" in inputs)
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    fast = tokenizers.Tokenizer.from_file(str(path))
    fast.enable_truncation(
        max_length, strategy="longest_first", direction=tokenizer.truncation_side
    )
    if tokenizer.pad_token is not None:
        fast.enable_padding(
            direction=tokenizer.padding_side,
            pad_id=tokenizer.pad_token_id,
            pad_type_id=tokenizer.pad_token_type_id,
            pad_token=tokenizer.pad_token,
        )
    fast.save(str(path))


def _session(folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(
        str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"]
    )


class OnnxClassifier:
    """An exported folder, run as its users run it: by ONNX Runtime and `tokenizers`."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """tokenizer, max_length: of the model, which those of the folder must equal."""
        import tokenizers

        self.session = _session(folder)
        self.inputs = [entry.name for entry in self.session.get_inputs()]
        self.own, self.max_length = tokenizer, max_length
        path = folder / "tokenizer.json"
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path)) if path.exists() else None

    def logits(self, records: Records, show: Callable[[int], None] = lambda rows: None) -> Tensor:
        """(rows, outputs) float32. show: called with the number of rows done.

        Raises ModelError where the folder's tokenizer gives other tokens than the model's.
        """
        dataset = create_dataset(records, self.own, None, self.max_length)
        found = []
        for start in range(0, len(records), BATCH):
            rows = range(start, min(start + BATCH, len(records)))
            examples = dataset[rows]
            if self.tokenizer is not None:
                self._check_tokens(records, rows, examples)
            found += [self.of_examples(part) for part in _parts(examples)]
            show(rows.stop)
        return torch.cat(found)

    def _check_tokens(self, records: Records, rows: range, examples: Sequence[Example]) -> None:
        assert self.tokenizer is not None
        texts = [records[row] for row in rows]
        encodings = self.tokenizer.encode_batch(
            [record.text if record.pair is None else (record.text, record.pair) for record in texts]
        )
        for row, encoding, example in zip(rows, encodings, examples, strict=True):
            mask = np.array(encoding.attention_mask, dtype=bool)
            ids, types = np.array(encoding.ids)[mask], np.array(encoding.type_ids)[mask]
            same = ids.tolist() == example.ids
            if "token_type_ids" in self.inputs:
                same = same and types.tolist() == example.token_type_ids
            if not same:
                raise ModelError(
                    f"{records.location(row)}: the exported tokenizer.json gives other tokens than "
                    "the model's tokenizer."
                )

    def of_examples(self, examples: Sequence[Example]) -> Tensor:
        """Logits of texts as token ids, padded to the longest of them."""
        lengths = [len(example.ids) for example in examples]
        shape = len(examples), max(lengths)
        pad = self.own.pad_token_id or 0
        ids, types = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
        mask = np.arange(shape[1]) < np.array(lengths)[:, None]
        if self.own.padding_side == "left":
            mask = mask[:, ::-1]
        ids[mask] = np.concatenate([example.ids for example in examples])
        types[mask] = np.concatenate([example.token_type_ids for example in examples])
        arrays: dict[str, Array] = {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
            "token_type_ids": types,
        }
        try:
            (logits,) = self.session.run(None, {name: arrays[name] for name in self.inputs})
        except Exception as error:  # kinds of onnxruntime, none of which it documents
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"ONNX Runtime cannot run the exported graph on {shape[0]} x {shape[1]} tokens: "
                f"{reason}"
            ) from None
        return torch.from_numpy(np.asarray(logits, dtype=np.float32))


def _parts(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Consecutive texts that fit together, padded; one that is longer by itself."""
    start = longest = 0
    for end, example in enumerate(examples):
        longest = max(longest, len(example.ids))
        if end > start and (end - start + 1) * longest > BATCH_POSITIONS:
            yield examples[start:end]
            start, longest = end, len(example.ids)
    yield examples[start:]
