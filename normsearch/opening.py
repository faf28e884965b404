"""An exported program as a graph in which batch norms, convolutions and activations are modules again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallSignature
from torch.export.graph_signature import CustomObjArgument, InputKind, InputSpec, OutputKind
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from normsearch.errors import ModelError
from normsearch.observation import Observation
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

#: What has sites: a network, or what torch.export made of one.
Model = nn.Module | ExportedProgram

_KEY = "normsearch.opening"
#: Layers that are no sites, though decompositions write them as batch norm: this package's and instance norm.
_NO_SITES = ("normsearch.methods.", "normsearch.reparametrization.", "torch.nn.modules.instancenorm.")
_STATE = ("weight", "bias", "running_mean", "running_var")
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


@dataclass
class Opening:
    """How an opened graph belongs to its program.

    Attributes:
        program: the program, unchanged.
        layers: what became modules, by path.
        left: batch norms that did not.
        places: the name in the opened graph of each of the program's parameters, buffers and constants.
        aliases: every name in the program of the same tensor, the first one first, by each of them.
        training: whether the program was exported in train mode.

    """

    program: ExportedProgram
    layers: dict[str, Layer] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    training: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Opening:
        """Copies of an opened graph belong to the same program."""
        return self

    def leaves_batch_open(self, path: str) -> bool:
        """Whether the batch size at a layer in train mode is any that the program is given."""
        layer = self.layers[path]
        sizes = [_input(node).meta["val"].shape[0] for node in layer.calls]
        return layer.made.training and not all(isinstance(size, int) for size in sizes)

    @property
    def observation(self) -> Observation:
        """What the program's own metadata tells about a forward pass."""
        seen = Observation(ran=True)
        for layer in self.layers.values():
            seen.shapes[layer.path].extend(layer.shapes)
        return seen


def as_module(model: Model) -> nn.Module:
    """Return an exported program opened, for a look; anything else as it is."""
    return opened(model, share=True) if isinstance(model, ExportedProgram) else model


def opening_of(model: nn.Module) -> Opening | None:
    """Return how a graph was opened; None for any other model."""
    found = getattr(model, "meta", {}).get(_KEY) if isinstance(model, fx.GraphModule) else None
    return found if isinstance(found, Opening) else None


def opened(program: ExportedProgram, *, share: bool = False) -> fx.GraphModule:
    """Return a program as a module whose layers can be found and replaced.

    It computes what the program computes and takes the same arguments. Convolutions, linear layers, batch
    norms and known activations are torch's modules, at the paths that their parameters have; all else stays
    as operators.

    Args:
        program: what torch.export made, in its training form or decomposed; it is not modified.
        share: hold the program's own tensors instead of copies.

    Raises:
        ModelError: the program holds objects other than tensors.

    """
    for spec in program.graph_signature.input_specs:
        if isinstance(spec.arg, CustomObjArgument) or spec.kind is InputKind.TOKEN:
            raise ModelError(
                f"the exported program holds {spec.target or spec.arg.name}, which is no tensor; "
                "convert the model before exporting it"
            )
    return _Opener(program, share).opened()


class _Opener:
    """Makes one opened graph."""

    def __init__(self, program: ExportedProgram, share: bool) -> None:
        self.program = program
        self.opening = Opening(program)
        self.nodes = list(program.graph.nodes)
        self.specs: dict[fx.Node, InputSpec] = dict(
            zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
        )
        self.tensors = self._tensors(share)
        #: Every name of the tensor that a node holds, the first one first.
        self.names = self.opening.aliases = self._all_names()
        self.holders = {spec.target: node for node, spec in self.specs.items() if spec.target is not None}
        #: The buffer that an output of the program is the new value of, by the output's name.
        self.mutated = program.graph_signature.buffers_to_mutate
        self.skipped: set[fx.Node] = set()
        self.made: dict[fx.Node, Layer] = {}

    def _tensors(self, share: bool) -> dict[str, Tensor]:
        """The tensor of each full name; names that share one share its copy."""
        copies: dict[object, Tensor] = {}
        found: dict[str, Tensor] = {}
        for spec in self.specs.values():
            if spec.kind is InputKind.USER_INPUT or spec.target is None:
                continue
            source = (
                self.program.state_dict if spec.target in self.program.state_dict else self.program.constants
            )
            tensor = source[spec.target]
            if isinstance(tensor, Tensor):
                copy = partial(_copy, tensor, share=share)
                found[spec.target] = copies.setdefault(_identity(tensor), copy())
        return found

    def _all_names(self) -> dict[str, list[str]]:
        names: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            names[id(tensor)].append(name)
        return {name: same for same in names.values() for name in same}

    def opened(self) -> fx.GraphModule:
        """Make it."""
        for node in self.nodes:
            if node.op == "call_function":
                self._recognise(node)
        self._give_up_shared()
        self._set_modes()
        self._find_places()
        # The graph's own constructor takes what is read alone, in the order in which it is read.
        module = fx.GraphModule(self._fill(nn.Module()), self._graph())
        self._fill(module)
        module.meta[_KEY] = self.opening
        module.training = self.opening.training
        return module

    # Which node is which layer.

    def _recognise(self, node: fx.Node) -> None:
        if calling_class(node).startswith(_NO_SITES):
            return
        if node.target in BATCH_NORMS:
            reason = None if self._is_weight(node.args[0]) else self._batch_norm(node)
            if reason is not None:
                given = batch_norm_arguments(node)
                eps = float(given["eps"]) if isinstance(given["eps"], float) else 1e-5
                path = f"{calling_path(node)}:{node.name}".removeprefix(":")
                left = Left(path, str(node.target), eps, shape_of(given["input"]), reason)
                self.opening.left.append(left)
            return
        found = weighted(node)
        if found is not None:
            x, weight, bias, make = found
            owner = self._owner({"weight": weight, "bias": bias})
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
        sources = {name: given[name] for name in _STATE}
        x = given["input"]
        if not isinstance(x, fx.Node) or any(
            not self._is_state(s) for s in sources.values() if s is not None
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
        path = self._owner(sources) or self._beside(sources)
        owner = next((self._name(s).rpartition(".")[0] for s in sources.values() if s is not None), "")
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

        if counter in self.tensors and sources["running_mean"] is not None:
            sources["num_batches_tracked"] = self.holders[counter]
        layer = self._add(node, path, sources, make, x)
        if layer is None:
            return "whose parameters another batch norm reads differently"
        layer.companions += [*companions, *self._counts(sources.get("num_batches_tracked"))]
        self.skipped.update(layer.companions)
        return None

    def _give_up_shared(self) -> None:
        """Leave batch norms alone whose numbers other operators read too: they would read other numbers."""
        known = {*self.made, *self.skipped, self.nodes[-1]}
        for path, layer in list(self.opening.layers.items()):
            holders = {self.holders[alias] for full in layer.state.values() for alias in self.names[full]}
            readers = {user for holder in holders for user in holder.users} - known
            if not readers or not isinstance(layer.made, _BatchNorm):
                continue
            del self.opening.layers[path]
            self.skipped.difference_update(layer.companions)
            for node, shape in zip(layer.calls, layer.shapes, strict=True):
                del self.made[node]
                why = f"and its numbers are read by {min(reader.name for reader in readers)} too"
                self.opening.left.append(Left(path, str(node.target), layer.made.eps, shape, why))

    def _outputs(self, node: fx.Node, sources: Mapping[str, Any]) -> list[fx.Node] | None:
        """Return the nodes that take a tuple apart; None if more than the result is used."""
        if not has_many_outputs(node):
            return []
        updated = UPDATED.get(node.target, {})  # type: ignore[call-overload]
        output = self.nodes[-1]
        for user in node.users:
            index = user.args[1]
            if index == 0 or not user.users:
                continue
            mutated = self.mutated.get(user.name) if set(user.users) == {output} else None
            if index not in updated or mutated != self._name(sources[updated[index]]):
                return None
        return list(node.users)

    def _counts(self, counter: fx.Node | None) -> list[fx.Node]:
        """Return the nodes that count batches and feed nothing else."""
        found: list[fx.Node] = []
        for node in [] if counter is None else counter.users:
            if node.target in _COUNTS and node.args[0] is counter:
                found += [node, *self._counts(node)]
        return found

    def _is_state(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.specs and self.specs[node].target in self.tensors

    def _name(self, node: fx.Node) -> str:
        name = self.specs[node].target
        assert name is not None
        return name

    def _is_weight(self, source: Any) -> bool:
        """Whether a value is a parameter, seen through one-argument operators: weight standardization."""
        while (
            isinstance(source, fx.Node) and source.op == "call_function" and len(source.all_input_nodes) == 1
        ):
            (source,) = source.all_input_nodes
        return self._is_state(source)

    def _owner(self, sources: Mapping[str, Any]) -> str | None:
        """Return the path of the module that has exactly these tensors under these names."""
        owners: list[set[str]] = []
        order: list[str] = []
        for name, source in sources.items():
            if source is None:
                continue
            if not self._is_state(source):
                return None
            split = [full.rpartition(".") for full in self.names[self._name(source)]]
            order += [owner for owner, _, own in split if own == name]
            owners.append({owner for owner, _, own in split if own == name})
        shared = set.intersection(*owners) if owners else set()
        path = next((owner for owner in order if owner in shared), None)
        if not path:
            return None
        expected = {*_STATE, "num_batches_tracked"}
        inside = {full.removeprefix(f"{path}.") for full in self.tensors if full.startswith(f"{path}.")}
        return path if inside <= expected else None

    def _beside(self, sources: Mapping[str, Any]) -> str:
        """Return a free path for a layer whose tensors have other names or neighbours."""
        owner = next((self._name(s).rpartition(".")[0] for s in sources.values() if s is not None), "")
        key = {name: None if s is None else self._name(s) for name, s in sources.items()}
        for number in range(len(self.opening.layers) + 1):
            path = f"{owner}.norm".removeprefix(".") + (f"_{number}" if number else "")
            there = self.opening.layers.get(path)
            if there is not None and {n: there.state.get(n) for n in _STATE} == key:
                return path
            taken = there is not None or any(f"{full}.".startswith(f"{path}.") for full in self.tensors)
            if not taken:
                return path
        raise AssertionError("there is always a free number")

    def _add(
        self, node: fx.Node, path: str, sources: Mapping[str, Any], make: Any, x: fx.Node
    ) -> Layer | None:
        made = make()
        state = {name: self._name(source) for name, source in sources.items() if source is not None}
        layer = self.opening.layers.get(path)
        if layer is None:
            if any(
                other.startswith(f"{path}.") or path.startswith(f"{other}.") for other in self.opening.layers
            ):
                return None
            for name in set(made._parameters) - set(state):
                made.register_parameter(name, None)
            for name in set(made._buffers) - set(state):
                made.register_buffer(name, None)
            for name, full in state.items():
                self._attach(made, name, full)
            layer = self.opening.layers[path] = Layer(path, made, state)
        elif not _same(layer.made, made) or any(
            self.names[layer.state[name]] != self.names[full] if name in layer.state else True
            for name, full in state.items()
        ):
            return None
        layer.calls.append(node)
        layer.shapes.append(shape_of(x))
        self.made[node] = layer
        return layer

    def _add_activation(self, node: fx.Node, act: nn.Module, x: fx.Node) -> None:
        path = calling_path(node)
        inside = next((p for p in self.opening.layers if path.startswith(f"{p}.")), None)
        if inside is not None:
            # timm's norm + act layers: a module inside a layer that will be replaced as a whole.
            path = f"{inside}_{path[len(inside) + 1 :].replace('.', '_')}"
        if path:
            self._add(node, path, {}, lambda: act, x)

    def _set_modes(self) -> None:
        norms = [layer.made for layer in self.opening.layers.values() if isinstance(layer.made, _BatchNorm)]
        # Without running statistics the operator uses the batch in either mode.
        telling = [norm.training for norm in norms if norm.track_running_stats]
        training = any(telling) or (not telling and any(_is_dropout(node) for node in self.nodes))
        self.opening.training = training
        for layer in self.opening.layers.values():
            if not isinstance(layer.made, _BatchNorm) or not layer.made.track_running_stats:
                layer.made.training = training

    # The graph.

    def _graph(self) -> fx.Graph:
        graph = fx.Graph()
        values: dict[fx.Node, Any] = {}
        output = self.nodes[-1]
        state: dict[str, fx.Node] = {}
        read = self._read_as_tensors()
        for node in self.nodes[:-1]:
            spec = self.specs.get(node)
            if spec is not None and spec.kind is not InputKind.USER_INPUT:
                name = self.opening.places.get(str(spec.target), str(spec.target))
                if node in read:
                    values[node] = state[str(spec.target)] = graph.get_attr(name)
            elif node in self.made:
                layer = self.made[node]
                values[node] = graph.call_module(layer.path, (values[_input(node)],))
            elif node in self.skipped:
                if node.target is not None and node.args and node.args[0] in self.made:
                    values[node] = values[node.args[0]]
                continue
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
                continue
            if node in values:
                values[node].meta = dict(node.meta)
        self._finish(graph, output, values, state)
        return graph

    def _read_as_tensors(self) -> set[fx.Node]:
        """Return the state that operators read, beside what has become part of layers."""
        read: set[fx.Node] = set()
        for node in self.nodes:
            if node not in self.made and node not in self.skipped:
                read.update(node.all_input_nodes)
        mutated = {spec.target for spec in self.program.graph_signature.output_specs}
        read.update(node for node, spec in self.specs.items() if spec.target and spec.target in mutated)
        return read

    def _finish(
        self, graph: fx.Graph, output: fx.Node, values: dict[fx.Node, Any], state: Mapping[str, fx.Node]
    ) -> None:
        results = []
        for spec, value in zip(
            self.program.graph_signature.output_specs, pytree.tree_leaves(output.args[0]), strict=True
        ):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                if value in self.skipped:
                    continue
                target = next(
                    n
                    for n, s in self.specs.items()
                    if spec.target in (s.target, getattr(s.arg, "name", None))
                )
                graph.call_function(torch.ops.aten.copy_.default, (values[target], values[value]))
            else:
                results.append(values[value] if isinstance(value, fx.Node) else value)
        for node in reversed(list(graph.nodes)):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        graph.output(tuple(results)).meta = dict(output.meta)
        signature = self.program.module_call_graph[0].signature
        assert signature is not None
        info = _PyTreeInfo(_argument_names(signature), signature.in_spec, signature.out_spec)
        graph.set_codegen(_PyTreeCodeGen(info))

    # The state.

    def _find_places(self) -> None:
        """Note the name that each tensor of the program has in the opened graph."""
        self.opening.places = {full: full for full in self.tensors}
        for layer in self.opening.layers.values():
            for name, own in layer.state.items():
                for full in self.names[own]:
                    self.opening.places[full] = f"{layer.path}.{name}"

    def _attach(self, module: nn.Module, name: str, full: str) -> None:
        tensor = self.tensors[full]
        _forget(module, name)
        spec = self.specs[self.holders[full]]
        if spec.kind is InputKind.PARAMETER:
            module.register_parameter(name, tensor)  # type: ignore[arg-type]
        else:
            module.register_buffer(name, tensor, persistent=bool(spec.persistent))

    def _fill(self, root: nn.Module) -> nn.Module:
        """Put every layer and tensor at its place, layers in the order that the model had them in."""
        root._modules.clear()
        for path in self._owners():
            if path in self.opening.layers:
                self._put(root, path)
            else:
                _owner_of(root, path)
        for full in self.tensors:
            owner, _, name = self.opening.places[full].rpartition(".")
            if owner not in self.opening.layers:
                self._attach(_owner_of(root, owner), name, full)
        for name, child in self.program.graph_module.named_children():
            if name not in root._modules:
                root.add_module(name, child)
        return root

    def _owners(self) -> list[str]:
        """Return the paths of layers and of what else holds tensors, in the model's order.

        A program lists its parameters in that order. Layers without come after what was called before them:
        buffers are listed apart, and by decompositions in another order.
        """
        parameters: dict[str, None] = {}
        others: dict[str, None] = {}
        for full in self.tensors:
            is_parameter = self.specs[self.holders[full]].kind is InputKind.PARAMETER
            owner = self.opening.places[full].rpartition(".")[0]
            (parameters if is_parameter else others)[owner] = None
        found: list[str] = []
        for paths in (parameters, self.opening.layers, others):
            place = 0
            for path in paths:
                if path not in found:
                    found.insert(place, path)
                place = found.index(path) + 1
        return found

    def _put(self, root: nn.Module, path: str) -> None:
        owner, _, name = path.rpartition(".")
        _owner_of(root, owner)._modules[name] = self.opening.layers[path].made


def _input(node: fx.Node) -> fx.Node:
    found = weighted(node)
    x = found[0] if found is not None else node.args[0]
    assert isinstance(x, fx.Node)
    return x


def _owner_of(root: nn.Module, path: str) -> nn.Module:
    here = root
    for name in path.split(".") if path else ():
        if name not in here._modules:
            here.add_module(name, nn.Module())
        child = here._modules[name]
        assert child is not None
        here = child
    return here


def _forget(module: nn.Module, name: str) -> None:
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    module._non_persistent_buffers_set.discard(name)


def _same(one: nn.Module, other: nn.Module) -> bool:
    return (
        type(one) is type(other) and one.extra_repr() == other.extra_repr() and one.training == other.training
    )


def _copy(tensor: Tensor, *, share: bool) -> Tensor:
    if share:
        return tensor
    new = tensor.detach().clone()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _identity(tensor: Tensor) -> object:
    """What two names of one tensor have in common; a file keeps one copy, but makes two objects of it."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, isinstance(tensor, nn.Parameter))


def _is_dropout(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.dropout.default and bool(node.args[2])


def _argument_names(signature: ModuleCallSignature) -> list[str]:
    """Return the names of a program's arguments, as its own ``module()`` has them."""
    args, kwargs = signature.in_spec.child(0), signature.in_spec.child(1)
    if signature.forward_arg_names:
        return signature.forward_arg_names
    return [*(f"arg_{index}" for index in range(args.num_children)), *kwargs.context]
