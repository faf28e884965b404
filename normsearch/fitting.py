"""Fit a state dict to an architecture and a plan: compare every name and shape first, then copy once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normsearch.architectures import Architecture, build
from normsearch.conversion import convert
from normsearch.errors import ArchitectureError, CheckpointError, NormsearchError
from normsearch.plans import Plan
from normsearch.reparametrization import out_channels
from normsearch.tracing import WEIGHTED

#: What wrappers put before every name, and who does.
_PREFIXES = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "model.": "a wrapper such as Lightning's",
    "net.": "a wrapper",
    "network.": "a wrapper",
    "backbone.": "a wrapper",
    "ema_model.": "an average of weights",
}
#: Counters that averages of weights keep beside them.
_COUNTERS = {"n_averaged", "num_updates", "initted", "step"}
#: What profilers (thop) leave in every layer.
_PROFILED = {"total_ops", "total_params"}
#: A network that needs more than so many times the numbers of a file is not built to find out.
_MOST_MISSING = 2
_ADVICE = "Give the architecture and arguments that it was trained with (num_classes and the like)"
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def fill(
    architecture: Architecture,
    plan: Plan | None,
    state: Mapping[str, Tensor],
    source: str,
    *,
    allow_factories: bool = False,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network with the numbers of a state dict, and notes on what was renamed or cast.

    Args:
        architecture: what builds the network.
        plan: how it was converted before its state dict was saved.
        state: the state dict; nothing in it is changed or kept.
        source: where it came from, for messages.
        allow_factories: as for ``build``.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit.
        NormsearchError: the architecture cannot be built, or the plan does not fit it.

    """
    # A file may name any network: without memory first.
    outline = None if architecture.is_factory else skeleton(architecture, plan, state, source)
    if outline is not None:
        fitting, notes = fitted(outline, state, architecture, source)
    # Then for real: a network filled on the meta device would lose its non-persistent buffers.
    model = _converted(build(architecture, allow_factories=allow_factories), plan, state)
    if outline is None:
        fitting, notes = fitted(model, state, architecture, source)
    notes += _cast(model, fitting)
    try:
        model.load_state_dict(fitting)
    except Exception as error:
        raise CheckpointError(f"{source} does not fit {architecture}: {str(error)[:500]}") from error
    return model, tuple(notes)


def skeleton(
    architecture: Architecture, plan: Plan | None, state: Mapping[str, Tensor], source: str
) -> nn.Module | None:
    """Return a registered network, converted, on the meta device: names and shapes without memory.

    Returns:
        None where a method cannot build its layer there; the network is not much larger than ``state``.

    Raises:
        CheckpointError: the network has far more numbers than ``state``.

    """
    try:
        with _EmptyOnMeta():
            model = build(architecture)
    except ArchitectureError:
        with torch.device("meta"):
            model = build(architecture)
    model.to("meta")
    needed, given = (sum(t.numel() for t in tensors.values()) for tensors in (model.state_dict(), state))
    if needed > _MOST_MISSING * given + 100_000:
        raise CheckpointError(
            f"{source} does not fit {architecture}: it has {given:,} numbers, the network {needed:,}. "
            f"{_ADVICE}"
        )
    try:
        return _converted(model, plan, state)
    except NormsearchError:
        raise
    except Exception:
        return None


class _EmptyOnMeta(TorchFunctionMode):
    """Make uninitialised tensors, parameters, on the meta device; but not the numbers networks compute."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _converted(model: nn.Module, plan: Plan | None, names: Iterable[str]) -> nn.Module:
    """Convert a fresh network as if it were the trained one that the plan was made for."""
    if plan is None or not plan.changes:
        return model
    known = set(names)
    modules = dict(model.named_modules())
    for site, _ in plan.changes:
        module = modules.get(site.path)
        if module is None:
            continue
        # Without an affine, it shows in the file whether folding added one.
        trained = site.trained is not False
        if not site.affine:
            trained = bool({f"{site.path}.weight", f"{site.path}.norm.weight"} & known)
        _mark(module, trained)
    converted = convert(model, plan, in_place=True)
    _gain_biases(converted, known)
    return converted


def _gain_biases(model: nn.Module, names: set[str]) -> None:
    """Give layers the biases that whitening left in a file: calibration adds them where there were none."""
    for path, module in model.named_modules():
        lacks = isinstance(module, WEIGHTED) and module._parameters.get("bias", module) is None
        if lacks and f"{path}.bias" in names:
            like = next(iter(module.parameters()))
            module.register_parameter("bias", nn.Parameter(like.new_zeros(out_channels(module))))


def _mark(module: nn.Module, trained: bool) -> None:
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return
    if mean.is_meta and not trained:
        # Numbers on the meta device count as trained.
        for name, start in (("weight", torch.ones), ("bias", torch.zeros)):
            if getattr(module, name, None) is not None:
                module.register_parameter(name, nn.Parameter(start(mean.shape)))
        module.register_buffer("running_mean", torch.zeros(mean.shape))
        module.register_buffer("running_var", torch.ones(variance.shape))
        if isinstance(getattr(module, "num_batches_tracked", None), Tensor):
            module.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
    elif trained:
        mean.fill_(1)


def fitted(
    model: nn.Module, state: Mapping[str, Tensor], architecture: Architecture, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict under the model's own names, and notes on what was renamed or left out.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit.

    """
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    renamed, notes = _unwrapped(state, set(expected))
    problems, types = _problems(expected, renamed), _types(expected, renamed)
    if types or (problems and not _loads(model, renamed)):
        problems += types
        raise CheckpointError(f"{source} does not fit {architecture}: {'; '.join(problems)}. {_ADVICE}")
    return renamed, notes


def _unwrapped(state: Mapping[str, Tensor], expected: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    names = {name: name for name in state if name in expected or name not in _COUNTERS}
    notes = [f"left out the counter {name!r}" for name in state if name not in names]
    profiled = [name for name in names if _leaf(name) in _PROFILED - {_leaf(own) for own in expected}]
    if profiled:
        notes.append(f"left out what a profiler counted: {_some(profiled)}")
        names = {name: name for name in names if name not in set(profiled)}
    removed: list[str] = []
    while names and not expected & set(names.values()):
        prefix = next((p for p in _PREFIXES if _all_start(names.values(), p)), None)
        if prefix is None:
            prefix = next((p for p in _PREFIXES if expected <= _stripped(names.values(), p)), None)
            if prefix is None:
                break
            left = [old for old, name in names.items() if not name.startswith(prefix)]
            notes.append(f"left out what is not the network's: {_some(left)}")
            names = {old: name for old, name in names.items() if name.startswith(prefix)}
        names = {old: name.removeprefix(prefix) for old, name in names.items()}
        removed.append(prefix)
    if not expected & set(names.values()):
        return {old: state[old] for old in names}, []
    notes += [f"removed the prefix {prefix!r} of {_PREFIXES[prefix]}" for prefix in removed]
    return {name: state[old] for old, name in names.items()}, notes


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _stripped(names: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _problems(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    problems = []
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} entries are missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} entries are not the network's ({_some(unexpected)})")
    shapes = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if shapes:
        problems.append(_difference("shape", shapes, expected, state, lambda tensor: tuple(tensor.shape)))
    return problems


def _types(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    names = [name for name in expected if name in state and _other_type(state[name], expected[name])]
    if not names:
        return []
    return [
        _difference("type", names, expected, state, lambda tensor: str(tensor.dtype).removeprefix("torch."))
    ]


def _difference(
    what: str,
    names: list[str],
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    show: Callable[[Tensor], Any],
) -> str:
    found, wanted = show(state[names[0]]), show(expected[names[0]])
    return f"{len(names)} have another {what} ({names[0]}: {found} in the file, {wanted} in the network)"


def _other_type(given: Tensor, wanted: Tensor) -> bool:
    if given.dtype == wanted.dtype or {given.dtype, wanted.dtype} <= _FLOATS:
        return False
    # Counters of batches were written as all sorts of numbers.
    return wanted.dim() > 0 or given.dtype.is_complex or wanted.dtype.is_complex


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:80] if name.isprintable() else repr(name[:80]) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."


def _loads(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the network's own loading code accepts the names: some rename those of older versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.load_state_dict(state)
        except Exception:
            return False
    return True


def _cast(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Give the network the floating-point types of the file, as a network that was cast has."""
    given = {tensor.dtype for tensor in state.values() if tensor.dtype in _FLOATS}
    own = model.state_dict(keep_vars=True)
    different = [
        name
        for name, tensor in state.items()
        if name in own and tensor.dtype != own[name].dtype and {tensor.dtype, own[name].dtype} <= _FLOATS
    ]
    if not different:
        return []
    if len(given) == 1:
        model.to(given.pop())
    else:
        for name in different:
            own[name].data = own[name].data.to(state[name].dtype)
    types = sorted({str(state[name].dtype).removeprefix("torch.") for name in different})
    return [f"{len(different)} entries are {', '.join(types)}: the network was cast to them"]
