"""Networks that compute parts of themselves again in the backward pass."""

from __future__ import annotations

import pytest
import torch
from small_networks import images, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normsearch import ModelError, calibrate, convert

torch.set_num_threads(1)


class Checkpointed(nn.Module):
    """Keeps nothing of its body for the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.body, self.reentrant = nn.Conv2d(3, 3, 1), pair(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def calibrated(reentrant: bool | None) -> dict[str, Tensor]:
    """Return the numbers of a network after gradient steps on all of its weights."""
    torch.manual_seed(0)
    model = Checkpointed(reentrant).eval()
    batches = [images() * scale for scale in (1.0, 0.5, 2.0, 1.5)]
    result = calibrate(convert(model, "group"), model, batches, budget=8)
    return result.state_dict()


def test_calibration_trains_a_checkpointed_network_as_any_other() -> None:
    expected, found = calibrated(None), calibrated(False)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"use_reentrant=True.* switch checkpointing off"):
        calibrated(True)
