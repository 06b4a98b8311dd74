"""What a command checks before it imports torch, which takes seconds: the names of models, folders
and files, and the columns of files.

    check_train(config)        # also check_evaluate, check_predict, check_rows
    parse_or_exit(read_evaluate_config, check_evaluate)

A resumed run's settings: training/resume_check.py.

The checks are those of the command itself, which makes them again: under a launcher on all ranks,
whose files may differ. So here they are for a process of its own. Only the beginning of a local
file is read; what would have to be read as a whole (a large JSON document), or twice over a
network, is left to the command.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bertdist.core.atomic_io import read_json_object
from bertdist.core.config import (
    DataConfig,
    EvaluateConfig,
    FileConfig,
    PredictConfig,
    TrainConfig,
    share_of,
)
from bertdist.core.errors import ConfigError
from bertdist.core.hub import (
    check_folder,
    check_model_name,
    enable_offline_fallback,
    upload_problem,
)
from bertdist.core.output_files import check_run_folder, output_format
from bertdist.core.terminal import process_rank
from bertdist.data.bad_rows import suggest_skipping
from bertdist.tasks.metric_names import check_metric_names

MOST_FILES = 20  # whose first rows are read: the command opens all of them
MOST_JSON_BYTES = 8 << 20  # of a JSON document, which is read as a whole


def check_train(config: TrainConfig) -> None:
    """Raise BertdistError for what `train` would raise."""
    check_upload(config)
    if is_launched():
        return
    check_metric_names(config.task.metrics or [])
    run = config.run
    if run.output_dir and not (run.folds or run.seeds):  # their runs have folders of their own
        check_run_folder(Path(run.output_dir))
    check_rows(config.data)
    model = config.model
    check_model(model.model_name_or_path, "--model_name_or_path", model.model_revision)
    check_tokenizer(model.tokenizer_name)


def check_upload(config: TrainConfig) -> None:
    """Raise ConfigError where --push_to_hub has no token, or may ask nothing of the hub.

    On rank 0, which uploads.
    """
    to = config.run.push_to_hub
    if to and process_rank() == 0 and (problem := upload_problem()):
        raise ConfigError(f"--push_to_hub {to}: {problem}")


def check_rows(data: DataConfig) -> None:
    """Raise DataError for files, formats and columns."""
    if is_launched():
        return
    from bertdist.data.load_data import check_files

    is_divided = any(map(share_of, (data.validation_split, data.test_split)))
    for files in (data.train_file, data.validation_file, data.test_file):
        patterns = [files] if isinstance(files, str) else files or []
        is_scored = files is not data.train_file or is_divided
        reading = data if is_scored else replace(data, slice_column=None)
        with suggest_skipping():
            check_files(_readable(patterns, data), reading)


def check_evaluate(config: EvaluateConfig) -> None:
    """Raise BertdistError for what `evaluate` would raise."""
    if is_launched():
        return
    from bertdist.data.load_data import check_files
    from bertdist.data.trained_columns import data_of_model, suggest_prediction

    check_metric_names(config.metrics or [])
    check_model(config.model, "--model")
    if config.input is not None:
        data = data_of_model(config, _metadata(config.model)[0])
        with suggest_skipping(), suggest_prediction():
            check_files(_readable([config.input], data), data)


def check_predict(config: PredictConfig) -> None:
    """Raise BertdistError for what `predict` would raise."""
    if is_launched():
        return
    check_model(config.model, "--model")
    metadata, labels = _metadata(config.model)
    from bertdist.data.trained_columns import check_pairs, trained_columns

    if config.input is None:
        check_pairs(metadata, config.text_pair is not None)
    elif files := _readable(config.input, config):
        from bertdist.data.prediction_input import InputRows

        form = output_format(config.output, config.output_format)
        InputRows(
            files,
            config,
            trained_columns(metadata),
            labels=labels,
            keep=config.keep_columns or (),
            window_rows=1,
            same_columns=form is not None and form.kind != "jsonl",
        )


def is_launched() -> bool:
    """Whether this is a rank of a launcher, which leaves the checks to the command."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_model(name: str | None, flag: str, revision: str | None = None) -> None:
    """Raise ModelError for a folder that is none of a model, and a name that is not on the hub."""
    if name and not is_launched():
        enable_offline_fallback()  # a command owns its process
        check_model_name(name, flag, revision)


def check_tokenizer(name: str | None) -> None:
    """Raise ModelError for a folder that does not exist; of the hub nothing is requested."""
    if name and not is_launched():
        check_folder(name, f"--tokenizer_name {name}")


def _metadata(model: str) -> tuple[dict[str, Any], list[str]]:
    """What a run has saved in a model's folder, and what files may have as labels."""
    settings = read_json_object(Path(model).expanduser() / "config.json")
    metadata, names = settings.get("bertdist"), settings.get("id2label")
    metadata = metadata if isinstance(metadata, dict) else {}
    labels = names.values() if isinstance(names, dict) else ()
    return metadata, [*map(str, labels), *(metadata.get("label_codes") or ())]


def _readable(patterns: Sequence[str], flags: FileConfig) -> list[str]:
    """The files that are opened here. Raises DataError for names of none."""
    return [path for pattern in patterns for path in _files_of(pattern, flags)][:MOST_FILES]


def _files_of(pattern: str, flags: FileConfig) -> Iterator[str]:
    from bertdist.data.readers.file_reader import inspect_file
    from bertdist.data.readers.remote import STDIN, list_files, protocol_of

    if pattern == STDIN or protocol_of(pattern) is not None:
        return
    if os.path.isdir(pattern):
        yield pattern
        return
    for path in list_files(pattern)[:MOST_FILES]:
        is_large = os.path.getsize(path) > MOST_JSON_BYTES
        if not (is_large and inspect_file(path, flags).kind == "json"):
            yield path
