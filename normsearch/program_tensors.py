"""The tensors of an exported program: what they are called, and which node holds each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

#: What the parameters and buffers of batch norms, convolutions and linear layers are called, counters apart.
STATE = ("weight", "bias", "running_mean", "running_var")


class ProgramTensors:
    """The parameters, buffers and constants of a program.

    Args:
        program: what torch.export made.
        share: hold the program's own tensors instead of copies.

    Attributes:
        specs: what the program says of each of its inputs, tensors of its own among them.
        by_name: the tensor of each full name; names that share one share its copy.
        names: every name of the same tensor, the first one first, by each of them.
        holders: the node of each name.

    """

    def __init__(self, program: ExportedProgram, share: bool) -> None:
        self.specs: dict[fx.Node, InputSpec] = dict(
            zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
        )
        self.by_name = _tensors(program, self.specs, share)
        self.names = _names(self.by_name)
        self.holders = {spec.target: node for node, spec in self.specs.items() if spec.target is not None}

    def hold(self, node: Any) -> bool:
        """Whether a node holds one of these tensors."""
        return isinstance(node, fx.Node) and node in self.specs and self.specs[node].target in self.by_name

    def name(self, node: fx.Node) -> str:
        """Return the full name of what a node holds."""
        name = self.specs[node].target
        assert name is not None
        return name

    def is_parameter(self, full: str) -> bool:
        """Whether a name is a parameter's."""
        return self.specs[self.holders[full]].kind is InputKind.PARAMETER

    def is_weight(self, source: Any) -> bool:
        """Whether a value is a parameter, seen through one-argument operators: weight standardization."""
        while (
            isinstance(source, fx.Node) and source.op == "call_function" and len(source.all_input_nodes) == 1
        ):
            (source,) = source.all_input_nodes
        return self.hold(source)

    def owner(self, sources: Mapping[str, Any]) -> str | None:
        """Return the path of the module that has exactly these tensors under these names."""
        owners: list[set[str]] = []
        order: list[str] = []
        for name, source in sources.items():
            if source is None:
                continue
            if not self.hold(source):
                return None
            split = [full.rpartition(".") for full in self.names[self.name(source)]]
            order += [owner for owner, _, own in split if own == name]
            owners.append({owner for owner, _, own in split if own == name})
        shared = set.intersection(*owners) if owners else set()
        path = next((owner for owner in order if owner in shared), None)
        if not path:
            return None
        expected = {*STATE, "num_batches_tracked"}
        inside = {full.removeprefix(f"{path}.") for full in self.by_name if full.startswith(f"{path}.")}
        return path if inside <= expected else None

    def first_owner(self, sources: Mapping[str, Any]) -> str:
        """Return the path of the module that has the first of these tensors."""
        return next((self.name(s).rpartition(".")[0] for s in sources.values() if s is not None), "")

    def attach(self, module: nn.Module, name: str, full: str) -> None:
        """Put a tensor into a module as what it is in the program."""
        tensor = self.by_name[full]
        _forget(module, name)
        if self.is_parameter(full):
            module.register_parameter(name, tensor)  # type: ignore[arg-type]
        else:
            spec = self.specs[self.holders[full]]
            module.register_buffer(name, tensor, persistent=bool(spec.persistent))


def _tensors(program: ExportedProgram, specs: Mapping[fx.Node, InputSpec], share: bool) -> dict[str, Tensor]:
    copies: dict[object, Tensor] = {}
    found: dict[str, Tensor] = {}
    for spec in specs.values():
        if spec.kind is InputKind.USER_INPUT or spec.target is None:
            continue
        source = program.state_dict if spec.target in program.state_dict else program.constants
        tensor = source[spec.target]
        if isinstance(tensor, Tensor):
            copy = partial(_copy, tensor, share=share)
            found[spec.target] = copies.setdefault(_identity(tensor), copy())
    return found


def _names(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    return {name: same for same in names.values() for name in same}


def _forget(module: nn.Module, name: str) -> None:
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    module._non_persistent_buffers_set.discard(name)


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
