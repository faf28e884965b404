"""F.batch_norm calls in a model's own forward code: what a walk over modules cannot see."""

from __future__ import annotations

import dis
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import fx, nn
from torch.nn import functional as F

from normsearch.observation import Observation
from normsearch.tracing import WEIGHTED

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)


@dataclass(frozen=True)
class FunctionalCall:
    """The F.batch_norm calls that one module makes in its forward."""

    path: str
    owner: str
    eps: float
    shape: tuple[int, ...] | None
    calls: int | None


def find_functional_calls(
    model: nn.Module, prefix: str, sites: Iterable[nn.Module], observation: Observation
) -> list[FunctionalCall]:
    """List the modules that call F.batch_norm themselves, by their code and by what a forward pass showed."""
    inside = {id(module) for site in sites for module in site.modules()}
    found = []
    for path, module in model.named_modules():
        seen = observation.functional.get(path, [])
        if id(module) in inside or not (seen or _names_batch_norm(module)):
            continue
        eps, shape = seen[0] if seen else (1e-5, None)
        found.append(
            FunctionalCall(
                path=f"{prefix}{path}:batch_norm",
                owner=type(module).__name__,
                eps=eps,
                shape=shape,
                calls=len(seen) if observation.ran else None,
            )
        )
    return found


def _names_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, fx.GraphModule):
        return any(
            node.op == "call_function" and node.target in _BATCH_NORMS and not _is_weight(node.args[0])
            for node in module.graph.nodes
        )
    # A weighted layer that calls it standardizes its weight: not a site; nor are normsearch's own layers.
    own = type(module).__module__.startswith(("torch.nn.modules.", "normsearch.methods."))
    if own or isinstance(module, (torch.jit.ScriptModule, *WEIGHTED)):
        return False
    forward = type(module).forward
    return isinstance(forward, FunctionType) and _code_names_batch_norm(forward)


def _is_weight(node: object) -> bool:
    while isinstance(node, fx.Node) and node.op in ("call_method", "call_function") and node.args:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _code_names_batch_norm(forward: FunctionType) -> bool:
    if "batch_norm" not in forward.__code__.co_names:
        return False
    before = None
    for instruction in dis.get_instructions(forward):
        if instruction.argval == "batch_norm":
            if instruction.opname == "LOAD_GLOBAL":
                return forward.__globals__.get("batch_norm") in _BATCH_NORMS
            # self.batch_norm(x) is a module of its own; only torch's function counts.
            owner = forward.__globals__.get(before) if isinstance(before, str) else None
            if before == "functional" or getattr(owner, "batch_norm", None) in _BATCH_NORMS:
                return True
        before = instruction.argval
    return False
