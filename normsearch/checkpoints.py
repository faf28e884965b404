"""save and load: checkpoints with everything that rebuilds a converted model, and other people's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsearch.admission import admit, programs, record
from normsearch.admission.record import Record
from normsearch.architectures import Architecture
from normsearch.errors import CheckpointError
from normsearch.exporting import save_program
from normsearch.files import refuse_existing, write_atomically
from normsearch.fitting import fill, fitted, skeleton
from normsearch.opening import Model
from normsearch.plans import Plan
from normsearch.programs import plan_in


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: the network with its weights, converted as the file says, in eval mode; or an exported program.
        architecture: what built it; None for an exported program.
        plan: what was changed in it; None if nothing was.
        notes: what was unwrapped, renamed or cast on the way.

    """

    #: An nn.Module or an ExportedProgram, which its reader tells apart by ``architecture``.
    model: Any
    architecture: Architecture | None
    plan: Plan | None
    notes: tuple[str, ...]


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    architecture: Architecture | str | None = None,
    plan: Plan | None = None,
    force: bool = False,
) -> None:
    """Write a model's weights as safetensors, with what rebuilds it in the metadata; or an exported program.

    The file is written beside its place and moved there when it is complete. Tensors that share memory are
    written once. Code is never written: any safetensors reader opens the file.

    Args:
        model: the network, converted or not, or an exported program.
        path: where to; ends in ``.safetensors``, or in ``.pt2`` for an exported program, which is written
            without the example inputs that it was exported with and knows its own plan.
        architecture: what built the network; ``load`` needs it, here or there.
        plan: the plan that converted it.
        force: replace a file that exists.

    Raises:
        CheckpointError: the file exists or cannot be written, the state dict holds more than plain tensors,
            or ``architecture`` and ``plan`` do not rebuild this model.

    Example:
        >>> import normsearch, tempfile
        >>> resnet = normsearch.Architecture("torchvision/resnet18", {"num_classes": 10})
        >>> model = normsearch.build(resnet)
        >>> plan = normsearch.plan(model, "group")
        >>> path = tempfile.mkdtemp() + "/resnet18.safetensors"
        >>> normsearch.save(normsearch.convert(model, plan), path, architecture=resnet, plan=plan)
        >>> normsearch.load(path).plan == plan
        True

    """
    path = _path(path)
    if isinstance(model, ExportedProgram):
        return _save_program(model, path, force=force)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"save takes a torch.nn.Module first, got {type(model).__name__}")
    if plan is not None and not isinstance(plan, Plan):
        raise CheckpointError(
            f"plan is the Plan that converted the model, got {type(plan).__name__}; make one with "
            "normsearch.plan(model, ...)"
        )
    architecture = _architecture(architecture)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: checkpoints are written as .safetensors; give such a name, or use export for a program"
        )
    refuse_existing(path, force=force)
    tensors, aliases = _distinct(model)
    if architecture is not None and not architecture.is_factory:
        # What cannot be rebuilt is found now and not when the file is needed.
        state = model.state_dict()
        outline = skeleton(architecture, plan, state, "the model")
        if outline is not None:
            fitted(outline, state, architecture, "the model")
            _refuse_other_layers(model, outline, plan)
    from normsearch import __version__

    made = Record(architecture, plan, aliases, {"normsearch": __version__, "torch": torch.__version__})
    metadata = {"format": "pt", record.KEY: made.to_json()}

    def write(target: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, target, metadata)

    return write_atomically(path, write, force=force)


def _save_program(program: ExportedProgram, path: Path, *, force: bool) -> None:
    if path.suffix != programs.SUFFIX:
        raise CheckpointError(f"{path}: exported programs are written as {programs.SUFFIX}; give such a name")
    write_atomically(path, lambda target: save_program(program, target), force=force)


def load(
    path: str | os.PathLike[str],
    architecture: Architecture | str | None = None,
    *,
    entry: str | None = None,
    allow_factories: bool = False,
) -> Checkpoint:
    """Read a checkpoint into its network; nothing in the file is executed.

    Reads what ``save`` writes, and plain state dicts: ``.safetensors``, ``.pt`` and ``.pth``, also inside a
    training checkpoint and with the prefixes of DataParallel, torch.compile and Lightning. Every shape is
    compared with the architecture before anything is copied. A ``.pt2`` is an exported program, read if it
    holds a graph of known operators and plain tensors and nothing else.

    Args:
        path: the file.
        architecture: what built the network; not needed where the file names a registered one.
        entry: which entry of a training checkpoint to take, ``model_ema``, or ``ema.shadow`` inside another.
        allow_factories: whether ``architecture`` may be ``package.module:factory``, which runs that code.
            One that the file names is refused always.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the architecture.
        ArchitectureError: the architecture is unknown or cannot be built.
        PlanError: the plan in the file is malformed or does not fit.

    """
    path = _path(path)
    architecture = _architecture(architecture)
    if path.suffix == programs.SUFFIX:
        if architecture is not None or entry is not None:
            raise CheckpointError(
                f"{path} is an exported program, which needs no architecture and has no entries; leave them "
                "out"
            )
        program = programs.read(path)
        return Checkpoint(program, None, plan_in(program), ())
    admitted = admit(path, entry)
    made = record.read(admitted.metadata, path)
    if architecture is None:
        architecture, allow_factories = _named(made, path), False
    state = _unaliased(admitted.tensors, made.aliases, path)
    model, notes = fill(architecture, made.plan, state, str(path), allow_factories=allow_factories)
    _tie(model, made.aliases)
    return Checkpoint(model.eval(), architecture, made.plan, (*admitted.notes, *notes))


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"expected a path, got {type(path).__name__}")
    return Path(path)


def _refuse_other_layers(model: nn.Module, outline: nn.Module, plan: Plan | None) -> None:
    """Raise for a plan that makes layers of the same names and shapes, but others than the model has."""
    theirs, ours = dict(outline.named_modules()), dict(model.named_modules())
    for site, method in plan.changes if plan is not None else ():
        made, found = theirs.get(site.path), ours.get(site.path)
        if made is not None and found is not None and _what(made) != _what(found):
            raise CheckpointError(
                f"the plan is not the one that converted this model: at {site.path!r} it has {method}, which "
                f"makes {made}, and the model has {found}; give the plan that convert was given"
            )


def _what(layer: nn.Module) -> tuple[object, ...]:
    """Return what makes a layer's function beside its numbers."""
    # By name: parametrized layers have classes of their own, each.
    return type(layer).__qualname__, *(getattr(layer, name, None) for name in ("num_groups", "eps"))


def _architecture(given: Architecture | str | None) -> Architecture | None:
    if isinstance(given, str):
        return Architecture(given)
    if given is not None and not isinstance(given, Architecture):
        raise CheckpointError(f"architecture is an Architecture or its name, got {type(given).__name__}")
    return given


def shared_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names in a state dict whose tensor is another's, each with the first name it has."""
    first: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in state.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if first.setdefault(key, name) != name:
            shared[name] = first[key]
    return shared


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to write and the names of those that are another's."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"the state dict's {name} is no plain tensor, which safetensors cannot hold; "
                "save such a model with torch.save"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has no numbers to save; load them first")
    aliases = shared_names(state)
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if name in aliases:
            continue
        whole = tensor.contiguous()
        storage = whole.untyped_storage().data_ptr()
        # Different views of the same numbers are written apart.
        tensors[name] = whole.clone() if storage in storages and whole.numel() else whole
        storages.add(storage)
    return tensors, aliases


def _named(made: Record, path: Path) -> Architecture:
    if made.architecture is None:
        raise CheckpointError(
            f"{path} does not say which network it belongs to; give the architecture, for example "
            "torchvision/resnet50 (--architecture, or architecture=Architecture(name))"
        )
    if made.architecture.is_factory:
        raise CheckpointError(
            f"{path} says that {made.architecture.name!r} built its network; code that a file names is never "
            "run: if you trust it, give this architecture yourself (--architecture, or architecture= and "
            "allow_factories=True)"
        )
    return made.architecture


def _unaliased(tensors: dict[str, Tensor], aliases: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    for alias, name in aliases.items():
        if name not in tensors or alias in tensors:
            raise CheckpointError(
                f"{path}: its metadata shares {alias[:60]!r} with {name[:60]!r}, which is not there"
            )
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def _tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Share parameters again that were one object when saved, where the architecture does not."""
    for alias, name in aliases.items():
        parts = [full.rpartition(".") for full in (alias, name)]
        (owner, own), (other, theirs) = ((model.get_submodule(path), leaf) for path, _, leaf in parts)
        parameters = owner._parameters.get(own), other._parameters.get(theirs)
        if None not in parameters and parameters[0] is not parameters[1]:
            owner.register_parameter(own, parameters[1])
