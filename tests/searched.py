"""A small network to search, data that it can learn, and an objective whose best plan is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsearch.searching import (
    Recipe,
    SearchSpace,
    Task,
    accuracy,
)


class Net(nn.Module):
    """Three stages of one, two and two sites."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.d = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))
        return y


def network() -> nn.Module:
    """Return a net whose statistics are not the initial ones."""
    net = Net().train()
    for _ in range(3):
        net(torch.randn(8, 1, 8, 8) * 2 + 1)
    return net.eval()


SITES = ["a.1", "b.1", "c.1", "d.1"]


INPUTS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def pairs(count: int, seed: int = 0, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return batches whose class is told by the image's brightness."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        y = torch.randint(3, (size,), generator=generator)
        batches.append((torch.randn(size, 1, 8, 8, generator=generator) + y[:, None, None, None], y))
    return batches


def task(steps: int = 4, **changes: Any) -> Task:
    """Return a small task."""
    recipe = Recipe(steps=steps, lr=1e-2)
    given = {"train": pairs(4), "validation": pairs(4, 1), "loss": F.cross_entropy, "metric": accuracy}
    return Task(**{**given, "recipe": recipe, **changes})


SPACE = SearchSpace.of(network())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that a conversion or training could change."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("modules", "parameters", "hooks"):
        assert one[name] == other[name], name
    assert list(one["state"]) == list(other["state"])
    assert all(torch.equal(a, b) for a, b in zip(one["state"].values(), other["state"].values(), strict=True))


class Planted:
    """An objective that knows the best plan: how many sites have it."""

    best: Mapping[str, str] = {
        "a.1": "GroupNorm",
        "b.1": "InstanceNorm2d",
        "c.1": "BatchNorm2d",
        "d.1": "GroupNorm",
    }

    def __init__(self) -> None:
        self.calls = 0
        self.stop_at: int | None = None

    def __call__(self, model: nn.Module, trial: Any) -> float:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        layers = {path: type(model.get_submodule(path)).__name__ for path in SITES}
        return sum(layers[path] == name for path, name in self.best.items()) / 4


OPTIONS: dict[str, Any] = {"methods": ["batch", "group", "instance"], "n_trials": 25, "confirm": 2}
