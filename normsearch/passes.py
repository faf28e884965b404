"""The passes over a whole input that normalization makes: its moments, an affine, two sums, a gradient.

Statistics have shape (N, C), in double precision for double inputs and in single precision for all others.
On a CPU the passes run on the memory as it lies, contiguous or channels_last, by the primitives that were
measured to be fastest there; other strides and devices take elementwise operations and reductions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_aten = torch.ops.aten

#: Elements of a block whose temporary copy stays in a core's cache; half-precision inputs need several.
_BLOCK = 2**18

#: From this many elements per sample on, one call per sample pays for itself in channels_last.
_SAMPLE = 2**14

_HALF = (torch.float16, torch.bfloat16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics of inputs of ``dtype`` are computed."""
    return torch.float32 if dtype in _HALF else dtype


def spread(statistic: Tensor, x: Tensor) -> Tensor:
    """(N, C) to a shape that broadcasts to that of ``x``."""
    return statistic.reshape(*statistic.shape, *(1 for _ in x.shape[2:]))


def has_columns(x: Tensor) -> bool:
    """Whether ``x`` lies in channels_last on the CPU, and in no other way."""
    return x.device.type == "cpu" and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def spatial_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per (sample, channel) over the spatial elements.

    The variance is a mean of squared deviations: it keeps its digits where the mean is a thousand standard
    deviations.
    """
    if _in_blocks(x):
        parts = [spatial_moments(x[block].float()) for block in _blocks(x)]
        return torch.cat([mean for mean, _ in parts]), torch.cat([variance for _, variance in parts])
    if (rows := _rows(x)) is not None:
        mean, variance = _row_moments(rows)
        return mean.view(x.shape[:2]), variance.view(x.shape[:2])
    if (columns := _columns(x)) is not None:
        return _column_moments(columns)
    spatial = tuple(range(2, x.dim()))
    kept = x.mean(spatial, keepdim=True, dtype=wide_dtype(x.dtype))
    return kept.flatten(1), (x - kept).square_().mean(spatial)


def channel_sums(x: Tensor) -> Tensor:
    """Return sums per channel over all else, shape (C,)."""
    if x.dim() > 2 and x.is_contiguous():
        # Rows first: a sum over the first and the last dimensions at once leaves vectors unused.
        return x.flatten(2).sum(2, dtype=wide_dtype(x.dtype)).sum(0)
    return x.sum((0, *range(2, x.dim())), dtype=wide_dtype(x.dtype))


def spatial_affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return (x − mean)·scale + shift in the dtype and memory format of ``x``."""
    if _in_blocks(x):
        y = torch.empty_like(x)
        for block in _blocks(x):
            y[block] = spatial_affine(x[block].float(), mean[block], scale[block], shift[block])
        return y
    if _rows(x) is not None:
        return _row_affine(x, mean, scale, shift)
    offset = torch.addcmul(shift, mean, scale, value=-1)
    if (columns := _columns(x)) is not None:
        # Not a view of the result: what follows may change it in place.
        y = torch.empty_like(x)
        torch.addcmul(offset.unsqueeze(1), columns, scale.unsqueeze(1), out=_as_columns(y))
        return y
    return torch.addcmul(spread(offset, x), x.to(scale.dtype), spread(scale, x)).to(x.dtype)


def clip_(y: Tensor, floor: Tensor) -> Tensor:
    """Raise ``y`` to at least ``floor``, shape (C,), in place, and return it."""
    low, columns = floor.to(y.dtype), _columns(y)
    if columns is None:
        return y.clamp_min_(spread(low[None], y))
    columns.clamp_min_(low)
    return y


def pass_above(grad: Tensor, above: Tensor) -> Tensor:
    """Return ``grad`` where ``above`` is positive and 0 elsewhere; ``above`` is overwritten."""
    if grad.stride() == above.stride():
        _aten.threshold_backward.grad_input(grad, above, 0, grad_input=above)
        return above
    passed: Tensor = _aten.threshold_backward.default(grad, above, 0)
    return passed


def spatial_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ grad and Σ grad·(x − mean) over the spatial elements."""
    if _in_blocks(x):
        parts = [spatial_sums(grad[block].float(), x[block].float(), mean[block]) for block in _blocks(x)]
        return torch.cat([plain for plain, _ in parts]), torch.cat([centred for _, centred in parts])
    if (rows := _rows(x)) is not None:
        plain, centred = _batch_norm_sums(grad.contiguous().view_as(rows), rows, mean.reshape(-1))
        return plain.view_as(mean), centred.view_as(mean)
    if (columns := _columns(x)) is not None:
        return _column_sums(_as_columns(grad), columns, mean)
    spatial = tuple(range(2, x.dim()))
    return grad.sum(spatial, dtype=mean.dtype), ((x - spread(mean, x)) * grad).sum(spatial)


def input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, of_grad: Tensor, of_x: Tensor, of_one: Tensor
) -> Tensor:
    """Return grad·of_grad + (x − mean)·of_x + of_one in the dtype and memory format of ``x``."""
    if _in_blocks(x):
        dx = torch.empty_like(x)
        for block in _blocks(x):
            dx[block] = input_gradient(
                grad[block].float(), x[block].float(), mean[block], of_grad[block], of_x[block], of_one[block]
            )
        return dx
    if _rows(x) is not None:
        dx = _row_affine(x, mean, of_x, of_one)
        dx.view(*mean.shape, -1).addcmul_(grad.reshape(*mean.shape, -1), of_grad.unsqueeze(2))
        return dx
    if _columns(x) is not None:
        dx = spatial_affine(x, mean, of_x, of_one)
        _as_columns(dx).addcmul_(_as_columns(grad), of_grad.unsqueeze(1))
        return dx
    dx = spatial_affine(x.to(mean.dtype), mean, of_x, of_one)
    return dx.addcmul_(grad.to(mean.dtype), spread(of_grad, x)).to(x.dtype)


def _in_blocks(x: Tensor) -> bool:
    """Whether the input has to be widened, which is done a block of samples at a time."""
    return x.dtype in _HALF and x.device.type == "cpu"


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension that keep every thread's share of a block in its cache."""
    size = _block(x)
    for start in range(0, x.shape[0], size):
        yield slice(start, start + size)


def _block(x: Tensor) -> int:
    elements = _BLOCK * torch.get_num_threads() // (8 if x.dtype in _HALF else 1)
    return max(1, elements * x.shape[0] // x.numel())


def _rows(x: Tensor) -> Tensor | None:
    """(N·C, L) of a contiguous input on the CPU."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return None
    return x.view(x.shape[0] * x.shape[1], -1)


def _columns(x: Tensor) -> Tensor | None:
    """(N, L, C) of a channels_last input on the CPU."""
    return x.movedim(1, -1).view(x.shape[0], -1, x.shape[1]) if has_columns(x) else None


def _as_columns(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().view(x.shape[0], -1, x.shape[1])


def _row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of each row; the kernel of group norm has the fastest ones, its output is not used."""
    size, elements = _block(rows), rows.shape[1]
    # One group per row. An epsilon of zero: 1/√v is then infinite where v is 0, and its power −2 is 0.
    parts = [
        torch.native_group_norm(part, None, None, 1, len(part), elements, len(part), 0.0)[1:]
        for part in ((rows,) if len(rows) <= size else rows.split(size))
    ]
    mean, inverse = parts[0] if len(parts) == 1 else (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return mean, inverse.pow(-2)


def _row_affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Batch norm in eval mode with a variance of one, each row of a contiguous input a channel."""
    y, flat = torch.empty_like(x), mean.reshape(-1)
    shape, unused = (1, len(flat), -1), flat.new_empty(0)
    torch.native_batch_norm(
        x.view(shape),
        scale.reshape(-1),
        shift.reshape(-1),
        flat,
        torch.ones_like(flat),
        False,
        0.0,
        0.0,
        out=(y.view(shape), unused, unused),
    )
    return y


def _batch_norm_sums(grad: Tensor, values: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of batch norm's β and γ, each row of (rows, L) a channel."""
    one = torch.ones_like(mean)
    _, centred, plain = _aten.native_batch_norm_backward.default(
        grad.unsqueeze(0), values.unsqueeze(0), one, None, None, mean, one, True, 0.0, [False, True, True]
    )
    return plain, centred


def _column_moments(columns: Tensor) -> tuple[Tensor, Tensor]:
    if columns[0].numel() >= _SAMPLE:
        parts = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in _samples(columns)]
        return torch.stack([mean for mean, _ in parts]), torch.stack([variance for _, variance in parts])
    mean = columns.mean(1)
    return mean, torch.cat(
        [(columns[block] - mean[block].unsqueeze(1)).square_().mean(1) for block in _blocks(columns)]
    )


def _column_sums(grad: Tensor, columns: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    if columns[0].numel() >= _SAMPLE:
        one = torch.ones_like(mean[0])
        parts = [
            _aten.native_batch_norm_backward.default(
                dy, sample, one, None, None, centre, one, True, 0.0, [False, True, True]
            )
            for dy, sample, centre in zip(_samples(grad), _samples(columns), mean, strict=True)
        ]
        return torch.stack([part[2] for part in parts]), torch.stack([part[1] for part in parts])
    centred = [
        (columns[block] - mean[block].unsqueeze(1)).mul_(grad[block]).sum(1) for block in _blocks(columns)
    ]
    return grad.sum(1), torch.cat(centred)


def _samples(columns: Tensor) -> tuple[Tensor, ...]:
    """Views (1, C, L, 1) in channels_last, one for each sample of (N, L, C)."""
    samples: tuple[Tensor, ...] = columns.transpose(1, 2).unsqueeze(3).split(1)
    return samples
