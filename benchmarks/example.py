"""The page's example: trains its network on scikit-learn's digits and writes weights and data for it.

    python -m benchmarks.example

The files are part of the service. One CPU core trains it in half a minute.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from api.engine.digits import network
from api.page.assets import EXAMPLE_DATA, EXAMPLE_WEIGHTS
from benchmarks import digits

_FOLDER = Path("api/page/example")
#: Digits that were not trained on, to try the page with.
_SAMPLES = 400


def train(split: digits.Split, epochs: int = 20) -> nn.Module:
    """Return the trained network in eval mode; the same on every run of one machine."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(split.labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
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


def main() -> None:
    """Train, say how well it reads, and write the files."""
    torch.set_num_threads(1)
    training, test = digits.data()
    model = train(training)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {digits.accuracy(model, test):.1%} of {len(test.labels)} new digits")
    save_file(model.state_dict(), _FOLDER / EXAMPLE_WEIGHTS)
    images, labels = test.images[:_SAMPLES].numpy(), test.labels[:_SAMPLES].numpy()
    np.savez(_FOLDER / EXAMPLE_DATA, images, labels)


if __name__ == "__main__":
    main()
