"""Ghost batch normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError, ShapeError
from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.running import RunningNorm, Statistics, check_input
from normsearch.moments import ClosedRule, batch_moments, normalize, union_gradient
from normsearch.sites import NormSite


class GhostBatchNorm(RunningNorm):
    """Batch normalization of each chunk of the batch by itself: a large batch trains as small ones do.

    In training a batch of N is cut into ⌈N/size⌉ chunks whose sizes differ by one at most; each is
    normalized by its own statistics, and each moves the running statistics in turn, as if it had been a
    batch. In eval it is BatchNorm. Chunks are never shared between processes.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to the variance.
        momentum: step of the running statistics for each chunk; None means a cumulative average.
        affine: whether there are γ and β of shape (C,).
        track_running_stats: whether eval mode uses running statistics; else the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        size: most samples in a chunk.

    Raises:
        ShapeError: in training, a chunk with one value per channel.

    Source: Hoffer et al., 2017, arXiv:1705.08741.

    Example:
        >>> layer = GhostBatchNorm(8, size=4)
        >>> layer(torch.randn(10, 8, 5, 5)).shape, int(layer.num_batches_tracked)
        (torch.Size([10, 8, 5, 5]), 3)

    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        size: int = 32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.size = size
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        if not self.uses_batch:
            mean, variance = self.running()
            return nn.functional.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        elements = x.shape[2:].numel()
        if self.training and min(self._sizes(x.shape[0])) * elements == 1:
            raise ShapeError(
                f"GhostBatchNorm needs more than one value per channel in each chunk, got {tuple(x.shape)} "
                f"in chunks of at most {self.size}; use a larger batch or size, or group for this site"
            )
        y, chunks = normalize(x, _Chunks(self, self._sizes(x.shape[0])))
        for mean, variance, count in chunks:
            self.update(mean, variance, count * elements)
        return y

    def _sizes(self, samples: int) -> list[int]:
        """Return the sizes of the chunks; without running statistics, eval mode has one."""
        count = max(-(-samples // self.size), 1) if self.training else 1
        # Not divmod, which sizes that a graph leaves open do not know.
        least = samples // count
        larger = samples - least * count
        return [least + 1] * larger + [least] * (count - larger)

    def extra_repr(self) -> str:
        """Print what torch's layers print, and the size."""
        return f"{super().extra_repr()}, size={self.size}"


class _Chunks(ClosedRule):
    """Scale = γ/√(σ² + eps), shift = (m − μ)·scale + β by the chunk of each sample; hands back every chunk's.

    Args:
        layer: gives γ, β and eps.
        sizes: samples in each chunk, larger ones first.

    """

    def __init__(self, layer: GhostBatchNorm, sizes: list[int]) -> None:
        self.layer, self.sizes = layer, sizes
        self.parameters = (layer.weight, layer.bias)
        # Chunks of one size are one more dimension; others are left to autograd.
        self.closed = sizes[0] == sizes[-1]

    def __call__(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, list[Statistics]]:
        """Return scale, shift and the statistics of every chunk."""
        layer, sizes = self.layer, self.sizes
        chunks = [batch_moments(m, v) for m, v in zip(mean.split(sizes), variance.split(sizes), strict=True)]
        centres = torch.stack([of_mean for of_mean, _, _ in chunks])
        spreads = torch.stack([of_variance for _, of_variance, _ in chunks])
        self.inverse = (spreads + layer.eps).rsqrt()
        self.scale = layer.scaled(self.inverse)
        scale, centre = (
            torch.cat([row.expand(size, -1) for row, size in zip(part, sizes, strict=True)])
            for part in (self.scale, centres)
        )
        self.off = mean - centre
        return scale, layer.shifted(self.off * scale), chunks

    def gradient(
        self, of_scale: Tensor, of_shift: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the gradients of the moments, γ and β."""
        shape = (len(self.sizes), self.sizes[0], of_shift.shape[1])
        of_mean, of_variance, through, shift = union_gradient(
            of_scale.view(shape),
            of_shift.view(shape),
            self.off.view(shape),
            self.scale.unsqueeze(1),
            self.inverse.unsqueeze(1),
            dim=1,
        )
        affine = self.layer.of_affine(through[:, 0] * self.inverse, shift[:, 0])
        return of_mean.flatten(0, 1), of_variance.expand(shape).reshape(of_shift.shape), affine


@dataclass(frozen=True)
class Ghost(Method):
    """Normalize chunks of the batch by themselves, so that a large batch regularizes as a small one does.

    Args:
        size: most samples in a chunk; smaller batches are one chunk, as in BatchNorm.

    """

    name = "ghost"
    title = "Ghost Batch Normalization"
    citation = "Hoffer et al., 2017, arXiv:1705.08741"
    batch_independent = False
    carries_parameters = True
    carries_statistics = True

    size: int = 32

    def validate(self) -> None:
        """Check the size."""
        if self.size < 1:
            raise MethodError(f"ghost(size={self.size}): size must be at least 1")

    @property
    def exact(self) -> bool:
        """In eval mode it is BatchNorm."""
        return True

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse where the batch size, and with it the number of chunks, is open."""
        if not site.open_batch:
            return None
        return self.refuse(
            site,
            "the number of chunks depends on the batch size, which the exported program leaves open",
            "export the model with a fixed batch size, or choose batch_renorm",
        )

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say that chunks are local where BatchNorm was synchronized."""
        return ("no longer synchronized: chunks stay inside each process",) if site.kind == "sync" else ()

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``GhostBatchNorm`` with the trained numbers."""
        layer = GhostBatchNorm(
            old.channels,
            old.eps,
            old.momentum,
            old.has_affine,
            site.track_running_stats,
            **old.factory,
            size=self.size,
        )
        layer.take_over(old)
        layer.synchronized, layer.process_group = False, None
        return Built(layer)
