"""Arrays as inputs of a forward pass: .npz, .npy and safetensors, never pickled objects."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normsearch.admission import safetensors
from normsearch.errors import CheckpointError
from normsearch.forward import Arguments

#: The most bytes that the arrays of one file may have once unpacked.
MOST_BYTES = 8 * 2**30
_POSITIONAL = re.compile(r"arr_(\d+)", re.ASCII)


#: Of the files that inputs are read from.
SUFFIXES = (".npz", ".npy", ".safetensors")


def read_inputs(path: Path) -> Any:
    """Return a file's arrays as one forward pass's inputs.

    One array is the one argument; arrays named ``arr_0``, ``arr_1``, ... are positional ones (what
    ``np.savez(path, x, y)`` writes); others are keyword arguments by their names, also beside positional ones
    (``np.savez(path, x, scale=s)``).

    Raises:
        CheckpointError: it cannot be read, or holds something else than numbers.

    """
    return as_inputs(read_arrays(path))


def as_inputs(arrays: dict[str, Tensor]) -> Any:
    """Return named arrays as one forward pass's inputs."""
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    numbers = {name: int(found[1]) for name in arrays if (found := _POSITIONAL.fullmatch(name))}
    args = tuple(arrays[name] for name in sorted(numbers, key=lambda name: numbers[name]))
    kwargs = {name: array for name, array in arrays.items() if name not in numbers}
    if args and kwargs:
        return Arguments(args, kwargs)
    return args or kwargs


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return a file's arrays by name.

    Raises:
        CheckpointError: it cannot be read, or holds something else than numbers, or nothing.

    """
    try:
        if path.suffix == ".safetensors":
            found = safetensors.read(path)[0]
        elif path.suffix in (".npz", ".npy"):
            found = _numpy(path)
        else:
            raise CheckpointError(
                f"{path}: inputs are read from {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            )
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever numpy, zipfile and zlib raise on damaged files; warnings that were made errors too.
        raise CheckpointError(f"cannot read inputs from {path}: {str(error)[:300]}") from error
    if not found:
        raise CheckpointError(f"{path} holds no array; write one with numpy.savez(path, x)")
    return found


def _numpy(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} would be {size:,} bytes unpacked; at most {MOST_BYTES:,} are read")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {str(name): archive[name] for name in archive.files}
    else:
        arrays = {"arr_0": np.load(path, allow_pickle=False)}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
