"""How nodes and constants get into an ONNX graph and out of it."""

from __future__ import annotations

import onnx_ir as ir

from normsearch.onnx_graph.emitting import Emitter

#: From this IR version on an initializer need not be an input too.
_FREE_INITIALIZERS = 4


def insert(model: ir.Model, node: ir.Node, e: Emitter, *, before: bool = False) -> None:
    """Put what an emitter made so far into a node's graph, after the node or before it."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for value in e.initializers:
        if model.ir_version >= _FREE_INITIALIZERS:
            graph.register_initializer(value)
            continue
        # Before, an initializer had to be an input as well, which subgraphs of If have none of.
        held = ir.node("Constant", [], {"value": value.const_value}, domain=e.domain, outputs=[ir.Value()])
        held.outputs[0].name, held.name = value.name, e.name("Constant")
        value.replace_all_uses_with(held.outputs[0])
        graph.insert_before(node, held)
    put = graph.insert_before if before else graph.insert_after
    put(node, list(e.nodes))
    e.nodes.clear()
    e.initializers.clear()


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Let ``new`` be what ``old`` was to everything that reads it, by the same name."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None
    new.type, new.shape, new.doc_string = old.type or new.type, old.shape or new.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)


def drop_dead(value: ir.Value) -> None:
    """Drop a constant that nothing reads any more."""
    if value.uses() or value.is_graph_output():
        return
    node, graph = value.producer(), value.graph
    if node is not None:
        sources = [source for source in node.inputs if source is not None]
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        for source in sources:
            drop_dead(source)
    elif isinstance(graph, ir.Graph) and value.is_initializer():
        assert value.name is not None
        del graph.initializers[value.name]
        if value.is_graph_input():
            graph.inputs.remove(value)
