"""Images as inputs: which files of a folder are read, within which limits, and how one becomes a tensor."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normsearch.errors import CheckpointError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
#: The only formats that the decoder may try, whatever a file is named.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
#: A folder's entries, a file's bytes and an image's pixels that are read at most.
MOST_ENTRIES = 2_000_000
MOST_BYTES = 64 * 2**20
MOST_PIXELS = 2**26
#: Eight bits per channel: others would be cut off or scaled in a way that the network was not trained with.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a network's input: (x / 255 − mean) / std of the middle of the resized image.

    The shorter side is resized to ``size`` pixels (bicubic, antialiased) and the middle square is taken.
    One mean makes the image grey, three make it RGB.

    Attributes:
        size: height and width in pixels.
        mean: per channel; ImageNet's by default.
        std: per channel, likewise.

    """

    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def find_images(folder: Path) -> list[Path]:
    """Return the images in a folder and those below it, sorted by path.

    Raises:
        CheckpointError: the folder cannot be read, is too large, or holds none.

    """
    found = sorted(path for path in _entries(folder) if path.suffix.lower() in SUFFIXES)
    if not found:
        raise CheckpointError(
            f"{folder} holds no image; images are {', '.join(SUFFIXES)}, also in folders inside it"
        )
    return found


def _entries(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise CheckpointError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    seen = 0
    for parent, folders, files in os.walk(folder, onerror=fail):
        seen += len(files) + len(folders)
        if seen > MOST_ENTRIES:
            raise CheckpointError(f"{folder} has more than {MOST_ENTRIES:,} entries; give a smaller folder")
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def read_image(path: Path, preparation: Preparation) -> Tensor:
    """Return an image as (C, size, size) in single precision.

    Raises:
        CheckpointError: Pillow is missing, or the file is no image within the limits.

    """
    with _opened(path) as image:
        array = _prepared(image.convert("L" if len(preparation.mean) == 1 else "RGB"), preparation.size)
    pixels = torch.from_numpy(array).float().div_(255).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preparation.mean, preparation.std))
    return ((pixels - mean) / std).contiguous()


def check_image(path: Path) -> None:
    """Check an image's size and header; no pixel is decoded.

    Raises:
        CheckpointError: as for ``read_image``.

    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an image within the limits; whatever its decoder raises is a CheckpointError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise CheckpointError(
            "images are read with Pillow, which is not installed: pip install 'normsearch[zoo]', or give "
            "arrays (.npz, .npy, .safetensors)"
        ) from error
    _check_file(path)
    try:
        # Pillow warns of sizes that are checked here, and of palettes with transparency.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_FORMATS) as image:
            _check_image(path, image)
            yield image
    except CheckpointError:
        raise
    except UnidentifiedImageError as error:
        raise CheckpointError(f"{path} is no image of the formats {', '.join(_FORMATS)}") from error
    except Exception as error:
        # Whatever a decoder raises on a damaged file; warnings that were made errors too.
        raise CheckpointError(f"cannot read the image {path}: {str(error)[:300]}") from error


def _check_file(path: Path) -> None:
    state = path.stat()
    # A pipe would block, a device never ends.
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError(f"{path} is not a regular file; remove it from the folder")
    if state.st_size > MOST_BYTES:
        raise CheckpointError(
            f"{path} has {state.st_size:,} bytes; images of at most {MOST_BYTES:,} are read"
        )


def _check_image(path: Path, image: Any) -> None:
    """Check what the header says, before a pixel is decoded."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise CheckpointError(
            f"{path} has {width} × {height} pixels; images of at most {MOST_PIXELS:,} are read"
        )
    if image.mode not in _MODES:
        raise CheckpointError(
            f"{path} has more than eight bits per channel (mode {image.mode}); convert it to eight, or give "
            "arrays scaled as in training (.npz, .npy, .safetensors)"
        )


def _prepared(image: Any, size: int) -> np.ndarray[Any, Any]:
    """Return the middle square of the resized image as (size, size, C) of bytes."""
    from PIL import Image

    width, height = image.size
    scale = size / min(width, height)
    # The part of the image that is resized to the square, so that no large image is made on the way.
    left, top = (width - size / scale) / 2, (height - size / scale) / 2
    box = (max(left, 0), max(top, 0), min(left + size / scale, width), min(top + size / scale, height))
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    array = np.array(square)
    return array[:, :, None] if array.ndim == 2 else array
