"""Sparse switchable normalization: a mixture that ends as one of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError
from normsearch.methods.base import Built, Method, TrainedNorm
from normsearch.methods.group import affine_note
from normsearch.methods.mixture import Mixture
from normsearch.methods.running import RunningNorm, check_input, held
from normsearch.methods.switchable import BATCH, LAYER, expected_mixture
from normsearch.moments import is_differentiated_otherwise, normalize
from normsearch.passes import wide_dtype
from normsearch.sites import NormSite

#: Distance of the triangle's corners, and of the middles of its edges, from its centre (⅓, ⅓, ⅓).
CORNER, EDGE = math.sqrt(2 / 3), math.sqrt(1 / 6)

#: BatchNorm's share at the start in a trained network, as much as ``switchable`` gives it.
_BATCH_SHARE = 0.9


def sparsemax(logits: Tensor) -> Tensor:
    """Return the point of the simplex p ≥ 0, Σp = 1 that is closest to three logits.

    Args:
        logits: shape (..., 3).

    Source: Martins and Astudillo, 2016, arXiv:1602.02068.

    Example:
        >>> sparsemax(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.2500, 0.7500])

    """
    total, most, least = (part(logits, -1, keepdim=True) for part in (torch.sum, torch.amax, torch.amin))
    # The threshold is the largest of those that one, two and three survivors would have.
    threshold = torch.maximum(torch.maximum(most - 1, (total - least - 1) / 2), (total - 1) / 3)
    return (logits - threshold).clamp_min(0)


def sparsestmax(logits: Tensor, radius: Tensor) -> Tensor:
    """Return the points of the simplex of three closest to ``logits`` and ``radius`` from its centre.

    At radius 0 this is sparsemax, at √(2/3) the corner of the largest logit; in between it leads from one to
    the other, first outwards to the circle, then along the edge that the circle crosses.

    Args:
        logits: shape (..., 3). Of equal ones the last leads: BatchNorm's, then LN's.
        radius: a scalar from 0 to √(2/3).

    Source: Shao et al., 2019, arXiv:1903.03793.

    Example:
        >>> logits = torch.tensor([0.2, 0.3, 0.5])
        >>> [sparsestmax(logits, torch.tensor(r)) for r in (0.0, CORNER)]
        [tensor([0.2000, 0.3000, 0.5000]), tensor([0., 0., 1.])]

    """
    if is_differentiated_otherwise(logits):
        return _sparsestmax(logits, radius)[0]
    p: Tensor = _Sparsestmax.apply(logits, radius)
    return p


class _Sparsestmax(torch.autograd.Function):
    """``sparsestmax`` with its Jacobian written out: autograd takes longer than a small layer."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, radius: Tensor) -> Tensor:
        p, sparse, direction, growth = _sparsestmax(logits, radius)
        ctx.save_for_backward(logits, radius, sparse > 0, direction, growth)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, radius, support, direction, growth = ctx.saved_tensors
        if torch.is_grad_enabled():
            p = _sparsestmax(logits, radius)[0]
            return torch.autograd.grad(p, logits, grad, create_graph=True)[0], None
        # Along the circle: what points outwards is lost. Then sparsemax's: the mean over what survives is.
        across = (grad - direction * (direction * grad).sum(-1, keepdim=True)) * growth * support
        mean = across.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return (across - mean) * support, None


def _sparsestmax(logits: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the points, sparsemax's, the unit vectors in which these were moved, and by how much they grew.

    Where nothing was moved the vector is 0 and the growth 1; where the point is fixed the growth is 0.
    """
    centre, tiny = 1 / 3, torch.finfo(logits.dtype).eps
    places = torch.arange(3, device=logits.device)
    corner = (places == 2 - logits.flip(-1).argmax(-1, keepdim=True)).to(logits.dtype)
    p = sparsemax(logits)
    # At the very centre all directions are as good: a push towards the corner decides.
    away = p - centre + tiny * (corner - centre)
    distance = torch.linalg.vector_norm(away, dim=-1, keepdim=True)
    growth = radius / distance
    moved = growth > 1
    outwards = torch.where(moved, centre + away * growth, p)
    lowest = outwards.amin(-1, keepdim=True)
    # Outside the triangle: on the edge q = (½ + t, ½ − t, 0), whose distance is √(1/6 + 2t²). There, and in
    # the corner, only a change of the leading logits moves anything.
    t = ((radius.square() - EDGE**2) / 2).clamp_min(0).sqrt()
    edge = torch.where(outwards > lowest, 0.5 - t, 0.0) * (1 - corner) + (0.5 + t) * corner
    fixed = torch.where(radius < CORNER * (1 - tiny), edge, corner).detach()
    is_fixed = (lowest < 0) | (radius >= CORNER * (1 - tiny))
    return (
        torch.where(is_fixed, fixed, outwards),
        p,
        torch.where(moved, away / distance, 0.0),
        torch.where(moved, growth, 1.0).masked_fill(is_fixed, 0.0),
    )


class SparseSwitchableNorm(RunningNorm):
    """A learned mixture of instance, layer and batch statistics that ends as one of them.

    y = γ (x − Σ w_k μ_k) / √(Σ w'_k σ²_k + eps) + β over k = IN, LN, BN with w, w' from three logits each by
    sparsestmax, equal at the start. In training the radius grows from 0 to √(2/3) over ``steps`` steps; from
    there on both mixtures are one-hot. BN's part uses the batch in training and the running statistics in
    eval. Where a map has one element, or the input is (N, C), IN's mean is x itself and its variance 0. The
    logits learn best at ten times the learning rate and without weight decay.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to the mixed variance.
        momentum: step of the running statistics; None means a cumulative average.
        affine: whether there are γ and β of shape (C,).
        track_running_stats: whether eval mode uses running statistics; else the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        steps: training steps until the mixtures are one-hot.

    Source: Shao et al., 2019, arXiv:1903.03793.

    Example:
        >>> layer = SparseSwitchableNorm(8, steps=1)
        >>> layer(torch.randn(4, 8, 5, 5)).shape, [w.tolist() for w in layer.mixtures()]
        (torch.Size([4, 8, 5, 5]), [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])

    """

    gates = ("mean_logits", "var_logits")

    sparse_step: Tensor

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
        steps: int = 10_000,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.steps = steps
        self.mean_logits = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.var_logits = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.register_buffer("sparse_step", torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the statistics, γ, β and the schedule, and make the three parts equal."""
        super().reset_parameters()
        self.sparse_step.zero_()
        nn.init.zeros_(self.mean_logits)
        nn.init.zeros_(self.var_logits)

    def radius(self) -> Tensor:
        """Return the least distance of the mixtures from equal parts at the current step."""
        return CORNER * (self.sparse_step.double() / self.steps).clamp_max(1)

    def mixtures(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights of IN, LN and BN in the mean and in the variance, shape (2, 3)."""
        logits = torch.stack([self.mean_logits, self.var_logits]).to(dtype)
        return sparsestmax(logits, held(self.radius().to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        y, statistics = normalize(x, Mixture(self, self.mixtures(wide_dtype(x.dtype))))
        if statistics is not None:
            mean, variance, count = statistics
            self.update(mean, variance, count * x.shape[2:].numel())
        if self.training:
            self.sparse_step.add_(1)
        return y

    def extra_repr(self) -> str:
        """Print what torch's layers print, and the schedule."""
        return f"{super().extra_repr()}, steps={self.steps}"


@dataclass(frozen=True)
class SparseSwitchable(Method):
    """Learn per layer which one of instance, layer and batch statistics to use, and choose by the end.

    A trained BatchNorm starts with BatchNorm at 90 %, as ``switchable`` does.

    Args:
        steps: training steps until every layer has chosen.

    """

    name = "sparse_switchable"
    title = "Sparse Switchable Normalization"
    citation = "Shao et al., 2019, arXiv:1903.03793"
    batch_independent = False
    carries_statistics = True

    steps: int = 10_000

    def validate(self) -> None:
        """Check the number of steps."""
        if self.steps < 1:
            raise MethodError(f"sparse_switchable(steps={self.steps}): steps must be at least 1")

    @property
    def exact(self) -> bool:
        """The other parts weigh something at the start."""
        return False

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine is added, and where BatchNorm does not lead."""
        if not site.track_running_stats:
            return ("no running statistics: the three parts start equal",)
        return affine_note(site)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``SparseSwitchableNorm`` with the expected mixture of running statistics folded."""
        layer = SparseSwitchableNorm(
            old.channels,
            old.eps,
            old.momentum,
            old.needs_affine,
            site.track_running_stats,
            **old.factory,
            steps=self.steps,
        )
        layer.take_over(old)
        if old.trained:
            # On the simplex sparsemax is the identity: the logits are the weights themselves.
            weights = torch.full((3,), (1 - _BATCH_SHARE) / 2, dtype=torch.float64, device="cpu")
            weights[BATCH] = _BATCH_SHARE
            layer.mean_logits.copy_(weights)
            layer.var_logits.copy_(weights)
            old.fold(layer, *expected_mixture(old, float(weights[LAYER])))
        for logits in (layer.mean_logits, layer.var_logits):
            logits.requires_grad_(old.trainable)
        return Built(layer)
