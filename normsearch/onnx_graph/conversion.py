"""convert: replace the BatchNormalization nodes of an ONNX graph, keeping everything else as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import onnx_ir as ir
from torch import nn

from normsearch.conversion import check_sites
from normsearch.errors import PlanError
from normsearch.methods import Keep, Method
from normsearch.methods.upstream import foldable
from normsearch.onnx_graph.editing import drop_dead, insert, take_over
from normsearch.onnx_graph.emitting import Emitter
from normsearch.onnx_graph.files import Source, opened
from normsearch.onnx_graph.folding import as_module, write_producer
from normsearch.onnx_graph.graphs import names, opset, tensor_of
from normsearch.onnx_graph.layers import emit
from normsearch.onnx_graph.neighbours import feed_of
from normsearch.onnx_graph.planning import name_of, places, plan
from normsearch.onnx_graph.sites import Place
from normsearch.plans import Plan, To, Where

#: As what an input of unknown rank is normalized: (N, C, L).
_FLAT = 3


def convert(
    model: Source,
    to: To | Plan,
    *,
    inputs: Any = None,
    where: Where | None = None,
    keep: Keep = "function",
) -> ir.Model:
    """Replace BatchNormalization nodes by other normalizations and keep what the network has learned.

    An ONNX graph is for inference: what is written is the eval function of the layer that the method builds.
    The opset stays; GroupNormalization (from opset 21), LayerNormalization (from 17) and
    InstanceNormalization are used where it has them, else simpler operators. Names, shapes and metadata of
    everything else stay, dynamic sizes too; constants that nothing reads any more are dropped.

    Args:
        model: a path, or a model of onnx-ir; it is left as it is.
        to: a ``Plan``, or what ``plan`` takes.
        inputs: as for ``find_sites``.
        where: as for ``plan``.
        keep: as for ``normsearch.convert``.

    Returns:
        The converted model; ``save`` writes it.

    Raises:
        RefusedError: a method cannot stand at a site.
        PlanError: a given plan does not fit the model.
        CheckpointError: the file cannot be read.
        ModelError: the model cannot be rewritten.
        MethodError: a spelling is not valid.

    Example:
        >>> import onnx_ir
        >>> from onnx import parser
        >>> from normsearch import onnx_graph
        >>> text = '<ir_version: 8, opset_import: ["": 21]> g (float[N,2,4,4] x) => (float[N,2,4,4] y)'
        >>> text += '<float[2] s = {1, 1}, float[2] b = {0, 0}> {y = BatchNormalization(x, s, b, b, s)}'
        >>> converted = onnx_graph.convert(onnx_ir.from_proto(parser.parse_model(text)), "instance")
        >>> [node.op_type for node in converted.graph]
        ['InstanceNormalization']

    """
    if keep not in get_args(Keep):
        raise PlanError(f"keep={keep!r} is not one of {', '.join(get_args(Keep))}")
    if isinstance(to, Plan) and where is not None:
        raise PlanError("a Plan says what happens at each site; give where= to plan() instead")
    target = opened(model).clone()
    found = places(target, inputs)
    if isinstance(to, Plan):
        check_sites(to, [place.site for place in found], name_of(target))
        the_plan = to
    else:
        the_plan = plan(target, to, inputs=inputs, where=where)
    by_path = {place.site.path: place for place in found}
    replace_nodes(target, [(by_path[site.path], method) for site, method in the_plan.changes], keep)
    return target


def replace_nodes(model: ir.Model, changes: Iterable[tuple[Place, Method]], keep: Keep = "function") -> None:
    """Put what methods build in the places of nodes of a model, which is changed.

    Args:
        model: the model.
        changes: places in it, each with a method that may stand there.
        keep: as for ``normsearch.convert``.

    """
    version, taken = opset(model), names(model)
    for place, method in changes:
        _replace(model, place, method, keep, version, taken)


def _replace(
    model: ir.Model, place: Place, method: Method, keep: Keep, version: int, taken: set[str]
) -> None:
    """Put what a method builds in a node's place."""
    node, site, graph = place.node, place.site, place.node.graph
    assert graph is not None
    feed = feed_of(node) if method.rewrites_producer(site) and foldable(site) else None
    built = method.build(site, place.trained().reset(keep), None if feed is None else as_module(feed))
    rank = _FLAT if place.rank is None else place.rank
    e = Emitter(site.path, version, place.dtype or _dtype(node), rank, taken, node.domain)
    if feed is not None and built.producer is not None:
        write_producer(model, e, feed, built.producer)
    x, read = node.inputs[0], node.inputs[1:]
    assert x is not None
    y = _emitted(e, x, built.module.eval(), flat=place.rank is None)
    for made in e.nodes:
        made.metadata_props.update(node.metadata_props)
    insert(model, node, e, before=True)
    old = [node]
    if method.absorbs(site):
        old.append(next(iter(node.outputs[0].uses())).node)
    take_over(y, old[-1].outputs[0])
    graph.remove(old, safe=True)
    for value in read:
        if value is not None:
            drop_dead(value)


def _dtype(node: ir.Node) -> ir.DataType:
    """Return the type of a site's parameters, which its input has too unless the file says otherwise."""
    tensor = tensor_of(node.inputs[1])
    assert tensor is not None
    return tensor.dtype


def _emitted(e: Emitter, x: ir.Value, layer: nn.Module, *, flat: bool) -> ir.Value:
    """Make the layer's nodes, around an input (N, C, *) of any rank as (N, C, L) where it is not known."""
    if not flat or isinstance(layer, nn.Identity):
        return emit(e, x, layer)
    shape = e.op("Shape", x)
    return e.op("Reshape", emit(e, e.op("Reshape", x, e.whole("flat", (0, 0, -1))), layer), shape)
