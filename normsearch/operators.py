"""What the operators of an exported program mean: which node is which layer, and with which arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_aten = torch.ops.aten

#: Batch norm as torch.export writes it, as decompositions leave it, and as kernels call it.
BATCH_NORMS = {
    _aten.batch_norm.default,
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit.no_stats,
    _aten._native_batch_norm_legit_functional.default,
    _aten._native_batch_norm_legit_no_training.default,
    _aten._batch_norm_with_update.default,
    _aten._batch_norm_with_update_functional.default,
    _aten._batch_norm_no_update.default,
    _aten._batch_norm_impl_index.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
}
#: Forms that never use the batch.
_EVALUATING = {_aten._native_batch_norm_legit_no_training.default, _aten._batch_norm_no_update.default}
#: Forms that always do, and update the running statistics.
_TRAINING = {_aten._batch_norm_with_update.default, _aten._batch_norm_with_update_functional.default}
#: Outputs of a functional form that hold the running statistics after the batch, by number.
UPDATED = {
    _aten._native_batch_norm_legit_functional.default: {3: "running_mean", 4: "running_var"},
    _aten._batch_norm_with_update_functional.default: {4: "running_mean", 5: "running_var"},
}
_NAMES = {"train": "training", "exponential_average_factor": "momentum", "epsilon": "eps"}

_CONVOLUTIONS = {
    _aten.conv1d.default: nn.Conv1d,
    _aten.conv2d.default: nn.Conv2d,
    _aten.conv3d.default: nn.Conv3d,
    _aten.conv1d.padding: nn.Conv1d,
    _aten.conv2d.padding: nn.Conv2d,
    _aten.conv3d.padding: nn.Conv3d,
}
_TRANSPOSED = {
    _aten.conv_transpose1d.default: nn.ConvTranspose1d,
    _aten.conv_transpose2d.input: nn.ConvTranspose2d,
    _aten.conv_transpose3d.input: nn.ConvTranspose3d,
}
_BY_RANK: dict[tuple[bool, int], Any] = {
    (False, 3): nn.Conv1d,
    (False, 4): nn.Conv2d,
    (False, 5): nn.Conv3d,
    (True, 3): nn.ConvTranspose1d,
    (True, 4): nn.ConvTranspose2d,
    (True, 5): nn.ConvTranspose3d,
}

_ACTIVATIONS: dict[Any, Callable[[dict[str, Any]], nn.Module]] = {
    _aten.relu.default: lambda given: nn.ReLU(),
    _aten.relu_.default: lambda given: nn.ReLU(inplace=True),
    _aten.silu.default: lambda given: nn.SiLU(),
    _aten.silu_.default: lambda given: nn.SiLU(inplace=True),
    _aten.gelu.default: lambda given: nn.GELU(approximate=given["approximate"]),
    _aten.hardswish.default: lambda given: nn.Hardswish(),
    _aten.hardswish_.default: lambda given: nn.Hardswish(inplace=True),
}
_ACTIVATION_CLASSES = ("torch.nn.modules.activation.", "timm.layers.activations.")


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return an operator's arguments by their names in its schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found = {}
    for index, argument in enumerate(node.target._schema.arguments):
        value = argument.default_value if argument.has_default_value() else None
        if index < len(node.args):
            value = node.args[index]
        found[argument.name] = node.kwargs.get(argument.name, value)
    return found


def batch_norm_arguments(node: fx.Node) -> dict[str, Any]:
    """Return input, weight, bias, running_mean, running_var, training, momentum and eps of any form."""
    given = {_NAMES.get(name, name): value for name, value in arguments(node).items()}
    names = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    training = node.target in _TRAINING or (node.target not in _EVALUATING and bool(given["training"]))
    return {name: given.get(name) for name in names} | {"training": training}


def has_many_outputs(node: fx.Node) -> bool:
    """Whether an operator returns more than its result."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return len(node.target._schema.returns) > 1


def weighted(node: fx.Node) -> tuple[Any, Any, Any, Callable[[], nn.Module]] | None:
    """Return input, weight, bias and a maker of the layer (on the meta device) if a node has a weight.

    The weight is the node that holds it as a layer keeps it: decompositions transpose a linear layer's.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    target = node.target
    if target in _CONVOLUTIONS or target in _TRANSPOSED or target is _aten.convolution.default:
        return _convolution(node, arguments(node))
    if target is _aten.linear.default:
        given = arguments(node)
        return given["input"], given["weight"], given["bias"], _linear(given["weight"], given["bias"])
    if target in (_aten.addmm.default, _aten.mm.default):
        given = arguments(node)
        x, turned = (given[name] for name in (("mat1", "mat2") if "mat1" in given else ("self", "mat2")))
        bias = given["self"] if target is _aten.addmm.default else None
        if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
            return None
        weight = _untransposed(turned)
        return None if weight is None else (x, weight, bias, _linear(weight, bias))
    return None


def _untransposed(node: Any) -> fx.Node | None:
    """Return what a node transposes, if it transposes a matrix."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    turns = node.target is _aten.t.default or (
        node.target is _aten.permute.default and list(arguments(node)["dims"]) == [1, 0]
    )
    source = node.args[0]
    return source if turns and isinstance(source, fx.Node) else None


def _linear(weight: Any, bias: Any) -> Callable[[], nn.Module]:
    outputs, inputs = (int(size) for size in shape_of(weight))
    return lambda: nn.Linear(inputs, outputs, bias=bias is not None, device="meta")


def _convolution(node: fx.Node, given: dict[str, Any]) -> tuple[Any, Any, Any, Callable[[], nn.Module]]:
    shape = shape_of(given["weight"])
    transposed = node.target in _TRANSPOSED or bool(given.get("transposed", False))
    cls = _BY_RANK[transposed, len(shape)]
    groups, dims = int(given["groups"]), len(shape) - 2

    def spread(value: Any) -> Any:
        if isinstance(value, str):
            return value
        values = [int(part) for part in ([value] if isinstance(value, int) else value)]
        return tuple(values * dims if len(values) == 1 else values)

    sizes = {
        "in_channels": shape[0] if transposed else shape[1] * groups,
        "out_channels": shape[1] * groups if transposed else shape[0],
        "kernel_size": tuple(shape[2:]),
        "groups": groups,
        **{name: spread(given[name]) for name in ("stride", "padding", "dilation")},
    }
    if transposed:
        sizes["output_padding"] = spread(given["output_padding"])
    bias = given["bias"]
    return (
        given["input"],
        given["weight"],
        bias,
        lambda: cls(**sizes, bias=bias is not None, device="meta"),
    )


def activation(node: fx.Node) -> nn.Module | None:
    """Return the activation that a module of the exported model called here, if it is one that is known."""
    make = _ACTIVATIONS.get(node.target)
    if make is None or node.op != "call_function" or not calling_class(node).startswith(_ACTIVATION_CLASSES):
        return None
    return make(arguments(node))


def calling_path(node: fx.Node) -> str:
    """Return the path of the module of the exported model that called an operator; "" if it is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def calling_class(node: fx.Node) -> str:
    """Return that module's class, with its module; "" if it is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    cls = stack[-1][1]
    return f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else str(cls)


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a node's value as numbers: where it is dynamic, those of the example exported."""
    return tuple(example(size) for size in node.meta["val"].shape)


def example(size: Any) -> int:
    """Return a size, or the one that a dynamic size had in the example; 2 where it had none."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return 2 if hint is None else int(hint)
