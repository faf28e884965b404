"""Batches: inputs for forward passes from files, read anew each time they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from normsearch.admission.arrays import read_inputs
from normsearch.admission.images import Preparation, find_images, read_image
from normsearch.errors import CheckpointError, PlanError
from normsearch.forward import arguments
from normsearch.opening import Model

_SHAPE = re.compile(r"[1-9]\d{0,6}(x[1-9]\d{0,6}){0,4}", re.ASCII)
_MOST_ELEMENTS = 2**31
#: Batches of at most so many bytes together are kept once they are read.
_MOST_KEPT = 2**30


@dataclass(frozen=True)
class Batches:
    """Inputs of forward passes; iterating reads them anew, one at a time, always in the same order.

    Attributes:
        read: returns the inputs of the forward pass with a number.
        count: number of forward passes.
        samples: number of samples in all of them; None where inputs were not split.
        notes: what was done to fit them to the network.

    """

    read: Callable[[int], Any]
    count: int
    samples: int | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (self.read(number) for number in range(self.count))

    def held_apart(self) -> Batches:
        """Return two batches or more, one to fit and one to hold out, where there are two samples."""
        if self.count != 1 or self.samples is None or self.samples < 2:
            return self
        half = -(-self.samples // 2)

        def read(number: int) -> Any:
            return tree_map_only(Tensor, lambda leaf: leaf[number * half :][:half], self.read(0))

        note = f"{self.samples} samples are one batch, and one is held out: split into batches of {half}"
        return Batches(read, 2, self.samples, (*self.notes, note))

    def kept(self) -> Iterable[Any]:
        """Return the batches as a list if they are few, so that each is read once; else these ones."""
        first = self.read(0)
        size = sum(
            leaf.numel() * leaf.element_size() for leaf in tree_leaves(first) if isinstance(leaf, Tensor)
        )
        if size * self.count > _MOST_KEPT:
            return self
        return [first, *(self.read(number) for number in range(1, self.count))]


def random_batch(model: Model, shape: str, batch_size: int) -> Batches:
    """Return one batch of normal noise, for shapes and costs.

    Args:
        model: whose floating-point type it gets.
        shape: of one sample, ``3x224x224``.
        batch_size: number of samples.

    Raises:
        PlanError: the shape is malformed or too large.

    """
    if not _SHAPE.fullmatch(shape):
        raise PlanError(f"--input-shape {shape!r}: write the shape of one sample, for example 3x224x224")
    sizes = [int(size) for size in shape.split("x")]
    elements = torch.Size((batch_size, *sizes)).numel()
    if elements > _MOST_ELEMENTS:
        raise PlanError(
            f"--input-shape {shape} at batch size {batch_size} has {elements:,} numbers; give less"
        )
    dtype = floating_type(model)

    def read(number: int) -> Tensor:
        return torch.randn(batch_size, *sizes, generator=torch.Generator().manual_seed(number)).to(dtype)

    return Batches(read, 1, batch_size)


def file_batches(
    model: Model, path: Path, batch_size: int, samples: int | None, preparation: Preparation | None = None
) -> Batches:
    """Return the inputs in a file of arrays or a folder of images, in batches.

    Arrays are split along their first dimension where all have the same; else they are one forward pass's.
    Floating-point numbers get the network's type.

    Args:
        model: what they are for.
        path: .npz, .npy or .safetensors, or a folder.
        batch_size: number of samples in a forward pass.
        samples: the most samples that are used; spread evenly over all there are. None means all.
        preparation: what is done to images.

    Raises:
        CheckpointError: nothing there, or it cannot be read, within the limits, as numbers.
        PlanError: ``preparation`` for arrays.

    """
    if path.is_dir():
        return _of_images(model, path, batch_size, samples, preparation or Preparation())
    if preparation is not None:
        raise PlanError(f"--image-size, --mean and --std prepare images; {path} is no folder of images")
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not a file; give --inputs a folder of images, or an .npz, .npy or .safetensors file"
        )
    return _of_arrays(model, path, batch_size, samples)


def _of_images(
    model: Model, folder: Path, batch_size: int, samples: int | None, preparation: Preparation
) -> Batches:
    found = find_images(folder)
    chosen = [found[index] for index in spread(len(found), samples)]
    dtype = floating_type(model)

    def read(number: int) -> Tensor:
        files = chosen[number * batch_size : (number + 1) * batch_size]
        return torch.stack([read_image(file, preparation) for file in files]).to(dtype)

    note = f"{len(chosen)} of {len(found)} images in {folder}, {preparation.size} pixels square"
    return Batches(read, -(-len(chosen) // batch_size), len(chosen), (note,))


def _of_arrays(model: Model, path: Path, batch_size: int, samples: int | None) -> Batches:
    given = read_inputs(path)
    named = named_arrays(given)
    dtype, notes = floating_type(model), []
    for name, array in named.items():
        check_array(path, name, array)
        if array.is_floating_point() and array.dtype != dtype:
            old, new = (str(kind).removeprefix("torch.") for kind in (array.dtype, dtype))
            notes.append(f"{path}: {name} is {old} and was cast to the network's {new}")
    lengths = {name: array.shape[0] if array.dim() else 0 for name, array in named.items()}
    size = min(lengths.values())
    differ = size < max(lengths.values())
    if differ:
        told = ", ".join(f"{length} in {name}" for name, length in lengths.items())
        notes.append(f"{path}: lengths differ ({told}): all arrays are the inputs of one forward pass")
    if differ or size == 0:
        return Batches(lambda number: rows_of(path, given, dtype, None), 1, None, tuple(notes))
    rows = torch.tensor(spread(size, samples))

    def read(number: int) -> Any:
        return rows_of(path, given, dtype, rows[number * batch_size : (number + 1) * batch_size])

    return Batches(read, -(-len(rows) // batch_size), len(rows), tuple(notes))


def spread(count: int, samples: int | None) -> list[int]:
    """Return ``samples`` of ``count`` places, evenly spread: folders are often sorted by class."""
    if samples is None or samples >= count:
        return list(range(count))
    return [index * count // samples for index in range(samples)]


def named_arrays(given: Any) -> dict[str, Tensor]:
    """Return the arrays of one forward pass's inputs, each with a name to be told by."""
    if isinstance(given, Tensor):
        return {"the array": given}
    found = arguments(given)
    return {f"array {number}": array for number, array in enumerate(found.args)} | found.kwargs


def check_array(path: Path, name: str, array: Tensor) -> None:
    """Raise unless an array may be a network's input.

    Raises:
        CheckpointError: it holds bytes, or complex numbers.

    """
    if array.dtype == torch.uint8:
        raise CheckpointError(
            f"{path}: {name} holds bytes, which do not say how the network was trained to see them; write "
            "floating-point numbers, scaled as in training"
        )
    if array.is_complex():
        raise CheckpointError(f"{path}: {name} is {array.dtype}; write real numbers")


def rows_of(path: Path, given: Any, dtype: torch.dtype, rows: Tensor | None) -> Any:
    """Return rows of arrays as a forward pass's inputs, floating-point numbers as ``dtype``.

    Raises:
        CheckpointError: some are NaN or infinite.

    """

    def ready(name: str, array: Tensor) -> Tensor:
        taken = array if rows is None else array[rows]
        if not taken.is_floating_point():
            return taken
        if not bool(taken.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; leave such samples out")
        return taken.to(dtype)

    leaves, structure = tree_flatten(given)
    made = [ready(name, leaf) for name, leaf in zip(named_arrays(given), leaves, strict=True)]
    return tree_unflatten(made, structure)


def floating_type(model: Model) -> torch.dtype:
    """Return the floating-point type of a network's parameters."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
