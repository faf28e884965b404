"""Task: an objective from two loaders: train a plan's network by a recipe and measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from optuna.exceptions import OptunaError
from optuna.trial import BaseTrial
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsearch.errors import NormsearchError, SearchError
from normsearch.forward import LISTED, call, evaluating
from normsearch.searching.outcomes import scores_in
from normsearch.training import Loss, check_recipe, finetune
from normsearch.training_state import generators_of

#: A number for a network and the pairs (inputs, targets) to measure it on; larger is better, unless the
#: search is told to minimise.
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

    Raises:
        TrainingError: a number is out of range.

    """

    steps: int = 200
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_recipe(**vars(self))


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
        metric: maps a network in eval mode and pairs to a number, larger is better (with
            ``directions=["minimize"]``, smaller).
        recipe: how a network is trained.
        confirmation: pairs that the best plans are confirmed on; ``validation`` is then used whole.

    Raises:
        SearchError: something is of another kind, a split cannot be read, or ``validation`` has a single
            batch and there is no ``confirmation``.

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
            if not is_read(pairs) and (pairs is not None or name != "confirmation"):
                raise SearchError(
                    f"{name}={pairs!r}: give a DataLoader, or a list of pairs (inputs, targets)"
                )
        if not isinstance(self.recipe, Recipe):
            raise SearchError(f"recipe={self.recipe!r}: give a Recipe, as Recipe(steps=200, lr=1e-3)")
        for name in ("loss", "metric"):
            given = getattr(self, name)
            if not callable(given):
                raise SearchError(f"{name}={given!r}: give a function")
            if isinstance(given, type) and issubclass(given, nn.Module):
                raise SearchError(f"{name}={given.__name__} is a class: give an instance, {given.__name__}()")
        if self.confirmation is not None:
            if not first_of("confirmation", self.confirmation, 1):
                raise SearchError("confirmation has no batch; give one that holds some, or leave it out")
            return
        first = first_of("validation", self.validation, 2)
        if len(first) < 2:
            raise SearchError(
                "validation has fewer than two batches, so that none can be kept to confirm by; give smaller "
                "batches, or confirmation="
            )
        again = first_of("validation", self.validation, 1)
        if not again or not _same(first[0], again[0]):
            raise SearchError(
                "validation gives other batches each time it is read, so that none can be kept to confirm "
                "by; give a loader that does not shuffle, or confirmation="
            )

    def __call__(self, model: nn.Module, trial: BaseTrial) -> float:
        """Train ``model`` and return its metric on the validation split."""
        self.train_on(model)
        return self.score(model)

    def score(self, model: nn.Module) -> float:
        """Return the metric of ``model`` as it is on the validation split."""
        return self._score(
            model, _Every(self.validation, 2, 0) if self.confirmation is None else self.validation
        )

    def confirm(self, model: nn.Module, trial: BaseTrial) -> float:
        """Train ``model`` and return its metric on the split that trials do not see."""
        self.train_on(model)
        return self._score(model, self._kept())

    def confirmed_on(self) -> int:
        """Return the number of samples in the split that trials do not see."""
        return sum(_samples(targets) for _, targets in self._kept())

    def _kept(self) -> Iterable[Any]:
        return _Every(self.validation, 2, 1) if self.confirmation is None else self.confirmation

    def inputs(self) -> Iterator[Any]:
        """Yield the inputs of the training split, without targets."""
        return (pair[0] for pair in self.train)

    def train_on(self, model: nn.Module) -> None:
        """Train ``model`` by the recipe."""
        seed_loader(self.train)
        # A list has one order: without another one, all seeds of the confirmation would train alike.
        train = _Shuffled(self.train) if isinstance(self.train, Sequence) else self.train
        finetune(model, train, loss=self.loss, in_place=True, **vars(self.recipe))

    def _score(self, model: nn.Module, pairs: Iterable[Any]) -> float:
        named = getattr(self.metric, "__name__", type(self.metric).__name__)
        with evaluating(model):
            try:
                returned = self.metric(model, pairs)
            except (NormsearchError, OptunaError):
                raise
            except Exception as error:
                way_out = f"try {named}(model.eval(), validation) by hand"
                if any(
                    isinstance(pair, tuple | list) and isinstance(pair[0], list) for pair in islice(pairs, 1)
                ):
                    way_out = LISTED
                raise SearchError(
                    f"the metric {named} failed ({type(error).__name__}: {error}); {way_out}"
                ) from error
        return scores_in(returned, 1, what=f"the metric {named} returned")[0]


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


def is_read(things: Any) -> bool:
    """Say whether a for loop may read something."""
    return hasattr(type(things), "__iter__") or hasattr(type(things), "__getitem__")


def first_of(name: str, pairs: Iterable[Any], count: int) -> list[Any]:
    """Return the first batches of a split.

    Raises:
        SearchError: it cannot be read.

    """
    try:
        return list(islice(iter(pairs), count))
    except NormsearchError:
        raise
    except Exception as error:
        raise SearchError(
            f"{name} cannot be read: {type(error).__name__}: {error}; try next(iter({name}))"
        ) from error


def _samples(targets: Any) -> int:
    if isinstance(targets, Tensor) and not targets.dim():
        return 1
    return len(targets) if hasattr(targets, "__len__") else 1


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=False)
    return all(not isinstance(a, Tensor) or (isinstance(b, Tensor) and _equal(a, b)) for a, b in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def seed_loader(loader: Iterable[Any]) -> None:
    """Seed a loader's own generators from torch's, so that its order follows from that one's state."""
    for generator in generators_of(loader):
        generator.manual_seed(int(torch.randint(2**62, ())))


def accuracy(model: nn.Module, pairs: Iterable[Any]) -> float:
    """Return the share of inputs whose largest output is the target's class.

    Args:
        model: gives outputs (N, classes, …).
        pairs: inputs, and targets (N, …): the numbers of classes.

    Raises:
        SearchError: outputs or targets have another form, outputs hold NaN, or there is no pair.

    """
    right = total = 0
    for inputs, targets in pairs:
        output = call(model, inputs)
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] < 2:
            form = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise SearchError(
                f"accuracy is for outputs (N, classes, …) of two classes or more, and the network's are of "
                f"{form}; give a metric of your own, a function of (model, pairs)"
            )
        if output.isnan().any():
            raise SearchError("the network's outputs hold NaN; look for NaN in the inputs, or lower the rate")
        found = output.argmax(1)
        if not isinstance(targets, Tensor) or targets.shape != found.shape:
            form = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            way_out = "give targets.argmax(1) where they are one-hot"
            if isinstance(targets, Tensor) and targets.dim() > 1 and targets.shape[1] == 1:
                way_out = "give targets.squeeze(1)"
            raise SearchError(
                f"accuracy takes the numbers of classes, here of shape {tuple(found.shape)}, and got targets "
                f"of {form}; {way_out}, or a metric of your own"
            )
        right += int((found == targets).sum())
        total += targets.numel()
    if not total:
        raise SearchError("accuracy got no pair of inputs and targets; give a loader that holds some")
    return right / total
