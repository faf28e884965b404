"""Which nodes of an exported program are which layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from normsearch.operators import (
    BATCH_NORMS,
    UPDATED,
    activation,
    batch_norm_arguments,
    calling_class,
    calling_path,
    has_many_outputs,
    shape_of,
    weighted,
)
from normsearch.program_tensors import STATE, ProgramTensors

#: Layers that are no sites, though decompositions write them as batch norm: this package's and instance norm.
_NO_SITES = ("normsearch.methods.", "normsearch.reparametrization.", "torch.nn.modules.instancenorm.")
_COUNTS = {torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor}
_LAYERS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


@dataclass
class Layer:
    """A module of the opened graph and the nodes of the program that it stands for.

    Attributes:
        path: where it is in the opened graph.
        made: what was put there; conversion may put something else there.
        state: the full name in the program of each of its parameters and buffers, by its own name.
        calls: the operator nodes, one for each call.
        companions: nodes that serve these alone: further outputs, counters, a weight's transposition.
        shapes: the input's shape at each call.

    """

    path: str
    made: nn.Module
    state: dict[str, str]
    calls: list[fx.Node] = field(default_factory=list)
    companions: list[fx.Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Left:
    """A batch norm that belongs to no layer: reported, not converted."""

    path: str
    operator: str
    eps: float
    shape: tuple[int, ...]
    why: str


class ProgramLayers:
    """The layers of a program, as torch's modules.

    Args:
        program: what torch.export made.
        tensors: its tensors, which the modules are to hold.

    Attributes:
        layers: what became modules, by path.
        left: batch norms that did not.
        made: the layer that each operator node is.
        skipped: nodes that serve layers alone.
        training: whether the program was exported in train mode.

    """

    def __init__(self, program: ExportedProgram, tensors: ProgramTensors) -> None:
        self.layers: dict[str, Layer] = {}
        self.left: list[Left] = []
        self.made: dict[fx.Node, Layer] = {}
        self.skipped: set[fx.Node] = set()
        self._tensors = tensors
        self._nodes = list(program.graph.nodes)
        #: The buffer that an output of the program is the new value of, by the output's name.
        self._mutated = program.graph_signature.buffers_to_mutate
        for node in self._nodes:
            if node.op == "call_function":
                self._recognise(node)
        self._give_up_shared()
        self.training = self._set_modes()

    def _recognise(self, node: fx.Node) -> None:
        if calling_class(node).startswith(_NO_SITES):
            return
        if node.target in BATCH_NORMS:
            reason = None if self._tensors.is_weight(node.args[0]) else self._batch_norm(node)
            if reason is not None:
                given = batch_norm_arguments(node)
                eps = float(given["eps"]) if isinstance(given["eps"], float) else 1e-5
                path = f"{calling_path(node)}:{node.name}".removeprefix(":")
                left = Left(path, str(node.target), eps, shape_of(given["input"]), reason)
                self.left.append(left)
            return
        found = weighted(node)
        if found is not None:
            x, weight, bias, make = found
            owner = self._tensors.owner({"weight": weight, "bias": bias})
            if owner is not None and isinstance(x, fx.Node):
                layer = self._add(node, owner, {"weight": weight, "bias": bias}, make, x)
                turned = [n for n in node.all_input_nodes if n.all_input_nodes == [weight] and n is not x]
                if layer is not None and all(set(n.users) == {node} for n in turned):
                    layer.companions += turned
                    self.skipped.update(turned)
            return
        act = activation(node)
        if act is not None and isinstance(node.args[0], fx.Node):
            self._add_activation(node, act, node.args[0])

    def _batch_norm(self, node: fx.Node) -> str | None:
        """Make a layer of a batch norm; return why that cannot be."""
        given = batch_norm_arguments(node)
        sources = {name: given[name] for name in STATE}
        x = given["input"]
        if not isinstance(x, fx.Node) or any(
            not self._tensors.hold(s) for s in sources.values() if s is not None
        ):
            return "with a computed weight or statistic"
        if not isinstance(given["momentum"], float) or not isinstance(given["eps"], float):
            return "with a computed momentum or eps"
        shape = shape_of(x)
        if len(shape) not in _LAYERS:
            return f"with an input of {len(shape)} dimensions"
        companions = self._outputs(node, sources)
        if companions is None:
            return "and its batch statistics are read elsewhere too"
        path = self._tensors.owner(sources) or self._beside(sources)
        owner = self._tensors.first_owner(sources)
        counter = f"{owner}.num_batches_tracked".removeprefix(".")

        def make() -> nn.Module:
            layer: nn.Module = _LAYERS[len(shape)](
                shape[1],
                given["eps"],
                given["momentum"],
                affine=any(sources[name] is not None for name in ("weight", "bias")),
                track_running_stats=sources["running_mean"] is not None,
                device="meta",
            )
            layer.training = given["training"]
            return layer

        if counter in self._tensors.by_name and sources["running_mean"] is not None:
            sources["num_batches_tracked"] = self._tensors.holders[counter]
        layer = self._add(node, path, sources, make, x)
        if layer is None:
            return "whose parameters another batch norm reads differently"
        layer.companions += [*companions, *self._counts(sources.get("num_batches_tracked"))]
        self.skipped.update(layer.companions)
        return None

    def _give_up_shared(self) -> None:
        """Leave batch norms alone whose numbers other operators read too: they would read other numbers."""
        known = {*self.made, *self.skipped, self._nodes[-1]}
        for path, layer in list(self.layers.items()):
            aliases = {alias for full in layer.state.values() for alias in self._tensors.names[full]}
            readers = {user for alias in aliases for user in self._tensors.holders[alias].users} - known
            if not readers or not isinstance(layer.made, _BatchNorm):
                continue
            del self.layers[path]
            self.skipped.difference_update(layer.companions)
            for node, shape in zip(layer.calls, layer.shapes, strict=True):
                del self.made[node]
                why = f"and its numbers are read by {min(reader.name for reader in readers)} too"
                self.left.append(Left(path, str(node.target), layer.made.eps, shape, why))

    def _outputs(self, node: fx.Node, sources: Mapping[str, Any]) -> list[fx.Node] | None:
        """Return the nodes that take a tuple apart; None if more than the result is used."""
        if not has_many_outputs(node):
            return []
        updated = UPDATED.get(node.target, {})  # type: ignore[call-overload]
        output = self._nodes[-1]
        for user in node.users:
            index = user.args[1]
            if index == 0 or not user.users:
                continue
            mutated = self._mutated.get(user.name) if set(user.users) == {output} else None
            if index not in updated or mutated != self._tensors.name(sources[updated[index]]):
                return None
        return list(node.users)

    def _counts(self, counter: fx.Node | None) -> list[fx.Node]:
        """Return the nodes that count batches and feed nothing else."""
        found: list[fx.Node] = []
        for node in [] if counter is None else counter.users:
            if node.target in _COUNTS and node.args[0] is counter:
                found += [node, *self._counts(node)]
        return found

    def _beside(self, sources: Mapping[str, Any]) -> str:
        """Return a free path for a layer whose tensors have other names or neighbours."""
        owner = self._tensors.first_owner(sources)
        key = {name: None if s is None else self._tensors.name(s) for name, s in sources.items()}
        for number in range(len(self.layers) + 1):
            path = f"{owner}.norm".removeprefix(".") + (f"_{number}" if number else "")
            there = self.layers.get(path)
            if there is not None and {n: there.state.get(n) for n in STATE} == key:
                return path
            names = self._tensors.by_name
            taken = there is not None or any(f"{full}.".startswith(f"{path}.") for full in names)
            if not taken:
                return path
        raise AssertionError("there is always a free number")

    def _add(
        self, node: fx.Node, path: str, sources: Mapping[str, Any], make: Any, x: fx.Node
    ) -> Layer | None:
        made = make()
        state = {name: self._tensors.name(source) for name, source in sources.items() if source is not None}
        layer = self.layers.get(path)
        if layer is None:
            if any(other.startswith(f"{path}.") or path.startswith(f"{other}.") for other in self.layers):
                return None
            for name in set(made._parameters) - set(state):
                made.register_parameter(name, None)
            for name in set(made._buffers) - set(state):
                made.register_buffer(name, None)
            for name, full in state.items():
                self._tensors.attach(made, name, full)
            layer = self.layers[path] = Layer(path, made, state)
        elif not _same(layer.made, made) or any(
            name not in layer.state or self._tensors.names[layer.state[name]] != self._tensors.names[full]
            for name, full in state.items()
        ):
            return None
        layer.calls.append(node)
        layer.shapes.append(shape_of(x))
        self.made[node] = layer
        return layer

    def _add_activation(self, node: fx.Node, act: nn.Module, x: fx.Node) -> None:
        path = calling_path(node)
        inside = next((p for p in self.layers if path.startswith(f"{p}.")), None)
        if inside is not None:
            # timm's norm + act layers: a module inside a layer that will be replaced as a whole.
            path = f"{inside}_{path[len(inside) + 1 :].replace('.', '_')}"
        if path:
            self._add(node, path, {}, lambda: act, x)

    def _set_modes(self) -> bool:
        """Put layers that keep no statistics into the others' mode, and return it."""
        norms = [layer.made for layer in self.layers.values() if isinstance(layer.made, _BatchNorm)]
        # Without running statistics the operator uses the batch in either mode.
        telling = [norm.training for norm in norms if norm.track_running_stats]
        training = any(telling) or (not telling and any(_is_dropout(node) for node in self._nodes))
        for layer in self.layers.values():
            if not isinstance(layer.made, _BatchNorm) or not layer.made.track_running_stats:
                layer.made.training = training
        return training


def _same(one: nn.Module, other: nn.Module) -> bool:
    return (
        type(one) is type(other) and one.extra_repr() == other.extra_repr() and one.training == other.training
    )


def _is_dropout(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.dropout.default and bool(node.args[2])
