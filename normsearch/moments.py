"""Per-(sample, channel) moments, the affine they lead to, and how moments of larger sets follow from them.

Every activation normalization here is y = (x − m)·scale + shift, where m and v are the mean and the biased
variance of each (sample, channel) over the spatial elements and (scale, shift) follow from them by a small
rule. The rule sees tensors of shape (N, C) only, so its cost does not grow with the map.

With S1 = Σ dy and S2 = Σ dy (x − m), the gradients of shift and scale, and dm, dv what the rule's own
gradient makes of them, dx = scale·dy + (2 dv/L) (x − m) + (dm − scale·S1)/L: two passes over x and dy,
and nothing of x's size is kept for them but x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from normsearch.compiled import normalize_compiled
from normsearch.passes import (
    channel_sums,
    clip_,
    input_gradient,
    pass_above,
    spatial_affine,
    spatial_moments,
    spatial_sums,
    spread,
    wide_dtype,
)

#: (mean, variance) of shape (N, C) to (scale, shift) that broadcast to (N, C), and anything to hand back.
Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Any]]


class ClosedRule:
    """A rule with its gradient written out, where autograd over many small operations would cost more.

    An object serves one forward pass: calling it keeps what ``gradient`` needs. The call itself stays
    differentiable, for double backward, transforms, compilers and wherever ``closed`` is false.
    """

    #: Whether ``gradient`` holds for this pass.
    closed = True
    #: What scale and shift depend on beside the moments; None where a layer has no such parameter.
    parameters: tuple[Tensor | None, ...] = ()
    #: What y is clipped to from below, shape (C,).
    floor: Tensor | None = None
    #: What the last call handed back.
    extra: Any = None

    def __call__(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Return scale, shift and anything to hand back."""
        raise NotImplementedError

    def gradient(
        self, of_scale: Tensor, of_shift: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the gradients of the mean, the variance and the parameters.

        Args:
            of_scale: S2 = Σ dy (x − m), shape (N, C).
            of_shift: S1 = Σ dy, shape (N, C).

        Returns:
            Those of y = (x − m)·scale + shift, the mean's with the −scale·S1 that comes from (x − m); the
            first two broadcast to (N, C).

        """
        raise NotImplementedError


def normalize(x: Tensor, rule: Rule) -> tuple[Tensor, Any]:
    """Normalize ``x`` by its per-(sample, channel) moments.

    Args:
        x: input of shape (N, C, *spatial); (N, C) counts as one spatial element.
        rule: maps the moments to scale, shift and anything to hand back.

    Returns:
        y = (x − m)·scale + shift in the dtype of ``x``, clipped where the rule has a floor, and what the rule
        handed back. Half-precision inputs are computed in single precision.

    """
    if not _has_closed_form(x):
        return _differentiated(x, rule)
    if torch.compiler.is_compiling():
        return normalize_compiled(x, rule, rule.floor if isinstance(rule, ClosedRule) else None)
    if isinstance(rule, ClosedRule) and rule.closed:
        return _Normalize.apply(x, rule, rule.floor, *rule.parameters), rule.extra
    mean, variance, carrier, slope = _Moments.apply(x)
    scale, shift, extra = rule(mean, variance)
    scale, shift = (part.to(mean.dtype).expand_as(mean) for part in (scale, shift))
    return _Affine.apply(x, carrier, slope, mean, scale, shift), extra


def _has_closed_form(x: Tensor) -> bool:
    """Whether autograd runs its usual way over ``x``, and there is something to average over."""
    if torch.compiler.is_exporting() or is_written_down() or _is_transformed(x):
        return False
    return x.is_floating_point() and x.numel() > x.shape[0] * x.shape[1] > 0


_written_down: ContextVar[bool] = ContextVar("written_down", default=False)


@contextmanager
def as_operators() -> Iterator[None]:
    """Let layers run as single operations, which a graph can hold; their gradients are then autograd's."""
    token = _written_down.set(True)
    try:
        yield
    finally:
        _written_down.reset(token)


def is_written_down() -> bool:
    """Whether a layer is being written down as operators: autograd functions would lose their gradients."""
    return _written_down.get()


def without_gradients() -> AbstractContextManager[None]:
    """Switch gradients off where an update is made from detached values: a graph need not know."""
    return nullcontext() if is_written_down() else torch.no_grad()


def is_differentiated_otherwise(x: Tensor) -> bool:
    """Whether a compiler, tracer, transform of torch.func or tensor subclass sees the single operations."""
    return is_written_down() or torch.compiler.is_compiling() or _is_transformed(x)


def _is_transformed(x: Tensor) -> bool:
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch.jit.is_tracing()  # type: ignore[no-untyped-call,attr-defined]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _Normalize(torch.autograd.Function):
    """``normalize`` by a rule whose gradient is known."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rule: ClosedRule, floor: Tensor | None, *parameters: Tensor | None
    ) -> Tensor:
        mean, variance = spatial_moments(x)
        scale, shift, rule.extra = rule(mean, variance)
        ctx.save_for_backward(x, floor)
        # Of shape (N, C), and neither inputs nor outputs: autograd need not know them.
        ctx.rule, ctx.mean, ctx.scale, ctx.shift = rule, mean, scale.expand_as(mean), shift.expand_as(mean)
        y = spatial_affine(x, mean, ctx.scale, ctx.shift)
        return y if floor is None else clip_(y, floor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, floor = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _again(x, ctx.rule, grad, ctx.needs_input_grad)
        of_floor = None
        if floor is None:
            plain, centred = spatial_sums(grad, x, ctx.mean)
        else:
            # What was clipped is seen from x once more, instead of keeping y.
            above = spatial_affine(x, ctx.mean, ctx.scale, ctx.shift - floor.to(ctx.shift.dtype))
            total, grad = channel_sums(grad), pass_above(grad, above)
            plain, centred = spatial_sums(grad, x, ctx.mean)
            of_floor = (total - plain.sum(0)).to(floor.dtype)
        of_mean, of_variance, of_parameters = ctx.rule.gradient(centred, plain)
        dx = None
        if ctx.needs_input_grad[0]:
            elements = x.shape[2:].numel()
            of_x, of_one = (
                part.expand_as(ctx.mean) for part in (of_variance * (2 / elements), of_mean / elements)
            )
            dx = input_gradient(grad, x, ctx.mean, ctx.scale, of_x, of_one)
        return dx, None, of_floor, *of_parameters


def _again(x: Tensor, rule: ClosedRule, grad: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradient as a function of its own inputs, for double backward."""
    variables = [x if needed[0] else None, None, rule.floor, *rule.parameters]
    wanted = [part for part, need in zip(variables, needed, strict=True) if need and part is not None]
    y, _ = _differentiated(x, rule)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, materialize_grads=True))
    return tuple(next(found) if need else None for need in needed)


def _differentiated(x: Tensor, rule: Rule) -> tuple[Tensor, Any]:
    """``normalize`` by operations that autograd, torch.func and compilers see through."""
    wide = x.to(wide_dtype(x.dtype))
    spatial = tuple(range(2, x.dim()))
    kept = wide.mean(spatial, keepdim=True) if spatial else wide
    # v = mean (x − c)² − (m − c)² and y = (x − c)·scale + shift − (m − c)·scale hold for every constant c.
    # With c = m the small terms are zero, and carry the gradients for which x − m would need one more pass.
    constant = kept.detach()
    centred, off = wide - constant, (kept - constant).flatten(1)
    mean = kept.flatten(1)
    variance = (centred.square().mean(spatial) if spatial else centred.square()) - off.square()
    scale, shift, extra = rule(mean, variance)
    scale, shift = (spread(part.expand_as(mean), x) for part in (scale, shift - off * scale))
    y = (centred * scale + shift).to(x.dtype)
    floor = rule.floor if isinstance(rule, ClosedRule) else None
    return y if floor is None else _clipped(y, floor), extra


def _clipped(y: Tensor, floor: Tensor) -> Tensor:
    """max(y, floor) with floor per channel, whose gradient is the floor's where both are equal."""
    floor = floor.to(y.dtype).reshape(-1, *(1 for _ in y.shape[2:]))
    if torch.compiler.is_compiling() or is_written_down():
        # Compilers keep what relu returns, but a mask of where's, which is slow to read.
        return (y - floor).relu() + floor
    return torch.where(y > floor, y, floor)


class _Moments(torch.autograd.Function):
    """Moments of x, and two stand-ins that bring ``_Affine``'s part of dx back here.

    x reaches y by two ways, through its moments and by itself. Adding the two gradients would be one more
    pass over memory, so ``_Affine`` sends dy and its scale back as the gradients of ``carrier`` and
    ``slope``, which hold no data, and dx is written once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance = spatial_moments(x)
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return mean, variance, x.new_zeros(()).expand(x.shape), mean.new_zeros(()).expand(mean.shape)

    @staticmethod
    def backward(
        ctx: Any,
        of_mean: Tensor | None,
        of_variance: Tensor | None,
        grad: Tensor | None,
        slope: Tensor | None,
    ) -> Tensor:
        x, mean = ctx.saved_tensors
        elements = x.shape[2:].numel()
        parts = [torch.zeros_like(mean) if part is None else part for part in (slope, of_variance, of_mean)]
        of_grad, of_x, of_one = parts[0], parts[1] * (2 / elements), parts[2] / elements
        if grad is None:
            grad = torch.zeros_like(x)
        if torch.is_grad_enabled():
            terms = (spread(part, x) for part in (mean, of_grad, of_x, of_one))
            centre, of_grad, of_x, of_one = terms
            dx: Tensor = (of_grad * grad + of_x * (x - centre) + of_one).to(x.dtype)
            return dx
        return input_gradient(grad, x, mean, of_grad, of_x, of_one)


class _Affine(torch.autograd.Function):
    """(x − mean)·scale + shift; see ``_Moments`` for ``carrier`` and ``slope``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, carrier: Tensor, slope: Tensor, mean: Tensor, scale: Tensor, shift: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return spatial_affine(x, mean, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            spatial = tuple(range(2, x.dim()))
            plain = grad.sum(spatial, dtype=mean.dtype)
            centred = (grad * (x - spread(mean, x))).sum(spatial)
        else:
            plain, centred = spatial_sums(grad, x, mean)
        return None, grad, scale, -scale * plain, centred, plain


def group_moments(mean: Tensor, variance: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Moments over (C/groups, spatial) of each sample, repeated to (N, C).

    μ_g = mean_c m, σ_g² = mean_c v + mean_c (m − μ_g)².
    """
    if groups == 1:
        centre, spread = _union(mean, variance, 1)
        return centre.expand_as(mean), spread.expand_as(mean)
    n, channels = mean.shape
    shape = (n, groups, channels // groups)
    centre, spread = _union(mean.reshape(shape), variance.reshape(shape), 2)
    return centre.expand(shape).reshape(n, channels), spread.expand(shape).reshape(n, channels)


def _union(mean: Tensor, variance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Moments of the union of sets of equal size along ``dim``, which stays with size one."""
    centre = mean.mean(dim, keepdim=True)
    off = mean - centre
    return centre, torch.addcmul(variance, off, off).mean(dim, keepdim=True)


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
    centre, spread = _union(mean, variance, 0)
    return centre.squeeze(0), spread.squeeze(0), count


def union_gradient(
    of_scale: Tensor, of_shift: Tensor, off: Tensor, scale: Tensor, inverse: Tensor, dim: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of samples' moments where scale and shift follow from those of their union, as in BatchNorm.

    scale = k/√(V + eps) and shift = (m − M)·scale + what the moments have no part in, where M and V are the
    mean and the variance of the union along ``dim`` and k is constant.

    Args:
        of_scale: Σ dy (x − m) of each sample.
        of_shift: Σ dy of each sample.
        off: m − M of each sample.
        scale: as above, with size one along ``dim``, or without it where it is the first.
        inverse: 1/√(V + eps), likewise.
        dim: the dimension of the samples.

    Returns:
        The gradients of each sample's mean (with the −scale·Σ dy of x − m) and of every sample's variance;
        and those of scale and shift summed along ``dim``. All but the first have size one there.

    """
    samples = of_shift.shape[dim]
    through = torch.addcmul(of_scale, of_shift, off).sum(dim, keepdim=True)
    shift = of_shift.sum(dim, keepdim=True)
    of_variance = (through * scale).mul_(inverse.square()).mul_(-0.5 / samples)
    of_mean = torch.addcmul((shift * scale).div_(-samples), off, of_variance, value=2)
    return of_mean, of_variance, through, shift


def batch_mean(x: Tensor, *, synchronized: bool = False, process_group: Any = None) -> Tensor:
    """Mean per channel of (N, C, *spatial), shape (C,), in at least single precision."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = wide.mean((0, *range(2, x.dim())))
    if not (synchronized and dist.is_available() and dist.is_initialized()):
        return mean
    count = torch.tensor([float(x.shape[0])], device=x.device, dtype=mean.dtype)
    total: Tensor = _SumOverProcesses.apply(torch.cat([mean * count, count]), process_group)
    return total[:-1] / total[-1]


def subtract_batch_mean(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x − μ_B + β in the dtype of ``x``, and μ_B as ``batch_mean`` gives it, without gradient.

    Args:
        x: input of shape (N, C, *spatial).
        bias: β of shape (C,), or None for zero.

    """
    if not is_differentiated_otherwise(x):
        y, mean = _SubtractBatchMean.apply(x, bias)
        return y, mean
    mean = batch_mean(x)
    # One addition of x's size: the shift is made first.
    shift = -mean if bias is None else bias - mean
    return x + shift.reshape(-1, *(1 for _ in x.shape[2:])).to(x.dtype), mean.detach()


class _SubtractBatchMean(torch.autograd.Function):
    """``subtract_batch_mean``, with dx = dy − mean dy; it keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.of_bias = None if bias is None else bias.dtype
        mean = channel_sums(x) / (x.numel() // x.shape[1])
        ctx.mark_non_differentiable(mean)
        shift = -mean if bias is None else bias - mean
        return x + shift.to(x.dtype).reshape(-1, *(1 for _ in x.shape[2:])), mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
        total = channel_sums(grad)
        each = (total / -(grad.numel() // grad.shape[1])).to(grad.dtype)
        dx = grad + each.reshape(-1, *(1 for _ in grad.shape[2:]))
        return dx, None if ctx.of_bias is None else total.to(ctx.of_bias)


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
