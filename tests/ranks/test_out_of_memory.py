"""A step that runs out of memory on one rank is taken again with smaller micro-batches, on as many
ranks as have to; nobody else notices.

Memory is played: a micro-batch of two texts or more and more than TOKENS tokens "does not fit", on
one rank, at a place of its way that the test names. The last test takes the memory away for real.
"The same" is what a run ends with that was given the smaller --tokens_per_micro_batch from its
start: bit by bit where all steps were cut alike, else to 1e-10 in float64.
"""

import resource
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import RankError, run_ranks
from rows import (
    Breaking,
    Files,
    assert_same_tensors,
    both,
    json_of,
    last_checkpoint,
    rows_by_step,
    run_main,
    run_train,
    some_of,
    step_log,
    tensors_of,
    words_of,
    write_split,
)
from rows import train_module as train
from transformers import BertConfig, BertModel

from bertdist.distributed import launch as begin
from bertdist.distributed import preemption as slurm
from bertdist.models import classifier
from bertdist.models.dropout import DropoutMasks
from bertdist.training import evaluation, micro_batches
from bertdist.training.checkpoint import TrainState
from bertdist.training.micro_batches import release_freed_memory

ROWS, STEP, EPOCHS = (
    38,
    12,
    2,
)  # steps of 12, 12, 12 and 2 rows: in the last one a rank of three has none
TOKENS = 32  # tokens that fit; what has one text always fits
PLACES = (
    "forward",
    "loss",
    "middle",
    "embeddings",
)  # in the forward pass, or on the way back: at its begin, half-way, near its end


class Memory:
    """This rank's memory, as it is played."""

    def __init__(self, place: str, final: bool | None, texts: int, tokens: int, times: int) -> None:
        self.place, self.wanted, self.texts, self.tokens, self.times = (
            place,
            final,
            texts,
            tokens,
            times,
        )
        self.final = False  # whether the micro-batch in hand is the share's last
        self.failed: list[tuple[int, bool]] = []  # (tokens, final) of each that did not fit
        self.single_token_batch = (
            0  # exchanges that this rank joined with a token that counts nothing
        )

    def use(self, place: str, texts: int, tokens: int) -> None:
        fits = texts < self.texts or tokens <= self.tokens or len(self.failed) == self.times
        if place == self.place and not fits and self.wanted in (None, self.final):
            self.failed.append((tokens, self.final))
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."
            )


class Use(torch.autograd.Function):
    """Does nothing but use memory on the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, memory: Memory, place: str, sizes: tuple[int, int]
    ) -> torch.Tensor:
        ctx.used = memory, place, sizes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        memory, place, sizes = ctx.used
        memory.use(place, *sizes)
        return gradient, None, None, None


def short_of_memory(
    rank: int,
    place: str,
    final: bool | None = None,
    texts: int = 2,
    tokens: int = TOKENS,
    times: int = 999,
    buckets: float | None = 0.02,
) -> Breaking:
    """One rank has little memory. final: only the share's last micro-batch runs out (True), or only
    others (False). buckets: MB of a bucket of DDP; the tiny model would fit into one.
    """

    def breaking(accelerator: Accelerator) -> None:
        if buckets is not None:
            kwargs = begin.DistributedDataParallelKwargs
            begin.DistributedDataParallelKwargs = lambda **words: kwargs(
                **words, bucket_cap_mb=buckets
            )
        memory = Memory(
            place, final, texts, tokens, times if accelerator.process_index == rank else 0
        )
        accelerator.played = memory
        attempt, load = micro_batches.attempt, train.load_classifier

        def watched(compute: Callable[..., Any], *args: Any) -> Any:
            if len(args) == 2:  # of a training step
                batch, memory.final = args
                memory.single_token_batch += batch.row_numbers.tolist() == [
                    -1
                ] and batch.lengths == (1,)
            return attempt(compute, *args)

        def load_and_use(*args: Any, **more: Any) -> Any:
            classifier, notes = load(*args, **more)
            bert, forward = classifier.model.bert, classifier.forward
            sizes = (0, 0)

            def used(batch: Any) -> torch.Tensor:
                nonlocal sizes
                if not torch.is_grad_enabled():
                    return forward(batch)
                sizes = len(batch.lengths), sum(batch.lengths)
                memory.use("forward", *sizes)
                return Use.apply(forward(batch), memory, "loss", sizes)

            def hook(place: str) -> Any:
                def on(module: Any, args: Any, out: Any) -> Any:
                    first = out[0] if isinstance(out, tuple) else out
                    changed = (
                        Use.apply(first, memory, place, sizes) if torch.is_grad_enabled() else first
                    )
                    return (changed, *out[1:]) if isinstance(out, tuple) else changed

                return on

            classifier.forward = used
            bert.embeddings.register_forward_hook(hook("embeddings"))
            bert.encoder.layer[0].register_forward_hook(hook("middle"))
            return classifier, notes

        micro_batches.attempt, train.load_classifier = watched, load_and_use

    return breaking


def in_float64(accelerator: Accelerator) -> None:
    load = train.load_classifier

    def load_in_float64(*args: Any, **more: Any) -> Any:
        classifier, notes = load(*args, **more)
        return classifier.double(), notes

    train.load_classifier = load_in_float64
    torch.Tensor.float = lambda self: self


def run_short(
    accelerator: Accelerator, words: list[str], breaking: Breaking
) -> tuple[TrainState, Any, str, list[tuple[int, bool]]]:
    """run_train, and what did not fit on this rank."""
    return (*run_train(accelerator, words, breaking), accelerator.played.failed)


def joined_with_one_token(accelerator: Accelerator, words: list[str], breaking: Breaking) -> int:
    run_train(accelerator, words, breaking)
    return accelerator.played.single_token_batch


class Runs:
    """Runs of one command, short of memory or with as much as they want."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.files: Files = write_split(folder, ROWS, 12)
        self.plain: dict[Any, Path] = {}

    def words(self, out: Path, **settings: Any) -> list[str]:
        usual = {
            "train_batch_size": STEP,
            "num_train_epochs": EPOCHS,
            "dropout": 0,
            "weight_decay": 0.1,
        }
        return words_of(self.model, out, self.files, **{**usual, **settings})

    def with_enough(self, n: int, breaking: Breaking | None = None, **settings: Any) -> Path:
        """The run that has these micro-batches from its start. Made once."""
        key = (n, breaking, *settings.items())
        if key not in self.plain:
            self.plain[key] = self.folder / f"plain{len(self.plain)}"
            run_ranks(
                n,
                run_short,
                self.words(self.plain[key], **settings),
                both(breaking or in_float32, short_of_memory(-1, "")),
            )
        return self.plain[key]


def in_float32(accelerator: Accelerator) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("memory"))


def assert_same_bits(one: Path, other: Path) -> None:
    assert step_log(one) == step_log(other)
    assert_same_tensors(tensors_of(last_checkpoint(one)), tensors_of(last_checkpoint(other)))
    assert_same_tensors(tensors_of(one / "best"), tensors_of(other / "best"))


def far_apart(one: Path, other: Path) -> float:
    """The largest difference of weights.

    In the step logs nothing differs but loss and norm, by less than 1e-5 where the weights agree.
    """
    logs = [[{**line, "loss": 0, "grad_norm": 0} for line in step_log(out)] for out in (one, other)]
    assert logs[0] == logs[1], "schedule, rows, tokens or scores differ"
    weights, others = (tensors_of(last_checkpoint(out)) for out in (one, other))
    assert weights.keys() == others.keys()
    apart = max((weights[name] - others[name]).abs().max().item() for name in weights)
    numbers = [
        [line[key] for line in step_log(out, "train") for key in ("loss", "grad_norm")]
        for out in (one, other)
    ]
    assert apart > 1e-6 or numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    return apart


# --- The step is the same


@pytest.mark.parametrize(
    ("n", "fits", "place"),
    some_of(
        [(1, 32, "middle"), (3, 32, "embeddings")],
        [(*ranks, place) for ranks in ((1, 32), (2, 64), (3, 32)) for place in PLACES],
    ),
)
def test_out_of_memory_in_the_last_micro_batch_changes_no_bit(
    runs: Runs, tmp_path: Path, n: int, fits: int, place: str
) -> None:
    """Shares come in one micro-batch each, so that it is the last; it fails in the first step, on
    the last rank, and all begin anew.
    """
    results = run_ranks(
        n, run_short, runs.words(tmp_path / "out"), short_of_memory(n - 1, place, tokens=fits)
    )
    progress, _, said, _ = results[0]
    assert results[-1][3][0][1] and (n == 1 or len(results[-1][3]) == 1), "it failed elsewhere"
    assert {result[0].tokens_per_micro_batch for result in results} == {
        fits
    } and progress.rows == EPOCHS * ROWS
    assert_same_bits(tmp_path / "out", runs.with_enough(n, tokens_per_micro_batch=fits))
    told = [line for line in said.splitlines() if "Out of memory" in line]
    assert 1 <= len(told) == progress.oom_retries, said
    assert told[-1].endswith(
        f"the step is repeated. Micro-batch size from here on: up to {fits} tokens."
    )
    assert all(other == "" for _, _, other, _ in results[1:]), "rank 0 talks"


def in_bf16(accelerator: Accelerator) -> None:
    AcceleratorState._reset_state()  # the rank's has another precision
    Accelerator(cpu=True, mixed_precision="bf16")


def test_in_bf16_it_changes_no_bit_either(runs: Runs, tmp_path: Path) -> None:
    words = runs.words(tmp_path / "out", mixed_precision="bf16")
    breaking = both(in_bf16, short_of_memory(1, "middle", tokens=64))
    assert [result[0].oom_retries for result in run_ranks(2, run_short, words, breaking)] == [1, 1]
    settings = {"tokens_per_micro_batch": 64}
    plain = runs.with_enough(2, in_bf16, mixed_precision="bf16", **settings)
    assert_same_bits(tmp_path / "out", plain)
    with pytest.raises(AssertionError):  # the control
        assert_same_bits(tmp_path / "out", runs.with_enough(2, **settings))


@pytest.mark.parametrize(
    ("place", "joins"),
    some_of([("forward", 1), ("embeddings", 0)], [("loss", 1), ("middle", 0)]),
)
def test_an_exchange_is_joined_where_it_stands(
    runs: Runs, tmp_path: Path, place: str, joins: int
) -> None:
    """Before DDP has sent anything: from its begin, with a token that counts nothing.

    Behind: with zeros for what is left.
    """
    words = runs.words(tmp_path / "out", max_train_steps=2)
    assert run_ranks(2, joined_with_one_token, words, short_of_memory(1, place, tokens=64)) == [
        0,
        joins,
    ]


@pytest.mark.parametrize(
    ("n", "rank", "place"),
    some_of(
        [(2, 0, "forward"), (3, 1, "middle")],
        [(*ranks, place) for ranks in ((1, 0), (2, 0), (2, 1), (3, 1)) for place in PLACES],
    ),
)
def test_out_of_memory_in_another_micro_batch_stays_on_its_rank(
    runs: Runs, tmp_path: Path, n: int, rank: int, place: str
) -> None:
    """That rank begins its share again while the others wait; from the next step on all have its
    size.
    """
    breaking = both(in_float64, short_of_memory(rank, place, final=False))
    results = run_ranks(
        n, run_short, runs.words(tmp_path / "out", tokens_per_micro_batch=60), breaking
    )
    assert results[rank][3] and not any(final for _, final in results[rank][3])
    assert {result[0].tokens_per_micro_batch for result in results} == {30} and results[0][
        0
    ].oom_retries == 1
    assert (
        far_apart(tmp_path / "out", runs.with_enough(n, in_float64, tokens_per_micro_batch=30))
        < 1e-10
    )


@pytest.mark.parametrize("n", some_of([3], [1, 2]))
def test_every_row_is_counted_once_on_its_schedule(runs: Runs, tmp_path: Path, n: int) -> None:
    results = run_ranks(n, run_short, runs.words(tmp_path / "out"), short_of_memory(0, "middle"))
    plain = run_ranks(1, run_train, runs.words(tmp_path / "plain"))
    assert rows_by_step([seen for _, seen, _, _ in results]) == rows_by_step(
        [seen for _, seen, _ in plain]
    )
    logs = [step_log(tmp_path / name, "train") for name in ("out", "plain")]
    for one, other in zip(*logs, strict=True):
        assert {**one, "loss": 0, "grad_norm": 0} == {**other, "loss": 0, "grad_norm": 0}
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


@pytest.mark.parametrize("place", ["loss", "embeddings"])
def test_dropout_is_drawn_again_as_it_was(runs: Runs, tmp_path: Path, place: str) -> None:
    """On one rank, from the first step on: the bits are those of a run that was cut so from its
    start, dropout and all.
    """
    run_ranks(1, run_short, runs.words(tmp_path / "out", dropout=0.3), short_of_memory(0, place))
    assert_same_bits(
        tmp_path / "out", runs.with_enough(1, tokens_per_micro_batch=TOKENS, dropout=0.3)
    )


@pytest.mark.parametrize("n", some_of([3], [1]))
def test_a_run_that_goes_on_has_the_size_that_was_found(runs: Runs, tmp_path: Path, n: int) -> None:
    """Interrupted behind a step that ran out of memory, and gone on from with enough of it: the
    bits of the run that went on at once.
    """
    outs, breaking = [tmp_path / "straight", tmp_path / "resumed"], short_of_memory(0, "middle")
    settings = {"save_every": "3 steps", "dropout": 0.1, "dataloader_num_workers": 1}
    run_ranks(n, run_short, runs.words(outs[0], **settings), breaking)

    def stop_at_step_3(accelerator: Accelerator) -> None:
        train_step = train.train_step

        def watched(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
            if step.number == 3:
                raise InterruptedError
            return train_step(model, optimizer, step, *rest)

        train.train_step = watched

    with pytest.raises(RankError, match="InterruptedError"):
        run_ranks(n, run_short, runs.words(outs[1], **settings), both(breaking, stop_at_step_3))
    results = run_ranks(n, run_short, runs.words(outs[1], **settings), breaking)
    assert all(failed == [] for _, _, _, failed in results), "it began with the old size"
    assert "chosen from free memory" not in results[0][2]
    assert_same_bits(*outs)
    assert (
        json_of(last_checkpoint(outs[0]) / "state.json")["train_state"]["tokens_per_micro_batch"]
        == TOKENS
    )


def test_what_is_asked_for_wins_over_what_was_found(runs: Runs, tmp_path: Path) -> None:
    """And what came of it over asking the same again."""

    def tokens(breaking: Breaking | None = None, **settings: Any) -> int:
        words = runs.words(tmp_path / "out", num_train_epochs=9, save_every="1 steps", **settings)
        ((progress, *_),) = run_ranks(1, run_train, words, both(breaking or in_float32, stop_soon))
        return int(progress.tokens_per_micro_batch)

    def stop_soon(accelerator: Accelerator) -> None:
        slurm.StopSignal.requested = lambda self, accelerator: True

    assert tokens() == 8192
    assert tokens() == 8192
    short = short_of_memory(0, "loss", tokens=200)
    assert tokens(short, tokens_per_micro_batch=777) == 194
    assert tokens(tokens_per_micro_batch=777) == 194
    assert tokens() == 194
    assert tokens(tokens_per_micro_batch=778) == 778


def test_ranks_begin_with_the_least_that_one_of_them_found(runs: Runs, tmp_path: Path) -> None:
    def little_on_rank_1(accelerator: Accelerator) -> None:
        micro_batches.find_tokens = lambda *args: 128 if accelerator.process_index == 1 else 512

    results = run_ranks(
        3,
        run_train,
        runs.words(tmp_path / "out", max_train_steps=2, verbose=True),
        little_on_rank_1,
    )
    assert [progress.tokens_per_micro_batch for progress, _, _ in results] == [128] * 3
    assert "Micro-batch size: up to 128 tokens (--tokens_per_micro_batch)." in results[0][2]


# --- What each promise rests on


def test_gradients_that_are_not_thrown_away_are_seen(runs: Runs, tmp_path: Path) -> None:
    def keep(accelerator: Accelerator) -> None:
        micro_batches.discard_gradients = lambda model: None

    for place in ("middle", "embeddings"):
        out = tmp_path / place
        settings = {"tokens_per_micro_batch": 60}
        run_ranks(
            2,
            run_short,
            runs.words(out, **settings),
            both(in_float64, keep, short_of_memory(1, place, final=False)),
        )
        assert far_apart(out, runs.with_enough(2, in_float64, tokens_per_micro_batch=30)) > 1e-6


def test_dropout_that_goes_on_instead_is_seen(runs: Runs, tmp_path: Path) -> None:
    """On a CPU a row's dropout is the row's; drawn in the order of the micro-batches it would not
    be the same the second time.
    """

    def go_on(accelerator: Accelerator) -> None:
        begin_noise, drawn = DropoutMasks.__init__, count()
        DropoutMasks.__init__ = lambda self, rows, lengths: begin_noise(
            self, [next(drawn) for _ in lengths], lengths
        )

    run_ranks(
        1,
        run_short,
        runs.words(tmp_path / "out", dropout=0.3),
        both(go_on, short_of_memory(0, "loss")),
    )
    with pytest.raises(AssertionError):
        assert_same_bits(
            tmp_path / "out", runs.with_enough(1, tokens_per_micro_batch=TOKENS, dropout=0.3)
        )


def leave_the_exchange(accelerator: Accelerator) -> None:
    micro_batches.MicroBatcher._finish_exchange = lambda self, *args: None


def decide_alone(accelerator: Accelerator) -> None:
    micro_batches.all_reduce_min = lambda accelerator, values, group: values


def send_buffers_around(accelerator: Accelerator) -> None:
    made = micro_batches.MicroBatcher.__init__

    def make(self: Any, model: Any, *rest: Any) -> None:
        made(self, model, *rest)
        model.broadcast_buffers = True

    micro_batches.MicroBatcher.__init__ = make


@pytest.mark.parametrize(
    ("tokens", "broken", "short"),
    [
        (None, leave_the_exchange, short_of_memory(1, "middle")),
        (None, leave_the_exchange, short_of_memory(1, "forward")),
        (None, decide_alone, short_of_memory(1, "embeddings")),
        (60, send_buffers_around, short_of_memory(1, "forward", final=False)),
    ],
)
def test_ranks_that_part_are_seen(
    runs: Runs, tmp_path: Path, tokens: int | None, broken: Breaking, short: Breaking
) -> None:
    """Who leaves an exchange, decides alone, or repeats a collective alone leaves the others
    waiting, or talking of different things.
    """
    with pytest.raises(RankError):
        run_ranks(
            2,
            run_short,
            runs.words(tmp_path / "out", tokens_per_micro_batch=tokens),
            both(short, broken),
            timeout=6,
        )


# --- A text that never fits


@pytest.mark.parametrize(
    ("n", "rank", "rows", "place"),
    some_of(
        [
            (1, 0, STEP, "middle"),
            (2, 1, STEP, "forward"),
            (3, 0, STEP, "middle"),
            (2, 0, 2, "middle"),
            (3, 0, 3, "forward"),
        ],
        [
            (*ranks, place)
            for ranks in ((1, 0, STEP), (2, 1, STEP), (3, 0, STEP), (2, 0, 2), (3, 0, 3))
            for place in ("forward", "middle")
        ],
    ),
)
def test_a_text_that_does_not_fit_alone_ends_all_ranks_with_one_line(
    runs: Runs, tmp_path: Path, n: int, rank: int, rows: int, place: str
) -> None:
    """As the first of several micro-batches, and (rows: one a rank) as the last."""
    words = runs.words(tmp_path / "out", train_batch_size=rows, max_length=48)
    first, *others = run_ranks(n, run_main, words, short_of_memory(rank, place, texts=1, tokens=24))
    assert [code for code, _, _ in (first, *others)] == [1] * n and [
        said for _, said, _ in others
    ] == [""] * (n - 1)
    told = [line for line in first[1].splitlines() if line.startswith("bertdist: ")]
    assert len(told) == 1 and "Traceback" not in first[1], first[1]
    who = "" if n == 1 else f"rank {rank}: "
    assert told[0].startswith(f"bertdist: {who}train.tsv line "), told
    tokens = int(told[0].split(": a text of ")[1].split()[0])
    line = int(told[0].split("train.tsv line ")[1].split(":")[0])
    text = runs.files.train.read_text().splitlines()[line - 1].split("\t")[0]
    assert 24 < tokens <= 48 and tokens >= len(text.split()) + 2, "the line is that of the text"
    assert told[0].endswith(
        f" a text of {tokens} tokens (--max_length 48) does not fit into memory, "
        "not even alone (CUDA out of memory. Tried to allocate "
        "2.00 GiB.). Use a smaller --max_length, --gradient_checkpointing, or more memory."
    )
    assert not (tmp_path / "out").exists(), "before the first step: nothing is left behind"


# --- Evaluation


@pytest.mark.parametrize("n", some_of([3], [1, 2]))
def test_an_evaluation_out_of_memory_on_one_rank_scores_the_same(
    runs: Runs, tmp_path: Path, n: int
) -> None:
    """Nobody else is told, and each row is scored once."""

    def short_in_evaluation(accelerator: Accelerator) -> None:
        predict_rows = evaluation.predict_rows

        def watched(model: Any, batches: Any, accelerator: Any, *rest: Any) -> Any:
            forward = model.forward

            def used(batch: Any) -> Any:
                if (
                    accelerator.process_index == n - 1
                    and len(batch.lengths) > 1
                    and sum(batch.lengths) > TOKENS
                ):
                    failed.append(sum(batch.lengths))
                    raise MemoryError
                return forward(batch)

            model.forward = used
            try:
                return predict_rows(model, batches, accelerator, *rest)
            finally:
                model.forward = forward

        failed: list[int] = []
        accelerator.played = type("Played", (), {"failed": failed})
        evaluation.predict_rows = watched

    results = run_ranks(n, run_short, runs.words(tmp_path / "out"), short_in_evaluation)
    assert results[-1][3] and results[0][0].oom_retries == 0
    plain = runs.with_enough(n)
    for one, other in zip(step_log(tmp_path / "out"), step_log(plain), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_text_that_fits_in_no_evaluation_ends_all_ranks_with_one_line(
    runs: Runs, tmp_path: Path
) -> None:
    def no_memory(accelerator: Accelerator) -> None:
        compute_in_micro_batches = evaluation.compute_in_micro_batches

        def out(batch: Any) -> Any:
            raise MemoryError

        evaluation.compute_in_micro_batches = lambda compute, *rest: compute_in_micro_batches(
            out if accelerator.process_index == 1 else compute, *rest
        )

    words = runs.words(tmp_path / "out", eval_every="2 steps")
    first, other = run_ranks(2, run_main, words, no_memory)
    assert (first[0], other) == (1, (1, "", ""))
    told = [line for line in first[1].splitlines() if line.startswith("bertdist: ")]
    assert (
        len(told) == 1
        and told[0].startswith("bertdist: rank 1: dev.tsv line ")
        and "not even alone (MemoryError)" in told[0]
    )


# --- For real


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 2,048 in its middle: 40 kB of activations a token, so that what a test
    lacks is more than what a heap keeps.
    """
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model, folder)
    config = BertConfig.from_pretrained(folder)
    config.intermediate_size = 2048
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_memory_that_is_really_gone(wide_model: Path, tmp_path: Path, n: int) -> None:
    """While it takes steps, the last rank's address space may grow by 60 MB; its share of 4,500
    tokens, in one piece, takes 180.

    Without oneDNN's products and with freed memory given back, from the start: under a limit of
    address space both keep what they took for what did not fit (docs/log.md, Open).
    """

    def limit(accelerator: Accelerator) -> None:
        classifier.use_onednn = lambda model: None
        release_freed_memory()
        train_step = train.train_step

        def watched(*args: Any) -> Any:
            unlimited = resource.getrlimit(resource.RLIMIT_AS)
            if accelerator.process_index == n - 1:
                resource.setrlimit(
                    resource.RLIMIT_AS,
                    (psutil.Process().memory_info().vms + (60 << 20), unlimited[1]),
                )
            try:
                return train_step(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, unlimited)

        train.train_step = watched

    settings = {"train_batch_size": 300 * n, "num_train_epochs": 2, "dropout": 0}
    files = write_split(tmp_path, 300 * n)
    progress, _, said = run_ranks(
        n, run_train, words_of(wide_model, tmp_path / "out", files, **settings), limit
    )[0]
    assert (
        progress.finished and progress.oom_retries >= 1 and progress.tokens_per_micro_batch < 4096
    ), said
    run_ranks(n, run_train, words_of(wide_model, tmp_path / "plain", files, **settings))
    for one, other in zip(step_log(tmp_path / "out"), step_log(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(other, abs=1e-3)
