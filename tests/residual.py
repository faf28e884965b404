"""A small residual network with three sites that is measured, its inputs and some methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

METHODS = [
    "group",
    "layer(axes=channel)",
    "instance",
    "switchable",
    "frozen",
    "weight",
    "spectral(gain=fixed)",
    "identity",
    "batch",
]


def trained(model: Any, seed: int = 0) -> Any:
    """Give every BatchNorm statistics and an affine of its own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked.fill_(1)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def images(count: int = 2, size: int = 12, samples: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples + i, 3, size, size, generator=generator) * (i + 1) + i for i in range(count)]


class Residual(nn.Module):
    """In-place activations, an in-place sum, views of one tensor, a layer called twice, a plain alias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 5)
        self.late = nn.BatchNorm2d(8)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(4, 4, 1)
        self.shared = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.alias = self.shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(self.stem(x)))
        one, other = x.chunk(2, 1)
        other = self.alias(self.mix(other.contiguous()))
        one.mul_(0.5)
        y = torch.cat([self.shared(one), other], 1)
        y += x
        return self.head(self.late(y).relu_().mean((2, 3)))
