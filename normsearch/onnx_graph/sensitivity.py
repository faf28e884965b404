"""sensitivity: how far the output of an ONNX graph moves when a single site changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from normsearch.errors import ModelError
from normsearch.forward import try_call
from normsearch.measurement import DriftSums, floating_tensors
from normsearch.methods import Method, Refusal
from normsearch.onnx_graph import conversion
from normsearch.onnx_graph.files import Source, opened
from normsearch.onnx_graph.graphs import infer
from normsearch.onnx_graph.planning import name_of, places
from normsearch.onnx_graph.running import Runtime, stand_in
from normsearch.onnx_graph.sites import Place, find_places
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
    the original's outputs are kept in memory meanwhile.

    Args:
        model: a path, or a model of onnx-ir; it is left as it is.
        methods: methods or spellings to try at every site.
        batches: inputs, never labels, as for ``compare``.
        sites: glob patterns of site paths to restrict the measurement to; by default all.
        on_progress: called after every site and method.

    Returns:
        A ``Sensitivity``, the sites in the graph's order. A method that refuses a site has drift None there
        and its ``Refusal`` in ``refusals``.

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
        drift[site.path] = {}
        for method in tried:
            refusal = refusal_at(site, method)
            if refusal is not None:
                refusals.append(refusal)
            value = None if refusal is not None else candidates.drift(index, place, method)
            drift[site.path][str(method)] = value
            stage.advance(f"{site.path}: {method}")
    return Sensitivity(
        tuple(drift), tuple(map(str, tried)), drift, tuple(refusals), Environment.here(stand_in(graph))
    )


class _Candidates:
    """A graph and what it puts out; the same with one site changed, one after the other."""

    def __init__(self, model: ir.Model, batches: list[Any]) -> None:
        self._model, self._batches = model, batches
        self._shapes = infer(model)
        original = Runtime(model)
        self._references = [floating_tensors(try_call(original, inputs)) for inputs in batches]

    def drift(self, index: int, place: Place, method: Method) -> float:
        """Return how far the output moves; infinite where it is not finite.

        Args:
            index: of the site among all.
            place: the site as a forward pass saw it.
            method: what stands there instead.

        Raises:
            ModelError: the changed graph fails, or no distance can be measured to the original's outputs.

        """
        target = self._model.clone()
        own = replace(find_places(target, self._shapes)[index], site=place.site, rank=place.rank)
        if method.name != "batch":
            conversion.replace(target, [(own, method.resolve(place.site))])
        sums = DriftSums(logits=False)
        try:
            changed = Runtime(target)
            for inputs, before in zip(self._batches, self._references, strict=True):
                sums.add(before, floating_tensors(try_call(changed, inputs)))
        except ModelError as error:
            raise ModelError(f"{method} at {place.site.path!r}: {error}") from error
        value = sums.drift().relative_l2
        return value if value == value else float("inf")
