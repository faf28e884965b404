"""Archives whose bytes are not those that were written, and archives without checksums."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import normsearch

INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


def _checkpoint(path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), path)


def _program(path: Path) -> None:
    torch.export.save(torch.export.export(_network(), (INPUTS,), strict=False), path)


KINDS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "model.pth": (_checkpoint, "torchvision/resnet18"),
    "model.pt2": (_program, None),
}


@pytest.fixture
def without_checksums() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_the_numbers_is_found(kind: str, tmp_path: Path) -> None:
    write, architecture = KINDS[kind]
    path = tmp_path / kind
    write(path)
    normsearch.load(path, architecture)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        if kind.endswith(".pt2"):
            largest = next(info for info in archive.infolist() if info.filename.endswith("weights/weight_0"))
    data = bytearray(path.read_bytes())
    # The entry's own header is 30 bytes, its name and padding; what follows the padding are numbers.
    data[largest.header_offset + 30 + 64 + largest.file_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(normsearch.CheckpointError, match=r"Bad CRC-32 .* copy or download it again"):
        normsearch.load(path, architecture)


@pytest.mark.usefixtures("without_checksums")
def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    _checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        assert not any(info.CRC for info in archive.infolist())
    assert normsearch.load(path, "torchvision/resnet18").model is not None
