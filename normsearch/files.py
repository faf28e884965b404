"""How files are written: complete or not at all, and never over something unasked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from normsearch.errors import CheckpointError


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise unless ``path`` can be written without replacing anything unasked."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {str(path.parent)!r} does not exist; make it first")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; give a file's name in it")
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists; choose another name, or replace it with force=True (--force)")


def write_atomically(path: Path, write: Callable[[Path], None], *, force: bool) -> None:
    """Let ``write`` fill a new file beside ``path`` and move it there: readers see all of it or nothing.

    Raises:
        CheckpointError: ``path`` exists and not ``force``, or cannot be written.

    """
    refuse_existing(path, force=force)
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
        os.close(descriptor)
        temporary = Path(name)
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if force:
            os.replace(temporary, path)
        else:
            # Unlike a rename, a link never replaces what somebody else wrote meanwhile.
            os.link(temporary, path)
    except CheckpointError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Write a text file with ``write_atomically``."""

    def write(target: Path) -> None:
        target.write_text(f"{text.rstrip()}\n", "utf-8")

    write_atomically(path, write, force=force)
