"""The zip archives that torch.save writes: a pickle and one stored entry per storage."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normsearch.admission import checksums, descriptions, pickles
from normsearch.errors import CheckpointError

MAGIC = b"PK\x03\x04"
MOST_ENTRIES = 200_000
_LONGEST_ENTRY_NAME = 400
#: What torch.save writes beside the storages, with the most bytes that each may have.
_SMALL = {
    "version": 16,
    "byteorder": 16,
    ".format_version": 16,
    ".storage_alignment": 16,
    ".data/serialization_id": 100,
}
#: Numbered, or by address as versions before 1.9 did.
_STORAGE = re.compile(r"data/([0-9]{1,20})", re.ASCII)
_ENCRYPTED = 0x1
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def read(path: Path) -> Any:
    """Return what the archive holds, its tensors mapped from the file.

    Raises:
        CheckpointError: a damaged, compressed or unusual archive, or a pickle of more than plain tensors.

    """
    try:
        pickle, sizes = _entries(path)
        described = pickles.read(pickle)
        _check_sizes(path, descriptions.storages(described), sizes)
    except descriptions.PickleError as error:
        raise pickles.refusal(path, error) from error
    content = load(path, mapped=True)
    check_loaded(path, described, content)
    return content


def load(path: Path, *, mapped: bool) -> Any:
    """Let torch load a file that was checked."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise CheckpointError(
            f"torch cannot load {path} ({type(error).__name__}: {str(error)[:300]}); copy or download "
            "it again"
        ) from error


def check_loaded(path: Path, described: Any, content: Any) -> None:
    """Raise unless torch read exactly what was checked: two readers may see one archive differently."""
    stack, seen = [(described, content)], set()
    while stack:
        expected, found = stack.pop()
        if isinstance(expected, descriptions.Described):
            same = isinstance(found, Tensor) and expected.matches(found)
        elif isinstance(expected, dict):
            same = isinstance(found, dict) and list(expected) == list(found)
            if same and id(expected) not in seen:
                seen.add(id(expected))
                stack += zip(expected.values(), found.values(), strict=True)
        else:
            # Lists and scalars of training checkpoints are never used.
            same = not isinstance(found, Tensor)
        if not same:
            raise CheckpointError(f"{path} reads differently the second time; it may have been tampered with")


def _entries(path: Path) -> tuple[bytes, dict[str, int]]:
    """Check the archive and return its pickle and the size of each storage."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            _check_archive(path, archive, infos)
            _check_places(path, file, archive, infos)
            # torch reads numbers that were damaged on the way as any others.
            checksums.verify(archive)
            return _contents(path, archive, infos)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is a damaged or truncated zip archive ({str(error)[:200]}); copy or download it again"
        ) from error
    except (struct.error, UnicodeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is a damaged zip archive ({type(error).__name__}); copy or download it again"
        ) from error


def _check_archive(path: Path, archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    if len(names) > MOST_ENTRIES:
        raise CheckpointError(f"{path} has {len(names):,} entries; at most {MOST_ENTRIES:,} are read")
    roots = {name.partition("/")[0] for name in names}
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which is a program; in a process you trust, write "
            "torch.save(torch.jit.load(path).state_dict(), new_path)"
        )
    if inside & {"archive_format", "models/model.json"}:
        raise CheckpointError(
            f"{path} is an exported program; rename it to {path.stem}.pt2, or save the state dict of the "
            "nn.Module that it was made from"
        )
    if "data.pkl" not in inside:
        raise CheckpointError(
            f"{path} is a zip archive, but not one that torch.save wrote: it has no data.pkl"
        )
    if len(set(names)) != len(names) or len(roots) != 1 or archive.comment:
        raise CheckpointError(
            f"{path} is not an archive as torch.save writes it: names occur twice or differ in root"
        )
    for info in infos:
        name = info.filename.partition("/")[2]
        if len(info.filename) > _LONGEST_ENTRY_NAME or not (
            name == "data.pkl" or name in _SMALL or _STORAGE.fullmatch(name)
        ):
            raise CheckpointError(
                f"{path} has the entry {info.filename[:60]!r}, which torch.save never writes"
            )
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"{path}: the entry {info.filename[:60]!r} is compressed or encrypted, which "
                "torch.save never does; "
                "a small file could become huge"
            )
        if info.file_size != info.compress_size or info.file_size > (
            _SMALL | {"data.pkl": pickles.LONGEST}
        ).get(name, 2**48):
            raise CheckpointError(f"{path}: the entry {info.filename[:60]!r} claims an impossible size")


def _check_places(
    path: Path, file: io.BufferedReader, archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo]
) -> None:
    """Entries lie one after the other and repeat in place what the directory says of them."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        file.seek(info.header_offset)
        magic, _, _, method, *_, name_length, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        name = file.read(name_length)
        if (
            info.header_offset < end
            or magic != MAGIC
            or method != zipfile.ZIP_STORED
            or name != info.filename.encode()
        ):
            raise CheckpointError(f"{path}: the entry {info.filename[:60]!r} overlaps or contradicts another")
        end = info.header_offset + _LOCAL_HEADER.size + name_length + extra + info.file_size
    if not infos or min(info.header_offset for info in infos) != 0 or end > archive.start_dir:
        raise CheckpointError(f"{path}: its entries reach beyond their place; copy or download it again")


def _contents(
    path: Path, archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo]
) -> tuple[bytes, dict[str, int]]:
    pickle, sizes = b"", {}
    for info in infos:
        name = info.filename.partition("/")[2]
        storage = _STORAGE.fullmatch(name)
        if storage is not None:
            sizes[storage[1]] = info.file_size
        elif name == "data.pkl":
            pickle = archive.read(info)
        elif name == "byteorder" and archive.read(info) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine; save it again on another")
    return pickle, sizes


def _check_sizes(path: Path, storages: dict[str, descriptions.Storage], sizes: dict[str, int]) -> None:
    for key, storage in storages.items():
        if sizes.get(key) != storage.bytes:
            raise CheckpointError(
                f"{path}: the storage {key[:60]!r} should have {storage.bytes:,} bytes, the archive has "
                f"{sizes.get(key, 0):,}; copy or download it again"
            )
