"""A small GAN on digits: its discriminator converted to spectral normalization, beside BatchNorm and none.

Run: python -m benchmarks.gan [--steps 2500] [--seeds 3] [--fresh]. Each finished run is kept in
results/gan.json, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import digits
from normsearch import convert, operator_norms

RESULTS = Path(__file__).parent / "results" / "gan.json"
#: What the discriminator's three BatchNorm layers become; with weights, all its layers are normalized.
VARIANTS = {
    "batch": ("batch", False),
    "identity": ("identity", False),
    "spectral(gain=fixed)": ("spectral(gain=fixed)", True),
}
#: The learning rate that GANs are usually trained with, and one that is hard to train with.
RATES = (2e-4, 1e-3)
NOISE, BATCH = 32, 64


def discriminator() -> nn.Sequential:
    """Return a network with BatchNorm in all but its first and last layer, for 8×8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), nn.LeakyReLU(0.1),
        nn.Conv2d(32, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.LeakyReLU(0.1),
        nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.LeakyReLU(0.1),
        nn.Conv2d(64, 128, 4, 2, 1), nn.BatchNorm2d(128), nn.LeakyReLU(0.1),
        nn.Flatten(), nn.Linear(512, 1),
    )  # fmt: skip


def generator() -> nn.Sequential:
    """Return a network that draws 8×8 images in [-1, 1] from noise."""
    return nn.Sequential(
        nn.Linear(NOISE, 256), nn.Unflatten(1, (64, 2, 2)), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def train(draw: nn.Module, judge: nn.Module, images: Tensor, rate: float, steps: int, seed: int) -> None:
    """Train both with the hinge loss, one step each in turn."""
    source = torch.Generator().manual_seed(seed)
    optimizers = [torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.999)) for net in (draw, judge)]
    for _ in range(steps):
        real = images[torch.randint(len(images), (BATCH,), generator=source)]
        fake = draw(torch.randn(BATCH, NOISE, generator=source))
        loss = F.relu(1 - judge(real)).mean() + F.relu(1 + judge(fake.detach())).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        (-judge(fake).mean()).backward()
        optimizers[0].step()


class Critic:
    """A trained classifier of digits: how far drawn digits are from real ones in its features."""

    def __init__(self, train_split: digits.Split, test_split: digits.Split) -> None:
        self._net = digits.train(train_split)
        assert isinstance(self._net, digits.DigitsNet)
        self.accuracy = digits.accuracy(self._net, test_split)
        self._real = self.features(train_split.images)
        #: What real digits that the classifier was not trained on score: no generator should be below.
        self.floor = self.distance(test_split.images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features before the last layer in double precision, shape (N, 64)."""
        net = self._net
        assert isinstance(net, digits.DigitsNet)
        features: Tensor = net.blocks(net.stem(images)).mean((2, 3)).double()
        return features

    def distance(self, images: Tensor) -> float:
        """Return the Fréchet distance ‖μ − μ'‖² + tr(Σ + Σ' − 2(ΣΣ')^½) to the real digits' features."""
        real, drawn = self._real, self.features(images)
        first, second = real.T.cov(), drawn.T.cov()
        # tr((ΣΣ')^½) is the sum of the roots of the product's eigenvalues, which are real and not negative.
        roots = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
        shift = (real.mean(0) - drawn.mean(0)).square().sum()
        return float(shift + first.trace() + second.trace() - 2 * roots)

    @torch.no_grad()
    def entropy(self, images: Tensor) -> float:
        """Return the entropy of the classes drawn, in nats: ln 10 = 2.30 where all ten are as frequent."""
        shares = self._net(images).argmax(1).bincount(minlength=10).double() / len(images)
        return float(torch.special.entr(shares).sum())


def steepest(judge: nn.Module, real: Tensor, fake: Tensor) -> float:
    """Return the largest gradient norm of the discriminator in eval mode between real and drawn images."""
    share = torch.linspace(0, 1, len(real)).reshape(-1, 1, 1, 1)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(judge(between).sum(), between)
    return float(slope.flatten(1).norm(dim=1).max())


def run(variant: str, rate: float, seed: int, steps: int, images: Tensor, critic: Critic) -> dict[str, Any]:
    """Train one GAN and measure it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw, original = generator(), discriminator()
        method, weights = VARIANTS[variant]
        judge = convert(original, method, weights=weights)
        start = time.perf_counter()
        train(draw, judge, images, rate, steps, seed)
        seconds = time.perf_counter() - start
        draw.eval(), judge.eval()
        with torch.no_grad():
            drawn = draw(torch.randn(4000, NOISE, generator=torch.Generator().manual_seed(1000 + seed)))
    norms = operator_norms(judge, images[:1], iterations=300)
    rescaled = drawn / 2 + 0.5
    return {
        "seconds": seconds,
        "frechet": critic.distance(rescaled),
        "entropy": critic.entropy(rescaled),
        "steepest": steepest(judge, images[:1000], drawn[:1000]),
        "product": norms.product,
        "layers": [
            {"path": layer.path, "matrix": layer.matrix, "operator": layer.operator, "bound": layer.bound}
            for layer in norms.layers
        ],
    }


def table(cells: dict[str, dict[str, Any]], critic: Critic) -> Table:
    """Return the runs of each variant and rate, mean ± standard deviation over seeds."""
    shown = Table(
        title="GAN on 8×8 digits by the discriminator's normalization",
        caption=f"held-out real digits: Fréchet {critic.floor:.3f}; ten equal classes: entropy 2.303",
    )
    for name in ("discriminator", "rate"):
        shown.add_column(name)
    for name in ("Fréchet", "entropy", "σ at most", "norm/√(kh·kw) at most", "steepest", "product"):
        shown.add_column(name, justify="right")
    kernels = {"0": 3.0, "2": 4.0, "5": 3.0, "8": 4.0, "12": 1.0}
    for variant in VARIANTS:
        for rate in RATES:
            runs = [cell for key, cell in cells.items() if key.startswith(f"{variant} {rate} ")]
            if not runs:
                continue
            layers = [layer for cell in runs for layer in cell["layers"]]
            ratio = max(layer["operator"] / kernels[layer["path"]] for layer in layers)
            shown.add_row(
                variant,
                f"{rate:g}",
                *(_spread([cell[name] for cell in runs]) for name in ("frechet", "entropy")),
                f"{max(layer['matrix'] for layer in layers):.4f}",
                f"{ratio:.3f}",
                *(f"{max(cell[name] for cell in runs):.3g}" for name in ("steepest", "product")),
            )
    return shown


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_split, test_split = digits.data()
    critic = Critic(train_split, test_split)
    setting = {
        "steps": options.steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.fresh else {}
    cells: dict[str, dict[str, Any]] = kept.get("cells", {}) if kept.get("setting") == setting else {}
    wanted = [(v, r, s) for s in range(options.seeds) for r in RATES for v in VARIANTS]
    console = Console(width=120)
    for variant, rate, seed in track(wanted, "training", console=Console(stderr=True)):
        key = f"{variant} {rate} {seed}"
        if key not in cells:
            cells[key] = run(variant, rate, seed, options.steps, train_split.images * 2 - 1, critic)
            RESULTS.write_text(
                json.dumps({"setting": setting, "floor": critic.floor, "cells": cells}, indent=1) + "\n"
            )
    console.print(table(cells, critic))


if __name__ == "__main__":
    main()
