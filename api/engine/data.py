"""Datasets: what a file of inputs holds, and its samples as batches, with or without labels."""

from __future__ import annotations

import os
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from api.engine.networks import Network
from api.tasks import Array, Data, Described, Describing, ImageClass
from normsearch.admission.arrays import SUFFIXES, as_inputs, read_arrays
from normsearch.admission.image_archives import check_archive, extract, images_in
from normsearch.admission.images import Preparation, read_image
from normsearch.errors import CheckpointError
from normsearch.inputs import Batches, check_array, floating_type, named_arrays, random_batch, rows_of, spread

_MOST_ARRAYS = 1000
#: Samples of random numbers that a report is measured with.
_SAMPLES = 4


def describe(asked: Describing, folder: Path) -> Described:
    """Return what a file of inputs holds."""
    path = folder / asked.file
    if path.suffix == ".zip":
        if asked.targets is not None:
            raise CheckpointError("targets names an array; the labels of images are their folders")
        counts = check_archive(path, folder)
        classes = [ImageClass(name=name, images=count) for name, count in counts.items()]
        return Described(kind="images", samples=sum(counts.values()), arrays=[], classes=classes)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{asked.file}: inputs are arrays in {', '.join(SUFFIXES)}, or images in a .zip with a folder "
            "for each class"
        )
    found = read_arrays(path)
    lengths = {array.shape[0] if array.dim() else 0 for array in found.values()}
    if len(found) > _MOST_ARRAYS or lengths == {0}:
        raise CheckpointError(
            f"{asked.file} holds {len(found)} arrays, without samples or too many; give 1 to {_MOST_ARRAYS}"
        )
    if asked.targets is not None:
        _without_targets(path, found, asked.targets)
    return Described(
        kind="arrays",
        samples=lengths.pop() if len(lengths) == 1 else None,
        arrays=[
            Array(name=name, dtype=str(array.dtype).removeprefix("torch."), shape=tuple(array.shape))
            for name, array in found.items()
        ],
        classes=[],
    )


def batches(network: Network, data: Data, folder: Path) -> Batches:
    """Return a dataset's inputs in batches, evenly spread samples of many."""
    found = samples(network, data, folder)
    if found.count is None:
        return Batches(lambda _: found.inputs(None), 1, None, found.notes)
    rows, size = split(network, found.count, data)
    notes = found.notes
    if network.batch_size is not None:
        notes += (f"batches of {size}: the file was exported for no others",)

    def read(number: int) -> Any:
        return found.inputs(rows[number * size : (number + 1) * size])

    return Batches(read, -(-len(rows) // size), len(rows), notes)


def split(network: Network, count: int, data: Data) -> tuple[Tensor, int]:
    """Return which of a dataset's samples are read, evenly spread, and how many in one forward pass.

    Raises:
        CheckpointError: the network takes more in one forward pass than there are.

    """
    only = network.batch_size
    if only is None:
        return torch.tensor(spread(count, data.samples)), data.batch_size
    if count < only:
        raise CheckpointError(
            f"the file was exported for batches of {only}, and the dataset has {count} samples; give more, "
            "or export the network with an open batch size"
        )
    rows = spread(count, None if data.samples is None else max(data.samples, only))
    return torch.tensor(rows[: len(rows) // only * only]), only


def inputs(
    network: Network, data: Data | None, shape: str | None, folder: Path, count: int = _SAMPLES
) -> Any:
    """Return the batches of a dataset, or one of random numbers of a shape; None without either."""
    if data is not None:
        return batches(network, data, folder)
    if shape is None:
        return None
    return random_batch(network.typed, shape, network.batch_size or count)


def notes_on(data: Data | None, given: Batches | None) -> tuple[str, ...]:
    """Return what readers of a report should know of its inputs."""
    if data is None:
        noise = "inputs are random numbers: drifts on real inputs are others"
        return () if given is None else (noise,)
    return () if given is None else given.notes


class Samples(ABC):
    """The samples of a dataset, read when they are asked for.

    Attributes:
        count: how many; None where arrays cannot be split into samples.
        notes: what was done to fit them to the network.

    """

    count: int | None
    notes: tuple[str, ...]

    @abstractmethod
    def inputs(self, rows: Tensor | None) -> Any:
        """Return some samples as a forward pass's inputs."""

    @abstractmethod
    def targets(self, rows: Tensor) -> Tensor:
        """Return their labels.

        Raises:
            CheckpointError: there are none.

        """


class _Arrays(Samples):
    def __init__(self, network: Network, data: Data, folder: Path) -> None:
        self._path, self._dtype = folder / data.file, floating_type(network.typed)
        found = read_arrays(self._path)
        self._targets = None if data.targets is None else found[data.targets]
        self._given = _without_targets(self._path, found, data.targets)
        self.notes = ()
        for name, array in named_arrays(self._given).items():
            check_array(self._path, name, array)
            if array.is_floating_point() and array.dtype != self._dtype:
                old, new = (str(kind).removeprefix("torch.") for kind in (array.dtype, self._dtype))
                self.notes += (f"{name} is {old} and was cast to the network's {new}",)
        lengths = {array.shape[0] if array.dim() else 0 for array in named_arrays(self._given).values()}
        self.count = lengths.pop() if len(lengths) == 1 and lengths != {0} else None

    def inputs(self, rows: Tensor | None) -> Any:
        return rows_of(self._path, self._given, self._dtype, rows)

    def targets(self, rows: Tensor) -> Tensor:
        if self._targets is None:
            raise CheckpointError(
                "the dataset has no labels; make one with targets, the name of the array that holds them"
            )
        if self._targets.is_floating_point() or self._targets.is_complex():
            raise CheckpointError(f"labels are whole numbers, and these are {self._targets.dtype}")
        return self._targets[rows].long()


class _Images(Samples):
    def __init__(self, network: Network, data: Data, folder: Path) -> None:
        self._path, self._folder, self._dtype = folder / data.file, folder, floating_type(network.typed)
        self._archive = zipfile.ZipFile(self._path)
        found = images_in(self._archive, self._path)
        labels = {name: label for label, name in enumerate(sorted({name for _, name in found}))}
        self._images = [(info, labels[name]) for info, name in found]
        self._preparation = Preparation(**data.preparation.model_dump())
        self.count = len(self._images)
        size = self._preparation.size
        self.notes = (f"{self.count} images, {size} pixels square; labels are folders in alphabetical order",)

    def inputs(self, rows: Tensor | None) -> Tensor:
        numbers = range(len(self._images)) if rows is None else rows.tolist()
        return torch.stack([self._read(number) for number in numbers]).to(self._dtype)

    def targets(self, rows: Tensor) -> Tensor:
        return torch.tensor([self._images[number][1] for number in rows.tolist()])

    def _read(self, number: int) -> Tensor:
        info = self._images[number][0]
        descriptor, name = tempfile.mkstemp(Path(info.filename).suffix.lower(), dir=self._folder)
        os.close(descriptor)
        try:
            extract(self._archive, info, Path(name))
            return read_image(Path(name), self._preparation)
        finally:
            Path(name).unlink()


def samples(network: Network, data: Data, folder: Path) -> Samples:
    """Return the samples of a dataset for a network.

    Raises:
        CheckpointError: it holds what no network takes.

    """
    kind = _Images if data.file.endswith(".zip") else _Arrays
    return kind(network, data, folder)


class Pairs(Sequence[tuple[Any, Tensor]]):
    """Batches of samples with their labels, always the same; what was read is kept while it is little.

    Args:
        found: the samples.
        rows: which of them.
        size: of a batch.

    """

    _MOST_KEPT = 2**29

    def __init__(self, found: Samples, rows: Tensor, size: int) -> None:
        self._found, self._parts = found, rows.split(size)
        self._kept: dict[int, tuple[Any, Tensor]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        # Negative and beyond, as a list has it.
        number = range(len(self))[number]
        if number not in self._kept:
            pair = self._found.inputs(self._parts[number]), self._found.targets(self._parts[number])
            size = sum(array.nbytes for array in named_arrays(pair[0]).values())
            if self._bytes + size > self._MOST_KEPT:
                return pair
            self._bytes += size
            self._kept[number] = pair
        return self._kept[number]


def _without_targets(path: Path, found: dict[str, Tensor], targets: str | None) -> Any:
    """Return what is input, as a forward pass takes it."""
    if targets is not None and (targets not in found or len(found) == 1):
        there = ", ".join(list(found)[:20])
        raise CheckpointError(
            f"{path}: targets {targets[:100]!r} is no array beside the inputs; there are {there}"
        )
    left = {name: array for name, array in found.items() if name != targets}
    if targets is not None and {found[targets].dim(), *(array.dim() for array in left.values())} & {0}:
        raise CheckpointError(f"{path}: an array has no samples; give arrays of one length")
    if targets is not None and len({array.shape[0] for array in found.values()}) != 1:
        raise CheckpointError(
            f"{path}: labels and inputs have different lengths; give one label for each sample"
        )
    return as_inputs(left)
