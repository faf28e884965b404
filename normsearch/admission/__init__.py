"""The only place that reads bytes of checkpoints: nothing in a file is ever executed.

``admit`` decides by a file's content which format it is, checks it, and returns tensors that are mapped
from the file, not copied. Every failure is a ``CheckpointError``.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from normsearch.admission import legacy, safetensors, torch_zip
from normsearch.admission.state_dicts import state_dict_in
from normsearch.errors import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")

#: The first bytes of files that people mistake for checkpoints of PyTorch.
_OTHERS = {
    b"\x89HDF": "an HDF5 file (Keras); convert it to PyTorch first",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"BZh": "bzip2-compressed; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"\x93NUMPY": "a NumPy array, not a checkpoint",
    b"<": "a web page or XML, perhaps a failed download; download it again",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
}


@dataclass(frozen=True)
class Admitted:
    """What a file holds.

    Attributes:
        tensors: the state dict, mapped from the file where its format allows that.
        metadata: safetensors' text metadata; empty for other formats. Not to be trusted.
        notes: what was unwrapped to get there.

    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def admit(path: Path, entry: str | None = None) -> Admitted:
    """Read a checkpoint: safetensors, or what torch.save writes for a state dict.

    Args:
        path: the file. It must not change while its tensors are in use.
        entry: which of a training checkpoint's entries to take, for example ``model_ema``.

    Raises:
        CheckpointError: no regular file, empty, truncated, another format, or a file that holds more than
            plain tensors.

    """
    head = first_bytes(path)
    suffix = path.suffix.lower()
    is_torch = head.startswith((torch_zip.MAGIC, legacy.MAGIC))
    if is_torch and suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is named .safetensors but was written by torch.save; if that is what you expect, "
            "rename it to .pth"
        )
    if not is_torch and suffix in TORCH_SUFFIXES and safetensors.looks_right(head):
        raise CheckpointError(f"{path} is a safetensors file; rename it to {path.stem}.safetensors")
    if suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an ONNX model, not a checkpoint; sites, plan, convert, compare and calibrate take it "
            "(from Python: normsearch.onnx_graph)"
        )
    if suffix not in ("", ".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(
            f"{path} has the suffix {suffix!r}; checkpoints are .safetensors, {', '.join(TORCH_SUFFIXES)}"
        )
    if suffix == ".safetensors" or safetensors.looks_right(head):
        if entry is not None:
            raise CheckpointError(f"{path} is a safetensors file, which has no entries to choose from")
        return Admitted(*safetensors.read(path))
    if head.startswith(torch_zip.MAGIC):
        content = torch_zip.read(path)
    elif head.startswith(legacy.MAGIC):
        content = legacy.read(path)
    else:
        raise CheckpointError(f"{path} is {_what(head)}")
    tensors, notes = state_dict_in(content, path, entry)
    return Admitted(tensors, {}, notes)


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a regular file.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is empty.

    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a directory; give the checkpoint file inside it")
        # A pipe would block, a device never ends.
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is not a regular file; copy its content into one")
        with path.open("rb") as file:
            head = file.read(64)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"cannot read {str(path)!r}: {reason}; check the path") from error
    if not head:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    return head


def _what(head: bytes) -> str:
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            return what
    if head.startswith(b"\x80"):
        return (
            "a plain pickle, which runs code when it is read; in a process you trust, load it and write "
            "torch.save(model.state_dict(), path)"
        )
    return (
        "neither safetensors nor a file of torch.save, or it is truncated; copy or download it again, "
        "or write torch.save(model.state_dict(), path)"
    )
