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
    from bertdist.data.preflight import check_predict

    # Before torch is imported, which takes seconds
    parsed_config = parse_or_exit(read_predict_config, check_predict)

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import __version__ as transformers_version

from bertdist import __version__
from bertdist.core.atomic_io import file_digests, file_stats
from bertdist.core.config import ModelConfig, PredictConfig, RunConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError, ModelError, listed
from bertdist.core.hub import model_folder
from bertdist.core.output_files import (
    STDOUT,
    is_special,
    open_special,
    output_format,
    target_of,
)
from bertdist.core.partial_file import InPlaceFile, OutputClosed, PartialFile, stamp_of
from bertdist.core.terminal import (
    EXIT_STOPPED,
    ProgressBar,
    excerpt,
    print_error,
    print_to_stderr,
    printable,
    process_rank,
    write_to_stdout,
)
from bertdist.core.thresholds import parse_threshold
from bertdist.data.in_memory import is_table, records_from_table, records_from_texts
from bertdist.data.loader import DEFAULT_TOKEN_BUDGET, MapLoader
from bertdist.data.prediction_input import InputRows, InputWindow
from bertdist.data.readers.remote import STDIN
from bertdist.data.records import ColumnNames, Records
from bertdist.data.tokenization import create_dataset, load_tokenizer, truncation_notes
from bertdist.data.trained_columns import check_pairs, trained_columns
from bertdist.data.writers import AnswerColumns, create_writer
from bertdist.distributed.collectives import (
    all_reduce_min,
    broadcast_from_rank0,
    host_group,
    raise_on_all_ranks,
)
from bertdist.distributed.launch import create_accelerator, reset_torch_modes, run_cli
from bertdist.distributed.launcher import check_world
from bertdist.distributed.preemption import StopSignal
from bertdist.models.classifier import load_model_config, load_trained_classifier, saved_metadata
from bertdist.models.model_config import missing_tokens
from bertdist.tasks.labels import MULTI_LABEL
from bertdist.tasks.tasks import Threshold, check_answer, describe_thresholds
from bertdist.training.evaluation import describe_nonfinite_rows, nonfinite_rows, predict_rows
from bertdist.training.micro_batches import find_tokens
from bertdist.training.nonfinite import nonfinite_error

NO_LABEL = "(no label)"

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
        predictor(frame, top_k=3)                  # pandas, polars, datasets, Arrow
        predictor.probabilities(texts)             # (texts, labels) float32

    The device and precision are those of `accelerator`, by default what `accelerate launch` set,
    else the GPU if there is one; a caller's torch.autocast changes nothing. Creating a Predictor
    changes no settings of the process. Threads may share it: their calls are computed one after the
    other. It can be pickled, as multiprocessing and joblib do: the other process loads the same
    folder, on a device of its own.
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
        if max_length is not None and (type(max_length) is not int or max_length < 3):
            raise ConfigError(f"max_length is {max_length!r}; expected a number of at least 3.")
        # A tokenizer keeps its truncation, and a model its dropout masks, from call to call.
        self._lock = threading.RLock()
        self.folder = folder = model_folder(folder)
        self._source = Path(folder).expanduser().absolute()
        self._stats = file_stats(self._source)  # before they are read
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

    def __getstate__(self) -> dict[str, Any]:
        """What it is made of, without weights, device and `stop`.

        Raises ModelError where the folder has changed since it was loaded.
        """
        if file_stats(self._source) != self._stats:
            raise ModelError(
                f"{self._source} has changed since this Predictor loaded it: make a new Predictor "
                "to pickle it."
            )
        return {
            "folder": str(self._source) if self._stats else self.folder,  # else of the hub
            "digests": file_digests(self._source),
            "max_length": self.max_length,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
            "mixed_precision": self.accelerator.mixed_precision,
            "use_cpu": self.accelerator.device.type == "cpu",
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises ModelError where the folder is not there, or has other files by now."""
        folder = state["folder"]
        if (digests := state["digests"]) and digests != file_digests(Path(folder)):
            found = "has other files since" if Path(folder).is_dir() else "is not there"
            raise ModelError(f"The Predictor was pickled with {folder}, which {found}.")
        run = RunConfig(use_cpu=state["use_cpu"], mixed_precision=state["mixed_precision"])
        self.__init__(  # type: ignore[misc]  # as pickle has made it without
            folder,
            max_length=state["max_length"],
            tokens_per_micro_batch=state["tokens_per_micro_batch"],
            accelerator=create_accelerator(run),
        )

    def __repr__(self) -> str:
        shown = listed([repr(label) for label in self.labels], 5)
        return (
            f"Predictor({self.folder!r}, {self.task.problem_type}, labels: {shown}; "
            f"device {self.accelerator.device.type}, max_length {self.max_length})"
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the outputs, in the order of the columns of `probabilities`."""
        return self.task.labels

    def __call__(
        self,
        texts: Any,
        pairs: str | Iterable[str] | None = None,
        *,
        top_k: int | Literal["all"] | None = None,
        threshold: Threshold = None,
        text_column: str | list[str] | None = None,
        text_pair_column: str | None = None,
    ) -> list[dict[str, Any]]:
        """Predict texts. pairs: the second text of each, for models trained on pairs.

        texts and pairs: any ordered iterable of str, such as a list, a generator or a column of a
        table; one str is one text, and its answer is a list of one dict, as of `pipeline`. Or a
        table as texts (pandas, polars, datasets, Arrow): its columns are those of the training,
        unless text_column and text_pair_column name others.
        Returns one dict per text, in their order, with the keys of `transformers.pipeline`:
        {"label": "positive", "score": 0.98}; multi-label: {"labels": [{"label", "score"}, ...]}
        with every label above the threshold, 0.5 or that of --tune_thresholds; regression: the
        score is the number. With top_k all tasks have "labels", the k most probable ones. A
        threshold makes the label None where the score of a single-label prediction is below it.
        {"joy": 0.2} is the threshold of a label: multi-label, or of one of two labels, which is the
        answer above it.
        Raises DataError if a text is not a string, or if second texts are missing or not expected;
        ConfigError for a top_k or threshold that cannot be; NonFiniteError if a logit is not
        finite.
        """
        most = sys.maxsize if top_k == "all" else top_k
        check_answer(self.task, most, threshold)
        records = self._records(texts, pairs, text_column, text_pair_column)
        if not len(records):
            return []
        return self.predict_records(records, most, threshold)

    def probabilities(
        self,
        texts: Any,
        pairs: str | Iterable[str] | None = None,
        *,
        text_column: str | list[str] | None = None,
        text_pair_column: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """(texts, labels) float32, the columns as `labels`: softmax, of multi-label models sigmoid.

        Of regression (texts, 1), the number. Arguments and errors: see `__call__`.
        """
        records = self._records(texts, pairs, text_column, text_pair_column)
        if not len(records):
            return np.zeros((0, len(self.labels)), np.float32)
        with reset_torch_modes():
            return self.task.predict(self.predict_logits(records))[1]

    def _records(
        self,
        texts: Any,
        pairs: Any,
        text_column: str | list[str] | None,
        text_pair_column: str | None,
    ) -> Records:
        """Warns of truncation, at the first call."""
        if is_table(texts):
            if pairs is not None:
                raise DataError("The texts are a table: name its second column, text_pair_column.")
            trained = trained_columns(self.metadata)
            text = tuple(text_column) if isinstance(text_column, list) else text_column
            pair = text_pair_column or trained.pair
            records = records_from_table(texts, ColumnNames(text or trained.text, pair, None, []))
        elif text_column or text_pair_column:
            raise DataError("text_column and text_pair_column are columns of a table.")
        else:
            records = records_from_texts(texts, pairs)
        for note in self.truncation_notes(records) if self._warns_of_truncation else ():
            warnings.warn(note, stacklevel=3)
            self._warns_of_truncation = False
        return records

    def truncation_notes(self, records: Records) -> list[str]:
        """A line if more than 1% of the texts are truncated; a call warns of it, once."""
        with self._lock:
            return truncation_notes({"texts": records}, self.tokenizer, self.max_length)

    @reset_torch_modes()
    def predict_records(
        self, records: Records, top_k: int | None = None, threshold: Threshold = None
    ) -> list[dict[str, Any]]:
        """As __call__. Every rank computes its share of the rows and returns all results."""
        return list(self.task.to_records(self.predict_logits(records), top_k, threshold))

    @reset_torch_modes()
    def predict_logits(
        self, records: Records, show: Callable[[int], None] = lambda rows: None
    ) -> Tensor:
        """(rows, outputs) float32 on the CPU, the same on every rank.

        show: called now and then with the number of rows done.
        Every rank computes its share of the rows; the same bits on any number of ranks. Raises, on
        all ranks, Stopped, DataError as `check_pairs` does, and NonFiniteError if a logit is not
        finite.
        """
        with raise_on_all_ranks(self.accelerator):
            check_pairs(self.metadata, records.pairs is not None)
        world_size = self.accelerator.num_processes
        dataset = create_dataset(records, self.tokenizer, None, self.max_length, self._vocab_size)
        batches = MapLoader(
            dataset=dataset,
            rows_per_step=ROWS_PER_WINDOW * world_size,
            tokens_per_micro_batch=self.tokens_per_micro_batch or DEFAULT_TOKEN_BUDGET,
            rank=self.accelerator.process_index,
            ranks=world_size,
            window=ROWS_PER_WINDOW,
        )
        with self._lock, self.accelerator.autocast():
            if self.tokens_per_micro_batch is None and records.lengths().sum() > MEASURED_FROM:
                with raise_on_all_ranks(self.accelerator), torch.no_grad():
                    tokens = find_tokens(self.model, batches, self.accelerator.device)
                group = host_group(self.accelerator)
                (self.tokens_per_micro_batch,) = all_reduce_min(self.accelerator, [tokens], group)
                batches = replace(batches, tokens_per_micro_batch=self.tokens_per_micro_batch)
            logits = predict_rows(self.model, batches, self.accelerator, self.stop, show)
        if logits is None:
            raise Stopped
        if rows := nonfinite_rows(logits):
            report = describe_nonfinite_rows(rows, len(logits), records.location)
            raise nonfinite_error(f"Prediction: {report}")
        return logits


def run(config: PredictConfig) -> int:
    """Predict the texts of --text or --input, and print or write the answers; returns the exit
    code.
    """
    # Each micro-batch has its own number of tokens, and oneDNN keeps the code of 1,024 matrix
    # products: 150 MB after 100,000 rows. A forward pass uses a dozen, layer after layer.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    settings = RunConfig(use_cpu=config.use_cpu, mixed_precision=config.mixed_precision)
    with StopSignal() as stop:
        accelerator = create_accelerator(settings)
        check_world(accelerator.num_processes)
        try:
            if config.input is None:
                return _print_answers(config, accelerator, stop)
            return _PredictFiles(config, accelerator, stop).run()
        except (OutputClosed, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python would write at its exit
            return 0


def _trained(config: PredictConfig) -> tuple[dict[str, Any], list[str]]:
    """The metadata of the model, and what files may have as labels."""
    model_config = load_model_config(ModelConfig(model_name_or_path=config.model), "--model")
    metadata = saved_metadata(model_config)
    labels = map(str, (model_config.id2label or {}).values())
    return metadata, [*labels, *(metadata.get("label_codes") or ())]


def _load(config: PredictConfig, accelerator: Accelerator, stop: StopSignal) -> Predictor:
    predictor = Predictor(
        config.model,
        max_length=config.max_length,
        tokens_per_micro_batch=config.tokens_per_micro_batch,
        accelerator=accelerator,
        stop=stop,
    )
    threshold = parse_threshold(config.threshold)
    check_answer(predictor.task, config.answers, threshold)
    stored = describe_thresholds(predictor.task) if threshold is None else ""
    if stored and config.answers is not None:
        stored = "--top_k gives the most probable labels: the model's thresholds are not used."
    if stored and accelerator.is_main_process:
        print_to_stderr(stored)
    return predictor


def _print_answers(config: PredictConfig, accelerator: Accelerator, stop: StopSignal) -> int:
    """The labels of --text with their scores, and the text beside them."""
    with raise_on_all_ranks(accelerator):
        # Rows first: they cost little, and their errors come before the weights are loaded.
        records = records_from_texts(config.text or [], config.text_pair)
        check_pairs(_trained(config)[0], records.pairs is not None)
        predictor = _load(config, accelerator, stop)
    if accelerator.is_main_process:
        print_to_stderr(*predictor.truncation_notes(records))
    try:
        logits = predictor.predict_logits(records)
    except Stopped:
        return _report_stop()
    if accelerator.is_main_process:
        threshold = parse_threshold(config.threshold)
        answers = predictor.task.to_records(logits, config.answers, threshold)
        for row, answer in enumerate(answers):
            record = records[row]
            text = record.text if record.pair is None else f"{record.text} | {record.pair}"
            print(_as_text(answer, excerpt(text)), flush=True)
    return 0


def _as_text(answer: dict[str, Any], text: str) -> str:
    """One line per label with its score; the first one with the text."""
    labels = answer.get("labels", [answer])
    shown = [(printable(x["label"] or NO_LABEL), f"{x['score']:.4f}") for x in labels]
    (label, score), *others = shown or [(NO_LABEL, "")]
    return "\n".join([f"{label}\t{score}\t{text}", *map("\t".join, others)])


def _report_stop(done: str = "nothing was written; rerun the same command") -> int:
    if process_rank() == 0:
        print_error(BertdistError(f"Stopped on request: {done}."))
    return EXIT_STOPPED


class _PredictFiles:
    """`run` of --input: window by window, so that memory does not grow with the files."""

    def __init__(self, config: PredictConfig, accelerator: Accelerator, stop: StopSignal) -> None:
        self.config, self.accelerator = config, accelerator
        self.threshold = parse_threshold(config.threshold)
        found = output_format(config.output, config.output_format)
        assert found is not None  # read_predict_config has checked it
        self.format, inputs = found, config.input or []
        with raise_on_all_ranks(accelerator):
            # Rows first: they cost little, and their errors come before the weights are loaded.
            metadata, labels = _trained(config)
            if STDIN in inputs and accelerator.num_processes > 1:
                raise ConfigError("--input - is for one process; write the rows to a file first.")
            self.rows = InputRows(
                inputs,
                config,
                trained_columns(metadata),
                labels=labels,
                keep=config.keep_columns or (),
                window_rows=ROWS_PER_WINDOW * accelerator.num_processes,
                same_columns=found.kind != "jsonl",
            )
            if accelerator.is_main_process:
                print_to_stderr(*self.rows.notes)
            if self.rows.has_pair is not None:
                check_pairs(metadata, self.rows.has_pair)
            if not self.rows.is_standard_input:
                next(self.rows.windows(), None)
            self.predictor = _load(config, accelerator, stop)
        task = self.predictor.task
        is_multi_label = task.problem_type == MULTI_LABEL
        columns = AnswerColumns(is_multi_label, config.answers, task.labels)
        self.writer = create_writer(found, columns, self.rows.kept_names, self.rows.is_named)
        self.row_count, self.state = 0, dict[str, Any]()

    def run(self) -> int:
        """Returns the exit code."""
        accelerator, position = self.accelerator, None
        with contextlib.ExitStack() as stack:
            file: PartialFile | InPlaceFile | None = None
            with raise_on_all_ranks(accelerator):
                if accelerator.is_main_process:
                    file = self._open_output()
                    stack.enter_context(file)
                    print_to_stderr(*file.notes)
                    if file.saved is None:
                        file.append(self.writer.header())
            saved: Any = broadcast_from_rank0(accelerator, file and file.saved)
            if saved:
                position, self.row_count = saved["position"], saved["rows"]
                self.predictor.tokens_per_micro_batch = saved["tokens"]
                if file is not None:
                    print_to_stderr(f"Continuing after {self.row_count:,} rows.")
            to_terminal = self.config.output in (None, STDOUT) and sys.stdout.isatty()
            is_shown = file is not None and not to_terminal
            progress = stack.enter_context(ProgressBar("Predicted", "rows", is_shown))
            try:
                self._predict(self.rows.windows(position), file, progress)
            except Stopped:
                if file is not None and self.state:
                    file.save(self.state)
                if isinstance(file, PartialFile) and self.row_count:
                    done = f"{self.row_count:,} rows are done; the same command continues"
                    return _report_stop(done)
                return _report_stop()
            with raise_on_all_ranks(accelerator):
                if file is not None:
                    file.finish(self.writer.convert if self.writer.needs_conversion else None)
            if isinstance(file, PartialFile):
                print_to_stderr(f"Written: {self.config.output}, {self.row_count:,} rows.")
        return 0

    def _predict(
        self,
        windows: Iterator[InputWindow],
        file: PartialFile | InPlaceFile | None,
        progress: ProgressBar,
    ) -> None:
        answered: tuple[InputWindow, Tensor] | None = None
        while True:
            with raise_on_all_ranks(self.accelerator):
                if file is not None and answered is not None:
                    self._write(file, *answered)
                    progress.update(self.row_count, self.rows.fraction(answered[0].next))
                window = next(windows, None)
            if window is None:
                return
            if answered is None and file is not None and not self.row_count:
                print_to_stderr(*self._truncation_notes(window.records))
            answered = window, self.predictor.predict_logits(window.records)

    def _write(self, file: PartialFile | InPlaceFile, window: InputWindow, logits: Tensor) -> None:
        """In parts that depend neither on ranks nor on where an earlier process stopped."""
        for start in range(0, len(logits), ROWS_PER_WINDOW):
            stop = min(len(logits), start + ROWS_PER_WINDOW)
            answers = self.predictor.task.to_records(
                logits[start:stop], self.config.answers, self.threshold
            )
            file.append(self.writer.rows(window.slice(start, stop), list(answers)))
        self.row_count += len(logits)
        tokens = self.predictor.tokens_per_micro_batch
        self.state = {"position": window.next, "rows": self.row_count, "tokens": tokens}
        file.save(self.state, now=False)

    def _truncation_notes(self, records: Records) -> list[str]:
        is_all = len(records) < ROWS_PER_WINDOW
        name = "texts" if is_all else f"first {len(records):,} texts"
        return truncation_notes(
            {name: records}, self.predictor.tokenizer, self.predictor.max_length
        )

    def _open_output(self) -> PartialFile | InPlaceFile:
        """On rank 0. Raises CheckpointError."""
        output, is_json = self.config.output, self.format.kind == "jsonl"
        if output is None or output == STDOUT:
            to_stdout = partial(write_to_stdout, is_json=is_json)
            return InPlaceFile(to_stdout, "standard output", self.writer.needs_conversion)
        target = target_of(Path(output))
        if is_special(target):

            def write(part: bytes) -> None:
                with open_special(target) as file:
                    file.write(part)

            return InPlaceFile(write, output, self.writer.needs_conversion)
        return PartialFile(target, self._key())

    def _key(self) -> dict[str, Any]:
        """What the content of the output depends on."""
        config, accelerator = self.config, self.accelerator
        folder = Path(config.model)
        model = self.predictor.model.model.config
        settings = asdict(config)
        for name in ("input", "model", "output", "use_cpu"):
            del settings[name]
        return {
            "input": self.rows.fingerprint,
            "model": stamp_of(sorted(folder.iterdir()))
            if folder.is_dir()
            else [config.model, getattr(model, "_commit_hash", None)],
            "settings": settings,
            "device": [accelerator.device.type, str(accelerator.mixed_precision)],
            "versions": [__version__, torch.__version__, transformers_version],
        }


if __name__ == "__main__":
    run_cli(run, parsed_config)
