"""sensitivity: how far the output of an ONNX graph moves when a single site changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from normsearch.errors import ModelError
from normsearch.forward import try_call
from normsearch.measurement import DriftSums, floating_tensors
from normsearch.methods import Method, Refusal
from normsearch.onnx_graph.conversion import replace_nodes
from normsearch.onnx_graph.files import Source, opened
from normsearch.onnx_graph.graphs import sizes_of, tensor_of
from normsearch.onnx_graph.planning import name_of, places
from normsearch.onnx_graph.running import Runtime, stand_in
from normsearch.onnx_graph.sites import Place, batch_norms
from normsearch.plans import refusal_at
from normsearch.progress import OnProgress, Stage
from normsearch.reports import Environment
from normsearch.sensitivities import Sensitivity
from normsearch.site_effects import matching, parsed_methods


def sensitivity(
    model: Source,
    methods: str | Method | Sequence[str | Method],
    batches: Iterable[Any],
    *,
    sites: Iterable[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Sensitivity:
    """Measure how far an ONNX graph's output moves when a single site changes, for every site and method.

    d = ‖f_s,m(x) − f(x)‖ / ‖f(x)‖ over all outputs of all batches, as ``normsearch.sensitivity`` measures it
    of a network of torch. onnxruntime runs a graph for each site and method, one at a time; the batches and
    the original's outputs are kept in memory meanwhile. Shapes are those of the first batch.

    Args:
        model: a path, or a model of onnx-ir; it is left as it is.
        methods: methods or spellings to try at every site.
        batches: inputs, never labels, as for ``compare``.
        sites: glob patterns of site paths to restrict the measurement to; by default all.
        on_progress: called after every site and method.

    Returns:
        A ``Sensitivity``, the sites in the graph's order. A method that refuses a site has drift None there
        and its ``Refusal`` in ``refusals``; so has every method at a site that no output depends on, as in
        a branch that no batch takes.

    Raises:
        CheckpointError: the file cannot be read.
        PlanError: the model has no BatchNormalization node, a pattern matches none, or no method is given.
        MethodError: a spelling is not valid.
        ModelError: the model cannot be rewritten or run, outputs are not finite or hold no numbers, or there
            is no batch.

    Example:
        >>> import onnx_ir, torch
        >>> from onnx import parser
        >>> from normsearch import onnx_graph
        >>> text = '<ir_version: 8, opset_import: ["": 21]> g (float[N,2,4,4] x) => (float[N,2,4,4] y)'
        >>> text += '<float[2] s = {1, 1}, float[2] b = {0, 0}> {y = BatchNormalization(x, s, b, b, s)}'
        >>> model = onnx_ir.from_proto(parser.parse_model(text))
        >>> found = onnx_graph.sensitivity(model, ["instance", "frozen"], [torch.randn(2, 2, 4, 4)])
        >>> found.drift["y"]["frozen"] < 1e-6 < found.drift["y"]["instance"]
        True

    """
    tried = parsed_methods(methods)
    graph = opened(model)
    given = list(batches)
    if not given:
        raise ModelError("sensitivity got no batch; give at least one input")
    found = places(graph, given[0])
    every = tuple(place.site for place in found)
    wanted = {site.path for site in matching(every, sites, name_of(graph), "measure")}
    candidates = _Candidates(graph, given)
    stage = Stage("sensitivity", len(wanted) * len(tried), on_progress)
    drift: dict[str, dict[str, float | None]] = {}
    refusals: list[Refusal] = []
    for index, place in enumerate(found):
        site = place.site
        if site.path not in wanted:
            continue
        drift[site.path] = row = dict.fromkeys(map(str, tried), None)
        for method in tried:
            refusal = refusal_at(site, method)
            if refusal is None:
                row[str(method)] = candidates.drift(index, place, method)
            else:
                refusals.append(refusal)
            stage.advance(f"{site.path}: {method}")
        measured = [method for method in tried if row[str(method)] is not None]
        if measured and not any(row.values()) and not candidates.matters(index):
            row.update(dict.fromkeys(map(str, measured), None))
            refusals += [
                method.refuse(site, "no batch reached the site", "choose a method for it by other means")
                for method in measured
            ]
    return Sensitivity(
        tuple(drift), tuple(map(str, tried)), drift, tuple(refusals), Environment.here(stand_in(graph))
    )


class _Candidates:
    """A graph and what it puts out; the same with one site changed, one after the other."""

    def __init__(self, model: ir.Model, batches: list[Any]) -> None:
        self._model, self._batches = model, batches
        original = Runtime(model)
        self._references = [floating_tensors(try_call(original, inputs)) for inputs in batches]
        for number, outputs in enumerate(self._references, 1):
            _check(outputs, number)

    def drift(self, index: int, place: Place, method: Method) -> float:
        """Return how far the output moves; infinite where it is not finite.

        Args:
            index: of the site among all.
            place: the site as a forward pass saw it.
            method: what stands there instead.

        Raises:
            ModelError: the changed graph fails.

        """
        target = self._model.clone()
        if method.name != "batch":
            own = replace(place, node=batch_norms(target)[index])
            replace_nodes(target, [(own, method.resolve(place.site))])
        try:
            return self._drift(target)
        except ModelError as error:
            raise ModelError(f"{method} at {place.site.path!r}: {error}") from error

    def matters(self, index: int) -> bool:
        """Tell whether outputs depend on what a site puts out: a branch may not be taken."""
        target = self._model.clone()
        node = batch_norms(target)[index]
        # Other numbers than any method's: nothing is left of the input, and the bias is large.
        for position, number in ((1, 0.0), (2, 1e3)):
            held = tensor_of(node.inputs[position])
            assert held is not None
            constant = ir.tensor(np.full(sizes_of(held), number, held.dtype.numpy()), held.dtype)
            value = ir.Value(name=f"{node.name}.probe.{position}", const_value=constant)
            assert node.graph is not None
            node.graph.register_initializer(value)
            node.replace_input_with(position, value)
        return self._drift(target) > 0

    def _drift(self, changed: ir.Model) -> float:
        runtime, sums = Runtime(changed), DriftSums(logits=False)
        for inputs, before in zip(self._batches, self._references, strict=True):
            sums.add(before, floating_tensors(try_call(runtime, inputs)))
        value = sums.drift().relative_l2
        return value if value == value else float("inf")


def _check(outputs: list[Tensor], batch: int) -> None:
    """Raise unless a distance to outputs can be measured."""
    if not outputs or not all(tensor.numel() for tensor in outputs):
        raise ModelError(
            f"the graph's outputs for batch {batch} hold no floating-point number; give at least one sample, "
            "and a graph that ends where numbers still are"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in outputs):
        raise ModelError(
            f"the graph's own outputs for batch {batch} are not finite; look for NaN or infinite values in "
            "the inputs"
        )
