"""Task: an objective from two loaders: train a plan's network by a recipe and measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from optuna.trial import BaseTrial
from torch import nn

from normsearch.errors import SearchError
from normsearch.forward import call, evaluating
from normsearch.training import Loss, finetune
from normsearch.training_state import generators_of

#: A number for a network and the pairs (inputs, targets) to measure it on; larger is better.
Metric = Callable[[nn.Module, Iterable[Any]], float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How each plan's network is trained: the arguments of ``finetune``.

    Attributes:
        steps: number of batches.
        lr: learning rate.
        weight_decay: AdamW's, of the weights.
        warmup: steps over which the rate rises; by default a tenth of ``steps``.
        clip: the largest joint norm of the gradients.

    """

    steps: int = 200
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int | None = None
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """An objective for ``search`` made of data: train on one split, score on another.

    As an objective it trains the network that a trial's plan gives by ``finetune`` and returns its metric on
    ``validation``. Its ``confirm`` does the same with the metric on ``confirmation``, which no trial sees:
    where that is not given, every second batch of ``validation`` is kept for it.

    Args:
        train: pairs (inputs, targets), read again from the start when they end: a DataLoader, or a list of
            batches, which are shuffled.
        validation: pairs that trials are scored on, in the same order each time.
        loss: maps the model's output and the targets to a scalar to minimise.
        metric: maps a network in eval mode and pairs to a number, larger is better.
        recipe: how a network is trained.
        confirmation: pairs that the best plans are confirmed on; ``validation`` is then used whole.

    Raises:
        SearchError: ``validation`` has a single batch, and there is no ``confirmation``.

    Example:
        >>> import torch
        >>> from normsearch.searching import Recipe, Task, accuracy
        >>> pairs = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(6)]
        >>> task = Task(
        ...     train=pairs[:4],
        ...     validation=pairs[4:],
        ...     loss=torch.nn.functional.cross_entropy,
        ...     metric=accuracy,
        ...     recipe=Recipe(steps=10, lr=1e-2),
        ... )

    """

    train: Iterable[Any]
    validation: Iterable[Any]
    loss: Loss
    metric: Metric
    recipe: Recipe = field(default_factory=Recipe)
    confirmation: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "confirmation"):
            pairs = getattr(self, name)
            if isinstance(pairs, Iterator):
                raise SearchError(
                    f"{name} is a {type(pairs).__name__}, which can be read only once; give a list or a "
                    "DataLoader"
                )
        if self.confirmation is None and len(list(islice(self.validation, 2))) < 2:
            raise SearchError(
                "validation has fewer than two batches, so that none can be kept to confirm by; give smaller "
                "batches, or confirmation="
            )

    def __call__(self, model: nn.Module, trial: BaseTrial) -> float:
        """Train ``model`` and return its metric on the validation split."""
        self._train(model)
        return self._score(
            model, _Every(self.validation, 2, 0) if self.confirmation is None else self.validation
        )

    def confirm(self, model: nn.Module, trial: BaseTrial) -> float:
        """Train ``model`` and return its metric on the split that trials do not see."""
        self._train(model)
        kept = _Every(self.validation, 2, 1) if self.confirmation is None else self.confirmation
        return self._score(model, kept)

    def inputs(self) -> Iterator[Any]:
        """Yield the inputs of the training split, without targets."""
        return (pair[0] for pair in self.train)

    def _train(self, model: nn.Module) -> None:
        seed_loader(self.train)
        # A list has one order: without another one, all seeds of the confirmation would train alike.
        train = _Shuffled(self.train) if isinstance(self.train, Sequence) else self.train
        finetune(model, train, loss=self.loss, in_place=True, **vars(self.recipe))

    def _score(self, model: nn.Module, pairs: Iterable[Any]) -> float:
        with evaluating(model):
            return float(self.metric(model, pairs))


@dataclass(frozen=True)
class _Every:
    """Every ``step``-th batch of a loader from ``first`` on."""

    pairs: Iterable[Any]
    step: int
    first: int

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.pairs), self.first, None, self.step)


@dataclass(frozen=True)
class _Shuffled:
    """A list of batches, each time in an order drawn from torch's random state."""

    pairs: Sequence[Any]

    def __iter__(self) -> Iterator[Any]:
        return (self.pairs[number] for number in torch.randperm(len(self.pairs)).tolist())


def seed_loader(loader: Iterable[Any]) -> None:
    """Seed a loader's own generators from torch's, so that its order follows from that one's state."""
    for generator in generators_of(loader):
        generator.manual_seed(int(torch.randint(2**62, ())))


def accuracy(model: nn.Module, pairs: Iterable[Any]) -> float:
    """Return the share of inputs whose largest output is the target's class; outputs (N, classes, …)."""
    right = total = 0
    for inputs, targets in pairs:
        found = call(model, inputs).argmax(1)
        right += int((found == targets).sum())
        total += targets.numel()
    if not total:
        raise SearchError("accuracy got no pair of inputs and targets; give a loader that holds some")
    return right / total
