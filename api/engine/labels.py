"""Labels of a dataset: whether they fit a network, and how much of them it reads correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from api.engine.data import Pairs, Samples, samples, split
from api.engine.networks import Network
from api.tasks import Data
from normsearch.errors import CheckpointError
from normsearch.forward import call, evaluating
from normsearch.searching import accuracy


@dataclass(frozen=True)
class Scoring:
    """What a report measures beside drifts.

    Attributes:
        metric: the accuracy of a network; None where there are no labels, or none that fit.
        notes: why there is none, where labels were given.

    """

    metric: Callable[[nn.Module], float] | None = None
    notes: tuple[str, ...] = ()


def scoring(network: Network, asked: Data | None, folder: Path) -> Scoring:
    """Return how a network and what is made of it are scored on a dataset: by its labels, if it has any."""
    if asked is None or (asked.targets is None and not asked.file.endswith(".zip")):
        return Scoring()
    found = samples(network, asked, folder)
    if found.count is None:
        return Scoring()
    rows, size = split(network, found.count, asked)
    try:
        classes = check_labels(network.runnable(), found, rows, size)
        folders = len(found.targets(rows).unique())
        if asked.targets is None and folders != classes:
            # Folders of images may stand for anything.
            raise CheckpointError(
                f"the images have {folders} folders, the network tells {classes} classes apart"
            )
    except CheckpointError as error:
        # A report without an accuracy is a report.
        return Scoring(notes=(f"no accuracy: {error}",))
    pairs = Pairs(found, rows, size)

    def metric(model: nn.Module) -> float:
        with torch.no_grad():
            return accuracy(model, pairs)

    return Scoring(metric)


def check_labels(model: nn.Module, found: Samples, rows: Tensor, size: int) -> int:
    """Return how many classes a network tells apart, if every label is one of them.

    Raises:
        CheckpointError: it is not, or the outputs are no classes.

    """
    targets = found.targets(rows)
    with evaluating(model), torch.no_grad():
        output = call(model, found.inputs(rows[:size]))
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise CheckpointError("labels belong to a network whose output is one tensor (N, classes, …)")
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or most >= output.shape[1]:
        raise CheckpointError(
            f"labels go from {least} to {most}, and the network tells {output.shape[1]} classes apart; "
            "number them from 0"
        )
    if targets.dim() != output.dim() - 1:
        raise CheckpointError(
            f"labels of shape {tuple(targets.shape[1:])} each do not fit outputs of {tuple(output.shape[2:])}"
        )
    return int(output.shape[1])
