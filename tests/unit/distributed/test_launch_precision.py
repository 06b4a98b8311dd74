"""The precision of a run: asked for, of accelerate, chosen from the hardware, kept from its first start."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState, is_initialized
from forked import run_ranks

from bertdist.core.args import read_config
from bertdist.core.config import RunConfig, config_to_yaml
from bertdist.distributed import launch
from bertdist.distributed.launch import choose_precision, create_accelerator

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    # other tests of this process have an Accelerator
    monkeypatch.setattr(launch, "is_initialized", lambda: False)


def on(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, has_instructions: bool | None = None
) -> None:
    """A machine whose CPU or GPU has units for bf16, or not. has_instructions: without units."""
    with_instructions = has_bf16 if has_instructions is None else has_instructions
    monkeypatch.setattr(launch, "cpu_has_amx", lambda: has_bf16)
    monkeypatch.setattr(launch, "cpu_has_bf16", lambda: with_instructions)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)


def write_checkpoint(folder: Path, precision: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"must_match": {"mixed_precision": precision}}))
    return folder


# what is asked for -> with units, without them
CASES: list[tuple[Any, torch.device, str, str]] = [
    (None, CPU, "no", "no"),
    ("no", CPU, "no", "no"),
    ("fp16", GPU, "fp16", "fp16"),
    ("bf16", CPU, "bf16", "no"),
    ("bf16", GPU, "bf16", "bf16"),  # accelerate decides
    ("auto", CPU, "bf16", "no"),
    ("auto", GPU, "bf16", "no"),
]


@pytest.mark.parametrize(("asked", "device", "with_units", "without"), CASES)
def test_what_a_new_run_computes_in(
    asked: Any, device: torch.device, with_units: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_bf16, expected in ((True, with_units), (False, without)):
        on(monkeypatch, has_bf16)
        chosen, note = choose_precision(RunConfig(mixed_precision=asked), device)
        assert chosen == expected
        is_said = asked == "auto" or (asked, chosen) == ("bf16", "no")
        assert bool(note) == is_said and "\n" not in note
        if is_said:
            assert note.startswith(f"--mixed_precision {asked}: using ")
            assert ("float32" in note) == (chosen == "no")


def test_avx512_bf16_without_amx_is_slower_and_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, False, has_instructions=True)
    out = str(tmp_path / "out")
    auto, note = choose_precision(RunConfig(output_dir=out, mixed_precision="auto"), CPU)
    assert auto == "no" and "has no AMX" in note
    assert choose_precision(RunConfig(output_dir=out), CPU) == ("no", "")  # no advice
    assert choose_precision(RunConfig(output_dir=out, mixed_precision="bf16"), CPU) == ("bf16", "")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("mixed_precision: bf16\n")
    auto, note = choose_precision(RunConfig(output_dir=out, mixed_precision="auto"), CPU)
    assert auto == "bf16" and "emulates" not in note


def test_a_flag_wins_over_the_setting_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    chosen = [
        choose_precision(RunConfig(mixed_precision=asked), GPU)[0]
        for asked in (None, "no", "bf16", "auto")
    ]
    assert chosen == ["fp16", "no", "bf16", "bf16"]


@pytest.mark.parametrize("from_checkpoint", [True, False])
@pytest.mark.parametrize("began", ["bf16", "no"])
def test_a_run_keeps_what_it_began_with(
    began: Any, from_checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    required = ["--model_name_or_path", "m", "--train_file", "t.tsv", "--output_dir", str(tmp_path)]
    config = read_config([*required, "--mixed_precision", began])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    if from_checkpoint:  # it counts, and the newest one first
        (tmp_path / "config.yaml").write_text("mixed_precision: fp16\n")
        write_checkpoint(tmp_path / "checkpoints" / "step_900000", "fp16")
        write_checkpoint(tmp_path / "checkpoints" / "step_1000000", began)
    auto = RunConfig(output_dir=str(tmp_path), mixed_precision="auto")
    for has_bf16 in (True, False):
        on(monkeypatch, has_bf16)
        chosen, note = choose_precision(auto, CPU)
        assert chosen == began and "as this run began" in note
        assert ("emulates it, slowly" in note) == (began == "bf16" and not has_bf16)
    # bf16 by a flag, on a machine without units: only a run that began with it goes on with it
    chosen, note = choose_precision(
        RunConfig(output_dir=str(tmp_path), mixed_precision="bf16"), CPU
    )
    assert (chosen, "emulates it" in note) == (began, began == "bf16")
    # the control: another folder
    on(monkeypatch, began == "no")
    other = RunConfig(output_dir=str(tmp_path / "other"), mixed_precision="auto")
    assert choose_precision(other, CPU)[0] != began


def test_a_named_checkpoint_and_a_fold_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, False)
    named = write_checkpoint(tmp_path / "other" / "checkpoints" / "step_000004", "bf16")
    out = str(tmp_path / "out")
    run = RunConfig(output_dir=out, mixed_precision="auto", resume_from_checkpoint=str(named))
    assert choose_precision(run, CPU)[0] == "bf16"
    folds = RunConfig(output_dir=out, mixed_precision="auto", folds=3)
    assert choose_precision(folds, CPU)[0] == "no"  # the control
    (tmp_path / "out" / "folds" / "0").mkdir(parents=True)
    (tmp_path / "out" / "folds" / "0" / "config.yaml").write_text("mixed_precision: bf16\n")
    assert choose_precision(folds, CPU)[0] == "bf16"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"must_match": 3}', '{"must_match": {}}', "mixed_precision: [", "3"]
)
def test_damaged_files_of_a_run_count_as_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, True)
    write_checkpoint(tmp_path / "checkpoints" / "step_000001", "no").joinpath(
        "state.json"
    ).write_text(text)
    (tmp_path / "config.yaml").write_text(text)
    run = RunConfig(output_dir=str(tmp_path), mixed_precision="auto")
    assert choose_precision(run, CPU)[0] == "bf16"


def test_bf16_is_recommended_to_a_new_run_in_float32_on_a_cpu_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def advice(device: torch.device = CPU, out: Path = tmp_path / "new", **settings: Any) -> str:
        return choose_precision(RunConfig(output_dir=str(out), **settings), device)[1]

    on(monkeypatch, True)
    assert "--mixed_precision bf16" in advice() and "\n" not in advice()
    assert not advice(mixed_precision="no")  # who has chosen needs no advice
    assert not advice(GPU)  # not measured yet
    write_checkpoint(tmp_path / "old" / "checkpoints" / "step_000001", "no")
    assert not advice(out=tmp_path / "old")  # where another precision is refused
    assert not choose_precision(RunConfig(), CPU)[1]  # evaluate and predict
    on(monkeypatch, False)
    assert not advice()


def made(
    accelerator: Accelerator, run: RunConfig, units: list[bool], began: list[str | None]
) -> tuple[str, list[str]]:
    """Precision and notes, on ranks with other hardware that see other folders."""
    rank = accelerator.process_index
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    launch.is_initialized = is_initialized
    launch.cpu_has_bf16 = launch.cpu_has_amx = lambda: units[rank]
    launch.first_precision = lambda run: began[rank]
    notes: list[str] = []
    return str(create_accelerator(run, notes).mixed_precision), notes


@pytest.mark.parametrize("asked", ["auto", "bf16"])
@pytest.mark.parametrize(
    ("units", "began", "expected"),
    [
        ([True, True], [None, None], "bf16"),
        ([True, False], [None, None], "no"),
        ([False, True], [None, None], "no"),
        ([True, False], ["bf16", None], "bf16"),  # rank 0's folder counts
        ([False, False], [None, "bf16"], "no"),
    ],
)
def test_ranks_with_other_hardware_agree(
    asked: Any, units: list[bool], began: list[str | None], expected: str
) -> None:
    run = RunConfig(use_cpu=True, mixed_precision=asked)
    (first, notes), (second, others) = run_ranks(2, made, run, units, began)
    assert first == second == expected and notes == others
    if not all(units):
        assert "a rank has n" in notes[0]  # no AMX, neither AMX nor AVX512_BF16


def test_a_second_run_of_a_process_has_the_precision_of_the_first(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As folds have: accelerate has one per process."""

    def several(accelerator: Accelerator) -> list[str]:
        launch.is_initialized = is_initialized
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        found = []
        for has_bf16 in (True, False):
            launch.cpu_has_bf16 = launch.cpu_has_amx = lambda has_bf16=has_bf16: has_bf16
            for asked in ("auto", "bf16"):
                run = RunConfig(use_cpu=True, mixed_precision=asked)  # type: ignore[arg-type]
                found.append(create_accelerator(run).mixed_precision)
        return found

    assert run_ranks(1, several) == [["bf16"] * 4]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("bertdist: --mixed_precision") for line in lines)


def test_accelerate_need_not_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "")
    assert choose_precision(RunConfig(), CPU)[0] == "no"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ""
