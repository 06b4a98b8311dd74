"""What `bench.gpu` measures, each in a child process: JOBS, by name.

A job appends its results to job["results"], one JSON line each, as soon as it has one: a child that
fails or is ended in the midst keeps what it has. Nothing here needs a network; `datasets`,
`evaluate` and flash-attn are used where they are installed.

Legend: T tokens, N texts.
"""

import contextlib
import gc
import importlib.util
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.figures import timed_figures
from bench.flops import read_shape
from bench.jobs import ROOT, BenchError, PredictJob, TrainJob

Job = dict[str, Any]

LABELS = ("0", "1")
MAX_LENGTH = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# SST-2's 67,349 training rows by their length in tokens of bert-base-uncased, [CLS] and [SEP]
# counted: 1,978 rows of 3 tokens, ...
SST2_ROWS_OF_LENGTH = dict(
    enumerate(
        map(
            int,
            """1978 5322 6065 5345 4749 4155 3713 3267 2947 2650 2413 2138 1950 1777 1661 1515 1373
            1285 1132 1106 1046 909 820 806 733 692 628 538 491 442 448 400 337 304 286 242 195 203
            192 155 148 130 89 82 85 73 55 42 50 40 36 19 21 22 15 8 6 3 2 5 5 1 2 2""".split(),
        ),
        start=3,
    )
)

TAIL = 15  # lines of a failed test that are shown

FAILED = 0.02, 3.0  # families: the least difference, and the times Hugging Face's, that is too much


def machine(job: Job) -> Iterator[Job]:
    """The device, what is installed, and the rate of large matrix products; then the model and the
    rows of the other jobs, in job["folder"].
    """
    import torch

    from bertdist.training.throughput import matmul_rate

    device = device_of(job)
    about: Job = {"device": "cpu", "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        about |= {"device": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1)}
        about["capability"] = f"{facts.major}.{facts.minor}"
        about["flash attention of torch"] = torch.backends.cuda.is_flash_attention_available()
    about["missing"] = [
        name
        for name in ("datasets", "evaluate", "flash_attn")
        if importlib.util.find_spec(name) is None
    ]
    yield about
    yield {"matmul_flops": matmul_rate(device, "bf16", job["seconds"])}
    yield write_model(Path(job["model"]), job["tokenizer"], job["tiny"])
    if job["train_file"] is None:
        count = write_synthetic_rows(Path(job["rows_file"]), job["tiny"])
        yield {"rows": count, "source": "synthetic rows of SST-2's lengths, made by rule"}
    else:
        from bench.child import rows

        names: Job = {"text_column": None, "label_column": None, "rows": None}
        found = rows({"file": job["train_file"], "rows_file": job["rows_file"], **names})
        if len(found["labels"]) != len(LABELS):
            raise BenchError(f"{job['train_file']}: expected two labels, as SST-2 has")
        yield {"rows": found["rows"], "source": f"the rows of {Path(job['train_file']).name}"}


def device_of(job: Job) -> Any:
    """The torch.device that a job runs on."""
    import torch

    from bench.clock import on_gpu

    return torch.device("cuda" if on_gpu(job["use_cpu"]) else "cpu")


def write_model(folder: Path, tokenizer: str | None, tiny: bool) -> Job:
    """BERT-base, or a tiny BERT, as a classifier from random weights.

    tokenizer: a folder with one; None: one whose every word is one token.
    """
    import torch
    import transformers

    library: Any = transformers  # mypy does not see its lazy names
    if tokenizer is None:
        words = [*SPECIAL, *(f"w{i}" for i in range(500 if tiny else 30_522 - len(SPECIAL)))]
        found = library.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    else:
        found = library.AutoTokenizer.from_pretrained(tokenizer)
    found.model_max_length = MAX_LENGTH
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size: Job = {**small, "intermediate_size": 64} if tiny else {}  # its defaults are BERT-base
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {"0": 0, "1": 1}}
    config = library.BertConfig(vocab_size=max(len(found), 30_522 * (not tiny)), **size, **names)
    torch.manual_seed(0)
    library.BertForSequenceClassification(config).save_pretrained(folder)
    found.save_pretrained(folder)
    return {"tokenizer": "one word, one token" if tokenizer is None else Path(tokenizer).name}


def write_synthetic_rows(path: Path, tiny: bool) -> int:
    """Rows of SST-2's lengths in tokens, in random order; the first word follows from the label."""
    chance = random.Random(0)
    lengths = [length for length, rows in SST2_ROWS_OF_LENGTH.items() for _ in range(rows)]
    chance.shuffle(lengths)
    lengths = lengths[:40] if tiny else lengths
    with path.open("w", encoding="utf-8") as file:
        for row, length in enumerate(lengths):
            label = row % 2
            words = [f"w{label}", *(f"w{chance.randrange(2, 500)}" for _ in range(length - 3))]
            file.write(json.dumps({"text": " ".join(words), "label": str(label)}) + "\n")
    return len(lengths)


def tests(job: Job) -> Iterator[Job]:
    """The tests of job["tests"], for at most job["seconds"]: counts, then each failure."""
    report = Path(job["folder"], "tests.xml")
    # The options of setup.cfg need plugins; a warning of another version's must not fail a test.
    words = ["-q", "-o", "addopts=", "--import-mode=importlib", "-W", "default"]
    words += ["--continue-on-collection-errors"]  # a package may be missing for one file only
    words += ["-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "setup.cfg")]
    command = [sys.executable, "-m", "pytest", job["tests"], *words, f"--junitxml={report}"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pytest:
        try:
            said, _ = pytest.communicate(timeout=job["seconds"])
        except subprocess.TimeoutExpired:
            pytest.send_signal(signal.SIGINT)  # it writes its report before it ends
            try:
                said, _ = pytest.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                pytest.kill()
                said, _ = pytest.communicate()
            yield {"unfinished": f"ended after its {job['seconds']:.0f} seconds"}
    if not report.exists():
        raise BenchError(f"pytest wrote no report: {' '.join(said.split()[-40:])}")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcomes = [
        next((part.tag for part in case if part.tag in OUTCOMES), "passed") for case in cases
    ]
    yield {"counts": {outcome: outcomes.count(outcome) for outcome in sorted({*outcomes})}}
    for case in cases:
        for part in case:
            if part.tag in ("failure", "error"):
                lines = (part.text or part.get("message") or "").splitlines()
                name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
                yield {"failed": name, "tail": lines[-TAIL:]}


OUTCOMES = ("failure", "error", "skipped")


# What a small model of each family has of its own; FAMILY_SIZES for all.
FAMILIES: dict[str, Job] = {
    "bert": {},
    "ernie": {},
    "electra": {"embedding_size": 32},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "data2vec-text": {"type_vocab_size": 1},
    "distilbert": {},
    "albert": {"embedding_size": 32},
    "modernbert": {
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "classifier_pooling": "cls",
        **{f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
    },
    "deberta-v2": {
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_buckets": 32,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
}


def families(job: Job) -> Iterator[Job]:
    """Of a small random model of each family: how far logits and gradients are from those of padded
    Hugging Face in float32, for padded Hugging Face in bf16, bertdist in bf16, bertdist in float32,
    and for bertdist in bf16 with one token in the wrong text (a mistake that has to be seen).

    Logits: the largest difference over the largest logit. Gradients: the same for each weight, the
    worst of all; a weight's largest gradient counts as no less than a tenth of the model's largest.
    """
    for name in job.get("families", FAMILIES):
        try:
            yield {"family": name, **compare_family(name, job)}
        except Exception as error:  # the others are still worth a look
            yield {"family": name, "error": f"{type(error).__name__}: {error}"}


def compare_family(name: str, job: Job) -> Job:
    """The result of one family."""
    import torch

    from bertdist.data.batch import collate
    from bertdist.data.tokenization import Example

    device, longest = device_of(job), 24 if job["tiny"] else MAX_LENGTH
    plain, ours = small_models(name, job, longest)
    lengths = [longest, longest - 1, *(max(1, longest // i) for i in range(2, 24))]
    chance = random.Random(2)
    batch = collate(
        [
            Example(i, [chance.randrange(5, 500) for _ in range(length)], [0] * length, i % 3, 1.0)
            for i, length in enumerate(lengths)
        ]
    ).to(device)
    inputs = padded_inputs(batch, plain.config.pad_token_id)
    # the smallest mistake: of two texts the first has a token of the second
    starts, moved = batch.cu_seqlens.clone(), list(lengths)
    starts[3], moved[2], moved[3] = starts[3] + 1, moved[2] + 1, moved[3] - 1
    mixed = replace(batch, cu_seqlens=starts, lengths=tuple(moved))

    def padded() -> Any:
        return plain(**inputs).logits

    def one_by_one() -> Any:
        return torch.cat([plain(input_ids=ids[None]).logits for ids in batch.ids.split(lengths)])

    expected = padded
    with torch.autocast(device.type, torch.bfloat16):
        about = ours.attention_kernel(device)
    reference = outcome(plain, expected, batch.targets)
    if not all(tensor.isfinite().all() for tensor in (reference[0], *reference[1].values())):
        # a padding token of ModernBERT may have nothing to attend to, which some kernels make NaN
        expected, about = one_by_one, f"{about}; padded Hugging Face is NaN: text by text"
        reference = outcome(plain, expected, batch.targets)
    with torch.autocast(device.type, torch.bfloat16):
        outcomes = {
            "Hugging Face, bf16": outcome(plain, expected, batch.targets),
            "bertdist, bf16": outcome(ours.model, lambda: ours(batch), batch.targets),
            "bertdist, one token in the wrong text": outcome(
                ours.model, lambda: ours(mixed), batch.targets
            ),
        }
    outcomes["bertdist, float32"] = outcome(ours.model, lambda: ours(batch), batch.targets)
    found = {who: distance(one, reference) for who, one in outcomes.items()}
    least, times = FAILED
    wrong = [
        part
        for i, part in enumerate(("logits", "gradients"))
        if not found["bertdist, bf16"][i] <= max(least, times * found["Hugging Face, bf16"][i])
        or not found["bertdist, float32"][i] <= 1e-3
    ]
    return {"kernel": about, "wrong": wrong, "differences": found}


def small_models(name: str, job: Job, longest: int) -> tuple[Any, Any]:
    """The same random weights in Hugging Face's model and in bertdist's Classifier, on the device
    and without dropout. longest: positions.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from bertdist.core.config import ModelConfig
    from bertdist.models.classifier import load_classifier
    from bertdist.tasks.tasks import SingleLabel

    device, folder = device_of(job), Path(job["folder"], name)
    width = 32 if job["tiny"] else 256
    sizes: Job = {"vocab_size": 500, "hidden_size": width, "intermediate_size": 2 * width}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 1 if job["tiny"] else 4}
    # not 0.02: at this width attention would be all but uniform, and a wrong mask hard to see
    sizes |= {"max_position_embeddings": longest + 2, "initializer_range": 0.1}
    config = AutoConfig.for_model(name, **{**sizes, **FAMILIES[name]}, num_labels=3)
    config.id2label = {i: str(i) for i in range(3)}
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager" if "deberta" in name else "sdpa"
    )
    settings = ModelConfig(model_name_or_path=str(folder), max_length=longest)
    ours, _ = load_classifier(settings, SingleLabel(("0", "1", "2")))
    return plain.to(device).eval(), ours.to(device).eval()


def padded_inputs(batch: Any, pad: int) -> Job:
    """A packed batch as Hugging Face's models take it."""
    import torch

    from bertdist.models.attention import padded_layout

    index, real = (
        torch.from_numpy(array).to(batch.ids.device) for array in padded_layout(batch.lengths)
    )
    return {"input_ids": batch.ids[index].masked_fill(~real, pad), "attention_mask": real.long()}


def outcome(model: Any, logits_of: Callable[[], Any], targets: Any) -> tuple[Any, Job]:
    """(logits, gradients by name) of the summed cross-entropy, float32."""
    import torch.nn.functional as F

    model.zero_grad()
    logits = logits_of()
    F.cross_entropy(logits.float(), targets, reduction="sum").backward()
    gradients = {
        name: weight.grad.float().clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    return logits.detach().float(), gradients


def distance(found: tuple[Any, Job], expected: tuple[Any, Job]) -> tuple[float, float]:
    """(largest difference of logits, of gradients), relative as `families` says; infinite for NaN
    and for gradients that are missing.
    """
    (logits, gradients), (true_logits, true_gradients) = found, expected
    if gradients.keys() != true_gradients.keys():
        return float("inf"), float("inf")
    least = max(float(true.abs().max()) for true in true_gradients.values()) / 10
    parts = [(logits, true_logits, 0.0)]
    parts += [(gradients[name], true, least) for name, true in true_gradients.items()]
    distances = [
        float((one - true).abs().max()) / max(size, float(true.abs().max()))
        for one, true, size in parts
    ]
    distances = [one if one == one else float("inf") for one in distances]
    return distances[0], max(distances[1:])


def contender(job: Job) -> Iterator[Job]:
    """One way to train (bench.contenders), at each of job["sizes"]: (rows per step, steps)."""
    import torch

    from bench.contenders import train

    for batch_size, steps in job["sizes"]:
        rows = job["rows"] if steps is None else min(job["rows"], batch_size * steps)
        one = train_job(job, rows, batch_size)
        with repeated_stderr() as said:
            run = train(one)
        shape = read_shape(job["model"])
        figures = asdict(timed_figures(run, one.untimed_steps, shape))
        notes = [line for line in said.getvalue().splitlines() if "--torch_compile" in line]
        notes += [line for line in said.getvalue().splitlines() if "--cuda_graphs" in line]
        yield {"batch_size": batch_size, "steps": one.steps, "notes": notes, **figures}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def train_job(job: Job, rows: int, batch_size: int) -> TrainJob:
    """A TrainJob of the kit's model and rows, in bf16; removes the folder of the one before."""
    output = Path(job["folder"], "run")
    shutil.rmtree(output, ignore_errors=True)
    return TrainJob(
        contender=job.get("contender", "a"),
        model=job["model"],
        rows_file=job["rows_file"],
        labels=len(LABELS),
        rows=rows,
        batch_size=batch_size,
        untimed_steps=job["untimed_steps"],
        learning_rate=5e-5,
        seed=42,
        max_length=MAX_LENGTH,
        mixed_precision="bf16",
        use_cpu=job["use_cpu"],
        loss_rows=256,
        dev_file=None,
        output_dir=str(output),
        flags=tuple(job.get("flags", ())),
    )


@contextlib.contextmanager
def repeated_stderr() -> Iterator[io.StringIO]:
    """What is printed to standard error, which is printed nevertheless."""

    class Both(io.StringIO):
        def write(self, text: str) -> int:
            real.write(text)
            return super().write(text)

    real = sys.stderr
    with contextlib.redirect_stderr(Both()) as both:
        yield both


def profile(job: Job) -> Iterator[Job]:
    """The kernels of ten steps of bertdist that take the most time, at each of job["sizes"]."""
    import torch
    from torch.profiler import ProfilerActivity

    from bench.contenders import train_bertdist

    activities = [ProfilerActivity.CPU]
    if device_of(job).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for batch_size, steps in job["sizes"]:
        first = job["untimed_steps"]
        window = ProfiledSteps(torch.profiler.profile(activities=activities), first, steps)
        train_bertdist(train_job(job, batch_size * (first + steps), batch_size), window.around)
        found = top_kernels(window.profiler, steps)
        yield {"batch_size": batch_size, "steps": steps, "wall_ms": window.wall_ms, **found}


class ProfiledSteps:
    """Runs a profiler over `steps` steps, from step `first` on."""

    def __init__(self, profiler: Any, first: int, steps: int) -> None:
        self.profiler, self.first, self.steps, self.number = profiler, first, steps, 0
        self.wall_ms = 0.0  # per step

    def around(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """The same steps, watched."""

        def take(*args: Any) -> Any:
            if self.number == self.first:
                self.profiler.start()
                self._begin = self._now()
            result = take_step(*args)
            self.number += 1
            if self.number == self.first + self.steps:
                self.wall_ms = 1e3 * (self._now() - self._begin) / self.steps
                self.profiler.stop()
            return result

        return take

    def _now(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def top_kernels(profiler: Any, steps: int) -> Job:
    """The 20 that take most of the device's time; on a CPU, operators. Milliseconds per step."""
    events = profiler.key_averages()
    kernels = [
        (event.key, event.count, event.self_device_time_total)
        for event in events
        # an annotation, like that of the optimizer's step, covers kernels that count themselves
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ] or [(event.key, event.count, event.self_cpu_time_total) for event in events]
    total = sum(time for _, _, time in kernels)
    kernels.sort(key=lambda kernel: -kernel[2])
    return {
        "kernel_ms": total / 1e3 / steps,
        "kernels_per_step": sum(count for _, count, _ in kernels) / steps,
        "top": [
            {
                "name": " ".join(name.split())[:100],
                "calls": count / steps,
                "ms": time / 1e3 / steps,
                "share": time / total if total else 0.0,
            }
            for name, count, time in kernels[:20]
        ],
    }


def prediction(job: Job) -> Iterator[Job]:
    """Rows per second of Predictor and of pipeline, in bf16."""
    from bench.prediction import predict

    for contender in ("bertdist", "pipeline"):
        run = predict(
            PredictJob(
                contender=contender,
                model=job["model"],
                onnx=None,
                rows_file=job["rows_file"],
                rows=min(job["rows"], job["most_rows"]),
                batch_size=32,
                max_length=MAX_LENGTH,
                threads=1,
                use_cpu=job["use_cpu"],
                mixed_precision="bf16",
            )
        )
        rows = len(run.answers)
        yield {"contender": contender, "rows": rows, "rows_per_second": rows / run.seconds}


JOBS: dict[str, Callable[[Job], Iterator[Job]]] = {
    function.__name__: function
    for function in (machine, tests, families, contender, profile, prediction)
}


def run(job: Job) -> Job:
    """Run a job; its results go to its file, one line each."""
    with open(job["results"], "a", encoding="utf-8") as file:
        for result in JOBS[job["name"]](job):
            file.write(json.dumps(result) + "\n")
            file.flush()
    return {}
