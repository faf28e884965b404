"""Switchable normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError
from normsearch.methods.base import Built, Method, TrainedNorm
from normsearch.methods.group import affine_note, group_statistics
from normsearch.methods.mixture import Mixture
from normsearch.methods.running import RunningNorm, check_input
from normsearch.moments import normalize
from normsearch.passes import wide_dtype
from normsearch.sites import NormSite

#: Order of the logits, as in the authors' code.
INSTANCE, LAYER, BATCH = range(3)

#: From this logit on the other parts weigh less than 1e-17: nothing, even where a sample's variance is a
#: million times the running one.
_EXACT_LOGIT = 40.0


class SwitchableNorm(RunningNorm):
    """A learned mixture of the statistics of instance, layer and batch normalization.

    y = γ (x − Σ w_k μ_k) / √(Σ w'_k σ²_k + eps) + β over k = IN, LN, BN with two softmaxes w, w' of three
    logits each (order IN, LN, BN), equal at the start. BN's part uses the batch in training and the running
    statistics in eval. Where a map has one element, or the input is (N, C), IN's mean is x itself and its
    variance 0. The logits learn best at ten times the learning rate and without weight decay.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to the mixed variance.
        momentum: step of the running statistics; None means a cumulative average.
        affine: whether there are γ and β of shape (C,).
        track_running_stats: whether eval mode uses running statistics; else the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Source: Luo et al., 2018, arXiv:1806.10779 and arXiv:1811.07727.

    Example:
        >>> layer = SwitchableNorm(8)
        >>> layer(torch.randn(4, 8, 5, 5)).shape, layer.mean_logits.softmax(0).detach()
        (torch.Size([4, 8, 5, 5]), tensor([0.3333, 0.3333, 0.3333]))

    """

    gates = ("mean_logits", "var_logits")

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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.mean_logits = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.var_logits = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the statistics, γ and β, and make the three parts equal."""
        super().reset_parameters()
        nn.init.zeros_(self.mean_logits)
        nn.init.zeros_(self.var_logits)

    def mixtures(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights of IN, LN and BN in the mean and in the variance, shape (2, 3)."""
        return torch.stack([self.mean_logits, self.var_logits]).to(dtype).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        y, statistics = normalize(x, Mixture(self, self.mixtures(wide_dtype(x.dtype))))
        if statistics is not None:
            mean, variance, count = statistics
            self.update(mean, variance, count * x.shape[2:].numel())
        return y


@dataclass(frozen=True)
class Switchable(Method):
    """Learn per layer how much of instance, layer and batch statistics to use.

    Args:
        bn_logit: where the BatchNorm logits start in a trained network (the others at 0). 3 gives
            BatchNorm 91 % and learns; 40 and more is exact in trained layers with running statistics,
            but its softmax no longer moves.

    """

    name = "switchable"
    title = "Switchable Normalization"
    citation = "Luo et al., 2018, arXiv:1806.10779"
    batch_independent = False
    carries_statistics = True

    bn_logit: float = 3.0

    def validate(self) -> None:
        """Check the logit."""
        if not -100 <= self.bn_logit <= 100:
            raise MethodError(f"{self}: bn_logit must lie between -100 and 100")

    @property
    def exact(self) -> bool:
        """Only where the BatchNorm logit leaves nothing to the others."""
        return self.bn_logit >= _EXACT_LOGIT

    def exact_at(self, site: NormSite) -> bool:
        """Only in a trained layer with running statistics: in others the parts start equal."""
        return super().exact_at(site) and site.track_running_stats and site.trained is not False

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine is added, and where BatchNorm does not lead."""
        if not site.track_running_stats:
            return ("no running statistics: the three parts start equal, whatever bn_logit is",)
        if self.exact and site.trained is False:
            return ("untrained: the three parts start equal, whatever bn_logit is",)
        return affine_note(site)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``SwitchableNorm`` with the expected mixture of running statistics folded."""
        layer = SwitchableNorm(
            old.channels, old.eps, old.momentum, old.needs_affine, site.track_running_stats, **old.factory
        )
        layer.take_over(old)
        if old.trained:
            # On the CPU, also inside of torch.device("meta"): a share is read from them.
            logits = torch.zeros(3, dtype=torch.float64, device="cpu")
            logits[BATCH] = self.bn_logit + (_excess(old) if self.exact else 0.0)
            layer.mean_logits.copy_(logits)
            layer.var_logits.copy_(logits)
            old.fold(layer, *expected_mixture(old, float(logits.softmax(0)[LAYER])))
        for logits_parameter in (layer.mean_logits, layer.var_logits):
            logits_parameter.requires_grad_(old.trainable)
        return Built(layer)


def expected_mixture(old: TrainedNorm, share: float) -> tuple[Tensor, Tensor]:
    """Return the moments to expect where LN weighs ``share`` and IN's and BN's are the running ones."""
    mean, variance = (
        (1 - share) * own + share * whole
        for own, whole in zip(old.statistics(), group_statistics(old, 1), strict=True)
    )
    return mean, variance


def _excess(old: TrainedNorm) -> float:
    """Return the logarithm of how far LN's statistics exceed those of the quietest channel.

    Added to the logit, it leaves LN's part as small where channels differ by orders of magnitude.
    """
    own, (centre, spread) = old.statistics(), group_statistics(old, 1)
    variance = own[1] + old.eps
    ratio = torch.maximum((spread + old.eps) / variance, (centre - own[0]).abs() / variance.sqrt())
    # On the meta device there are no numbers to compare, and none to keep small.
    return 0.0 if ratio.is_meta else float(ratio.max().clamp_min(1).log())
