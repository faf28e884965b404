"""Distillation: gradient steps that bring a converted model's outputs back to its original's, without labels.

Sources: Hinton et al., 2015, arXiv:1503.02531 (outputs); Romero et al., 2015, arXiv:1412.6550 (layers).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import ModelError
from normsearch.pairing import Pair
from normsearch.progress import Stage

#: Steps between two looks at the held-out error; looks without a gain after which it goes back to the best
#: values at a third of the rate; how often it does so before it ends.
LOOK_EVERY, PATIENCE, RETURNS = 10, 3, 3
#: The share of the error that a look must take away to count as a gain.
GAIN = 0.005
WARM_UP = 10
#: Adam's highest rate for a parameter, as a share of its root mean square: at a site, and elsewhere; and the
#: error below which rates shrink with it, since what is nearly right must not be thrown about.
SITE_RATE, OTHER_RATE, FULL_RATE_ERROR = 0.01, 0.02, 0.2


def site_parameters(pair: Pair) -> list[nn.Parameter]:
    """Return the parameters of the layers that conversion put in place."""
    found = [parameter for site in pair.sites.values() for parameter in site.new.parameters()]
    return list(dict.fromkeys(found))


def distill(
    pair: Pair,
    parameters: Sequence[nn.Parameter],
    batches: Callable[[], Iterable[Any]],
    held_out_error: Callable[[], float],
    steps: int,
    stage: Stage,
) -> int:
    """Train some parameters until the held-out error stops falling, and keep the best values seen.

    The loss is the squared error of the outputs plus, fading to nothing over the steps, that of the sites'
    outputs, each in units of the original's variance. Adam with warm-up and cosine decay; a parameter's rate
    is a share of its size.

    Args:
        pair: the models, in evaluation mode.
        parameters: what may change.
        batches: makes an iterable of training inputs, as often as it is called.
        held_out_error: measures the converted model as it is.
        steps: the most steps.
        stage: told of each step.

    Returns:
        The number of steps taken.

    """
    flags = [parameter.requires_grad for parameter in pair.network.parameters()]
    chosen = {id(parameter) for parameter in parameters}
    for parameter in pair.network.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    best, kept = held_out_error(), [parameter.detach().clone() for parameter in parameters]
    descent = _Descent(pair, parameters, steps, min(1, best / FULL_RATE_ERROR))
    variances = _Variances()
    fruitless = returns = done = 0
    for done, inputs in enumerate(itertools.islice(_endless(batches), steps), 1):
        with torch.enable_grad():
            loss = _loss(pair, inputs, variances, weight=1 - (done - 1) / steps)
            if not loss.requires_grad:
                # The forward pass runs without gradients, or reaches none of the parameters.
                done -= 1
                break
            descent.step(_gradients(loss, parameters))
        if done % LOOK_EVERY and done != steps:
            stage.advance()
            continue
        error = held_out_error()
        stage.advance(f"held-out error {error:.4g}")
        fruitless = 0 if error < best * (1 - GAIN) else fruitless + 1
        if error < best:
            best, kept = error, [parameter.detach().clone() for parameter in parameters]
        if fruitless == PATIENCE:
            descent.go_back(kept)
            fruitless, returns = 0, returns + 1
            if returns == RETURNS:
                break
    descent.go_back(kept)
    for parameter, flag in zip(pair.network.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return done


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ModelError(
            "the converted model uses gradient checkpointing with use_reentrant=True, through which no "
            "gradients of chosen parameters can be computed; switch checkpointing off, or give "
            "use_reentrant=False"
        ) from error


def _endless(batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        yield from batches()


def _loss(pair: Pair, inputs: Any, variances: _Variances, *, weight: float) -> Tensor:
    seen: list[tuple[str, Tensor, Tensor]] = []

    def visit(path: str, x: Tensor, output: Tensor, target: Tensor) -> None:
        # Compared afterwards: what gradient checkpointing computes again must save the same tensors.
        seen.append((path, output, target))

    outputs = [
        variances.relative(index, new, old)
        for index, (old, new) in enumerate(zip(*pair.run(inputs, visit), strict=True))
    ]
    sites = [variances.relative(*one) for one in seen]
    parts = [torch.stack(outputs).mean()] if outputs else []
    if sites and (weight > 0 or not outputs):
        parts.append((weight if outputs else 1) * torch.stack(sites).mean())
    return torch.stack(parts).sum()


class _Variances:
    """The variance of each tensor that is matched, over all batches so far."""

    def __init__(self) -> None:
        self._sums: dict[object, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def relative(self, key: object, new: Tensor, old: Tensor) -> Tensor:
        """Return the mean squared error of ``new`` in units of the variance of ``old``."""
        wide = old.detach().double()
        sums = self._sums[key]
        sums += torch.stack([torch.tensor(float(wide.numel())), wide.sum().cpu(), wide.square().sum().cpu()])
        count, mean, square = float(sums[0]), float(sums[1] / sums[0]), float(sums[2] / sums[0])
        variance = square - mean**2
        # A constant output has no scale but its own size.
        unit = variance if variance > 1e-12 * square else square or 1.0
        assert count
        return (new.float() - old.float()).square().mean() / unit


class _Descent:
    """Adam in at least single precision, with rates that follow the parameters' sizes."""

    def __init__(self, pair: Pair, parameters: Sequence[nn.Parameter], steps: int, speed: float) -> None:
        self._parameters, self._steps, self._done, self._speed = parameters, steps, 0, speed
        self._masters = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters
        ]
        sizes = _sizes_at_sites(pair)
        self._rates = [
            SITE_RATE * sizes[id(p)] if id(p) in sizes else OTHER_RATE * (_size(p) or 0.05)
            for p in parameters
        ]
        groups = [{"params": [m], "lr": r} for m, r in zip(self._masters, self._rates, strict=True)]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Move the parameters by one step."""
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)
        warm_up, decay = min(1, (self._done + 1) / WARM_UP), math.cos(math.pi * self._done / self._steps)
        share = self._speed * warm_up * (1 + decay) / 2
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._adam.step()
        self._done += 1
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            parameter.copy_(master)

    @torch.no_grad()
    def go_back(self, values: Sequence[Tensor]) -> None:
        """Set the parameters to earlier values and go on from there at a third of the rate."""
        for parameter, master, value in zip(self._parameters, self._masters, values, strict=True):
            parameter.copy_(value)
            master.copy_(value)
        self._adam.state.clear()
        self._speed /= 3


def _sizes_at_sites(pair: Pair) -> dict[int, float]:
    """Return what counts as the size of γ and β: that of the larger, since either may be zero."""
    sizes: dict[int, float] = {}
    for site in pair.sites.values():
        parameters = list(site.new.parameters())
        largest = max((_size(parameter) for parameter in parameters), default=0.0) or 1.0
        sizes |= {id(parameter): largest for parameter in parameters}
    return sizes


def _size(parameter: Tensor) -> float:
    return float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
