"""A Unet of segmentation_models_pytorch that labels discs, squares, triangles and crosses in noisy images."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.digits import Split

SIDE = 48
CLASSES = 5


def images(count: int, seed: int) -> Split:
    """Return images (count, 1, 48, 48) and a class per pixel (count, 48, 48): 0 is the ground.

    Two to four shapes of random kind, size, place and brightness, later ones in front, on a sloping ground,
    under noise and a random contrast.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = torch.linspace(-1, 1, SIDE)
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    canvas = uniform(-0.4, 0.4, 1, 1) * down + uniform(-0.4, 0.4, 1, 1) * right
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    shapes = torch.randint(2, 5, (count, 1, 1), generator=generator)
    for index in range(4):
        y, x = down - uniform(-0.75, 0.75, 1, 1), right - uniform(-0.75, 0.75, 1, 1)
        size = uniform(0.2, 0.4, 1, 1)
        kinds = torch.randint(1, CLASSES, (count, 1, 1), generator=generator)
        inside = torch.stack(
            [
                x.square() + y.square() < size.square(),
                torch.maximum(x.abs(), y.abs()) < 0.85 * size,
                (y < 0.8 * size) & (y > 2 * x.abs() - size),
                (torch.maximum(x.abs(), y.abs()) < size) & (torch.minimum(x.abs(), y.abs()) < 0.3 * size),
            ]
        )
        chosen = inside.gather(0, (kinds - 1).expand(-1, SIDE, SIDE)[None])[0] & (index < shapes)
        brightness = uniform(0.6, 1.4, 1, 1)
        canvas = torch.where(chosen, brightness, canvas)
        labels = torch.where(chosen, kinds, labels)
    noisy = canvas + 0.1 * torch.randn(count, SIDE, SIDE, generator=generator)
    return Split((noisy * uniform(0.7, 1.3, 1, 1))[:, None], labels)


def data() -> tuple[Split, Split]:
    """Return a training and a test split (2,000 and 300 images)."""
    return images(2000, 1), images(300, 2)


def network() -> nn.Module:
    """Return an untrained Unet that maps (N, 1, 48, 48) to logits (N, 5, 48, 48)."""
    unet: nn.Module = smp.Unet(
        "resnet18",
        encoder_depth=3,
        encoder_weights=None,
        decoder_channels=(64, 32, 16),
        in_channels=1,
        classes=CLASSES,
    )
    return unet


def train(split: Split, seed: int = 0, epochs: int = 5) -> nn.Module:
    """Return a trained Unet in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    steps = epochs * (len(split.labels) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for inputs, labels in split.batches(32, generator):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def mean_iou(model: nn.Module, split: Split) -> float:
    """Return the intersection over union of prediction and truth, over all pixels, averaged over classes."""
    predicted = torch.cat([model(part).argmax(1) for part in split.images.split(100)])
    found = torch.bincount((predicted * CLASSES + split.labels).flatten(), minlength=CLASSES**2)
    matrix = found.reshape(CLASSES, CLASSES).double()
    hits = matrix.diag()
    return float((hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean())
