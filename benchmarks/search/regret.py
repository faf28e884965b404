"""Regret of NormSampler beside Optuna's samplers on landscapes whose best plan is known.

    python -m benchmarks.search.regret [--seeds N] [--landscapes NAME ...] [--contenders NAME ...] [--fresh]

Main effects with pairs, and with triples too, at 20 and 53 sites with 7 methods (a landscape for each seed);
and the two factorials from real training (benchmarks/search/factorials.py), searched by the scores of one
training seed. Regret is (best − score) / (best − mean of random plans) of the trial that scored best with its
noise, by its score without: 0 for the best plan, 1 for a random one. The best plan of a factorial is known;
of a constructed landscape it is what repeated climbs from many plans find (``landscapes._best``): a regret
below zero would show one that they missed. In brackets: regret of the same plan by the other training seed.

Priors correlate .4 and .6 with the sites' own effects; the misleading one −.6, the unrelated one 0. Two
that nobody has bound what the others can do: the exact one is these effects themselves, the shrunk one is
that of .6 with every site's row scaled by how far it deserves trust. Seconds are CPU seconds of one
thread. Bars: see ``bars``; factorials, whose best plan is soon found, are also looked at after 10 and 20
trials. GP gets 40 trials at 53 sites, which is more than equal wall time. Evaluation seeds start at 7000;
the sampler was tuned on constructed landscapes of others (100 to 139), and on factorials of the same two
tasks with other methods, steps and training seeds. Finished studies are kept in results/regret.jsonl and
not run again as long as landscapes and samplers are the same.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import optuna
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.search.factorials import FACTORIALS
from benchmarks.search.runs import CONTENDERS, PROBLEMS, Ledger, Run, spread, study

RESULTS = Path(__file__).parents[1] / "results"
FIRST_SEED = 7000
OURS = "NormSampler"
PRIORS = ("prior .4", "prior .6")
#: Priors that nobody has.
BOUNDS = ("shrunk prior .6", "exact prior")
MISLEADING = ("misleading prior", "unrelated prior")
#: After how many trials regret is looked at.
TRIALS, TRIALS_OF_FACTORIALS = (20, 40, 50, 100, 200), (10, 20, 50, 200)


@dataclass(frozen=True)
class Row:
    """Mean regret of a sampler on a landscape after a number of trials, with its standard error."""

    landscape: str
    contender: str
    trials: int
    regret: float
    error: float
    held_out: float | None
    held_out_error: float | None


@dataclass(frozen=True)
class Bar:
    """What was demanded of a landscape, what came out, and whether it holds."""

    what: str
    landscape: str
    found: str
    holds: bool


def trials_of(landscape: str) -> tuple[int, ...]:
    return TRIALS_OF_FACTORIALS if landscape in FACTORIALS else TRIALS


def rows(found: dict[tuple[str, str], list[Run]]) -> list[Row]:
    """Return every row for which there are trials."""
    made = []
    for (landscape, contender), runs in found.items():
        for trials in trials_of(landscape):
            if trials <= min(len(run.scores) for run in runs):
                held: tuple[float | None, float | None] = (None, None)
                if runs[0].held_out:
                    held = spread([run.held_out_regret(trials) for run in runs])
                made.append(
                    Row(landscape, contender, trials, *spread([run.regret(trials) for run in runs]), *held)
                )
    return made


def bars(landscape: str, runs: dict[str, list[Run]]) -> list[Bar]:
    """Return the bars of one landscape that its runs can say something about."""
    ours, made = runs[OURS], []

    def add(what: str, found: str, holds: bool) -> None:
        made.append(Bar(what, landscape, found, holds))

    def mean(contender: str, trials: int) -> float:
        return spread([run.regret(trials) for run in runs[contender]])[0]

    early = 10 if landscape in FACTORIALS else 50
    if "TPE" in runs:
        for trials in (10, 20, 50) if landscape in FACTORIALS else (50,):
            a, b = mean(OURS, trials), mean("TPE", 4 * trials)
            add(f"at {trials} trials ≤ TPE at {4 * trials}", f"{a:.3f}, {b:.3f}", a <= b)
    if "GP" in runs:
        for trials in (10, 20, 50) if landscape in FACTORIALS else (50,):
            pairs = list(zip(ours, runs["GP"], strict=True))
            other = [gp.trials_within(run.wall(trials)) for run, gp in pairs]
            a = mean(OURS, trials)
            b = float(np.mean([gp.regret(n) for (_, gp), n in zip(pairs, other, strict=True)]))
            what = f"at {trials} trials ≤ GP at equal wall time"
            add(what, f"{a:.3f}, {b:.3f} ({np.mean(other):.0f} trials)", a <= b)
    for prior in [name for name in PRIORS if name in runs]:
        pairs = list(zip(runs[prior], ours, strict=True))
        better = sum(one.regret(early) < other.regret(early) for one, other in pairs)
        change, error = spread([one.regret(early) - other.regret(early) for one, other in pairs])
        found = f"{better} of {len(ours)}; {mean(prior, early):.3f}, {mean(OURS, early):.3f} "
        found += f"({change:+.3f} ± {error:.3f})"
        for bound in [name for name in BOUNDS if name in runs]:
            wins = sum(
                one.regret(early) < other.regret(early) for one, other in zip(runs[bound], ours, strict=True)
            )
            found += f"; {bound} {wins} of {len(ours)}, {mean(bound, early):.3f}"
        add(f"{prior} at {early} below none in 9 of 10", found, better >= 0.9 * len(ours))
    for prior in [name for name in MISLEADING if name in runs]:
        last = min(len(run.scores) for run in (*ours, *runs[prior]))
        difference, error = spread(
            [one.regret(last) - other.regret(last) for one, other in zip(runs[prior], ours, strict=True)]
        )
        found = f"{difference:+.3f} ± {error:.3f} (standard error)"
        add(f"{prior} no worse than none at {last}", found, difference <= 2 * error)
    return made


def proposal_seconds(sites: int = 53, trials: int = 200, counted: int = 20) -> list[float]:
    """Return what the last proposals of a long study cost."""
    problem = PROBLEMS[f"pairs, {sites} sites"](FIRST_SEED)
    return study(problem, OURS, FIRST_SEED, trials).seconds[-counted:]


def shown(landscape: str, every: list[Row]) -> Table:
    """Return one landscape's table."""
    made = Table(title=f"{landscape}: mean regret ± standard error")
    made.add_column("sampler")
    for trials in trials_of(landscape):
        made.add_column(f"{trials} trials", justify="right")
    for contender in CONTENDERS:
        cells = []
        for trials in trials_of(landscape):
            row = next(
                (r for r in every if (r.landscape, r.contender, r.trials) == (landscape, contender, trials)),
                None,
            )
            cells.append("" if row is None else f"{row.regret:.3f} ± {row.error:.3f}")
            if row is not None and row.held_out is not None:
                cells[-1] += f" ({row.held_out:.3f})"
        if any(cells):
            made.add_row(contender, *cells)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print the tables, write results/regret.json; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="run every study again")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default 10)")
    parser.add_argument("--landscapes", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    console, seeds = Console(), range(FIRST_SEED, FIRST_SEED + options.seeds)
    ledger = Ledger(RESULTS / "regret.jsonl", fresh=options.fresh)
    wanted = [
        key
        for key in product(options.landscapes, seeds, options.contenders)
        if (key[0], key[2], key[1]) not in ledger.runs
    ]
    made: tuple[str, int] | None = None
    for landscape, seed, contender in track(wanted, "studies", console=console):
        if made != (landscape, seed):
            problem, made = PROBLEMS[landscape](seed), (landscape, seed)
        ledger.add(study(problem, contender, seed))
    found = {
        (landscape, contender): [ledger.runs[landscape, contender, seed] for seed in seeds]
        for landscape, contender in product(options.landscapes, options.contenders)
    }
    every = rows(found)
    checks: list[Bar] = []
    for landscape in options.landscapes:
        console.print(shown(landscape, every))
        if OURS in options.contenders:
            checks += bars(landscape, {c: found[landscape, c] for c in options.contenders})
    if OURS in options.contenders:
        seconds = proposal_seconds()
        text = f"{np.mean(seconds) * 1e3:.0f} ms, slowest {max(seconds) * 1e3:.0f} ms"
        checks.append(
            Bar(
                "≤ 100 ms a proposal", "53 sites, 7 methods, 200 trials", text, float(np.mean(seconds)) <= 0.1
            )
        )
    for bar in checks:
        console.print(
            f"{'holds ' if bar.holds else 'missed'} {bar.landscape}: {bar.what}: {bar.found}",
            style=None if bar.holds else "red",
        )
    document = {
        "optuna": optuna.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "seeds": list(seeds),
        "bars": [asdict(bar) for bar in checks],
        "rows": [asdict(row) for row in every],
    }
    (RESULTS / "regret.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(bar.holds for bar in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
