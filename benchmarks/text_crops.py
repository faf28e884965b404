"""A trained text direction classifier, and crops of text whose direction is known: a ground truth.

The package rapidocr-onnxruntime ships the network, of which nothing but the model file is used. The crops are
rendered in matplotlib's DejaVu fonts: words, numbers and codes, upright or turned by 180°, in changing sizes,
colours and noise.
"""

from __future__ import annotations

import importlib.util
import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HEIGHT, WIDTH = 48, 192
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Oblique")
_SYLLABLES = (
    "ba co di fu ga he ki lo mu ne pa qui ro sa te vo wa xi yo ze tion ster ing ment able ark end urg"
)


def model_file() -> Path:
    """Return the path of the trained direction classifier: (N, 3, 48, W) to the probabilities of 0° and 180°.

    Raises:
        ModuleNotFoundError: the package is not installed.

    """
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "rapidocr-onnxruntime is not installed: pip install --no-deps rapidocr-onnxruntime==1.4.4"
        )
    return Path(spec.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def crops(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render crops of text.

    Args:
        count: number of crops; every other one is turned by 180°.
        seed: the same seed renders the same crops.

    Returns:
        Inputs (N, 3, 48, 192), (x/255 − ½)/½ and zero where a crop is narrower; labels (N,), 1 where turned.

    """
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    inputs, labels = np.zeros((count, 3, HEIGHT, WIDTH), np.float32), np.arange(count) % 2
    for index in range(count):
        pixels = _crop(rng, noise)
        if labels[index]:
            pixels = pixels[::-1, ::-1]
        inputs[index, :, :, : pixels.shape[1]] = (pixels.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def _text(rng: random.Random) -> str:
    def word() -> str:
        return "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(2, 4)))

    kind = rng.random()
    if kind < 0.2:
        return f"{rng.randint(1, 9999)}.{rng.randint(0, 99):02} {rng.choice(('EUR', 'USD', 'kg', 'km'))}"
    if kind < 0.3:
        return f"{rng.randint(1, 28):02}.{rng.randint(1, 12):02}.20{rng.randint(10, 29)} {word()}"
    words = [word() for _ in range(rng.randint(1, 3))]
    style = rng.choice((str.lower, str.title, str.upper))
    return style(" ".join(words))


def _crop(rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Render one line of text as (48, W, 3) with numbers from 0 to 255, W at most 192."""
    text, font = _text(rng), _font(rng.choice(_FONTS), rng.randint(20, 44))
    left, top, right, bottom = font.getbbox(text)
    pad = [rng.randint(1, 6) for _ in range(4)]
    size = (int(right - left) + pad[0] + pad[1], int(bottom - top) + pad[2] + pad[3])
    dark, light = ([rng.randint(*bounds) for _ in range(3)] for bounds in ((0, 110), (150, 255)))
    paper, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    image = Image.new("RGB", size, tuple(paper))
    ImageDraw.Draw(image).text((pad[0] - left, pad[2] - top), text, font=font, fill=tuple(ink))
    image = image.rotate(rng.uniform(-2, 2), Image.Resampling.BICUBIC, fillcolor=tuple(paper))
    width = max(8, min(WIDTH, round(size[0] * HEIGHT / size[1])))
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    return np.clip(pixels + noise.normal(0, rng.uniform(0, 12), pixels.shape), 0, 255)
