"""A network of an operator's own."""

from __future__ import annotations

from torch import nn


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))
