"""The fx tracer: normalization layers and weighted layers stay leaves, whatever package they come from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from functools import cached_property

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from normsearch.forward import evaluating, preserved

#: Types whose weight can feed a normalization; subclasses (StdConv2d, Conv2dSame) too.
WEIGHTED = (_ConvNd, nn.Linear)


class SiteTracer(fx.Tracer):
    """Trace a model without entering the given modules, convolutions or linear layers.

    torch.fx enters every module from outside ``torch.nn``: a fused norm + activation layer would come out
    as a bare ``F.batch_norm`` call, and a weight-standardized convolution as two.
    """

    def __init__(self, leaves: Collection[nn.Module], *, training: bool = False) -> None:
        super().__init__()
        # In train mode a forward may update buffers in place: on the model itself unless they are proxies.
        self.proxy_buffer_attributes = training
        self._leaves = {id(module) for module in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at the given modules, at weighted layers and where torch.fx stops by itself."""
        return (
            id(m) in self._leaves
            or isinstance(m, WEIGHTED)
            or super().is_leaf_module(m, module_qualified_name)
        )


def trace(
    model: nn.Module, leaves: Collection[nn.Module], *, training: bool, defaults: bool = False
) -> fx.Graph | str:
    """Return the graph of ``model`` in train or eval mode, or why it has none.

    ``defaults`` fixes the optional arguments of the forward at their defaults, which lets it branch on them.

    A failure is an answer here, not an error: a sixth of real models cannot be traced, and nothing that
    normsearch promises for all models depends on it.
    """
    if isinstance(model, fx.GraphModule):
        return model.graph
    fixed = _default_arguments(model) if defaults else None
    with preserved(model), evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = training
        try:
            return SiteTracer(leaves, training=training).trace(model, fixed)
        except Exception as error:
            return f"torch.fx cannot trace {type(model).__name__}: {type(error).__name__}: {error}"


class Traces:
    """The graphs of one model in both modes, each made once and only if it is asked for."""

    def __init__(self, model: nn.Module, leaves: Collection[nn.Module]) -> None:
        self._model = model
        self._leaves = list(leaves)

    @cached_property
    def evaluating(self) -> fx.Graph | str:
        """The graph in eval mode, or why there is none."""
        return trace(self._model, self._leaves, training=False)

    @cached_property
    def training(self) -> fx.Graph | str:
        """The graph in train mode, or why there is none."""
        return trace(self._model, self._leaves, training=True)

    @cached_property
    def with_defaults(self) -> fx.Graph | str:
        """The graph in eval mode with the forward's optional arguments at their defaults."""
        return trace(self._model, self._leaves, training=False, defaults=True)


def _default_arguments(model: nn.Module) -> dict[str, object]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}
