"""All that a CUDA GPU can show of bertdist, in one call of at most nine minutes.

    python -m bench.gpu                        # writes gpu-report/report.md and report.json
    python -m bench.gpu --device cpu --tiny    # the same calls in seconds; the figures mean nothing

Stages, each in a process of its own: the tests in tests/gpu; every family of models against Hugging
Face; BERT-base against Trainer, and with --torch_compile and --cuda_graphs; a profile; prediction;
an epoch of SST-2. A stage that fails does not end the others. Each has a limit, and is not begun
when too little time is left; the report is written after every stage. docs/gpu.md has the rest.

This process imports the standard library only (bench/jobs.py); what runs in the children is
bench/gpu_jobs.py.
"""

import argparse
import datetime
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine
from bench.gpu_page import render
from bench.jobs import ROOT, BenchError, Child, TimeLimit, run_child
from bench.stage import log

PACKAGES = ("bertdist", "torch", "transformers", "accelerate", "triton", "flash-attn", "datasets")
TRAIN_FILES = (ROOT / "sst2" / "train.tsv", ROOT.parent / "shared" / "data" / "sst2" / "train.tsv")


class Stage(NamedTuple):
    """One part of the report."""

    name: str
    job: str  # of bench.gpu_jobs
    needs: float  # seconds: not begun when fewer are left
    most: float  # seconds: ended after them
    settings: dict[str, Any]


def stages(tiny: bool, tests: str) -> list[Stage]:
    """All stages, the most important first."""
    # (rows per step, steps): of these the first are not timed; None: an epoch
    sizes = [(8, 4)] if tiny else [(32, 100), (256, 50)]
    untimed = 2 if tiny else 10
    found = [
        Stage("machine", "machine", 20, 120, {"seconds": 0.01 if tiny else 2.0}),
        Stage("families", "families", 25, 60, {}),
        Stage("tests", "tests", 40, 120, {"tests": tests}),
    ]

    def training(name: str, contender: str, *flags: str, needs: float = 20) -> Stage:
        how = {"contender": contender, "flags": flags, "sizes": sizes}
        return Stage(name, "contender", needs, 2.5 * needs, {**how, "untimed_steps": untimed})

    found += [
        training("bertdist", "a"),
        training("Trainer, defaults", "b"),
        training("Trainer, group_by_length", "c"),
        Stage(
            "epoch",
            "contender",
            35,
            75,
            {"sizes": [(size, None) for size, _ in sizes[::-1]], "untimed_steps": untimed},
        ),
        Stage(
            "profile",
            "profile",
            20,
            45,
            {"sizes": [(size, 2 if tiny else 10) for size, _ in sizes], "untimed_steps": untimed},
        ),
        Stage("prediction", "prediction", 20, 45, {"most_rows": 20 if tiny else 20_000}),
        training("bertdist --cuda_graphs", "a", "--cuda_graphs"),
        training("bertdist --torch_compile", "a", "--torch_compile", needs=30),
        training(
            "bertdist --torch_compile --cuda_graphs",
            "a",
            "--torch_compile",
            "--cuda_graphs",
            needs=30,
        ),
        training("transformers without padding", "f"),
    ]
    # a CPU that others use too, perhaps
    return [stage._replace(most=5 * stage.most) for stage in found] if tiny else found


class Kit:
    """Runs stages within the time that there is, and keeps the report of them."""

    def __init__(
        self,
        args: argparse.Namespace,
        words: Sequence[str],
        child: Child,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.args, self.child, self.clock, self.begin = args, child, clock, clock()
        self.report: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "command": machine.command("bench.gpu", words),
            "commit": args.commit or commit(),
            "cpu": f"{machine.cpu()}, {machine.cores()} cores",
            "python": sys.version.split()[0],
            "versions": {name: machine.package_version(name) for name in PACKAGES},
            "driver": driver(),
            "tiny": args.tiny,
            "minutes": args.minutes,
            "stages": [],
        }

    def left(self) -> float:
        """Seconds until the end of the time that was given."""
        return 60 * float(self.args.minutes) - (self.clock() - self.begin)

    def run(self, stage: Stage, needed_later: float, folder: Path) -> None:
        """Run one stage, or say why not, and write the report."""
        left, begin = self.left(), self.clock()
        entry: dict[str, Any] = {"name": stage.name, "job": stage.job, "results": []}
        results = folder / f"{len(self.report['stages'])}.jsonl"
        if reason := self.reason_to_skip(stage, left):
            entry |= {"status": "skipped", "message": reason}
        else:
            limit = min(stage.most, max(stage.needs, left - needed_later))
            log(f"{stage.name}: at most {limit:.0f} of the {left:.0f} seconds that are left")
            job = {**self.shared(folder), **stage.settings, "name": stage.job}
            if stage.job == "tests":  # pytest is to write its report before its process is ended
                job["seconds"] = max(1.0, limit - 15)
            try:
                self.child("gpu", {**job, "results": str(results), "time_limit": limit})
                entry["status"] = "done"
            except TimeLimit as error:
                entry |= {"status": "ended", "message": str(error)}
            except Exception as error:  # whatever it is, the other stages run
                kind = "" if isinstance(error, BenchError) else f"{type(error).__name__}: "
                entry |= {"status": "failed", "message": f"{kind}{error}"}
            if results.exists():
                entry["results"] = [json.loads(line) for line in results.read_text().splitlines()]
            entry["seconds"] = round(self.clock() - begin, 1)
        self.report["stages"].append(entry)
        log(": ".join([stage.name, entry["status"], *filter(None, [entry.get("message")])]))
        self.write()

    def reason_to_skip(self, stage: Stage, left: float) -> str | None:
        """Why a stage is not begun."""
        if left < stage.needs:
            return f"it needs about {stage.needs:.0f} seconds, and {max(0, left):.0f} are left"
        if stage.name == "machine":
            return None
        if stage.job in ("contender", "profile", "prediction") and not self.facts("rows"):
            return "there are no model and rows: the stage machine did not make them"
        if stage.settings.get("contender") == "f" and "flash_attn" in self.facts("missing"):
            return "flash-attn is not installed"
        return None

    def facts(self, name: str) -> Any:
        """What the stage machine found under a name; empty without it."""
        entries = [entry for entry in self.report["stages"] if entry["name"] == "machine"]
        found = [result[name] for entry in entries for result in entry["results"] if name in result]
        return found[0] if found else ()

    def shared(self, folder: Path) -> dict[str, Any]:
        """What every job is given."""
        tokenizer, train_file = self.args.tokenizer, self.args.train_file
        if train_file is None and tokenizer and not self.args.tiny:
            train_file = next((str(path) for path in TRAIN_FILES if path.is_file()), None)
        return {
            "folder": str(folder),
            "model": str(folder / "model"),
            "rows_file": str(folder / "rows.jsonl"),
            "rows": self.facts("rows") or 0,
            "tiny": self.args.tiny,
            "use_cpu": self.args.device == "cpu",
            "tokenizer": tokenizer,
            "train_file": train_file,
        }

    def write(self) -> None:
        """report.json and report.md, as far as they are."""
        self.report["seconds"] = round(self.clock() - self.begin, 1)
        self.args.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.report, indent=1)
        (self.args.output / "report.json").write_text(text + "\n", encoding="utf-8")
        (self.args.output / "report.md").write_text(render(self.report), encoding="utf-8")


def commit() -> str:
    """The commit of this clone, with a + if files differ from it; unknown without git."""
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return shown.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git here, and no --commit"


def driver() -> str | None:
    """The NVIDIA driver's version; None without nvidia-smi."""
    try:
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.split("\n")[0].strip()


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Test and measure bertdist on a CUDA GPU.",
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--output", type=Path, default=Path("gpu-report"), help="Folder of the report.")
    add("--minutes", type=float, default=9.0, help="Time for all stages together.")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the kit.")
    add("--tiny", action="store_true", help="A tiny model and few steps, to try the kit.")
    add(
        "--tokenizer",
        help="Folder of a tokenizer. Default: one made here, whose words are one token each.",
    )
    add(
        "--train_file",
        help="SST-2's training rows. Default: with --tokenizer sst2/train.tsv in this clone, if it"
        " is there; else synthetic rows of SST-2's lengths.",
    )
    add("--tests", default=str(ROOT / "tests" / "gpu"), help="Tests to run.")
    add("--only", help="Names of stages, separated by commas, besides machine. Default: all.")
    add("--commit", help="What the report names as the commit, where there is no git.")
    return found


def main(
    words: Sequence[str] | None = None,
    child: Child = run_child,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Command line; returns exit code 0, or 1 if a stage failed or after a user's mistake."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))  # so that the child ends too
    chosen = stages(args.tiny, args.tests)
    if args.only:
        only = {"machine", *args.only.split(",")}
        if unknown := sorted(only - {stage.name for stage in chosen}):
            names = ", ".join(stage.name for stage in chosen)
            log(f"--only {args.only}: there is no stage {unknown[0]!r}; expected some of: {names}.")
            return 1
        chosen = [stage for stage in chosen if stage.name in only]
    kit = Kit(args, words, child, clock)
    with tempfile.TemporaryDirectory(prefix="bench_gpu_") as name:
        for i, stage in enumerate(chosen):
            kit.run(stage, sum(later.needs for later in chosen[i + 1 :]), Path(name))
            if stage.name == "machine" and args.device == "cuda" and kit.facts("device") == "cpu":
                log("there is no CUDA GPU here; --device cpu --tiny tries the kit without one.")
                return 1
    print((args.output / "report.md").read_text(encoding="utf-8"))
    return int(any(entry["status"] in ("failed", "ended") for entry in kit.report["stages"]))


if __name__ == "__main__":
    sys.exit(main())
