"""Workers on one study that are killed at random, and what becomes of its trials."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from normsearch.searching import LeaseTerms, NormSampler, counted_trials, leases, open_storage, run_trials

STUDY = "storm"
#: What a worker would import: a second and more for each, were it not forked from a process that has it.
_PRELOADED = [
    "benchmarks.search.storms",
    "alembic.command",
    "optuna.storages._rdb.models",
    "sqlalchemy.dialects.postgresql.psycopg",
]
METHODS = ("batch", "group", "layer", "instance")
SPACE = {f"bn{site}": CategoricalDistribution(METHODS) for site in range(4)}


@dataclass(frozen=True)
class Work:
    """What workers do.

    Attributes:
        storage: its path or URL.
        folder: where they write what they did.
        n_trials: how many trials the study shall have.
        seconds: how long a trial sleeps.
        terms: of the leases.
        elsewhere: workers behave as on several machines: nobody sees others' processes.

    """

    storage: str
    folder: Path
    n_trials: int
    seconds: float
    terms: LeaseTerms
    elsewhere: bool = False


@dataclass(frozen=True)
class Verdict:
    """What became of the trials of a study.

    Attributes:
        complete: trials that are complete and count.
        lost: numbers that should be complete and are not.
        twice: numbers that were told more than once, or that count beyond the budget.
        stuck: trials that still run, or wait though they are within the budget.
        wrong: trials whose value is not that of their parameters, or whose parameters changed.
        repeated: trials that were begun more than once.
        surplus: trials that did not count.
        struck: how many workers were killed or stopped while at work.

    """

    complete: int
    lost: list[int]
    twice: list[int]
    stuck: list[int]
    wrong: list[int]
    repeated: int
    surplus: int
    struck: int

    def is_clean(self) -> bool:
        """Say whether nothing is amiss."""
        return not (self.lost or self.twice or self.stuck or self.wrong)


def value(params: dict[str, str]) -> float:
    """Return the score of a plan."""
    return sum((site + 1) * METHODS.index(params[name]) for site, name in enumerate(SPACE)) / 10


def work(task: Work) -> None:
    """Run trials: what each worker process does. It begins when the file ``go`` is there."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if task.elsewhere:
        leases._process = lambda: None
    study = optuna.load_study(
        study_name=STUDY, storage=open_storage(task.storage), sampler=NormSampler(seed=0)
    )
    (task.folder / f"ready-{os.getpid()}").touch()
    while not (task.folder / "go").exists():
        time.sleep(0.01)

    def evaluate(trial: Trial) -> float:
        _note(task.folder / "begun", f"{trial.number} {'/'.join(trial.params[name] for name in SPACE)}")
        time.sleep(task.seconds)
        return value(trial.params)

    def told(trial: FrozenTrial) -> None:
        _note(task.folder / "told", str(trial.number))

    run_trials(study, evaluate, n_trials=task.n_trials, distributions=SPACE, on_trial=told, terms=task.terms)
    _note(task.folder / "ended", str(time.time()))


def begin(task: Work) -> optuna.Study:
    """Make the study, before any worker starts."""
    return optuna.create_study(study_name=STUDY, storage=open_storage(task.storage), direction="maximize")


class Workers:
    """Worker processes, started without importing everything anew; none is left in the end."""

    def __init__(self, task: Work) -> None:
        self._task = task
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self.alive: list[BaseProcess] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.alive:
            process.kill()
            process.join()

    def start(self) -> BaseProcess:
        """Start one."""
        process = self._context.Process(target=work, args=(self._task,))
        process.start()
        self.alive.append(process)
        return process

    def at_work(self, rng: random.Random, stopped: set[int]) -> BaseProcess | None:
        """Return one that is at work, as soon as all but one are or are stopped; None if all have ended."""
        while True:
            running = [process for process in self.alive if process.is_alive() and process.pid not in stopped]
            ready = [p for p in running if (self._task.folder / f"ready-{p.pid}").exists()]
            if len(ready) >= len(running) - 1:
                return rng.choice(ready) if ready else None
            time.sleep(0.01)

    def kill(self, process: BaseProcess) -> None:
        """End one as the kernel does when memory runs out."""
        process.kill()
        process.join()
        self.alive.remove(process)

    def wait(self, seconds: float) -> None:
        """Wait until all have ended by themselves.

        Raises:
            RuntimeError: one has not, or with an error.

        """
        end = time.monotonic() + seconds
        for process in self.alive:
            process.join(max(end - time.monotonic(), 0))
            if process.exitcode != 0:
                raise RuntimeError(f"a worker ended with {process.exitcode} (None: not at all)")


def storm(
    task: Work, *, workers: int, kills: int, pause: float, seed: int, stops: int = 0, limit: float = 60
) -> Verdict:
    """Let workers run, kill and replace one at random ``kills`` times, and see what became of the trials.

    ``stops`` of them are stopped instead for longer than a lease's patience, and then go on.
    """
    study = begin(task)
    (task.folder / "go").touch()
    rng = random.Random(seed)
    blows = [signal.SIGKILL] * kills + [signal.SIGSTOP] * stops
    rng.shuffle(blows)
    stopped: list[tuple[float, int]] = []
    struck = 0
    with Workers(task) as crew:
        for _ in range(workers):
            crew.start()
        for blow in blows:
            time.sleep(rng.expovariate(1 / pause))
            stopped = _let_go_on(stopped)
            victim = crew.at_work(rng, {pid for _, pid in stopped})
            if victim is None or victim.pid is None:
                break
            if blow == signal.SIGKILL:
                crew.kill(victim)
                crew.start()
            else:
                os.kill(victim.pid, signal.SIGSTOP)
                stopped.append((time.monotonic() + 1.5 * task.terms.patience, victim.pid))
            struck += 1
        while stopped:
            time.sleep(0.02)
            stopped = _let_go_on(stopped)
        crew.wait(limit)
    return verdict(study, task, struck)


def _let_go_on(stopped: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Continue those whose time has come; return the others."""
    now = time.monotonic()
    for until, pid in stopped:
        # It may have been at its end when it was struck.
        with suppress(ProcessLookupError):
            if until <= now:
                os.kill(pid, signal.SIGCONT)
    return [(until, pid) for until, pid in stopped if until > now]


def timed(task: Work, workers: int, limit: float) -> float:
    """Return how long workers take for all trials, from a common start when all have opened the study."""
    begin(task)
    with Workers(task) as crew:
        for _ in range(workers):
            crew.start()
        end = time.monotonic() + 60
        while len(list(task.folder.glob("ready-*"))) < workers:
            if time.monotonic() > end:
                raise RuntimeError("the workers did not start")
            time.sleep(0.01)
        start = time.time()
        (task.folder / "go").touch()
        crew.wait(limit)
    return max(float(line) for line in _lines(task.folder / "ended")) - start


def verdict(study: optuna.Study, task: Work, struck: int) -> Verdict:
    """Compare a study with what its workers wrote down."""
    trials = study.get_trials(deepcopy=False)
    counted = counted_trials(trials)
    complete = {trial.number: trial for trial in counted if trial.state == TrialState.COMPLETE}
    begun = [line.split() for line in _lines(task.folder / "begun")]
    starts = Counter(int(number) for number, _ in begun)
    told = Counter(int(line) for line in _lines(task.folder / "told"))
    twice = {number for number, times in told.items() if times > 1}
    twice |= {trial.number for trial in counted[task.n_trials :] if trial.state.is_finished()}
    wrong = {n for n, trial in complete.items() if trial.value != value(trial.params)}
    # A trial that has been evaluated keeps its parameters, whoever goes on with it.
    wrong |= {
        int(number)
        for number, plan in begun
        if int(number) in complete and plan != "/".join(complete[int(number)].params[name] for name in SPACE)
    }
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    # One too many may wait for ever: it was made by a worker that was killed before it could drop it.
    waiting = [trial for trial in counted[: task.n_trials] if trial.state == TrialState.WAITING]
    return Verdict(
        complete=len(complete),
        lost=sorted(trial.number for trial in counted[: task.n_trials] if trial.number not in complete)
        + list(range(len(counted), task.n_trials)),
        twice=sorted(twice),
        stuck=sorted({trial.number for trial in [*running, *waiting]}),
        wrong=sorted(wrong),
        repeated=sum(times > 1 for times in starts.values()),
        surplus=len(trials) - len(counted),
        struck=struck,
    )


def _note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
