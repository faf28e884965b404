"""Inputs from files: what is read in which order, how it is prepared, and what is refused."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from normsearch import CheckpointError, PlanError
from normsearch.admission import images
from normsearch.admission.images import Preparation, find_images, read_image
from normsearch.arguments import read_batches, read_preparation
from normsearch.inputs import file_batches, random_batch

NET = nn.Linear(2, 2)
PLAIN = Preparation(8, (0.0,), (1.0,))


def picture(path: Path, pixels: np.ndarray[Any, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Images


def test_image_of_the_right_size_is_scaled_and_normalized_exactly(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    path = picture(tmp_path / "x.png", pixels)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    found = read_image(path, Preparation(8, mean, std))
    expected = (pixels.astype(np.float64) / 255 - mean) / std
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 90), st.integers(5, 90), st.integers(4, 48))
def test_shorter_side_is_resized_and_the_middle_taken(height: int, width: int, size: int) -> None:
    # A plane of brightness stays one when it is resized: the value at a pixel's centre is known.
    y, x = np.mgrid[0:height, 0:width]
    plane = 0.6 * x + 0.4 * y + 30
    image = Image.fromarray(plane.astype(np.float32))
    found = images._prepared(image, size)[:, :, 0]
    side = min(height, width)
    scale = side / size
    centers = (np.arange(size) + 0.5) * scale - 0.5
    expected = (
        0.6 * (centers[None, :] + (width - side) / 2) + 0.4 * (centers[:, None] + (height - side) / 2) + 30
    )
    assert found.shape == (size, size)
    # At the border the filter sees one side only.
    inner = slice(size // 4, size - size // 4)
    np.testing.assert_allclose(found[inner, inner], expected[inner, inner], atol=0.6)


def test_grey_and_colour_follow_the_mean(tmp_path: Path) -> None:
    colour = picture(tmp_path / "c.png", noise(8, 8, 3))
    grey = picture(tmp_path / "g.png", noise(8, 8))
    assert read_image(colour, PLAIN).shape == (1, 8, 8)
    three = read_image(grey, Preparation(8, (0.0,) * 3, (1.0,) * 3))
    assert torch.equal(three[0], three[2])
    assert torch.equal(three[:1], read_image(grey, PLAIN))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_of_eight_bits_is_read(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(noise(12, 9, 3)).convert(mode).save(path)
    assert read_image(path, Preparation(6)).shape == (3, 6, 6)


def test_folder_is_read_in_order_and_evenly(tmp_path: Path) -> None:
    for number, name in enumerate(["b/2.png", "b/1.PNG", "a/9.jpg", "z.bmp", "a/0.webp"]):
        picture(tmp_path / name, np.full((8, 8), 10 * number, np.uint8))
    for name in (".hidden.png", "notes.txt", "a/.DS_Store"):
        (tmp_path / name).write_text("x")
    names = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert names == ["a/0.webp", "a/9.jpg", "b/1.PNG", "b/2.png", "z.bmp"]
    batches = file_batches(NET, tmp_path, 2, None, PLAIN)
    read = list(batches)
    assert [tuple(batch.shape) for batch in read] == [(2, 1, 8, 8), (2, 1, 8, 8), (1, 1, 8, 8)]
    shades = [round(255 * float(image.mean())) for batch in read for image in batch]
    np.testing.assert_allclose(shades, [40, 20, 10, 0, 30], atol=2)
    assert (len(batches), batches.samples) == (3, 5)
    # Again, the same; a part is spread over the whole.
    assert all(torch.equal(a, b) for a, b in zip(read, batches, strict=True))
    (part,) = file_batches(NET, tmp_path, 2, 2, PLAIN)
    assert torch.equal(part, torch.stack([read[0][0], read[1][0]]))


def test_images_get_the_type_of_the_network(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", noise(8, 8))
    (batch,) = file_batches(nn.Linear(2, 2).bfloat16(), tmp_path, 4, None, PLAIN)
    assert batch.dtype == torch.bfloat16


def bomb(path: Path, width: int, height: int) -> Path:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("side", [8193, 12_000, 60_000])
def test_decompression_bombs_are_refused(side: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pixels; images of at most|cannot read the image"):
        read_image(bomb(tmp_path / "x.png", side, side), PLAIN)


def test_what_is_no_image_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = picture(tmp_path / "whole.png", noise(64, 64, 3)).read_bytes()
    cases = {
        "text.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image of the formats"),
        "empty.jpg": (b"", "is no image of the formats"),
        "half.png": (whole[: len(whole) // 2], "cannot read the image"),
        # Postscript would start an interpreter: not among the formats, whatever the name.
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image of the formats"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_image(path, PLAIN)
        assert name in str(caught.value)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(deep)
    with pytest.raises(CheckpointError, match="more than eight bits per channel"):
        read_image(deep, PLAIN)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_image(pipe, PLAIN)
    monkeypatch.setattr(images, "MOST_BYTES", 100)
    with pytest.raises(CheckpointError, match="images of at most 100 are read"):
        read_image(tmp_path / "whole.png", PLAIN)


def test_folders_without_images_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="holds no image"):
        find_images(tmp_path)
    for number in range(5):
        (tmp_path / f"{number}.png").touch()
    monkeypatch.setattr(images, "MOST_ENTRIES", 4)
    with pytest.raises(CheckpointError, match="more than 4 entries"):
        find_images(tmp_path)


def test_without_pillow_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "x.png", noise(8, 8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CheckpointError, match=r"pip install 'normsearch\[zoo\]'"):
        read_image(path, PLAIN)


# Arrays


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_arrays_are_split_along_the_first_dimension(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    found = list(file_batches(NET, saved(tmp_path / "x.npz", arr_0=x, arr_1=y), 3, None))
    assert [type(batch) for batch in found] == [tuple] * 3
    assert torch.equal(torch.cat([a for a, _ in found]), torch.from_numpy(x))
    assert torch.equal(torch.cat([b for _, b in found]), torch.from_numpy(y))
    save_file({"left": torch.from_numpy(x), "right": torch.from_numpy(y)}, tmp_path / "x.safetensors")
    batches = file_batches(NET, tmp_path / "x.safetensors", 4, 3)
    (named,) = batches
    assert batches.samples == 3
    assert torch.equal(named["left"], torch.from_numpy(x[[0, 2, 4]]))
    assert set(named) == {"left", "right"}


def test_arrays_of_unequal_length_are_named(tmp_path: Path) -> None:
    x, scale = np.zeros((5, 3), np.float32), np.zeros(4, np.float32)
    path = tmp_path / "x.npz"
    np.savez(path, x, scale=scale)
    whole = file_batches(NET, path, 2, None)
    assert (whole.count, whole.samples) == (1, None)
    (note,) = whole.notes
    assert (
        note
        == f"{path}: lengths differ (5 in array 0, 4 in scale): all arrays are the inputs of one forward pass"
    )


def test_a_single_batch_is_split_where_one_is_held_out(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    whole = file_batches(NET, saved(tmp_path / "x.npz", arr_0=x, arr_1=y), 32, None)
    assert len(whole) == 1
    apart = whole.held_apart()
    assert [tuple(len(part) for part in batch) for batch in apart] == [(4, 4), (3, 3)]
    assert torch.equal(torch.cat([b for _, b in apart]), torch.from_numpy(y))
    assert "7 samples are one batch" in apart.notes[-1]
    # Nothing to split, or nothing to mend.
    assert file_batches(NET, saved(tmp_path / "y.npz", arr_0=x[:1]), 32, None).held_apart().count == 1
    several = file_batches(NET, tmp_path / "x.npz", 3, None)
    assert several.held_apart() is several


def test_arrays_of_different_lengths_are_one_forward_pass(tmp_path: Path) -> None:
    x, y = np.ones((4, 2), np.float32), np.ones(3, np.float32)
    batches = file_batches(NET, saved(tmp_path / "x.npz", arr_0=x, arr_1=y), 2, 1)
    (found,) = batches
    assert [tuple(array.shape) for array in found] == [(4, 2), (3,)]
    assert batches.samples is None


def test_floating_point_gets_the_type_of_the_network_and_says_so(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "x.npz", x=np.ones((2, 2)), tokens=np.array([[1], [2]]), mask=np.array([True, False])
    )
    batches = file_batches(NET, path, 8, None)
    (found,) = batches
    assert {name: array.dtype for name, array in found.items()} == {
        "x": torch.float32,
        "tokens": torch.int64,
        "mask": torch.bool,
    }
    assert batches.notes == (f"{path}: x is float64 and was cast to the network's float32",)
    assert file_batches(NET.double(), path, 8, None).notes == ()
    NET.float()


REFUSED = (
    (np.zeros((2, 2), np.uint8), "holds bytes, which do not say how the network was trained"),
    (np.zeros((2, 2), np.complex64), "write real numbers"),
    (np.array([[1.0], [np.nan]], np.float32), "holds NaN or infinity"),
    (np.array([[1.0], [np.inf]], np.float32), "holds NaN or infinity"),
    (np.array(["a"]), "cannot read inputs"),
    (np.array([object()]), "cannot read inputs"),
)


@pytest.mark.parametrize(("array", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_arrays_that_are_refused(array: np.ndarray[Any, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(CheckpointError, match=message):
        list(file_batches(NET, tmp_path / "x.npz", 2, None))


def test_noise_has_the_shape_and_is_the_same_each_time() -> None:
    batches = random_batch(nn.Linear(2, 2).double(), "3x4", 5)
    (first,), (again,) = batches, batches
    assert isinstance(first, Tensor)
    assert (tuple(first.shape), first.dtype) == ((5, 3, 4), torch.float64)
    assert torch.equal(first, again)
    with pytest.raises(PlanError, match="give less"):
        random_batch(NET, "99999x99999", 5)


# What is typed


def test_preparation_is_read_from_options() -> None:
    assert read_preparation(None, None, None) is None
    assert read_preparation(64, None, None) == Preparation(64)
    assert read_preparation(None, "0.5", "0.25") == Preparation(224, (0.5,), (0.25,))
    for given_, message in (
        ((1, "0.5", None), "--mean has 1 and --std 3 numbers"),
        ((1, "a", None), "--mean 'a': write one number"),
        ((1, "1,2", "1,2"), "write one number, or three"),
        ((1, "nan", "1"), "write one number"),
        ((1, "0", "0"), "a standard deviation is above 0"),
    ):
        with pytest.raises(PlanError, match=message):
            read_preparation(*given_)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.npz", x=np.ones((2, 2), np.float32))
    for given_, message in (
        ((NET, "2", 1, path, None), "not both"),
        ((NET, None, 1, path, PLAIN), "is no folder of images"),
        ((NET, "2", 1, None, PLAIN), "prepare the images in a folder"),
    ):
        with pytest.raises(PlanError, match=message):
            read_batches(*given_)
    assert read_batches(NET, None, 1, None) is None
    with pytest.raises(CheckpointError, match="is not a file; give --inputs a folder of images"):
        read_batches(NET, None, 1, tmp_path / "none")
