"""launch/kubeflow_trainjob.yaml has only what the API of Kubeflow Trainer knows, in its types."""

from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).resolve().parents[2] / "launch" / "kubeflow_trainjob.yaml"
models = pytest.importorskip(
    "kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api: pip install -e '.[dev]'"
)


def unknown(written: Any, understood: Any, path: str = "") -> list[str]:
    """What was written and the models of the API, made of its schema, do not have."""
    if isinstance(written, dict):
        missing = [f"{path}.{key}" for key in written if key not in (understood or {})]
        both = written.keys() & (understood or {}).keys()
        return missing + [
            x for key in both for x in unknown(written[key], understood[key], f"{path}.{key}")
        ]
    if isinstance(written, list):
        pairs = zip(written, understood, strict=True)
        return [x for i, pair in enumerate(pairs) for x in unknown(*pair, f"{path}[{i}]")]
    return [] if written == understood else [path]


def test_every_field_is_of_the_schema() -> None:
    written = yaml.safe_load(FILE.read_text())
    assert unknown(written, models.TrainerV1alpha1TrainJob.from_dict(written).to_dict()) == []
    # The control: a field of version 2.1, which 2.3 does not have, and a number that is a text.
    written["spec"]["podTemplateOverrides"] = []
    found = unknown(written, models.TrainerV1alpha1TrainJob.from_dict(written).to_dict())
    assert found == [".spec.podTemplateOverrides"]
    written["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        models.TrainerV1alpha1TrainJob.from_dict(written)
