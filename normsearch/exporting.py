"""export: a model as one file that runs without its Python code, checked by running both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from normsearch.errors import CheckpointError, ModelError
from normsearch.files import refuse_existing, write_atomically
from normsearch.forward import arguments, copied, evaluating, open_batches, preserved, try_call
from normsearch.measurement import floating_tensors
from normsearch.moments import as_operators

#: How far a file's outputs may be from the model's, as a share of the largest one, and in units of the
#: rounding of their type: real networks in half precision are up to 3 of these away.
_TOLERANCE, _ROUNDINGS = 1e-4, 8


def export(model: nn.Module, path: str | os.PathLike[str], inputs: Any, *, force: bool = False) -> None:
    """Write a model as a file that runs without its Python code and without normsearch.

    The file's suffix decides: ``.pt2`` is an exported program, which torch loads, exported in the mode that
    the model is in: in train mode a program trains on. ``.onnx`` is the eval function as an ONNX model (extra
    ``onnx``), of an opset in which group, layer and instance normalization are operators of their own. The
    batch size stays open where the model allows it.
    The file is written only if it gives the model's own outputs on ``inputs``: the largest difference is at
    most 1e-4 of the largest output, or 8 of its type's roundings (0.008 in half precision).

    Args:
        model: a network, converted or not; it is left as it was.
        path: where to.
        inputs: one forward pass's inputs: a tuple is ``*args``, a dict ``**kwargs``, both at once
            ``Arguments(args, kwargs)``, anything else one argument. They are not stored.
        force: replace a file that exists.

    Raises:
        ModelError: the model fails on ``inputs``, cannot be exported, or the file's outputs differ.
        CheckpointError: the file exists, cannot be written, or has another suffix.

    Example:
        >>> import tempfile, torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32)).eval()
        >>> path = tempfile.mkdtemp() + "/model.pt2"
        >>> normsearch.export(normsearch.convert(model, "group"), path, torch.randn(2, 3, 8, 8))
        >>> torch.export.load(path).module()(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 32, 6, 6])

    """
    path = Path(path)
    write = _FORMATS.get(path.suffix)
    if write is None:
        raise CheckpointError(f"{path}: models are exported as {', '.join(_FORMATS)}; give such a name")
    if not isinstance(model, nn.Module):
        raise ModelError(f"export takes a torch.nn.Module first, got {type(model).__name__}")
    refuse_existing(path, force=force)
    with _undisturbed(model):
        write(model, path, inputs, force)


def _write_program(model: nn.Module, path: Path, inputs: Any, force: bool) -> None:
    program = exported(model, inputs)

    def write(target: Path) -> None:
        save_program(program, target)
        with target.open("rb") as file:
            written = torch.export.load(file).module()
        _compare(model, written, inputs, str(path))

    write_atomically(path, write, force=force)


def _write_onnx(model: nn.Module, path: Path, inputs: Any, force: bool) -> None:
    try:
        from normsearch import onnx_graph
        from normsearch.onnx_graph.exporting import exported as onnx_model
        from normsearch.onnx_graph.exporting import leaves
        from normsearch.onnx_graph.running import Runtime
    except ModuleNotFoundError as error:
        raise ModelError(f"ONNX files need {error.name}: pip install 'normsearch[onnx]'") from error
    made = onnx_model(model, inputs)
    try:
        runtime = Runtime(made)
    except ModelError as error:
        types = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
        if not types:
            raise
        given = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        raise ModelError(
            f"{path} would hold a model in {given}, which onnxruntime cannot run ({error}); export "
            "model.float(), on inputs in float32"
        ) from error
    with evaluating(model):
        _compare(model, _OnLeaves(runtime, leaves), inputs, str(path))
    onnx_graph.save(made, path, force=force)


class _OnLeaves(nn.Module):
    """A graph that takes the tensors in a network's inputs one by one."""

    def __init__(self, graph: nn.Module, leaves: Callable[[Any], Any]) -> None:
        super().__init__()
        self._graph, self._leaves = graph, leaves

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        return self._graph(*self._leaves(args), **kwargs)


#: What writes each format; each compares what it has written with the model before the file appears.
_FORMATS: dict[str, Callable[[nn.Module, Path, Any, bool], None]] = {
    ".pt2": _write_program,
    ".onnx": _write_onnx,
}


def exported(model: nn.Module, inputs: Any) -> ExportedProgram:
    """Return a model as an exported program, whose batch size is open where the model allows that.

    Raises:
        ModelError: the model cannot be exported.

    """
    given = arguments(inputs)
    try:
        # Layers of this package as operators: an exported autograd function would lose its gradient.
        with warnings.catch_warnings(), as_operators():
            warnings.simplefilter("ignore")
            return torch.export.export(
                model, given.args, given.kwargs, dynamic_shapes=open_batches(model, given), strict=False
            )
    except Exception as error:
        raise ModelError(
            f"torch.export cannot export {type(model).__name__} ({type(error).__name__}: "
            f"{str(error)[:500]}); models whose forward depends on values in a way that no graph shows stay "
            "Python"
        ) from error


def save_program(program: ExportedProgram, target: Path) -> None:
    """Write a program without the example inputs that it was exported with."""
    examples = program.example_inputs
    program.example_inputs = None
    try:
        with target.open("wb") as file:
            torch.export.save(program, file)
    finally:
        program.example_inputs = examples


def _compare(model: nn.Module, written: nn.Module, inputs: Any, path: str) -> None:
    """Raise a ``ModelError`` if what was written gives other outputs than the model."""
    # Each runs on inputs of its own, from the same random state: a forward may work in place.
    state = torch.get_rng_state()
    outputs = []
    for network in (copied(model), written):
        torch.set_rng_state(state)
        with torch.no_grad():
            outputs.append(floating_tensors(try_call(network, tree_map(_clone, inputs))))
    before, after = outputs
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        raise ModelError(
            f"{path} would have outputs of other shapes than {type(model).__name__}; not written"
        )
    for old, new in zip(before, after, strict=True):
        distance, size = float((new - old).abs().max()), float(old.abs().max())
        tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(old.dtype).eps)
        if not distance <= tolerance * max(size, 1.0):
            raise ModelError(
                f"{path} would give outputs that are up to {distance:g} away from those of "
                f"{type(model).__name__}, whose largest is {size:g}; not written"
            )


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave what a forward pass may change as it was: attributes, buffers, random state."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with preserved(model), torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
