"""Real problems for the search: a trained network, how it is trained on, and four splits.

Every problem starts from a network that learned its first task with BatchNorm, and asks for the best network
after a short training under a condition that BatchNorm does not like. ``train`` and the split of the search
are what trials see, ``confirmation`` decides what is returned, ``test`` is read by the benchmark alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normsearch
from benchmarks import signals
from benchmarks.digits import Split
from benchmarks.finetuning import Batches, Condition, Network
from normsearch.searching import Recipe, Task, accuracy

#: Digits in the splits: to train on, to search by, to confirm by, to test on.
SIZES = (600, 300, 400, 497)
_BATCH = 500


@dataclass(frozen=True)
class Problem:
    """One seed's problem."""

    network: nn.Module
    task: Task
    test: list[Any]


@dataclass(frozen=True)
class _Fresh:
    """Shuffled batches whose order follows from torch's random state at the start of a training."""

    split: Split
    condition: Condition
    generator: torch.Generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(Batches(self.split, self.condition, self.generator))


def pairs(split: Split) -> list[tuple[Tensor, Tensor]]:
    """Return a split as a list of batches."""
    return list(zip(split.images.split(_BATCH), split.labels.split(_BATCH), strict=True))


def _problem(network: nn.Module, splits: list[Split], condition: Condition, steps: int, lr: float) -> Problem:
    train, searched, confirmed, test = splits
    task = Task(
        train=_Fresh(train, condition, torch.Generator()),
        validation=pairs(searched),
        confirmation=pairs(confirmed),
        loss=F.cross_entropy,
        metric=accuracy,
        recipe=Recipe(steps=steps, lr=lr),
    )
    return Problem(network, task, pairs(test))


@cache
def _digits(seed: int) -> tuple[nn.Module, list[Split]]:
    """Return a network that has learned upright digits, and the splits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    splits = [Split(images[rows], labels[rows]) for rows in order.split(SIZES)]
    return _taught(Network(), splits[0], seed, 600), splits


def _taught(network: nn.Module, split: Split, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    batches = Batches(split, Condition("", 32), torch.Generator().manual_seed(seed))
    return normsearch.finetune(
        network, batches, loss=F.cross_entropy, steps=steps, lr=1e-2, in_place=True
    ).eval()


def _styled(split: Split) -> Split:
    """Return each digit in three styles: faint, bright, and with a ramp from left to right."""
    ramp = torch.linspace(0, 1, split.images.shape[-1])
    styles = (0.3 * split.images, 0.6 * split.images + 0.4, 0.5 * split.images + 0.5 * ramp)
    return Split(torch.cat(styles), split.labels.repeat(len(styles)))


def style(seed: int) -> Problem:
    """Trained on clean digits, scored on digits whose contrast and brightness are shifted."""
    network, (train, *others) = _digits(seed)
    return _problem(network, [train, *map(_styled, others)], Condition("batch 32", 32), 60, 3e-3)


def one_class(seed: int) -> Problem:
    """Digits turned by a quarter, every batch of four from one class."""
    network, splits = _digits(seed)
    turned = [Split(split.images.rot90(1, (2, 3)), split.labels) for split in splits]
    return _problem(network, turned, Condition("one class", 4, one_class=True), 150, 3e-3)


def drift(seed: int) -> Problem:
    """MNIST-1D, BatchNorm1d: trained on clean curves, scored on curves of another gain, offset and slope."""
    network, splits = _curves(seed)
    train, *others = splits
    return _problem(network, [train, *map(_drifted, others)], Condition("batch 32", 32), 60, 3e-3)


def _drifted(split: Split) -> Split:
    slope = torch.linspace(-1, 1, split.images.shape[-1])
    curves = split.images
    shifted = (0.3 * curves, curves + 1.5, curves + 1.5 * slope)
    return Split(torch.cat(shifted), split.labels.repeat(len(shifted)))


@cache
def _curves(seed: int) -> tuple[nn.Module, list[Split]]:
    first, _ = signals.data()
    order = torch.randperm(len(first.labels), generator=torch.Generator().manual_seed(seed))
    splits = [
        Split(first.images[rows], first.labels[rows]) for rows in order[:4400].split((3000, 300, 500, 600))
    ]
    return _taught(signals.SignalNet(24), splits[0], seed, 800), splits


def contrast(seed: int) -> Problem:
    """Which digit, and is it faint? Every batch of eight is faint or is not; scored on both."""
    network, splits = _digits(seed)
    assert isinstance(network, Network)
    # Twenty classes; the second ten start as the first.
    wider = Network()
    wider.load_state_dict(network.state_dict())
    head = nn.Linear(wider.head.in_features, 20)
    with torch.no_grad():
        head.weight.copy_(network.head.weight.repeat(2, 1))
        head.bias.copy_(network.head.bias.repeat(2))
    wider.head = head
    both = [
        Split(torch.cat((s.images, 0.5 * s.images)), torch.cat((s.labels, s.labels + 10))) for s in splits
    ]
    problem = _problem(wider.eval(), both, Condition("", 8), 150, 3e-3)
    train = _OneKind(both[0], 8, torch.Generator())
    return Problem(problem.network, replace(problem.task, train=train), problem.test)


@dataclass(frozen=True)
class _OneKind:
    """Shuffled batches in which all are faint, or none."""

    split: Split
    size: int
    generator: torch.Generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.split.labels), generator=self.generator)
        kinds = [order[(self.split.labels[order] >= 10) == faint] for faint in (False, True)]
        batches = [rows for kind in kinds for rows in kind.split(self.size) if len(rows) == self.size]
        for index in torch.randperm(len(batches), generator=self.generator).tolist():
            yield self.split.images[batches[index]], self.split.labels[batches[index]]


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "style shift": style,
    "one class per batch": one_class,
    "MNIST-1D, drift": drift,
    "digit and contrast": contrast,
}
