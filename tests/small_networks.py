"""Small networks whose BatchNorm layers have the numbers of trained ones, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Every method that may take a BatchNorm's place in these networks.
METHODS = [
    "frozen",
    "frozen(trainable=true)",
    "group",
    "layer",
    "layer(axes=channel)",
    "rms",
    "instance",
    "batch_renorm",
    "batch_instance",
    "switchable",
]
#: Those that fold running statistics into γ and β.
FOLDING = ["group", "layer", "layer(axes=channel)", "rms", "instance", "switchable"]


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm the numbers of a trained one: nothing at its default."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked.fill_(100)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            module.weight.uniform_(0.5, 1.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(generator=generator)
    return model


def net(channels: int = 8, **options: object) -> nn.Sequential:
    """Return two convolutions around one trained BatchNorm; path 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(channels, 4, 1),
    )
    trained(model)
    return model


def pair(**options: object) -> nn.Sequential:
    """Return two convolutions with a trained BatchNorm each; paths 1 and 4."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1),
        nn.BatchNorm2d(16, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 5),
    )
    trained(model)
    return model


class Shared(nn.Module):
    """One BatchNorm under two names, in a list attribute, a dict, a tuple and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.BatchNorm2d(8)
        self.second = self.first
        self.layers = [self.conv, self.first]
        self.by_name = {"norm": self.first, "pair": (self.conv, self.first)}
        self._private = [self.first]
        # Keeps a second reference out of the module tree, as some code bases do.
        object.__setattr__(self, "unregistered", self.first)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.second(x)


def images(count: int = 4, size: int = 6) -> Tensor:
    """Return a batch of three channels, always the same."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    """Require two outputs to be equal but for single precision's rounding."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
