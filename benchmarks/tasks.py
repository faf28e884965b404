"""The trained networks that benchmarks convert: five tasks with their splits, trainers and scores.

Networks that are trained here are kept in benchmarks/.cache, named after the code that made them, so that a
benchmark trains only once and never with yesterday's recipe.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks import crepe, digits, shapes, signals

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trained network, inputs to calibrate it with, and its score on data that it has never seen.

    Attributes:
        name: the task's name.
        metric: what ``score`` is: ``accuracy`` or ``mean IoU``, a share.
        floor: the score that the original must reach for the task to prove anything.
        model: the trained network, in eval mode.
        inputs: unlabelled inputs that are not in the test split.
        score: the score of a network on the test split.

    """

    name: str
    metric: str
    floor: float
    model: nn.Module
    inputs: Tensor
    score: Callable[[nn.Module], float]


def trained(name: str, make: Callable[[], nn.Module], *recipe: ModuleType) -> nn.Module:
    """Return ``make()``, a whole network in eval mode, from the cache if the same recipe made it before.

    Args:
        name: of the file.
        make: trains the network.
        recipe: the modules whose source decides what ``make`` returns.

    """
    source = "".join(inspect.getsource(module) for module in recipe)
    path = CACHE / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        # A file that this very function wrote on this machine, not a checkpoint from anywhere.
        model: nn.Module = torch.load(path, weights_only=False)
        return model.eval()
    model = make()
    CACHE.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(model, partial)
    partial.rename(path)
    return model


def _crepe(size: crepe.Size) -> Task:
    # The full network takes a second for twelve frames.
    frames, pitch = crepe.tones(400 if size == "tiny" else 200)
    return Task(
        name=f"CREPE {size}",
        metric="accuracy",
        floor=0.95,
        model=crepe.load(size),
        inputs=crepe.tones(256, seed=1)[0],
        score=lambda model: crepe.accuracy(model, frames, pitch),
    )


def _digits() -> Task:
    train, test = digits.data()
    return Task(
        name="digits ResNet",
        metric="accuracy",
        floor=0.95,
        model=trained("digits", lambda: digits.train(train), digits),
        inputs=train.images[:256],
        score=lambda model: digits.accuracy(model, test),
    )


def _signals() -> Task:
    train, test = signals.data()
    return Task(
        name="MNIST-1D",
        metric="accuracy",
        floor=0.95,
        model=trained("signals", lambda: signals.train(train), signals, digits),
        inputs=train.images[:256],
        score=lambda model: digits.accuracy(model, test),
    )


def _shapes() -> Task:
    test = shapes.images(300, 2)
    return Task(
        name="shapes Unet",
        metric="mean IoU",
        floor=0.85,
        model=trained("shapes", lambda: shapes.train(shapes.data()[0]), shapes, digits),
        inputs=shapes.images(256, 3).images,
        score=lambda model: shapes.mean_iou(model, test),
    )


#: Every task by its short name; calling one loads or trains its network.
TASKS: dict[str, Callable[[], Task]] = {
    "digits": _digits,
    "signals": _signals,
    "shapes": _shapes,
    "crepe-tiny": lambda: _crepe("tiny"),
    "crepe-full": lambda: _crepe("full"),
}
