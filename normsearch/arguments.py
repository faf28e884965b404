"""What is typed on a command line, read into normsearch's own objects."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normsearch.admission.arrays import read_inputs
from normsearch.architectures import Architecture
from normsearch.errors import ArchitectureError, CheckpointError, PlanError
from normsearch.plans import Plan, To
from normsearch.registries import Scalar

_SHAPE = re.compile(r"[1-9]\d{0,6}(x[1-9]\d{0,6}){0,4}", re.ASCII)
_MOST_ELEMENTS = 2**31


def read_architecture(name: str | None, arguments: Sequence[str]) -> Architecture | None:
    """Return the architecture that ``--architecture`` and ``--arguments key=value`` name.

    A factory is looked for where Python looks, and in the current folder as with ``python -m``.

    Raises:
        ArchitectureError: not such a name or argument.

    """
    if name is None:
        if arguments:
            raise ArchitectureError("--arguments belong to an --architecture; give both")
        return None
    values: dict[str, Scalar] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ArchitectureError(f"--arguments {text!r}: write name=value")
        if key in values:
            raise ArchitectureError(f"--arguments gives {key} twice")
        values[key] = _scalar(value)
    architecture = Architecture(name, values)
    here = str(Path.cwd())
    if architecture.is_factory and here not in sys.path:
        sys.path.insert(0, here)
    return architecture


def _scalar(text: str) -> Scalar:
    """Read true, false, a number or a quoted text as JSON does; anything else is text as it stands."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def read_to(texts: Sequence[str]) -> To:
    """Return what ``--to`` asks for: methods in order of preference, or ``pattern=method`` for some sites.

    Example:
        >>> read_to(["layer4.*=instance,group", "group(groups=8)"])
        {'layer4.*': ['instance', 'group'], '*': ['group(groups=8)']}

    """
    patterns: dict[str, list[str]] = {}
    for text in texts:
        left, equals, right = text.partition("=")
        pattern, choice = (left, right) if equals and "(" not in left else ("*", text)
        patterns.setdefault(pattern, []).extend(_choices(choice))
    # What matches everything comes last: the first pattern that matches counts.
    rest = patterns.pop("*", None)
    return patterns | ({} if rest is None else {"*": rest})


def _choices(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]


def read_plan(path: Path) -> Plan:
    """Return the plan in a JSON file.

    Raises:
        PlanError: the file cannot be read, or is no plan.

    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
    return Plan.from_json(text)


def make_inputs(model: nn.Module, shape: str | None, batch: int, file: Path | None) -> Any:
    """Return one forward pass's inputs: from a file, or random ones of a shape; None if neither is given.

    Args:
        model: whose floating-point type random inputs get.
        shape: of one sample, ``3x224x224``.
        batch: number of samples.
        file: .npz, .npy or .safetensors.

    Raises:
        CheckpointError: the file cannot be read.
        PlanError: both are given, or the shape is malformed.

    """
    if file is not None:
        if shape is not None:
            raise PlanError("give --input-shape or --inputs, not both")
        if not file.is_file():
            raise CheckpointError(f"{file} is not a file; give --inputs an .npz, .npy or .safetensors file")
        return read_inputs(file)
    if shape is None:
        return None
    if not _SHAPE.fullmatch(shape):
        raise PlanError(f"--input-shape {shape!r}: write the shape of one sample, for example 3x224x224")
    sizes = [int(size) for size in shape.split("x")]
    elements = torch.Size((batch, *sizes)).numel()
    if elements > _MOST_ELEMENTS:
        raise PlanError(f"--input-shape {shape} at batch size {batch} has {elements:,} numbers; give less")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
