"""One forward pass with hooks: input shapes and calls of every site, what fed it, functional calls."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normsearch.forward import evaluating, preserved, try_call
from normsearch.tracing import WEIGHTED


@dataclass
class Observation:
    """What one forward pass showed; paths are relative to the model that was run."""

    ran: bool = False
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    #: Path of the weighted layer whose output reached a site, by tensor identity; else of the last before it.
    feeders: dict[str, str] = field(default_factory=dict)
    #: (eps, input shape) of each F.batch_norm call outside the sites, by the path of the calling module.
    functional: dict[str, list[tuple[float, tuple[int, ...]]]] = field(
        default_factory=lambda: defaultdict(list)
    )


class _FunctionalCalls(TorchFunctionMode):
    """Record F.batch_norm calls that no known site makes."""

    def __init__(self, observation: Observation, parameters: set[int]) -> None:
        super().__init__()
        self.stack: list[tuple[str, nn.Module, bool]] = []
        self._observation = observation
        self._parameters = parameters

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, torch.batch_norm):
            self._record(args[0] if args else kwargs["input"], args, kwargs)
        return func(*args, **kwargs)

    def _record(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path, owner, inside_site = self.stack[-1]
        # Weight standardization normalizes a convolution's own weight: not a site.
        is_weight = isinstance(owner, WEIGHTED) or _storage(x) in self._parameters
        if not inside_site and not is_weight:
            eps = float(kwargs.get("eps", args[7] if len(args) > 7 else 1e-5))
            self._observation.functional[path].append((eps, tuple(x.shape)))


def _storage(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def observe(model: nn.Module, inputs: Any, sites: Mapping[str, nn.Module]) -> Observation:
    """Run ``model`` once in eval mode and watch its sites (path to module).

    Raises:
        ModelError: the model fails on ``inputs``.

    """
    observation = Observation(ran=True)
    names = {id(module): path for path, module in sites.items()}
    parameters = {_storage(parameter) for parameter in model.parameters() if _known(parameter)} - {0}
    mode = _FunctionalCalls(observation, parameters)
    made: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    latest: list[str] = []

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # normsearch's own layers may call F.batch_norm, as BatchRenorm does in eval.
        own = id(module) in names or type(module).__module__.startswith("normsearch.methods.")
        inside = own or (bool(mode.stack) and mode.stack[-1][2])
        mode.stack.append((path, module, inside))
        if id(module) not in names:
            return
        site = names[id(module)]
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                observation.shapes[site].append(tuple(x.shape))
                source, feeder = made.get(id(x), (None, ""))
                if source is not None and source() is x:
                    observation.feeders[site] = feeder
                elif latest:
                    # Pooling or an activation lies between: the last weight that was used is upstream.
                    observation.feeders.setdefault(site, latest[-1])
                return

    def leave(path: str, module: nn.Module, output: Any) -> None:
        if mode.stack:
            mode.stack.pop()
        if isinstance(module, WEIGHTED) and isinstance(output, Tensor):
            made[id(output)] = (weakref.ref(output), path)
            if module._parameters.get("weight") is not None:
                latest[:] = [path]

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            first = module.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: enter(path, module, args, kwargs), with_kwargs=True
            )
            last = module.register_forward_hook(
                lambda module, args, output, path=path: leave(path, module, output), always_call=True
            )
            stack.callback(first.remove)
            stack.callback(last.remove)
        stack.enter_context(preserved(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(mode)
        try_call(model, inputs)
    return observation


def _known(parameter: Tensor) -> bool:
    return not torch.nn.parameter.is_lazy(parameter)
