"""Does a search return better networks than the best uniform choice? On data that it never saw.

    python -m benchmarks.search.real [--seeds N] [--only PROBLEM] [--variants NAME ...]

Four problems (benchmarks/search/problems.py), five seeds each with their own splits and networks. A search
of 40 trials trains on ``train``, scores on one split and confirms on another; what it returns is trained
anew under five fresh seeds and scored on ``test``, beside the best uniform plan (the one that scored best in
the search, as a user would choose), and beside ``switchable`` and ``batch_instance`` everywhere, which learn
their mixture by gradient as their papers have it. Differences are paired by seed. Variants leave a part out:

    search      everything
    no prior    no supernet, nothing enqueued from it
    no uniform  no uniform plans first: random plans until there is a model
    no veto     methods stay where sensitivity would forbid them

Bars: nowhere below the best uniform plan by more than one standard error of the difference; above it beyond
noise (95 %) in two problems at least. results/search_real.jsonl has a line for each run and is gone on with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna
import torch
from rich.console import Console
from rich.table import Table

import normsearch
from benchmarks.finetuning import T95
from benchmarks.search.problems import PROBLEMS, Problem
from normsearch.searching import NormSampler, Resident, SearchSpace, accuracy
from normsearch.searching.confirming import candidates, decide
from normsearch.searching.objectives import Evaluation
from normsearch.searching.supernet import sense
from normsearch.searching.tables import Table as Prior
from normsearch.sensitivities import Sensitivity

RESULTS = Path(__file__).parents[1] / "results"
SEEDS, TRIALS, CONFIRM, TOP = 5, 40, 5, 3
#: Seeds of the trainings that are scored on test; no search uses them.
FRESH = tuple(range(1000, 1005))
#: Files of the search that decide what is found; the others keep trials, check arguments and show results.
_DECIDING = (
    "acquisitions",
    "ceilings",
    "climbing",
    "confirming",
    "encoding",
    "learned",
    "objectives",
    "preparing",
    "resident",
    "sampler",
    "space",
    "supernet",
    "surrogate",
    "tables",
    "tasks",
)
VARIANTS = ("search", "no prior", "no uniform", "no veto")
GRADIENT = ("switchable", "batch_instance")


class _WithoutFirst(NormSampler):
    """NormSampler that starts at random."""

    def _first(self, problem: Any, ceilings: Any) -> list[Any]:
        return []


@dataclass(frozen=True)
class Run:
    """One search and what its plans score on test, in the order of ``FRESH``."""

    source: str
    problem: str
    seed: int
    variant: str
    plan: Mapping[str, str]
    is_uniform: bool
    best_uniform: str
    returned: tuple[float, ...]
    uniform: tuple[float, ...]
    by_gradient: Mapping[str, tuple[float, ...]]
    seconds: float

    @property
    def gain(self) -> float:
        """How much better the returned plan is than the best uniform one, in the mean."""
        return fmean(self.returned) - fmean(self.uniform)

    @property
    def error(self) -> float:
        """The gain's standard error over trainings."""
        differences = [a - b for a, b in zip(self.returned, self.uniform, strict=True)]
        return stdev(differences) / math.sqrt(len(differences))


def source() -> str:
    """Return a hash of the code that decides what a run gives."""
    package = Path(normsearch.__file__).parent
    files = [*sorted((package / "searching").glob("*.py")), Path(__file__).with_name("problems.py")]
    kept = [path for path in files if path.stem in (*_DECIDING, "problems")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in kept)).hexdigest()[:12]


def tested(problem: Problem, evaluation: Evaluation, params: Mapping[str, Any]) -> tuple[float, ...]:
    """Return a plan's scores on test under fresh seeds."""

    def objective(model: torch.nn.Module, trial: Any) -> float:
        problem.task(model, trial)
        with normsearch.forward.evaluating(model):
            return accuracy(model, problem.test)

    return tuple(evaluation.again(objective, params, 0, seed)[0] for seed in FRESH)


def run(name: str, seed: int, variant: str) -> Run:
    """Search once and test what comes out."""
    start = time.monotonic()
    problem = PROBLEMS[name](seed)
    if variant == "search":
        found = normsearch.search(
            problem.network, problem.task, n_trials=TRIALS, confirm=CONFIRM, top=TOP, seed=seed
        )
        space, study, params = found.space, found.study, found.params
        chosen = found.confirmation[found.chosen].uniform
    else:
        space, study, params, chosen = _without(problem, seed, variant)
    evaluation = _evaluation(problem, space, seed)
    # The best uniform plan is that of the search itself, also beside variants.
    uniform = _best_uniform(study, space) or _measured_uniform(evaluation, study)
    return Run(
        source(),
        name,
        seed,
        variant,
        dict(params),
        chosen is not None,
        uniform,
        tested(problem, evaluation, params),
        tested(problem, evaluation, space.uniform(uniform)),
        {m: tested(problem, evaluation, space.uniform(m)) for m in GRADIENT} if variant == "search" else {},
        time.monotonic() - start,
    )


def _evaluation(problem: Problem, space: SearchSpace, seed: int) -> Evaluation:
    return Evaluation(Resident(problem.network), space, problem.task, ("maximize",), seed=seed)


def _without(
    problem: Problem, seed: int, variant: str
) -> tuple[SearchSpace, optuna.Study, Mapping[str, Any], str | None]:
    """Search by the same parts but one."""
    resident = Resident(problem.network)
    inputs = [next(iter(problem.task.train))[0] for _ in range(4)]
    space = SearchSpace.of(resident.model, inputs=inputs[0])
    drift: Sensitivity = normsearch.sensitivity(resident.model, space.methods, inputs)
    space = space.in_order(drift.sites)
    if variant != "no veto":
        vetoes = drift.vetoes(normsearch.searching.preparing.VETO)
        space = space.without({p: [m for m in ms if m != "batch"] for p, ms in vetoes.items()}, "veto")
    prior: Prior | None = None
    if variant != "no prior":
        prior = sense(resident, space, problem.task, seed=seed)
    kind = _WithoutFirst if variant == "no uniform" else NormSampler
    study = optuna.create_study(direction="maximize", sampler=kind(seed=seed, prior=prior))
    if variant != "no uniform":
        for method in space.methods:
            study.enqueue_trial(space.uniform(method), skip_if_exists=True)
    if prior is not None:
        best = {name: max(row, key=lambda m: row[m]) for name, row in prior.items()}
        study.enqueue_trial(space.free(best), skip_if_exists=True)
    evaluation = Evaluation(resident, space, problem.task, ("maximize",), seed=seed)
    for _ in range(TRIALS):
        trial = study.ask(dict(space.distributions))
        study.tell(trial, evaluation.trial(study, trial))
    given = candidates(study, space, TOP, prior)
    scores: dict[tuple[int, int], float] = {}

    def score(candidate: Any, number: int) -> float:
        key = candidate.number, number
        scores[key] = evaluation.again(problem.task.confirm, candidate.params, candidate.number, number)[0]
        return scores[key]

    seeds = [seed + 1 + n for n in range(CONFIRM)]
    index, _ = decide(given, score, seeds, maximize=True, samples=problem.task.confirmed_on())
    return space, study, given[index].params, given[index].uniform


def _best_uniform(study: optuna.Study, space: SearchSpace) -> str | None:
    values = {tuple(sorted(space.free(t.params).items())): t.value for t in study.trials if t.values}
    found = {m: values.get(tuple(sorted(space.uniform(m).items()))) for m in space.methods}
    known = {m: value for m, value in found.items() if value is not None}
    return max(known, key=lambda m: known[m]) if known else None


def _measured_uniform(evaluation: Evaluation, study: optuna.Study) -> str:
    """Score every uniform plan as a trial would be, for a search that did not."""
    space = evaluation.space
    scores = {
        m: evaluation.again(evaluation.objective, space.uniform(m), 0, evaluation.seed)[0]
        for m in space.methods
    }
    return max(scores, key=lambda m: scores[m])


def interval(values: list[float]) -> tuple[float, float]:
    """Return a mean and half its 95 % interval over seeds."""
    if len(values) < 2:
        return fmean(values), math.inf
    return fmean(values), T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def summary(runs: list[Run]) -> dict[str, Any]:
    """Return, by problem and variant, means over seeds with 95 % intervals, and the bars."""
    document: dict[str, Any] = {}
    for name in PROBLEMS:
        for variant in VARIANTS:
            mine = [r for r in runs if r.problem == name and r.variant == variant]
            if not mine:
                continue
            gain, half = interval([r.gain for r in mine])
            document.setdefault(name, {})[variant] = {
                "seeds": len(mine),
                "returned": interval([fmean(r.returned) for r in mine]),
                "best_uniform": interval([fmean(r.uniform) for r in mine]),
                "best_uniform_methods": [r.best_uniform for r in mine],
                "gain": (gain, half),
                "better_beyond_noise": gain - half > 0,
                "mixes": sum(not r.is_uniform for r in mine),
                "worst": min(r.gain / (r.error or 1e-9) if r.gain < 0 else 0.0 for r in mine),
                "by_gradient": {
                    m: interval([fmean(r.by_gradient[m]) for r in mine])
                    for m in GRADIENT
                    if mine[0].by_gradient
                },
                "seconds": fmean(r.seconds for r in mine),
            }
    return document


def show(document: dict[str, Any], console: Console) -> None:
    """Print the summary."""
    table = Table(title="accuracy on test, mean over seeds ± 95 %")
    for head in ("problem", "variant", "returned", "best uniform", "gain", "worst gain / error", *GRADIENT):
        table.add_column(head)
    for name, variants in document.items():
        for variant, row in variants.items():
            texts = [f"{row[key][0]:.3f} ± {row[key][1]:.3f}" for key in ("returned", "best_uniform")]
            learned = [f"{row['by_gradient'][m][0]:.3f}" if row["by_gradient"] else "" for m in GRADIENT]
            gain = f"{row['gain'][0]:+.3f} ± {row['gain'][1]:.3f}"
            table.add_row(name, variant, *texts, gain, f"{row['worst']:.2f}", *learned)
    console.print(table)


def main() -> None:
    """Run what is missing, print and keep the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", action="append", choices=list(PROBLEMS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console()
    path = RESULTS / "search_real.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [Run(**json.loads(line)) for line in lines if line.endswith("}")]
    runs = [one for one in runs if one.source == source()]
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in runs))
    done = {(one.problem, one.seed, one.variant) for one in runs}
    for variant in arguments.variants:
        for seed in range(arguments.seeds):
            for name in arguments.only or PROBLEMS:
                if (name, seed, variant) in done:
                    continue
                one = run(name, seed, variant)
                runs.append(one)
                with path.open("a") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
                console.print(
                    f"{variant}, {name}, seed {seed}: returned {fmean(one.returned):.3f}, "
                    f"uniform {one.best_uniform} {fmean(one.uniform):.3f}, {one.seconds:.0f} s"
                )
    document = summary(runs)
    show(document, console)
    versions = {"torch": torch.__version__, "optuna": optuna.__version__, "threads": torch.get_num_threads()}
    settings = {"trials": TRIALS, "confirm": CONFIRM, "top": TOP, "fresh_seeds": len(FRESH)}
    text = json.dumps({"versions": versions, "settings": settings, "problems": document}, indent=1)
    (RESULTS / "search_real.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
