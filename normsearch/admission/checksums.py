"""The checksums of a zip archive's entries, which torch leaves out on request."""

from __future__ import annotations

import zipfile

_BLOCK = 1 << 20


def verify(archive: zipfile.ZipFile) -> None:
    """Read every entry to its end, in blocks, unless the archive has no checksum at all.

    ``torch.serialization.set_crc32_options(False)`` writes 0 for each. Entries of such an archive can be read
    afterwards, which zipfile refuses otherwise.

    Raises:
        BadZipFile: bytes are others than a checksum says.

    """
    infos = archive.infolist()
    if not any(info.CRC for info in infos):
        for info in infos:
            # zipfile checks nothing where there is no such attribute.
            del info.CRC
        return
    for info in infos:
        with archive.open(info) as source:
            while source.read(_BLOCK):
                pass
