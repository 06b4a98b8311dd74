"""Predict labels and probabilities with a trained folder.

    python -m bertdist.predict --model out/best --text "A film to remember." "Two lost hours."
    python -m bertdist.predict --model out/best --input reviews.csv --output predictions.jsonl
    accelerate launch -m bertdist.predict --model out/best --input reviews.csv \
        --output predictions.jsonl  # on several devices

or, in Python, `Predictor("out/best")(["A film to remember."])`. Results are in the order of the
texts and do not depend on how they are batched.
"""

import os
import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder
        # above.
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from bertdist.core.args import parse_or_exit, read_predict_config

    flags = parse_or_exit(read_predict_config)  # before torch is imported, which takes seconds

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.core.atomic_io import to_json
from bertdist.core.config import ModelConfig, PredictConfig, RunConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError
from bertdist.core.hub import model_folder
from bertdist.core.output_files import write_output
from bertdist.core.terminal import print_error, print_json, print_to_stderr, printable, process_rank
from bertdist.data.loader import DEFAULT_TOKEN_BUDGET, MapLoader
from bertdist.data.records import ColumnNames, Records, records_from_texts
from bertdist.data.splits import load_texts
from bertdist.data.tokenization import create_dataset, load_tokenizer, truncation_notes
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import (
    EXIT_STOPPED,
    create_accelerator,
    run_cli,
    with_default_modes,
)
from bertdist.distributed.launcher import check_world
from bertdist.distributed.preemption import StopSignal
from bertdist.models.classifier import load_model_config, load_trained_classifier, saved_metadata
from bertdist.models.model_config import missing_tokens
from bertdist.training.evaluation import describe_nonfinite_rows, nonfinite_rows, predict_rows
from bertdist.training.micro_batches import find_tokens
from bertdist.training.nonfinite import nonfinite_error

# Rows that are sorted by length together: enough for texts of one length to share a micro-batch,
# few enough for one device.
ROWS_PER_WINDOW = 2048
# Bytes of texts from which on the memory is measured before they are computed: fewer tokens fit
# anyway, or are halved, and the measurement takes as long as they do.
MEASURED_FROM = 4096


class Stopped(Exception):
    """A stop was requested before all texts were predicted; raised on every rank."""


class Predictor:
    """A trained classifier that predicts texts.

        predictor = Predictor("out/best")
        predictor(["A film to remember."])         # [{"label": "positive", "score": 0.98}]
        predictor("A film to remember.")           # the same
        predictor(["A premise."], ["A hypothesis."])  # if trained on text pairs

    The device and precision are those of `accelerator`, by default what `accelerate launch` set,
    else the GPU if there is one; a caller's torch.autocast changes nothing. Creating a Predictor
    changes no settings of the process.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_length: int | None = None,
        tokens_per_micro_batch: int | None = None,
        accelerator: Accelerator | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        """Load a trained folder (best/), or any Hugging Face folder of a sequence classifier.

        folder: that of a run means its best/.
        max_length: longer texts are truncated to it; None: the maximum of the training, else of the
        model. tokens_per_micro_batch: None: chosen from free memory at the first call. stop: ends a
        call with `Stopped` once it is set.
        Raises ModelError if the folder holds no trained classifier.
        """
        folder = model_folder(str(folder))
        self.stop = stop
        self.accelerator = accelerator or create_accelerator(RunConfig())
        # metadata: max_length, text_column and text_pair_column of the training.
        self.model, self.task, self.metadata = load_trained_classifier(folder)
        limit = max_length or self.metadata.get("max_length")
        tokenizer_config = ModelConfig(model_name_or_path=folder, max_length=limit or 3)
        self.tokenizer = load_tokenizer(tokenizer_config)
        model_config = self.model.model.config
        # Added after the training: only texts that hold them cannot be predicted.
        missing = missing_tokens(model_config, self.tokenizer, f"--model {folder}")
        self._vocab_size: int | None = model_config.vocab_size if missing else None
        longest = min(self.tokenizer.model_max_length, self.model.max_positions)
        self.max_length: int = limit or longest
        if self.max_length > self.model.max_positions:
            raise ConfigError(
                f"--max_length is {self.max_length}; this model has {self.model.max_positions} "
                "positions."
            )
        self._warns_of_truncation = self.accelerator.is_main_process  # once
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.model.to(self.accelerator.device).eval()

    def __call__(
        self, texts: str | Iterable[str], pairs: str | Iterable[str] | None = None
    ) -> list[dict[str, Any]]:
        """Predict texts. pairs: the second text of each, for models trained on pairs.

        texts and pairs: any ordered iterable of str, such as a list, a generator or a column of a
        table; one str is one text, and its answer is a list of one dict, as of `pipeline`.
        Returns one dict per text, in their order, with the keys of `transformers.pipeline`:
        {"label": "positive", "score": 0.98}; multi-label: {"labels": [{"label", "score"}, ...]}
        with every label above 0.5; regression: the score is the number.
        Raises DataError if a text is not a string, or if second texts are missing or not expected;
        NonFiniteError if a logit is not finite.
        """
        records = records_from_texts(texts, pairs)
        for note in self.truncation_notes(records) if self._warns_of_truncation else ():
            warnings.warn(note, stacklevel=2)
            self._warns_of_truncation = False
        return self.predict_records(records) if len(records) else []

    def truncation_notes(self, records: Records) -> list[str]:
        """A line if more than 1% of the texts are truncated; a call warns of it, once."""
        return truncation_notes({"texts": records}, self.tokenizer, self.max_length)

    @with_default_modes()
    def predict_records(self, records: Records) -> list[dict[str, Any]]:
        """As __call__. Every rank computes its share of the rows and returns all results."""
        return list(self.task.to_records(self.predict_logits(records)))

    @with_default_modes()
    def predict_logits(self, records: Records) -> Tensor:
        """(rows, outputs) float32 on the CPU, the same on every rank.

        Raises, on all ranks, Stopped, DataError as `check_pairs` does, and NonFiniteError if a
        logit is not finite.
        """
        with raise_on_all_ranks(self.accelerator):
            check_pairs(self.metadata, records)
        world_size = self.accelerator.num_processes
        dataset = create_dataset(records, self.tokenizer, None, self.max_length, self._vocab_size)
        batches = MapLoader(
            dataset=dataset,
            rows_per_step=ROWS_PER_WINDOW * world_size,
            tokens_per_micro_batch=self.tokens_per_micro_batch or DEFAULT_TOKEN_BUDGET,
            rank=self.accelerator.process_index,
            ranks=world_size,
        )
        with self.accelerator.autocast():
            if self.tokens_per_micro_batch is None and records.lengths().sum() > MEASURED_FROM:
                with raise_on_all_ranks(self.accelerator), torch.no_grad():
                    self.tokens_per_micro_batch = find_tokens(
                        self.model, batches, self.accelerator.device
                    )
                batches = replace(batches, tokens_per_micro_batch=self.tokens_per_micro_batch)
            logits = predict_rows(self.model, batches, self.accelerator, self.stop)
        if logits is None:
            raise Stopped
        if rows := nonfinite_rows(logits):
            report = describe_nonfinite_rows(rows, len(logits), records.location)
            raise nonfinite_error(f"Prediction: {report}")
        return logits


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Predict the texts of --text or --input; returns what `Predictor` returns."""
    run = RunConfig(use_cpu=config.use_cpu, mixed_precision=config.mixed_precision)
    with StopSignal() as stop:
        accelerator = create_accelerator(run)
        check_world(accelerator.num_processes)
        with raise_on_all_ranks(accelerator):
            # Rows first: they cost little, and their errors come before the weights are loaded.
            records = _load_rows(config)
            predictor = Predictor(
                config.model,
                max_length=config.max_length,
                tokens_per_micro_batch=config.tokens_per_micro_batch,
                accelerator=accelerator,
                stop=stop,
            )
        if accelerator.is_main_process:
            print_to_stderr(*predictor.truncation_notes(records))
        return predictor.predict_records(records)


def _load_rows(config: PredictConfig) -> Records:
    model_config = load_model_config(ModelConfig(model_name_or_path=config.model), "--model")
    metadata = saved_metadata(model_config)
    if config.input is None:
        records = records_from_texts(config.text or [], config.text_pair)
    else:
        labels = list((model_config.id2label or {}).values())
        records = _load_file(config, metadata, labels)
    check_pairs(metadata, records)
    return records


def _load_file(config: PredictConfig, metadata: dict[str, Any], labels: list[str]) -> Records:
    assert config.input is not None
    text = metadata.get("text_column")
    text = tuple(text) if isinstance(text, list) else text
    trained = ColumnNames(text, metadata.get("text_pair_column"), None, [])
    records = load_texts(config.input, config, trained, labels)
    if process_rank() == 0:
        print_to_stderr(*(f"{note}." for note in records.format_notes))
    return records


def check_pairs(metadata: dict[str, Any], records: Records) -> None:
    """Raise DataError if the model was trained on pairs of texts and these are single ones, or vice
    versa. metadata: of the model; a folder of another program does not say, and takes both.
    """
    if "text_pair_column" not in metadata:
        return
    second = metadata["text_pair_column"]
    if second is not None and records.pairs is None:
        raise DataError(
            f"The model was trained on pairs of texts (columns {metadata.get('text_column')!r} and "
            f"{second!r}), and the second texts are missing: give pairs=, --text_pair or "
            "--text_pair_column."
        )
    if second is None and records.pairs is not None:
        raise DataError(
            "The model was trained on single texts, not on pairs: remove pairs=, --text_pair or "
            "--text_pair_column."
        )


def to_jsonl(predictions: Iterable[dict[str, Any]]) -> bytes:
    """One JSON line per row, in row order."""
    lines = ({"row": row, **prediction} for row, prediction in enumerate(predictions))
    return b"".join(map(to_json, lines))


def run(config: PredictConfig) -> int:
    """Predict, and print or write the predictions; returns the exit code."""
    try:
        predictions = predict(config)
    except Stopped:
        if process_rank() == 0:
            print_error(
                BertdistError("Stopped on request: nothing was written; rerun the same command.")
            )
        return EXIT_STOPPED
    if process_rank() != 0:
        return 0
    if config.output is not None:
        write_output(config.output, to_jsonl(predictions))
    elif config.input is not None:
        print_json(to_jsonl(predictions).decode())
    else:
        print("\n".join(map(_as_text, predictions)))
    return 0


def _as_text(prediction: dict[str, Any]) -> str:
    """One line per label with its score."""
    labels = prediction.get("labels", [prediction])
    lines = (f"{printable(x['label'])}\t{x['score']:.4f}" for x in labels)
    return "\n".join(lines) or "(no label)"


if __name__ == "__main__":
    run_cli(run, flags)
