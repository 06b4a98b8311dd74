"""The GPU kit on a CPU: every stage with a tiny model; what fails, and what has no time left, does not end the others."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import run_ranks

from bench import contenders, gpu, gpu_jobs
from bench.child import KINDS
from bench.jobs import BenchError, Killed, TimeLimit, run_child
from bertdist.models import compile
from bertdist.models.architectures import ARCHITECTURES

Report = dict[str, Any]

TESTS = """
import pytest
def test_right(): pass
def test_wrong():
    found = 1 + 1
    assert found == 3
@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass
"""


def forked_child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """A child that is a fork of the test, which has imported everything already."""
    _ = transformers.Trainer, transformers.pipeline

    def work(accelerator: Accelerator, text: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)  # to be made anew, in bf16
        if job.get("contender") == "f":  # flash-attn is for GPUs; the rest of the way is the same
            contenders.FLATTENED_ATTENTION = "sdpa"
        if "--torch_compile" in job.get("flags", ()):  # inductor takes seconds
            compile.compile_layers = partial(compile.compile_layers, backend="eager")
        return json.dumps(KINDS[kind](json.loads(text)))

    answer: dict[str, Any] = json.loads(run_ranks(1, work, json.dumps(job), timeout=200)[0])
    return answer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Report, str]]:
    """The report of the tiny kit, and its page."""
    folder = tmp_path_factory.mktemp("kit")
    tests = folder / "test_sums.py"
    tests.write_text(TESTS)
    words = ["--device", "cpu", "--tiny", "--tests", str(tests), "--output", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.Kit, "reason_to_skip", lambda *unused: None)  # f too
        assert gpu.main(words, forked_child) == 0
    report: Report = json.loads((folder / "out" / "report.json").read_text())
    yield report, (folder / "out" / "report.md").read_text()


def results_of(report: Report, name: str) -> list[Report]:
    (entry,) = [entry for entry in report["stages"] if entry["name"] == name]
    results: list[Report] = entry["results"]
    return results


def test_every_stage_runs_on_a_cpu(tiny: tuple[Report, str]) -> None:
    report, page = tiny
    assert {entry["name"]: entry["status"] for entry in report["stages"]} == {
        stage.name: "done" for stage in gpu.stages(True, "")
    }
    assert "Not run on a GPU" in page
    assert report["versions"]["torch"] == torch.__version__ and report["commit"]
    machine = {
        name: value for each in results_of(report, "machine") for name, value in each.items()
    }
    assert machine["rows"] == 40 and machine["matmul_flops"] > 0 and machine["device"] == "cpu"


def test_families_are_right_and_a_mistake_is_seen(tiny: tuple[Report, str]) -> None:
    report, page = tiny
    found = results_of(report, "families")
    assert [each["family"] for each in found] == list(gpu_jobs.FAMILIES)
    assert {*gpu_jobs.FAMILIES} == {*ARCHITECTURES}
    for each in found:
        assert each["wrong"] == [] and each["kernel"] == "buckets", each
        exact, mistaken = (
            each["differences"][f"bertdist, {what}"]
            for what in ("float32", "one token in the wrong text")
        )
        assert max(exact) < 1e-4 and min(mistaken) > 0.03, each  # the control
    assert page.count("| right (buckets) |") == len(found)


def test_a_wrong_family_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The control of the verdict: an answer that is off by a tenth, and an exception."""
    real = gpu_jobs.distance
    monkeypatch.setattr(
        gpu_jobs, "distance", lambda *both: tuple(each + 0.1 for each in real(*both))
    )
    job = {"folder": str(tmp_path), "tiny": True, "use_cpu": True, "families": ["bert", "unknown"]}
    wrong, failed = gpu_jobs.families(job)
    assert wrong["wrong"] == ["logits", "gradients"]
    assert failed["family"] == "unknown" and failed["error"].startswith("KeyError")


def test_what_tests_say_is_in_the_report(tiny: tuple[Report, str]) -> None:
    report, page = tiny
    counts, failed = results_of(report, "tests")
    assert counts == {"counts": {"failure": 1, "passed": 1, "skipped": 1}}
    assert failed["failed"].endswith("test_wrong")
    assert any("assert 2 == 3" in line for line in failed["tail"])
    assert "assert 2 == 3" in page


def test_all_ways_train_the_same_tokens(tiny: tuple[Report, str]) -> None:
    report, page = tiny
    ways = [e["name"] for e in report["stages"] if e["job"] == "contender" and e["name"] != "epoch"]
    assert len(ways) == 7
    found = {name: results_of(report, name)[0] for name in ways}
    assert {(each["batch_size"], each["steps"]) for each in found.values()} == {(8, 4)}
    padding = {name: each["cells_per_token"] for name, each in found.items()}
    assert padding["Trainer, defaults"] > 1.05
    assert padding["bertdist"] == padding["transformers without padding"] == 1
    (compiled,) = found["bertdist --torch_compile"]["notes"]
    assert compiled.startswith("--torch_compile: the layers are compiled") and compiled in page
    (line,) = {
        note for each in results_of(report, "bertdist --cuda_graphs") for note in each["notes"]
    }
    assert "--cuda_graphs cannot take effect" in line and line in page
    epochs = results_of(report, "epoch")
    assert [(each["batch_size"], each["steps"]) for each in epochs] == [(8, 5)]


def test_profile_and_prediction(tiny: tuple[Report, str]) -> None:
    report, page = tiny
    for profile in results_of(report, "profile"):
        assert len(profile["top"]) == 20 and profile["wall_ms"] > profile["kernel_ms"] / 4 > 0
        assert sum(kernel["share"] for kernel in profile["top"]) <= 1
    assert "| `aten::" in page
    both = {each["contender"]: each for each in results_of(report, "prediction")}
    assert {name: each["rows"] for name, each in both.items()} == {"bertdist": 20, "pipeline": 20}


def test_kernels_of_a_gpu_are_counted_once() -> None:
    """By hand: neither the operator that launched a kernel nor an annotation around it adds time."""

    def event(key: str, kind: str, count: int, microseconds: float, note: bool = False) -> Any:
        return SimpleNamespace(
            key=key,
            count=count,
            device_type=SimpleNamespace(name=kind),
            self_device_time_total=microseconds,
            self_cpu_time_total=9000.0,
            is_user_annotation=note,
        )

    events = [
        event("aten::mm", "CPU", 8, 0.0),
        event("short", "CUDA", 4, 1000.0),
        event("AdamW.step", "CUDA", 2, 4000.0, note=True),
        event("gemm", "CUDA", 2, 3000.0),
    ]
    found = gpu_jobs.top_kernels(SimpleNamespace(key_averages=lambda: events), steps=2)
    assert found["kernel_ms"] == 2.0 and found["kernels_per_step"] == 3
    first = {"name": "gemm", "calls": 1.0, "ms": 1.5, "share": 0.75}
    assert found["top"][0] == first and len(found["top"]) == 2


class Clock:
    """Seconds that pass when a child runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_with(
    tmp_path: Path, seconds: dict[str, float], errors: dict[str, BenchError], *words: str
) -> tuple[int, Report, dict[str, float]]:
    """The report where stages take so long or fail, and the limit that each was given."""
    clock, limits = Clock(), {}

    def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
        name = next(
            s.name for s in gpu.stages(False, "") if {**job, **s.settings, "name": s.job} == job
        )
        limits[name] = job["time_limit"]
        clock.now += min(job["time_limit"], seconds.get(name, 5.0))
        hangs = seconds.get(name, 0) > job["time_limit"]
        if job["name"] == "machine" and not hangs:
            facts = {
                "device": "a GPU",
                "missing": [],
                "rows": 100,
                "memory_gib": 1,
                "capability": 9,
            }
            Path(job["results"]).write_text(json.dumps(facts) + "\n")
        if hangs:
            raise TimeLimit(f"after its {job['time_limit']:.0f} seconds")
        if name in errors:
            raise errors[name]
        return {}

    code = gpu.main(["--output", str(tmp_path), "--tests", "", *words], child, clock)
    return code, json.loads((tmp_path / "report.json").read_text()), limits


def test_a_failing_stage_does_not_end_the_others(tmp_path: Path) -> None:
    errors = {"tests": BenchError("gpu  ended with code 1: it broke"), "profile": Killed("killed")}
    code, report, _ = run_with(tmp_path, {}, errors)
    status = {entry["name"]: entry["status"] for entry in report["stages"]}
    assert code == 1 and len(status) == len(gpu.stages(False, ""))
    assert {name for name, each in status.items() if each != "done"} == {*errors}
    assert (
        "| tests | failed: gpu  ended with code 1: it broke |"
        in (tmp_path / "report.md").read_text()
    )
    assert run_with(tmp_path, {}, {})[0] == 0  # the control


def test_the_time_is_kept(tmp_path: Path) -> None:
    """All stages hang: each is ended at its limit, the last ones are not begun, and 9 minutes are not exceeded."""
    names = [stage.name for stage in gpu.stages(False, "")]
    code, report, limits = run_with(tmp_path, dict.fromkeys(names, 1e9), {})
    assert code == 1 and report["seconds"] <= 540
    assert report["stages"][0]["message"] == "after its 120 seconds"
    # without the model nothing can be trained
    assert [e["status"] for e in report["stages"][:3]] == ["ended"] * 3
    assert all(e["status"] == "skipped" for e in report["stages"][3:])
    slow = {name: 1e9 for name in names if name != "machine"}
    _, report, limits = run_with(tmp_path, slow, {})
    assert report["seconds"] <= 540
    assert all(limits[stage.name] >= stage.needs for stage in gpu.stages(False, ""))
    _, report, limits = run_with(tmp_path, slow, {}, "--minutes", "2")
    assert set(limits) == {"machine", "families", "tests", "bertdist", "Trainer, defaults"}
    assert report["stages"][-1]["message"] == "it needs about 20 seconds, and 10 are left"


def test_a_child_is_ended_at_its_limit(tmp_path: Path) -> None:
    """With the results that it had."""
    tests, results = tmp_path / "test_long.py", tmp_path / "results.jsonl"
    tests.write_text("import time\ndef test_long(): time.sleep(300)\n")
    job = {"name": "tests", "tests": str(tests), "seconds": 300, "folder": str(tmp_path)}
    with pytest.raises(TimeLimit, match="after its 2 seconds"):
        run_child("gpu", {**job, "results": str(results), "time_limit": 2})
    assert results.read_text() == ""


def test_without_a_gpu_it_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
        Path(job["results"]).write_text('{"device": "cpu"}\n')
        return {}

    assert gpu.main(["--output", str(tmp_path)], child) == 1
    assert "there is no CUDA GPU here; --device cpu --tiny tries the kit" in capsys.readouterr().err
    assert gpu.main(["--only", "speed"], child) == 1
    assert (
        "there is no stage 'speed'; expected some of: machine, families" in capsys.readouterr().err
    )
