"""Export a trained classifier: to ONNX, also in int8, or to weights of half the size.

    python -m bertdist.export --model out
    python -m bertdist.export --model out --int8 --input dev.tsv --output_dir exported_int8

The exported folder is compared with the model on validation texts before it is kept: what is not
the same (float32), or loses too much of the score (int8, bf16), leaves nothing behind.
"""

import os
import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder
        # above.
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from bertdist.core.args import parse_or_exit
    from bertdist.models.export_config import check_export, read_export_config

    # Before torch is imported, which takes seconds
    parsed_config = parse_or_exit(read_export_config, check_export)

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from bertdist import __version__
from bertdist.core.args import read_config
from bertdist.core.atomic_io import to_json, write_folder
from bertdist.core.config import ModelConfig, RunConfig, TaskConfig, TrainConfig, share_of
from bertdist.core.errors import BertdistError, ConfigError, ModelError, NoLabelsError
from bertdist.core.output_files import EXPORT_REPORT
from bertdist.core.terminal import ProgressBar, byte_size, print_to_stderr, show
from bertdist.core.types import Array
from bertdist.data.batch import collate
from bertdist.data.in_memory import records_from_texts
from bertdist.data.load_data import load_records, load_splits, load_texts
from bertdist.data.records import Records
from bertdist.data.tokenization import Example, create_dataset, save_tokenizer
from bertdist.data.trained_columns import trained_columns
from bertdist.distributed.launch import create_accelerator, run_cli
from bertdist.eval import load_labelled_rows, name_labels
from bertdist.models.classifier import (
    load_model_config,
    quiet_transformers,
    saved_metadata,
    trained_task,
)
from bertdist.models.export_config import ExportConfig, has_rows, rows_to_evaluate
from bertdist.models.onnx import (
    ONNX_FILE,
    OnnxClassifier,
    export_onnx,
    load_plain,
    quantize,
    save_settings,
)
from bertdist.predict import Predictor
from bertdist.tasks.labels import REGRESSION
from bertdist.tasks.tasks import Task
from bertdist.training.evaluation import Evaluation, Scorer

TOLERANCE = 1e-4  # of a probability, in float32; of numbers times the largest of them
LEAST_EQUAL = 0.9  # share of equal answers in int8 and bf16, where there are no labels
LONGEST_PROBE = 2048  # tokens
CLOSE = 0.05  # numbers are equal answers up to this share of their range
WORDS = "a film that is not as good as the book, but well worth an evening".split()


class Rows(NamedTuple):
    """What is compared."""

    name: str  # `872 rows of dev.tsv`
    records: Records  # the rows, or built-in texts
    task: Task  # with the labels as the rows have them
    targets: Array | None  # None where labels are not known
    scorer: Scorer | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Answers of the exported folder beside those of the model."""

    largest: float  # difference of a probability, of regression of a number
    where: str  # the text of the largest difference
    equal: float  # share of equal answers
    before: Evaluation | None = None
    after: Evaluation | None = None

    @property
    def loss(self) -> float:
        """How much lower the score is; NaN where it is not known."""
        if self.before is None or self.after is None:
            return math.nan
        return self.before.selection_score - self.after.selection_score


class Reference:
    """The answers of the float32 model to the rows, to built-in texts and to short and long token
    sequences.
    """

    def __init__(self, config: ExportConfig, rows: Rows, predictor: Predictor) -> None:
        self.config, self.rows, self.task = config, rows, rows.task
        self.tokenizer, self.max_length = predictor.tokenizer, predictor.max_length
        self.texts = built_in_texts(rows.records.pairs is not None)
        model = predictor.model
        if config.to == "onnx" and model.padding_changes_logits:
            raise ModelError(
                f"--model {config.model}: padding changes the answers of models of type "
                f"{model.model.config.model_type!r}, and an exported graph needs padding."
            )
        self.probes = model.probes((1, 2, 7, min(self.max_length, LONGEST_PROBE)))
        with torch.no_grad():
            self.of_probes = torch.cat([model(collate([probe])).cpu() for probe in self.probes])
        self.of_texts = predictor.predict_logits(self.texts)
        with ProgressBar("Predicted", "rows", True) as progress:
            number = len(rows.records)
            self.of_rows = predictor.predict_logits(
                rows.records, lambda done: progress.update(min(done, number), done / number)
            )
        self.scores = self._score(self.of_rows)

    def _score(self, logits: Tensor) -> Evaluation | None:
        scorer, targets = self.rows.scorer, self.rows.targets
        return None if scorer is None or targets is None else scorer.score(logits, targets)

    def compare(
        self,
        logits: Callable[[Records, Callable[[int], None]], Tensor],
        of_examples: Callable[[Sequence[Example]], Tensor] | None,
    ) -> Comparison:
        """logits: of records. of_examples: of token ids, padded to one length.

        Raises ModelError.
        """
        records = self.rows.records
        parts: list[tuple[Tensor, Tensor, Callable[[int], str]]] = []
        with ProgressBar("Compared", "rows", True) as progress:
            of_rows = logits(records, lambda done: progress.update(done, done / len(records)))
        parts.append((of_rows, self.of_rows, lambda i: str(records.location(i))))
        of_texts = logits(self.texts, lambda done: None)
        parts.append((of_texts, self.of_texts, lambda i: f"built-in text {i + 1}"))
        if of_examples is not None:
            names = [f"a text of {len(probe.ids)} tokens" for probe in self.probes]
            alone = torch.cat([of_examples([probe]) for probe in self.probes])
            padded = of_examples(self.probes)
            parts.append((alone, self.of_probes, lambda i: names[i]))
            parts.append((padded, self.of_probes, lambda i: f"{names[i]}, padded"))
        largest, where = 0.0, ""
        for found, expected, name in parts:
            differences = self._differences(found, expected)
            worst = int(differences.argmax())
            if not differences[worst] <= largest:
                largest, where = float(differences[worst]), name(worst)
        return Comparison(
            largest=largest,
            where=where,
            equal=self._equal(of_rows),
            before=self.scores,
            after=self._score(of_rows),
        )

    def _differences(self, found: Tensor, expected: Tensor) -> Array:
        """(texts,): the largest difference of each; inf for what is not finite."""
        if found.shape != expected.shape:
            raise ModelError(
                f"The exported graph gives logits of shape {tuple(found.shape)}; expected "
                f"{tuple(expected.shape)}."
            )
        one, other = (self.task.predict(logits)[1] for logits in (found, expected))
        differences: Array = np.abs(one.astype(np.float64) - other).max(1)
        return np.nan_to_num(differences, nan=math.inf)

    def _equal(self, found: Tensor) -> float:
        (one, _), (other, _) = map(self.task.predict, (found, self.of_rows))
        if self.task.problem_type == REGRESSION:
            return float((np.abs(one - other) <= CLOSE * max(np.ptp(other), 1e-9)).mean())
        return float((one == other).mean())

    @property
    def tolerance(self) -> float:
        """Of float32."""
        if self.task.problem_type != REGRESSION:
            return TOLERANCE
        return TOLERANCE * max(1.0, float(self.of_rows.abs().max()))


def built_in_texts(pairs: bool) -> Records:
    """Texts of all lengths and scripts, for a run without validation rows, and beside them."""
    texts = [
        "",
        "a",
        "A film to remember.",
        "  two   spaces,\ta tab\nand a line end  ",
        "Größe, naïveté, 日本語の文章, русский текст, עברית, 😀!",
        "http://example.com/?q=1&r=2 user@example.com #tag 3.14 $5",
        *(" ".join(WORDS * 99)[: 6 * length] for length in (4, 9, 17, 40, 90, 5000)),
    ]
    return records_from_texts(texts, texts[::-1] if pairs else None)


# ---- The rows


def find_rows(config: ExportConfig) -> tuple[Rows, list[str]]:
    """The rows of the flags, else those that the run was evaluated on, else built-in texts; and
    notes. Raises BertdistError.
    """
    model_config = load_model_config(ModelConfig(model_name_or_path=config.model), "--model")
    task = trained_task(model_config, f"--model {config.model}")
    metadata = saved_metadata(model_config)
    if not has_rows(config):
        return _rows_of_run(config, task, metadata)
    evaluate = rows_to_evaluate(config)
    try:
        task, records, notes = load_labelled_rows(evaluate)
    except NoLabelsError:
        if config.input is None:
            raise
        labels = [*task.labels, *(metadata.get("label_codes") or ())]
        records = load_texts(config.input, config, trained_columns(metadata), labels)
        records = records.slice(0, min(len(records), config.max_eval_samples))
        return Rows(_in_words(records), records, task, None, None), [
            f"{records.name} has no labels: answers are compared, and no scores."
        ]
    targets = _targets(records, task)
    scorer = Scorer(TaskConfig(), task, config.task_name)
    return Rows(_in_words(records), records, task, targets, scorer), notes


def _rows_of_run(
    config: ExportConfig, task: Task, metadata: dict[str, Any]
) -> tuple[Rows, list[str]]:
    """The validation rows of the run whose best/ is exported, if they are what they were."""
    texts = built_in_texts(metadata.get("text_pair_column") is not None)
    built_in = Rows(f"{len(texts)} built-in texts", texts, task, None, None)
    folder = Path(config.model).expanduser()
    settings = folder.parent / "config.yaml"
    how = "built-in texts are compared; --input names rows of yours"
    if folder.name != "best" or not settings.is_file():
        return built_in, [f"There are no validation rows beside the model: {how}."]
    try:
        run = read_config(["--config", str(settings)])
        records = _validation_rows(run, task, config.max_eval_samples)
        if records is None:
            return built_in, [f"The run had no validation rows: {how}."]
        task, records, _ = name_labels(task, records)
        targets = _targets(records, task)
        truth = _truth_of_run(folder.parent / "predictions.jsonl", len(targets), task)
        if truth is None or not np.array_equal(truth, targets):
            return built_in, [
                f"The rows of {records.name} are not those that the run was evaluated on: {how}."
            ]
        scorer = Scorer(run.task, task, run.data.task_name)
    except BertdistError as error:
        reason = str(error).splitlines()[0]
        return built_in, [f"The run's validation rows cannot be read ({reason}): {how}."]
    return Rows(_in_words(records), records, task, targets, scorer), []


def _validation_rows(run: TrainConfig, task: Task, most: int) -> Records | None:
    data = run.data
    most = min(most, data.max_eval_samples or most)
    data = replace(data, max_eval_samples=most)
    if share_of(data.validation_split) is not None:  # held out of the training rows
        return load_splits(replace(run, data=data)).validation
    return load_records(data, "validation", task.problem_type == REGRESSION)


def _targets(records: Records, task: Task) -> Array:
    # no text is tokenized before it is asked for
    return create_dataset(records, None, task, 0).targets  # type: ignore[arg-type]


def _truth_of_run(predictions: Path, rows: int, task: Task) -> Array | None:
    """The targets of the first rows, as the run has written them; None if there are not so many."""
    targets = []
    try:
        with predictions.open(encoding="utf-8") as file:
            for line, _ in zip(file, range(rows), strict=False):
                truth = json.loads(line)["truth"]
                value = tuple(truth) if isinstance(truth, list) else str(truth)
                targets.append(task.encode_label(value))
    except (OSError, ValueError, LookupError, TypeError, BertdistError):
        return None
    table = np.array(targets)
    return table if table.dtype.kind == "i" else table.astype(np.float32)


def _in_words(records: Records) -> str:
    return f"{len(records):,} rows of {records.name}"


# ---- The export


def export(config: ExportConfig) -> dict[str, Any]:
    """Write --output_dir; what is in its export.json. Raises BertdistError."""
    accelerator = create_accelerator(RunConfig(use_cpu=True, mixed_precision="no"))
    rows, notes = find_rows(config)
    print_to_stderr(*notes)
    predictor = Predictor(config.model, max_length=config.max_length, accelerator=accelerator)
    weights = sum(weight.numel() for weight in predictor.model.parameters())
    folder, size = Path(config.output_dir), _bytes_needed(config, weights)
    _check_space(folder, size)
    reference = Reference(config, rows, predictor)
    del predictor  # its memory is needed
    found: dict[str, Any] = {}

    def fill(partial: Path) -> None:
        found.update(_fill(config, reference, partial))
        (partial / EXPORT_REPORT).write_bytes(to_json(found, indent=1))

    write_folder(folder, fill, size)
    return found


def _bytes_needed(config: ExportConfig, weights: int) -> int:
    if config.to != "onnx":
        return 2 * weights
    return 4 * weights + 2 * weights * config.int8  # the graph in float32 is there meanwhile


def _check_space(folder: Path, size: int) -> None:
    parent = next(x for x in folder.absolute().parents if x.exists())
    if (free := shutil.disk_usage(parent).free) < size:
        raise ConfigError(
            f"--output_dir {folder}: the export needs about {byte_size(size)}, and "
            f"{byte_size(free)} are free."
        )


def _fill(config: ExportConfig, reference: Reference, folder: Path) -> dict[str, Any]:
    if config.to == "onnx":
        kind, comparison = _fill_onnx(config, reference, folder)
    else:
        kind, comparison = "bf16", _fill_bf16(config, reference, folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return _report(config, reference, kind, comparison, files)


def _fill_onnx(config: ExportConfig, reference: Reference, folder: Path) -> tuple[str, Comparison]:
    tokenizer, max_length = reference.tokenizer, reference.max_length
    inputs = export_onnx(config.model, folder / ONNX_FILE)
    save_settings(config.model, tokenizer, folder, max_length, inputs)
    if not (folder / "tokenizer.json").exists():
        print_to_stderr(
            "This tokenizer has no tokenizer.json: the exported folder needs transformers."
        )
    exported = OnnxClassifier(folder, tokenizer, max_length)
    comparison = reference.compare(exported.logits, exported.of_examples)
    if not comparison.largest <= reference.tolerance:
        raise ModelError(
            f"The exported graph is not the model: {_what(reference)} of {comparison.where} "
            f"differs by {comparison.largest:.2g}, more than {reference.tolerance:.0e}; nothing "
            "was kept."
        )
    if not config.int8:
        return "float32", comparison
    aside = folder / "float32"
    aside.mkdir()
    for path in folder.glob(f"{ONNX_FILE}*"):
        path.rename(aside / path.name)
    del exported
    quantize(aside / ONNX_FILE, folder / ONNX_FILE)
    shutil.rmtree(aside)
    exported = OnnxClassifier(folder, tokenizer, max_length)
    comparison = reference.compare(exported.logits, exported.of_examples)
    _check_loss(config, reference, comparison)
    return "int8", comparison


def _fill_bf16(config: ExportConfig, reference: Reference, folder: Path) -> Comparison:
    with quiet_transformers():
        load_plain(config.model, torch.bfloat16).save_pretrained(folder)
    tokenizer, max_length = reference.tokenizer, reference.max_length
    save_tokenizer(tokenizer, folder, max_length, "token_type_ids" in tokenizer.model_input_names)
    accelerator = create_accelerator(RunConfig(use_cpu=True, mixed_precision="no"))
    exported = Predictor(folder, max_length=max_length, accelerator=accelerator)
    comparison = reference.compare(exported.predict_logits, None)
    _check_loss(config, reference, comparison)
    return comparison


def _what(reference: Reference) -> str:
    return "the number" if reference.task.problem_type == REGRESSION else "a probability"


def _check_loss(config: ExportConfig, reference: Reference, comparison: Comparison) -> None:
    """Raise ModelError for an export that loses too much."""
    kind = "int8" if config.int8 else "bf16"
    before, after, loss = comparison.before, comparison.after, comparison.loss
    if before is None or after is None or math.isnan(loss):
        if not comparison.equal >= LEAST_EQUAL:
            raise ModelError(
                f"{kind} changes {1 - comparison.equal:.1%} of the answers to "
                f"{reference.rows.name}, more than {1 - LEAST_EQUAL:.0%}: nothing was kept. "
                "--input with labelled rows shows what it costs."
            )
    elif loss > config.max_score_loss:
        name = before.selected
        raise ModelError(
            f"{kind} changes {name} from {before.scores[name]:.4f} to {after.scores[name]:.4f} on "
            f"{reference.rows.name}, by more than --max_score_loss {config.max_score_loss:g}: "
            "nothing was kept. Allow more with that flag, or compare on more rows (--input, "
            "--max_eval_samples)."
        )


def _report(
    config: ExportConfig,
    reference: Reference,
    kind: str,
    comparison: Comparison,
    files: dict[str, int],
) -> dict[str, Any]:
    scores = {
        name: evaluation.scores if evaluation is not None else None
        for name, evaluation in (("before", comparison.before), ("after", comparison.after))
    }
    return {
        "exported": kind,
        "model": config.model,
        "max_length": reference.max_length,
        "files": files,
        "compared": {
            "on": reference.rows.name,
            "data": reference.rows.records.name,
            "rows": len(reference.rows.records),
            "numbers": reference.task.problem_type == REGRESSION,
            "largest_difference": comparison.largest,
            "equal_answers": comparison.equal,
            "scores": scores,
        },
        "versions": {
            "bertdist": __version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
    }


def run(config: ExportConfig) -> int:
    """Export, and say what was written and how it compares; returns the exit code."""
    _show(export(config), config)
    return 0


def _show(report: dict[str, Any], config: ExportConfig) -> None:
    compared, kind = report["compared"], report["exported"]
    files = report["files"]
    size = byte_size(sum(size for name, size in files.items() if name.startswith("model")))
    main = ONNX_FILE if ONNX_FILE in files else "model.safetensors"
    show(f"Written: {Path(config.output_dir) / main} ({kind}, {size}), config.json, tokenizer.")
    what = "number" if compared["numbers"] else "probability"
    lines = [
        f"Compared with the float32 model on {compared['on']}: "
        f"largest difference of a {what} {compared['largest_difference']:.1e}, "
        f"{compared['equal_answers']:.2%} of the answers equal."
    ]
    before, after = (compared["scores"][when] for when in ("before", "after"))
    for name in before or ():
        lines.append(f"{name} {before[name]:.4f} before, {after[name]:.4f} after.")
    show(*lines)


if __name__ == "__main__":
    run_cli(run, parsed_config)
