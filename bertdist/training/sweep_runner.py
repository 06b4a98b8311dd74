"""The loop of a sweep: start trials, read their evaluations, end those that promise little.

    runner = SweepRunner(search, folder, config, start, jobs=2, ...)
    finished = runner.run()

Killed at any moment, the same command continues: a trial that was running resumes as the run that
it is. Whoever handles a trial holds a lock of it, so that several processes may take trials of one
sweep (--worker), and a trial whose process was killed is free for the next.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from bertdist.core.config import TrainConfig
from bertdist.core.errors import BertdistError, ConfigError
from bertdist.core.search_space import Value, shown, with_values
from bertdist.core.terminal import EXIT_STOPPED
from bertdist.tasks.metric_names import LOWER_IS_BETTER, selected_score
from bertdist.training.search import COMPLETE, FAIL, PRUNED, RUNNING, Search
from bertdist.training.trial_runs import (
    IN_USE,
    TRIALS,
    Evaluation,
    TrialProcess,
    error_of,
    is_finished,
    is_in_use,
    last_saved_step,
    log_file,
    read_evaluations,
    remove_weights,
    rows_of,
    trial_folder,
)

FIRST_FAILURES = 3  # so many without a success: the cause is not in the values
RESTARTS = 2  # of a trial that is killed from outside, without progress
POLL_SECONDS = 0.5

Start = Callable[[int, Mapping[str, Value], int], TrialProcess]


@dataclass
class _Job:
    """A trial that this process handles."""

    number: int
    values: dict[str, Value]
    slot: int
    lock: FileLock
    process: TrialProcess | None = None  # None: the folder is still in use
    seen: int = 0  # evaluations
    pruned: bool = False
    restarts: int = 0
    step: int = -1  # of the newest checkpoint, at the last start
    began: float = field(default_factory=time.monotonic)


class SweepRunner:
    """Runs the trials of a search."""

    def __init__(
        self,
        search: Search,
        folder: Path,
        config: TrainConfig,
        start: Start,
        jobs: int,
        say: Callable[[str], None],
        stop_reason: Callable[[], str],
        keep_all: bool = False,
        is_worker: bool = False,
        discard: Callable[[Path], None] = remove_weights,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """config: what all trials share. stop_reason: "" to go on. is_worker: it does not wait for
        trials that other processes run. discard: removes the weights of a run.
        """
        self.search, self.folder, self.config, self.start = search, folder, config, start
        self.jobs_at_once, self.say, self.stop_reason = jobs, say, stop_reason
        self.keep_all, self.is_worker, self.poll_seconds = keep_all, is_worker, poll_seconds
        self.discard = discard
        self._jobs: list[_Job] = []
        self._failures = 0  # in a row, before the first success
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Until all trials have ended: True. False after a stop, or if others still run some.

        Raises BertdistError if the first trials all fail.
        """
        self._check_folders()
        self._tidy()
        try:
            while not self.stop_reason():
                for job in list(self._jobs):
                    self._watch(job)
                while len(self._jobs) < self.jobs_at_once and (taken := self._take()):
                    self._jobs.append(taken)
                    self._begin(taken)
                if not self._jobs and (self.is_worker or not self._running_trials()):
                    return self.is_complete
                time.sleep(self.poll_seconds)
        finally:
            self._stop_all()
        return False

    def _check_folders(self) -> None:
        """Raise ConfigError for a run in the folder of a trial that is yet to come: it would count
        as the trial, with whatever settings it was trained.
        """
        found = sorted({path.parent for path in self.folder.glob(f"{TRIALS}/[0-9]*/*")})
        started = len(self.search.trials)  # asked after the folders: others may start some
        for run in found:
            if run.name.isdecimal() and started <= int(run.name) < self.search.plan.trials:
                raise ConfigError(
                    f"{run} holds files, and this sweep has not started trial {int(run.name)} (its "
                    "journal.log was removed?): move the folder away, or give another --output_dir."
                )

    @property
    def is_complete(self) -> bool:
        """Whether all trials have ended."""
        return len(self.search.trials) >= self.search.plan.trials and not self._running_trials()

    def _running_trials(self) -> list[FrozenTrial]:
        return [trial for trial in self.search.trials if trial.state == RUNNING]

    # ---- One trial

    def _take(self) -> _Job | None:
        """A trial that was interrupted, else a new one; None if there is none to start."""
        taken = {job.number for job in self._jobs}
        slot = next(k for k in range(self.jobs_at_once) if k not in {x.slot for x in self._jobs})
        with self.search.locked():
            for trial in self._running_trials():
                if trial.number not in taken and (lock := self._claim(trial.number)):
                    return _Job(trial.number, dict(trial.params), slot, lock)
            lock = self._claim(len(self.search.trials))
            new = self.search.next() if lock else None
            if lock and new is None:
                lock.release()
            return _Job(new.number, dict(new.params), slot, lock) if lock and new else None

    def _claim(self, number: int) -> FileLock | None:
        lock = FileLock(self.folder / TRIALS / f".{number:04d}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _begin(self, job: _Job) -> None:
        """Start it, unless it has ended meanwhile, or an earlier process is still at it."""
        run = trial_folder(self.folder, job.number)
        if is_in_use(run):
            self.say(
                f"Trial {job.number}: an earlier process still trains it; waiting for its end."
            )
            return
        self._judge(job)
        if job.pruned:
            self._end(job, PRUNED)
        elif is_finished(run):
            self._complete(job)
        else:
            job.step = last_saved_step(run)
            done = f", from step {job.step}" if job.step >= 0 else ""
            words = ", ".join(f"{name} {shown(value)}" for name, value in job.values.items())
            self.say(f"Trial {job.number}{done}: {words}.")
            job.process = self.start(job.number, job.values, job.slot)

    def _watch(self, job: _Job) -> None:
        run = trial_folder(self.folder, job.number)
        if job.process is None:
            if not is_in_use(run):
                self._begin(job)
            return
        code = job.process.poll()
        self._judge(job)
        if code is None:
            return
        if job.pruned:
            self._end(job, PRUNED)
        elif code == 0 and is_finished(run):
            self._complete(job)
        elif not self.stop_reason():  # else the signal was for all
            error = error_of(run, log_file(self.folder, job.number), code)
            # It was stopped, or met a process that an earlier sweep has left and that ends soon.
            if code < 0 or code == EXIT_STOPPED or IN_USE in error:
                self._restart(job, error if code != EXIT_STOPPED else "it was asked to stop")
            else:
                self._fail(job, error)

    def _judge(self, job: _Job) -> None:
        """Report the evaluations that are new, in their order; the first bad one ends the trial.

        Whatever the process has done since then: what is tried next must not depend on its speed.
        """
        run = trial_folder(self.folder, job.number)
        known = self.search.trials[job.number].last_step or 0
        length = with_values(self.config, job.values).run
        for index, evaluation in enumerate(read_evaluations(run), 1):
            if index <= job.seen or job.pruned:
                continue
            job.seen = index
            name, rank = self._selected(evaluation)
            if index > known:
                score = evaluation.scores.get(name)
                text = "undefined" if score is None else f"{score:.4f}"
                self.say(f"Trial {job.number}, evaluation {index}: {name} {text}.")
            if rank is None:
                continue
            self._check_direction(name)
            prune = self.search.report(job.number, index, evaluation.scores[name])
            job.pruned = prune and not evaluation.is_last(length)
            if job.pruned:
                self.say(f"Trial {job.number} is pruned: it promises less than the others.")
                if job.process is not None:
                    job.process.stop()

    def _selected(self, evaluation: Evaluation) -> tuple[str, float | None]:
        task = self.config.task
        return selected_score(evaluation.scores, task.metric_for_best_model)

    def _check_direction(self, name: str) -> None:
        if (name in LOWER_IS_BETTER) != self.search.minimizes:
            raise ConfigError(
                f"The trials are compared by {name}, of which "
                f"{'lower' if name in LOWER_IS_BETTER else 'higher'} is better; give "
                f"--metric_for_best_model {name} and another --output_dir."
            )

    # ---- Its end

    def _complete(self, job: _Job) -> None:
        run = trial_folder(self.folder, job.number)
        ranked = [(*self._selected(x), x) for x in read_evaluations(run)]
        defined = [(rank, name, x) for name, rank, x in ranked if rank is not None]
        if not defined:
            name = ranked[0][0] if ranked else "its score"
            self._fail(job, f"{name} is undefined in every evaluation")
            return
        _, name, best = max(defined, key=lambda found: found[0])
        rows = rows_of(run)
        for trial in self.search.trials:
            before = trial.user_attrs.get("rows")
            if trial.state == COMPLETE and rows and before and before != rows:
                error = f"it had other rows than trial {trial.number}: a file has changed"
                self._end(job, FAIL, error=error)
                raise ConfigError(
                    f"Trial {job.number} does not compare: {error} since the sweep began. Put the "
                    "rows back, or give another --output_dir."
                )
        facts = {"metric": name, "step": best.step, "scores": best.scores, "rows": rows}
        self._end(job, COMPLETE, best.scores[name], **facts)
        leader = self.search.best
        first = ", the best so far" * (leader is not None and leader.number == job.number)
        self.say(f"Trial {job.number} has finished: {name} {best.scores[name]:.4f}{first}.")

    def _restart(self, job: _Job, reason: str) -> None:
        """It was ended from elsewhere: it resumes, as long as it makes progress."""
        run = trial_folder(self.folder, job.number)
        job.restarts = 0 if last_saved_step(run) > job.step else job.restarts + 1
        if job.restarts > RESTARTS:
            self._fail(job, f"{reason}, {job.restarts} times without a new checkpoint")
            return
        self.say(f"Trial {job.number}: {reason}; it resumes.")
        job.process = None
        self._begin(job)

    def _fail(self, job: _Job, error: str) -> None:
        self._end(job, FAIL, error=error)
        self.say(f"Trial {job.number} failed: {error}")
        ended_well = any(trial.state in (COMPLETE, PRUNED) for trial in self.search.trials)
        self._failures = 0 if ended_well else self._failures + 1
        if self._failures >= min(FIRST_FAILURES, self.search.plan.trials):
            log = log_file(self.folder, job.number)
            first = f"first {self._failures} trials" if self._failures > 1 else "only trial"
            raise BertdistError(
                f"The {first} failed, so the cause may be the same for all: {error} ({log}). Mend "
                "it and start the same command again."
            )

    def _end(
        self, job: _Job, state: TrialState, value: float | None = None, **facts: object
    ) -> None:
        before = self.search.trials[job.number].user_attrs.get("seconds", 0.0)
        facts["seconds"] = round(before + time.monotonic() - job.began, 1)
        if self.keep_all:
            facts["kept"] = True
        self.search.finish(job.number, state, value, **facts)
        self._jobs.remove(job)
        self._tidy()
        job.lock.release()

    def _tidy(self) -> None:
        """Of trials that have ended only the best keeps its weights, and those that ended with
        --keep_all.
        """
        if self.keep_all:
            return
        with self.search.locked():
            best = self.search.best
            for trial in self.search.trials:
                kept = trial.user_attrs.get("kept") or (best and trial.number == best.number)
                if trial.state != RUNNING and not kept:
                    self.discard(trial_folder(self.folder, trial.number))

    def _stop_all(self) -> None:
        """Stop the trials that are running, and wait until they have saved."""
        for job in self._jobs:
            if job.process is not None:
                job.process.stop()
        while any(job.process is not None and job.process.poll() is None for job in self._jobs):
            time.sleep(self.poll_seconds)
        for job in self._jobs:
            job.lock.release()
        self._jobs.clear()
