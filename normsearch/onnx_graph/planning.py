"""Plans for ONNX graphs: the same methods, spelling and refusals as for a network of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from normsearch.methods import Method
from normsearch.onnx_graph.files import Source, opened
from normsearch.onnx_graph.running import observed
from normsearch.onnx_graph.sites import Place, find_places
from normsearch.plans import Explanation, Plan, To, Where, decided, planned
from normsearch.sites import NormSite

#: Methods that differ from BatchNorm in training alone, which an ONNX graph is not for.
_TRAINING_ONLY = {"batch_renorm", "ghost", "batch_instance", "frozen"}
_NOT_CHECKED = ": checked at run time", ": over a single element nothing of the input would be left"


def find_sites(model: Source, inputs: Any = None) -> tuple[NormSite, ...]:
    """Find every BatchNormalization node of an ONNX model, in the graph's order.

    Args:
        model: a path, or a model of onnx-ir; it is left as it is.
        inputs: one forward pass's inputs, which tell shapes that the file does not: a tuple in the order of
            the graph's inputs, a dict by name, anything else the only input.

    Raises:
        CheckpointError: the file cannot be read.
        ModelError: the model is written for an opset that is not rewritten, or fails on ``inputs``.

    Example:
        >>> from onnx import parser
        >>> from normsearch import onnx_graph
        >>> import onnx_ir
        >>> text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,2,4,4] x) => (float[N,2,4,4] y)'
        >>> text += '<float[2] s = {1, 1}, float[2] b = {0, 0}> {y = BatchNormalization(x, s, b, b, s)}'
        >>> [site.path for site in onnx_graph.find_sites(onnx_ir.from_proto(parser.parse_model(text)))]
        ['y']

    """
    return tuple(place.site for place in places(opened(model), inputs))


def explain(model: Source, to: To, *, inputs: Any = None, where: Where | None = None) -> Explanation:
    """Return what ``plan`` would decide for every site, with every refusal, without raising for them.

    Args:
        model: as for ``find_sites``.
        to: as for ``normsearch.plan``.
        inputs: as for ``find_sites``.
        where: as for ``normsearch.plan``.

    Raises:
        CheckpointError: the file cannot be read.
        PlanError: the model has no normalization site, or a pattern matches none.
        MethodError: a spelling is not valid.
        ModelError: the model cannot be rewritten, or fails on ``inputs``.

    """
    opened_model = opened(model)
    sites = [place.site for place in places(opened_model, inputs)]
    rows = decided(sites, to, where, name_of(opened_model))
    rows = tuple(
        row if row.method is None else replace(row, notes=notes_on(row.method, row.notes)) for row in rows
    )
    return Explanation(rows)


def plan(model: Source, to: To, *, inputs: Any = None, where: Where | None = None) -> Plan:
    """Decide which method stands at which BatchNormalization node.

    Args:
        model: as for ``find_sites``.
        to: as for ``normsearch.plan``.
        inputs: as for ``find_sites``.
        where: as for ``normsearch.plan``.

    Raises:
        RefusedError: a method cannot stand at a site; every refusal is in ``.refusals``.
        CheckpointError: the file cannot be read.
        PlanError: the model has no normalization site, or a pattern matches none.
        MethodError: a spelling is not valid.
        ModelError: the model cannot be rewritten, or fails on ``inputs``.

    """
    return planned(explain(model, to, inputs=inputs, where=where))


def places(model: ir.Model, inputs: Any = None) -> tuple[Place, ...]:
    """Find the sites, with shapes as seen in one forward pass where inputs are given."""
    found = find_places(model)
    if inputs is None:
        return found
    sources = {place.site.path: place.node.inputs[0] for place in found if place.node.graph is model.graph}
    shapes = observed(model, inputs, {path: value for path, value in sources.items() if value is not None})
    return tuple(
        place
        if place.site.path not in shapes
        else replace(
            place,
            site=replace(place.site, input_shapes=(shapes[place.site.path],), calls=1),
            rank=len(shapes[place.site.path]),
        )
        for place in found
    )


def name_of(model: ir.Model) -> str:
    """Return what a model is called in an error."""
    return f"the ONNX graph {model.graph.name or ''!r}"


def notes_on(method: Method, notes: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a user should know of a method at a site, whose notes for a network of torch are given."""
    found = tuple(note.replace(*_NOT_CHECKED) for note in notes)
    if method.name in _TRAINING_ONLY:
        return (*found, "differs from BatchNorm in training alone: a scale and a shift per channel are left")
    return found
