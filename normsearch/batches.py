"""Batches that are read again and again, in two parts: one to learn from, one held out to judge by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normsearch.errors import ModelError

#: Of so many first batches every fourth is held out; the other ones are what statistics are fitted to.
_FIRST, _HELD_OUT_EVERY = 64, 4


class Batches:
    """Inputs without labels that yield the same batches in every pass; one batch is in memory at a time.

    Args:
        batches: an iterable that can be read several times.
        seed: of torch's generator at the start of each pass, from which a loader draws its order.

    Attributes:
        count: the number of batches.
        first: the first batch.

    Raises:
        ModelError: there are fewer than two batches, they can be read only once, change or hold NaN.

    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        if isinstance(batches, Iterator):
            raise ModelError(
                f"batches is a {type(batches).__name__}, which can be read only once, and calibration reads "
                "its inputs several times; give a list or a DataLoader"
            )
        if isinstance(batches, Tensor | dict | str):
            raise ModelError(
                f"batches is a single {type(batches).__name__}; give batches of inputs, for example "
                "inputs.split(32)"
            )
        self._batches, self._seed = batches, seed
        self.first = next(self._read(), None)
        self.count = 0
        for inputs in self._read():
            if not self.count and not _equal(inputs, self.first):
                raise ModelError(
                    "batches yields other inputs each time it is read, so that none can be held out; give "
                    "list(batches), or a loader without a random generator of its own"
                )
            self.count += 1
            _refuse_nan(inputs, self.count)
        if self.count < 2:
            raise ModelError(
                f"batches holds {self.count} of them, and calibration needs two at least, one to fit and one "
                "to hold out; give more inputs, or smaller batches"
            )

    @property
    def held_out_count(self) -> int:
        """The number of batches held out."""
        return sum(self._is_held_out(index) for index in range(min(self.count, _FIRST)))

    @property
    def fitted_count(self) -> int:
        """The number of batches that statistics are fitted to."""
        return min(self.count, _FIRST) - self.held_out_count

    def held_out(self) -> Iterator[Any]:
        """Yield the held-out batches."""
        return (inputs for index, inputs in self._among_first() if self._is_held_out(index))

    def fitted(self) -> Iterator[Any]:
        """Yield the batches that statistics are fitted to."""
        return (inputs for index, inputs in self._among_first() if not self._is_held_out(index))

    def training(self) -> Iterator[Any]:
        """Yield every batch that is not held out."""
        return (inputs for index, inputs in enumerate(self._read()) if not self._is_held_out(index))

    def _read(self) -> Iterator[Any]:
        torch.default_generator.manual_seed(self._seed)
        yield from self._batches

    def _among_first(self) -> Iterator[tuple[int, Any]]:
        return zip(range(_FIRST), self._read(), strict=False)

    def _is_held_out(self, index: int) -> bool:
        if self.count < _HELD_OUT_EVERY:
            return index == self.count - 1
        return index < _FIRST and index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=False)
    return all(
        not isinstance(x, Tensor) or (isinstance(y, Tensor) and x.shape == y.shape and _same_values(x, y))
        for x, y in pairs
    )


def _same_values(x: Tensor, y: Tensor) -> bool:
    return x.is_meta or torch.equal(x.nan_to_num(), y.nan_to_num())


def _refuse_nan(inputs: Any, number: int) -> None:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise ModelError(f"batch {number} is on the meta device: it has no numbers; give real inputs")
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
            raise ModelError(f"batch {number} holds NaN; clean the inputs, or leave that batch out")
