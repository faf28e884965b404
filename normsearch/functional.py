"""F.batch_norm calls in a model's own forward code: what a walk over modules cannot see."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normsearch.lifting import BATCH_NORMS, functional_nodes, lifted
from normsearch.observation import Observation
from normsearch.tracing import WEIGHTED


@dataclass(frozen=True)
class FunctionalCall:
    """The F.batch_norm calls that one module makes in its forward."""

    path: str
    where: str
    eps: float
    shape: tuple[int, ...] | None
    calls: int | None
    why: str


def find_functional_calls(
    model: nn.Module, prefix: str, sites: Iterable[nn.Module], observation: Observation
) -> list[FunctionalCall]:
    """List the modules that call F.batch_norm themselves, by their code and by what a forward pass showed."""
    known = list(sites)
    inside = {id(module) for site in known for module in site.modules()}
    found = []
    for path, module in model.named_modules():
        seen = observation.functional.get(path, [])
        if id(module) in inside or not (seen or _names_batch_norm(module)):
            continue
        eps, shape = seen[0] if seen else (1e-5, None)
        found.append(
            FunctionalCall(
                path=f"{prefix}{path}:batch_norm",
                where=_where(module),
                eps=eps,
                shape=shape,
                calls=len(seen) if observation.ran else None,
                why=_why(model, known),
            )
        )
    return found


def names_batch_norm(model: nn.Module) -> bool:
    """Tell whether the code of any module calls F.batch_norm on activations, as far as it shows."""
    return any(_names_batch_norm(module) for module in model.modules() if not _known(module))


def _known(module: nn.Module) -> bool:
    # BatchNorm layers of any package call the function in their forward: they are sites of their own.
    return isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__


def _where(module: nn.Module) -> str:
    owner = type(module).__name__
    if _names_batch_norm(module):
        return f"{owner} calls F.batch_norm itself"
    return f"{owner} calls F.batch_norm by way of a function, or of a layer that is no submodule"


def _why(model: nn.Module, known: list[nn.Module]) -> str:
    graph = lifted(model, known)
    return graph if isinstance(graph, str) else "with a computed weight or statistic"


def _names_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, fx.GraphModule):
        return next(functional_nodes(module.graph), None) is not None
    # A weighted layer that calls it standardizes its weight: not a site; nor are normsearch's own layers.
    own = type(module).__module__.startswith(("torch.nn.modules.", "normsearch.methods."))
    if own or isinstance(module, (torch.jit.ScriptModule, *WEIGHTED)):
        return False
    return any(_code_names_batch_norm(forward) for forward in _forwards(type(module)))


def _forwards(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield a class's forward and, as long as one calls super(), its parent's."""
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        if not isinstance(forward, FunctionType):
            continue
        yield forward
        if "super" not in forward.__code__.co_names:
            return


def _code_names_batch_norm(forward: FunctionType) -> bool:
    if "batch_norm" not in forward.__code__.co_names:
        return False
    before = None
    for instruction in dis.get_instructions(forward):
        if instruction.argval == "batch_norm":
            if instruction.opname == "LOAD_GLOBAL":
                return forward.__globals__.get("batch_norm") in BATCH_NORMS
            # self.batch_norm(x) is a module of its own; only torch's function counts.
            owner = forward.__globals__.get(before) if isinstance(before, str) else None
            if before == "functional" or getattr(owner, "batch_norm", None) in BATCH_NORMS:
                return True
        before = instruction.argval
    return False
