"""The passes over a whole input as torch.compile is to see them.

A compiler sees operations, fuses them, and computes the rule anew wherever its results are read. Four things
make its code as fast as memory allows: moments from a single pass, one expression for the whole gradient of
the input, coefficients of shape (N, C) that are computed once, and in channels_last with large maps sums by
the kernels of ``passes``, behind operators that the compiler calls as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normsearch.passes import has_columns, spatial_moments, spatial_sums, spread, wide_dtype

#: From this many spatial elements on, sums over channels_last are slower in strides than by its own kernels.
_LARGE = 2**11

#: The share of the first spatial dimension whose mean the deviations are taken from.
_PILOT = 32


def _operator(kernel: Callable[..., Any], fake: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """Make an operator that compilers call as it is, of its kernel and of what comes out in shape."""
    # By module: a network's own script holds a copy of this, beside which normsearch may be loaded.
    name = f"{re.sub(r'[^A-Za-z0-9]', '_', __name__)}::{kernel.__name__}"
    operator = torch.library.custom_op(name, kernel, mutates_args=(), device_types="cpu", schema=schema)
    operator.register_fake(fake)
    return operator


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=wide_dtype(x.dtype))


_moments_operator = _operator(
    spatial_moments, lambda x: (_statistic(x), _statistic(x)), "(Tensor x) -> (Tensor, Tensor)"
)
_sums_operator = _operator(
    spatial_sums,
    lambda grad, x, mean: (torch.empty_like(mean), torch.empty_like(mean)),
    "(Tensor grad, Tensor x, Tensor mean) -> (Tensor, Tensor)",
)


def normalize_compiled(
    x: Tensor, rule: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Any]], floor: Tensor | None
) -> tuple[Tensor, Any]:
    """Do what ``normalize`` does, by operations for a compiler.

    Args:
        x: input of shape (N, C, *spatial) with more than one spatial element.
        rule: as there; its gradient is autograd's.
        floor: what y is clipped to from below, shape (C,).

    """
    mean, variance, *stand_ins = _CompiledMoments.apply(x, floor is not None)
    scale, shift, extra = rule(mean, variance)
    # Lists, here and below: the tracer does not run generators within an autograd function.
    scale, shift = [part.to(mean.dtype).expand_as(mean) for part in (scale, shift)]
    return _CompiledAffine.apply(x, *stand_ins, mean, scale, shift, floor), extra


class _CompiledMoments(torch.autograd.Function):
    """Moments of x, and three stand-ins that bring ``_CompiledAffine``'s part of dx back here.

    As in ``moments``; the gradient of ``level`` is the shift from which y is clipped: y is above its floor
    where x·scale + level is positive.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_clipped: bool) -> tuple[Tensor, ...]:
        mean, variance = _seen_moments(x, not is_clipped and _has_own_kernels(x))
        ctx.is_clipped = is_clipped
        ctx.save_for_backward(x, mean)
        carrier, slope, level = [part.new_zeros(()).expand(part.shape) for part in (x, mean, mean)]
        return mean, variance, carrier, slope, level

    @staticmethod
    def backward(
        ctx: Any, of_mean: Tensor, of_variance: Tensor, grad: Tensor, scale: Tensor, level: Tensor
    ) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        elements = x.shape[2:].numel()
        of_x = of_variance * (2 / elements)
        of_one = torch.addcmul(of_mean / elements, mean, of_x, value=-1)
        scale, level, of_x, of_one = [spread(_once(part), x) for part in (scale, level, of_x, of_one)]
        if ctx.is_clipped:
            grad = torch.where(x * scale + level > 0, grad, 0)
        # x comes first: dx takes its memory format.
        return (x * of_x + of_one + grad * scale).to(x.dtype), None


class _CompiledAffine(torch.autograd.Function):
    """(x − mean)·scale + shift, clipped; see ``_CompiledMoments`` for the stand-ins."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        carrier: Tensor,
        slope: Tensor,
        level: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        floor: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale, shift, floor)
        # Asked for strides in backward, the tracer would make every gradient contiguous. What passes a floor
        # would have to be written for the kernels.
        ctx.has_own_kernels = floor is None and _has_own_kernels(x)
        offset = torch.addcmul(shift, mean, scale, value=-1)
        y = x * spread(_once(scale), x) + spread(_once(offset), x)
        if floor is not None:
            y = torch.maximum(y, spread(floor.to(y.dtype)[None], x))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, shift, floor = ctx.saved_tensors
        level, of_floor, passed = None, None, grad
        if floor is not None:
            level = torch.addcmul(shift - floor.to(shift.dtype), mean, scale, value=-1)
            passed = torch.where(x * spread(_once(scale), x) + spread(_once(level), x) > 0, grad, 0)
        plain, centred = _seen_sums(passed, x, mean, ctx.has_own_kernels)
        if floor is not None:
            # Of each sample first: a sum that is taken in the pass of the others.
            total = grad.sum(tuple(range(2, x.dim())), dtype=mean.dtype)
            of_floor = (total - plain).sum(0).to(floor.dtype)
        return None, grad, scale, level, -scale * plain, centred, plain, of_floor


def _once(coefficient: Tensor) -> Tensor:
    """Have a compiler compute ``coefficient`` where it is, and read it from there.

    Inductor computes it anew for every element of x that it belongs to, and a CPU may spend more on that than
    on x. A view by strides is taken of memory, so that there has to be some.
    """
    if coefficient.device.type != "cpu":
        return coefficient
    shape = coefficient.shape
    return coefficient.clone(memory_format=torch.contiguous_format).as_strided(shape, (shape[1], 1))


def _has_own_kernels(x: Tensor) -> bool:
    """Whether sums over ``x`` are left to the kernels of ``passes``."""
    return x.shape[2:].numel() >= _LARGE and has_columns(x)


def _seen_moments(x: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per (sample, channel), from one pass.

    v = mean (x − c)² − (m − c)² keeps its digits where c is near the mean: that of a 32nd of the map is
    within √32 standard deviations, that of one row of n within √n.
    """
    if own:
        mean, variance = _moments_operator(x)
        return mean, variance
    wide, size, spatial = x.to(wide_dtype(x.dtype)), x.shape[2], tuple(range(2, x.dim()))
    pilot = wide.narrow(2, size // 2, max(1, size // _PILOT)).mean(spatial)
    off = wide - spread(pilot, x)
    mean = off.mean(spatial)
    return pilot + mean, off.square().mean(spatial) - mean.square()


def _seen_sums(grad: Tensor, x: Tensor, mean: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Σ grad and Σ grad·(x − mean) over the spatial elements."""
    if own:
        plain, centred = _sums_operator(grad, x, mean)
        return plain, centred
    spatial = tuple(range(2, x.dim()))
    return grad.sum(spatial, dtype=mean.dtype), (grad * (x - spread(mean, x))).sum(spatial)
