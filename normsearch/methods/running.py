"""BatchNorm's conventions for layers that keep running statistics: buffers, momentum, checks, printing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import ShapeError
from normsearch.methods.base import TrainedNorm
from normsearch.moments import batch_moments, is_written_down, without_gradients

#: Mean and variance per channel of a batch, shape (C,), and the number of its samples.
Statistics = tuple[Tensor, Tensor, int]


def held(value: Tensor) -> Tensor:
    """Return what a buffer holds, for a forward pass that moves the buffer afterwards.

    torch.compile may read a buffer once more in backward instead of keeping what forward read, and finds it
    moved (pytorch/pytorch#197039). A cumulative sum over a single element changes nothing and is kept.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return value.unsqueeze(0).cumsum(0).squeeze(0)
    return value


def check_input(layer: nn.Module, x: Tensor, channels: int) -> None:
    """Raise a ``ShapeError`` unless ``x`` is (N, C) or (N, C, *spatial) with the layer's channels."""
    ranks = getattr(layer, "ranks", None) or (2, 3, 4, 5)
    if x.dim() not in ranks or x.shape[1] != channels:
        raise ShapeError(
            f"{type(layer).__name__} expects (N, {channels}) or (N, {channels}, *spatial) with up to three "
            f"spatial dimensions, got {tuple(x.shape)}; a single sample needs its batch dimension: x[None]"
        )


def reset_affine(layer: nn.Module) -> None:
    """Set γ to one and β to zero where the layer has them."""
    for name, fill in (("weight", nn.init.ones_), ("bias", nn.init.zeros_)):
        parameter = getattr(layer, name)
        if parameter is not None:
            fill(parameter)


def make_affine(layer: nn.Module, channels: int, affine: bool, factory: dict[str, Any]) -> None:
    """Register γ and β of shape (C,), or None for both."""
    for name in ("weight", "bias"):
        layer.register_parameter(name, nn.Parameter(torch.empty(channels, **factory)) if affine else None)


class RunningNorm(nn.Module):
    """A layer with BatchNorm's affine, buffers and momentum rule; subclasses add the forward."""

    #: Names of parameters that mix kinds of statistics: they learn fast and never decay.
    gates: tuple[str, ...] = ()

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.synchronized = False
        self.process_group: Any = None
        make_affine(self, num_features, affine, factory)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.empty(num_features, **factory) if tracked else None)
        self.register_buffer("running_var", torch.empty(num_features, **factory) if tracked else None)
        self.register_buffer(
            "num_batches_tracked", torch.empty((), dtype=torch.long, device=device) if tracked else None
        )

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the counter to 0."""
        for buffer, value in (
            (self.running_mean, 0),
            (self.running_var, 1),
            (self.num_batches_tracked, 0),
        ):
            if buffer is not None:
                buffer.fill_(value)

    def reset_parameters(self) -> None:
        """Initialise the layer as the method's paper does for an untrained network."""
        self.reset_running_stats()
        reset_affine(self)

    def take_over(self, old: TrainedNorm) -> None:
        """Carry γ, β, running statistics, training flag and process group over from a trained BatchNorm."""
        old.carry(self)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value, own = getattr(old, name), getattr(self, name)
            if value is not None and own is not None:
                own.copy_(value)
        self.synchronized, self.process_group = old.synchronized, old.process_group

    def batch_statistics(self, mean: Tensor, variance: Tensor) -> Statistics:
        """Moments of the batch per channel and the number of samples, over all processes if synchronized."""
        return batch_moments(mean, variance, synchronized=self.synchronized, process_group=self.process_group)

    @property
    def uses_batch(self) -> bool:
        """Whether this forward pass normalizes by the batch: in training, or without running statistics."""
        return self.training or self.running_mean is None

    @property
    def uses_own_batch(self) -> bool:
        """Whether it normalizes by what this process alone can see of the batch."""
        return self.uses_batch and not self.synchronized

    def running(self) -> tuple[Tensor, Tensor]:
        """Return the running mean and variance; only where ``uses_batch`` is false or they are tracked."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def update(self, mean: Tensor, variance: Tensor | None = None, elements: int = 0) -> None:
        """Move the running statistics towards a batch's, with the unbiased variance, as BatchNorm does.

        Args:
            mean: the batch's mean per channel.
            variance: its biased variance per channel; None for layers that keep the mean only.
            elements: the number of values per channel; the variance of a single one says nothing.

        """
        if self.training and self.running_mean is not None:
            with without_gradients():
                self._move(self.running_mean, mean, variance, elements)

    def _move(self, running_mean: Tensor, mean: Tensor, variance: Tensor | None, elements: int) -> None:
        step: Tensor | float | None = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if step is None:
                step = 1 / self.num_batches_tracked.to(running_mean.dtype)
        if step is None:
            step = 0.0
        running_mean.lerp_(mean.detach().to(running_mean.dtype), step)
        if variance is None or self.running_var is None:
            return
        if is_written_down():
            # The number is open there, and may be one: then the variance moves to itself.
            count = variance.new_full((), elements)
            unbiased = variance.detach() * (count / (count - 1))
            unbiased = torch.where(count > 1, unbiased, self.running_var)
        elif elements > 1:
            unbiased = variance.detach() * (elements / (elements - 1))
        else:
            return
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)

    def scaled(self, scale: Tensor) -> Tensor:
        """Return γ·scale."""
        return scale if self.weight is None else self.weight * scale

    def shifted(self, shift: Tensor) -> Tensor:
        """Return shift + β."""
        return shift if self.bias is None else shift + self.bias

    def of_affine(self, scaled: Tensor, shifted: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of γ and β: what is scaled or shifted times its gradient, summed over (N,)."""
        of_weight, of_bias = (
            None if parameter is None else (part if part.dim() == 1 else part.sum(0)).to(parameter.dtype)
            for part, parameter in zip((scaled, shifted), (self.weight, self.bias), strict=True)
        )
        return of_weight, of_bias

    def extra_repr(self) -> str:
        """Print what torch's layers print."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )
