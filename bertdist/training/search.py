"""The trials of a sweep, as an Optuna study in a journal file: what was tried, and what is next.

    search = open_search(folder, plan)
    trial = search.next()                      # one more, until there are plan.trials
    prune = search.report(trial.number, 1, 0.81)      # the score of its first evaluation
    search.finish(trial.number, COMPLETE, 0.84)

1. A trial is one line of the journal, with all its values: there is none with half of them.
2. Its values are a function of the seed, its number and the trials before it. The sampler is made
   anew for each trial, with a seed of (--seed, number): its random state is not in the journal, and
   a sweep that was killed continues with the values that it would have had. With several trials at
   a time they depend on which trials have ended, too.
3. Numbers are given under a lock, so several processes may take trials of one study.
4. The locks are flock's (filelock): the system releases them when a process ends, however it ends.
   Optuna's own are files that a killed process leaves behind.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from filelock import FileLock
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bertdist.core.config import RunConfig
from bertdist.core.errors import ConfigError
from bertdist.core.search_space import Choices, Dimension, Space, Value, grid_of, read_space
from bertdist.tasks.metric_names import LOWER_IS_BETTER

JOURNAL = "journal.log"
STUDY = "sweep"
SETTINGS, NUMBER = "settings", "trials"  # attributes of the study, of the plan
RUNNING, COMPLETE, PRUNED, FAIL = (
    *(TrialState.RUNNING, TrialState.COMPLETE),
    *(TrialState.PRUNED, TrialState.FAIL),
)
# Trials before the samplers and pruners use what they have seen; as Optuna's own defaults.
RANDOM_TRIALS = 10
UNPRUNED_TRIALS = 5
LEAST_FOR_IMPORTANCE = 4  # finished trials

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["median", "hyperband", "none"]


@dataclass(frozen=True)
class SearchPlan:
    """What a sweep tries."""

    space: Space
    trials: int
    sampler: Sampler
    pruner: Pruner
    seed: int
    metric: str | None  # that compares trials; None: the first that is computed
    settings: Mapping[str, Any]  # all that must be the same when it continues, as JSON


class _Lock(JournalFileOpenLock):
    """flock in place of a file that exists."""

    def __init__(self, file: Path) -> None:
        self._lock = FileLock(file)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class Search:
    """The study of a sweep, of `open_search` or `read_search`."""

    def __init__(
        self, folder: Path, plan: SearchPlan, storage: JournalStorage, study: Study
    ) -> None:
        self.plan, self._storage, self._study = plan, storage, study
        self._lock = FileLock(folder / ".sweep.lock")
        self._distributions = {name: _distribution(of) for name, of in plan.space.items()}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """What several processes do one after the other."""
        with self._lock:
            yield

    @property
    def minimizes(self) -> bool:
        """Whether a lower score is better."""
        return bool(self._study.direction == StudyDirection.MINIMIZE)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials so far, by number."""
        return self._study.get_trials(deepcopy=False)

    @property
    def best(self) -> FrozenTrial | None:
        """The finished trial with the best score, of equal ones the first."""
        done = [trial for trial in self.trials if trial.state == COMPLETE]
        sign = 1 if self.minimizes else -1
        return min(
            done, key=lambda trial: (sign * float(trial.value or 0), trial.number), default=None
        )

    def next(self) -> FrozenTrial | None:
        """One more trial, which is running from now on; None if there are enough."""
        with self.locked():
            trials = self.trials
            number = len(trials)
            if number >= self.plan.trials:
                return None
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=RUNNING,
                    params=self._suggest(trials),
                    distributions=self._distributions,
                )
            )
            return self.trials[number]

    def _suggest(self, trials: list[FrozenTrial]) -> dict[str, Value]:
        """The values of the trial after these."""
        number = len(trials)
        if self.plan.sampler == "grid":
            return list(grid_of(self.plan.space))[number]
        seed = int(np.random.SeedSequence([self.plan.seed, number]).generate_state(1)[0])
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
        if self.plan.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
        # In memory: the trial is added to the journal whole.
        study = optuna.create_study(direction=self._study.direction, sampler=sampler)
        study.add_trials(trials)
        return dict(study.ask(self._distributions).params)

    def report(self, number: int, evaluation: int, score: float) -> bool:
        """The score of a trial's evaluation (1 is the first); returns whether to end the trial.

        One that was reported before the last is not judged again.
        """
        last = self.trials[number].last_step or 0
        if evaluation < last:
            return False
        if evaluation > last:
            self._storage.set_trial_intermediate_value(self._id(number), evaluation, score)
        return bool(self._study.pruner.prune(self._study, self.trials[number]))

    def finish(
        self, number: int, state: TrialState, value: float | None = None, **facts: Any
    ) -> None:
        """A trial has ended. value: its score, if it is COMPLETE; facts: JSON to keep with it."""
        for name, fact in facts.items():
            self._storage.set_trial_user_attr(self._id(number), name, fact)
        self._study.tell(number, value, state)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(
            self._storage.get_study_id_from_name(STUDY), number
        )

    def importance(self) -> dict[str, float]:
        """The share of each setting in the variance of the scores (fANOVA), the largest first;
        empty if there are too few finished trials.
        """
        done = [trial for trial in self.trials if trial.state == COMPLETE]
        if len(done) < LEAST_FOR_IMPORTANCE or len({trial.value for trial in done}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.plan.seed)
        found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}


def open_search(folder: Path, plan: SearchPlan) -> Search:
    """The study in a folder of a sweep, which is made if it is new.

    Raises ConfigError if it began with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".sweep.lock"):
        storage = _open_journal(folder, repair=True)
        study = optuna.create_study(
            storage=storage,
            study_name=STUDY,
            direction="minimize" if plan.metric in LOWER_IS_BETTER else "maximize",
            load_if_exists=True,
            pruner=_create_pruner(plan.pruner),
        )
        before = study.user_attrs.get(SETTINGS)
        if before is None:
            study.set_user_attr(SETTINGS, dict(plan.settings))
        else:
            _check_settings(folder, before, plan.settings)
        if study.user_attrs.get(NUMBER) != plan.trials:
            study.set_user_attr(NUMBER, plan.trials)
    return Search(folder, plan, storage, study)


def read_search(folder: Path) -> Search:
    """The study in a folder, to look at. Raises ConfigError if there is none."""
    storage = _open_journal(folder, repair=False) if (folder / JOURNAL).is_file() else None
    studies = storage.get_all_studies() if storage else []
    if storage is None or [study.study_name for study in studies] != [STUDY]:
        raise ConfigError(f"{folder} is not the folder of a sweep: there is no study in {JOURNAL}.")
    study = optuna.load_study(study_name=STUDY, storage=storage)
    settings = study.user_attrs.get(SETTINGS, {})
    plan = SearchPlan(
        space=read_space([f"{name}={values}" for name, values in settings.get("try", {}).items()]),
        trials=study.user_attrs.get(NUMBER, 0),
        sampler=settings.get("sampler", "tpe"),
        pruner=settings.get("pruner", "none"),
        seed=settings.get("seed", RunConfig.seed),
        metric=settings.get("metric_for_best_model"),
        settings=settings,
    )
    return Search(folder, plan, storage, study)


def _open_journal(folder: Path, repair: bool) -> JournalStorage:
    """The journal. repair: remove what a process wrote of a line before it was killed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    path, lock = folder / JOURNAL, _Lock(folder / ".journal.lock")
    if repair and path.exists():
        lock.acquire()
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged, or not of a sweep ({error}).") from None


def _check_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        default = "the default"  # only other values are saved
        changes = ", ".join(
            f"{name} was {before.get(name, default)}, is {now.get(name, default)}" for name in names
        )
        raise ConfigError(
            f"The sweep in {folder} began with other settings, and scores would not compare "
            f"({changes}): give those, or another --output_dir. --trials may change."
        )


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.values)
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.is_int:
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=step)


def _create_pruner(name: Pruner) -> optuna.pruners.BasePruner:
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner()
    return optuna.pruners.NopPruner()
