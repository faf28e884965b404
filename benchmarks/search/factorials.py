"""Full factorials from real training: every plan of four sites and four methods, fine-tuned and scored.

    python -m benchmarks.search.factorials [TASK ...] [--fresh]

The network of benchmarks/finetuning.py learns digits with BatchNorm; each of the 256 plans converts it and is
fine-tuned on the same batches, with two training seeds (network, splits and batches all differ between them):

    style      fine-tuned on clean digits, scored on digits with shifted contrast, brightness and a ramp
    one class  fine-tuned on turned digits, every batch of four from one class, scored on turned digits

The score is accuracy on 1,200 (style) or 400 images. results/factorials/TASK.jsonl has a line for each plan
and seed; an interrupted run goes on where it stood.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

import normsearch
from benchmarks.digits import Split, accuracy
from benchmarks.finetuning import Batches, Condition, Problem, problem
from normsearch.forward import evaluating

RESULTS = Path(__file__).parents[1] / "results" / "factorials"
SEEDS = (0, 1)
RATE = 3e-3


@dataclass(frozen=True)
class Factorial:
    """One task: its methods, its batches and steps, and what it is scored on."""

    name: str
    methods: tuple[str, ...]
    condition: Condition
    steps: int
    train: Callable[[Problem], Split]
    test: Callable[[Problem], Split]

    @property
    def path(self) -> Path:
        """Where its scores are kept."""
        return RESULTS / f"{self.name.replace(' ', '_')}.jsonl"

    @property
    def recipe(self) -> str:
        """What tells scores of this recipe from those of an older one."""
        what = repr((self.methods, self.condition, self.steps, RATE))
        return hashlib.sha256(what.encode()).hexdigest()[:12]


def shifted(given: Problem) -> Split:
    """Return upright test digits in three styles: faint, bright, and with a ramp from left to right."""
    upright = given.test.images.rot90(-1, (2, 3))
    ramp = torch.linspace(0, 1, 8)
    styles = (0.3 * upright, 0.6 * upright + 0.4, 0.5 * upright + 0.5 * ramp)
    return Split(torch.cat(styles), given.test.labels.repeat(len(styles)))


FACTORIALS = {
    task.name: task
    for task in (
        Factorial(
            "style",
            ("batch", "group", "layer", "instance"),
            Condition("batch 32", 32),
            60,
            lambda given: given.source,
            shifted,
        ),
        Factorial(
            "one class",
            ("batch", "group", "instance", "switchable"),
            Condition("one class, batch 4", 4, one_class=True),
            150,
            lambda given: given.train,
            lambda given: given.test,
        ),
    )
}


def score(task: Factorial, plan: tuple[str, ...], seed: int) -> float:
    """Convert, fine-tune and score one plan."""
    given = problem(seed)
    sites = [site.path for site in normsearch.find_sites(given.network)]
    torch.manual_seed(seed)
    network = normsearch.convert(given.network, dict(zip(sites, plan, strict=True)))
    normsearch.finetune(
        network,
        Batches(task.train(given), task.condition, torch.Generator().manual_seed(seed)),
        loss=_loss,
        steps=task.steps,
        lr=RATE,
        in_place=True,
    )
    with evaluating(network):
        return accuracy(network, task.test(given))


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def recorded(task: Factorial) -> dict[tuple[tuple[str, ...], int], float]:
    """Return the scores there are, by plan and seed."""
    found = {}
    for line in task.path.read_text().splitlines() if task.path.exists() else []:
        # An interrupted write leaves half a line at most, which is run again.
        if line.endswith("}"):
            document: dict[str, Any] = json.loads(line)
            if document["recipe"] == task.recipe:
                found[tuple(document["plan"]), document["seed"]] = float(document["accuracy"])
    return found


def table(task: Factorial) -> NDArray[np.float64]:
    """Return a finished factorial's scores: (seeds, 4, 4, 4, 4)."""
    scores = recorded(task)
    plans = list(product(task.methods, repeat=4))
    return np.array([[scores[plan, seed] for plan in plans] for seed in SEEDS]).reshape(
        -1, *(len(task.methods),) * 4
    )


def record(task: Factorial, console: Console, *, fresh: bool) -> None:
    """Run what is missing of a task."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    done = {} if fresh else recorded(task)

    def line(plan: tuple[str, ...], seed: int, value: float) -> str:
        return json.dumps({"recipe": task.recipe, "plan": plan, "seed": seed, "accuracy": value}) + "\n"

    task.path.write_text("".join(line(*key, value) for key, value in done.items()))
    wanted = [key for key in product(product(task.methods, repeat=4), SEEDS) if key not in done]
    for plan, seed in track(wanted, task.name, console=console):
        with task.path.open("a") as file:
            file.write(line(plan, seed, score(task, plan, seed)))


def show(task: Factorial, console: Console) -> None:
    """Print what a finished factorial says."""
    scores = table(task)
    flat = [row.ravel() for row in scores]
    uniform = {m: [float(s[(k,) * 4]) for s in scores] for k, m in enumerate(task.methods)}
    agreement = float(np.corrcoef(np.stack(flat))[0, 1])
    console.print(f"{task.name}: torch {torch.__version__}; the two seeds correlate {agreement:.2f}")
    for seed, row in enumerate(flat):
        best = np.unravel_index(row.argmax(), scores.shape[1:])
        console.print(
            f"  seed {seed}: best {row.max():.1%} ({', '.join(task.methods[int(k)] for k in best)}), uniform "
            + ", ".join(f"{m} {values[seed]:.1%}" for m, values in uniform.items())
            + f", mean {row.mean():.1%}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Record what is missing and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(FACTORIALS), help=", ".join(FACTORIALS))
    parser.add_argument("--fresh", action="store_true", help="run every plan again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # On maps of 8×8 its set-up costs more than it saves.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    console = Console()
    for name in options.tasks:
        record(FACTORIALS[name], console, fresh=options.fresh)
        show(FACTORIALS[name], console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
