"""safetensors: a length, a JSON header, raw numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from normsearch.errors import CheckpointError

#: The longest header read: some 100 bytes per tensor and the metadata.
LONGEST_HEADER = 32 * 2**20
MOST_TENSORS = 200_000
LONGEST_NAME = 1000


def looks_right(head: bytes) -> bool:
    """Tell whether a file that starts with ``head`` may be safetensors."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors, mapped from the file, and the metadata.

    Raises:
        CheckpointError: not safetensors, truncated, or beyond the limits above.

    """
    with path.open("rb") as file:
        head = file.read(9)
    size = path.stat().st_size
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or length > size - 8:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file: its header should have {length:,} bytes, the file "
            f"has {size:,}; copy or download it again"
        )
    if length > LONGEST_HEADER:
        raise CheckpointError(f"{path}: a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read")
    try:
        return _read(path)
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The reader is compiled: its panics derive from BaseException.
        raise CheckpointError(
            f"{path} is not a valid safetensors file ({type(error).__name__}: {str(error)[:300]}); "
            "copy or download it again"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    opened: Any = safe_open(path, framework="pt", device="cpu")
    with opened as file:
        names = list(file.keys())
        if len(names) > MOST_TENSORS:
            raise CheckpointError(f"{path} holds {len(names):,} tensors; at most {MOST_TENSORS:,} are read")
        for name in names:
            if len(name) > LONGEST_NAME or not name.isprintable():
                raise CheckpointError(
                    f"{path} has a tensor named {name[:60]!r}, which is no parameter's name"
                )
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
