"""The five ways to train that are compared; each one epoch over the same rows, with a stamp after
every optimizer step.

  a  bertdist, as its command line runs it b  transformers.Trainer at its defaults: random order, a
  batch padded to its longest text c  the same with train_sampling_strategy="group_by_length" d  an
  Accelerate loop over rows padded to --max_length, as
  examples/pytorch/text-classification/run_glue_no_trainer.py of transformers is with
  --pad_to_max_length e  the same padded to what the tokenizer can take, 512: padding="max_length"
  where nobody named a length

Same for all: weights, head (drawn after the same seed), batch size, AdamW without weight decay,
learning rate, linear to 0. Left as each has it: clipping (a, b and c clip at 1, the loop does not),
fused AdamW (not in the loop), when to tokenize (b to e before the first step, which is not timed; a
while it trains, which is).
"""

import gc
import importlib
import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.clock import Clock, device_name, on_gpu, peak_mib
from bench.jobs import TrainJob, TrainResult

ROWS_PER_BATCH = 64  # rows a batch when the final loss is computed; it decides nothing


def read_rows(path: str, rows: int) -> tuple[list[str], list[int]]:
    """The first texts and labels of a file of rows."""
    with open(path, encoding="utf-8") as file:
        found = [json.loads(line) for line, _ in zip(file, range(rows), strict=False)]
    return [row["text"] for row in found], [int(row["label"]) for row in found]


def train(job: TrainJob) -> TrainResult:
    """Run one contender in this process, then score what it has learned."""
    clock = Clock(job.steps, job.untimed_steps, job.use_cpu)
    model = {"a": run_bertdist, "b": run_trainer, "c": run_trainer, "d": run_loop, "e": run_loop}[
        job.contender
    ](job, clock)
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


def run_bertdist(job: TrainJob, clock: Clock) -> Any:
    """All that this benchmark knows of the inside of bertdist: `train_step` is called once a step
    and is given a RankStep.
    """
    from transformers import AutoModelForSequenceClassification

    from bertdist.core.args import read_config
    from bertdist.data.batch import RankStep

    loop: Any = importlib.import_module("bertdist.train")
    train_step = loop.train_step

    def stamped(*args: Any, **kwargs: Any) -> Any:
        (step,) = [value for value in (*args, *kwargs.values()) if isinstance(value, RankStep)]
        result = train_step(*args, **kwargs)
        clock.stamp()
        rows = [row for batch in step.micro_batches for row in batch.row_numbers.tolist()]
        lengths = [length for batch in step.micro_batches for length in batch.lengths]
        clock.see(rows, lengths, sum(lengths))
        return result

    loop.train_step = stamped
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
    loop.train(
        read_config([*words.split(), *paths, *names, *(["--use_cpu"] if job.use_cpu else [])])
    )
    return AutoModelForSequenceClassification.from_pretrained(
        Path(job.output_dir, "best"), dtype=torch.float32
    )


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


def load(job: TrainJob) -> tuple[Any, Any]:
    """Model and tokenizer; the head's weights come from the seed."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(job.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model, num_labels=job.labels, dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(job.model)


def tokenized(job: TrainJob, tokenizer: Any, width: int | None = None) -> Any:
    """The rows as a `datasets.Dataset`, as the examples of transformers hold them: ids, mask,
    labels, row; padded to width if given.
    """
    from datasets import Dataset

    texts, labels = read_rows(job.rows_file, job.rows)
    columns = dict(tokenizer(texts, truncation=True, max_length=job.max_length))
    if width is not None:
        columns = dict(tokenizer.pad(columns, padding="max_length", max_length=width))
    return Dataset.from_dict({**columns, "labels": labels, "row": list(range(len(texts)))})


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
