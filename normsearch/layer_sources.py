"""The source of normsearch's own layers as one file that needs torch alone."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from torch import nn

_PACKAGE = "normsearch"


def standalone(classes: Sequence[type]) -> str:
    """Return a module's text that defines ``classes`` and whatever of normsearch they use.

    Methods that build a layer from a trained BatchNorm are left out: they belong to the conversion.
    """
    collected = _Collected()
    for cls in classes:
        _collect(cls.__module__, cls.__name__, collected)
    names = ", ".join(cls.__name__ for cls in classes)
    parts = [
        f'"""Normalization layers of a converted network: {names}.\n\n'
        'Copied from normsearch (Apache-2.0), which is not needed to use them.\n"""',
        "from __future__ import annotations",
        "\n".join(sorted(collected.imports, key=lambda line: (not _is_standard(line), line))),
        *collected.definitions.values(),
    ]
    return (
        "\n\n\n".join(parts[:1])
        + "\n\n"
        + "\n\n".join(parts[1:3])
        + "\n\n\n"
        + "\n\n\n".join(parts[3:])
        + "\n"
    )


@dataclass
class _Collected:
    #: Definitions by (module, name), what they use first.
    definitions: dict[tuple[str, str], str] = field(default_factory=dict)
    imports: dict[str, None] = field(default_factory=dict)
    #: The module that a name is defined in.
    modules: dict[str, str] = field(default_factory=dict)
    pending: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True)
class _Source:
    lines: tuple[str, ...]
    definitions: dict[str, ast.stmt]
    #: Local name to (module, name there, statement).
    imports: dict[str, tuple[str, str, str]]


@cache
def _source(module: str) -> _Source:
    loaded: ModuleType = importlib.import_module(module)
    text = inspect.getsource(loaded)
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str, str]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (part for target in targets for part in ast.walk(target)):
                if isinstance(name, ast.Name):
                    definitions[name.id] = node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                local = alias.asname or alias.name
                shown = alias.name if alias.asname is None else f"{alias.name} as {local}"
                imports[local] = (node.module or "", alias.name, f"from {node.module} import {shown}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                local = (alias.asname or alias.name).partition(".")[0]
                shown = alias.name if alias.asname is None else f"{alias.name} as {local}"
                imports[local] = (alias.name, "", f"import {shown}")
    return _Source(tuple(text.splitlines()), definitions, imports)


def _collect(module: str, name: str, collected: _Collected) -> None:
    source = _source(module)
    node = source.definitions[name]
    # Several names of one assignment are one definition.
    key = (module, str(node.lineno))
    if key in collected.definitions or key in collected.pending:
        return
    collected.pending.add(key)
    # One file has one definition of a name.
    assert collected.modules.setdefault(name, module) == module, name
    dropped = _for_conversion(node, source)
    for used in _uses(node, dropped):
        if used in source.imports:
            origin, original, statement = source.imports[used]
            if origin.partition(".")[0] == _PACKAGE:
                _collect(origin, original, collected)
            else:
                collected.imports[statement] = None
        elif used in source.definitions and used != name:
            _collect(module, used, collected)
    collected.definitions[key] = _text(node, dropped, source)


def _for_conversion(node: ast.stmt, source: _Source) -> list[ast.FunctionDef]:
    """Return the methods of a class that take normsearch's own objects."""
    if not isinstance(node, ast.ClassDef):
        return []
    return [
        method
        for method in node.body
        if isinstance(method, ast.FunctionDef)
        for argument in method.args.args
        if isinstance(argument.annotation, ast.Name)
        and _is_of_conversion(*source.imports.get(argument.annotation.id, ("", ""))[:2])
    ]


def _is_of_conversion(module: str, name: str) -> bool:
    """Whether it is one of normsearch's own objects, and no layer."""
    return module.startswith(f"{_PACKAGE}.") and not issubclass(
        getattr(importlib.import_module(module), name), nn.Module
    )


def _uses(node: ast.AST, dropped: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the names that running ``node`` looks up; annotations are text."""
    if node in dropped:
        return
    if isinstance(node, ast.Name):
        yield node.id
    skipped = {"annotation", "returns"}
    for name, value in ast.iter_fields(node):
        if name in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _uses(child, dropped)


def _text(node: ast.stmt, dropped: Sequence[ast.FunctionDef], source: _Source) -> str:
    start = _first_line(node)
    while start > 1 and source.lines[start - 2].startswith("#"):
        start -= 1
    assert node.end_lineno is not None
    left_out: set[int] = set()
    for method in dropped:
        assert method.end_lineno is not None
        left_out |= set(range(_first_line(method), method.end_lineno + 1))
        # And the blank line before it.
        left_out.add(_first_line(method) - 1)
    kept = [source.lines[line - 1] for line in range(start, node.end_lineno + 1) if line not in left_out]
    return "\n".join(kept).rstrip()


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _is_standard(line: str) -> bool:
    return not line.split()[1].startswith("torch")
