"""Pareto fronts of score and known cost: NormSampler beside Optuna's multi-objective TPE and NSGA-II.

    python -m benchmarks.search.fronts [--seeds N] [--fresh]

The first objective is the score of a landscape with pairs (20 sites, 7 methods), the second a cost that is a
sum over sites and methods, which NormSampler is told (``costs``); the others have no place for it. Costs are
like latencies (a factor for the site, one for the method, and little else) or independent of each other. TPE
and NSGA-II get the uniform plans first. Hypervolume after 100 trials, by scores without noise, above the
worst uniform plan of each objective; as parts of the box between it and the best score and the least cost,
part of which the uniform plans fill to begin with. Bar: at least 1.3 times TPE's in the mean, for either kind
of cost. Evaluation seeds start at 8000; the sampler was tuned on 100 to 109. Finished studies are kept in
results/fronts.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.search import landscapes
from benchmarks.search.landscapes import Landscape, effects_landscape
from benchmarks.search.runs import SAMPLER, as_table, names, source_hash, spread
from normsearch.searching import NormSampler

RESULTS = Path(__file__).parents[1] / "results"
FIRST_SEED, TRIALS, SITES, FACTOR = 8000, 100, 20, 1.3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Front:
    """One study's hypervolume after 7 (the uniform plans), 25, 50 and 100 trials."""

    sampler: str
    costs: str
    seed: int
    volumes: dict[str, float]


def costs(landscape: Landscape, kind: str, seed: int) -> Floats:
    """Return what each method costs at each site; like latencies, methods differ by up to ten."""
    rng = np.random.default_rng([seed, 13])
    if kind == "independent":
        return rng.random((landscape.sites, landscape.methods))
    of_methods = np.exp(rng.uniform(0, np.log(10), landscape.methods))
    of_sites = np.exp(rng.normal(0, 0.8, landscape.sites))
    table: Floats = (
        of_sites[:, None] * of_methods * np.exp(rng.normal(0, 0.2, (landscape.sites, landscape.methods)))
    )
    return table


KINDS = ("like latencies", "independent")
SAMPLERS: dict[str, Callable[[Landscape, Floats, int], BaseSampler]] = {
    "NormSampler": lambda landscape, table, seed: NormSampler(
        seed=seed, costs={1: as_table(landscape, table)}
    ),
    "TPE": lambda _, __, seed: TPESampler(seed=seed),
    "NSGA-II": lambda _, __, seed: NSGAIISampler(seed=seed, population_size=20),
}


def hypervolume(points: Floats, corner: tuple[float, float]) -> float:
    """Return the area that points (score up, cost down) dominate above a corner."""
    area, cost = 0.0, corner[1]
    inside = points[(points[:, 0] > corner[0]) & (points[:, 1] < corner[1])]
    for score, below in inside[np.argsort(-inside[:, 0], kind="stable")]:
        if below < cost:
            area += (score - corner[0]) * (cost - below)
            cost = below
    return area


def study(name: str, kind: str, seed: int) -> Front:
    """Run one study."""
    landscape = effects_landscape(seed, SITES)
    table = costs(landscape, kind, seed)
    sites, methods = names(landscape)
    where = np.arange(landscape.sites)
    made = optuna.create_study(
        directions=["maximize", "minimize"], sampler=SAMPLERS[name](landscape, table, seed)
    )
    if name != "NormSampler":
        for method in methods:
            made.enqueue_trial(dict.fromkeys(sites, method))
    noise, points = np.random.default_rng([seed, 11]), []
    for _ in range(TRIALS):
        trial = made.ask()
        plan = np.array([methods.index(trial.suggest_categorical(site, methods)) for site in sites])
        score, cost = float(landscape.score(plan[None])[0]), float(table[where, plan].sum())
        made.tell(trial, [score + landscape.noise * noise.normal(), cost])
        points.append((score, cost))
    uniform = np.repeat(np.arange(landscape.methods)[:, None], landscape.sites, 1)
    corner = float(landscape.score(uniform).min()), float(table.sum(0).max())
    box = (landscape.best - corner[0]) * (corner[1] - float(table.min(1).sum()))
    return Front(
        name,
        kind,
        seed,
        {str(n): hypervolume(np.array(points[:n]), corner) / box for n in (7, 25, 50, TRIALS)},
    )


def recipe() -> str:
    """Return what tells fronts of this code from those of an older one."""
    sources = [Path(__file__), Path(landscapes.__file__), *SAMPLER]
    return f"{source_hash(*sources)}, optuna {optuna.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print the table, write results/fronts.json; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="run every study again")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default 10)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, console, found = RESULTS / "fronts.jsonl", Console(), {}
    for line in [] if options.fresh or not path.exists() else path.read_text().splitlines():
        if line.endswith("}"):
            document = json.loads(line)
            if document.pop("recipe") == recipe():
                found[document["sampler"], document["costs"], document["seed"]] = Front(**document)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)

    def write(front: Front) -> str:
        return json.dumps({"recipe": recipe(), **asdict(front)}) + "\n"

    path.write_text("".join(map(write, found.values())))
    wanted = [key for key in product(SAMPLERS, KINDS, seeds) if key not in found]
    for key in track(wanted, "fronts", console=console):
        found[key] = study(*key)
        with path.open("a") as file:
            file.write(write(found[key]))
    documents = []
    for kind in KINDS:
        of = {name: [found[name, kind, seed].volumes for seed in seeds] for name in SAMPLERS}
        means = {name: {n: spread([v[n] for v in of[name]]) for n in of[name][0]} for name in SAMPLERS}
        table = Table(title=f"costs {kind}: hypervolume ± standard error")
        table.add_column("sampler")
        for trials in means["TPE"]:
            table.add_column(f"{trials} trials", justify="right")
        for name, values in means.items():
            table.add_row(name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in values.values()))
        console.print(table)
        last = str(TRIALS)
        ratio = means["NormSampler"][last][0] / means["TPE"][last][0]
        each = [ours[last] / theirs[last] for ours, theirs in zip(of["NormSampler"], of["TPE"], strict=True)]
        holds = ratio >= FACTOR
        console.print(
            f"{'holds' if holds else 'missed'}: {ratio:.2f} times TPE's after {last} trials (bar {FACTOR}); "
            f"by seed {min(each):.2f} to {max(each):.2f}"
        )
        documents.append(
            {"costs": kind, "hypervolume": means, "ratio": ratio, "ratios": each, "holds": holds}
        )
    document = {
        "optuna": optuna.__version__,
        "numpy": np.__version__,
        "seeds": list(seeds),
        "factor": FACTOR,
        "fronts": documents,
    }
    (RESULTS / "fronts.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(part["holds"] for part in documents) else 1


if __name__ == "__main__":
    raise SystemExit(main())
