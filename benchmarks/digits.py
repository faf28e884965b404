"""A small residual network on scikit-learn's handwritten digits: trained here in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 8, 8) in [0, 1] and their classes."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield shuffled full batches of one epoch."""
        order = torch.randperm(len(self.labels), generator=generator)
        for rows in order[: len(order) // size * size].split(size):
            yield self.images[rows], self.labels[rows]


def data(seed: int = 0) -> tuple[Split, Split]:
    """Return a training and a test split (1,297 and 500 digits)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:-500], order[-500:]
    return Split(images[train], labels[train]), Split(images[test], labels[test])


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut."""

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


class DigitsNet(nn.Module):
    """A ten-layer residual network with BatchNorm for 8×8 digits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1)
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, 8, 8) to logits (N, 10)."""
        y: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y


def train(split: Split, seed: int = 0, epochs: int = 6) -> nn.Module:
    """Return a trained DigitsNet in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=epochs * (len(split.labels) // 64)
    )
    for _ in range(epochs):
        for images, labels in split.batches(64, generator):
            # Shifts of one pixel, so that the digits are not learned by heart.
            dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(model(images.roll((dy, dx), (2, 3))), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of digits read correctly."""
    return float((model(split.images).argmax(1) == split.labels).double().mean())
