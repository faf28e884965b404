"""A one-dimensional network with BatchNorm1d on MNIST-1D: forty samples of a distorted digit-like curve."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.digits import Split

SAMPLES = 14_000
TEST = 2_000


def data(seed: int = 0) -> tuple[Split, Split]:
    """Return a training and a test split (12,000 and 2,000 curves (N, 1, 40)), generated, not downloaded.

    Source: Greydanus and Kobak, 2024, arXiv:2011.14439, with its generator's default distortions.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.num_samples, arguments.seed, arguments.train_split = SAMPLES, seed, 1 - TEST / SAMPLES
    # The generator seeds the process's generators: give them back as they were.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (it uses the old one)
    try:
        made = make_dataset(arguments)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002

    def split(suffix: str) -> Split:
        curves = torch.tensor(made[f"x{suffix}"], dtype=torch.float32)[:, None]
        return Split(curves, torch.tensor(made[f"y{suffix}"]))

    return split(""), split("_test")


class SignalNet(nn.Module):
    """Four convolutions and a hidden linear layer, BatchNorm1d after each: on (N, C, L) and on (N, C)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = (1, width, width, 2 * width, 2 * width)
        self.layers = nn.Sequential()
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            stride = 1 if index == 0 else 2
            self.layers.append(
                nn.Sequential(
                    nn.Conv1d(inputs, outputs, 5, stride, 2, bias=False),
                    nn.BatchNorm1d(outputs),
                    nn.ReLU(),
                )
            )
        self.hidden = nn.Linear(2 * width * 5, 2 * width, bias=False)
        self.bn = nn.BatchNorm1d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, 40) to logits (N, 10)."""
        y: Tensor = self.head(F.relu(self.bn(self.hidden(self.layers(x).flatten(1)))))
        return y


def train(split: Split, seed: int = 0, epochs: int = 15) -> nn.Module:
    """Return a trained SignalNet in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SignalNet()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    steps = epochs * (len(split.labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(epochs):
        for curves, labels in split.batches(64, generator):
            loss = F.cross_entropy(model(curves), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
