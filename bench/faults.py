"""Random kills: is anything lost?

    python -m bench.faults --trials 200 --seed 1
    python -m bench.faults --trials 30 --seed 1 --launcher accelerate        # or torchrun

A trial is one SIGKILL at a random moment of a small run, of one rank, of all, or of the launcher that has started them; the same command
then goes on. A run is killed up to three times, then left to its end, and compared with one that nobody disturbed: every weight and
optimizer tensor, every line of metrics.jsonl that does not tell of time, loss and gradient norm of every step on every rank in hex (also
of steps that were taken twice), best weights and predictions. Dropout is on; the last step of an epoch is ragged; evaluations, best
weights and checkpoints come at different steps.

Each rank is a real process with RANK and WORLD_SIZE in its environment and a gloo group over TCP; attempts.py says who starts it. The
undisturbed run is forked, whoever starts the others: a launcher adds nothing to the arithmetic. A fresh interpreter takes seconds until it
trains, so two of three kills of launched ranks are aimed at the steps, and the table says how many came before. Exit code 1 where a run
was not identical.
"""

import argparse
import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.attempts import LAUNCHERS, Attempt, Blow, attempt, launcher_said, said_in
from bench.machine import command, described
from bertdist.core.terminal import show_table

RANKS, KILLS_OF_A_RUN, AIMED = (
    {"forked": (1, 2, 3), "torchrun": (1, 2), "accelerate": (1, 2)},
    3,
    2 / 3,
)
WORDS = "a an and bad best but dull film fine fun good great is it movie not of poor so the this very was warm worst".split()
CADENCES = {
    "eval_every": "4 steps",
    "save_every": "3 steps",
    "log_every": "2 steps",
    "num_train_epochs": "3",
    "train_batch_size": "8",
}
VICTIMS = ("one rank", "all ranks", "launcher")
TOKENS = {1: "50", 2: "30", 3: "24"}  # ranks -> tokens of a micro-batch for about three a step


@dataclass(frozen=True)
class Kind:
    """What is run, and who is killed."""

    source: str  # map, stream
    ranks: int
    micro_batches: str  # one, three
    victims: str = ""  # one rank, all ranks, launcher
    launcher: str = "forked"


@dataclass
class Tally:
    """What came of the kills of one kind."""

    kills: int = 0
    runs: int = 0
    lost: int = 0  # kills in runs that did not come to their end
    identical: int = 0  # kills in runs that ended bit for bit like the undisturbed one
    untrained: int = 0  # kills before the first step of their attempt
    one_message: int = (
        0  # kills of one rank after which one line named it, and there was no traceback
    )
    survivors: int = 0  # kills of one rank of several
    seconds: list[float] = field(
        default_factory=list
    )  # from such a kill to the last survivor's end


class Stage:
    """A model, rows, and runs of them in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.straight, self.seconds = (
            folder,
            dict[Kind, Any](),
            dict[Kind, tuple[float, float]](),
        )
        folder.mkdir(parents=True)
        write_model(folder / "model")
        write_rows(folder / "train.tsv", 38, 1)
        write_rows(folder / "dev.tsv", 12, 2)

    def words(self, kind: Kind, out: Path) -> list[str]:
        settings = {
            **CADENCES,
            "model_name_or_path": self.folder / "model",
            "train_file": self.folder / "train.tsv",
            "output_dir": out,
        }
        settings |= {
            "validation_file": self.folder / "dev.tsv",
            "learning_rate": "1e-3",
            "dataloader_num_workers": "0",
            "use_cpu": "true",
        }
        settings |= {
            "tokens_per_micro_batch": "8192" if kind.micro_batches == "one" else TOKENS[kind.ranks],
            "rank_timeout": "20",
        }
        if kind.source == "stream":
            settings |= {"streaming": "true", "stream_window": "16"}
        return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]

    def undisturbed(self, kind: Kind) -> Any:
        """What the run leaves that nobody disturbs."""
        plain = Kind(kind.source, kind.ranks, kind.micro_batches)
        if plain not in self.straight:
            out = self.folder / f"straight_{len(self.straight)}"
            begin = time.monotonic()
            found = attempt(self.words(plain, out), plain.ranks, out)
            assert found.done, (self.folder, found.codes, said_in(out))
            self.straight[plain] = remains(out, plain.ranks)
            self.seconds.setdefault(plain, (time.monotonic() - begin, 0.0))
        return self.straight[plain]

    def lasts(self, kind: Kind) -> tuple[float, float]:
        """Seconds of an attempt that nobody disturbs, and of its steps."""
        if kind.launcher == "forked":
            self.undisturbed(kind)
            return self.seconds[Kind(kind.source, kind.ranks, kind.micro_batches)]
        plain = Kind("", kind.ranks, "", "", kind.launcher)
        if plain not in self.seconds:
            out, begin = self.folder / "timed", time.monotonic()
            shutil.rmtree(out, ignore_errors=True)
            found = attempt(self.words(kind, out), kind.ranks, out, kind.launcher)
            assert found.done and found.begun, (found.codes, said_in(out), launcher_said(out))
            left, expected = remains(out, kind.ranks), self.undisturbed(kind)
            assert left == expected, difference(left, expected)
            last = max(path.stat().st_mtime for path in out.glob("steps_*.txt"))
            self.seconds[plain] = (
                time.monotonic() - begin,
                max(0.1, last - time.time() + time.monotonic() - found.begun),
            )
        return self.seconds[plain]

    def blow(self, kind: Kind, out: Path, chance: random.Random) -> Blow:
        """A kill at random, while there are steps."""
        whole, steps = self.lasts(kind)
        taken = max(
            (int(path.name[5:]) for path in (out / "checkpoints").glob("step_*")), default=0
        )
        steps *= 1 - taken / int(self.undisturbed(kind)["checkpoint"][5:])
        rank = chance.randrange(kind.ranks) if kind.victims == "one rank" else 0
        aimed = kind.launcher != "forked" and chance.random() < AIMED
        return Blow(kind.victims, rank, chance.random() * (steps if aimed else whole), aimed)

    def trial(self, kind: Kind, most: int, chance: random.Random, tally: Tally) -> None:
        """One run with up to `most` kills."""
        expected = self.undisturbed(kind)
        out = self.folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        kills, end = 0, Attempt()
        while not end.done and kills < most:
            blow = self.blow(kind, out, chance)
            end = attempt(self.words(kind, out), kind.ranks, out, kind.launcher, blow)
            if end.killed is None or json_state(out) == "finished":
                break  # it had ended before
            kills += 1
            tally.untrained += not end.began
            if kind.victims == "one rank":
                self.heard(kind, out, blow, end, tally)
        end = attempt(self.words(kind, out), kind.ranks, out, kind.launcher)
        found = remains(out, kind.ranks) if end.done else None
        tally.kills, tally.runs = tally.kills + kills, tally.runs + 1
        tally.lost += kills if found is None else 0
        tally.identical += kills if found == expected else 0
        if found != expected:
            kept = Path(tempfile.mkdtemp(prefix="not_identical_")) / "run"
            shutil.copytree(out, kept)
            said = f"codes {end.codes}\n{said_in(out)[-2000:]}\n{launcher_said(out)[-2000:]}"
            print(f"{kind}: {difference(found, expected)}; kept in {kept}; {said}", file=sys.stderr)

    def heard(self, kind: Kind, out: Path, blow: Blow, end: Attempt, tally: Tally) -> None:
        """What is printed after the kill of one rank. Where a launcher ends the others before they can say a word, it names the rank."""
        assert end.killed is not None
        said, (pid,) = said_in(out), end.pids
        lines = [line for line in said.splitlines() if line.startswith("bertdist: ")]
        named = len(lines) == 1 and f"rank {blow.rank} (process {pid} on " in lines[0]
        by_launcher = (
            not lines
            and re.search(rf"exitcode *: -9 \(pid: {pid}\)", launcher_said(out)) is not None
        )
        tally.survivors += 1
        tally.seconds.append(time.monotonic() - end.killed)
        told = (named or by_launcher) and "Traceback" not in said
        tally.one_message += told
        if not told:
            print(f"{kind}, {blow}: not one message: {said[-1500:]}", file=sys.stderr)


def remains(out: Path, ranks: int) -> dict[str, Any]:
    """All that a run leaves and that must not depend on when it was killed."""
    from bertdist.training.throughput import MEASURED

    last = max((out / "checkpoints").glob("step_*"), key=lambda path: path.name)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    words = [
        {name: value.hex() if isinstance(value, float) else value for name, value in line.items()}
        for line in lines
    ]
    kept = [{name: value for name, value in line.items() if name not in MEASURED} for line in words]
    found: dict[str, Any] = {
        "metrics.jsonl": kept,
        "checkpoint": last.name,
        "state": json.loads((last / "state.json").read_text()),
    }
    for path in [
        *sorted(last.glob("*.safetensors")),
        *sorted((out / "best").glob("*.safetensors")),
    ]:
        found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    for name in ("predictions.jsonl", "evaluation.json"):
        found[name] = (out / name).read_bytes()
    for rank in range(ranks):
        taken = defaultdict(set)
        for line in (out / f"steps_{rank}.txt").read_text().splitlines():
            if len(told := line.split(" ")) == 3:  # the last line of a killed rank may be torn
                taken[int(told[0])].add(tuple(told[1:]))
        found[f"steps of rank {rank}"] = dict(sorted(taken.items()))
    return found


def json_state(out: Path) -> str:
    """How far a run says it has come."""
    path = out / "status.json"
    return str(json.loads(path.read_text())["state"]) if path.exists() else ""


def difference(found: dict[str, Any] | None, expected: dict[str, Any]) -> str:
    """Which parts of two runs differ."""
    if found is None:
        return "did not come to its end"
    return (
        ", ".join(name for name in {**expected, **found} if found.get(name) != expected.get(name))
        + " differ"
    )


def write_model(folder: Path) -> None:
    """A random BERT of 2 layers of 32 with dropout, and a tokenizer that knows letters and a few words."""
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
    vocabulary += [word for word in WORDS if word not in vocabulary]
    tokenizers: Any = transformers  # its lazy names are unknown to mypy
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
    """Rows of 2 to 20 words, with a label each."""
    chance = random.Random(seed)
    rows = [
        f"{' '.join(chance.choices(WORDS, k=chance.randint(2, 20)))}\t{chance.choice(['no', 'yes'])}"
        for _ in range(count)
    ]
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")


def kinds(chance: random.Random, launcher: str = "forked") -> Iterator[Kind]:
    """All kinds, in turns, each round in another order. A launcher takes long: there, micro-batches are left to chance."""
    forked, micro_batches = launcher == "forked", ("one", "three")
    one, many = (
        (["all ranks"], ["one rank", "all ranks"])
        if forked
        else (["all ranks", "launcher"], [*VICTIMS])
    )
    every = [
        Kind(source, ranks, micro, victims, launcher)
        for source in ("map", "stream")
        for ranks in RANKS[launcher]
        for micro in (micro_batches if forked else ("",))
        for victims in (many if ranks > 1 else one)
    ]
    while True:
        chance.shuffle(every)
        yield from (
            kind if forked else replace(kind, micro_batches=chance.choice(micro_batches))
            for kind in every
        )


def tell(tallies: dict[Kind, Tally], path: Path | None) -> None:
    """The table, on the screen and as JSON."""
    header = ["run", "killed", "kills", "no step", "lost", "identical", "one line", "seconds"]
    sums: dict[tuple[Any, ...], Tally] = defaultdict(Tally)
    for kind, one in tallies.items():
        for key in (
            (f"{kind.source}, {kind.ranks} rank{'s' if kind.ranks > 1 else ''}", kind.victims),
            ("all", ""),
        ):
            into = sums[key]
            for name in (
                "kills",
                "runs",
                "untrained",
                "lost",
                "identical",
                "one_message",
                "survivors",
            ):
                setattr(into, name, getattr(into, name) + getattr(one, name))
            into.seconds += one.seconds
    rows = []
    for key, one in sorted(sums.items(), key=lambda item: (item[0][0] == "all", str(item[0]))):
        most = f"< {max(one.seconds) + 0.1:.1f}" if one.seconds else "-"
        message = f"{one.one_message} of {one.survivors}" if one.survivors else "-"
        rows.append(
            [
                *key,
                str(one.kills),
                str(one.untrained),
                str(one.lost),
                str(one.identical),
                message,
                most,
            ]
        )
    show_table("Random SIGKILLs", header, rows)
    if path is not None:
        told = {
            "machine": described("cpu", 1, ["torch", "accelerate"]),
            "command": command("bench.faults"),
        }
        path.write_text(json.dumps({**told, "header": header, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults", description="Random kills: is anything lost?"
    )
    parser.add_argument("--trials", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="forked", help="who starts the ranks"
    )
    parser.add_argument("--output", type=Path, help="JSON of the table")
    asked = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import bertdist.tasks.metrics
    import bertdist.train  # noqa: F401  before the ranks are forked

    chance, tallies = random.Random(asked.seed), defaultdict[Kind, Tally](Tally)
    with (
        tempfile.TemporaryDirectory(prefix="faults_") as name,
        contextlib.suppress(KeyboardInterrupt),
    ):
        stage = Stage(Path(name) / "stage")
        for kind in kinds(chance, asked.launcher):
            left = asked.trials - sum(tally.kills for tally in tallies.values())
            if left <= 0:
                break
            stage.trial(kind, min(left, KILLS_OF_A_RUN), chance, tallies[kind])
            done, same = (
                sum(getattr(tally, name) for tally in tallies.values())
                for name in ("kills", "identical")
            )
            print(
                f"{done} of {asked.trials} kills; {same} lost nothing and went on bit for bit.",
                file=sys.stderr,
                flush=True,
            )
    tell(tallies, asked.output)
    sys.exit(any(tally.identical < tally.kills for tally in tallies.values()))


if __name__ == "__main__":
    main()
