"""Data sets made by rule with nothing wrong in them, and a check of them.

rows = clean_rows(60)  # text and label; no finding of any kind
rows[3]["text"] = ""  # plant a problem
kinds(check_rows(tmp_path, rows, validation=clean_rows(20, seed=1)))
"""

from pathlib import Path
from typing import Any

import numpy as np
from rows import write_rows

from bertdist.core.config import DataConfig
from bertdist.data_quality.findings import Finding
from bertdist.data_quality.report import DataReport, check_data

LETTERS = np.array(list("aeioubdfgklmnprstvz"))


def clean_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Unique sentences of 6 to 12 words, and two labels in equal parts."""
    random = np.random.default_rng([7, seed])
    texts = [
        " ".join(
            "".join(random.choice(LETTERS, size=random.integers(3, 9)))
            for _ in range(random.integers(6, 13))
        )
        for _ in range(count)
    ]
    return [{"text": text, "label": ("bad", "good")[row % 2]} for row, text in enumerate(texts)]


def check_rows(
    folder: Path,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]] | None = None,
    test: list[dict[str, Any]] | None = None,
    ending: str = "jsonl",
    tokenizer: Any = None,
    max_length: int = 128,
    near_threshold: float = 0.8,
    **settings: Any,
) -> DataReport:
    """Write the rows to files and run all checks on them."""
    paths = {}
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        paths[name] = (
            str(write_rows(folder / f"{name}.{ending}", rows)) if rows is not None else None
        )
    data = DataConfig(train_file=[paths["train"]], validation_file=paths["validation"], **settings)
    return check_data(
        data,
        test_file=paths["test"],
        tokenizer=tokenizer,
        max_length=max_length,
        near_threshold=near_threshold,
    )


def kinds(found: DataReport) -> list[tuple[str, str, str, int]]:
    """(kind, severity, split, count) of every finding, ranked."""
    return [
        (finding.kind, finding.severity, finding.split, finding.count) for finding in found.findings
    ]


def get_finding(found: DataReport, kind: str, split: str = "train") -> Finding:
    """The only finding of a kind in a split."""
    (finding,) = [
        finding for finding in found.findings if (finding.kind, finding.split) == (kind, split)
    ]
    return finding
