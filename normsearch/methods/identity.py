"""No normalization: BatchNorm's eval function folded away into the layer that feeds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.upstream import fold_into, foldable, scale_and_shift, upstream_refusal
from normsearch.sites import NormSite


@dataclass(frozen=True)
class Identity(Method):
    """Fold BatchNorm into the convolution or linear layer before it and leave ``nn.Identity``.

    W' = s W, b' = s (b − μ) + β with s = γ / √(σ² + eps), as inference engines do.
    """

    name = "identity"
    title = "BatchNorm folding"
    citation = "Jacob et al., 2018, arXiv:1712.05877, section 3.2"
    batch_independent = True
    needs_producer = True

    @property
    def exact(self) -> bool:
        """The same function in fewer steps."""
        return True

    def leaves(self, site: NormSite) -> tuple[str, ...]:
        """Return nothing: the new layer has no numbers."""
        return ()

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse where the layer before cannot take the scale over."""
        refusal = upstream_refusal(self, site)
        if refusal is None and not foldable(site):
            assert site.producer is not None
            reason = f"it cannot be folded into {site.producer.path}: {site.producer.detail}"
            return self.refuse(site, reason, "choose frozen, which keeps the same function, or weight")
        return refusal

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return ``nn.Identity`` and the producer with the eval function in its weight and bias."""
        assert producer is not None
        return Built(nn.Identity(), fold_into(producer, old, *scale_and_shift(old)))
