"""Which code of a model reads the numbers of a BatchNorm layer from outside, as far as bytecode tells."""

from __future__ import annotations

import dis
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType

import torch
from torch import fx, nn

#: What may be read of a BatchNorm layer that another layer need not have.
NUMBERS = ("weight", "bias", "running_mean", "running_var")

#: Stands before the name of a method that is called by way of super().
_SUPER = "super()"


@dataclass(frozen=True)
class Reading:
    """One place where a method reads a number of a layer.

    Attributes:
        method: the method, as ``Class.name``.
        chain: what it reads of ``self``, such as ``("bn", "weight")``.
        layer: the id of the layer.
        in_forward: whether a forward pass may come there.

    """

    method: str
    chain: tuple[str, ...]
    layer: int
    in_forward: bool

    @property
    def number(self) -> str:
        """One of ``NUMBERS``."""
        return self.chain[-1]


def readings(model: nn.Module, layers: Mapping[int, nn.Module]) -> list[Reading]:
    """List what methods of a model's modules read of ``layers``, which are given by their id."""
    known: dict[type[nn.Module], Mapping[str, Set[tuple[str, ...]]]] = {}
    found = []
    for owner in model.modules():
        cls = type(owner)
        if id(owner) in layers or cls.__module__.startswith("torch.nn.modules."):
            continue
        if cls not in known:
            known[cls] = _methods(owner)
        methods = known[cls]
        passed = _passed(methods)
        for name, chains in methods.items():
            for chain in sorted(chains):
                read = _resolved(owner, chain)
                if read is not None and id(read[0]) in layers:
                    where = f"{cls.__name__}.{name.partition('@')[0]}"
                    found.append(Reading(where, read[1], id(read[0]), name in passed))
    return found


def _methods(owner: nn.Module) -> Mapping[str, Set[tuple[str, ...]]]:
    """Return what each method of a module reads of ``self``."""
    if isinstance(owner, fx.GraphModule):
        read = {tuple(str(node.target).split(".")) for node in owner.graph.nodes if node.op == "get_attr"}
        return {"forward": read}
    return {name: _of_code(code) for name, code in _own_methods(type(owner)) if code.co_argcount}


# Bytecode takes longer to read than all else that is done to a model here.
@lru_cache(maxsize=4096)
def _of_code(code: CodeType) -> frozenset[tuple[str, ...]]:
    return frozenset((*_chains(code, code.co_varnames[0]), *_of_parents(code)))


def _own_methods(cls: type[nn.Module]) -> Iterator[tuple[str, CodeType]]:
    """Yield the methods and properties that a class and its parents define, up to torch's own.

    One that a subclass overrides is ``name@1``, and so on.
    """
    seen: dict[str, int] = defaultdict(int)
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.modules.") or base is object:
            continue
        for name, member in vars(base).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                yield f"{name}@{seen[name]}" if seen[name] else name, function.__code__
                seen[name] += 1


def _passed(methods: Mapping[str, Set[tuple[str, ...]]]) -> set[str]:
    """Return the methods that a forward pass may come to by way of ``self`` and ``super()``."""
    waiting, passed = ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in passed or name not in methods:
            continue
        passed.add(name)
        for first, *further in methods[name]:
            overridden = (key for key in methods if further and key.startswith(f"{further[0]}@"))
            waiting += overridden if first == _SUPER else [first]
    return passed


def _chains(code: CodeType, first: str) -> Iterator[tuple[str, ...]]:
    """Yield what code reads of ``first``, by way of local names too: ("bn", "weight") and the like."""
    local: dict[str, tuple[str, ...]] = {first: ()}
    chain: tuple[str, ...] | None = None
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if chain is not None and name in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, value)
            continue
        if name == "COPY":
            # An assignment within an expression: what is on the stack is read on.
            continue
        if chain:
            yield chain
        # Newer Pythons store or load two names in one instruction: what is loaded last is read from.
        names = value if isinstance(value, tuple) else (value,)
        if name.startswith("STORE_FAST"):
            local.pop(names[0], None)
            if chain:
                local[names[0]] = chain
        chain = local.get(names[-1]) if "LOAD_FAST" in name or name.startswith("LOAD_DEREF") else None
    for inner in code.co_consts:
        # A comprehension sees self as a variable of the function around it.
        if isinstance(inner, CodeType) and first in inner.co_freevars:
            yield from _chains(inner, first)


def _of_parents(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Yield the names that code may call by way of ``super()``."""
    if "super" in code.co_names:
        yield from ((_SUPER, name) for name in code.co_names)


def _resolved(owner: nn.Module, chain: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...]] | None:
    """Return the module whose number a chain reads, and the chain up to it."""
    module = owner
    for place, name in enumerate(chain):
        if isinstance(module, torch.jit.ScriptModule):
            return None
        child = module._modules.get(name)
        if child is None:
            return (module, chain[: place + 1]) if place and name in NUMBERS else None
        module = child
    return None
