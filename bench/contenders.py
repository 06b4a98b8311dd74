"""The ways to train that are compared; each one epoch over the same rows, with a stamp after every
optimizer step.

a  bertdist, as its command line runs it
b  transformers.Trainer at its defaults: random order, a batch padded to its longest text
c  the same with train_sampling_strategy="group_by_length"
d  an Accelerate loop over rows padded to --max_length, as
   examples/pytorch/text-classification/run_glue_no_trainer.py of transformers is with
   --pad_to_max_length
e  the same padded to what the tokenizer can take, 512: padding="max_length" where nobody named a
   length
f  a loop without padding, by transformers' own collator and flash attention; in bench.gpu only

Same for all: weights, head (drawn after the same seed), batch size, AdamW without weight decay,
learning rate, linear to 0. Left as each has it: clipping (a, b, c and f clip at 1, the loop does
not), fused AdamW (not in the loop), when to tokenize (b to f before the first step, which is not
timed; a while it trains, which is).
"""

import gc
import importlib
import importlib.util
import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.clock import Clock, device_name, on_gpu, peak_mib
from bench.jobs import TrainJob, TrainResult

FLATTENED_ATTENTION = "flash_attention_2"  # of f; needs the package flash-attn

ROWS_PER_BATCH = 64  # rows a batch when the final loss is computed; it decides nothing


def read_rows(path: str, rows: int) -> tuple[list[str], list[int]]:
    """The first texts and labels of a file of rows."""
    with open(path, encoding="utf-8") as file:
        found = [json.loads(line) for line, _ in zip(file, range(rows), strict=False)]
    return [row["text"] for row in found], [int(row["label"]) for row in found]


def train(job: TrainJob) -> TrainResult:
    """Run one contender in this process, then score what it has learned."""
    clock = Clock(job.steps, job.untimed_steps, job.use_cpu)
    ways: dict[str, Callable[[TrainJob, Clock], Any]] = {
        "a": run_bertdist,
        "b": run_trainer,
        "c": run_trainer,
        "d": run_loop,
        "e": run_loop,
        "f": run_flattened,
    }
    model = ways[job.contender](job, clock)
    gc.collect()  # loader workers end with their loader, and count when they have ended
    child_mib = peak_mib(resource.RUSAGE_CHILDREN)
    loss, _ = score(model, job, job.rows_file, job.loss_rows)
    accuracy = score(model, job, job.dev_file, 1 << 30)[1] if job.dev_file else None
    return TrainResult(
        stamps=clock.stamps,
        seen=clock.seen,
        process_mib=clock.process_mib,
        child_mib=child_mib,
        device_mib=clock.device_mib,
        device=device_name(job.use_cpu),
        loss=loss,
        accuracy=accuracy,
    )


TakeStep = Callable[..., Any]  # bertdist.train.train_step, or replays of it


def run_bertdist(job: TrainJob, clock: Clock) -> Any:
    """Contender a, with the job's flags."""
    from transformers import AutoModelForSequenceClassification

    from bertdist.data.batch import RankStep

    taken: list[list[tuple[Any, tuple[int, ...]]]] = []

    def stamped(take_step: TakeStep) -> TakeStep:
        def take(*args: Any) -> Any:
            result = take_step(*args)
            clock.stamp()
            (step,) = [value for value in args if isinstance(value, RankStep)]
            taken.append([(batch.row_numbers, batch.lengths) for batch in step.micro_batches])
            return result

        return take

    train_bertdist(job, stamped)
    for batches in taken:  # only now: the row numbers are on the device, and reading waits for it
        rows = [row for numbers, _ in batches for row in numbers.tolist()]
        lengths = [length for _, of_batch in batches for length in of_batch]
        clock.see(rows, lengths, sum(lengths))
    return AutoModelForSequenceClassification.from_pretrained(
        Path(job.output_dir, "best"), dtype=torch.float32
    )


def train_bertdist(job: TrainJob, around: Callable[[TakeStep], TakeStep]) -> None:
    """All that this benchmark knows of the inside of bertdist: `prepare_steps` returns the function
    that is called once a step, and is given a RankStep. around: what to put in its place.
    """
    from bertdist.core.args import read_config

    loop: Any = importlib.import_module("bertdist.train")
    prepare_steps = loop.prepare_steps
    words = f"""--text_column text --label_column label --problem_type single_label_classification
        --max_train_samples {job.rows}
        --num_train_epochs 1 --train_batch_size {job.batch_size} --learning_rate {job.learning_rate}
        --weight_decay 0 --seed {job.seed}
        --max_length {job.max_length} --save_every never --mixed_precision {job.mixed_precision}"""
    paths = [
        "--model_name_or_path",
        job.model,
        "--train_file",
        job.rows_file,
        "--output_dir",
        job.output_dir,
    ]
    names = [
        "--label_names",
        *map(str, range(job.labels)),
    ]  # rows may lack a label; the head has it nevertheless
    device = ["--use_cpu"] if job.use_cpu else []
    loop.prepare_steps = lambda *args: around(prepare_steps(*args))
    try:
        loop.train(read_config([*words.split(), *paths, *names, *device, *job.flags]))
    finally:
        loop.prepare_steps = prepare_steps


def run_trainer(job: TrainJob, clock: Clock) -> Any:
    """b and c."""
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    class Stamps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stamp()

    model, tokenizer = load(job)
    # transformers 5.23 scales the loss of BERT classifiers by accumulation steps x world size
    # (https://github.com/huggingface/transformers/issues/47688) as long as it believes that the
    # model takes loss arguments: the learning rates of the contenders would not mean the same.
    model.accepts_loss_kwargs = False
    arguments = TrainingArguments(
        job.output_dir,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        num_train_epochs=1,
        seed=job.seed,
        train_sampling_strategy="group_by_length" if job.contender == "c" else "random",
        bf16=job.mixed_precision == "bf16",
        use_cpu=job.use_cpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,  # the row's number has to reach the collator
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenized(job, tokenizer),
        processing_class=tokenizer,
        data_collator=watched(DataCollatorWithPadding(tokenizer), clock),
        callbacks=[Stamps()],
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def run_loop(job: TrainJob, clock: Clock) -> Any:
    """d and e: what run_glue_no_trainer.py does between its tokenizing and its evaluation."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader
    from transformers import default_data_collator, get_scheduler

    accelerator = Accelerator(cpu=job.use_cpu, mixed_precision=job.mixed_precision)
    model, tokenizer = load(job)
    set_seed(job.seed)
    width = (
        job.max_length
        if job.contender == "d"
        else min(tokenizer.model_max_length, model.config.max_position_embeddings)
    )
    rows = tokenized(job, tokenizer, width)
    loader: Any = DataLoader(
        rows,
        shuffle=True,
        collate_fn=watched(default_data_collator, clock),
        batch_size=job.batch_size,
    )
    adamw = torch.optim.AdamW(model.parameters(), lr=job.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", adamw, num_warmup_steps=0, num_training_steps=job.steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, adamw, loader, schedule)
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        clock.stamp()
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def run_flattened(job: TrainJob, clock: Clock) -> Any:
    """f: what transformers has for training without padding, its collator and flash attention
    (https://huggingface.co/docs/transformers/padding_free); clipping and AdamW as Trainer has them.

    Its classifiers read the first token of a row, and here a row is a batch: so the head, BERT's,
    is called with the first token of each text.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithFlattening, get_scheduler

    accelerator = Accelerator(cpu=job.use_cpu, mixed_precision=job.mixed_precision)
    model, tokenizer = load(job, attn_implementation=FLATTENED_ATTENTION)
    model.to(accelerator.device).train()
    set_seed(job.seed)
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = flatten([{"input_ids": list(each["input_ids"])} for each in features])
        lengths = [len(each["input_ids"]) for each in features]
        clock.see([each["row"] for each in features], lengths, sum(lengths))
        return {**batch, "labels": torch.tensor([each["labels"] for each in features])}

    loader: Any = DataLoader(
        tokenized(job, tokenizer), shuffle=True, collate_fn=collate, batch_size=job.batch_size
    )
    adamw = torch.optim.AdamW(
        model.parameters(), lr=job.learning_rate, weight_decay=0.0, fused=True
    )
    schedule = get_scheduler("linear", adamw, num_warmup_steps=0, num_training_steps=job.steps)
    for batch in loader:
        batch = {
            name: value.to(accelerator.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        labels = batch.pop("labels")
        with accelerator.autocast():
            segments = torch.zeros_like(batch["input_ids"])
            hidden = model.base_model(token_type_ids=segments, **batch).last_hidden_state[0]
            first = hidden[batch["cu_seq_lens_q"][:-1].long()]  # (texts, hidden)
            pooled = model.base_model.pooler(first[:, None])
            loss = F.cross_entropy(model.classifier(model.dropout(pooled)).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        clock.stamp()
    model.set_attn_implementation(
        "sdpa"
    )  # to be scored in float32, which flash attention is not for
    return model


def load(job: TrainJob, **how: Any) -> tuple[Any, Any]:
    """Model and tokenizer; the head's weights come from the seed."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(job.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model, num_labels=job.labels, dtype=torch.float32, **how
    )
    return model, AutoTokenizer.from_pretrained(job.model)


def tokenized(job: TrainJob, tokenizer: Any, width: int | None = None) -> Any:
    """The rows as a `datasets.Dataset`, as the examples of transformers hold them: ids, mask,
    labels, row; padded to width if given. Without `datasets` a list of the same rows, which Trainer
    and DataLoader take too.
    """

    texts, labels = read_rows(job.rows_file, job.rows)
    columns = dict(tokenizer(texts, truncation=True, max_length=job.max_length))
    if width is not None:
        columns = dict(tokenizer.pad(columns, padding="max_length", max_length=width))
    columns |= {"labels": labels, "row": list(range(len(texts)))}
    if importlib.util.find_spec("datasets") is None:
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
    from datasets import Dataset

    return Dataset.from_dict(columns)


def watched(collate: Callable[[Any], Any], clock: Clock) -> Callable[[list[dict[str, Any]]], Any]:
    """The collator, counting rows and real tokens of each batch from its attention mask.

    Loaders here collate in this process.
    """

    def collate_and_see(features: list[dict[str, Any]]) -> Any:
        rows = [feature["row"] for feature in features]
        batch = collate(
            [
                {name: value for name, value in feature.items() if name != "row"}
                for feature in features
            ]
        )
        mask = batch["attention_mask"]
        clock.see(rows, mask.sum(1).tolist(), mask.numel())
        return batch

    return collate_and_see


@torch.no_grad()
def score(model: Any, job: TrainJob, path: str, rows: int) -> tuple[float, float]:
    """(cross-entropy a row, accuracy) of a Hugging Face classifier on the first rows of a file;
    float32, no dropout.
    """
    from transformers import AutoTokenizer

    texts, labels = read_rows(path, rows)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    device = torch.device("cuda" if on_gpu(job.use_cpu) else "cpu")
    model.to(device).eval()
    loss, right = 0.0, 0
    for places in in_batches(texts):
        batch = [texts[i] for i in places]
        inputs = tokenizer(
            batch, truncation=True, max_length=job.max_length, padding=True, return_tensors="pt"
        )
        targets = torch.tensor([labels[i] for i in places], device=device)
        logits = model(**inputs.to(device)).logits.float()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(1) == targets).sum())
    return loss / len(texts), right / len(texts)


def in_batches(texts: Sequence[str]) -> list[list[int]]:
    """Places of texts of about one length, together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[i : i + ROWS_PER_BATCH] for i in range(0, len(order), ROWS_PER_BATCH)]
