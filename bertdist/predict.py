"""An exported folder + texts -> labels and probabilities.

    python -m bertdist.predict --model out/best --text "A film to remember." "Two hours I will not get back."
    python -m bertdist.predict --model out/best --input reviews.csv --output predictions.jsonl
    accelerate launch -m bertdist.predict --model out/best --input reviews.csv --output predictions.jsonl     # on many devices

or, in Python: `Predictor("out/best")(["A film to remember."])`. Answers come in the order of the texts, whatever the batches.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.core.args import read_predict_config
from bertdist.core.atomic_io import atomic_write, to_json
from bertdist.core.config import ModelConfig, PredictConfig, RunConfig
from bertdist.core.errors import BertdistError, DataError
from bertdist.core.terminal import print_error, process_rank, strip_control_characters
from bertdist.data.loading import open_texts
from bertdist.data.records import Records, records_of
from bertdist.data.sharding import DEFAULT_TOKEN_BUDGET, MapLoader
from bertdist.data.tokenization import load_tokenizer, open_examples
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import EXIT_STOPPED, check_world, create_accelerator, run_cli
from bertdist.distributed.preemption import StopSignal
from bertdist.models.classifier import load_model_config, load_trained_classifier, saved_metadata
from bertdist.training.evaluation import describe_nonfinite_rows, no_number, predict_rows
from bertdist.training.memory import find_tokens
from bertdist.training.nonfinite import nonfinite_error

ROWS_AT_ONCE = 2048  # texts sorted by length together: long enough for texts of one length to meet, short enough for one device


class Stopped(Exception):
    """Asked to stop before all texts had their answer; the same on every rank."""


class Predictor:
    """A trained classifier, ready to answer.

    folder: what training wrote as best/, or any Hugging Face folder of a sequence classifier. tokens_per_micro_batch: None finds it
    from free memory. Raises ModelError where the folder holds no trained classifier.
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
        """stop: whom to ask, now and then, whether to go on."""
        self.stop = stop
        self.accelerator = accelerator or create_accelerator(RunConfig())
        self.model, self.task, self.notes = load_trained_classifier(str(folder))
        limit = max_length or self.notes.get("max_length")
        self.tokenizer = load_tokenizer(
            ModelConfig(model_name_or_path=str(folder), max_length=limit or 3)
        )
        self.max_length: int = limit or min(
            self.tokenizer.model_max_length, self.model.max_positions
        )
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.model.to(self.accelerator.device).eval()

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """One answer a text, in their order: {"label": "positive", "score": 0.98}; multi-label: {"labels": [{"label", "score"}, ...]}.

        pairs: the second texts, for models trained on pairs. Raises DataError for what is not text.
        """
        return self.answer(records_of(texts, pairs)) if len(texts) else []

    def answer(self, records: Records) -> list[dict[str, Any]]:
        """The same for records; under several ranks each computes its share, and all have all answers."""
        return self.task.to_records(self.logits(records))

    def logits(self, records: Records) -> Tensor:
        """(rows, outputs) float32 on the CPU: what the answers are read from; the same on every rank.

        Raises on all ranks Stopped, and NonFiniteError where the model has no answer to a row.
        """
        batches = MapLoader(
            examples=open_examples(records, self.tokenizer, None, self.max_length),
            rows_per_step=ROWS_AT_ONCE * self.accelerator.num_processes,
            tokens_per_micro_batch=self.tokens_per_micro_batch or DEFAULT_TOKEN_BUDGET,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        with self.accelerator.autocast():
            if self.tokens_per_micro_batch is None:
                with raise_on_all_ranks(self.accelerator), torch.no_grad():
                    self.tokens_per_micro_batch = find_tokens(
                        self.model, batches, self.accelerator.device
                    )
                batches = replace(batches, tokens_per_micro_batch=self.tokens_per_micro_batch)
            logits = predict_rows(self.model, batches, self.accelerator, self.stop)
        if logits is None:
            raise Stopped
        if rows := no_number(logits):
            raise nonfinite_error(
                "Prediction: " + describe_nonfinite_rows(rows, len(logits), records.where)
            )
        return logits


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """What the command line does, short of printing; returns the answers."""
    with StopSignal() as stop:
        return _predict(config, stop)


def _predict(config: PredictConfig, stop: StopSignal) -> list[dict[str, Any]]:
    accelerator = create_accelerator(
        RunConfig(use_cpu=config.use_cpu, mixed_precision=config.mixed_precision)
    )
    check_world(accelerator.num_processes)
    with raise_on_all_ranks(accelerator):
        # The rows first, which cost little: whatever is wrong with them is told before the weights are loaded.
        notes = saved_metadata(
            load_model_config(ModelConfig(model_name_or_path=config.model), "--model")
        )
        if config.input is None:
            records = records_of(config.text or [], config.text_pair)
        else:
            records = open_texts(
                config.input,
                text_column=config.text_column or notes.get("text_column"),
                text_pair_column=config.text_pair_column or notes.get("text_pair_column"),
                column_names=config.column_names,
                delimiter=config.delimiter,
                quoting=config.quoting,
                encoding=config.encoding,
            )
        predictor = Predictor(
            config.model,
            max_length=config.max_length,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            accelerator=accelerator,
            stop=stop,
        )
    return predictor.answer(records)


def lines_of(answers: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines, one a row, in row order."""
    return b"".join(to_json({"row": row, **answer}) for row, answer in enumerate(answers))


def main() -> None:
    """The command line. Exit codes: see `run_cli`."""
    run_cli(_main)


def _main(arguments: Sequence[str]) -> int:
    config = read_predict_config(arguments)
    if config.output is not None and not Path(config.output).parent.is_dir():
        raise DataError(
            f"--output {config.output}: there is no folder {Path(config.output).parent}."
        )
    try:
        answers = predict(config)
    except Stopped:
        if process_rank() == 0:
            print_error(BertdistError("Stopped: nothing was written; run the same command again."))
        return EXIT_STOPPED
    if process_rank() != 0:
        return 0
    if config.output is not None:
        atomic_write(Path(config.output), lines_of(answers))
    elif config.input is not None:
        sys.stdout.write(lines_of(answers).decode())
    else:
        print("\n".join(map(_shown, answers)))
    return 0


def _shown(answer: dict[str, Any]) -> str:
    labels = answer.get("labels", [answer])
    lines = (f"{strip_control_characters(x['label'])}\t{x['score']:.4f}" for x in labels)
    return "\n".join(lines) or "(no label)"


if __name__ == "__main__":
    main()
