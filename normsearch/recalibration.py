"""recalibrate: running statistics estimated anew from a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from normsearch.errors import ModelError
from normsearch.forward import copied, evaluating, refuse_meta, try_call
from normsearch.methods.batch_renorm import BatchRenorm
from normsearch.methods.running import RunningNorm
from normsearch.progress import OnProgress, Stage


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    in_place: bool = False,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Estimate running statistics anew: the pooled mean and variance of all that reaches each layer.

    Over all n values of a channel, of every call in every batch, μ = Σx / n and σ² = Σ(x − μ)² / (n − 1),
    accumulated in double precision; there is no moving average, so neither momentum (also 0 or None) nor
    the order or the sizes of the batches weigh in. During the pass every layer with running statistics
    normalizes by its batch, as in training, and everything else is in eval mode: the statistics of deep
    layers are those of the activations in training without dropout, as Precise BatchNorm has them. They
    would be those of eval mode too if each batch had the statistics of all.

    All layers with running statistics take part, whatever their training flag: BatchNorm of every class,
    ``batch_renorm`` (which normalizes plainly by the batch here), ``batch_instance``, ``switchable`` and
    ``weight(mean_only=true)``. ``frozen`` layers, layers that no batch reaches, and F.batch_norm calls
    outside a layer keep what they have. ``num_batches_tracked`` becomes the number of calls, the weight that
    a cumulative average (momentum None) goes on with. Synchronized layers pool over their process group.

    Args:
        model: the network; a copy is changed unless ``in_place``.
        batches: inputs, never labels: a tuple is ``*args``, a dict ``**kwargs``, anything else one argument.
            Batches should be as large as in training, and hold more than one value per channel.
        in_place: change the model itself. After a failure or an interruption it is as it was.
        on_progress: called after every batch.

    Returns:
        The model with its new statistics.

    Raises:
        ModelError: no layer has running statistics, there is no batch, the model fails or cannot be copied,
            or what reaches a layer is not finite.

    Source: Wu and Johnson, 2021, arXiv:2105.07576, section 3.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        >>> batches = [torch.randn(8, 3) + 5, torch.randn(2, 3) + 5]
        >>> recalibrated = normsearch.recalibrate(model, batches)
        >>> torch.allclose(recalibrated[0].running_mean, torch.cat(batches).mean(0))
        True

    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")
    if not _layers(model):
        raise ModelError(
            f"{type(model).__name__} has no layer with running statistics; there is nothing to estimate"
        )
    refuse_meta(model, "run it with")
    target = model if in_place else copied(model)
    pools = {layer: _Pool(path) for path, layer in _layers(target).items()}
    stage = Stage("estimating running statistics", length_hint(batches), on_progress)
    count = 0
    with _training(target, pools):
        for count, inputs in enumerate(batches, 1):
            _run(target, inputs)
            for pool in pools.values():
                pool.check(count)
            stage.advance()
        if not count:
            raise ModelError("recalibrate got no batch; give at least one input")
        for layer, pool in pools.items():
            pool.gather(layer)
    # Only numbers are copied from here on: nothing can fail in between.
    for layer, pool in pools.items():
        pool.write(layer)
    return target


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with running statistics by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm | RunningNorm) and isinstance(module.running_mean, Tensor)
    }


class _Pool:
    """Count, mean and sum of squared deviations per channel of everything that a layer was given."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._calls = 0
        self._count = 0
        self._mean = self._spread = torch.zeros(())

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add one call's input (N, C, *spatial)."""
        wide = x.detach().double()
        axes = (0, *range(2, x.dim()))
        count, mean = wide.numel() // wide.shape[1], wide.mean(axes)
        shape = (-1, *(1 for _ in x.shape[2:]))
        self._merge(count, mean, (wide - mean.reshape(shape)).square().sum(axes))
        self._calls += 1

    def _merge(self, count: int, mean: Tensor, spread: Tensor) -> None:
        if not self._count:
            self._count, self._mean, self._spread = count, mean, spread
            return
        total, apart = self._count + count, mean - self._mean
        self._spread = self._spread + spread + apart.square() * (self._count * count / total)
        self._mean = self._mean + apart * (count / total)
        self._count = total

    def check(self, batch: int) -> None:
        """Raise if the numbers so far are not finite."""
        if not (self._mean.isfinite().all() and self._spread.isfinite().all()):
            raise ModelError(
                f"what reaches {self._path or 'the model'} in batch {batch} is not finite; look for NaN or "
                "infinite values in the inputs, or weights that overflow"
            )

    def gather(self, layer: nn.Module) -> None:
        """Pool over the processes that a synchronized layer belongs to."""
        synchronized = isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "synchronized", False)
        if not (synchronized and dist.is_available() and dist.is_initialized()):
            return
        group = getattr(layer, "process_group", None)
        channels = _statistics(layer)[0].shape[0]
        own = torch.zeros(channels + 2, dtype=torch.float64, device=_statistics(layer)[0].device)
        if self._count:
            own = torch.cat([self._mean * self._count, own.new_tensor([self._count, self._calls])])
        dist.all_reduce(own, group=group)
        if not own[-1]:
            return
        mean = own[:-2] / own[-2]
        spread = torch.zeros_like(mean)
        if self._count:
            spread = self._spread + (self._mean - mean).square() * self._count
        dist.all_reduce(spread, group=group)
        self._count, self._mean, self._spread = int(own[-2]), mean, spread
        # Each process saw its own part of the same batches.
        self._calls = max(self._calls, 1)

    def write(self, layer: nn.Module) -> None:
        """Set a layer's statistics."""
        if not self._count:
            return
        mean, variance, tracked = _statistics(layer)
        mean.copy_(self._mean)
        if variance is not None and self._count > 1:
            variance.copy_(self._spread / (self._count - 1))
        if tracked is not None:
            tracked.fill_(self._calls)


def _statistics(layer: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean = layer.running_mean
    assert isinstance(mean, Tensor)
    variance, tracked = layer._buffers.get("running_var"), layer._buffers.get("num_batches_tracked")
    return mean, variance, tracked


@contextmanager
def _training(model: nn.Module, pools: dict[nn.Module, _Pool]) -> Iterator[None]:
    """Let layers normalize by the batch and fill their pools; restore modes and buffers, which that moves."""
    before = [
        (buffer, buffer.clone())
        for layer in pools
        for buffer in layer._buffers.values()
        if buffer is not None
    ]
    handles = []
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        try:
            for layer, pool in pools.items():
                layer.training = True
                if isinstance(layer, BatchRenorm):
                    # Before the warm-up its corrections, made from the old statistics, are off.
                    layer.renorm_step.zero_()
                handles.append(layer.register_forward_pre_hook(_Filling(pool), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for buffer, value in before:
                buffer.copy_(value)


class _Filling:
    """A forward pre-hook that adds a layer's input to its pool."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the first tensor that the layer is given."""
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self._pool.add(x)


def _run(model: nn.Module, inputs: Any) -> None:
    try:
        try_call(model, inputs)
    except ModelError as error:
        cause = error.__cause__
        if "more than 1 value per channel" not in str(cause):
            raise
        raise ModelError(
            f"{type(model).__name__} failed with {type(cause).__name__}: {cause}. Layers with running "
            "statistics were in train mode, which needs more than one value per channel: give larger batches"
        ) from cause
