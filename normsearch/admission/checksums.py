"""The checksums of a zip archive's entries, which torch leaves out on request."""

from __future__ import annotations

import zipfile

_BLOCK = 1 << 20


def allow_missing(archive: zipfile.ZipFile) -> None:
    """Let entries without a checksum be read: ``torch.serialization.set_crc32_options(False)`` writes 0."""
    for info in archive.infolist():
        if info.CRC == 0:
            # zipfile checks nothing where there is no such attribute.
            del info.CRC


def verify(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Read an entry to its end, in blocks.

    Raises:
        BadZipFile: its bytes are others than its checksum says.

    """
    if hasattr(info, "CRC"):
        with archive.open(info) as source:
            while source.read(_BLOCK):
                pass
