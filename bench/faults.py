"""Random kills: is anything lost?

    python -m bench.faults --trials 200 --seed 1

A trial is one SIGKILL, of one rank or of all, at a random moment of a small run; the same command then goes on. A run is killed up to
three times, then left to its end, and compared with one that nobody disturbed: every weight and optimizer tensor, every line of
metrics.jsonl that does not tell of time, loss and gradient norm of every step on every rank in hex (also of steps that were taken
twice), best weights and predictions. Dropout is on; the last step of an epoch is ragged; evaluations, best weights and checkpoints come at
different steps.

Each rank is a real process with RANK and WORLD_SIZE in its environment and a gloo group over TCP, forked from this one, which has imported
everything: 1 to 2 s an attempt, where a fresh interpreter takes 10. Exit code 1 where a run was not identical.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import string
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from bench.machine import command, described
from bertdist.console import show_table

RANKS, KILLS_OF_A_RUN, SECONDS = (1, 2, 3), 3, 120
WORDS = "a an and bad best but dull film fine fun good great is it movie not of poor so the this very was warm worst".split()
CADENCES = {"eval_every": "4 steps", "save_every": "3 steps", "log_every": "2 steps", "num_train_epochs": "3", "train_batch_size": "8"}
TOKENS = {1: "50", 2: "30", 3: "24"}  # ranks -> tokens of a micro-batch for about three a step


@dataclass(frozen=True)
class Kind:
    """What is run, and who is killed."""

    source: str  # map, stream
    ranks: int
    micro_batches: str  # one, three
    victims: str = ""  # one rank, all ranks


@dataclass
class Tally:
    """What came of the kills of one kind."""

    kills: int = 0
    runs: int = 0
    lost: int = 0  # kills in runs that did not come to their end
    identical: int = 0  # kills in runs that ended bit for bit like the undisturbed one
    one_message: int = 0  # kills after which the survivors printed one line, and no traceback
    survivors: int = 0  # kills that had any
    seconds: list[float] = field(default_factory=list)  # from the kill to the last survivor's end


class Stage:
    """A model, rows, and runs of them in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.straight = folder, dict[Kind, Any]()
        folder.mkdir(parents=True)
        write_model(folder / "model")
        write_rows(folder / "train.tsv", 38, 1)
        write_rows(folder / "dev.tsv", 12, 2)

    def words(self, kind: Kind, out: Path) -> list[str]:
        settings = {**CADENCES, "model_name_or_path": self.folder / "model", "train_file": self.folder / "train.tsv", "output_dir": out}
        settings |= {"validation_file": self.folder / "dev.tsv", "learning_rate": "1e-3", "dataloader_num_workers": "0", "use_cpu": "true"}
        settings |= {"tokens_per_micro_batch": "8192" if kind.micro_batches == "one" else TOKENS[kind.ranks], "rank_timeout": "20"}
        if kind.source == "stream":
            settings |= {"streaming": "true", "stream_window": "16"}
        return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]

    def undisturbed(self, kind: Kind) -> tuple[Any, float]:
        """(what the run left, its seconds)."""
        plain = Kind(kind.source, kind.ranks, kind.micro_batches)
        if plain not in self.straight:
            out = self.folder / f"straight_{len(self.straight)}"
            begin = time.monotonic()
            codes = attempt(self.words(plain, out), plain.ranks, out)
            assert codes == [0] * plain.ranks, (self.folder, codes, said_in(out))
            self.straight[plain] = remains(out, plain.ranks), time.monotonic() - begin
        found: tuple[Any, float] = self.straight[plain]
        return found

    def trial(self, kind: Kind, most: int, chance: random.Random, tally: Tally) -> None:
        """One run with up to `most` kills."""
        expected, seconds = self.undisturbed(kind)
        out = self.folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        kills, codes = 0, [1]
        while codes != [0] * kind.ranks and kills < most:
            victims = list(range(kind.ranks)) if kind.victims == "all ranks" else [chance.randrange(kind.ranks)]
            for old in out.glob("said_*.txt"):
                old.unlink()
            codes, killed = attempt_killed(self.words(kind, out), kind.ranks, out, victims, chance.random() * seconds)
            if killed is None or json_state(out) == "finished":
                break  # it had ended before
            kills += 1
            if len(victims) < kind.ranks:
                said = said_in(out)
                tally.survivors += 1
                tally.seconds.append(time.monotonic() - killed)
                told = sum(line.startswith("bertdist: ") for line in said.splitlines()) == 1 and "Traceback" not in said
                tally.one_message += told
                if not told:
                    print(f"{kind}: not one message: {said[-1500:]}", file=sys.stderr)
        codes = attempt(self.words(kind, out), kind.ranks, out)
        found = remains(out, kind.ranks) if codes == [0] * kind.ranks else None
        tally.kills, tally.runs = tally.kills + kills, tally.runs + 1
        tally.lost += kills if found is None else 0
        tally.identical += kills if found == expected else 0
        if found != expected:
            kept = Path(tempfile.mkdtemp(prefix="not_identical_")) / "run"
            shutil.copytree(out, kept)
            print(f"{kind}: {difference(found, expected)}; kept in {kept}; codes {codes}\n{said_in(out)[-2000:]}", file=sys.stderr)


def attempt(words: Sequence[str], ranks: int, out: Path) -> list[int]:
    """Start the command on so many ranks and wait: their exit codes."""
    return attempt_killed(words, ranks, out, [], 0.0)[0]


def attempt_killed(words: Sequence[str], ranks: int, out: Path, victims: Sequence[int], after: float) -> tuple[list[int], float | None]:
    """The same, with a SIGKILL to some ranks after so many seconds. (exit codes, when it was sent; None: all had ended)"""
    out.mkdir(parents=True, exist_ok=True)
    port, running, codes = free_port(), dict[int, int](), dict[int, int]()
    for rank in range(ranks):
        sys.stderr.flush()
        sys.stdout.flush()
        with warnings.catch_warnings():  # of a fork beside threads
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            be_a_rank(words, rank, ranks, port, out)
        running[rank] = pid
    waited, before = 0.0, time.monotonic()  # a machine that is held is held against nobody
    when, killed = time.monotonic() + after, None
    while running:
        if killed is None and victims and time.monotonic() >= when and all(rank in running for rank in victims):
            for rank in victims:
                os.kill(running[rank], signal.SIGKILL)
            killed = time.monotonic()
        now = time.monotonic()
        waited, before = waited + min(now - before, 1.0), now
        if waited > SECONDS:
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del running[rank]
        time.sleep(0.002)
    return [codes[rank] for rank in range(ranks)], killed


def be_a_rank(words: Sequence[str], rank: int, ranks: int, port: int, out: Path) -> NoReturn:
    """The child's whole life."""
    code: Any = 1
    with open(out / f"said_{rank}.txt", "a", buffering=1, encoding="utf-8") as said, open(out / f"steps_{rank}.txt", "a") as steps:
        os.dup2(said.fileno(), 2)
        sys.stderr = said
        try:
            code = _trained(words, rank, ranks, port, steps)
        except BaseException:
            traceback.print_exc()
    os._exit(code if isinstance(code, int) else 1)


def _trained(words: Sequence[str], rank: int, ranks: int, port: int, steps: Any) -> Any:
    import torch

    from bertdist import train as module

    train: Any = module  # watched and quickened, in this child only
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", ACCELERATE_USE_CPU="true")
    train.matmul_rate = lambda device, precision: 1e12
    take_step = train.take_step

    def written(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
        loss, norm = take_step(model, optimizer, step, *rest)
        steps.write(f"{step.number} {float(loss).hex()} {float(norm).hex()}\n")
        steps.flush()
        return loss, norm

    train.take_step = written
    sys.argv = ["bertdist.train", *words]
    try:
        train.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def remains(out: Path, ranks: int) -> dict[str, Any]:
    """All that a run leaves and that must not depend on when it was killed."""
    from bertdist.meter import MEASURED

    last = max((out / "checkpoints").glob("step_*"), key=lambda path: path.name)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    words = [{name: value.hex() if isinstance(value, float) else value for name, value in line.items()} for line in lines]
    kept = [{name: value for name, value in line.items() if name not in MEASURED} for line in words]
    found: dict[str, Any] = {"metrics.jsonl": kept, "checkpoint": last.name, "state": json.loads((last / "state.json").read_text())}
    for path in [*sorted(last.glob("*.safetensors")), *sorted((out / "best").glob("*.safetensors"))]:
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
    return ", ".join(name for name in {**expected, **found} if found.get(name) != expected.get(name)) + " differ"


def said_in(out: Path) -> str:
    """What all ranks have printed so far."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("said_*.txt")))


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def write_model(folder: Path) -> None:
    """A random BERT of 2 layers of 32 with dropout, and a tokenizer that knows letters and a few words."""
    import torch
    import transformers

    letters = string.ascii_lowercase
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary += [word for word in WORDS if word not in vocabulary]
    tokenizers: Any = transformers  # its lazy names are unknown to mypy
    tokenizers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2
    )
    transformers.BertModel(config).save_pretrained(folder)


def write_rows(path: Path, count: int, seed: int) -> None:
    """Rows of 2 to 20 words, with a label each."""
    chance = random.Random(seed)
    rows = [f"{' '.join(chance.choices(WORDS, k=chance.randint(2, 20)))}\t{chance.choice(['no', 'yes'])}" for _ in range(count)]
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")


def kinds(chance: random.Random) -> Iterator[Kind]:
    """All kinds, in turns, each round in another order."""
    every = [
        Kind(source, ranks, micro, victims)
        for source in ("map", "stream")
        for ranks in RANKS
        for micro in ("one", "three")
        for victims in (("one rank", "all ranks") if ranks > 1 else ("all ranks",))
    ]
    while True:
        chance.shuffle(every)
        yield from every


def tell(tallies: dict[Kind, Tally], path: Path | None) -> None:
    """The table, on the screen and as JSON."""
    header = ["rows", "ranks", "killed", "kills", "lost", "identical", "one message", "seconds to end"]
    sums: dict[tuple[Any, ...], Tally] = defaultdict(Tally)
    for kind, one in tallies.items():
        for key in ((kind.source, kind.ranks, kind.victims), ("all", "", "")):
            into = sums[key]
            for name in ("kills", "runs", "lost", "identical", "one_message", "survivors"):
                setattr(into, name, getattr(into, name) + getattr(one, name))
            into.seconds += one.seconds
    rows = []
    for key, one in sorted(sums.items(), key=lambda item: (item[0][0] == "all", str(item[0]))):
        spread = f"{max(one.seconds):.1f} at most" if one.seconds else "-"
        message = f"{one.one_message} of {one.survivors}" if one.survivors else "-"
        rows.append([*map(str, key), str(one.kills), str(one.lost), str(one.identical), message, spread])
    show_table("Random SIGKILLs", header, rows)
    if path is not None:
        told = {"machine": described("cpu", 1, ["torch", "accelerate"]), "command": command("bench.faults")}
        path.write_text(json.dumps({**told, "header": header, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description="Random kills: is anything lost?")
    parser.add_argument("--trials", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON of the table")
    asked = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import bertdist.scores
    import bertdist.train  # noqa: F401  before the ranks are forked

    chance, tallies = random.Random(asked.seed), defaultdict[Kind, Tally](Tally)
    with tempfile.TemporaryDirectory(prefix="faults_") as name, contextlib.suppress(KeyboardInterrupt):
        stage = Stage(Path(name) / "stage")
        for kind in kinds(chance):
            left = asked.trials - sum(tally.kills for tally in tallies.values())
            if left <= 0:
                break
            stage.trial(kind, min(left, KILLS_OF_A_RUN), chance, tallies[kind])
            done, same = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("kills", "identical"))
            print(f"{done} of {asked.trials} kills; {same} lost nothing and went on bit for bit.", file=sys.stderr, flush=True)
    tell(tallies, asked.output)
    sys.exit(any(tally.identical < tally.kills for tally in tallies.values()))


if __name__ == "__main__":
    main()
