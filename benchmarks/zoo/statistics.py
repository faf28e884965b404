"""What stands in for training: statistics, γ and β that a trained network could have, and harder ones."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.forward import call


@torch.no_grad()
def draw_numbers(model: nn.Module, norms: Iterable[nn.Module], inputs: Any) -> None:
    """Give a new network random γ (zero and negative ones among them), β and statistics.

    The statistics are those of the layer's input in one eval-mode pass, off by a factor that another data set
    would explain. Independent random numbers would not do: an untrained network drifts away from them, more
    with every layer, until rounding is all there is to compare.
    """
    norms = list(norms)
    for norm in norms:
        if norm.weight is not None:
            _draw_affine(norm)
    _draw_zeros(model)

    def measure(norm: nn.Module, args: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1, correction=0)
        # Channels that are dead in this batch must not be amplified by 1/√eps in the next.
        variance.clamp_(min=0.01 * float(variance.mean()))
        mean += 0.3 * variance.sqrt() * torch.randn_like(mean)
        variance *= torch.empty_like(variance).uniform_(-1, 1).exp()
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(measure).remove)
        call(model, inputs)


def _draw_affine(norm: nn.Module) -> None:
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    weight.uniform_(0.5, 1.5)
    # With γ = 0 in its only channel a layer puts out a constant and is right to.
    if len(weight) > 1:
        weight[0] = 0
    weight[1::3] *= -1
    bias.normal_(std=0.3)


def _draw_zeros(model: nn.Module) -> None:
    """Draw the matrices that start at zero, as some classifiers do: their output would be nothing."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=0.05)
