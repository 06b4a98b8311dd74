"""Which settings may change between two starts of a run. Complete runs: ranks/test_changed.py."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertdist.core.args import read_config
from bertdist.core.atomic_io import CHECKPOINT_FILES, write_folder
from bertdist.core.config import TrainConfig
from bertdist.core.errors import CheckpointError
from bertdist.data.in_memory import records_from_texts
from bertdist.data.records import Records
from bertdist.tasks.tasks import SingleLabel
from bertdist.training.resume_check import (
    ADDED,
    FORMAT,
    MAY_CHANGE,
    MUST_MATCH,
    Change,
    ResumeSignature,
    check_changes,
    check_checkpoint,
    format_changes,
    resume_signature,
    settings_that_must_match,
)

BEFORE = {
    "seed": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "training_rows": "9 rows, a",
    "total_steps": 10,
}
NEW = dict.fromkeys(ADDED, "x")
FOLDER = Path("out/checkpoints/step_000004")


def before(**changes: Any) -> ResumeSignature:
    return ResumeSignature({**BEFORE, **NEW, **changes}, {**NEW, "eval_every": "1 epoch"})


def now(accept: bool = False, **changes: Any) -> ResumeSignature:
    may_change = {**NEW, "eval_every": "1 epoch"}
    return ResumeSignature({**BEFORE, **NEW, **changes}, may_change, accept)


def check(before: ResumeSignature, now: ResumeSignature) -> list[Change]:
    return check_changes(FOLDER, before, now, step=4)


def names(changes: list[Change]) -> list[str]:
    return [change.name for change in changes]


def test_equal_settings_have_no_changes() -> None:
    assert check(before(), now()) == []


@pytest.mark.parametrize("name", MUST_MATCH)
def test_changes_that_must_match_are_refused_with_their_effect(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(before(), now(**{name: 99}))
    first, header, row, last = str(caught.value).split("\n")
    assert first == f"{FOLDER} belongs to a run with other settings:"
    assert header.split() == ["setting", "before", "now", "effect"]
    assert row.split()[0] == name and " 99 " in row and row.endswith(MUST_MATCH[name])
    assert last == "Use the old settings, or another --output_dir."
    assert header.index("now") == row.index("99"), "columns are aligned"


def test_settings_without_an_own_effect_are_refused_too() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"adam_beta1 +0.9 +0.5 +the steps done so far used another value",
    ):
        check(before(adam_beta1=0.9), now(adam_beta1=0.5))


def test_all_changes_are_in_one_table() -> None:
    with pytest.raises(CheckpointError) as caught:
        check(before(), now(seed=2, learning_rate=1.0, labels=["a"] * 50))
    assert [line.split()[0] for line in str(caught.value).split("\n")[2:-1]] == [
        "seed",
        "learning_rate",
        "labels",
    ]
    assert all(len(line) < 200 for line in str(caught.value).split("\n")), (
        "long values are shortened"
    )


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_harmless_changes_are_returned_with_their_effect(name: str) -> None:
    may_change = {**now().may_change, name: 3}
    (change,) = check(before(), ResumeSignature(now().must_match, may_change))
    assert (change.name, change.effect) == (name, MAY_CHANGE[name])


@pytest.mark.parametrize(
    ("earlier", "later", "changes"),
    [
        ("3 steps", "3steps", []),
        ("3steps", " 3.0 step ", []),
        ("1 epoch", "1.0 epochs", []),
        ("10%", "10 %", []),
        ("never", " never", []),
        ("3 steps", "4steps", ["eval_every"]),
        ("1 epoch", "1 step", ["eval_every"]),
        ("10%", "10 steps", ["eval_every"]),
        ("3 steps", "never", ["eval_every"]),
    ],
)
def test_the_same_interval_in_other_words_is_no_change(
    earlier: str, later: str, changes: list[str]
) -> None:
    one, other = (ResumeSignature(BEFORE, {"eval_every": text}) for text in (earlier, later))
    assert names(check(one, other)) == changes


def test_other_metrics_are_said() -> None:
    one, other = (
        ResumeSignature(BEFORE, {"metrics": metrics}) for metrics in (None, ["accuracy", "mcc"])
    )
    assert names(check(one, other)) == ["metrics"] and check(other, other) == []


@pytest.mark.parametrize("name", sorted(ADDED))
def test_checkpoints_of_before_a_setting_was_compared_resume(name: str) -> None:
    older = ResumeSignature(BEFORE, {"eval_every": "1 epoch"})
    assert check(older, now(**{name: "another"})) == []
    with pytest.raises(CheckpointError, match="seed"):  # all else is compared
        check(older, now(seed=2))


def test_every_setting_of_the_tables_is_in_the_signature() -> None:
    needed = [
        "--model_name_or_path=m",
        "--train_file=t.tsv",
        "--validation_file=d.tsv",
        "--output_dir=o",
    ]
    config = read_config(needed)
    rows = records_from_texts(["a"])
    signature = resume_signature(config, rows, rows, SingleLabel(("a", "b")), 3, DIGESTS)
    assert signature.may_change.keys() == MAY_CHANGE.keys()
    conditional = {"stream_window", "stream_sharding", "validation_split", "test_split"}
    conditional.add("ddp_comm_hook")
    assert set(MUST_MATCH) - conditional <= signature.must_match.keys()


# ---- Data that changed

OTHER = {"training_rows": "12 rows, b", "total_steps": 13}


def test_changed_data_is_refused_with_a_hint_at_the_flag() -> None:
    with pytest.raises(
        CheckpointError, match=r"training_rows +9 rows, a +12 rows, b .*\(--accept_changed_data\)"
    ):
        check(before(), now(**OTHER))


def test_flag_accepts_changed_data_and_nothing_else() -> None:
    accepted = check(before(), now(accept=True, **OTHER))
    assert names(accepted) == ["training_rows", "total_steps"]
    assert "may be repeated or missed" in accepted[0].effect
    with pytest.raises(CheckpointError) as caught:
        check(before(), now(accept=True, seed=3, **OTHER))
    assert "seed" in str(caught.value) and "training_rows" not in str(caught.value)
    with pytest.raises(CheckpointError, match="total_steps"):
        check(before(), now(accept=True, total_steps=13))  # the flag without changed rows


@pytest.mark.parametrize("accept", [False, True])
def test_fewer_steps_than_done_are_refused(accept: bool) -> None:
    with pytest.raises(CheckpointError, match=r"total_steps +10 +4 +4 steps are done already"):
        check(before(), now(accept=accept, training_rows="2 rows, b", total_steps=4))


@pytest.mark.parametrize(
    ("schedule", "changed", "accepted"),
    [
        ({"lr_scheduler_type": "constant"}, {}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, {}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}, {}, False),
        ({"lr_scheduler_type": "linear"}, {}, False),
        ({"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant"}, False),
    ],
)
def test_a_constant_learning_rate_allows_more_steps(
    schedule: dict[str, Any], changed: dict[str, Any], accepted: bool
) -> None:
    if accepted:
        assert names(check(before(**schedule), now(total_steps=20, **schedule))) == ["total_steps"]
    else:
        with pytest.raises(CheckpointError, match="total_steps"):
            check(before(**schedule), now(total_steps=20, **{**schedule, **changed}))


def test_table_is_aligned() -> None:
    rows = [Change("a", 1, "x" * 60, "means"), Change("longer", [1, 2], None, "more")]
    assert format_changes(rows) == [
        "  setting  before  now                                               effect",
        f"  a        1       {'x' * 44} ...  means",
        "  longer   [1, 2]  None                                              more",
    ]


# ---- resume_signature


def labelled(
    values: list[Any], codes: list[int], pairs: list[str] | None = None, **changes: Any
) -> Records:
    """Rows with labels, as a source gives them."""
    plain = records_from_texts([f"text {i}" for i in range(len(codes))], pairs)
    given = {
        "label_kind": "text",
        "label_values": values,
        "label_indices": np.array(codes, dtype=np.int32),
        "label_column": "label",
        **changes,
    }
    return dataclasses.replace(plain, **given)


TASK = SingleLabel(("no", "yes"))
DIGESTS = {"tokenizer": "a", "model_config": "b"}
NEEDED = [
    "--model_name_or_path=m",
    "--train_file=t.tsv",
    "--validation_file=d.tsv",
    "--output_dir=o",
    "--early_stopping_patience=9",
]
MATTERS = {  # flag -> another value
    "tokenizer_name": "other",
    "max_length": "64",
    "dropout": "0.3",
    "freeze": "embeddings",
    "problem_type": "regression",
    "class_weights": "balanced",
    "label_smoothing_factor": "0.1",
    "train_batch_size": "16",
    "learning_rate": "1e-3",
    "weight_decay": "0.5",
    "adam_beta1": "0.8",
    "adam_beta2": "0.9",
    "adam_epsilon": "1e-3",
    "max_grad_norm": "0",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": "0.5",
    "warmup_steps": "3",
    "layerwise_lr_decay": "0.5",
    "seed": "3",
    "mixed_precision": "bf16",
    "ddp_comm_hook": "bf16",
    "validation_split": "0.1",
    "test_split": "0.1",
}
DOES_NOT_MATTER = {  # where it runs, micro-batches, when to write or log, when to stop
    "gradient_checkpointing": "yes",
    "metrics": "mcc",
    "positive_label": "no",
    "metric_for_best_model": "loss",
    "calibrate": "yes",
    "tune_thresholds": "yes",
    "tokens_per_micro_batch": "64",
    "dataloader_num_workers": "3",
    "output_dir": "elsewhere",
    "dry_run": "yes",
    "use_cpu": "yes",
    "torch_compile": "yes",
    "cuda_graphs": "yes",
    "eval_every": "7 steps",
    "save_every": "1 steps",
    "log_every": "1 steps",
    "verbose": "yes",
    "save_total_limit": "5",
    "resume_from_checkpoint": "c",
    "early_stopping_patience": "3",
    "early_stopping_threshold": "0.5",
    "stop_before_time_limit": "3",
    "rank_timeout": "3",
    "report_to": "tensorboard",
    "project": "p",
    "run_name": "r",
    "report": "no",
    "push_to_hub": "me/model",
    "slice_column": "source",
    "validation_file": "v.tsv",
    "max_eval_samples": "3",
    "test_file": "e.tsv",
    "accept_changed_data": "yes",
    "on_nan": "skip",
    "detect_anomaly": "yes",
}
# These matter through the rows and their fingerprint, the labels, the number of steps. The model's
# name may change, as when a folder is moved, if its config and tokenizer are the same: its weights
# are in the checkpoint.
INDIRECT = """
    model_name_or_path model_revision train_file train_weights streaming stream_window stream_sharding
    dataset_name dataset_config_name task_name train_split text_column
    text_pair_column label_column label_columns label_delimiter column_names delimiter quoting encoding
    on_bad_row max_bad_rows max_train_samples label_names file_format json_field
    num_train_epochs max_train_steps max_nan_steps folds seeds split_seed threshold_for
""".split()


def signature_of(
    *flags: str,
    rows: Records | None = None,
    task: Any = TASK,
    steps: int = 10,
    digests: dict[str, str] = DIGESTS,
) -> dict[str, Any]:
    rows = rows or labelled(["no", "yes"], [0, 1])
    both = any(flag.startswith("--validation_split") for flag in flags)
    needed = [word for word in NEEDED if not (both and word.startswith("--validation_file"))]
    config = read_config([*needed, *flags])
    signature = resume_signature(config, rows, None, task, steps, digests)
    return json.loads(json.dumps(signature.must_match))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MATTERS)
def test_settings_that_matter_are_in_the_signature(name: str) -> None:
    assert signature_of(f"--{name}={MATTERS[name]}") != signature_of()


@pytest.mark.parametrize("name", DOES_NOT_MATTER)
def test_other_settings_are_not_in_the_signature(name: str) -> None:
    assert signature_of(f"--{name}={DOES_NOT_MATTER[name]}") == signature_of()


def test_every_setting_is_classified() -> None:
    sections = [field.type for field in dataclasses.fields(TrainConfig)]
    names = {field.name for section in sections for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    assert names == MATTERS.keys() | DOES_NOT_MATTER.keys() | set(INDIRECT)


@pytest.mark.parametrize(
    "other",
    [
        {"rows": labelled(["no", "yes"], [0, 1, 1])},
        {"rows": dataclasses.replace(labelled(["no", "yes"], [0, 1]), fingerprint="other texts")},
        {"task": SingleLabel(("yes", "no"))},
        {"steps": 11},
        {"digests": {**DIGESTS, "tokenizer": "c"}},
        {"digests": {**DIGESTS, "model_config": "c"}},
    ],
)
def test_rows_labels_steps_and_the_pretrained_model_are_in_the_signature(
    other: dict[str, Any],
) -> None:
    assert signature_of(**other) != signature_of()


def test_signature_survives_json() -> None:
    config = read_config([*NEEDED, "--class_weights", "1", "2", "--warmup_ratio", "0.1"])
    signature = resume_signature(config, labelled(["no", "yes"], [0, 1]), None, TASK, 10, DIGESTS)
    assert json.loads(json.dumps(signature.must_match)) == signature.must_match


# ---- Before torch is imported


def write_checkpoint(out: Path, step: int, *flags: str, **train_state: Any) -> Path:
    """A checkpoint of the run of signature_of(*flags), without tensors."""
    state = {
        "format": FORMAT,
        "must_match": signature_of(*flags),
        "may_change": {},
        "train_state": {"step": step, **train_state},
    }

    def fill(folder: Path) -> None:
        for name in CHECKPOINT_FILES:
            (folder / name).write_text(json.dumps(state) if name == "state.json" else "")

    folder = out / "checkpoints" / f"step_{step:06d}"
    write_folder(folder, fill)
    return folder


def start(out: Path, *flags: str) -> list[str]:
    needed = [word for word in NEEDED if not word.startswith("--output_dir")]
    config = read_config([*needed, *flags, "--output_dir", str(out)])
    return check_checkpoint(config, ResumeSignature(settings_that_must_match(config)))


def test_other_settings_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    assert start(tmp_path) == []  # no checkpoint
    folder = write_checkpoint(tmp_path, 4, "--max_length=64")
    same = f"Resuming from {folder} (step 4)."
    assert start(tmp_path, "--max_length=64", "--max_train_steps=10") == [same]
    with pytest.raises(CheckpointError) as caught:
        start(tmp_path, "--max_length=65", "--seed=7", "--max_train_steps=10")
    first, header, *changes, last = str(caught.value).splitlines()
    assert first == f"{folder} belongs to a run with other settings:"
    assert header.split() == ["setting", "before", "now", "effect"]
    assert [line.split()[:3] for line in changes] == [
        ["max_length", "64", "65"],
        ["seed", "42", "7"],
    ]
    assert last == "Use the old settings, or another --output_dir."
    (folder / "model.safetensors").write_text("x")  # damaged: a start skips it
    assert start(tmp_path, "--max_length=65") == []
    older = write_checkpoint(tmp_path, 2, "--max_length=65", finished=True)
    shown = start(tmp_path, "--max_length=65", "--max_train_steps=10")
    assert shown[0] == f"Resuming from {older} (step 2)." and "has finished" in shown[1]
    assert start(tmp_path / "other", "--max_length=66") == []


def test_the_number_of_steps_is_compared_as_of_the_same_rows(tmp_path: Path) -> None:
    """The two rows of signature_of are one step per epoch; it says 10 steps."""
    write_checkpoint(tmp_path, 4)
    assert start(tmp_path, "--num_train_epochs=10")
    with pytest.raises(CheckpointError, match=r"total_steps +10 +12 "):
        start(tmp_path, "--num_train_epochs=12")
    assert start(tmp_path, "--num_train_epochs=12", "--accept_changed_data")
    constant = ["--lr_scheduler_type=constant"]
    write_checkpoint(tmp_path, 4, *constant)
    shown = start(tmp_path, *constant, "--num_train_epochs=12")
    assert shown[1] == "Settings changed since then:" and "total_steps" in shown[3]
    with pytest.raises(CheckpointError, match="4 steps are done already"):
        start(tmp_path, *constant, "--num_train_epochs=3")


def test_what_is_no_checkpoint_is_left_to_the_start(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path, 4) / "state.json"
    for text in ("{", "[]", '{"format": 1}', f'{{"format": {FORMAT}, "must_match": 3}}'):
        state.write_text(text)
        assert start(tmp_path, "--seed=7") == []


def test_the_comparison_needs_no_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4)
    words = [*NEEDED[:3], "--output_dir", str(tmp_path), "--seed=7"]
    code = (
        "import sys\nfrom bertdist.core.args import read_config\n"
        "from bertdist.training.resume_check import *\n"
        f"config = read_config({words!r})\n"
        "try: check_checkpoint(config, ResumeSignature(settings_that_must_match(config)))\n"
        "except CheckpointError: print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
