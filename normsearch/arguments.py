"""What is typed on a command line, read into normsearch's own objects."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from normsearch.admission.images import Preparation
from normsearch.architectures import Architecture
from normsearch.errors import ArchitectureError, PlanError
from normsearch.inputs import Batches, file_batches, random_batch
from normsearch.opening import Model
from normsearch.plans import Plan, To
from normsearch.registries import Scalar

_MOST_JSON = 256 * 2**20


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
    if architecture.is_factory:
        import_from_here()
    return architecture


def import_from_here() -> None:
    """Let modules in the current folder be imported, as with ``python -m``."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


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


def read_methods(texts: Sequence[str]) -> list[str]:
    """Return the methods in ``--to`` where patterns have no meaning.

    Raises:
        PlanError: a pattern is given.

    Example:
        >>> read_methods(["group,layer(axes=channel)", "rms"])
        ['group', 'layer(axes=channel)', 'rms']

    """
    for text in texts:
        left, equals, _ = text.partition("=")
        if equals and "(" not in left:
            raise PlanError(f"--to {text!r}: every method is tried at every site, so give methods alone")
    return split_methods(texts)


def split_methods(texts: Sequence[str]) -> list[str]:
    """Return methods that are written with commas; those inside brackets are theirs.

    Example:
        >>> split_methods(["group,layer(axes=channel)", "rms"])
        ['group', 'layer(axes=channel)', 'rms']

    """
    return [choice for text in texts for choice in _choices(text)]


def _choices(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]


def read_plan(path: Path) -> Plan:
    """Return the plan in a JSON file.

    Raises:
        PlanError: the file cannot be read, or is no plan.

    """
    return Plan.from_json(read_text(path))


def read_text(path: Path) -> bytes:
    """Return what a JSON file holds.

    Raises:
        PlanError: the file cannot be read, or is too large for JSON of normsearch.

    """
    try:
        # A pipe would block, a device never ends.
        if path.exists() and not path.is_file():
            raise PlanError(f"{path} is no regular file; give a file of JSON")
        size = path.stat().st_size
        if size > _MOST_JSON:
            raise PlanError(f"{path} has {size:,} bytes; JSON of at most {_MOST_JSON:,} is read")
        return path.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from error


def read_preparation(size: int | None, mean: str | None, std: str | None) -> Preparation | None:
    """Return what ``--image-size``, ``--mean`` and ``--std`` say; None where none is given.

    Raises:
        PlanError: not one or three numbers each, as many of one as of the other, or no size.

    """
    if size is None and mean is None and std is None:
        return None
    default = Preparation()
    means = default.mean if mean is None else _numbers("--mean", mean)
    stds = default.std if std is None else _numbers("--std", std)
    if len(means) != len(stds):
        raise PlanError(
            f"--mean has {len(means)} and --std {len(stds)} numbers; give one of each for grey images, three "
            "of each for RGB"
        )
    if any(value <= 0 for value in stds):
        raise PlanError(f"--std {std}: a standard deviation is above 0")
    return Preparation(default.size if size is None else size, means, stds)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
        raise PlanError(f"{option} {text!r}: write one number, or three with commas, as 0.485,0.456,0.406")
    return values


def read_batches(
    model: Model,
    shape: str | None,
    batch_size: int,
    path: Path | None,
    preparation: Preparation | None = None,
    *,
    samples: int | None = None,
) -> Batches | None:
    """Return inputs from a file or folder, or random ones of a shape; None if neither is given.

    Args:
        model: what they are for.
        shape: of one random sample, ``3x224x224``.
        batch_size: number of samples in a forward pass.
        path: a folder of images, or .npz, .npy or .safetensors.
        preparation: what is done to images.
        samples: the most samples taken from a file or folder.

    Raises:
        CheckpointError: the inputs cannot be read.
        PlanError: both are given, the shape is malformed, or images are prepared where there are none.

    """
    if path is not None and shape is not None:
        raise PlanError("give --input-shape or --inputs, not both")
    if path is not None:
        return file_batches(model, path, batch_size, samples, preparation)
    if preparation is not None:
        raise PlanError(
            "--image-size, --mean and --std prepare the images in a folder; give it with --inputs"
        )
    return None if shape is None else random_batch(model, shape, batch_size)
