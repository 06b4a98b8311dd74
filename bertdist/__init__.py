"""Fine-tune, evaluate and use BERT-family text classifiers, with the same arithmetic everywhere.

    run = bertdist.train(
        model_name_or_path="google-bert/bert-base-uncased",
        train_file="train.csv", validation_split=0.1, output_dir="out", learning_rate=3e-5,
    )
    run.scores                                  # {"loss": 0.31, "accuracy": 0.91, ...}
    run.evaluate("test.csv").errors             # rows that are predicted wrong
    run.predictor()(["A film to remember."])    # [{"label": "positive", "score": 0.98}]

The public API. Names are loaded when they are first used, so `import bertdist` imports no torch and
changes nothing in the process.

    train(...)                fine-tune or resume: flags as keywords, rows of files or in memory;
                              returns a Run
    Run(folder)               the folder of a run: scores, history, evaluation, predictor(),
                              evaluate(rows)
    evaluate(model, rows)     a trained folder and labelled rows -> an Evaluation
    Evaluation                scores, intervals, per_label, predictions, errors
    Predictor(folder)         a trained folder -> labels and probabilities of texts
    read_config(arguments)    command-line arguments, with the file of --config -> TrainConfig
    load_classifier, create_train_loader, Evaluator    the parts of a training loop, see below
    BertdistError             base of all errors: ConfigError, DataError, ModelError,
                              CheckpointError, RankLost, NonFiniteError
    resource_folder(name)     where the accelerate configs and launch scripts are installed

`bertdist.train` is the function; its module is `importlib.import_module("bertdist.train")`.

A training loop of your own, exact on any number of devices (start it with `accelerate launch`):

    config, accelerator = read_config(["--config", "run.yaml"]), Accelerator()
    rows, eval_rows, _ = load_splits(config)                        # bertdist.data.load_data
    stats = collect_stats(rows, config, accelerator, print)         # bertdist.data.stats
    task = create_task(config.task, stats.labels, None)             # bertdist.tasks.tasks
    tokenizer = load_tokenizer(config.model)                        # bertdist.data.tokenization
    loader = create_train_loader(rows, stats, tokenizer, task, config, accelerator)
    classifier, notes = load_classifier(config.model, task, tokenizer=tokenizer)
    model, optimizer = accelerator.prepare(classifier, AdamW(classifier.parameters(), lr=1e-3))
    for step in loader.steps(0, loader.steps_per_epoch):            # one epoch
        for batch in step.micro_batches:                            # this rank's micro-batches
            last = batch is step.micro_batches[-1]
            with nullcontext() if last else accelerator.no_sync(model):
                batch = batch.to(accelerator.device)
                loss = task.loss(model(batch), batch.targets, batch.weights)  # sum over rows
                accelerator.backward(loss * accelerator.num_processes / step.rows)
        optimizer.step()
        optimizer.zero_grad()
    eval_loader = create_eval_loader(eval_rows, tokenizer, task, config, accelerator)
    evaluator = Evaluator(eval_loader, task, config, accelerator)
    scores = evaluator.evaluate(classifier).scores
"""

import gc
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertdist.api import Evaluation as Evaluation
    from bertdist.api import Run as Run
    from bertdist.api import evaluate as evaluate
    from bertdist.api import train as train
    from bertdist.core.args import read_config as read_config
    from bertdist.core.config import TrainConfig as TrainConfig
    from bertdist.core.errors import BertdistError as BertdistError
    from bertdist.core.errors import CheckpointError as CheckpointError
    from bertdist.core.errors import ConfigError as ConfigError
    from bertdist.core.errors import DataError as DataError
    from bertdist.core.errors import ModelError as ModelError
    from bertdist.core.errors import NonFiniteError as NonFiniteError
    from bertdist.core.errors import RankLost as RankLost
    from bertdist.data.loader import create_train_loader as create_train_loader
    from bertdist.models.classifier import load_classifier as load_classifier
    from bertdist.predict import Predictor as Predictor
    from bertdist.training.evaluation import Evaluator as Evaluator

__version__ = "0.2.0.dev0"

_MODULES = {  # public name -> the module that defines it
    "train": "bertdist.api",
    "evaluate": "bertdist.api",
    "Run": "bertdist.api",
    "Evaluation": "bertdist.api",
    "Predictor": "bertdist.predict",
    "load_classifier": "bertdist.models.classifier",
    "create_train_loader": "bertdist.data.loader",
    "Evaluator": "bertdist.training.evaluation",
    "read_config": "bertdist.core.args",
    "TrainConfig": "bertdist.core.config",
    "BertdistError": "bertdist.core.errors",
    "CheckpointError": "bertdist.core.errors",
    "ConfigError": "bertdist.core.errors",
    "DataError": "bertdist.core.errors",
    "ModelError": "bertdist.core.errors",
    "NonFiniteError": "bertdist.core.errors",
    "RankLost": "bertdist.core.errors",
}
__all__ = [
    "BertdistError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Evaluator",
    "ModelError",
    "NonFiniteError",
    "Predictor",
    "RankLost",
    "Run",
    "TrainConfig",
    "__version__",
    "create_train_loader",
    "evaluate",
    "load_classifier",
    "read_config",
    "resource_folder",
    "train",
]


def resource_folder(name: str) -> Path:
    """The folder "accelerate_configs" or "launch": in a clone, an editable install and a wheel.

    Raises ValueError for any other name.
    """
    if name not in ("accelerate_configs", "launch"):
        raise ValueError(f"no resource folder {name!r}; expected 'accelerate_configs' or 'launch'")
    return Path(__file__).resolve().parent / name


if not TYPE_CHECKING:  # a type checker takes the names above, and sees what is misspelt

    def __getattr__(name: str) -> Any:
        """Import the module of a public name when the name is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if "ipykernel" in sys.modules:  # tqdm warns in every notebook without ipywidgets
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("tqdm.auto")
        collects = gc.isenabled()
        gc.disable()  # modules are no garbage: looking for some takes a tenth of an import's time
        try:
            return getattr(importlib.import_module(_MODULES[name]), name)
        finally:
            if collects:
                gc.enable()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `bertdist.train` the function, whatever was imported first.

    After loading the submodule bertdist.train, Python binds it to the attribute `train` of this
    package, where it would hide the function of that name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
