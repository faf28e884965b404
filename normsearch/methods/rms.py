"""Root-mean-square normalization over a whole sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.methods.base import Built, Method, TrainedNorm
from normsearch.methods.group import affine_note
from normsearch.methods.running import check_input, make_affine, reset_affine
from normsearch.methods.upstream import foldable
from normsearch.methods.whitening import whitened, whitening_note
from normsearch.moments import normalize
from normsearch.sites import NormSite


class SampleRMSNorm(nn.Module):
    """Divide each sample by its root mean square over channels and space, then scale and shift per channel.

    y = γ_c x / √(mean(x²) + eps) + β_c, the mean over (C, *spatial). Not ``nn.RMSNorm``, which has no bias
    and normalizes the last dimensions.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to the mean square.
        affine: whether there are γ and β of shape (C,).
        device: of the parameters.
        dtype: of the parameters.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467.

    Example:
        >>> SampleRMSNorm(8)(torch.randn(2, 8, 4, 4)).square().mean((1, 2, 3)).round(decimals=3)
        tensor([1., 1.], grad_fn=<RoundBackward1>)

    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        make_affine(self, num_features, affine, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ to one and β to zero."""
        reset_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial) by the root mean square of each sample."""
        check_input(self, x, self.num_features)
        return normalize(x, self._rule)[0]

    def _rule(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = ((variance + mean.square()).mean(1, keepdim=True) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        # y = x·scale + β, written around the mean.
        shift = mean * scale
        return scale, shift if self.bias is None else shift + self.bias, None

    def extra_repr(self) -> str:
        """Print what torch's layers print."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


@dataclass(frozen=True)
class Rms(Method):
    """Divide each sample by its root mean square over channels and space; the mean is kept.

    Args:
        whiten: bring the input to mean 0 and variance 1 first, as ``group`` does.

    """

    name = "rms"
    title = "Root Mean Square Normalization"
    citation = "Zhang and Sennrich, 2019, arXiv:1910.07467"
    batch_independent = True

    whiten: bool = False

    @property
    def needs_producer(self) -> bool:
        """Whether a weight whitens."""
        return self.whiten

    def rewrites_producer(self, site: NormSite) -> bool:
        """Whether the weight before this site changes."""
        return self.whiten and foldable(site)

    @property
    def exact(self) -> bool:
        """Statistics of a sample replace those of the training set."""
        return False

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine is added, and where the input is whitened."""
        return (*affine_note(site), *([whitening_note(site)] if self.whiten else []))

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``SampleRMSNorm`` with σ_g² = mean(σ² + μ²) folded into γ and β."""
        old, white = whitened(site, old, producer) if self.whiten else (old, None)
        layer = SampleRMSNorm(old.channels, old.eps, affine=old.needs_affine, **old.factory)
        if old.needs_affine:
            mean, variance = old.statistics()
            old.fold(layer, torch.zeros_like(mean), (variance + mean.square()).mean())
        return Built(layer, white)
