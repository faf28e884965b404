"""What a search costs beside training: everything in a trial that is not the objective, over the objective.

    python -m benchmarks.search.overhead [--trials N]

Two cases: a small network on digits (four sites, 60 steps, a fraction of a second a trial) and ResNet-50 (53
sites, tied to what the trials can tell apart; 10 steps at batch 8 and 64 × 64 pixels, random images).
Conversion in place, restoring weights and structure, the study's bookkeeping in a journal file and
NormSampler's proposals all count.
Bar: 5 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.search.problems import style
from normsearch.searching import Objective, Recipe, Search, Task

RESULTS = Path(__file__).parents[1] / "results"


def digits() -> tuple[nn.Module, Objective]:
    """Return the small case."""
    problem = style(0)
    return problem.network, problem.task


def resnet50() -> tuple[nn.Module, Objective]:
    """Return the large case."""
    torch.manual_seed(0)
    pairs: list[tuple[Tensor, Tensor]] = [
        (torch.randn(8, 3, 64, 64), torch.randint(1000, (8,))) for _ in range(10)
    ]
    model = torchvision.models.resnet50()
    task = Task(
        train=pairs,
        validation=pairs[:2],
        loss=F.cross_entropy,
        metric=lambda model, given: 0.0,
        recipe=Recipe(steps=10),
    )
    return model, task


CASES: dict[str, Callable[[], tuple[nn.Module, Objective]]] = {"digits": digits, "resnet50": resnet50}


def measure(name: str, trials: int) -> dict[str, Any]:
    """Return the overhead of each trial."""
    model, objective = CASES[name]()
    inside: list[float] = []

    def timed(converted: nn.Module, trial: Any) -> Any:
        start = time.perf_counter()
        value = objective(converted, trial)
        inside.append(time.perf_counter() - start)
        return value

    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Search(model, timed, n_trials=trials, storage=Path(folder) / "study.journal")
        marks = [time.perf_counter()]
        run.optimize(on_progress=lambda progress: marks.append(time.perf_counter()))
    # The first mark is before the first report, which has no trial yet.
    whole = [after - before for before, after in pairwise(marks[1:])]
    shares = [(total - own) / own for total, own in zip(whole, inside, strict=True)]
    return {
        "trials": trials,
        "choices": len(run.space.choices),
        "trial_seconds": median(inside),
        "overhead_seconds": median(total - own for total, own in zip(whole, inside, strict=True)),
        "overhead": (sum(whole) - sum(inside)) / sum(inside),
        "overhead_quartiles": [sorted(shares)[len(shares) // 4], sorted(shares)[3 * len(shares) // 4]],
    }


def main() -> None:
    """Measure both cases and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=40)
    trials = parser.parse_args().trials
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = {name: measure(name, trials) for name in CASES}
    for name, row in found.items():
        print(
            f"{name}: {row['overhead']:.1%} of {row['trial_seconds']:.2f} s a trial "
            f"({row['overhead_seconds'] * 1e3:.0f} ms; {row['choices']} choices)"
        )
    versions = {"torch": torch.__version__, "optuna": optuna.__version__, "threads": 1}
    text = json.dumps({"versions": versions, "cases": found}, indent=1)
    (RESULTS / "search_overhead.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
