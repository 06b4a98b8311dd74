"""A dry run describes what training does, and writes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_checks import clean_rows
from forked import run_ranks
from rows import run_train, words_of, write_rows, write_split
from rows import train_module as train
from transformers import AutoConfig, AutoModelForSequenceClassification

from bertdist import cli
from bertdist.core.args import read_config
from bertdist.core.errors import BertdistError, CheckpointError, ConfigError, DataError, ModelError
from bertdist.data.sharding import balance_by_length, epoch_order
from bertdist.data_quality import dry_run
from bertdist.data_quality.dry_run import (
    MemoryEstimate,
    estimate_memory,
    load_balance,
    padding_ratio,
)
from bertdist.distributed import launch
from bertdist.tasks.tasks import SingleLabel


def run_dry(
    config: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    monkeypatch.setenv("COLUMNS", "400")
    code = dry_run.dry_run(read_config([*config, "--dry_run"]))
    return code, capsys.readouterr().out


def test_steps_and_tokens_are_those_of_training(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = words_of(
        tiny_model,
        tmp_path / "out",
        write_split(tmp_path, 43, 8),
        num_train_epochs=2,
        max_length=24,
    )
    code, out = run_dry(words, capsys, monkeypatch)
    assert code == 0 and not (tmp_path / "out").exists()
    assert (
        "6 steps per epoch of 8 rows, 12 steps in total" in out
        and "8 (now)" not in out
        and "1 (now)" in out
    )
    run_ranks(1, run_train, words)
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    tokens = max(line.get("tokens", 0) for line in lines)
    assert f"An epoch has {tokens // 2:,} real tokens" in out


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_is_what_this_machine_would_compute_in(
    has_bf16: bool,
    precision: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "cpu_has_amx", lambda: has_bf16)
    monkeypatch.setattr(launch, "is_initialized", lambda: False)  # other tests have an Accelerator
    files = write_split(tmp_path, 43)
    words = words_of(tiny_model, tmp_path / "out", files, mixed_precision="auto", use_cpu=True)
    out = run_dry(words, capsys, monkeypatch)[1]
    assert f"Memory per rank, estimated for --mixed_precision {precision}:" in out
    assert out.splitlines()[0].startswith("--mixed_precision auto: using ")


def test_epochs_are_steps_by_the_steps_of_an_epoch(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 43), num_train_epochs=2)
    # 43 rows are not 6 whole steps: by rows, 12 steps would be 2.23 epochs
    assert "12 steps in total (2 epochs)." in run_dry(words, capsys, monkeypatch)[1]
    one = [*words, "--train_batch_size", "64", "--max_train_steps", "1"]
    assert "1 steps in total (1 epoch)." in run_dry(one, capsys, monkeypatch)[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive_label": "yes"}, "--positive_label yes: no such label."),
        ({"metric_for_best_model": "no"}, "--metric_for_best_model no: not among the scores"),
        ({"metrics": "bogus"}, "--metrics bogus: unknown score."),
        ({"warmup_steps": 1000}, "--warmup_steps is 1000, but the run has"),
        ({"report_to": "bogus"}, "--report_to bogus: not a tracker of accelerate."),
        ({"resume_from_checkpoint": "no/folder"}, "--resume_from_checkpoint no/folder: there is"),
        ({"max_length": 100_000}, "--max_length is 100000; this model has"),
        ({"test_file": "no.tsv"}, "no.tsv: no such file."),
    ],
)
def test_settings_that_training_refuses_are_refused(
    settings: dict[str, Any],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 43, 8), **settings)
    with pytest.raises(BertdistError) as caught:
        run_dry(words, capsys, monkeypatch)
    assert str(caught.value).startswith(message)


def test_folders_and_test_rows_that_training_refuses_are_refused(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, out = write_split(tmp_path, 43, 8), tmp_path / "out"
    test = tmp_path / "test.tsv"
    test.write_text("text\na text\n")
    with pytest.raises(DataError, match="no column has a usual name for the label"):
        run_dry(words_of(tiny_model, out, files, test_file=test), capsys, monkeypatch)
    words = words_of(tiny_model, out, files, test_file=files.dev)
    assert run_dry(words, capsys, monkeypatch)[0] == 0
    out.mkdir()
    (out / "notes.txt").write_text("not of a run")
    with pytest.raises(ConfigError, match="which no run wrote"):
        run_dry(words, capsys, monkeypatch)
    empty = tmp_path / "empty_model"
    shutil.copytree(tiny_model, empty)
    (empty / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the folder holds no weights"):
        run_dry(words_of(empty, tmp_path / "new", files), capsys, monkeypatch)


def test_the_checkpoint_of_the_folder_is_compared_as_by_a_start(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_train_steps": 2, "use_cpu": True}
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 43), **settings)
    assert "Resuming from" not in run_dry(words, capsys, monkeypatch)[1]
    train.train(read_config(words))
    capsys.readouterr()
    last = f"Resuming from {tmp_path / 'out' / 'checkpoints' / 'step_000002'} (step 2)."
    out = run_dry(words, capsys, monkeypatch)[1].splitlines()
    assert out[-2] == last and out[-1].startswith("This run has finished")
    changed = [*words, "--gradient_checkpointing"]
    assert "Settings changed since then:" in run_dry(changed, capsys, monkeypatch)[1]
    with pytest.raises(CheckpointError, match=r"seed +42 +7 "):
        run_dry([*words, "--seed", "7"], capsys, monkeypatch)
    write_split(tmp_path, 44)
    with pytest.raises(CheckpointError, match=r"training_rows +43 rows"):
        run_dry(words, capsys, monkeypatch)


def test_only_rank_0_of_a_launch_prints(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 43, 8))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 (now)" in run_dry(words, capsys, monkeypatch)[1]
    monkeypatch.setenv("RANK", "1")
    assert run_dry(words, capsys, monkeypatch) == (0, "")


def test_errors_in_the_data_are_exit_code_1(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = write_split(tmp_path, 43)
    rows = clean_rows(20)
    dev = write_rows(
        tmp_path / "dev.tsv",
        [{**row, "label": {"good": "positive", "bad": "negative"}[row["label"]]} for row in rows],
    )
    words = words_of(tiny_model, tmp_path / "out", files._replace(dev=dev))
    assert run_dry(words, capsys, monkeypatch)[0] == 0
    write_rows(files.train, [{**row, "label": "positive"} for row in clean_rows(20)])
    with pytest.raises(DataError, match="only the label 'positive'"):
        run_dry(words, capsys, monkeypatch)
    assert "error: train: all rows have one label: 20 rows (100%)" in capsys.readouterr().out
    leaked = clean_rows(20)
    write_rows(files.train, leaked)
    write_rows(dev, leaked[:5])
    code, out = run_dry(words, capsys, monkeypatch)
    assert (
        code == 1
        and "error: train/validation: rows of validation that are also in train: 5 rows (100%), "
        "dev.tsv line 2"
        in out
    )


def test_skipped_rows_are_reported_with_the_plan(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = write_split(tmp_path, 43, 8)
    with files.train.open("a") as file:
        file.write("one field\n")
    words = words_of(tiny_model, tmp_path / "out", files, on_bad_row="skip")
    code, out = run_dry(words, capsys, monkeypatch)
    assert code == 0 and "warning: train: bad rows, which are skipped: 1 row (2.27%), train" in out
    code, out = run_dry([*words, "--max_bad_rows", "0"], capsys, monkeypatch)
    assert code == 1 and "error: train: bad rows, which are skipped: 1 row" in out


def test_main_exits_without_training(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 43, 8))
    monkeypatch.setattr(train, "train", lambda config: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *words, "--dry_run"])
    assert left.value.code == 0 and "Memory per rank" in capsys.readouterr().out


def test_load_balance_and_padding_are_those_of_training() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, size=100)
    order, worst, cells = epoch_order(100, 5, 0), [], 0
    for start in range(0, 100, 8):
        rows = order[start : start + 8]
        loads = [
            int(lengths[share].sum()) for share in balance_by_length(rows, lengths[rows] * 4, 3)
        ]
        worst.append(max(loads) / (sum(loads) / 3))
        cells += len(rows) * int(lengths[rows].max())
    assert load_balance(lengths * 4, lengths, 8, 3, 5) == (
        pytest.approx(np.mean(worst), rel=1e-12),
        0.0,
    )
    assert padding_ratio(lengths, 8, 5) == cells / lengths.sum()
    assert load_balance(lengths, lengths, 2, 4, 5)[1] == 0.5  # two of four ranks have no row
    assert load_balance(lengths * 4, lengths, 8, 3, 6) != load_balance(
        lengths * 4, lengths, 8, 3, 5
    )  # the control: another order


@pytest.mark.parametrize(
    ("settings", "a_parameter"),
    [({}, 16), ({"mixed_precision": "bf16"}, 18), ({"gradient_checkpointing": True}, 16)],
)
def test_memory_counts_every_parameter_and_builds_none(
    tiny_model: Path, settings: dict[str, Any], a_parameter: int, tmp_path: Path
) -> None:
    task = SingleLabel(("a", "b", "c"))
    config = read_config(
        words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 3), **settings)
    )
    found = estimate_memory(AutoConfig.from_pretrained(tiny_model), task, config)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    assert found.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert (found.bytes_per_parameter, found.fixed_bytes) == (
        a_parameter,
        found.num_parameters * a_parameter,
    )
    by_hand = {
        "": 2 * (4 * (8 * 32 + 2 * 64) + 2 * 32),
        "mixed_precision": 2 * (2 * (8 * 32 + 2 * 64) + 2 * 32),
    }
    assert (
        found.bytes_per_token
        == {**by_hand, "gradient_checkpointing": 2 * 4 * 32}["".join(settings)]
    )


@pytest.mark.parametrize(("words", "layers"), [("embeddings", 2), ("1", 1), ("encoder", 1)])
def test_frozen_weights_need_their_own_memory_only(
    tiny_model: Path, words: str, layers: int, tmp_path: Path
) -> None:
    def estimate(**settings: Any) -> MemoryEstimate:
        files = write_split(tmp_path, 3)
        config = read_config(words_of(tiny_model, tmp_path / "out", files, **settings))
        settings_of_model = AutoConfig.from_pretrained(tiny_model)
        return estimate_memory(settings_of_model, SingleLabel(("a", "b", "c")), config)

    found, plain = estimate(freeze=words), estimate()
    head = 32 * 32 + 32 + 3 * 32 + 3
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 32 + 64 + 4 * 32
    trained = {"embeddings": head + 2 * layer, "1": head + layer, "encoder": head}[words]
    assert found.num_parameters == trained
    assert found.num_parameters + found.num_frozen == plain.num_parameters
    assert found.fixed_bytes == 16 * trained + 4 * found.num_frozen
    # of frozen layers one at a time, while it is computed
    assert found.bytes_per_token * 2 == plain.bytes_per_token * layers
