"""A network of 500 sites, of the kinds that networks have: what a page of that many is measured with."""

from __future__ import annotations

from torch import nn

_BLOCKS = 125


def network() -> nn.Module:
    """Return it with fresh weights; inputs are (N, 3, H, W)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    before = 8
    for number in range(_BLOCKS):
        channels = 8 << (number // 32)
        layers.append(
            nn.Sequential(
                nn.Sequential(nn.Conv2d(before, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()),
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, 1, 1, groups=8), nn.BatchNorm2d(channels), nn.SiLU()
                ),
                nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)),
                nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.GELU()),
            )
        )
        before = channels
    return nn.Sequential(*layers)
