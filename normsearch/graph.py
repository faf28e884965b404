"""rewrite: replace the BatchNorm nodes of a graph: module calls, functional ones, ATen operators."""

from __future__ import annotations

from typing import TypeVar

from torch import fx
from torch.export import ExportedProgram

from normsearch.conversion import convert
from normsearch.errors import ModelError
from normsearch.plans import Plan

G = TypeVar("G", fx.GraphModule, ExportedProgram)


def rewrite(graph_module: G, plan: Plan) -> G:
    """Replace BatchNorm nodes of a graph by what a plan says; the graph stays a graph.

    ``call_module`` nodes of BatchNorm layers and ``F.batch_norm`` calls alike become module calls of the new
    layers; node metadata stays, state that nothing refers to any more is dropped, and the graph is checked.
    Weight standardization's ``F.batch_norm(weight)`` is left alone.

    Args:
        graph_module: a graph, in train or eval mode, or an exported program; it is not modified.
        plan: made for this graph by ``normsearch.plan(graph_module, ...)``.

    Raises:
        ModelError: ``graph_module`` is no GraphModule.
        PlanError: the plan does not fit the graph.
        RefusedError: a method cannot stand at a site.

    Example:
        >>> import torch, normsearch
        >>> from normsearch.graph import rewrite
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> graph = torch.fx.symbolic_trace(model)
        >>> type(getattr(rewrite(graph, normsearch.plan(graph, "group")), "1")).__name__
        'GroupNorm'

    """
    if isinstance(graph_module, ExportedProgram):
        return convert(graph_module, plan)  # type: ignore[return-value]
    if not isinstance(graph_module, fx.GraphModule):
        raise ModelError(
            f"rewrite takes a torch.fx.GraphModule or an ExportedProgram, got {type(graph_module).__name__}; "
            "use convert for any other model"
        )
    rewritten = convert(graph_module, plan)
    assert isinstance(rewritten, fx.GraphModule)
    return rewritten
