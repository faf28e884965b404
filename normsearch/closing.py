"""Back from an opened graph to an exported program: replaced layers become operators, all else stays."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from normsearch.aten_layers import Written, in_program, state_of, unguarded, written
from normsearch.opening import Opening, opening_of
from normsearch.operators import weighted
from normsearch.program_layers import Layer

#: Where a program's metadata holds what this package writes there; torch.export saves it as JSON.
_CUSTOM = "normsearch"


def closed(module: fx.GraphModule, record: Mapping[str, Any] | None = None) -> ExportedProgram:
    """Return the program of an opened graph, whose layers may have been replaced or trained.

    A replaced layer's forward pass is written as ATen operators where the old operator stood, so that the
    result needs torch alone. Its parameters and buffers take the old ones' place; all other operators,
    names and metadata are the program's own.

    Args:
        module: what ``opened`` made, afterwards edited by replacing modules alone; its tensors are taken
            over.
        record: what to write into the program's metadata, as JSON can hold it.

    Raises:
        ModelError: a layer cannot be written as operators for the program's dynamic sizes.

    """
    opening = opening_of(module)
    assert opening is not None
    return _Closer(module, opening).closed(record)


def record_in(program: ExportedProgram) -> Mapping[str, Any] | None:
    """Return what ``closed`` wrote into a program's metadata; it may come from anywhere."""
    custom = program.graph_module.meta.get("custom")
    found = custom.get(_CUSTOM) if isinstance(custom, dict) else None
    return found if isinstance(found, dict) else None


@dataclass
class _Entry:
    """One parameter, buffer or constant of the new program."""

    spec: InputSpec
    tensor: Tensor | None
    node: fx.Node | None = None
    #: The program's placeholder, for what it had already.
    old: fx.Node | None = None
    #: Whether it belonged to a layer that is gone: dropped unless something still reads it.
    obsolete: bool = False


class _Closer:
    """Makes one program."""

    def __init__(self, module: fx.GraphModule, opening: Opening) -> None:
        self.module = module
        self.program = opening.program
        self.opening = opening
        self.functional = self.program.dialect != "TRAINING"
        self.changed = {
            layer.path: layer for layer in opening.layers.values() if _is_changed(layer, self._layer(layer))
        }
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.placed: dict[str, fx.Node] = {}
        self.mutations: dict[str, fx.Node] = {}
        #: Layers as operators, and what each of these is in the program, by what decides both.
        self.templates: dict[object, tuple[Written, dict[fx.Node, Any]]] = {}
        mode = detect_fake_mode([node.meta.get("val") for node in self.program.graph.nodes])
        self.mode = mode if isinstance(mode, FakeTensorMode) else FakeTensorMode()

    def _layer(self, layer: Layer) -> nn.Module:
        return self.module.get_submodule(layer.path)

    def closed(self, record: Mapping[str, Any] | None) -> ExportedProgram:
        """Make it."""
        entries = self._entries()
        for entry in entries:
            self._place(entry)
        calls = {node: layer for layer in self.changed.values() for node in layer.calls}
        gone = {node for layer in self.changed.values() for node in layer.companions}
        nodes = list(self.program.graph.nodes)
        for node in nodes[:-1]:
            if node.op == "placeholder":
                continue
            if node in calls:
                self._splice(calls[node], node)
            elif node in gone:
                # The first output of an operator with several is the result.
                if node.target is operator.getitem and node.args[0] in calls and node.args[1] == 0:
                    self.values[node] = self.values[node.args[0]]
            else:
                self.values[node] = self.graph.node_copy(node, self.values.__getitem__)
        outputs = self._finish(nodes[-1], gone)
        entries = self._without_obsolete(entries)
        return self._program(entries, outputs, record)

    # State.

    def _entries(self) -> list[_Entry]:
        replaced = {
            alias
            for layer in self.changed.values()
            for full in layer.state.values()
            for alias in self.opening.aliases[full]
        }
        entries: list[_Entry] = []
        places: dict[tuple[str, InputKind], int] = {}
        holders = {full: layer.path for layer in self.changed.values() for full in layer.state.values()}
        placeholders = self.program.graph.find_nodes(op="placeholder")
        for spec, node in zip(self.program.graph_signature.input_specs, placeholders, strict=True):
            full = spec.target
            obsolete = full in replaced
            if full in holders:
                places.setdefault((holders[full], spec.kind), len(entries))
            entries.append(_Entry(spec, None if full is None else self._tensor(full), None, node, obsolete))
        new: list[tuple[int, _Entry]] = []
        orders = [_order(entry.spec) for entry in entries]
        ends = {
            kind: next((i for i, order in enumerate(orders) if order > rank), len(orders))
            for rank, kind in enumerate(_ORDER)
        }
        for path, layer in self.changed.items():
            for spec, tensor in self._new_specs(path, self._layer(layer)):
                new.append((places.get((path, spec.kind), ends[spec.kind]), _Entry(spec, tensor)))
        # From the last place to the first, so that places stay what they were.
        new.sort(key=lambda pair: pair[0])
        for place, entry in reversed(new):
            entries.insert(place, entry)
        return entries

    def _new_specs(self, path: str, layer: nn.Module) -> Iterator[tuple[InputSpec, Tensor]]:
        for name, tensor in state_of(layer).items():
            is_parameter = isinstance(tensor, nn.Parameter)
            owner, _, own = name.rpartition(".")
            persistent = own not in layer.get_submodule(owner)._non_persistent_buffers_set
            yield (
                InputSpec(
                    InputKind.PARAMETER if is_parameter else InputKind.BUFFER,
                    TensorArgument(_identifier("p" if is_parameter else "b", f"{path}.{name}")),
                    f"{path}.{name}",
                    None if is_parameter else persistent,
                ),
                tensor,
            )

    def _tensor(self, full: str) -> Tensor | None:
        """What a name of the program holds in the opened graph now."""
        owner, _, name = self.opening.places.get(full, full).rpartition(".")
        try:
            found = getattr(self.module.get_submodule(owner), name, None)
        except AttributeError:
            found = None
        return found if isinstance(found, Tensor) else None

    def _place(self, entry: _Entry) -> None:
        if entry.obsolete and entry.old is not None and entry.spec.target in self.placed:
            # Its name lives on in the new layer.
            self.values[entry.old] = self.placed[entry.spec.target]
            return
        name = entry.spec.arg.name if entry.old is None else entry.old.name
        entry.node = self.graph.placeholder(name)
        if entry.old is None:
            assert entry.tensor is not None
            with unguarded(self.mode):
                value = self.mode.from_tensor(entry.tensor, static_shapes=True)
            entry.node.meta = {"val": value}
            assert entry.spec.target is not None
            self.placed[entry.spec.target] = entry.node
        else:
            entry.node.meta = dict(entry.old.meta)
            self.values[entry.old] = entry.node

    def _without_obsolete(self, entries: list[_Entry]) -> list[_Entry]:
        kept = []
        for entry in entries:
            if entry.node is None:
                continue
            if entry.obsolete and not entry.node.users:
                self.graph.erase_node(entry.node)
                continue
            kept.append(entry)
        return kept

    # Operators.

    def _splice(self, layer: Layer, node: fx.Node) -> None:
        """Write a replaced layer where an operator stood."""
        found = weighted(node)
        source: Any = found[0] if found is not None else node.args[0]
        x = self.values[source]
        new = self._layer(layer)
        if type(new) is nn.Identity:
            self.values[node] = x
            return
        value = x.meta["val"]
        key = (_configuration(new), str(tuple(value.shape)), str(value.stride()), value.dtype)
        if key not in self.templates:
            template = written(new, value, functional=self.functional, site=layer.path)
            self.templates[key] = (template, in_program(template, value, self.mode))
        template, values = self.templates[key]
        inside: dict[fx.Node, Any] = {}
        state = iter(template.state)
        placeholders = [n for n in template.graph.nodes if n.op == "placeholder"]
        inside[placeholders[0]] = x
        for placeholder, name in zip(placeholders[1:], state, strict=True):
            full = f"{layer.path}.{name}"
            inside[placeholder] = self.mutations.get(full, self.placed[full])
        result = None
        for part in template.graph.nodes:
            if part.op == "placeholder":
                continue
            if part.op == "output":
                result = map_arg(part.args[0], inside.__getitem__)
                continue
            made = inside[part] = self.graph.node_copy(part, inside.__getitem__)
            made.meta = {**_origin(node, new), "val": values[part]}
        assert isinstance(result, fx.Node)
        self.values[node] = result
        for name, value_node in template.mutated.items():
            self.mutations[f"{layer.path}.{name}"] = inside[value_node]

    def _finish(self, output: fx.Node, gone: set[fx.Node]) -> list[OutputSpec]:
        """Write the output: new values of buffers first, then what the program returns."""
        mutations: list[tuple[Any, OutputSpec]] = []
        results: list[tuple[Any, OutputSpec]] = []
        leaves = pytree.tree_leaves(output.args[0])
        for spec, value in zip(self.program.graph_signature.output_specs, leaves, strict=True):
            if value in gone and value not in self.values:
                continue
            new = self.values[value] if isinstance(value, fx.Node) else value
            own = results if spec.kind is OutputKind.USER_OUTPUT else mutations
            own.append((new, spec))
        mutations += [
            (node, OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(node.name), full))
            for full, node in self.mutations.items()
        ]
        everything = [*mutations, *results]
        self.graph.output(tuple(value for value, _ in everything)).meta = dict(output.meta)
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and not node.is_impure():
                self.graph.erase_node(node)
        return [_named(spec, value) for value, spec in everything]

    # The program.

    def _program(
        self, entries: list[_Entry], outputs: list[OutputSpec], record: Mapping[str, Any] | None
    ) -> ExportedProgram:
        inputs = []
        state: dict[str, Tensor] = {}
        constants = {
            name: value for name, value in self.program.constants.items() if not isinstance(value, Tensor)
        }
        for entry in entries:
            assert entry.node is not None
            spec = entry.spec
            if hasattr(spec.arg, "name"):
                spec = replace(spec, arg=replace(spec.arg, name=entry.node.name))
            inputs.append(spec)
            if spec.target is None or entry.tensor is None:
                continue
            kept = spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False
            (constants if kept else state)[spec.target] = entry.tensor
        program = ExportedProgram(
            root=self.program.graph_module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(inputs, outputs),
            state_dict=state,
            range_constraints=copy.deepcopy(self.program.range_constraints),
            module_call_graph=self._calls(outputs),
            example_inputs=self.program.example_inputs,
            constants=constants,
            verifiers=self.program.verifiers,
        )
        program.graph_module.meta = dict(program.graph_module.meta)
        if record is not None:
            custom = program.graph_module.meta.get("custom")
            program.graph_module.meta["custom"] = {
                **(custom if isinstance(custom, dict) else {}),
                _CUSTOM: dict(record),
            }
        return program

    def _calls(self, outputs: list[OutputSpec]) -> list[ModuleCallEntry]:
        """The program's record of module calls with the names that nodes have now."""
        renamed = {
            old.name: new.name
            for old, new in self.values.items()
            if isinstance(new, fx.Node) and old.name != new.name
        }
        calls: list[ModuleCallEntry] = copy.deepcopy(self.program.module_call_graph)
        for call in calls:
            if call.signature is not None:
                for argument in (*call.signature.inputs, *call.signature.outputs):
                    name = getattr(argument, "name", None)
                    if name in renamed:
                        argument.name = renamed[name]
        return calls


def _is_changed(layer: Layer, now: nn.Module) -> bool:
    """Whether something else stands at a layer's place, or it has other parameters."""
    return type(now) is not type(layer.made) or set(state_of(now)) != set(layer.state)


def _configuration(layer: nn.Module) -> tuple[object, ...]:
    """What decides which operators a layer is written as: all of it but its numbers."""
    plain = [
        (name, value)
        for module in layer.modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | tuple | None)
    ]
    state = [
        (name, tensor.shape, tensor.dtype, tensor.requires_grad, isinstance(tensor, nn.Parameter))
        for name, tensor in state_of(layer).items()
    ]
    return (*map(type, layer.modules()), str(plain), str(state))


def _origin(old: fx.Node, new: nn.Module) -> dict[str, Any]:
    """Metadata of an operator of a new layer: that of the old layer's, with the new one's class."""
    kept = ("stack_trace", "nn_module_stack", "torch_fn")
    meta = {key: old.meta[key] for key in kept if key in old.meta}
    stack = dict(meta.get("nn_module_stack") or {})
    if stack:
        last = next(reversed(stack))
        stack[last] = (stack[last][0], f"{type(new).__module__}.{type(new).__qualname__}")
        meta["nn_module_stack"] = stack
    return meta


#: The kinds of a program's inputs that hold its state, in the order that they have there.
_ORDER = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def _order(spec: InputSpec) -> int:
    return _ORDER.index(spec.kind) if spec.kind in _ORDER else len(_ORDER)


def _identifier(prefix: str, full: str) -> str:
    return f"{prefix}_{full.replace('.', '_')}"


def _named(spec: OutputSpec, value: Any) -> OutputSpec:
    if not isinstance(value, fx.Node) or isinstance(spec.arg, ConstantArgument):
        return spec
    return replace(spec, arg=replace(spec.arg, name=value.name))
