"""Studies on landscapes: which sampler is run, what each trial gave, and the ledger that keeps it."""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from benchmarks.search import landscapes
from benchmarks.search.factorials import FACTORIALS, table
from benchmarks.search.landscapes import Landscape, effects_landscape, table_landscape
from normsearch import searching
from normsearch.searching import NormSampler

Floats = NDArray[np.float64]


def names(landscape: Landscape) -> tuple[list[str], list[str]]:
    """Return what sites and methods are called in a study."""
    return [f"site{s}" for s in range(landscape.sites)], [f"m{k}" for k in range(landscape.methods)]


def as_table(landscape: Landscape, table: Floats) -> dict[str, dict[str, float]]:
    """Return a table (sites, methods) as NormSampler takes it."""
    sites, methods = names(landscape)
    return {s: dict(zip(methods, row, strict=True)) for s, row in zip(sites, table.tolist(), strict=True)}


Problem = tuple[Landscape, Landscape | None]


def _factorial(name: str) -> Callable[[int], Problem]:
    def make(seed: int) -> Problem:
        scores = table(FACTORIALS[name])
        searched = seed % len(scores)
        return table_landscape(name, scores[searched]), table_landscape(name, scores[1 - searched])

    return make


def _constructed(sites: int, order: int) -> Callable[[int], Problem]:
    return lambda seed: (effects_landscape(seed, sites, order=order), None)


#: Landscapes by seed: what is searched, and what the plan found is scored on besides.
PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "pairs, 20 sites": _constructed(20, 2),
    "pairs, 53 sites": _constructed(53, 2),
    "triples, 20 sites": _constructed(20, 3),
    "triples, 53 sites": _constructed(53, 3),
    **{name: _factorial(name) for name in FACTORIALS},
}


@dataclass(frozen=True)
class Contender:
    """A sampler, how many trials it gets, and whether the uniform plans are enqueued for it."""

    make: Callable[[Landscape, int], BaseSampler]
    trials: int
    uniform: bool = False
    #: Where proposals take long, at 53 sites.
    fewer_trials: int | None = None
    ours: bool = False


def with_prior(correlation: float) -> Callable[[Landscape, int], BaseSampler]:
    def make(landscape: Landscape, seed: int) -> BaseSampler:
        return NormSampler(seed=seed, prior=as_table(landscape, landscape.prior(correlation, seed)))

    return make


def with_shrunk_prior(correlation: float) -> Callable[[Landscape, int], BaseSampler]:
    """Return a sampler with the same prior, each site's row shrunk as well as one can who knows the truth.

    Of effects with variance v at a site, seen with the error that ``Landscape.prior`` adds to all alike, the
    best linear estimate is c v / (c² v + (1 − c²) v̄) times what is seen, c being the correlation.
    """

    def make(landscape: Landscape, seed: int) -> BaseSampler:
        here = np.square(landscape.effects).mean(1, keepdims=True)
        error = (1 - correlation**2) * np.square(landscape.effects).mean()
        slopes = correlation * here / (correlation**2 * here + error)
        return NormSampler(seed=seed, prior=as_table(landscape, slopes * landscape.prior(correlation, seed)))

    return make


CONTENDERS = {
    "NormSampler": Contender(lambda _, seed: NormSampler(seed=seed), 100, ours=True),
    "prior .4": Contender(with_prior(0.4), 50, ours=True),
    "prior .6": Contender(with_prior(0.6), 50, ours=True),
    "shrunk prior .6": Contender(with_shrunk_prior(0.6), 50, ours=True),
    "exact prior": Contender(with_prior(1.0), 50, ours=True),
    "misleading prior": Contender(with_prior(-0.6), 100, ours=True),
    "unrelated prior": Contender(with_prior(0.0), 100, ours=True),
    "TPE": Contender(lambda _, seed: TPESampler(seed=seed), 200),
    "GP": Contender(lambda _, seed: GPSampler(seed=seed), 50, uniform=True, fewer_trials=40),
    "random": Contender(lambda _, seed: RandomSampler(seed=seed), 200),
}


@dataclass(frozen=True)
class Run:
    """One study: what each trial scored with noise, its regret without, and CPU seconds to propose it."""

    landscape: str
    contender: str
    seed: int
    scores: list[float]
    regrets: list[float]
    held_out: list[float]
    seconds: list[float]

    @property
    def key(self) -> tuple[str, str, int]:
        """What was run."""
        return self.landscape, self.contender, self.seed

    def _leader(self, trials: int) -> int:
        return int(np.argmax(self.scores[:trials]))

    def regret(self, trials: int) -> float:
        """Regret of the trial that scored best among the first."""
        return self.regrets[self._leader(trials)]

    def held_out_regret(self, trials: int) -> float:
        """The same plan's regret on the held-out landscape."""
        return self.held_out[self._leader(trials)]

    def trials_within(self, wall: float) -> int:
        """How many trials fit into so many seconds, at one second a trial beside its proposal."""
        return max(
            1, int(np.searchsorted(np.cumsum(self.seconds) + 1 + np.arange(len(self.seconds)), wall, "right"))
        )

    def wall(self, trials: int) -> float:
        """Seconds that the first trials take, at one second each beside its proposal."""
        return trials + float(np.sum(self.seconds[:trials]))


def study(problem: Problem, name: str, seed: int, trials: int | None = None) -> Run:
    """Run one study."""
    landscape, held_out = problem
    contender = CONTENDERS[name]
    made = optuna.create_study(direction="maximize", sampler=contender.make(landscape, seed))
    sites, methods = names(landscape)
    if contender.uniform:
        for method in methods:
            made.enqueue_trial(dict.fromkeys(sites, method))
    noise = np.random.default_rng([seed, 11])
    run = Run(landscape.name, name, seed, [], [], [], [])
    if trials is None:
        trials = contender.trials
        if contender.fewer_trials is not None and landscape.sites > 50:
            trials = contender.fewer_trials
    for _ in range(trials):
        start = time.process_time()
        trial = made.ask()
        plan = np.array([methods.index(trial.suggest_categorical(site, methods)) for site in sites])
        run.seconds.append(round(time.process_time() - start, 5))
        score = float(landscape.score(plan[None])[0] + landscape.noise * noise.normal())
        made.tell(trial, score)
        run.scores.append(round(score, 5))
        run.regrets.append(round(landscape.regret(plan), 5))
        if held_out is not None:
            run.held_out.append(round(held_out.regret(plan), 5))
    return run


def spread(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(
        values
    ) > 1 else 0.0


#: What a proposal of NormSampler depends on.
SAMPLER = [
    Path(searching.__file__).with_name(name)
    for name in (
        "sampler.py",
        "encoding.py",
        "surrogate.py",
        "climbing.py",
        "acquisitions.py",
        "ceilings.py",
        "tables.py",
    )
]


def source_hash(*paths: Path) -> str:
    """Return a hash of data and of code, which does not depend on the code's layout and words."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        text = path.read_text()
        if path.suffix == ".py":
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                    node.body[0] = ast.Pass()
            text = ast.dump(tree)
        digest.update(text.encode())
    return digest.hexdigest()[:12]


def recipe(landscape: str, contender: str) -> str:
    """Return what tells runs of this code from those of an older one."""
    sources = [Path(landscapes.__file__)]
    if landscape in FACTORIALS:
        sources.append(FACTORIALS[landscape].path)
    if CONTENDERS[contender].ours:
        sources += SAMPLER
    return f"{source_hash(*sources)}, optuna {optuna.__version__}"


class Ledger:
    """Finished runs, one JSON object a line; those of other code are dropped."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self.runs: dict[tuple[str, str, int], Run] = {}
        recipes: dict[tuple[str, str], str] = {}
        for line in [] if fresh or not path.exists() else path.read_text().splitlines():
            # An interrupted write leaves half a line at most, which is run again.
            if line.endswith("}"):
                document: dict[str, Any] = json.loads(line)
                kept, run = document.pop("recipe"), Run(**document)
                what = run.landscape, run.contender
                if what not in recipes:
                    recipes[what] = recipe(*what)
                if kept == recipes[what]:
                    self.runs[run.key] = run
        path.write_text("".join(map(self._line, self.runs.values())))

    def add(self, run: Run) -> None:
        """Keep a finished run."""
        self.runs[run.key] = run
        with self._path.open("a") as file:
            file.write(self._line(run))

    def _line(self, run: Run) -> str:
        return json.dumps({"recipe": recipe(run.landscape, run.contender), **asdict(run)}) + "\n"
