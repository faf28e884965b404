"""Exported programs (.pt2): archives that torch.export.load would run code from.

``torch.export.load`` unpickles example inputs and constants, evaluates the expressions of open sizes,
compiles conditions on inputs, imports classes that arguments are nested in, looks operators up by name and
generates Python code from names. So an archive is not handed on: its JSON is read by a grammar and written
anew, tensors are checked against their files, nothing pickled is taken over; torch reads what was written.
"""

from __future__ import annotations

import json
import logging
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from normsearch.admission import first_bytes
from normsearch.admission.program_graphs import MalformedError, extent, payloads, program
from normsearch.errors import CheckpointError

SUFFIX = ".pt2"
_MODEL = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
_EXAMPLES = "data/sample_inputs/model.pt"
#: What torch.export.save writes, with the most bytes that each may have; example inputs are never read.
_KNOWN = {
    _MODEL: 256 * 2**20,
    _WEIGHTS: 64 * 2**20,
    _CONSTANTS: 64 * 2**20,
    _EXAMPLES: 2**48,
    "archive_format": 16,
    "archive_version": 16,
    "version": 16,
    "byteorder": 16,
    ".data/version": 16,
    ".data/serialization_id": 100,
}
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]{1,7}", re.ASCII)
_COPIED = 2**20
_MOST_ENTRIES, _LONGEST_NAME, _ENCRYPTED = 200_000, 400, 0x1


def is_program(path: Path) -> bool:
    """Tell whether a file's name says that it is an exported program."""
    return path.suffix.lower() == SUFFIX


def read(path: Path) -> ExportedProgram:
    """Return an exported program; nothing in the file is executed.

    Args:
        path: the file.

    Raises:
        CheckpointError: no regular file, empty or damaged, or it holds more than a graph of known operators
            and plain tensors.

    """
    first_bytes(path)
    with tempfile.TemporaryFile() as clean:
        try:
            _rewrite(path, clean)
        except MalformedError as error:
            raise CheckpointError(
                f"{path} holds {error}; only graphs of known operators and plain tensors are read from "
                "files. In a process you trust, torch.export.load it and give the program itself"
            ) from error
        clean.seek(0)
        try:
            with _quietly():
                return torch.export.load(clean)
        except Exception as error:
            raise CheckpointError(
                f"{path} is no exported program that torch {torch.__version__} can read "
                f"({type(error).__name__}: {str(error)[:300]}); export it again"
            ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch from logging what is raised anyway."""
    logger = logging.getLogger("torch.export")
    disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = disabled


def _rewrite(path: Path, clean: Any) -> None:
    """Write an archive anew with what is known in it.

    Raises:
        MalformedError: it holds anything else.
        CheckpointError: it is damaged.

    """
    with _opened(path) as archive:
        names = _entries(archive)
        for name, info in names.items():
            limit = _KNOWN.get(name, 2**48 if _TENSOR.fullmatch(name) else -1)
            if limit < 0:
                raise MalformedError(
                    f"the entry {name[:80]!r}, which torch.export.save never writes for tensors"
                )
            if info.file_size > limit:
                raise MalformedError(f"{info.file_size:,} bytes in {name}")
        for name in (_MODEL, _WEIGHTS, _CONSTANTS):
            if name not in names:
                raise MalformedError(f"no {name}")
        for name, expected in (("byteorder", b"little"), ("archive_format", b"pt2")):
            if name in names and archive.read(names[name]) != expected:
                raise MalformedError(f"another {name} than {expected.decode()}")
        model = program(_json(archive.read(names[_MODEL]), _MODEL))
        stored = {
            "data/weights": payloads(_json(archive.read(names[_WEIGHTS]), _WEIGHTS), "weight"),
            "data/constants": payloads(_json(archive.read(names[_CONSTANTS]), _CONSTANTS), "tensor"),
        }
        with zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as new:
            _write(new, _MODEL, json.dumps(model).encode())
            _write(new, _WEIGHTS, json.dumps(stored["data/weights"]).encode())
            _write(new, _CONSTANTS, json.dumps(stored["data/constants"]).encode())
            _write(new, _EXAMPLES, b"")
            for name, text in (
                ("archive_format", b"pt2"),
                ("archive_version", b"0"),
                ("byteorder", b"little"),
            ):
                _write(new, name, text)
            _write(new, ".data/version", b"3\n")
            copied: set[str] = set()
            for folder, config in stored.items():
                for payload in config["config"].values():
                    name = f"{folder}/{payload['path_name']}"
                    if name not in names:
                        raise MalformedError(f"no {name}, which a tensor is in")
                    own, reached = extent(payload["tensor_meta"])
                    size = names[name].file_size
                    # More numbers than the file has would be one number many times, and huge in memory.
                    if max(own, reached) > size:
                        raise MalformedError(
                            f"a tensor of {max(own, reached):,} bytes in {name}, which has {size:,}"
                        )
                    if name not in copied:
                        copied.add(name)
                        with archive.open(names[name]) as source, _entry(new, name) as target:
                            while block := source.read(_COPIED):
                                target.write(block)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is a damaged or truncated archive ({str(error)[:200]}); copy or download it again"
        ) from error
    except (struct.error, UnicodeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is a damaged archive ({type(error).__name__}); copy or download it again"
        ) from error


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's entries by their names below its root."""
    infos = archive.infolist()
    if len(infos) > _MOST_ENTRIES:
        raise MalformedError(f"{len(infos):,} entries")
    found: dict[str, zipfile.ZipInfo] = {}
    roots = {info.filename.partition("/")[0] for info in infos}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in found or len(info.filename) > _LONGEST_NAME or len(roots) != 1:
            raise MalformedError(f"the entry {info.filename[:80]!r}, which occurs twice or lies elsewhere")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise MalformedError(
                f"the entry {info.filename[:80]!r} compressed or encrypted: it could become huge"
            )
        if info.file_size != info.compress_size:
            raise MalformedError(f"an impossible size of {info.filename[:80]!r}")
        found[name] = info
    return found


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"no JSON in {name} ({type(error).__name__})") from error


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(_info(name), data)


def _entry(archive: zipfile.ZipFile, name: str) -> Any:
    return archive.open(_info(name), "w", force_zip64=True)


def _info(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"program/{name}")
