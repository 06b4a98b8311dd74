"""Which columns a trained model reads: those of its training, for evaluation and prediction.

metadata: what a run has saved in the config.json of its best/ (`saved_metadata`); empty for a model
of another program.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bertdist.core.config import DataConfig, EvaluateConfig, saved_setting
from bertdist.core.errors import DataError, NoLabelsError
from bertdist.data.records import ColumnNames

# Flags of evaluation that training has too
_SHARED = (
    *("file_format", "json_field", "column_names", "delimiter", "quoting", "encoding"),
    *("dataset_name", "dataset_config_name", "task_name", "max_eval_samples"),
    *("label_column", "label_columns", "label_delimiter", "on_bad_row", "max_bad_rows"),
    "slice_column",
)


def trained_columns(metadata: dict[str, Any]) -> ColumnNames:
    """The columns that the training read."""
    text = metadata.get("text_column")
    text = tuple(text) if isinstance(text, list) else text
    return ColumnNames(text, metadata.get("text_pair_column"), None, [])


@contextmanager
def suggest_prediction() -> Iterator[None]:
    """Add what takes rows without labels to the message about such rows; for evaluation."""
    try:
        yield
    except NoLabelsError as error:
        raise NoLabelsError(
            f"{error} Rows without labels are for bertdist predict: --model and --input, as here."
        ) from None


def data_of_model(config: EvaluateConfig, metadata: dict[str, Any]) -> DataConfig:
    """The rows of an evaluation, as the validation rows of a run."""
    texts = config.text_column or metadata.get("text_column")
    return DataConfig(
        **{name: getattr(config, name) for name in _SHARED} | _label_columns(config),
        text_column=[texts] if isinstance(texts, str) else texts,
        text_pair_column=config.text_pair_column or metadata.get("text_pair_column"),
        validation_file=config.input,
        validation_split=config.split,
    )


def _label_columns(config: EvaluateConfig) -> dict[str, Any]:
    """Where the labels are: as the flags say, else as in the training of a run's best/."""
    names = ("label_column", "label_columns", "label_delimiter")
    given = {name: getattr(config, name) for name in names}
    settings = Path(config.model).parent / "config.yaml"
    if any(value is not None for value in given.values()) or Path(config.model).name != "best":
        return given
    return {name: saved_setting(settings, name) for name in names}


def check_pairs(metadata: dict[str, Any], has_pairs: bool) -> None:
    """Raise DataError if the model was trained on pairs of texts and these are single ones, or vice
    versa. A folder of another program does not say, and takes both.
    """
    if "text_pair_column" not in metadata:
        return
    second = metadata["text_pair_column"]
    if second is not None and not has_pairs:
        raise DataError(
            f"The model was trained on pairs of texts (columns {metadata.get('text_column')!r} and "
            f"{second!r}), and the second texts are missing: give pairs=, --text_pair or "
            "--text_pair_column."
        )
    if second is None and has_pairs:
        raise DataError(
            "The model was trained on single texts, not on pairs: remove pairs=, --text_pair or "
            "--text_pair_column."
        )
