"""best/ holds what a run says it holds: removed, damaged, swapped, a link, of another run."""

import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forked import run_ranks
from rows import (
    Files,
    assert_same_tensors,
    at_step,
    best_at,
    both,
    die,
    json_of,
    last_checkpoint,
    run_main,
    some_of,
    tensors_of,
    words_of,
    write_split,
)
from safetensors.torch import load_file, save_file

from bertdist.core import atomic_io
from bertdist.core.atomic_io import find_damage
from bertdist.predict import Predictor

STEPS, BEST = 6, 4


class Run(NamedTuple):
    """A finished run of 6 steps, whose best step is 4, and its arguments."""

    out: Path
    words: list[str]


def command(model: Path, out: Path, files: Files, **settings: Any) -> list[str]:
    usual = {
        "max_train_steps": STEPS,
        "eval_every": "2 steps",
        "save_every": "1 steps",
        "save_total_limit": 99,
    }
    return words_of(model, out, files, **{**usual, **settings})


def said_by(words: list[str], code: int = 0, n: int = 1, breaking: Any = None) -> str:
    """What a run says; its exit code is `code` on all ranks."""
    results = run_ranks(n, run_main, words, breaking)
    said = "".join(said for _, said, _ in results)
    assert {result[0] for result in results} == {code}, said
    return str(said)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    words = command(tiny_model, folder / "out", write_split(folder, 24, 8))
    said = said_by(words, breaking=best_at(2, BEST))
    assert f"best weights (step {BEST}) in" in said
    return Run(folder / "out", words)


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy, to be broken."""
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    return Run(out, [*finished.words, "--output_dir", str(out)])


def assert_all_agree(out: Path, step: int, said: str) -> None:
    """The last sentence, best/, evaluation.json and the checkpoint are of one step."""
    assert f"best weights (step {step}) in {out / 'best'}." in said
    assert find_damage(out / "best", required=["model.safetensors"]) is None
    assert json_of(out / "best" / "config.json")["bertdist"]["step"] == step
    assert json_of(last_checkpoint(out) / "state.json")["train_state"]["best_step"] == step
    weights = tensors_of(out / "checkpoints" / f"step_{step:06d}")
    best = tensors_of(out / "best")
    assert best
    for name, tensor in best.items():
        assert (weights[name.replace(": ", ": model.")] == tensor).all(), name


# ---- The same command, after a finished run


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_an_intact_one_is_left_alone(run: Run, n: int) -> None:
    before = (run.out / "best" / "model.safetensors").stat().st_mtime_ns
    assert_all_agree(run.out, BEST, said_by(run.words, n=n))
    assert (run.out / "best" / "model.safetensors").stat().st_mtime_ns == before
    assert json_of(run.out / "evaluation.json")["step"] == BEST


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_removed_one_is_written_again(run: Run, n: int) -> None:
    before = tensors_of(run.out / "best")
    shutil.rmtree(run.out / "best")
    said = said_by(run.words, n=n)
    assert f"{run.out / 'best'} was not there: written again from the checkpoint of step 4" in said
    assert_all_agree(run.out, BEST, said)
    assert_same_tensors(before, tensors_of(run.out / "best"))


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_one_of_another_run_with_the_same_best_step_is_kept_aside(run: Run, n: int) -> None:
    before, best = tensors_of(run.out / "best"), run.out / "best"
    other = shutil.copytree(best, run.out.parent / "other")

    def fill(folder: Path) -> None:
        shutil.copytree(other, folder, dirs_exist_ok=True)
        (folder / atomic_io.MANIFEST).unlink()
        weights = {k: x * 1.5 for k, x in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    atomic_io.write_folder(best, fill)
    assert find_damage(best, required=["model.safetensors"]) is None
    said = said_by(run.words, n=n)
    assert f"Renamed {best} to best.kept: it is of another step or run." in said
    assert_all_agree(run.out, BEST, said)
    assert_same_tensors(before, tensors_of(best))
    assert "Renamed" not in said_by(run.words, n=n)  # the control: now it is this run's


@pytest.mark.parametrize(
    "change",
    [
        {"scores": {"loss": 9.0, "accuracy": 1.0}},  # of another run with the same best step
        {"scores": {"loss": 0.5, "accuracy": "abc"}},
        {"scores": None},
    ],
)
def test_an_evaluation_of_another_run_or_without_scores_is_written_again(
    run: Run, change: dict[str, Any]
) -> None:
    report = json_of(run.out / "evaluation.json")
    (run.out / "evaluation.json").write_text(json.dumps(report | change))
    said = said_by(run.words)
    assert f"evaluation.json is not of the best weights, step {BEST}: not shown." in said
    assert json_of(run.out / "evaluation.json") == report


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_without_its_checkpoint_nothing_is_claimed(run: Run, n: int) -> None:
    shutil.rmtree(run.out / "best")
    shutil.rmtree(run.out / "checkpoints" / "step_000004")
    said = said_by(run.words, code=1, n=n)
    (line,) = [line for line in said.splitlines() if line.startswith("bertdist: ")]
    rank = "rank 0: " if n > 1 else ""
    assert line == (
        f"bertdist: {rank}The best weights, of step 4, are not in {run.out / 'best'}, and there is no "
        "checkpoint of that step to write them again. Copy them back, or train in another "
        "--output_dir."
    )
    assert "Finished" not in said


def test_a_flipped_bit_is_named_and_the_folder_is_kept(run: Run) -> None:
    before, path = tensors_of(run.out / "best"), run.out / "best" / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.unlink()  # `before` is mapped from it
    path.write_bytes(damaged)
    said = said_by(run.words)
    assert (
        f"{run.out / 'best'} is damaged: model.safetensors is not what was written (its digest "
        "differs). Renamed to best.damaged." in said
    )
    assert_all_agree(run.out, BEST, said)
    assert_same_tensors(before, tensors_of(run.out / "best"))
    assert (run.out / "best.damaged" / "model.safetensors").read_bytes() == damaged


def change_config(best: Path, **metadata: Any) -> None:
    """Other metadata in config.json, as if it had been written so."""
    config = json_of(best / "config.json")
    config["bertdist"] |= metadata
    config["bertdist"] = {name: x for name, x in config["bertdist"].items() if x is not None}
    (best / "config.json").write_text(json.dumps(config))
    manifest = json_of(best / "manifest.json")
    size, digest = (best / "config.json").stat().st_size, atomic_io._digest(best / "config.json")
    manifest["files"]["config.json"] = {"bytes": size, "xxh3_128": digest}
    (best / "manifest.json").write_text(json.dumps(manifest))


def test_one_of_another_step_is_kept_beside(run: Run) -> None:
    change_config(run.out / "best", step=3)
    said = said_by(run.words)
    assert f"Renamed {run.out / 'best'} to best.kept: it is of another step or run." in said
    assert_all_agree(run.out, BEST, said)
    assert json_of(run.out / "best.kept" / "config.json")["bertdist"]["step"] == 3


def test_one_of_an_older_version_is_taken(run: Run) -> None:
    """It has no step."""
    change_config(run.out / "best", step=None)
    before = (run.out / "best" / "model.safetensors").stat().st_mtime_ns
    assert "best weights (step 4) in" in said_by(run.words)
    assert (run.out / "best" / "model.safetensors").stat().st_mtime_ns == before


def test_removed_checkpoints_do_not_cost_the_best_weights(run: Run) -> None:
    shutil.rmtree(run.out / "checkpoints")
    before = tensors_of(run.out / "best")
    said = said_by(run.words, code=1)
    (line,) = [line for line in said.splitlines() if line.startswith("bertdist: ")]
    assert line == (
        f"bertdist: {run.out} holds the best weights of a finished run and no checkpoint: the run "
        "would start again and replace them. Use another --output_dir, or remove "
        f"{run.out / 'best'}."
    )
    assert_same_tensors(before, tensors_of(run.out / "best"))
    shutil.rmtree(run.out / "best")
    # Without validation rows nothing would replace what the earlier run left.
    at = run.words.index("--validation_file")
    words = [*run.words[:at], *run.words[at + 2 :]]
    at = words.index("--eval_every")
    said = said_by([*words[:at], *words[at + 2 :]])
    assert f"No checkpoint in {run.out / 'checkpoints'}: training starts at the first step." in said
    assert (
        "Removed evaluation.json, predictions.jsonl, errors.jsonl, probabilities.parquet of an earlier run."
        in said
    )
    assert "Scores per label" not in said and not (run.out / "evaluation.json").exists()
    assert_all_agree(run.out, STEPS, said)


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_one_that_was_changed_on_purpose_is_left_as_it_is(run: Run, n: int) -> None:
    """Other label names and no manifest.json, as the guide says."""
    config = run.out / "best" / "config.json"
    changed = config.read_text().replace('"negative"', '"bad"')
    config.write_text(changed)
    (run.out / "best" / "manifest.json").unlink()
    said = said_by(run.words, n=n)
    assert f"{run.out / 'best'} has no manifest.json: taken as changed on purpose." in said
    assert config.read_text() == changed and "written again" not in said
    shutil.rmtree(run.out / "checkpoints" / "step_000004")
    assert f"best weights (step {BEST}) in" in said_by(run.words, n=n)
    assert config.read_text() == changed
    # Negative controls: half a copy lacks the manifest too; with one the change is damage.
    weights = run.out / "best" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert f"{run.out / 'best'} is damaged: manifest.json is missing." in said_by(run.words, 1, n)


def test_a_change_beside_the_manifest_is_damage_with_the_remedy(run: Run) -> None:
    config = run.out / "best" / "config.json"
    changed = config.read_text().replace('"negative"', '"bad"')
    config.write_text(changed)
    said = said_by(run.words)
    assert "If it was changed on purpose: remove manifest.json there and rename it back." in said
    shutil.rmtree(run.out / "best")
    (run.out / "best.damaged" / "manifest.json").unlink()
    (run.out / "best.damaged").rename(run.out / "best")
    assert "taken as changed on purpose" in said_by(run.words)
    assert config.read_text() == changed


@pytest.mark.parametrize(
    "status",
    [
        {"state": "preempted", "step": 4, "reason": ""},
        {"state": "failed", "step": 4, "reason": "x"},
        None,  # half a copy
    ],
)
def test_an_interrupted_run_without_checkpoints_does_not_replace_its_best_weights(
    run: Run, status: dict[str, Any] | None
) -> None:
    shutil.rmtree(run.out / "checkpoints")
    (run.out / "status.json").unlink()
    if status is not None:
        (run.out / "status.json").write_text(json.dumps(status))
    before = {path: path.read_bytes() for path in run.out.rglob("*.json*") if path.is_file()}
    weights = tensors_of(run.out / "best")
    said = said_by(run.words, code=1)
    assert f"{run.out} holds the best weights of an earlier run and no checkpoint: " in said
    assert_same_tensors(weights, tensors_of(run.out / "best"))
    kept = ("best", "evaluation.json", "predictions.jsonl", "metrics.jsonl")
    assert {path.name for path in before} >= set(kept[1:])
    for path, content in before.items():
        if path.parent.name in kept or path.name in kept:
            assert path.read_bytes() == content, path


@pytest.mark.parametrize("other", [[], ["--learning_rate", "0.5"]])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    run: Run, other: list[str]
) -> None:
    shutil.rmtree(run.out / "checkpoints")
    (run.out / "status.json").write_text('{"state": "running", "step": 0, "reason": ""}')
    # As this process has them: copied, the folder has another name than the run.
    config = (run.out / "config.yaml").read_text()
    old = next(line for line in config.splitlines() if line.startswith("output_dir:"))
    (run.out / "config.yaml").write_text(config.replace(old, f"output_dir: {run.out}"))
    (run.out / "best" / "thesis.txt").write_text("years")
    before = tensors_of(run.out / "best")
    words = [*run.words, *other]
    said = said_by(words, breaking=best_at(2, BEST))
    assert f"No checkpoint in {run.out / 'checkpoints'}: training starts at the first step." in said
    kept = run.out / "best.kept"
    if other:
        assert (
            f"Renamed {run.out / 'best'} to best.kept: the run before had other settings." in said
        )
        assert_same_tensors(before, tensors_of(kept))
    else:
        assert_same_tensors(before, tensors_of(run.out / "best"))
        assert os.listdir(kept) == ["thesis.txt"]


@pytest.mark.parametrize(("n", "name"), [(1, "evaluation.json"), (2, "predictions.jsonl")])
def test_removed_results_of_a_finished_run_are_written_again(run: Run, n: int, name: str) -> None:
    results = ("evaluation.json", "predictions.jsonl")
    before = {result: (run.out / result).read_bytes() for result in results}
    scores = json_of(run.out / "evaluation.json")["scores"]
    assert "written again" not in said_by(run.words, n=n)
    for removed in (name, "metrics.jsonl", "config.yaml"):
        (run.out / removed).unlink()
    said = said_by(run.words, n=n)
    assert (
        f"evaluation.json, predictions.jsonl, errors.jsonl, probabilities.parquet of the best weights (step {BEST}) were not all in "
        f"{run.out}: written again." in said
    )
    assert f"metrics.jsonl is not in {run.out}; nothing can write it again." in said
    after = {result: (run.out / result).read_bytes() for result in results}
    assert n > 1 or after == before  # on one process the same bytes
    assert json_of(run.out / "evaluation.json")["scores"] == pytest.approx(scores, abs=1e-6)
    assert len(after["predictions.jsonl"].splitlines()) == 8
    assert f"Scores per label, step {BEST}" in said and (run.out / "config.yaml").exists()


def test_results_of_other_weights_are_not_those_of_the_best(run: Run) -> None:
    """The control: the last weights have other predictions, and their evaluation is not shown."""
    before = (run.out / "predictions.jsonl").read_bytes()
    report = json_of(run.out / "evaluation.json")
    (run.out / "evaluation.json").write_text(json.dumps(report | {"step": STEPS}))
    assert f"Scores per label, step {BEST}" in said_by(run.words)
    assert json_of(run.out / "evaluation.json") == report
    assert (run.out / "predictions.jsonl").read_bytes() == before
    (run.out / "predictions.jsonl").unlink()
    last = last_checkpoint(run.out) / "model.safetensors"
    weights = {name.removeprefix("model."): value for name, value in load_file(last).items()}
    save_file(weights, run.out / "best" / "model.safetensors", {"format": "pt"})
    (run.out / "best" / "manifest.json").unlink()  # a change on purpose
    said_by(run.words)
    assert (run.out / "predictions.jsonl").read_bytes() != before


# ---- Resuming


def test_a_finished_run_in_another_folder_brings_its_best_weights(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "other"
    resumed = [*run.words, "--output_dir", str(out), "--resume_from_checkpoint"]
    said = said_by([*resumed, str(run.out / "checkpoints" / "step_000006")])
    assert (
        f"best weights (step 4) in {out / 'best'}." in said and "Scores per label, step 4" in said
    )
    assert_same_tensors(tensors_of(run.out / "best"), tensors_of(out / "best"))
    assert find_damage(out / "best", required=["model.safetensors"]) is None


def test_a_run_in_another_folder_selects_anew_without_the_checkpoint(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "other"
    shutil.rmtree(run.out / "checkpoints" / "step_000004")
    words = [*run.words, "--output_dir", str(out), "--resume_from_checkpoint"]
    said = said_by([*words, str(run.out / "checkpoints" / "step_000005")])
    assert (
        f"The best weights, of step 4, are not in {out / 'best'}: the next evaluation counts as "
        "the best so far." in said
    )
    assert_all_agree(out, 6, said)
    assert json_of(out / "evaluation.json")["step"] == 6


@pytest.mark.parametrize(
    ("eval_every", "n"),
    some_of([("2 steps", 2), ("5 steps", 1)], product(("2 steps", "5 steps"), (1, 2))),
)
def test_best_weights_of_a_later_step_than_the_checkpoint(
    tiny_model: Path, tmp_path: Path, n: int, eval_every: str
) -> None:
    """Killed after the evaluation of step 4, before its checkpoint: that of step 3 is the last."""
    out, files = tmp_path / "out", write_split(tmp_path, 24, 8)
    words = command(tiny_model, out, files, save_every="3 steps", eval_every="2 steps")
    with pytest.raises(Exception, match="ended with status 9"):
        run_ranks(n, run_main, words, both(best_at(2, 4), at_step(4, die)))
    assert json_of(out / "best" / "config.json")["bertdist"]["step"] == 4
    assert last_checkpoint(out).name == "step_000003"
    words = [*words, "--eval_every", eval_every, "--save_every", "1 steps"]
    said = said_by(words, n=n, breaking=best_at(2, 4))
    step = 4 if eval_every == "2 steps" else 5
    assert ("The best weights so far, of step 2, are not in best/: those of step 5" in said) == (
        step == 5
    )
    assert_all_agree(out, step, said)
    assert json_of(out / "evaluation.json")["step"] == step
    assert f"Scores per label, step {step}" in said


# ---- Links


def test_a_link_in_place_of_best_is_refused_before_training(run: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run.out / "best", elsewhere)
    (run.out / "best").symlink_to(elsewhere)
    assert_all_agree(run.out, BEST, said_by(run.words))  # read, where nothing is to be written
    for step in (5, 6):
        shutil.rmtree(run.out / "checkpoints" / f"step_00000{step}")
    before = tensors_of(elsewhere)
    said = said_by(run.words, code=1)
    (line,) = [line for line in said.splitlines() if line.startswith("bertdist: ")]
    assert line == (
        f"bertdist: {run.out / 'best'} is a symbolic link to {elsewhere}, and a run replaces best "
        "as a whole: remove the link, or use another --output_dir."
    )
    assert (run.out / "best").is_symlink()
    assert_same_tensors(before, tensors_of(elsewhere))


def test_an_old_checkpoint_that_is_a_link_stays(run: Run, tmp_path: Path) -> None:
    checkpoints, elsewhere = run.out / "checkpoints", tmp_path / "elsewhere"
    for step in (5, 6):
        shutil.rmtree(checkpoints / f"step_00000{step}")
    shutil.move(checkpoints / "step_000001", elsewhere)
    (checkpoints / "step_000001").symlink_to(elsewhere)
    (checkpoints / "step_000002" / "thesis.txt").write_text("years")
    (checkpoints / ".step_notes").mkdir()
    (checkpoints / ".step_notes" / "a.txt").write_text("years")
    said = said_by([*run.words, "--save_total_limit", "2"], breaking=best_at(2, 4))
    assert f"{checkpoints / 'step_000002.kept'} keeps files that no run wrote." in said
    assert sorted(os.listdir(checkpoints)) == [
        ".step_notes",
        "step_000001",
        "step_000002.kept",
        "step_000005",
        "step_000006",
    ]
    assert find_damage(elsewhere) is None and (checkpoints / "step_000001").is_symlink()
    assert (checkpoints / ".step_notes" / "a.txt").read_text() == "years"
    assert os.listdir(checkpoints / "step_000002.kept") == ["thesis.txt"]


# ---- Prediction


def test_prediction_names_a_changed_file(run: Run) -> None:
    best = run.out / "best"
    answers = Predictor(best)(["a good film"])
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        path = best / name
        whole = path.read_bytes()
        # a byte that leaves the file readable
        changed = whole.replace(b"negative", b"nagative") if name == "config.json" else whole
        if name == "model.safetensors":
            changed = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        if name == "tokenizer_config.json":
            changed = whole + b"\n"
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(Exception, match=name) as caught:
            Predictor(best)
        assert str(caught.value).startswith(f"--model {best}: {name} ")
        assert str(caught.value).endswith(
            "Use an intact copy; if the file was changed on purpose, remove "
            f"{best / 'manifest.json'}."
        )
        path.write_bytes(whole)
    assert Predictor(best)(["a good film"]) == answers
    (best / "manifest.json").unlink()  # a folder of another program, or changed on purpose
    (best / "thesis.txt").write_text("years")
    assert Predictor(best)(["a good film"]) == answers
