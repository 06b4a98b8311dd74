"""The benchmark measures what it says: all contenders train the same rows from the same weights, sums are right, pages stay whole.

Real runs of every contender, on a model of 2 layers of 32 and three steps, in forked processes. No timing is asserted.
"""

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import run_ranks
from rows import write_rows
from torch.utils.flop_counter import FlopCounterMode

from bench import compiled, figures, jobs, machine, page, peers, scaling
from bench.child import KINDS
from bench.flops import BERT_BASE, Shape, read_shape, training_flops
from bench.jobs import BenchError, Killed, PredictResult, StepRows, TrainResult

ROWS, BATCH, STEPS, LONGEST = 22, 8, 3, 40  # the last step is smaller
Answers = list[
    tuple[str, dict[str, Any], dict[str, Any]]
]  # (kind, job, answer) of each child, in order


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file to learn from and one to score; most texts are short, labels are names."""
    folder, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(3)
    words = "a best dull film fine fun great is it not poor the very was worst".split()
    made = {}
    for name, count in (("train", 40), ("dev", 9)):
        texts = [
            " ".join(random.choice(words, size=60 if i % 11 == 3 else random.integers(1, 12)))
            for i in range(count)
        ]
        rows = [
            {"text": text, "label": ("negative", "positive")[i % 2]} for i, text in enumerate(texts)
        ]
        made[name] = str(write_rows(folder / f"{name}.tsv", rows))
    return made


def forked_child(seen: Answers) -> jobs.Child:
    """A child that is a fork of the test, which has imported everything already; what it was asked and answered goes to `seen`."""
    _ = (
        transformers.Trainer,
        transformers.pipeline,
    )  # imported when they are first looked at: once, here

    def work(accelerator: Accelerator, kind: str, job: str) -> str:
        warnings.simplefilter(
            "default"
        )  # those of other libraries, in what is a process of its own outside of tests
        AcceleratorState._reset_state()  # the rank's has a precision
        return json.dumps(KINDS[kind](json.loads(job)))

    def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
        if kind == "matmul":
            job = {**job, "size": 32, "seconds": 0.01}
        answer: dict[str, Any] = json.loads(
            run_ranks(1, work, kind, json.dumps(job), timeout=100)[0]
        )
        seen.append((kind, job, answer))
        return answer

    return child


def words_of(model: Path, files: dict[str, str], output: Path, *more: str) -> list[str]:
    usual = f"""--batch_size {BATCH} --steps {STEPS} --steps_padded {STEPS} --untimed_steps 1 --repetitions 1 --rows {ROWS}
        --max_length {LONGEST} --use_cpu --threads 1 --title tiny"""
    paths = [
        "--model_name_or_path",
        str(model),
        "--train_file",
        files["train"],
        "--validation_file",
        files["dev"],
        "--output",
        str(output),
    ]
    return [*usual.split(), *paths, *more]


@pytest.fixture(scope="module")
def compared(
    tiny_model: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Answers, Path]:
    """All contenders, with a learning rate of 0: what each was asked and answered, and the page."""
    seen: Answers = []
    output = tmp_path_factory.mktemp("page") / "benchmarks.md"
    assert (
        peers.main(words_of(tiny_model, files, output, "--learning_rate", "0"), forked_child(seen))
        == 0
    )
    return seen, output


def runs_of(answers: Answers) -> dict[str, TrainResult]:
    return {
        job["contender"]: jobs.parse_train_result(answer)
        for kind, job, answer in answers
        if kind == "train"
    }


def test_all_contenders_train_the_same_rows_and_real_tokens(compared: tuple[Answers, Path]) -> None:
    runs = runs_of(compared[0])
    assert list(runs) == list("abcde")
    lengths = {}
    for name, run in runs.items():
        of_row = {
            row: length
            for step in run.seen
            for row, length in zip(step.rows, step.lengths, strict=True)
        }
        assert (
            sorted(row for step in run.seen for row in step.rows)
            == list(range(ROWS))
            == sorted(of_row)
        )
        assert [len(step.rows) for step in run.seen] == [8, 8, 6]
        assert len(run.stamps) == STEPS and run.stamps == sorted(run.stamps)
        lengths[name] = of_row
    assert (
        len(set(lengths["a"].values())) > 5 and max(lengths["a"].values()) == LONGEST
    )  # of different lengths, some truncated
    assert all(found == lengths["a"] for found in lengths.values())


def test_contenders_differ_in_padding_alone(compared: tuple[Answers, Path]) -> None:
    runs = runs_of(compared[0])
    cells = {name: [step.cells for step in run.seen] for name, run in runs.items()}
    assert cells["a"] == [sum(step.lengths) for step in runs["a"].seen]
    for name in "bc":
        assert cells[name] == [len(step.rows) * max(step.lengths) for step in runs[name].seen]
    assert cells["d"] == [8 * LONGEST, 8 * LONGEST, 6 * LONGEST]
    assert cells["e"] == [8 * 512, 8 * 512, 6 * 512]
    total = {name: sum(found) for name, found in cells.items()}
    assert (
        total["a"] < total["b"] < total["d"] < total["e"] and total["a"] < total["c"] < total["d"]
    )


def test_the_strategy_of_the_two_trainers_takes_effect(compared: tuple[Answers, Path]) -> None:
    """Grouped by length, a batch of so few rows is sorted, but for its first row (the longest row of all goes to the front)."""
    runs = runs_of(compared[0])
    is_sorted = {
        name: [
            step.lengths[1:] == sorted(step.lengths[1:], reverse=True) for step in runs[name].seen
        ]
        for name in "bc"
    }
    assert all(is_sorted["c"]) and not any(is_sorted["b"])
    assert runs["c"].seen[0].lengths[0] == max(
        length for step in runs["c"].seen for length in step.lengths
    )


def test_contenders_begin_with_the_same_weights(
    compared: tuple[Answers, Path], tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """They were trained with a learning rate of 0, so the final loss is that of the first weights, over the same rows."""
    losses = [run.loss for run in runs_of(compared[0]).values()]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-6)
    words = words_of(
        tiny_model, files, tmp_path / "page.md", "--learning_rate", "0", "--contenders", "a,b"
    )
    seen: Answers = []
    assert peers.main([*words, "--seed", "7"], forked_child(seen)) == 0
    other = [run.loss for run in runs_of(seen).values()]
    assert other == pytest.approx([other[0]] * 2, abs=1e-6) and abs(other[0] - losses[0]) > 1e-3


def test_contenders_learn_with_the_given_learning_rate(
    compared: tuple[Answers, Path], tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    seen: Answers = []
    words = words_of(
        tiny_model, files, tmp_path / "page.md", "--contenders", "a,b,d", "--learning_rate", "0.01"
    )
    assert peers.main(words, forked_child(seen)) == 0
    before, after = runs_of(compared[0]), runs_of(seen)
    assert list(after) == ["a", "b", "d"]
    assert all(abs(run.loss - before[name].loss) > 1e-3 for name, run in after.items())


def test_the_page_shows_every_contender_and_nothing_of_this_machine(
    compared: tuple[Answers, Path],
) -> None:
    text = compared[1].read_text()
    for key, name in jobs.CONTENDERS.items():
        assert f"| {key}  {name} | 2 |" in text  # timed steps
    assert (
        f"## Training, {machine.kind('cpu')}, float32: tiny" in text
        and "not run on a GPU" in text
        and "| e  Accelerate loop" in text
    )
    assert str(compared[1].parent) not in text and "/tmp" not in text and machine.cpu() in text
    assert "GFLOP/s before each round and after the last" in text and "other work took " in text
    name = page.slug(f"training {machine.kind('cpu')} float32 tiny")
    record = json.loads(compared[1].with_suffix(".json").read_text())[name]
    assert [bar[0] for bar in record["bars"]] == list(jobs.CONTENDERS.values())
    assert len(record["matmul"]) == 2 and "## Side by side" in text


def test_predictions_of_all_contenders_agree(
    tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    seen: Answers = []
    words = words_of(
        tiny_model,
        files,
        tmp_path / "page.md",
        "--prediction",
        "--learning_rate",
        "0.003",
        "--predictor_steps",
        "3",
    )
    assert peers.main(words, forked_child(seen)) == 0
    runs = {
        job["contender"]: PredictResult(**answer) for kind, job, answer in seen if kind == "predict"
    }
    assert {"bertdist", "pipeline"} <= set(runs)
    assert all(len(run.answers) == ROWS for run in runs.values())
    assert {label for label, _ in runs["bertdist"].answers} <= {"0", "1"}
    figures.assert_same_answers(runs)
    others = [(label, score + 2e-4) for label, score in runs["pipeline"].answers]
    with pytest.raises(BenchError, match="Text 0: bertdist says"):
        figures.assert_same_answers({**runs, "pipeline": replace(runs["pipeline"], answers=others)})
    assert "| pipeline |" in (tmp_path / "page.md").read_text()


def test_predictions_in_bf16_are_compared_with_float32(
    tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    seen: Answers = []
    extra = ["--learning_rate", "0.003", "--predictor_steps", "3", "--mixed_precision", "bf16"]
    words = words_of(tiny_model, files, tmp_path / "page.md", "--prediction", *extra)
    assert peers.main(words, forked_child(seen)) == 0
    asked = {job["contender"]: job for kind, job, _ in seen if kind == "predict"}
    precisions = {key: job["mixed_precision"] for key, job in asked.items()}
    others = {"bertdist": "bf16", "pipeline": "bf16", "sorted": "bf16"}
    assert precisions == {"float32": "no", **others}
    text = (tmp_path / "page.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| bertdist.predict")]
    cells = {
        words[0]: words for words in ([w.strip() for w in one[2:-2].split("|")] for one in lines)
    }
    assert cells["bertdist.predict, float32"][-2:] == ["", ""]  # what the others are compared with
    (record,) = json.loads((tmp_path / "page.json").read_text()).values()
    assert record["bars"][0][0] == "bertdist.predict"  # what the overview compares with
    furthest = float(cells["bertdist.predict"][-1])
    assert 1e-6 < furthest < 0.05  # the two are of different precisions


def test_accuracy_and_differences_of_predictions_are_counted() -> None:
    def said(*answers: tuple[str, float]) -> PredictResult:
        return PredictResult(seconds=1.0, answers=[*answers], process_mib=1.0, device="cpu")

    one = said(("0", 0.9), ("1", 0.6), ("1", 0.8))
    other = said(("0", 0.8), ("0", 0.55), ("1", 0.8))
    assert figures.accuracy(one, ["0", "1", "0"]) == pytest.approx(2 / 3)
    assert figures.other_labels(one, other) == 1
    # 0.6 of label 1 and 0.45 of label 1
    assert figures.difference(one, other) == pytest.approx(0.15)
    table = figures.prediction_table(
        {"a": "A", "bertdist": "B"}, {"a": [one], "bertdist": [other]}, ["0", "1", "0"]
    )
    assert "| A | 3.00 | 1 | 1.00 x | 0.6667 |  |  |" in table
    assert "| B | 3.00 | 1 |  | 0.3333 | 1 | 1.5e-01 |" in table


def test_accuracy_is_that_of_the_rows_of_validation(
    tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    seen: Answers = []
    words = words_of(
        tiny_model, files, tmp_path / "page.md", "--accuracy", "--seeds", "2", "--seed", "5"
    )
    assert peers.main(words, forked_child(seen)) == 0
    trained = [
        (job["contender"], job["seed"], answer["accuracy"])
        for kind, job, answer in seen
        if kind == "train"
    ]
    assert [found[:2] for found in trained] == [("a", 5), ("b", 5), ("a", 6), ("b", 6)]
    assert all(round(accuracy * 9, 6) in range(10) for _, _, accuracy in trained)  # of nine rows
    assert "| seed 5 | seed 6 |" in (tmp_path / "page.md").read_text()


def test_accuracy_in_bf16_is_compared_with_that_in_float32(
    tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    seen: Answers = []
    words = words_of(tiny_model, files, tmp_path / "page.md", "--accuracy_in_bf16", "--seeds", "2")
    assert peers.main(words, forked_child(seen)) == 0
    trained = [
        (job["contender"], job["mixed_precision"], job["seed"], answer["seen"], answer["loss"])
        for kind, job, answer in seen
        if kind == "train"
    ]
    order = [("a", "no", 42), ("a", "bf16", 42), ("a", "no", 43), ("a", "bf16", 43)]
    assert [found[:3] for found in trained] == order
    for float32, bf16 in (trained[:2], trained[2:]):  # the same rows per step, rounded otherwise
        assert float32[3] == bf16[3] and 0 < abs(float32[4] - bf16[4]) < 0.05
    assert trained[0][3] != trained[2][3]  # the control: another seed
    text = (tmp_path / "page.md").read_text()
    assert "| bertdist, bf16 | " in text and "| bertdist, float32 minus bertdist, bf16 | " in text


def test_every_round_begins_with_another_contender(
    tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    asked: list[str] = []

    def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
        asked.append(job["contender"] if kind == "train" else kind)
        if kind != "train":
            return unused_child(kind, job)
        return json.loads(json.dumps({**vars(run_with_stamps([1.0, 2.0, 3.0]))}))  # type: ignore[no-any-return]

    words = words_of(tiny_model, files, tmp_path / "page.md", "--contenders", "a,b,c")
    assert peers.main([*words, "--repetitions", "4"], child) == 0
    rounds = " ".join(asked).removeprefix("rows matmul ").split(" matmul")
    assert [each.split() for each in rounds] == [*map(list, ("abc", "bca", "cab", "abc")), []]


@pytest.mark.parametrize(
    ("flags", "kind", "described"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16", "CPU with AMX", "amx_bf16, avx512_bf16, avx512f"),
        ("avx512f avx512_bf16", "CPU with AVX512_BF16", "no amx_bf16, avx512_bf16, avx512f"),
        ("avx512f avx512_bf16x", "CPU", "no amx_bf16, no avx512_bf16, avx512f"),
        ("", "CPU", "no amx_bf16, no avx512_bf16, no avx512f"),
    ],
)
def test_the_page_says_what_the_cpu_can_do(
    flags: str, kind: str, described: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name\t: A CPU\nflags\t: {flags} x\n")
    assert (machine.kind("cpu"), machine.kind("H100")) == (kind, "GPU")
    text = machine.describe_machine("cpu", 1, [])
    assert text.startswith(f"CPU only, not run on a GPU; A CPU ({described}), ")


def test_the_page_says_how_busy_the_machine_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick, statistics = os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    monkeypatch.setattr(machine, "STATISTICS", statistics)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.26, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    clock, own = iter([100.0, 110.0]), iter([1.0, 9.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(machine, "own_seconds", lambda: next(own))
    # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
    statistics.write_text(f"cpu {50 * tick} 0 0 99 99 0 0 0 7 7\ncpu0 1\n")
    load = machine.Load()
    statistics.write_text(f"cpu {56 * tick} {tick} {2 * tick} 0 0 0 0 {tick} 9 9\ncpu0 1\n")
    # 10 s of work, 8 of them one's own, in 20 s of two cores
    assert load.describe() == (
        "Load average 0.3 at the start; other work took 10% of the cores meanwhile."
    )
    monkeypatch.setattr(machine, "STATISTICS", tmp_path / "none")
    monkeypatch.undo()
    assert machine.own_seconds() > 0 and (machine.busy_seconds() or 1) > 0


# Sums, from stamps written by hand.

SHAPE = Shape(layers=1, hidden=2, intermediate=3, vocabulary=10)  # 28 linear weights
STEPS_SEEN = [StepRows([0, 1], [5, 3], 10), StepRows([2, 3], [4, 6], 12), StepRows([4], [10], 10)]


def run_with_stamps(stamps: list[float], loss: float = 0.5) -> TrainResult:
    return TrainResult(
        stamps=stamps,
        seen=STEPS_SEEN,
        process_mib=100.0,
        child_mib=20.0,
        device_mib=None,
        device="cpu",
        loss=loss,
        accuracy=None,
    )


def test_figures_are_those_of_the_timed_steps() -> None:
    found = figures.timed_figures(
        run_with_stamps([50.0, 51.0, 54.0]), 1, SHAPE
    )  # 4 s for rows of 4, 6 and 10 tokens
    assert (found.tokens_per_second, found.rows_per_second, found.ms_per_step) == (
        5.0,
        0.75,
        2000.0,
    )
    assert (found.tokens_per_row, found.cells_per_token) == (20 / 3, 22 / 20)
    assert found.flops_per_second == (6 * 28 * 20 + 12 * (16 + 36 + 100) * 2 * 1) / 4
    assert (found.memory_mib, found.child_mib, found.device_mib, found.loss) == (
        120.0,
        20.0,
        None,
        0.5,
    )
    assert (
        figures.timed_figures(run_with_stamps([50.0, 51.0, 54.0]), 2, SHAPE).tokens_per_second
        == 10 / 3
    )


def test_tables_say_median_and_spread_and_ratios_go_by_repetition() -> None:
    def repeated(*seconds: float) -> list[figures.Figures]:
        return [
            figures.timed_figures(run_with_stamps([1.0, 1.5, 1.0 + time]), 1, SHAPE)
            for time in seconds
        ]

    runs = {
        "a": repeated(1.0, 2.0, 4.0),
        "b": repeated(4.0, 4.0, 40.0),
    }  # tokens/s: 20, 10, 5 and 5, 5, 0.5
    table = figures.training_table(
        {"a": "ours", "b": "theirs"}, runs, {"a": 2, "b": 2}, matmul=70_080.0
    ).splitlines()
    assert (
        table[0].startswith("|  | timed steps | real tokens/s | rows/s | ms per step |")
        and "GPU" not in table[0]
    )
    assert table[2] == (
        "| a  ours | 2 | 10.0 (5.00-20.0) | 1.50 (0.75-3.00) | 1,000 (500-2,000) | 6.7 | 1.10 | 120 | 20 | 0.00 "
        "| 5.00 (2.50-10.0) | 0.5000 |"
    )
    assert (
        figures.ratio_table({"a": "ours", "b": "theirs"}, runs).splitlines()[2]
        == (
            "| b  theirs | 4.00 (2.00-10.00) x | 4.00 (2.00-10.00) x | 1.00 x |"  # 20 / 5, 10 / 5, 5 / 0.5; not the medians' 10 / 5
        )
    )
    assert figures.ratio_table({"b": "theirs"}, {"b": runs["b"]}) == ""


def test_memory_on_a_gpu_has_a_column_where_there_was_one() -> None:
    on_gpu = [
        replace(figures.timed_figures(run_with_stamps([1.0, 2.0, 3.0]), 1, SHAPE), device_mib=mib)
        for mib in (64.0, 16.0)
    ]
    runs = {"a": on_gpu[:1], "b": on_gpu[1:]}
    assert "GPU peak, MiB" in figures.training_table(
        {"a": "ours", "b": "theirs"}, runs, {"a": 2, "b": 2}, 1.0
    )
    assert "| 4.00 x |" in figures.ratio_table({"a": "ours", "b": "theirs"}, runs)


def test_accuracies_are_compared_seed_by_seed() -> None:
    table = figures.accuracy_table(
        {"a": "ours", "b": "theirs"}, [1, 2], {"a": [0.75, 0.5], "b": [0.5, 0.75]}
    ).splitlines()
    assert table[2] == "| ours | 0.7500 | 0.5000 | 0.6250 (0.5000 to 0.7500) |"
    assert table[4] == "| ours minus theirs | 0.2500 | -0.2500 | 0.0000 (-0.2500 to 0.2500) |"


WRONG: list[tuple[list[StepRows], str]] = [
    (
        [StepRows([0, 1], [5, 3], 10), StepRows([2, 3], [4, 6], 12), StepRows([3], [6], 6)],
        "Contender b did not train each of 5 rows once",
    ),
    (
        [StepRows([0, 1], [5, 3], 10), StepRows([2, 3], [4, 6], 12), StepRows([4], [9], 9)],
        "b trained 5 rows of 27 tokens, a trained 5 rows of 28",
    ),
]


@pytest.mark.parametrize(("seen", "message"), WRONG)
def test_contenders_that_trained_other_rows_are_refused(seen: list[StepRows], message: str) -> None:
    right = run_with_stamps([1.0, 2.0, 3.0])
    figures.assert_same_rows({"a": right, "b": right})
    with pytest.raises(BenchError, match=message):
        figures.assert_same_rows({"a": right, "b": replace(right, seen=seen)})
    figures.assert_same_rows(
        {"a": right, "d": replace(right, seen=STEPS_SEEN[:1])}
    )  # fewer steps: other rows


def test_another_label_is_refused() -> None:
    def said(label: str) -> PredictResult:
        return PredictResult(
            seconds=1.0, answers=[("0", 0.6), (label, 0.5)], process_mib=1.0, device="cpu"
        )

    figures.assert_same_answers({"x": said("1"), "y": said("1")})
    with pytest.raises(BenchError, match=r"Text 1: x says 1 0\.500000, y says 0"):
        figures.assert_same_answers({"x": said("1"), "y": said("0")})


def test_the_flops_are_those_that_torch_counts(tiny_model: Path) -> None:
    """The encoder of a real BERT, forward and backward, on texts of 7 and 12 tokens."""
    bert = transformers.AutoModel.from_pretrained(tiny_model, attn_implementation="eager")
    shape = read_shape(tiny_model)
    with FlopCounterMode(display=False) as counter:
        for length in (7, 12):
            inputs = torch.randn(1, length, 32, requires_grad=True)
            bert.encoder(inputs).last_hidden_state.sum().backward()
    assert (
        counter.get_total_flops()
        == training_flops(shape, [7, 12])
        != training_flops(shape, [9.5, 9.5])
    )


def test_weights_are_those_of_the_model(tiny_model: Path) -> None:
    bert = transformers.AutoModel.from_pretrained(tiny_model)
    assert read_shape(tiny_model).weights == sum(
        parameter.numel() for parameter in bert.parameters()
    )
    assert BERT_BASE.weights == 109_482_240


# The page.

PAGE = """# Title
By hand.
<!-- bench: one -->
old
<!-- end of bench: one -->
Between.

## What limits it
<!-- by hand -->
Memory.
<!-- end of by hand -->
"""


def test_a_section_replaces_itself_and_nothing_else() -> None:
    changed = page.replace_section(PAGE, "one", "new\n")
    assert changed == PAGE.replace("old", "new")
    added = page.replace_section(changed, "two", "more")
    assert added == changed.replace(
        "## What", "<!-- bench: two -->\nmore\n<!-- end of bench: two -->\n\n## What"
    )
    assert page.replace_section(added, "two", "more") == added
    assert (
        page.replace_section("# Only\n", "two", "more")
        == "# Only\n\n<!-- bench: two -->\nmore\n<!-- end of bench: two -->\n"
    )


@pytest.mark.parametrize(
    "torn",
    [
        PAGE.replace("<!-- end of bench: one -->", ""),
        PAGE.replace("<!-- bench: one -->", ""),
        PAGE + "<!-- bench: one -->\n<!-- end of bench: one -->",
        "<!-- end of bench: one -->\n<!-- bench: one -->",
    ],
)
def test_torn_markers_are_an_error_and_the_page_stays(torn: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(torn)
    with pytest.raises(BenchError, match="expected one pair"):
        page.write(tmp_path / "page.md", "one", "new", {})
    assert (tmp_path / "page.md").read_text() == torn and sorted(tmp_path.iterdir()) == [
        tmp_path / "page.md"
    ]


def test_the_chart_shows_all_sections_and_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="the chart needs matplotlib (pip install -e '.[bench]')"
    )
    output = tmp_path / "page.md"
    for name, most in (("one", 3.0), ("two", 4.0)):
        said = page.write(
            output,
            name,
            "text",
            {"title": f"title {name}", "unit": "rows/s", "bars": [["bertdist", 2.0, 1.0, most]]},
        )
    assert "page.svg is drawn" in said
    drawn = (tmp_path / "page.svg").read_text()
    assert "title one" in drawn and "title two" in drawn
    page.write(
        output,
        "two",
        "text",
        {"title": "title two", "unit": "rows/s", "bars": [["bertdist", 2.0, 1.0, 4.0]]},
    )
    assert (tmp_path / "page.svg").read_text() == drawn
    page.write(
        output,
        "two",
        "text",
        {"title": "title two", "unit": "rows/s", "bars": [["bertdist", 3.0, 1.0, 4.0]]},
    )
    assert (tmp_path / "page.svg").read_text() != drawn


def test_machines_stand_side_by_side(tmp_path: Path) -> None:
    output = tmp_path / "page.md"
    unit = "tokens/s"
    old = {
        "title": "M, CPU, float32",
        "unit": unit,
        "bars": [["ours", 200.0, 190.0, 210.0], ["b", 50.0, 50.0, 50.0]],
    }
    new = {
        "title": "M, CPU with AMX, bf16",
        "unit": unit,
        "bars": [["ours", 900.0, 900.0, 900.0], ["c", 300.0, 300.0, 300.0]],
    }
    other = {"title": "M, CPU, float32", "unit": "rows/s", "bars": [["ours", 7.0, 7.0, 7.0]]}
    for name, record in (("new", new), ("old", old), ("other", other), ("none", {})):
        page.write(output, name, f"## {name}", record)
    text = output.read_text()
    lines = text[text.index("## Side by side") : text.index("<!-- end of bench: overview")].split(
        "\n"
    )
    assert [line for line in lines if line.startswith("| ")] == [
        "| tokens/s, median | M, CPU, float32 | M, CPU with AMX, bf16 |",
        "| --- | ---: | ---: |",
        "| ours | 200 | 900 |",
        "| b | 50.0 (4.00 x) |  |",
        "| c |  | 300 (3.00 x) |",
        "| rows/s, median | M, CPU, float32 |",
        "| --- | ---: |",
        "| ours | 7.00 |",
    ]
    assert text.index("overview") < text.index("## new") < text.index("## old")
    output.write_text("by hand")  # the control: a page without the comments
    page.write(output, "new", "## new", new)
    assert "Side by side" not in output.read_text()


def test_without_matplotlib_the_page_is_written_and_the_chart_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "page.svg is not drawn: matplotlib is not installed" in page.write(
        tmp_path / "page.md", "one", "text", {}
    )
    assert "text" in (tmp_path / "page.md").read_text() and not (tmp_path / "page.svg").exists()


def test_commands_show_no_path_of_this_machine() -> None:
    words = [
        "--train_file",
        "/home/me/data/sst2/train.tsv",
        "--output=/tmp/x.md",
        "--model_name_or_path",
        "demo/model",
        "--rows",
        "3",
    ]
    assert machine.command("bench.peers", words) == (
        "python -m bench.peers --train_file sst2/train.tsv --output=tmp/x.md --model_name_or_path demo/model --rows 3"
    )


# What a user can mend.


def unused_child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    return {"rows": 100, "labels": ["0", "1"]} if kind == "rows" else {"flops_per_second": 1.0}


MISTAKES: list[tuple[list[str], str]] = [
    (
        ["--model_name_or_path", "demo/modle"],
        "--model_name_or_path demo/modle: no config.json there, expected a model folder",
    ),
    (
        ["--train_file", "gone.tsv"],
        "--train_file gone.tsv: there is no such file; for the default, run: python launch/demo.py",
    ),
    (
        ["--contenders", "a,f"],
        "--contenders a,f: unknown contender 'f'; expected some of a,b,c,d,e.",
    ),
    (
        ["--untimed_steps", "3"],
        "22 rows make 3 steps of 8, and --untimed_steps 3 leaves none to time",
    ),
    (
        ["--accuracy", "--validation_file", "gone.tsv"],
        "--validation_file gone.tsv: there is no such file",
    ),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES)
def test_mistakes_are_one_line(
    more: list[str],
    message: str,
    tiny_model: Path,
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
        return {**unused_child(kind, job), "rows": ROWS}

    assert peers.main(words_of(tiny_model, files, tmp_path / "page.md", *more), child) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ") and message in line
    assert not (tmp_path / "page.md").exists()


def test_a_contender_that_is_killed_is_told_and_the_others_go_on(
    tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
        if kind != "train":
            return unused_child(kind, job)
        if job["contender"] == "e":
            raise Killed("killed, probably because memory ran out")
        return json.loads(json.dumps({**vars(run_with_stamps([1.0, 2.0, 3.0]))}))  # type: ignore[no-any-return]

    assert (
        peers.main(
            words_of(tiny_model, files, tmp_path / "page.md", "--contenders", "a,b,e"), child
        )
        == 0
    )
    text = (tmp_path / "page.md").read_text()
    assert (
        "e, Accelerate loop, padded to the model's longest: killed, probably because memory ran out."
        in text
    )
    assert "| b  Trainer, defaults | 2 |" in text and "| e  " not in text


def test_a_child_is_a_process_of_its_own_and_its_last_line_is_told() -> None:
    found = jobs.run_child(
        "matmul", {"dtype": "float32", "use_cpu": True, "size": 8, "seconds": 0.01, "threads": 1}
    )
    assert found["flops_per_second"] > 0
    with pytest.raises(BenchError, match=r"rows  ended with code 1: .*gone\.tsv"):
        jobs.run_child(
            "rows",
            {
                "file": "gone.tsv",
                "rows": 3,
                "rows_file": "",
                "text_column": None,
                "label_column": None,
            },
        )


# Scaling.

CLUSTER = scaling.Cluster(
    flops_per_second=1000.0, bytes_within=400.0, bytes_between=40.0, ranks_a_node=2
)


def test_dealing_by_hand() -> None:
    """Rows of 1 to 4 tokens on two ranks: longest first, 4 + 1 and 3 + 2. Attention aside, operations go with tokens."""
    flat = Shape(layers=1, hidden=1000, intermediate=1, vocabulary=1)
    texts = scaling.Texts(size=np.array([10, 10, 10, 10]), tokens=np.array([1, 2, 3, 4]))
    found = scaling.balance_steps(texts, flat, 2, 4, most_steps=5, seed=1)
    assert found is not None and found.steps == 1
    assert found.by_tokens == pytest.approx(1.0, abs=1e-3)
    assert found.flops == training_flops(flat, [1, 2, 3, 4]) / 2
    at_random = {
        round(scaling.balance_steps(texts, flat, 2, 4, most_steps=5, seed=seed).at_random, 1)
        for seed in range(30)
    }  # type: ignore[union-attr]
    assert at_random == {1.0, 1.2, 1.4}  # 5 + 5, 6 + 4, 7 + 3
    assert scaling.balance_steps(texts, flat, 2, 6, most_steps=5, seed=1) is None


def test_the_ring_and_what_the_backward_pass_hides() -> None:
    shape = Shape(
        layers=1, hidden=2, intermediate=3, vocabulary=10, positions=4
    )  # 32 of its weights are embeddings
    assert CLUSTER.all_reduce(100, 1) == 0
    assert CLUSTER.all_reduce(100, 2) == 2 * 1 / 2 * 400 / 400  # within a node
    assert CLUSTER.all_reduce(100, 4) == 2 * 3 / 4 * 400 / 40
    embeddings = 32 * 4 / 400
    assert shape.embedding_weights == 32
    assert CLUSTER.exposed_all_reduce(shape, 2, compute=1000.0) == embeddings  # all else is hidden
    rest = (shape.weights - 32) * 4 / 400
    assert CLUSTER.exposed_all_reduce(shape, 2, compute=0.3) == pytest.approx(
        embeddings + rest - 0.2
    )


def test_what_is_lost_adds_up() -> None:
    found = scaling.BalancedSteps(
        ranks=2, rows=8, steps=1, at_random=1.5, by_size=1.25, by_tokens=1.0, flops=2000.0
    )
    time = scaling.step_time(found, 1.25, BERT_BASE, replace(CLUSTER, bytes_within=float("inf")))
    assert (time.mean, time.stragglers, time.all_reduce, time.step) == (2.0, 0.5, 0.0, 2.5)
    assert scaling.rows_for(0.9, found, BERT_BASE, replace(CLUSTER, bytes_within=float("inf"))) == 1
    assert (
        scaling.rows_for(0.9, found, BERT_BASE, CLUSTER)
        > scaling.rows_for(0.5, found, BERT_BASE, CLUSTER)
        > 1
    )


def test_scaling_writes_its_section(
    tiny_model: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--train_file",
        files["train"],
        "--model_name_or_path",
        str(tiny_model),
        "--ranks",
        "2",
        "4",
        "--rows_a_rank",
        "8",
    ]
    assert (
        scaling.main([*words, "--global_batch", "64", "--output", str(tmp_path / "page.md")]) == 0
    )
    text = (tmp_path / "page.md").read_text()
    assert "## Scaling (computed)" in text and re.search(
        r"^\| 4 \| 32 \| 8 \| 1 \|", text, flags=re.MULTILINE
    )
    assert "do not fill one step: 64 rows on 2 ranks; 64 rows on 4 ranks." in text
    assert capsys.readouterr().out.strip() in text


MISSING: list[Callable[[Path, dict[str, str]], list[str]]] = [
    lambda model, files: ["--train_file", "gone.tsv", "--model_name_or_path", str(model)],
    lambda model, files: ["--train_file", files["train"], "--model_name_or_path", "gone"],
    lambda model, files: [
        "--train_file",
        files["train"],
        "--model_name_or_path",
        str(model),
        "--text_column",
        "gone",
    ],
]


@pytest.mark.parametrize("words", MISSING)
def test_scaling_tells_what_is_missing(
    words: Callable[[Path, dict[str, str]], list[str]],
    tiny_model: Path,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert scaling.main(words(tiny_model, files)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ") and "gone" in line


# ---- Eager and compiled steps


def test_eager_and_compiled_steps_take_turns(tiny_model: Path, files: dict[str, str]) -> None:
    words = f"--train_file {files['train']} --model_name_or_path {tiny_model} --batch_size 8 --steps 2 --rounds 2"
    calls: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        return lambda *args: (calls.append(1), graph(*args))[1]

    def child(accelerator: Accelerator) -> Any:
        return *compiled.compare(compiled.parser().parse_args(words.split()), counting), len(calls)

    ((eager, quick, said, count),) = run_ranks(1, child)
    assert (
        eager > 0 < quick
        and said.startswith("--torch_compile: the layers are compiled (")
        and " 2 steps of " in said
    )
    assert count == 2 + 2 * 2  # one layer: when it was compiled, and half of the steps

    def broken(accelerator: Accelerator) -> Any:
        with pytest.raises(BenchError, match="cannot take effect"):
            compiled.compare(compiled.parser().parse_args(words.split()), "no_such_backend")

    run_ranks(1, broken)
