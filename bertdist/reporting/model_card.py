"""The model card of a run: best/README.md, which the hub shows as the page of a model.

    write_model_card(Path("out/best"))     # after a run; a card that a user has edited is kept
    text, is_edited = create_card(Path("out/best"), {"license": "mit"})
    name_model(text, "owner/name")         # as it is uploaded

It is made of the files of the run folder. It may become public: it has no text of a row, no path,
and no name of a user or a machine. Its last line is a comment with the digest of the text above it:
a card without, or with another one, was written or edited by a user.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from bertdist.core.atomic_io import (
    MODEL_CARD,
    atomic_write,
    read_json_object,
    safetensors_problem,
)
from bertdist.core.config import share_of
from bertdist.core.output_files import STATUS, is_run_folder
from bertdist.core.terminal import count_in_words, excerpt
from bertdist.tasks.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, confusions

PLACEHOLDER = "owner/name"  # of the model in a card, until it is uploaded
USER_FIELDS = ("license", "language", "base_model")  # of the metadata, which a run may not know
NO_LICENSE = "unknown"

_MARK = "<!-- Written by bertdist, which keeps an edited card. sha256 of the text above: "
_MARKED = re.compile(re.escape(_MARK) + r"([0-9a-f]{64}) -->\s*\Z")
_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?\n)---[ \t]*\r?\n", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_METRICS = {"pearson": "pearsonr", "spearman": "spearmanr"}  # ours -> of the hub
_FAMILIES = ("f1", "precision", "recall")  # f1_macro is a metric f1 of the hub
_GLUE = "nyu-mll/glue"
_IN_MEMORY = "bertdist-"  # in the path of rows that were given in Python
_MOST_NAMED = 4  # labels in the title
_MOST_FILES = 5
_FOLDED_FROM = 40  # labels whose table is closed at first
_MATRIX = 12  # labels of a confusion matrix
_CONFUSIONS = 10
_UNSURE = 0.7  # a highest probability below it
_FEW_ROWS = 20  # of a label, to score it by
_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "num_train_epochs"),
    *("max_train_steps", "train_batch_size", "max_length", "seed", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "layerwise_lr_decay", "dropout", "freeze"),
    *("label_smoothing_factor", "class_weights", "early_stopping_patience"),
    *("metric_for_best_model", "mixed_precision"),
)
_PACKAGES = ("bertdist", "torch", "transformers", "accelerate", "datasets")


def write_model_card(best: Path) -> str:
    """Write README.md into the best/ of a finished run, unless a user has written or edited it.

    Returns a sentence on what was done. Raises CheckpointError.
    """
    path = best / MODEL_CARD
    text, is_edited = create_card(best)
    if is_edited:
        return f"{path} was written or edited by hand: it is kept as it is."
    if text != _read_text(path):
        atomic_write(path, text.encode())
    return f"Model card: {path}"


def create_card(best: Path, fields: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, bool]:
    """The model card of a folder, and whether a user has written or edited it.

    fields: values of USER_FIELDS, which win over those of the present card.
    """
    before = _read_text(best / MODEL_CARD)
    if before is not None and ((best / MODEL_CARD).is_symlink() or not is_own(before)):
        return _with_fields(before, fields), True
    values = {**_user_fields(before or ""), **fields}
    run = best.parent if best.name == "best" and is_run_folder(best.parent) else None
    return _marked(_Card(best, run, values).text()), False


def is_own(text: str) -> bool:
    """Whether a card is as bertdist has written it."""
    found = _MARKED.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def name_model(text: str, name: str) -> str:
    """The card with the name of its model on the hub."""
    named = text.replace(PLACEHOLDER, name)
    return _marked(_MARKED.sub("", named)) if is_own(text) else named


def license_of(text: str) -> str:
    """The license in a card's metadata; NO_LICENSE without one."""
    return str(_metadata(text).get("license") or NO_LICENSE)


def _marked(text: str) -> str:
    text = text.rstrip("\n") + "\n\n"
    return f"{text}{_MARK}{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read_text(path: Path) -> str | None:
    """A card; None if there is none. What is not UTF-8 is a user's."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return None


def _metadata(text: str) -> dict[str, Any]:
    """The YAML at the beginning of a card; empty where there is none, or it cannot be read."""
    found = _METADATA.match(text)
    with suppress(yaml.YAMLError):
        values = yaml.safe_load(found[1]) if found else None
        return values if isinstance(values, dict) else {}
    return {}


def _user_fields(text: str) -> dict[str, Any]:
    values = _metadata(text)
    return {name: values[name] for name in USER_FIELDS if values.get(name)}


def _with_fields(text: str, fields: Mapping[str, Any]) -> str:
    """A user's card with other values in its metadata, which are changed line by line."""
    for name, value in fields.items():
        line = yaml.safe_dump({name: value})
        found = _METADATA.match(text)
        if found is None:
            text = f"---\n{line}---\n\n{text}"
            continue
        start, end = found.span(1)
        old = re.search(rf"^{name}:.*\n(?:[ \t-].*\n)*", text[start:end], re.MULTILINE)
        begin, stop = (start + old.start(), start + old.end()) if old else (end, end)
        text = text[:begin] + line + text[stop:]
    return text


# ---- What a run folder says


class _Split(NamedTuple):
    """Rows that a run was trained or scored on."""

    title: str  # Training, Validation or Test
    data: str  # what they are, in words
    rows: int | None
    report: dict[str, Any]  # evaluation.json; empty if there is none of these weights
    split: str = ""  # of a hub data set


class _Card:
    """Writes a card. run: None for a model whose run folder is not there."""

    def __init__(self, best: Path, run: Path | None, fields: Mapping[str, Any]) -> None:
        self.best, self.run, self.fields = best, run, dict(fields)
        self.model = read_json_object(best / "config.json")
        metadata = self.model.get("bertdist")
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        fitted = self.metadata.get("calibration")
        self.calibration: dict[str, Any] = fitted if isinstance(fitted, dict) else {}
        self.thresholds: dict[str, float] = self.calibration.get("thresholds") or {}
        names = self.model.get("id2label")
        names = names if isinstance(names, dict) else {}
        self.labels = [str(names[key]) for key in sorted(names, key=int)]
        self.problem_type = str(self.model.get("problem_type") or SINGLE_LABEL)
        self.settings = _read_yaml(run / "config.yaml") if run else {}
        self.environment = read_json_object(run / "environment.json") if run else {}
        status = read_json_object(run / STATUS) if run else {}
        self.is_finished = status.get("state") == "finished"
        self.dataset = self._hub_dataset()
        self.splits = list(self._find_splits()) if run else []
        given = fields.get("base_model")
        base = self.settings.get("model_name_or_path")
        self.base = given or (base if base and _is_on_hub(str(base), "model") else None)
        self.is_pair = bool(self.metadata.get("text_pair_column"))

    def text(self) -> str:
        """The card, without its mark."""
        sections = {
            "How to use": self._usage(),
            "Labels": self._labels(),
            "Scores": self._scores(),
            "Confusions": self._confusions(),
            "Probabilities": self._probabilities(),
            "Data": self._data(),
            "Limits": self._limits(),
            "Training": self._training(),
        }
        parts = [f"# {self._title()}", self._introduction()]
        for title, lines in sections.items():
            if text := "\n".join(lines).strip():
                parts += [f"## {title}", text]
        body = "\n\n".join(parts)
        return str(ModelCard(f"---\n{self._data_of_card().to_yaml()}\n---\n\n{body}\n"))

    def _data_of_card(self) -> ModelCardData:
        results = [result for split in self.splits for result in self._results(split)]
        return ModelCardData(
            language=self.fields.get("language"),
            license=self.fields.get("license", NO_LICENSE),
            library_name="transformers",
            pipeline_tag="text-classification",
            tags=["bertdist", *_tags(self.problem_type, self.is_pair)],
            base_model=self.base,
            datasets=[self.dataset] if self.dataset else None,
            metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
            model_name=PLACEHOLDER if results else None,
            eval_results=results or None,
        )

    def _results(self, split: _Split) -> Iterator[EvalResult]:
        for name, value in split.report.get("scores", {}).items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            kind = next((x for x in _FAMILIES if name.startswith(f"{x}_")), name)
            yield EvalResult(
                task_type="text-classification",
                dataset_type=self.dataset or "custom",
                dataset_name=self.dataset or _plain(split.data),
                dataset_config=self._config if self.dataset else None,
                dataset_split=split.split or split.title.lower(),
                metric_type=_METRICS.get(kind, kind),
                metric_name=name,
                metric_value=float(f"{value:.6g}"),
            )

    # -- Data

    def _hub_dataset(self) -> str | None:
        name = self.settings.get("dataset_name")
        if name is None and self.settings.get("task_name"):
            return _GLUE
        if name is None:
            names = {_of_hf_url(file) for file in self._files("train_file")}
            return names.pop() if len(names) == 1 else None
        return str(name) if _is_on_hub(str(name), "dataset") else None

    @property
    def _config(self) -> str | None:
        given = self.settings.get("dataset_config_name") or self.settings.get("task_name")
        return str(given) if given else None

    def _files(self, name: str) -> list[str]:
        given = self.settings.get(name) or []
        return [str(file) for file in (given if isinstance(given, list) else [given])]

    def _find_splits(self) -> Iterator[_Split]:
        assert self.run is not None
        signature = _newest_signature(self.run)
        reports = {
            "Validation": _own_report(self.run / "evaluation.json", self.metadata),
            "Test": _own_report(self.run / "test_evaluation.json", self.metadata),
        }
        counts = {
            "Training": signature.get("training_rows"),
            "Validation": signature.get("validation_rows"),
            "Test": reports["Test"].get("rows"),
        }
        for title, count in counts.items():
            report = reports.get(title, {})
            rows = re.match(r"(\d+) rows", str(count))
            if title != "Training" and not (rows or report):
                continue
            words, split = self._describe_rows(title)
            yield _Split(title, words, int(rows[1]) if rows else None, report, split)

    def _describe_rows(self, title: str) -> tuple[str, str]:
        """Where the rows of a split are from, in words, and the name of a split of the hub."""
        kind = {"Training": "train", "Validation": "validation", "Test": "test"}[title]
        share = self.settings.get(f"{kind}_split")
        name = self.settings.get("dataset_name") or self.settings.get("task_name")
        if name and not self.settings.get("train_file"):
            usual = "validation_matched" if name == "mnli" else kind
            split = str(share or usual)
            source = self.dataset or Path(str(name)).name
            parts = [source, *filter(None, [self._config])]
            return f"{_code('/'.join(parts))}, split {_code(split)}", split
        if files := self._files(f"{kind}_file"):
            return _file_names(files), ""
        part = share_of(str(share)) if share is not None else None
        words = f"{part:.3g} of the rows of " if part is not None else "rows of "
        held_out = ", held out from training" if kind != "train" else ""
        return f"{words}{_file_names(self._files('train_file'))}{held_out}", ""

    def _data(self) -> Iterator[str]:
        if not self.splits:
            return
        yield "| rows | number | from |"
        yield "|---|---:|---|"
        for split in self.splits:
            number = f"{split.rows:,}" if split.rows is not None else "a stream"
            yield f"| {split.title} | {number} | {split.data} |"
        yield ""
        columns = self.metadata.get("text_column")
        columns = columns if isinstance(columns, list) else [columns] if columns else []
        if columns:
            pair = self.metadata.get("text_pair_column")
            second = f", second text in {_code(str(pair))}" if pair else ""
            yield f"Text in {' and '.join(_code(str(x)) for x in columns)}{second}."
        if self.is_finished and not any(split.title == "Validation" for split in self.splits):
            yield "There were no validation rows: these are the weights after the last step."

    # -- Sections

    def _title(self) -> str:
        what = "text pairs" if self.is_pair else "texts"
        if self.problem_type == REGRESSION:
            return f"Regression of {what}: {', '.join(map(_escaped, self.labels))}"
        kind = "Multi-label classifier" if self.problem_type == MULTI_LABEL else "Classifier"
        labels = f"{len(self.labels):,} labels"
        if len(self.labels) <= _MOST_NAMED:
            labels = " or ".join(map(_escaped, self.labels))
        return f"{kind} of {what}: {labels}"

    def _introduction(self) -> str:
        base = "a model in a local folder"
        if self.base:
            names = self.base if isinstance(self.base, list) else [self.base]
            base = ", ".join(f"[{_escaped(x)}](https://huggingface.co/{x})" for x in names)
        what = "pair of texts" if self.is_pair else "text"
        gives = {
            SINGLE_LABEL: f"gives each {what} one of {len(self.labels):,} labels",
            MULTI_LABEL: f"gives each {what} any number of {len(self.labels):,} labels",
            REGRESSION: f"gives each {what} a number, {', '.join(map(_code, self.labels))}",
        }[self.problem_type]
        size = ""
        if number := _count_parameters(self.best):
            size = f", {count_in_words(number)} parameters"
        kind = _escaped(str(self.model.get("model_type", "")))
        origin = f" from {base}" if self.run or self.base else ""
        return f"This model ({kind}{size}) {gives}. It was fine-tuned{origin} with bertdist."

    def _labels(self) -> Iterator[str]:
        if self.problem_type == REGRESSION:
            return
        scored = [split for split in self.splits if split.report.get("per_class")][-1:]
        classes: list[dict[str, Any]] = scored[0].report["per_class"] if scored else []
        by_label = {str(entry.get("label")): entry for entry in classes}
        names = [name for name in (classes[0] if classes else {}) if name != "label"]
        names.sort(key=lambda name: name != "rows")
        if scored:
            yield f"Scores and rows are those of the {scored[0].title.lower()} rows."
            yield ""
        if fold := len(self.labels) >= _FOLDED_FROM:
            yield f"<details><summary>All {len(self.labels):,} labels</summary>"
            yield ""
        yield _row(["id", "label", *map(_escaped, names)])
        yield _row(["---:", "---", *("---:" for _ in names)])
        for number, label in enumerate(self.labels):
            entry = by_label.get(label, {})
            yield _row([str(number), _code(label), *(_number(entry.get(x)) for x in names)])
        if fold:
            yield ""
            yield "</details>"

    def _scores(self) -> Iterator[str]:
        scored = [split for split in self.splits if split.report.get("scores")]
        if not scored:
            return
        header, line = ["score"], ["---"]
        for split in scored:
            header += [split.title.lower(), "95% interval"]
            line += ["---:", "---:"]
        yield _row(header)
        yield _row(line)
        names = dict.fromkeys(name for split in scored for name in split.report["scores"])
        for name in names:
            cells = [_code(name)]
            for split in scored:
                ends = (split.report.get("intervals") or {}).get(name)
                interval = " to ".join(map(_number, ends)) if ends else ""
                cells += [_number(split.report["scores"].get(name)), interval]
            if not all(
                isinstance(x, list | dict) for x in (s.report["scores"].get(name) for s in scored)
            ):
                yield _row(cells)
        yield ""
        rows = " and ".join(
            f"{split.rows:,} {split.title.lower()} rows" if split.rows else split.title.lower()
            for split in scored
        )
        steps = f" Weights after step {self.metadata['step']:,}." if "step" in self.metadata else ""
        yield f"On {rows}; the intervals are of a bootstrap over the rows.{steps}"

    def _confusions(self) -> Iterator[str]:
        scored = [split for split in self.splits if confusions(split.report)][-1:]
        if not scored:
            return
        report, title = scored[0].report, scored[0].title.lower()
        matrix = report.get("confusion")
        if matrix and len(self.labels) <= _MATRIX:
            yield f"Number of {title} rows; lines are true labels, columns predicted ones."
            yield ""
            yield _row(["", *map(_code, self.labels)])
            yield _row(["---", *("---:" for _ in self.labels)])
            for label, counts in zip(self.labels, matrix, strict=True):
                yield _row([_code(label), *(f"{count:,}" for count in counts)])
            yield ""
        if len(self.labels) > 2:
            found = confusions(report)[:_CONFUSIONS]
            yield f"The most frequent wrong answers, in {title} rows:"
            yield ""
            yield _row(["true label", "predicted", "rows"])
            yield _row(["---", "---", "---:"])
            for entry in found:
                yield _row([_code(entry["label"]), _code(entry["predicted"]), f"{entry['rows']:,}"])

    def _usage(self) -> Iterator[str]:
        one, two = "A text to classify.", "Its second text."
        text = f'{{"text": "{one}", "text_pair": "{two}"}}' if self.is_pair else f'"{one}"'
        options, after = self._pipeline_answer()
        yield f"`{PLACEHOLDER}` is its name on the hub; the folder of these files will do too."
        yield from (
            "",
            "```python",
            "from transformers import pipeline",
            "",
            f'classifier = pipeline("text-classification", model="{PLACEHOLDER}"{options})',
            f"texts = [{text}]",
            "answer = classifier(texts, truncation=True)[0]",
            *after,
            "```",
            "",
            "With bertdist, whose answers do not depend on padding:",
            "",
            "```python",
            "import bertdist",
            "",
            f'predictor = bertdist.Predictor("{PLACEHOLDER}")',
            f'print(predictor(["{one}"]' + f', ["{two}"]' * self.is_pair + "))",
            "```",
            "",
            "```bash",
            f'bertdist predict --model {PLACEHOLDER} --text "{one}"'
            + f' --text_pair "{two}"' * self.is_pair,
            "```",
        )

    def _pipeline_answer(self) -> tuple[str, list[str]]:
        """Further arguments of `pipeline`, and the lines that show its answer."""
        stored = 'classifier.model.config.bertdist["calibration"]["thresholds"]'
        if self.problem_type == REGRESSION:
            return ', function_to_apply="none"', ['print(answer["score"])  # the number']
        if self.problem_type == MULTI_LABEL:
            options, limit = ', top_k=None, function_to_apply="sigmoid"', "0.5"
            lines = []
            if self.thresholds:
                lines, limit = [f"thresholds = {stored}"], 'thresholds[x["label"]]'
            answer = f'print([x["label"] for x in answer if x["score"] > {limit}])'
            return options, [*lines, answer]
        if not self.thresholds:
            return "", ['print(answer)  # {"label": ..., "score": ...}']
        return ", top_k=None", [
            f"((label, threshold),) = {stored}.items()",
            'scores = {x["label"]: x["score"] for x in answer}',
            "(other,) = scores.keys() - {label}",
            "print(label if scores[label] > threshold else other)",
        ]

    def _probabilities(self) -> Iterator[str]:
        """What --calibrate and --tune_thresholds have fitted."""
        before, after = (self.calibration.get(x) for x in ("before", "after"))
        if self.calibration.get("temperature") is not None:
            changes = ""
            if isinstance(before, dict) and isinstance(after, dict):
                names = {"nll": "negative log-likelihood", "ece": "expected calibration error"}
                changes = "".join(
                    f", {name} {_number(before.get(x))} before and {_number(after.get(x))} after"
                    for x, name in names.items()
                )
            yield (
                f"A temperature of {self.calibration['temperature']:.3g} is folded into the output "
                f"layer; it was fitted on validation rows{changes}."
            )
        if self.thresholds:
            yield ""
            yield (
                "A label is given where its probability is above its threshold. The thresholds are "
                f"those of the highest {_escaped(str(self.calibration.get('threshold_for')))} on "
                "validation rows."
            )
            yield ""
            yield "| label | threshold |"
            yield "|---|---:|"
            for label, threshold in self.thresholds.items():
                yield _row([_code(str(label)), _number(float(threshold))])

    def _limits(self) -> Iterator[str]:
        length = self.metadata.get("max_length")
        if self.run and not self.is_finished:
            yield "- The training had not finished."
        if length:
            yield f"- Texts are cut after {length:,} tokens: what follows has no influence."
        if not self.fields.get("language"):
            yield "- The language of the training texts is not recorded."
        if self.problem_type == SINGLE_LABEL:
            yield "- Every text gets one of the labels, also one that fits none of them."
        if any(split.title == "Validation" and split.report for split in self.splits):
            yield (
                "- The weights were chosen by the validation rows, so scores on them may be "
                "slightly too high."
            )
        yield from self._unsure()
        for split in self.splits[-1:]:
            few = [x for x in split.report.get("per_class", []) if x.get("rows", 0) < _FEW_ROWS]
            if few:
                yield (
                    f"- {len(few):,} of {len(self.labels):,} labels have fewer than {_FEW_ROWS} "
                    f"{split.title.lower()} rows: their own scores are uncertain."
                )
            if note := split.report.get("note"):
                yield f"- {_escaped(str(note))}"
            if (threshold := split.report.get("suggested_threshold")) is not None:
                yield (
                    f"- No {split.title.lower()} row gets a label: every probability is below 0.5. "
                    f"With a threshold of {threshold:.3g} there are as many labels as in the truth."
                )

    def _unsure(self) -> Iterator[str]:
        """How often the rows are right that the model is unsure of."""
        for title, name in (
            ("Test", "test_predictions.jsonl"),
            ("Validation", "predictions.jsonl"),
        ):
            split = next((x for x in self.splits if x.title == title and x.report), None)
            if self.run is None or split is None or self.problem_type != SINGLE_LABEL:
                continue
            sure, unsure = _count_answers(self.run / name)
            if unsure.rows:
                others = f", and {sure.share} of the others" if sure.rows else ""
                yield (
                    f"- Its highest probability is below {_UNSURE:g} for {unsure.rows:,} of "
                    f"{unsure.rows + sure.rows:,} {title.lower()} rows; {unsure.share} of these "
                    f"answers are right{others}."
                )
            return

    def _training(self) -> Iterator[str]:
        shown = {name: self.settings.get(name) for name in _SETTINGS}
        shown = {name: value for name, value in shown.items() if value is not None}
        if self.settings.get("max_train_steps") is not None:
            shown.pop("num_train_epochs", None)
        precision = self.environment.get("mixed_precision")
        if shown and precision is not None:
            shown["mixed_precision"] = precision
        if not shown:
            return
        yield "| setting | value |"
        yield "|---|---|"
        for name, value in shown.items():
            values = value if isinstance(value, list) else [value]
            yield _row([_code(name), _escaped(" ".join(map(str, values)))])
        packages = self.environment.get("packages")
        packages = packages if isinstance(packages, dict) else {}
        if found := [f"{x} {packages[x]}" for x in _PACKAGES if packages.get(x)]:
            yield ""
            yield _escaped(f"{', '.join(found)}.")


class _Answers(NamedTuple):
    rows: int = 0
    right: int = 0

    @property
    def share(self) -> str:
        return f"{self.right / self.rows:.0%}"


def _count_answers(file: Path) -> tuple[_Answers, _Answers]:
    """Rows of predictions.jsonl whose label has a probability of at least _UNSURE, and others."""
    counts = {True: [0, 0], False: [0, 0]}
    with suppress(OSError, ValueError, KeyError, TypeError), open(file, "rb") as lines:
        for line in lines:
            entry = json.loads(line)
            count = counts[entry["score"] >= _UNSURE]
            count[0] += 1
            count[1] += entry["label"] == entry["truth"]
    return _Answers(*counts[True]), _Answers(*counts[False])


def _tags(problem_type: str, is_pair: bool) -> Iterator[str]:
    if problem_type != SINGLE_LABEL:
        yield problem_type.replace("_classification", "").replace("_", "-")
    if is_pair:
        yield "text-pair-classification"


def _own_report(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """evaluation.json; empty where it is not of the weights of best/."""
    report = read_json_object(file)
    return report if report.get("step") == metadata.get("step") else {}


def _newest_signature(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the rows."""
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        state = read_json_object(folder / "state.json")
        parts = [state.get(name) for name in ("must_match", "may_change")]
        if all(isinstance(part, dict) for part in parts):
            return {name: value for part in parts for name, value in part.items()}  # type: ignore[union-attr]
    return {}


def _read_yaml(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def _is_on_hub(name: str, kind: str) -> bool:
    """Whether the loader took it from the hub: it is in the cache, and is no path here.

    What cannot be decided is taken for a path, which a card must not name.
    """
    if not _HUB_ID.fullmatch(name) or Path(name).exists():
        return False
    folder = f"{kind}s--{name.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE, folder).is_dir()


def _of_hf_url(file: str) -> str | None:
    """`hf://datasets/owner/name/train.csv` -> `owner/name`."""
    found = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)", file)
    return found[1] if found else None


def _file_names(files: Sequence[str]) -> str:
    """The names of files, without folders, hosts and buckets."""
    names = []
    for file in files[:_MOST_FILES]:
        path = urlsplit(file).path if "://" in file else file
        name = _of_hf_url(file) or Path(path.rstrip("/")).name
        names.append("rows given in Python" if _IN_MEMORY in file else _code(name))
    more = f" and {len(files) - _MOST_FILES:,} more" if len(files) > _MOST_FILES else ""
    return f"{', '.join(names)}{more}"


def _count_parameters(folder: Path) -> int:
    """By the headers of its .safetensors; 0 if they cannot be read."""
    number = 0
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        for file in folder.glob("*.safetensors"):
            if safetensors_problem(file):
                return 0
            with open(file, "rb") as content:
                (size,) = struct.unpack("<Q", content.read(8))
                header = json.loads(content.read(size))
            header.pop("__metadata__", None)
            number += sum(math.prod(entry["shape"]) for entry in header.values())
    return number


# ---- Markdown


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else ""


def _code(text: str) -> str:
    """A text of a user as code, also in a table."""
    shown = excerpt(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", "\\|")


def _escaped(text: str) -> str:
    """A text of a user as text of a line."""
    return re.sub(r"([\\`*_\[\]<>|~&#!$])", r"\\\1", excerpt(text, 1000))


def _plain(text: str) -> str:
    return text.replace("`", "")
