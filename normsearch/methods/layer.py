"""Layer normalization: over the whole sample, or over the channels of each position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.group import affine_note, build_group_norm, group_statistics
from normsearch.methods.running import check_input, make_affine, reset_affine
from normsearch.methods.upstream import foldable
from normsearch.methods.whitening import whitened, whitening_note
from normsearch.sites import NormSite


class ChannelLayerNorm(nn.Module):
    """Layer normalization over the channels of each position, as in ConvNeXt.

    y = γ_c (x − μ) / √(σ² + eps) + β_c with μ, σ² over C at each (n, *spatial).

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to the variance.
        affine: whether there are γ and β of shape (C,).
        device: of the parameters.
        dtype: of the parameters.

    Source: Liu et al., 2022, arXiv:2201.03545.

    Example:
        >>> ChannelLayerNorm(8)(torch.randn(2, 8, 4, 4)).mean(1).abs().max() < 1e-5
        tensor(True)

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
        """Normalize (N, C, *spatial) over C."""
        check_input(self, x, self.num_features)
        rows = x.movedim(1, -1)
        # torch's kernel wants one dtype; half inputs meet single-precision parameters under autocast.
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.layer_norm(rows, (self.num_features,), weight, bias, self.eps).movedim(-1, 1).to(x.dtype)
        # The layout stays: Opacus reads a following convolution's input as contiguous.
        return y.contiguous() if x.is_contiguous() else y

    def extra_repr(self) -> str:
        """Print what torch's layers print."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


@dataclass(frozen=True)
class Layer(Method):
    """Normalize each sample over all its features; torch's ``nn.GroupNorm`` with one group.

    On sequences (N, C, T) the statistics run over time too, so it is not causal; ``layer(axes=channel)`` is.

    Args:
        axes: ``all`` for (C, *spatial), ``channel`` for C at each position.
        whiten: bring the input to mean 0 and variance 1 first, as ``group`` does.

    """

    name = "layer"
    title = "Layer Normalization"
    citation = "Ba et al., 2016, arXiv:1607.06450"
    batch_independent = True

    axes: Literal["all", "channel"] = "all"
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

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse a single element."""
        elements = 1 if self.axes == "channel" else site.fewest_elements
        if site.channels == 1 and elements == 1:
            return self.refuse(
                site, "one channel leaves one element to normalize over", "choose frozen or batch_renorm"
            )
        return None

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine is added and where calibration is needed."""
        found = [*affine_note(site), *([whitening_note(site)] if self.whiten else [])]
        if self.axes == "channel":
            found.append("folded as if channels were uncorrelated: calibrate")
        return tuple(found)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return an ``nn.GroupNorm`` of one group, or a ``ChannelLayerNorm``, with the statistics folded."""
        old, white = whitened(site, old, producer) if self.whiten else (old, None)
        if self.axes == "all":
            return Built(build_group_norm(site, old, 1, str(self)), white)
        layer = ChannelLayerNorm(old.channels, old.eps, affine=old.needs_affine, **old.factory)
        if old.needs_affine:
            old.fold(layer, *group_statistics(old, 1))
        return Built(layer, white)
