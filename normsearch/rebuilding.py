"""Write model.py: a readable script that rebuilds a converted network without normsearch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.architectures import Architecture, construction
from normsearch.checkpoints import shared_names
from normsearch.errors import CheckpointError
from normsearch.forward import TORCH_ATTRIBUTES
from normsearch.layer_sources import standalone
from normsearch.plans import Plan
from normsearch.reparametrization import Reparametrized

SCRIPT, LAYERS = "model.py", "normsearch_layers.py"

#: Attributes that do not change what a layer computes in this process.
_IMMATERIAL = {"training", "ranks", "synchronized", "process_group"}


def scripts(model: nn.Module, architecture: Architecture, plan: Plan | None, weights: str) -> dict[str, str]:
    """Return the files that rebuild a converted network: ``model.py``, and one of layers if it has ours.

    Every value in them is written as a literal of a checked type, so that no name, path or option of a
    checkpoint can become code.

    Args:
        model: the converted network.
        architecture: what built it.
        plan: what was changed.
        weights: the name of the safetensors file beside the script.

    Raises:
        CheckpointError: a layer cannot be written as a constructor's call.

    """
    writer = _Writer(model)
    _write_changes(writer, model, plan)
    call = construction(architecture, allow_factories=True)
    arguments = [literal(value) for value in call.positional]
    arguments += [f"{name}={literal(value)}" for name, value in call.arguments.items()]
    replaced = 0 if plan is None else len(plan.changes)
    title = f"{architecture.name} with {replaced} layer{'s' * (replaced != 1)} replaced by normsearch"
    function = f"{call.module}.{call.function}"
    build = [f"model = {function}({', '.join(arguments)})", *writer.lines]
    loading = _loading(model, weights)
    files = {SCRIPT: _script(writer, call.module, build, loading, title)}
    if writer.own:
        files[LAYERS] = standalone(sorted(writer.own, key=lambda cls: cls.__name__))
    return files


def literal(value: object) -> str:
    """Return a value as Python source.

    Raises:
        CheckpointError: it is not None, a bool, a finite number, text, or a tuple or list of these.

    """
    if type(value) in (tuple, list):
        items = [literal(item) for item in value]  # type: ignore[attr-defined]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    plain = (
        value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    )
    if not plain:
        raise CheckpointError(f"a {type(value).__name__} has no literal for model.py; use normsearch.load")
    return ascii(value)


class _Writer:
    """Collects the statements that put layers into a model, and what they need."""

    def __init__(self, model: nn.Module) -> None:
        self.lines: list[str] = []
        self.own: set[type] = set()
        self.keeps_activations = False
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)
        self._written: set[int] = set()

    def put(self, path: str, module: nn.Module, *, fused: bool = False) -> None:
        """Write the statements that put a layer equal to ``module`` at ``path`` and its other paths."""
        if id(module) in self._written:
            return
        self._written.add(id(module))
        if isinstance(module, Reparametrized):
            rule = type(module).__bases__[0]
            self.own.add(rule)
            self.lines.append(f"layer = {rule.__name__}.of(model.get_submodule({literal(path)}))")
            self._state(module, None)
            self._set(path, module, "layer")
        elif fused:
            norm = module.get_submodule("norm")
            expression = self._layer(norm, path)
            kept = [name for name in ("drop", "act") if name in module._modules]
            self.keeps_activations = True
            self._set(
                path,
                module,
                f"followed_by({expression}, model.get_submodule({literal(path)}), {literal(kept)})",
            )
        else:
            self._set(path, module, self._layer(module, path))

    def put_producer(self, path: str, module: nn.Module) -> None:
        """Write what became of a layer that took over a scale."""
        if isinstance(module, Reparametrized):
            self.put(path, module)
        elif id(module) not in self._written:
            # The weight was scaled, which is in the file; only a bias may be new.
            self._written.add(id(module))
            bias = module._parameters.get("bias")
            if bias is not None:
                self.lines.append(f"layer = model.get_submodule({literal(path)})")
                self.lines.append(_registration("parameter", "bias", bias))

    def check_containers(self, model: nn.Module) -> None:
        """Raise where a network keeps a replaced layer in a plain attribute, which the script would miss."""
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name in TORCH_ATTRIBUTES:
                    continue
                items = value.values() if isinstance(value, dict) else value
                held = items if isinstance(items, list | tuple) else [value]
                if any(isinstance(item, nn.Module) and id(item) in self._written for item in held):
                    raise CheckpointError(
                        f"{path or 'the network'} keeps a replaced layer in its attribute {name} too, which "
                        "model.py cannot follow; use normsearch.load"
                    )

    def _layer(self, module: nn.Module, path: str) -> str:
        expression, fresh = self._constructor(module, path), self._fresh(module, path)
        if not _differences(module, fresh):
            return expression
        self.lines.append(f"layer = {expression}")
        self._state(module, fresh)
        return "layer"

    def _set(self, path: str, module: nn.Module, expression: str) -> None:
        first, *others = [path, *(p for p in self._paths[id(module)] if p != path)]
        self.lines.append(f"model.set_submodule({literal(first)}, {expression})")
        for other in others:
            self.lines.append(f"model.set_submodule({literal(other)}, model.get_submodule({literal(first)}))")

    def _constructor(self, module: nn.Module, path: str) -> str:
        cls = type(module)
        if cls.__module__.startswith("torch.nn."):
            name = f"nn.{cls.__name__}"
        else:
            name = cls.__name__
            self.own.add(cls)
        given = _arguments(module, path)
        parts = [
            literal(value) if positional else f"{key}={literal(value)}" for key, value, positional in given
        ]
        return f"{name}({', '.join(parts)})"

    def _fresh(self, module: nn.Module, path: str) -> nn.Module:
        """Build the layer as the script will, and compare it: nothing may be lost."""
        fresh: nn.Module = type(module)(**{key: value for key, value, _ in _arguments(module, path)})
        own, other = _scalars(module), _scalars(fresh)
        lost = sorted(key for key in own if key not in other or own[key] != other[key])
        if lost:
            raise CheckpointError(
                f"{path}: {type(module).__name__} has {lost[0]}={own[lost[0]]!r}, which its constructor "
                "does not take; rebuild this network with normsearch.load"
            )
        return fresh

    def _state(self, module: nn.Module, fresh: nn.Module | None) -> None:
        """Write the parameters and buffers that the constructor does not make."""
        self.lines += [_registration(*difference) for difference in _differences(module, fresh)]


def _registration(kind: str, name: str, tensor: Tensor | None) -> str:
    made = "None"
    if tensor is not None:
        dtype = "" if tensor.is_floating_point() else f", dtype={tensor.dtype}"
        made = f"torch.empty({literal(tuple(tensor.shape))}{dtype})"
        if kind == "parameter":
            made = f"nn.Parameter({made})"
    return f"layer.register_{kind}({literal(name)}, {made})"


def _write_changes(writer: _Writer, model: nn.Module, plan: Plan | None) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for site, method in () if plan is None else plan.changes:
        if site.path not in modules:
            raise CheckpointError(
                f"{site.path!r} was rewritten in a traced graph, which model.py cannot show; "
                "use normsearch.load"
            )
        writer.put(site.path, modules[site.path], fused=site.activation is not None)
        act = site.followed_by
        if method.absorbs(site) and act is not None and not act.inside:
            writer.put(act.path, modules[act.path])
        if method.needs_producer and site.producer is not None and site.producer.path != site.path:
            writer.put_producer(site.producer.path, modules[site.producer.path])
    writer.check_containers(model)


def _arguments(module: nn.Module, path: str) -> list[tuple[str, Any, bool]]:
    """Return (name, value, positional) of a layer's constructor: layers keep what they were made with."""
    found = []
    for parameter in inspect.signature(type(module)).parameters.values():
        if parameter.name in ("device", "dtype") or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        required = parameter.default is parameter.empty
        if not hasattr(module, parameter.name):
            if required:
                raise CheckpointError(
                    f"{path}: {type(module).__name__} does not keep its argument {parameter.name}, so that "
                    "model.py cannot name it; rebuild this network with normsearch.load"
                )
            continue
        value = getattr(module, parameter.name)
        if required or (not isinstance(value, Tensor) and value != parameter.default):
            found.append((parameter.name, value, required))
    return found


def _scalars(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _IMMATERIAL | set(TORCH_ATTRIBUTES)
    }


def _differences(module: nn.Module, fresh: nn.Module | None) -> list[tuple[str, str, Tensor | None]]:
    """Return (kind, name, tensor) of the parameters and buffers that ``fresh`` lacks or has otherwise."""
    found = []
    for kind, attribute in (("parameter", "_parameters"), ("buffer", "_buffers")):
        has = {} if fresh is None else getattr(fresh, attribute)
        for name, tensor in getattr(module, attribute).items():
            same = name in has and (tensor is None) == (has[name] is None)
            if not same or (tensor is not None and tensor.shape != has[name].shape):
                found.append((kind, name, tensor))
    return found


def _loading(model: nn.Module, weights: str) -> list[str]:
    """Return the statements that load the weights into ``model``."""
    state = model.state_dict()
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    # Networks of one type are cast to it; in others each parameter becomes what the file says.
    cast = [f"model.to({floats.copy().pop()})"] if len(floats) == 1 and floats != {torch.float32} else []
    option = ", assign=True" if len(floats) > 1 else ""
    lines = [*cast, f"state = load_file(Path(__file__).with_name({literal(weights)}))"]
    lines += [
        f"state[{literal(alias)}] = state[{literal(name)}]" for alias, name in shared_names(state).items()
    ]
    return [*lines, f"model.load_state_dict(state{option})", "return model.eval()"]


_FOLLOWED_BY = '''
def followed_by(norm: nn.Module, old: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Return a normalization layer followed by parts of the layer that it replaces: dropout, activation."""
    parts = OrderedDict(norm=norm)
    for name in names:
        parts[name] = old.get_submodule(name)
    return nn.Sequential(parts)

'''


def _script(writer: _Writer, module: str, build: list[str], loading: list[str], title: str) -> str:
    standard = ["from collections import OrderedDict"] if writer.keeps_activations else []
    standard.append("from pathlib import Path")
    body = "\n".join((*build, *loading))
    third = [f"import {module}", "from safetensors.torch import load_file", "from torch import nn"]
    if "torch." in body.replace(f"{module}.", ""):
        third.insert(0, "import torch")
    own = (
        [f"from {LAYERS[:-3]} import {', '.join(sorted(cls.__name__ for cls in writer.own))}"]
        if writer.own
        else []
    )
    needs = ", ".join(dict.fromkeys(("torch", module.partition(".")[0], "safetensors")))
    return (
        f'"""{title}.\n\nNeeds {needs}'
        + (f", and {LAYERS} beside it" if own else "")
        + '; not normsearch.\n\n    from model import load\n\n    model = load()\n"""\n\n'
        + "\n".join(standard)
        + "\n\n"
        + "\n".join(sorted(third, key=lambda line: (line.startswith("from"), line)))
        + "\n"
        + "".join(f"\n{line}\n" for line in own)
        + "\n"
        + (_FOLLOWED_BY if writer.keeps_activations else "")
        + '\ndef build() -> nn.Module:\n    """Return the network with fresh weights."""\n'
        + "".join(f"    {line}\n" for line in build)
        + "    return model\n\n\n"
        + 'def load() -> nn.Module:\n    """Return the network with its weights, in eval mode."""\n'
        + "    model = build()\n"
        + "".join(f"    {line}\n" for line in loading)
        + '\n\nif __name__ == "__main__":\n    print(load())\n'
    )
