"""Archives of images: zip files with one folder for each class."""

from __future__ import annotations

import stat
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from normsearch.admission.images import MOST_BYTES, SUFFIXES, check_image
from normsearch.errors import CheckpointError

MOST_ENTRIES, MOST_CLASSES, MOST_UNPACKED = 200_000, 10_000, 64 * 2**30
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_FORM = "an archive holds images in one folder per class, CLASS/NAME.png"


def check_archive(path: Path, folder: Path) -> dict[str, int]:
    """Return how many images each class has, after a look at the header of every image.

    Args:
        path: the zip file.
        folder: where one image at a time is written to be looked at.

    Raises:
        CheckpointError: it is no archive of images, or beyond the limits above.

    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise CheckpointError(f"{path} is no zip archive: {str(error)[:300]}; pack it again") from error
    with archive:
        found = images_in(archive, path)
        counts = Counter(name for _, name in found)
        if len(counts) > MOST_CLASSES:
            raise CheckpointError(f"{path} has {len(counts):,} folders; at most {MOST_CLASSES:,} are read")
        for info, _ in found:
            target = folder / f"image{Path(info.filename).suffix.lower()}"
            extract(archive, info, target)
            try:
                check_image(target)
            except CheckpointError as error:
                named = str(error).replace(str(target), info.filename[:300])
                raise CheckpointError(f"{path}: {named}") from error
            finally:
                target.unlink()
    return dict(sorted(counts.items()))


def images_in(archive: zipfile.ZipFile, path: Path) -> list[tuple[zipfile.ZipInfo, str]]:
    """Return the images of an archive, each with its class: the folder that it is in.

    Raises:
        CheckpointError: an entry that is no image in one folder, or more than the limits.

    """
    infos = archive.infolist()
    if len(infos) > MOST_ENTRIES:
        raise CheckpointError(f"{path} has {len(infos):,} entries; at most {MOST_ENTRIES:,} are read")
    if sum(info.file_size for info in infos) > MOST_UNPACKED:
        raise CheckpointError(f"{path} would be more than {MOST_UNPACKED:,} bytes unpacked; give less")
    found, seen = [], set()
    for info in infos:
        name = PurePosixPath(info.filename)
        if info.is_dir() or name.name.startswith(".") or "__MACOSX" in name.parts:
            continue
        if info.filename in seen:
            raise CheckpointError(f"{path}: {info.filename[:100]!r} occurs twice")
        seen.add(info.filename)
        wrong = _wrong(info, name)
        if wrong is not None:
            raise CheckpointError(f"{path}: {info.filename[:100]!r} {wrong}")
        found.append((info, name.parts[0]))
    if not found:
        raise CheckpointError(f"{path} holds no image; {_FORM}")
    return found


def _wrong(info: zipfile.ZipInfo, name: PurePosixPath) -> str | None:
    """Say what is wrong with an entry; None if nothing is."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if name.is_absolute() or ".." in name.parts or "\\" in info.filename or not info.filename.isprintable():
        return f"is no name in a folder; {_FORM}"
    if kind not in (0, stat.S_IFREG) or info.flag_bits & 1 or info.compress_type not in _METHODS:
        return "is a link, encrypted, or packed in a rare way; pack plain files with zip"
    if name.suffix.lower() not in SUFFIXES or len(name.parts) != 2:
        return f"is no image in a folder; {_FORM}, and images are {', '.join(SUFFIXES)}"
    if info.file_size > MOST_BYTES:
        return f"has {info.file_size:,} bytes; images of at most {MOST_BYTES:,} are read"
    return None


def extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Write one entry to a file, no more than its header announced.

    Raises:
        CheckpointError: the archive is damaged, or lies about a size.

    """
    try:
        with archive.open(info) as source, target.open("wb") as file:
            data = source.read(info.file_size + 1)
            if len(data) != info.file_size:
                raise CheckpointError(f"{info.filename[:100]!r} has another size than its archive says")
            file.write(data)
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever zipfile and zlib raise on damaged files.
        raise CheckpointError(f"cannot unpack {info.filename[:100]!r}: {str(error)[:300]}") from error
