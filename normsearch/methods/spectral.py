"""Spectral normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.upstream import (
    affine_at_site,
    fold_into,
    foldable,
    folded_bias,
    scale_and_shift,
    upstream_notes,
    upstream_refusal,
)
from normsearch.moments import without_gradients
from normsearch.reparametrization import Reparametrized, per_output, rows, smallest
from normsearch.sites import NormSite


class SpectralNorm(Reparametrized):
    """A convolution or linear layer with weight gain_c W_c / σ(W), σ the largest singular value.

    W is seen as a matrix with one row per output channel. σ = uᵀ W v is followed by one power iteration at
    each use in train mode; u and v are buffers, fixed in eval mode. ``eval()`` after training makes them the
    leading singular vectors, since one iteration per step lags behind a weight that moves. Without gain, the
    weight's largest singular value is then one.

    Source: Miyato et al., 2018, arXiv:1802.05957.
    """

    prefix = "SpectralNorm"

    weight_orig: Tensor
    gain: Tensor | None
    left: Tensor
    right: Tensor

    @property
    def weight(self) -> Tensor:
        """Gain · W / σ(W)."""
        matrix = rows(self.weight_orig, self)
        if self.training:
            # Detached: a graph of operators does not know where gradients were switched off.
            self._iterate(matrix.detach())
        # Copies, so that the next power iteration does not change what backward needs.
        left, right = self.left.clone(), self.right.clone()
        # Operators: a compiler does not always know torch.mv.
        sigma = (left @ (matrix @ right)).clamp_min(smallest(matrix))
        if self.gain is None:
            return self.weight_orig / sigma
        return self.weight_orig * per_output(self.gain / sigma, self, self.weight_orig)

    def train(self, mode: bool = True) -> Self:
        """Switch modes; from train to eval, find the largest singular value exactly."""
        if self.training and not mode:
            self._settle()
        return super().train(mode)

    def _iterate(self, matrix: Tensor) -> None:
        with without_gradients():
            self.right.copy_(F.normalize(matrix.t() @ self.left, dim=0, eps=smallest(matrix)))
            self.left.copy_(F.normalize(matrix @ self.right, dim=0, eps=smallest(matrix)))

    @torch.no_grad()
    def _settle(self) -> None:
        """Make u and v the leading singular vectors, by the smaller of W Wᵀ and Wᵀ W."""
        matrix = rows(self.weight_orig, self)
        # Without numbers, or with NaN among them, there is nothing to find.
        if matrix.is_meta:
            return
        largest = float(torch.stack(matrix.aminmax()).abs().max())
        if not math.isfinite(largest):
            return
        wide = matrix.shape[0] <= matrix.shape[1]
        small = (matrix if wide else matrix.t()).to(torch.promote_types(matrix.dtype, torch.float32))
        if not _TAME[0] < largest < _TAME[1]:
            # Products of its largest numbers must be numbers.
            small = small / max(largest, smallest(small))
        leading = _leading((small @ small.t()).double(), torch.finfo(small.dtype).eps).to(small.dtype)
        other = F.normalize(small.t() @ leading, dim=0, eps=smallest(small))
        for buffer, vector in zip(
            (self.left, self.right), (leading, other)[:: 1 if wide else -1], strict=True
        ):
            buffer.copy_(vector)

    @classmethod
    def normalized(cls, layer: nn.Module, scale: Tensor | None, *, gain: bool) -> SpectralNorm:
        """Return ``layer`` with its weight normalized; the gain makes up for σ, times ``scale``.

        Args:
            layer: a convolution or linear layer.
            scale: what its outputs are to be scaled by, shape (C,); None for one.
            gain: whether there is a gain; without, the weight just becomes W / σ(W).

        """
        new = cls.of(layer)
        weight = layer.get_parameter("weight")
        matrix = rows(weight.detach(), layer)
        new.register_parameter("weight_orig", weight)
        new.register_parameter("gain", None)
        new.register_buffer("left", torch.zeros_like(matrix[:, 0]))
        new.register_buffer("right", torch.zeros_like(matrix[0]))
        new._settle()
        if gain:
            sigma = (new.left @ (matrix @ new.right)).clamp_min(smallest(matrix))
            value = sigma.double() * (torch.ones_like(new.left).double() if scale is None else scale)
            new.register_parameter(
                "gain", nn.Parameter(value.to(weight.dtype), requires_grad=weight.requires_grad)
            )
        return new

    def sigma(self) -> Tensor:
        """Return the current estimate of the largest singular value of the weight before division."""
        sigma: Tensor = self.left @ (rows(self.weight_orig, self) @ self.right)
        return sigma


#: From this size on a few products with a matrix take less than all its eigenvectors, and at most so many.
_LARGE, _STEPS = 192, 256
#: Between these, squares of a weight's largest number and sums of them are safe in single precision.
_TAME = (1e-9, 1e9)


def _leading(gram: Tensor, precision: float) -> Tensor:
    """Return the eigenvector of the largest eigenvalue of a Gram matrix in double precision.

    By Lanczos' method with full orthogonalization, whose residual is known; by all eigenvectors where the
    matrix is small or that does not settle. The eigenvalue is off by far less than ``precision``.

    Args:
        gram: the matrix.
        precision: how far the vector times the matrix may be from a multiple of itself, relative to the
            largest eigenvalue, from 1e-9 on.

    Source: Golub and Van Loan, Matrix Computations, 2013, section 10.1.

    """
    size = len(gram)
    leading: Tensor
    if size < _LARGE:
        leading = torch.linalg.eigh(gram).eigenvectors[:, -1]
        return leading
    # Always the same start, and none that a matrix is likely to be orthogonal to, as ones would be.
    start = torch.randn(size, dtype=gram.dtype, generator=torch.Generator().manual_seed(0)).to(gram.device)
    basis = gram.new_empty(min(size, _STEPS), size)
    basis[0] = start / torch.linalg.vector_norm(start)
    diagonal, beside, check = gram.new_empty(len(basis)), gram.new_empty(len(basis)), 16
    for step in range(len(basis)):
        known, product = basis[: step + 1], gram @ basis[step]
        diagonal[step] = basis[step] @ product
        # Twice is enough: what the first pass leaves is rounding.
        for _ in range(2):
            product = product - known.t() @ (known @ product)
        beside[step] = torch.linalg.vector_norm(product)
        last = step + 1 == len(basis)
        if last or step + 1 == check or not beside[step] > 0:
            check = check * 3 // 2
            inside = diagonal[: step + 1].diag() + beside[:step].diag(1) + beside[:step].diag(-1)
            values, vectors = torch.linalg.eigh(inside)
            if beside[step] * vectors[-1, -1].abs() <= max(precision, 1e-9) * values[-1]:
                leading = known.t() @ vectors[:, -1]
                return leading
        if last:
            break
        basis[step + 1] = product / beside[step]
    leading = torch.linalg.eigh(gram).eigenvectors[:, -1]
    return leading


@dataclass(frozen=True)
class Spectral(Method):
    """Divide the weight of the layer that feeds the site by its largest singular value.

    With a learned gain per channel the trained function is kept exactly. ``gain=fixed`` leaves the gain at
    one: each layer's matrix has norm one and a k×k convolution of stride 1 norm at most √(kh·kw), which is
    what a GAN's discriminator wants; a trained network keeps its function up to a scale per layer only.

    Args:
        gain: ``learned`` or ``fixed``.

    """

    name = "spectral"
    title = "Spectral Normalization"
    citation = "Miyato et al., 2018, arXiv:1802.05957"
    batch_independent = True
    needs_producer = True
    of_weights = True

    gain: Literal["learned", "fixed"] = "learned"

    @property
    def exact(self) -> bool:
        """The gain makes up for the division."""
        return self.gain == "learned"

    def leaves(self, site: NormSite) -> tuple[str, ...]:
        """Return what of BatchNorm's numbers is still at the site: none where it is ``nn.Identity``."""
        return () if foldable(site) else super().leaves(site)

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse without statistics or weight upstream, and gain=fixed where a scale must stay behind."""
        refusal = upstream_refusal(self, site)
        if refusal is None and not self.exact and site.kind != "weight" and not foldable(site):
            assert site.producer is not None
            reason = (
                f"BatchNorm's scale cannot be folded into {site.producer.path} "
                f"({site.producer.detail}) and would be unbounded at the site"
            )
            return self.refuse(site, reason, "choose spectral with its learned gain")
        return refusal

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say why an affine stays at the site."""
        return upstream_notes(site)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return what stays at the site and the producer with its weight normalized."""
        if site.kind == "weight":
            assert producer is not None
            return Built(SpectralNorm.normalized(producer, None, gain=self.exact))
        if producer is None or not foldable(site):
            upstream = None if producer is None else SpectralNorm.normalized(producer, None, gain=True)
            return Built(affine_at_site(old), upstream)
        scale, shift = scale_and_shift(old)
        if self.exact:
            normalized = SpectralNorm.normalized(producer, scale, gain=True)
            assert normalized.gain is not None
            if old.weight is not None:
                normalized.gain.requires_grad_(old.weight.requires_grad)
            normalized.register_parameter("bias", folded_bias(producer, old, scale, shift))
            return Built(nn.Identity(), normalized)
        # Fold first, so that the directions of the outputs stay and only their length changes.
        folded = fold_into(producer, old, scale, shift)
        normalized = SpectralNorm.normalized(folded, None, gain=False)
        sigma = normalized.sigma()
        normalized.get_parameter("bias").div_(sigma.clamp_min(smallest(sigma)))
        return Built(nn.Identity(), normalized)
