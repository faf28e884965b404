"""Fine-tuning a trained network on a shifted task with tiny or one-sided batches, by what replaces BatchNorm.

    python -m benchmarks.finetuning [--fresh] [--seeds N]

A small network with BatchNorm learns digits; the shifted task is digits turned by a quarter. Each variant is
fine-tuned by normsearch.finetune for 1,000 steps on the same batches at three learning rates; the rate is
chosen on validation, the accuracy reported on test, paired over seeds with 95 % intervals. Bars: the best
converted network, chosen on validation too, is nowhere below the plain swap, beats BatchNorm beyond noise at
batch 1 and with one class per batch, and is nowhere below it beyond noise.

Finished cells are kept in results/finetuning.jsonl and not run again, unless --fresh.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normsearch
from benchmarks.digits import Split, accuracy
from normsearch.forward import evaluating

RESULTS = Path(__file__).parent / "results"
STEPS = (50, 200, 1000)
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = 5
#: Sizes of the splits: to train the network, to fine-tune it, to choose a rate, to report.
SIZES = (700, 500, 197, 400)
WIDTH = 16
WARMUP = 10
#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Condition:
    """How batches are drawn."""

    name: str
    size: int
    one_class: bool = False


CONDITIONS = (
    Condition("batch 1", 1),
    Condition("batch 2", 2),
    Condition("batch 4", 4),
    Condition("one class, batch 4", 4, one_class=True),
)


class Network(nn.Module):
    """Four 3×3 convolutions with BatchNorm for 8×8 digits."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        channels = (1, width, 2 * width, 2 * width, 2 * width)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip(channels[:-1], channels[1:], (1, 2, 1, 1), strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, 8, 8) to logits (N, 10)."""
        y: Tensor = self.head(self.features(x).mean((2, 3)))
        return y


@dataclass(frozen=True)
class Batches:
    """Shuffled full batches of one epoch each time they are read."""

    split: Split
    condition: Condition
    generator: torch.Generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.split.labels), generator=self.generator)
        size = self.condition.size
        if self.condition.one_class:
            classes = self.split.labels[order]
            same = [order[classes == c] for c in range(10)]
            full = torch.stack([rows for part in same for rows in part.split(size) if len(rows) == size])
            batches = full[torch.randperm(len(full), generator=self.generator)]
        else:
            batches = order[: len(order) // size * size].reshape(-1, size)
        for rows in batches:
            yield self.split.images[rows], self.split.labels[rows]


@dataclass(frozen=True)
class Problem:
    """One seed's network, trained on the first task, and its data."""

    network: nn.Module
    source: Split
    train: Split
    validation: Split
    test: Split


@cache
def problem(seed: int) -> Problem:
    """Return a seed's problem; the network is trained here in seconds."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    source, *shifted = order.split(SIZES)
    torch.manual_seed(seed)
    first = Split(images[source], labels[source])
    network = normsearch.finetune(
        Network(),
        Batches(first, Condition("", 32), torch.Generator().manual_seed(seed)),
        loss=F.cross_entropy,
        steps=600,
        lr=1e-2,
        in_place=True,
    )
    turned = images.rot90(1, (2, 3))
    return Problem(network.eval(), first, *(Split(turned[rows], labels[rows]) for rows in shifted))


@cache
def calibrated(seed: int) -> nn.Module:
    """Return a seed's network with group normalization, calibrated on 256 inputs of the first task."""
    given = problem(seed)
    inputs = given.source.images[:256].split(64)
    return normsearch.calibrate(normsearch.convert(given.network, "group"), given.network, inputs, seed=seed)


Make = Callable[[int], nn.Module]


def _convert(to: str, keep: Any = "function") -> Make:
    return lambda seed: normsearch.convert(problem(seed).network, to, keep=keep)


REFERENCE, PLAIN = "BatchNorm", "plain swap (group)"
VARIANTS: dict[str, Make] = {
    REFERENCE: lambda seed: copy.deepcopy(problem(seed).network),
    "frozen": _convert("frozen"),
    "frozen, γ and β trained": _convert("frozen(trainable=true)"),
    PLAIN: _convert("group", "nothing"),
    "group, folded": _convert("group"),
    "layer, folded": _convert("layer"),
    "group, calibrated": lambda seed: copy.deepcopy(calibrated(seed)),
    "batch_renorm": _convert("batch_renorm"),
    "switchable": _convert("switchable"),
}
#: What the bars are about; a second look leaves frozen layers out, which could be had without converting.
CONVERTED = tuple(variant for variant in VARIANTS if variant not in (REFERENCE, PLAIN))
NOT_FROZEN = tuple(variant for variant in CONVERTED if not variant.startswith("frozen"))


@dataclass(frozen=True)
class Cell:
    """One run: accuracies on validation and test after each number of steps in ``STEPS``."""

    seed: int
    condition: str
    variant: str
    rate: float
    validation: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def key(self) -> tuple[int, str, str, float]:
        """What was run."""
        return self.seed, self.condition, self.variant, self.rate


def run(seed: int, condition: Condition, variant: str, rate: float) -> Cell:
    """Fine-tune one variant once."""
    given = problem(seed)
    torch.manual_seed(seed)
    network = VARIANTS[variant](seed)
    scores: dict[int, tuple[float, float]] = {}

    def look(progress: normsearch.Progress) -> None:
        if progress.done in STEPS:
            with evaluating(network):
                scores[progress.done] = accuracy(network, given.validation), accuracy(network, given.test)

    normsearch.finetune(
        network,
        Batches(given.train, condition, torch.Generator().manual_seed(seed)),
        loss=F.cross_entropy,
        steps=STEPS[-1],
        lr=rate,
        warmup=WARMUP,
        in_place=True,
        on_progress=look,
    )
    validation, test = zip(*(scores[step] for step in STEPS), strict=True)
    return Cell(seed, condition.name, variant, rate, validation, test)


def recipe() -> str:
    """Return what tells cells of this recipe from those of an older one."""
    what = repr((STEPS, SIZES, WIDTH, WARMUP, CONDITIONS))
    return hashlib.sha256(what.encode()).hexdigest()[:12]


class Ledger:
    """The finished cells, one JSON object a line."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self.cells: dict[tuple[int, str, str, float], Cell] = {}
        for line in [] if fresh or not path.exists() else path.read_text().splitlines():
            # An interrupted write leaves half a line at most, which is run again.
            if line.endswith("}"):
                document = json.loads(line)
                if document["recipe"] == recipe():
                    cell = Cell(
                        seed=document["seed"],
                        condition=document["condition"],
                        variant=document["variant"],
                        rate=document["rate"],
                        validation=tuple(document["validation"]),
                        test=tuple(document["test"]),
                    )
                    self.cells[cell.key] = cell
        self._rewrite()

    def add(self, cell: Cell) -> None:
        """Keep a finished cell."""
        self.cells[cell.key] = cell
        with self._path.open("a") as file:
            file.write(self._line(cell))

    def _rewrite(self) -> None:
        self._path.write_text("".join(self._line(cell) for cell in self.cells.values()))

    def _line(self, cell: Cell) -> str:
        return json.dumps({"recipe": recipe(), **asdict(cell)}, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Row:
    """One variant under one condition after one number of steps; differences are test accuracy, paired."""

    condition: str
    steps: int
    variant: str
    rate: float
    validation: float
    test: float
    over_batch_norm: float
    over_batch_norm_interval: float
    over_plain: float
    over_plain_interval: float


def rows(cells: dict[tuple[int, str, str, float], Cell], seeds: range) -> list[Row]:
    """Return every row; the rate is the one with the best validation accuracy over all seeds."""
    found = []
    for condition, (index, steps) in product(CONDITIONS, enumerate(STEPS)):
        chosen: dict[str, tuple[float, float, list[float]]] = {}
        for variant in VARIANTS:
            choices = [
                (
                    fmean(cells[seed, condition.name, variant, rate].validation[index] for seed in seeds),
                    rate,
                    [cells[seed, condition.name, variant, rate].test[index] for seed in seeds],
                )
                for rate in RATES
            ]
            chosen[variant] = max(choices, key=lambda choice: choice[0])
        for variant, (validation, rate, test) in chosen.items():
            found.append(
                Row(
                    condition.name,
                    steps,
                    variant,
                    rate,
                    validation,
                    fmean(test),
                    *_paired(test, chosen[REFERENCE][2]),
                    *_paired(test, chosen[PLAIN][2]),
                )
            )
    return found


def _paired(one: list[float], other: list[float]) -> tuple[float, float]:
    """Return the mean difference and half the width of its 95 % interval."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return differences[0], float("inf")
    return fmean(differences), T95[len(differences) - 1] * stdev(differences) / len(differences) ** 0.5


def best(every: list[Row], among: tuple[str, ...]) -> list[Row]:
    """Return, for each condition and number of steps, the variant that validation would choose."""
    return [
        max(
            (r for r in every if (r.condition, r.steps) == (c.name, steps) and r.variant in among),
            key=lambda r: r.validation,
        )
        for c, steps in product(CONDITIONS, STEPS)
    ]


def misses(chosen: list[Row]) -> list[str]:
    """Return the bars that the chosen networks miss."""
    found = []
    for r in chosen:
        where = f"{r.condition}, {r.steps} steps, {r.variant}"
        if r.over_plain < 0:
            found.append(f"{where}: {r.over_plain:+.1%} over the plain swap")
        if r.over_batch_norm + r.over_batch_norm_interval < 0:
            found.append(f"{where}: {r.over_batch_norm:+.1%} over BatchNorm, beyond noise")
        must_win = r.condition == CONDITIONS[0].name or "one class" in r.condition
        if must_win and r.over_batch_norm - r.over_batch_norm_interval <= 0:
            found.append(
                f"{where}: {r.over_batch_norm:+.1%} ± {r.over_batch_norm_interval:.1%} over BatchNorm: "
                "no win beyond noise"
            )
    return found


def table(condition: Condition, every: list[Row]) -> Table:
    """Return one condition's table: test accuracy, and the paired difference from BatchNorm."""
    shown = Table(title=f"{condition.name}: test accuracy (difference from BatchNorm, 95 % interval)")
    shown.add_column("variant")
    for steps in STEPS:
        shown.add_column(f"{steps} steps", justify="right")
    for variant in VARIANTS:
        line = [r for r in every if r.condition == condition.name and r.variant == variant]
        shown.add_row(variant, *(_cell(r) for r in line))
    return shown


def _cell(r: Row) -> str:
    if r.variant == REFERENCE:
        return f"{r.test:.1%}"
    return f"{r.test:.1%} ({r.over_batch_norm:+.1%} ± {r.over_batch_norm_interval:.1%})"


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print the tables, write results/finetuning.json; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds (default {SEEDS})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # On maps of 8×8 its set-up costs more than it saves.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    console, seeds = Console(), range(options.seeds)
    RESULTS.mkdir(exist_ok=True)
    ledger = Ledger(RESULTS / "finetuning.jsonl", fresh=options.fresh)
    wanted = [
        (seed, condition, variant, rate)
        for seed, condition, variant, rate in product(seeds, CONDITIONS, VARIANTS, RATES)
        if (seed, condition.name, variant, rate) not in ledger.cells
    ]
    for cell in track(wanted, "fine-tuning", console=console):
        ledger.add(run(*cell))
    every = rows(ledger.cells, seeds)
    chosen = {"best converted": best(every, CONVERTED), "best, frozen ones left out": best(every, NOT_FROZEN)}
    for condition in CONDITIONS:
        console.print(table(condition, every))
    for name, networks in chosen.items():
        console.print(f"\n{name}:", style="bold")
        for r in networks:
            console.print(
                f"{r.condition}, {r.steps} steps: {r.variant}, {r.over_batch_norm:+.1%} ± "
                f"{r.over_batch_norm_interval:.1%} over BatchNorm, {r.over_plain:+.1%} ± "
                f"{r.over_plain_interval:.1%} over the plain swap"
            )
        for miss in misses(networks):
            console.print(f"missed: {miss}", style="red")
    document = {
        "torch": torch.__version__,
        "seeds": len(seeds),
        "recipe": recipe(),
        "rows": [asdict(r) for r in every],
        **{name: [asdict(r) for r in networks] for name, networks in chosen.items()},
        "missed": {name: misses(networks) for name, networks in chosen.items()},
    }
    (RESULTS / "finetuning.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 1 if misses(chosen["best converted"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
