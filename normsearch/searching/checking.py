"""Whether the arguments of a search are of their kinds, before anything is made."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset

from normsearch.errors import ModelError, SearchError
from normsearch.forward import is_lazy
from normsearch.methods import Method
from normsearch.searching.constraints import Constraint
from normsearch.searching.objectives import seeded
from normsearch.searching.tasks import Task, first_of, is_read
from normsearch.training_state import generators_of

#: The largest seed: what is added to it must fit torch's generators.
LARGEST_SEED = 2**62


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a whole number of at least ``least``.

    Raises:
        SearchError: it is anything else.

    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise SearchError(f"{name}={value!r}: give a whole number, at least {least}")
    if most is not None and value > most:
        raise SearchError(f"{name}={value!r}: give at most {most}")
    return int(value)


def check_arguments(
    methods: Any,
    sites: Any,
    directions: Any,
    costs: Any,
    constraints: Any,
    storage: Any,
    name: Any,
    sampler: Any,
    veto: Any,
) -> None:
    """Raise a ``SearchError`` for arguments of other kinds."""
    if not isinstance(methods, str | Method | Sequence):
        raise SearchError(f"methods={methods!r}: give a list of methods or spellings")
    patterns = isinstance(sites, Iterable) and all(isinstance(one, str) for one in sites)
    if sites is not None and not patterns:
        raise SearchError(f"sites={sites!r}: give glob patterns of paths")
    if not isinstance(directions, str | Sequence):
        raise SearchError(f"directions={directions!r}: give 'maximize' or 'minimize' for each number")
    for kind, several in (("costs", costs), ("constraints", constraints)):
        if not isinstance(several, str | Sequence | Constraint):
            raise SearchError(f"{kind}={several!r}: give a list, empty for none")
    if storage is not None and not isinstance(storage, str | os.PathLike | BaseStorage):
        raise SearchError(f"storage={storage!r}: give a path, a URL or a storage of Optuna's")
    if name is not None and (not isinstance(name, str) or not name or not name.isprintable()):
        raise SearchError(f"name={name!r}: give a name in printable characters")
    if not isinstance(sampler, str | BaseSampler):
        raise SearchError(f"sampler={sampler!r}: give a name, or a sampler of Optuna's")
    if veto is not None and (isinstance(veto, bool) or not isinstance(veto, int | float) or not veto > 0):
        raise SearchError(f"veto={veto!r}: give a drift above 0, or None to veto nothing")


def check_callback(on_progress: Any) -> None:
    """Raise a ``SearchError`` for a callback that cannot be called."""
    if on_progress is not None and not callable(on_progress):
        raise SearchError(f"on_progress={on_progress!r}: give a function of a Progress, or None")


def check_inputs(inputs: Any) -> None:
    """Raise a ``SearchError`` for inputs that are no batches."""
    single = isinstance(inputs, torch.Tensor | np.ndarray | Mapping | str)
    if inputs is not None and (single or not is_read(inputs)):
        raise SearchError(f"inputs= is a {type(inputs).__name__}: give a list of batches, [inputs] for one")


def check_model(model: Any) -> None:
    """Raise a ``ModelError`` for what cannot be searched."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")
    if is_lazy(model):
        raise ModelError(
            "the model has layers without weights yet (lazy modules); run one forward pass first, then load "
            "or train it"
        )
    scripted = [name for name, one in model.named_modules() if isinstance(one, torch.jit.ScriptModule)]
    if scripted:
        raise ModelError(
            f"{scripted[0] or 'the model'} is compiled TorchScript, which a search cannot copy and put back; "
            "give the nn.Module that it was made from"
        )


def check_objective(objective: Any) -> None:
    """Raise a ``SearchError`` for an objective that cannot be called, or a task whose data are no pairs."""
    if objective is not None and not callable(objective):
        raise SearchError(f"objective={objective!r}: give a Task, or a function of (model, trial)")
    if not isinstance(objective, Task):
        _check_functions(objective)
        return
    if not torch.is_grad_enabled():
        raise SearchError(
            "gradients are turned off here (torch.no_grad() or inference_mode()), and a Task trains "
            "networks; search outside of it"
        )
    for name in ("train", "validation", "confirmation"):
        pairs = getattr(objective, name)
        if pairs is None and name == "confirmation":
            continue
        if isinstance(pairs, Dataset) and not isinstance(pairs, IterableDataset):
            raise SearchError(
                f"{name} is a {type(pairs).__name__} of single samples; give DataLoader({name}, "
                "batch_size=32), or batch_size=None where its items are batches"
            )
        first = _first(name, pairs)
        _refuse_arrays(name, first)
        if not isinstance(first, tuple | list) or len(first) != 2:
            size = f" of {len(first)}" if isinstance(first, tuple | list | dict) else ""
            raise SearchError(
                f"{name}: give pairs (inputs, targets), got a {type(first).__name__}{size}; several inputs "
                "are one tuple: ((first, second), targets)"
            )


def _check_functions(objective: Any) -> None:
    """Raise for an objective, or its ``confirm``, that does not take a model and a trial."""
    confirm = getattr(objective, "confirm", None)
    for name, function in (("objective", objective), ("objective.confirm", confirm)):
        if function is None:
            continue
        if not callable(function):
            raise SearchError(f"{name}={function!r}: give a function of (model, trial)")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError as error:
            raise SearchError(
                f"{name} is called with (model, trial), which it does not take: {error}"
            ) from error
        except ValueError:
            # Functions of extensions do not say what they take.
            continue


def _first(name: str, pairs: Any) -> Any:
    """Return the first batch; every generator is left as it was."""
    generators = [(one, one.get_state()) for one in generators_of(pairs)]
    try:
        with seeded(0):
            first = first_of(name, pairs, 1)
    finally:
        for generator, state in generators:
            generator.set_state(state)
    if not first:
        raise SearchError(f"{name} has no batch; give one that holds some")
    return first[0]


def _refuse_arrays(name: str, batch: Any) -> None:
    if any(isinstance(leaf, np.ndarray) for leaf in tree_leaves(batch)):
        raise SearchError(f"{name} gives NumPy arrays; give tensors, as torch.from_numpy(array)")
