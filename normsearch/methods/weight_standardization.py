"""Weight standardization of the layer that feeds a normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normsearch.reparametrization import Reparametrized, per_output, rows, smallest


class StandardizedWeight(Reparametrized):
    """A convolution or linear layer with weight g_c (v_c − mean v_c) / std v_c + o_c per output channel c.

    Mean and standard deviation are those of a channel's own filter. The papers have neither gain nor offset
    (Brock et al., 2021, have the gain): both are there because a trained layer's filters have a scale and a
    mean, and are learned from there on. A constant filter stays constant.

    Source: Qiao et al., 2019, arXiv:1903.10520; Kolesnikov et al., 2020, arXiv:1912.11370.
    """

    prefix = "Standardized"

    weight_v: Tensor
    weight_gain: Tensor
    weight_offset: Tensor

    @property
    def weight(self) -> Tensor:
        """G (v − mean v) / std v + o."""
        v = self.weight_v
        matrix = rows(v, self)
        mean = matrix.mean(1)
        # The square root of a clamped sum has a gradient at zero.
        variance = (matrix - mean[:, None]).square().mean(1).clamp_min(smallest(v) ** 2)
        gain, offset = self.weight_gain / variance.sqrt(), self.weight_offset
        return (v - per_output(mean, self, v)) * per_output(gain, self, v) + per_output(offset, self, v)

    @classmethod
    @torch.no_grad()
    def standardized(cls, layer: nn.Module) -> StandardizedWeight:
        """Return ``layer`` with v its weight, and the mean and deviation of each filter as o and g."""
        new = cls.of(layer)
        v = layer.get_parameter("weight")
        matrix = rows(v.detach().double(), layer)
        new.register_parameter("weight_v", v)
        for name, value in (
            ("weight_gain", matrix.std(1, correction=0)),
            ("weight_offset", matrix.mean(1)),
        ):
            new.register_parameter(name, nn.Parameter(value.to(v.dtype), requires_grad=v.requires_grad))
        return new
