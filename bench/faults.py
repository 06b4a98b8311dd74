"""Random kills: is anything lost?

    python -m bench.faults --trials 200 --seed 1
    python -m bench.faults --trials 30 --seed 1 --launcher accelerate        # or torchrun
    python -m bench.faults --trials 40 --seed 1 --data mixture by_file       # streams of .gz files

A trial is one SIGKILL at a random moment of a small run: of one rank, of all ranks, or of their
launcher. Then the same command resumes. A run is killed up to three times, completes, and is
compared with an uninterrupted one: every weight and optimizer tensor, every line of metrics.jsonl
without measured times, loss and gradient norm of every step on every rank in hex (also of repeated
steps), best weights and predictions. Dropout is on, the last step of an epoch is smaller, and
evaluations, best weights and checkpoints come at different steps. With the data "mixture" and
"by_file", every start of a run has another number of loader workers.

Each rank is a real process with RANK and WORLD_SIZE in its environment and a gloo group over TCP,
started by bench.attempts. The uninterrupted run is always forked: a launcher does not change the
arithmetic. A fresh interpreter takes seconds before it trains, so two of three kills of launched
ranks happen during the steps, and the table counts those before. Exit code 1 if a run was not
identical.
"""

import argparse
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import string
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.attempts import LAUNCHERS, Attempt, Kill, attempt, output_of_launcher, output_of_ranks
from bench.machine import command, describe_machine
from bertdist.core.terminal import show_table

RANKS = {"forked": (1, 2, 3), "torchrun": (1, 2), "accelerate": (1, 2)}
MAX_KILLS_PER_RUN = 3
SHARE_IN_TRAINING = 2 / 3  # of the kills under a launcher
VOCABULARY = (
    "a an and bad best but dull film fine fun good great is it movie not of poor so the this very"
    " was warm worst"
).split()
CADENCES = {
    "eval_every": "4 steps",
    "save_every": "3 steps",
    "log_every": "2 steps",
    "num_train_epochs": "3",
    "train_batch_size": "8",
}
VICTIMS = ("one rank", "all ranks", "launcher")
# What is trained on -> flags. Of .gz files: "mixture", of two globs by weights, every rank reading
# all rows; "by_file", of one glob, each rank reading its own files.
STREAM = {"streaming": "true", "stream_window": "16"}
DATA: dict[str, dict[str, Any]] = {
    "map": {"train_file": ["train.tsv"]},
    "stream": {"train_file": ["train.tsv"], **STREAM},
    "mixture": {
        "train_file": ["small*.jsonl.gz", "part*.tsv.gz"],
        "train_weights": ["1", "2"],
        **STREAM,
    },
    "by_file": {"train_file": ["part*.tsv.gz"], "stream_sharding": "by_file", **STREAM},
}
USUAL_DATA = ("map", "stream")
MAX_WORKERS = 2  # loader workers, where their number changes
# ranks -> --tokens_per_micro_batch for about three micro-batches per step
TOKENS_PER_MICRO_BATCH = {1: "50", 2: "30", 3: "24"}


@dataclass(frozen=True)
class Scenario:
    """What runs, and which processes are killed."""

    source: str  # one of DATA
    ranks: int
    micro_batches: str  # "one" or "three" per step
    victims: str = ""  # one of VICTIMS
    launcher: str = "forked"


@dataclass
class Tally:
    """Results of the kills of one scenario."""

    kills: int = 0
    runs: int = 0
    lost: int = 0  # kills in runs that did not finish
    identical: int = 0  # kills in runs that ended bit for bit like the uninterrupted one
    before_first_step: int = 0  # kills before the first step of their attempt
    # kills of one rank after which one line named it, and there was no traceback
    one_line: int = 0
    survivors: int = 0  # kills of one rank of several
    # from the kill of one rank to the end of the last survivor
    seconds: list[float] = field(default_factory=list)


class FaultTest:
    """A model, data, and runs on them in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = dict[Scenario, Any]()
        self.seconds = dict[Scenario, tuple[float, float]]()
        folder.mkdir(parents=True)
        write_model(folder / "model")
        write_rows(folder / "train.tsv", 38, 1)
        for number, count in enumerate((13, 3, 7, 5, 9)):
            write_rows(folder / f"part{number}.tsv.gz", count, 10 + number)
        for number, count in enumerate((4, 3)):
            write_rows(folder / f"small{number}.jsonl.gz", count, 20 + number)
        write_rows(folder / "dev.tsv", 12, 2)

    def arguments(self, scenario: Scenario, out: Path, workers: int = 0) -> list[str]:
        settings: dict[str, Any] = {
            **CADENCES,
            **DATA[scenario.source],
            "model_name_or_path": self.folder / "model",
            "output_dir": out,
        }
        settings["train_file"] = [self.folder / name for name in settings["train_file"]]
        settings |= {
            "validation_file": self.folder / "dev.tsv",
            "learning_rate": "1e-3",
            "dataloader_num_workers": workers,
            "use_cpu": "true",
        }
        settings |= {
            "tokens_per_micro_batch": "8192"
            if scenario.micro_batches == "one"
            else TOKENS_PER_MICRO_BATCH[scenario.ranks],
            "rank_timeout": "20",
        }
        words: list[str] = []
        for name, value in settings.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    def uninterrupted(self, scenario: Scenario) -> Any:
        """`results_of` the uninterrupted run; it runs once."""
        plain = Scenario(scenario.source, scenario.ranks, scenario.micro_batches)
        if plain not in self.results:
            out = self.folder / f"uninterrupted_{len(self.results)}"
            begin = time.monotonic()
            result = attempt(self.arguments(plain, out), plain.ranks, out)
            assert result.succeeded, (self.folder, result.exit_codes, output_of_ranks(out))
            self.results[plain] = results_of(out, plain.ranks)
            self.seconds.setdefault(plain, (time.monotonic() - begin, 0.0))
        return self.results[plain]

    def durations(self, scenario: Scenario) -> tuple[float, float]:
        """Seconds of an uninterrupted attempt, and of its steps."""
        if scenario.launcher == "forked":
            self.uninterrupted(scenario)
            return self.seconds[Scenario(scenario.source, scenario.ranks, scenario.micro_batches)]
        plain = Scenario("", scenario.ranks, "", "", scenario.launcher)
        if plain not in self.seconds:
            out, begin = self.folder / "timed", time.monotonic()
            shutil.rmtree(out, ignore_errors=True)
            result = attempt(self.arguments(scenario, out), scenario.ranks, out, scenario.launcher)
            assert result.succeeded and result.first_step_at, (
                result.exit_codes,
                output_of_ranks(out),
                output_of_launcher(out),
            )
            left, expected = results_of(out, scenario.ranks), self.uninterrupted(scenario)
            assert left == expected, difference(left, expected)
            last = max(path.stat().st_mtime for path in out.glob("steps_*.log"))
            self.seconds[plain] = (
                time.monotonic() - begin,
                max(0.1, last - time.time() + time.monotonic() - result.first_step_at),
            )
        return self.seconds[plain]

    def random_kill(self, scenario: Scenario, out: Path, rng: random.Random) -> Kill:
        """A kill at a random time while steps remain."""
        total, steps = self.durations(scenario)
        done = max((int(path.name[5:]) for path in (out / "checkpoints").glob("step_*")), default=0)
        steps *= 1 - done / int(self.uninterrupted(scenario)["checkpoint"][5:])
        rank = rng.randrange(scenario.ranks) if scenario.victims == "one rank" else 0
        in_training = scenario.launcher != "forked" and rng.random() < SHARE_IN_TRAINING
        return Kill(
            scenario.victims, rank, rng.random() * (steps if in_training else total), in_training
        )

    def trial(self, scenario: Scenario, max_kills: int, rng: random.Random, tally: Tally) -> None:
        """One run with at most max_kills kills."""
        expected = self.uninterrupted(scenario)
        out = self.folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        kills, end = 0, Attempt()
        workers = [0]  # of each start
        if scenario.source not in USUAL_DATA:
            workers = rng.sample(range(MAX_WORKERS + 1), MAX_WORKERS + 1)

        def start(kill: Kill | None = None) -> Attempt:
            given = self.arguments(scenario, out, workers[kills % len(workers)])
            return attempt(given, scenario.ranks, out, scenario.launcher, kill)

        while not end.succeeded and kills < max_kills:
            kill = self.random_kill(scenario, out, rng)
            end = start(kill)
            if end.killed_at is None or state_of(out) == "finished":
                break  # it ended before the kill
            kills += 1
            tally.before_first_step += not end.had_steps
            if scenario.victims == "one rank":
                self.check_messages(scenario, out, kill, end, tally)
        end = start()
        result = results_of(out, scenario.ranks) if end.succeeded else None
        tally.kills, tally.runs = tally.kills + kills, tally.runs + 1
        tally.lost += kills if result is None else 0
        tally.identical += kills if result == expected else 0
        if result != expected:
            kept = Path(tempfile.mkdtemp(prefix="not_identical_")) / "run"
            shutil.copytree(out, kept)
            printed = f"{output_of_ranks(out)[-2000:]}\n{output_of_launcher(out)[-2000:]}"
            details = f"exit codes {end.exit_codes}\n{printed}"
            print(
                f"{scenario}: {difference(result, expected)}; kept in {kept}; {details}",
                file=sys.stderr,
            )

    def check_messages(
        self, scenario: Scenario, out: Path, kill: Kill, end: Attempt, tally: Tally
    ) -> None:
        """Count kills of one rank after which one line named it.

        The line is a survivor's, or that of a launcher that ended the survivors first.
        """
        assert end.killed_at is not None
        stderr, (pid,) = output_of_ranks(out), end.killed_pids
        lines = [line for line in stderr.splitlines() if line.startswith("bertdist: ")]
        named = len(lines) == 1 and f"rank {kill.rank} (process {pid} on " in lines[0]
        by_launcher = (
            not lines
            and re.search(rf"exitcode *: -9 \(pid: {pid}\)", output_of_launcher(out)) is not None
        )
        tally.survivors += 1
        tally.seconds.append(time.monotonic() - end.killed_at)
        one_line = (named or by_launcher) and "Traceback" not in stderr
        tally.one_line += one_line
        if not one_line:
            print(f"{scenario}, {kill}: not one line: {stderr[-1500:]}", file=sys.stderr)


def results_of(out: Path, ranks: int) -> dict[str, Any]:
    """Everything in a run folder that must not depend on when the run was killed."""
    from bertdist.training.throughput import MEASURED

    last = max((out / "checkpoints").glob("step_*"), key=lambda path: path.name)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    exact = [
        {name: value.hex() if isinstance(value, float) else value for name, value in line.items()}
        for line in lines
    ]
    kept = [{name: value for name, value in line.items() if name not in MEASURED} for line in exact]
    result: dict[str, Any] = {
        "metrics.jsonl": kept,
        "checkpoint": last.name,
        "state": json.loads((last / "state.json").read_text()),
    }
    for path in [
        *sorted(last.glob("*.safetensors")),
        *sorted((out / "best").glob("*.safetensors")),
    ]:
        result[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    for name in ("predictions.jsonl", "evaluation.json"):
        result[name] = (out / name).read_bytes()
    for rank in range(ranks):
        steps = defaultdict(set)
        for line in (out / f"steps_{rank}.log").read_text().splitlines():
            if len(parts := line.split(" ")) == 3:  # a killed rank's last line may be truncated
                steps[int(parts[0])].add(tuple(parts[1:]))
        result[f"steps of rank {rank}"] = dict(sorted(steps.items()))
    return result


def state_of(out: Path) -> str:
    """The state in status.json; "" without that file."""
    path = out / "status.json"
    return str(json.loads(path.read_text())["state"]) if path.exists() else ""


def difference(result: dict[str, Any] | None, expected: dict[str, Any]) -> str:
    """Names of the parts that differ."""
    if result is None:
        return "did not finish"
    return (
        ", ".join(name for name in {**expected, **result} if result.get(name) != expected.get(name))
        + " differ"
    )


def write_model(folder: Path) -> None:
    """A random BERT of 2 layers of width 32, and a tokenizer of letters and a few words."""
    import torch
    import transformers

    letters = string.ascii_lowercase
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    vocabulary += [word for word in VOCABULARY if word not in vocabulary]
    tokenizers: Any = transformers  # mypy does not see its lazy names
    tokenizers.BertTokenizerFast(
        vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)


def write_rows(path: Path, count: int, seed: int) -> None:
    """Rows of 2 to 20 words and a label: .tsv or .jsonl, and .gz."""
    rng = random.Random(seed)
    rows = [
        (" ".join(rng.choices(VOCABULARY, k=rng.randint(2, 20))), rng.choice(["no", "yes"]))
        for _ in range(count)
    ]
    lines = ["text\tlabel", *map("\t".join, rows)]
    if ".jsonl" in path.name:
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def scenarios(
    rng: random.Random, launcher: str = "forked", data: Sequence[str] = USUAL_DATA
) -> Iterator[Scenario]:
    """All scenarios again and again, each round in another order.

    Launchers are slow, so there the micro-batches are drawn at random.
    """
    forked, micro_batches = launcher == "forked", ("one", "three")
    one, many = (
        (["all ranks"], ["one rank", "all ranks"])
        if forked
        else (["all ranks", "launcher"], [*VICTIMS])
    )
    every = [
        Scenario(source, ranks, micro, victims, launcher)
        for source in data
        for ranks in RANKS[launcher]
        for micro in (micro_batches if forked else ("",))
        for victims in (many if ranks > 1 else one)
    ]
    while True:
        rng.shuffle(every)
        yield from (
            scenario if forked else replace(scenario, micro_batches=rng.choice(micro_batches))
            for scenario in every
        )


def print_table(tallies: dict[Scenario, Tally], path: Path | None) -> None:
    """Print the table, and write it as JSON."""
    header = ["run", "killed", "kills", "no step", "lost", "identical", "one line", "seconds"]
    sums: dict[tuple[Any, ...], Tally] = defaultdict(Tally)
    for scenario, one in tallies.items():
        for key in (
            (
                f"{scenario.source}, {scenario.ranks} rank{'s' if scenario.ranks > 1 else ''}",
                scenario.victims,
            ),
            ("all", ""),
        ):
            into = sums[key]
            for name in (
                "kills",
                "runs",
                "before_first_step",
                "lost",
                "identical",
                "one_line",
                "survivors",
            ):
                setattr(into, name, getattr(into, name) + getattr(one, name))
            into.seconds += one.seconds
    rows = []
    for key, one in sorted(sums.items(), key=lambda item: (item[0][0] == "all", str(item[0]))):
        most = f"< {max(one.seconds) + 0.1:.1f}" if one.seconds else "-"
        message = f"{one.one_line} of {one.survivors}" if one.survivors else "-"
        rows.append(
            [
                *key,
                str(one.kills),
                str(one.before_first_step),
                str(one.lost),
                str(one.identical),
                message,
                most,
            ]
        )
    show_table("Random SIGKILLs", header, rows)
    if path is not None:
        header_ = {
            "machine": describe_machine("cpu", 1, ["torch", "accelerate"]),
            "command": command("bench.faults"),
        }
        path.write_text(json.dumps({**header_, "header": header, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults", description="Random kills: is anything lost?"
    )
    parser.add_argument("--trials", type=int, default=20, help="Number of kills.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="forked", help="What starts the ranks."
    )
    parser.add_argument(
        "--data", nargs="+", choices=DATA, default=USUAL_DATA, help="What is trained on."
    )
    parser.add_argument("--output", type=Path, help="Write the table as JSON to this file.")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import bertdist.tasks.metrics
    import bertdist.train  # noqa: F401  before the ranks are forked

    rng, tallies = random.Random(args.seed), defaultdict[Scenario, Tally](Tally)
    with (
        tempfile.TemporaryDirectory(prefix="faults_") as name,
        contextlib.suppress(KeyboardInterrupt),
    ):
        faults = FaultTest(Path(name) / "stage")
        for scenario in scenarios(rng, args.launcher, args.data):
            left = args.trials - sum(tally.kills for tally in tallies.values())
            if left <= 0:
                break
            faults.trial(scenario, min(left, MAX_KILLS_PER_RUN), rng, tallies[scenario])
            done, same = (
                sum(getattr(tally, name) for tally in tallies.values())
                for name in ("kills", "identical")
            )
            message = f"{done} of {args.trials} kills; {same} ended in a bit for bit identical run."
            print(message, file=sys.stderr, flush=True)
    print_table(tallies, args.output)
    sys.exit(any(tally.identical < tally.kills for tally in tallies.values()))


if __name__ == "__main__":
    main()
