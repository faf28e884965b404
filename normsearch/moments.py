"""Per-(sample, channel) moments, the affine they lead to, and how moments of larger sets follow from them.

Every activation normalization here is y = (x − m)·scale + shift, where m and v are the mean and the biased
variance of each (sample, channel) over the spatial elements and (scale, shift) follow from them by a small
rule. The rule sees tensors of shape (N, C) only, so its cost does not grow with the map.

With S1 = Σ dy and S2 = Σ dy (x − m), the gradients of shift and scale, and dm, dv what the rule's own
gradient makes of them, dx = scale·dy + (2 dv/L) (x − m) + (dm − scale·S1)/L: two passes over x and dy,
and nothing of x's size is kept for them but x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from normsearch import passes

#: (mean, variance) of shape (N, C) to (scale, shift) that broadcast to (N, C), and anything to hand back.
Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Any]]


def normalize(x: Tensor, rule: Rule) -> tuple[Tensor, Any]:
    """Normalize ``x`` by its per-(sample, channel) moments.

    Args:
        x: input of shape (N, C, *spatial); (N, C) counts as one spatial element.
        rule: maps the moments to scale, shift and anything to hand back.

    Returns:
        y = (x − m)·scale + shift in the dtype of ``x``, and what the rule handed back. Half-precision
        inputs are computed in single precision.

    """
    if torch.compiler.is_compiling() or not _has_closed_form(x):
        return _differentiated(x, rule)
    mean, variance, carrier, slope = _Moments.apply(x)
    scale, shift, extra = rule(mean, variance)
    scale, shift = (part.to(mean.dtype).expand_as(mean) for part in (scale, shift))
    return _Affine.apply(x, carrier, slope, mean, scale, shift), extra


def _has_closed_form(x: Tensor) -> bool:
    """Whether autograd runs its usual way over ``x``, and there is something to average over.

    Transforms of torch.func, forward mode, tracers and tensor subclasses differentiate or record the
    operations themselves.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_floating_point()
        and x.numel() > x.shape[:2].numel() > 0
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _differentiated(x: Tensor, rule: Rule) -> tuple[Tensor, Any]:
    """``normalize`` by operations that autograd, torch.func and compilers see through."""
    wide = x.to(passes.wide(x.dtype))
    spatial = tuple(range(2, x.dim()))
    if spatial:
        kept = wide.mean(spatial, keepdim=True)
        centred = wide - kept
        # The centred form keeps its digits where the mean is a thousand standard deviations.
        mean, variance = kept.flatten(1), centred.square().mean(spatial)
    else:
        centred, mean, variance = torch.zeros_like(wide), wide, torch.zeros_like(wide)
    scale, shift, extra = rule(mean, variance)
    shape = (*mean.shape, *(1 for _ in spatial))
    scale, shift = (part.expand_as(mean).reshape(shape) for part in (scale, shift))
    return (centred * scale + shift).to(x.dtype), extra


class _Moments(torch.autograd.Function):
    """Moments of x, and two stand-ins that bring ``_Affine``'s part of dx back here.

    x reaches y by two ways, through its moments and by itself. Adding the two gradients would be one more
    pass over memory, so ``_Affine`` sends dy and its scale back as the gradients of ``carrier`` and
    ``slope``, which hold no data, and dx is written once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance = passes.moments(x)
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return mean, variance, x.new_zeros(()).expand(x.shape), mean.new_zeros(()).expand(mean.shape)

    @staticmethod
    def backward(
        ctx: Any, of_mean: Tensor | None, of_variance: Tensor | None, grad: Tensor | None, slope: Tensor | None
    ) -> Tensor:
        x, mean = ctx.saved_tensors
        elements = x.shape[2:].numel()
        parts = [torch.zeros_like(mean) if part is None else part for part in (slope, of_variance, of_mean)]
        of_grad, of_x, of_one = parts[0], parts[1] * (2 / elements), parts[2] / elements
        if grad is None:
            grad = torch.zeros_like(x)
        if torch.is_grad_enabled():
            terms = (passes.spread(part, x) for part in (mean, of_grad, of_x, of_one))
            centre, of_grad, of_x, of_one = terms
            return (of_grad * grad + of_x * (x - centre) + of_one).to(x.dtype)
        return passes.input_gradient(grad, x, mean, of_grad, of_x, of_one)


class _Affine(torch.autograd.Function):
    """(x − mean)·scale + shift; see ``_Moments`` for ``carrier`` and ``slope``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, carrier: Tensor, slope: Tensor, mean: Tensor, scale: Tensor, shift: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return passes.affine(x, mean, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            spatial = tuple(range(2, x.dim()))
            plain = grad.sum(spatial, dtype=mean.dtype)
            centred = (grad * (x - passes.spread(mean, x))).sum(spatial)
        else:
            plain, centred = passes.sums(grad, x, mean)
        return None, grad, scale, -scale * plain, centred, plain


def group_moments(mean: Tensor, variance: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Moments over (C/groups, spatial) of each sample, repeated to (N, C).

    μ_g = mean_c m, σ_g² = mean_c v + mean_c (m − μ_g)².
    """
    n, channels = mean.shape
    size = channels // groups
    m, v = mean.reshape(n, groups, size), variance.reshape(n, groups, size)
    centre = m.mean(2, keepdim=True)
    spread = v.mean(2, keepdim=True) + (m - centre).square().mean(2, keepdim=True)
    return (
        centre.expand(-1, -1, size).reshape(n, channels),
        spread.expand(-1, -1, size).reshape(n, channels),
    )


def batch_moments(
    mean: Tensor, variance: Tensor, *, synchronized: bool = False, process_group: Any = None
) -> tuple[Tensor, Tensor, int]:
    """Moments over (N, spatial) of each channel, shape (C,), and the number of samples they are taken over.

    Args:
        mean: per-(sample, channel) means, shape (N, C).
        variance: per-(sample, channel) variances, shape (N, C).
        synchronized: take them over every process of the group, as SyncBatchNorm does.
        process_group: the group; None is the default one.

    """
    count = mean.shape[0]
    shared = synchronized and dist.is_available() and dist.is_initialized()
    if shared and dist.get_world_size(process_group) > 1:
        total = torch.tensor([count], device=mean.device)
        dist.all_reduce(total, group=process_group)
        count = int(total)
        centre = _SumOverProcesses.apply(mean.sum(0), process_group) / count
        spread = (variance + (mean - centre).square()).sum(0)
        return centre, _SumOverProcesses.apply(spread, process_group) / count, count
    centre = mean.mean(0)
    return centre, (variance + (mean - centre).square()).mean(0), count


def batch_mean(x: Tensor, *, synchronized: bool = False, process_group: Any = None) -> Tensor:
    """Mean per channel of (N, C, *spatial), shape (C,), in at least single precision."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = wide.mean((0, *range(2, x.dim())))
    if not (synchronized and dist.is_available() and dist.is_initialized()):
        return mean
    count = torch.tensor([float(x.shape[0])], device=x.device, dtype=mean.dtype)
    total: Tensor = _SumOverProcesses.apply(torch.cat([mean * count, count]), process_group)
    return total[:-1] / total[-1]


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes of a group; so is its gradient."""

    @staticmethod
    def forward(x: Tensor, process_group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        ctx.process_group = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.process_group)
        return total, None
