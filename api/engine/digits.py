"""The network of the page's example: it reads handwritten digits, and has a little of everything.

`python -m benchmarks.example` trains it and writes its weights.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Inverted(nn.Module):
    """A depthwise convolution between two of 1×1, beside the identity."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.SiLU()
        )
        self.project = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        y: Tensor = x + self.project(self.depthwise(self.expand(x)))
        return y


class Digits(nn.Module):
    """Eleven BatchNorm layers for 8×8 digits: after convolutions, a depthwise one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Inverted(32, 64))
        self.hidden = nn.Sequential(nn.Linear(32, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU())
        self.classes = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, 8, 8) to logits (N, 10)."""
        y: Tensor = self.classes(self.hidden(self.blocks(self.stem(x)).mean((2, 3))))
        return y


def network() -> nn.Module:
    """Return the network with fresh weights."""
    return Digits()
