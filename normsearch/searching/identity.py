"""What a study searched: so that it is not gone on with for another network or task."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from normsearch.searching.resident import Resident
from normsearch.searching.tasks import Task


def identity(resident: Resident, objective: Any) -> dict[str, str]:
    """Return what must be the same for scores to be comparable, in words that a message can show.

    The weights are hashed. Of a ``Task`` the recipe, the names of loss and metric, and the original's metric
    on the split of the search are told, which other data would change; of any other objective its name.
    """
    found = {"weights": _hash(resident.model)}
    if not isinstance(objective, Task):
        return found | ({} if objective is None else {"objective": _name(objective)})
    with resident.borrowed() as model:
        score = objective.score(model)
    return found | {
        "recipe": repr(objective.recipe),
        "loss": _name(objective.loss),
        "metric": _name(objective.metric),
        "the original's score": f"{score:.6g}",
    }


def _hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _name(thing: Any) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
