"""Models without numbers, and what is built while the meta device is the default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import images, pair
from torch import nn

import normsearch
from normsearch import METHODS, ModelError, convert

torch.set_num_threads(1)

USES: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "compare": lambda model, batches: normsearch.compare(model, pair().eval(), batches),
    "compare with": lambda model, batches: normsearch.compare(pair().eval(), model, batches),
    "sensitivity": lambda model, batches: normsearch.sensitivity(model, ["group"], batches),
    "calibrate": lambda model, batches: normsearch.calibrate(convert(model, "group"), model, batches),
    "recalibrate": normsearch.recalibrate,
    "operator_norms": lambda model, batches: normsearch.operator_norms(model, batches[0]),
    "finetune": lambda model, batches: normsearch.finetune(
        model,
        [(batch, torch.zeros(4).long()) for batch in batches],
        loss=nn.functional.cross_entropy,
        steps=1,
        lr=0.1,
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_needs_numbers_says_that_there_are_none(use: str, device: str) -> None:
    batches = [images().to(device), images().to(device)]
    with pytest.raises(ModelError, match=r"^0\.weight is on the meta device: it has no numbers to .*; load"):
        USES[use](pair().eval().to("meta"), batches)


def test_inputs_without_numbers_are_named() -> None:
    batches = [images().to("meta"), images().to("meta")]
    with pytest.raises(ModelError, match="batch 1 is on the meta device"):
        normsearch.calibrate(convert(pair(), "group"), pair(), batches)


@pytest.mark.parametrize("method", METHODS)
def test_a_default_device_changes_nothing(method: str) -> None:
    model = pair().eval()
    with torch.device("meta"):
        converted = convert(model, method)
    assert torch.equal(converted(images()), convert(model, method)(images()))
