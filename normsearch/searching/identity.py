"""What a study searched: so that it is not gone on with for another network or task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from optuna.exceptions import OptunaError
from torch.utils._pytree import tree_leaves

from normsearch.errors import SearchError
from normsearch.searching.resident import Resident
from normsearch.searching.tasks import Task

#: What studies of earlier versions do not know of a task.
TRAINING = "training data"


def identity(resident: Resident, objective: Any) -> dict[str, str]:
    """Return what must be the same for scores to be comparable, in words that a message can show.

    The weights are hashed. Of a ``Task`` the recipe is told, the original's metric on the split of the
    search, which other data would change, and of the training split its size and, of a list of batches, the
    first one. Functions are known by their names alone: loss and metric, and any other objective.

    Raises:
        SearchError: the metric fails on the original.

    """
    found = {"weights": _hash(resident.model)}
    if not isinstance(objective, Task):
        return found | ({} if objective is None else {"objective": _name(objective)})
    with resident.borrowed() as model:
        try:
            score = objective.score(model)
        except (SearchError, OptunaError) as error:
            raise SearchError(f"on the original, {error}") from error
    return found | {
        "recipe": repr(objective.recipe),
        "loss": _name(objective.loss),
        "metric": _name(objective.metric),
        "the original's score": f"{score:.6g}",
        TRAINING: _training(objective.train),
    }


def _hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _training(pairs: Iterable[Any]) -> str:
    """Return what is known of a training split without drawing anything at random."""
    sizes = {"batches": _size(pairs), "samples": _size(getattr(pairs, "dataset", None))}
    found = [f"{size} {what}" for what, size in sizes.items() if size is not None]
    if isinstance(pairs, list | tuple) and pairs:
        digest = hashlib.sha256()
        for leaf in tree_leaves(pairs[0]):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_meta:
                digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() + _bytes(leaf))
        found.append(f"first {digest.hexdigest()[:16]}")
    return ", ".join(found) or "of unknown size"


def _size(things: Any) -> int | None:
    try:
        return len(things)
    except (TypeError, NotImplementedError):
        # A stream, or a loader of one.
        return None


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _name(thing: Any) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
