"""The files that torch.save wrote before version 1.6: pickles one after the other, then raw storages."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

from normsearch.admission import descriptions, pickles
from normsearch.admission.torch_zip import check_loaded, load
from normsearch.errors import CheckpointError

#: A pickle, protocol 2, of torch's magic number.
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PROTOCOL = 1001


def read(path: Path) -> Any:
    """Return what the file holds; its tensors are copies, since the format cannot be mapped.

    Raises:
        CheckpointError: truncated, or a pickle of more than plain tensors.

    """
    try:
        described = _check(path)
    except descriptions.PickleError as error:
        raise pickles.refusal(path, error) from error
    content = load(path, mapped=False)
    check_loaded(path, described, content)
    return content


def _check(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as file:
        # The pickles come first; a length in them cannot make the reader take more than this.
        start = io.BytesIO(file.read(pickles.LONGEST))
        start.seek(len(MAGIC))
        protocol, system = pickles.read(start), pickles.read(start)
        if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(
                f"{path} has an unknown version or byte order; save it again with torch.save"
            )
        described, keys = pickles.read(start), pickles.read(start)
        storages = descriptions.storages(described)
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
            raise descriptions.PickleError("lists other storages than its tensors have")
        file.seek(start.tell())
        for key in keys:
            count = file.read(8)
            elements = storages[key].elements
            if len(count) < 8 or struct.unpack("<q", count)[0] != elements:
                raise descriptions.PickleError("is truncated or contradicts itself")
            file.seek(storages[key].bytes, 1)
        if file.tell() != size:
            raise CheckpointError(
                f"{path} should have {file.tell():,} bytes, it has {size:,}; copy or download it again"
            )
    return described
