"""A finished run's folder, made by hand: the files that a model card and an upload read.

best = make_run(folder / "out", model)                   # two labels
best = make_run(folder / "out", model, "regression", pairs=True)

model: a folder that `from_pretrained` loads; its encoder and tokenizer are those of best/.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from bertdist.core.atomic_io import write_folder

TWO = ("bad", "good")
SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux-of-anna",
    "packages": {"bertdist": "0.2.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "device": "cpu",
    "mixed_precision": "no",
    "command": ["/home/anna/bertdist/train.py", "--output_dir", "/home/anna/out"],
}
SETTINGS = {
    "model_name_or_path": "/home/anna/models/bert",
    "train_file": ["/home/anna/data/reviews.csv"],
    "validation_file": "s3://annas-bucket/dev.csv",
    "output_dir": "/home/anna/out",
    "learning_rate": 3e-5,
    "train_batch_size": 16,
    "max_length": 64,
    "num_train_epochs": 3.0,
    "seed": 7,
}


def evaluation_of(labels: tuple[str, ...], problem_type: str, step: int = 20) -> dict[str, Any]:
    """An evaluation.json: of each label 30 rows, one of which is taken for the next label."""
    if problem_type == REGRESSION:
        scores = {"loss": 0.5, "pearson": 0.75}
        return {"step": step, "scores": scores, "intervals": {"loss": [0.4, 0.6], "pearson": None}}
    classes = [
        {"label": label, "precision": 0.75, "recall": 0.5, "f1": 0.6, "rows": 30}
        for label in labels
    ]
    scores = {"loss": 0.25, "accuracy": 0.9, "f1_macro": 0.875}
    intervals = {"loss": [0.2, 0.3], "accuracy": [0.85, 0.95], "f1_macro": [0.8, 0.9]}
    report = {"step": step, "scores": scores, "intervals": intervals, "labels": list(labels)}
    report["per_class"] = classes
    if problem_type == SINGLE:
        size = len(labels)
        report["confusion"] = [
            [29 if i == j else int(j == (i + 1) % size) for j in range(size)] for i in range(size)
        ]
    return report


def make_run(
    out: Path,
    model: Path | None = None,
    problem_type: str = SINGLE,
    labels: tuple[str, ...] = TWO,
    *,
    pairs: bool = False,
    evaluation: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a run folder; returns its best/. model: None for weights that nothing loads.

    evaluation: {} for a run without validation rows. calibration: of config.json. settings: of
    config.yaml.
    """
    (out / "checkpoints" / "step_000020").mkdir(parents=True)
    report = evaluation_of(labels, problem_type) if evaluation is None else evaluation
    rows = {"training_rows": "120 rows, 0a1b"}
    rows |= {"validation_rows": "60 rows, 2c3d"} if report else {}
    state = {"must_match": rows, "may_change": {}}
    files: dict[str, Any] = {
        "status.json": {"state": "finished", "step": 20, "reason": ""},
        "environment.json": ENVIRONMENT,
        "checkpoints/step_000020/state.json": state,
        **({"evaluation.json": report} if report else {}),
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value))
    (out / "config.yaml").write_text(yaml.safe_dump(SETTINGS | settings))
    answers = [("good", 0.9), ("good", 0.95), ("bad", 0.8), ("bad", 0.6), ("good", 0.55)]
    lines = [{"row": 0, "label": x, "score": y, "truth": "good"} for x, y in answers]
    if report and problem_type == SINGLE:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / "predictions.jsonl").write_text(text)

    metadata: dict[str, Any] = {"max_length": 64, "step": 20, "text_column": "review"}
    metadata |= {"calibration": calibration} if calibration else {}
    metadata["text_pair_column"] = "answer" if pairs else None

    def fill(folder: Path) -> None:
        if model is None:
            header = {"x": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text + bytes(48)
            (folder / "model.safetensors").write_bytes(content)
            names = {str(i): label for i, label in enumerate(labels)}
            config = {"model_type": "bert", "id2label": names, "problem_type": problem_type}
            (folder / "config.json").write_text(json.dumps({**config, "bertdist": metadata}))
            return
        _save_model(model, folder, problem_type, labels, metadata)

    write_folder(out / "best", fill)
    return out / "best"


def _save_model(
    model: Path, folder: Path, problem_type: str, labels: tuple[str, ...], metadata: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model,
        problem_type=problem_type,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    classifier.config.bertdist = metadata
    classifier.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
