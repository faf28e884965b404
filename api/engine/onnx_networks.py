"""ONNX files as networks (extra ``onnx``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from api.engine.networks import Network
from api.tasks import Calibrating, InputOf
from normsearch import onnx_graph, reporting
from normsearch.methods import Method
from normsearch.onnx_graph.measuring import parameters
from normsearch.onnx_graph.planning import notes_on
from normsearch.onnx_graph.running import Runtime, stand_in
from normsearch.opening import Model
from normsearch.plans import Plan
from normsearch.progress import OnProgress
from normsearch.sites import NormSite

_TYPES = {"FLOAT": "float32", "DOUBLE": "float64"}


def read(file: Path) -> Network:
    """Return the network in an ONNX file.

    Raises:
        CheckpointError: it cannot be read.

    """
    return _Graph(file)


class _Graph(Network):
    library = onnx_graph
    suffix = ".onnx"

    def __init__(self, file: Path) -> None:
        model = onnx_graph.load(file)
        super().__init__("onnx", model)
        # Before version 4, constants are listed among the inputs.
        given = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        self.inputs = [_input_of(value) for value in given]

    def made(self, file: Path, plan: Path | None, *, configured: bool) -> tuple[Any, Plan | None]:
        found = None if plan is None else Plan.from_json(plan.read_text("utf-8"))
        return onnx_graph.load(file), found

    def write(self, model: Any, file: Path, plan: Plan | None) -> None:
        onnx_graph.save(model, file)

    def calibrate(
        self, converted: Any, batches: Iterable[Any], asked: Calibrating, follow: OnProgress
    ) -> Any:
        return onnx_graph.calibrate(converted, self.model, batches, seed=asked.seed, on_progress=follow)

    def document(self, *given: Any, **options: Any) -> reporting.Document:
        metric = options.pop("metric", None)
        # A metric is of a module with one output, as the network that was exported is.
        alone = None if metric is None else (lambda graph: metric(_Alone(graph)))
        return onnx_graph.document(self.model, *given, metric=alone, **options)

    def order(self, sites: Sequence[NormSite], first: Any) -> tuple[str, ...] | None:
        return tuple(site.path for site in sites)

    def runnable(self) -> nn.Module:
        return _Alone(Runtime(self.model))

    @property
    def typed(self) -> Model:
        return stand_in(self.model)

    @property
    def parameters(self) -> int:
        return parameters(self.model)

    def notes_on(self, site: NormSite, method: Method) -> tuple[str, ...]:
        return notes_on(method, method.notes(site))


class _Alone(nn.Module):
    """A graph whose only output is returned as it is."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self._graph = graph

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the graph."""
        found = self._graph(*args, **kwargs)
        return next(iter(found.values())) if len(found) == 1 else found


def _input_of(value: ir.Value) -> InputOf:
    kind = None if value.dtype is None else value.dtype.name
    sizes = None
    if value.shape is not None:
        # Some exporters write -1 for a size that is open.
        sizes = tuple(size if isinstance(size, int) and size >= 0 else None for size in value.shape)
    return InputOf(
        name=value.name or "", dtype=None if kind is None else _TYPES.get(kind, kind.lower()), shape=sizes
    )
