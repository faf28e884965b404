"""An exported program as a graph in which batch norms, convolutions and activations are modules again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallSignature
from torch.export.graph_signature import CustomObjArgument, InputKind, OutputKind
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from normsearch.errors import ModelError
from normsearch.observation import Observation
from normsearch.operators import weighted
from normsearch.program_layers import Layer, Left, ProgramLayers
from normsearch.program_tensors import ProgramTensors

#: What has sites: a network, or what torch.export made of one.
Model = nn.Module | ExportedProgram

_KEY = "normsearch.opening"


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
        self._program = program
        self._nodes = list(program.graph.nodes)
        self._tensors = ProgramTensors(program, share)
        self._found = ProgramLayers(program, self._tensors)
        self._opening = Opening(
            program,
            self._found.layers,
            self._found.left,
            self._places(),
            self._tensors.names,
            self._found.training,
        )

    def opened(self) -> fx.GraphModule:
        """Make it."""
        # The graph's own constructor takes what is read alone, in the order in which it is read.
        module = fx.GraphModule(self._fill(nn.Module()), self._graph())
        self._fill(module)
        module.meta[_KEY] = self._opening
        module.training = self._opening.training
        return module

    # The graph.

    def _graph(self) -> fx.Graph:
        graph = fx.Graph()
        values: dict[fx.Node, Any] = {}
        output = self._nodes[-1]
        state: dict[str, fx.Node] = {}
        read = self._read_as_tensors()
        for node in self._nodes[:-1]:
            spec = self._tensors.specs.get(node)
            if spec is not None and spec.kind is not InputKind.USER_INPUT:
                name = self._opening.places.get(str(spec.target), str(spec.target))
                if node in read:
                    values[node] = state[str(spec.target)] = graph.get_attr(name)
            elif node in self._found.made:
                layer = self._found.made[node]
                values[node] = graph.call_module(layer.path, (values[_input(node)],))
            elif node in self._found.skipped:
                if node.target is not None and node.args and node.args[0] in self._found.made:
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
        for node in self._nodes:
            if node not in self._found.made and node not in self._found.skipped:
                read.update(node.all_input_nodes)
        mutated = {spec.target for spec in self._program.graph_signature.output_specs}
        read.update(
            node for node, spec in self._tensors.specs.items() if spec.target and spec.target in mutated
        )
        return read

    def _finish(
        self, graph: fx.Graph, output: fx.Node, values: dict[fx.Node, Any], state: Mapping[str, fx.Node]
    ) -> None:
        results = []
        for spec, value in zip(
            self._program.graph_signature.output_specs, pytree.tree_leaves(output.args[0]), strict=True
        ):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                if value in self._found.skipped:
                    continue
                target = next(
                    n
                    for n, s in self._tensors.specs.items()
                    if spec.target in (s.target, getattr(s.arg, "name", None))
                )
                graph.call_function(torch.ops.aten.copy_.default, (values[target], values[value]))
            else:
                results.append(values[value] if isinstance(value, fx.Node) else value)
        for node in reversed(list(graph.nodes)):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        graph.output(tuple(results)).meta = dict(output.meta)
        signature = self._program.module_call_graph[0].signature
        assert signature is not None
        info = _PyTreeInfo(_argument_names(signature), signature.in_spec, signature.out_spec)
        graph.set_codegen(_PyTreeCodeGen(info))

    # The state.

    def _places(self) -> dict[str, str]:
        """Return the name that each tensor of the program has in the opened graph."""
        places = {full: full for full in self._tensors.by_name}
        for layer in self._found.layers.values():
            for name, own in layer.state.items():
                for full in self._tensors.names[own]:
                    places[full] = f"{layer.path}.{name}"
        return places

    def _fill(self, root: nn.Module) -> nn.Module:
        """Put every layer and tensor at its place, layers in the order that the model had them in."""
        root._modules.clear()
        for path in self._owners():
            if path in self._opening.layers:
                self._put(root, path)
            else:
                _owner_of(root, path)
        for full in self._tensors.by_name:
            owner, _, name = self._opening.places[full].rpartition(".")
            if owner not in self._opening.layers:
                self._tensors.attach(_owner_of(root, owner), name, full)
        for name, child in self._program.graph_module.named_children():
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
        for full in self._tensors.by_name:
            owner = self._opening.places[full].rpartition(".")[0]
            (parameters if self._tensors.is_parameter(full) else others)[owner] = None
        found: list[str] = []
        for paths in (parameters, self._opening.layers, others):
            place = 0
            for path in paths:
                if path not in found:
                    found.insert(place, path)
                place = found.index(path) + 1
        return found

    def _put(self, root: nn.Module, path: str) -> None:
        owner, _, name = path.rpartition(".")
        _owner_of(root, owner)._modules[name] = self._opening.layers[path].made


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


def _argument_names(signature: ModuleCallSignature) -> list[str]:
    """Return the names of a program's arguments, as its own ``module()`` has them."""
    args, kwargs = signature.in_spec.child(0), signature.in_spec.child(1)
    if signature.forward_arg_names:
        return signature.forward_arg_names
    return [*(f"arg_{index}" for index in range(args.num_children)), *kwargs.context]
