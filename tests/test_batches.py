"""What a batch may be, and what is said of one that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import images, pair
from torch.utils.data import DataLoader, TensorDataset

from normsearch import ModelError, calibrate, compare, convert, plan, recalibrate, sensitivity

torch.set_num_threads(1)

USES: dict[str, Callable[[Any], Any]] = {
    "plan": lambda loader: plan(pair(), "group", inputs=next(iter(loader))),
    "compare": lambda loader: compare(pair().eval(), convert(pair(), "group").eval(), loader),
    "calibrate": lambda loader: calibrate(convert(pair(), "group"), pair(), loader, budget=2),
    "sensitivity": lambda loader: sensitivity(pair().eval(), ["group"], loader),
    "recalibrate": lambda loader: recalibrate(pair(), loader),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("labels", [(), (torch.zeros(4),)])
def test_lists_of_a_tensor_dataset_are_named_with_the_way_out(use: str, labels: tuple[Any, ...]) -> None:
    loader = DataLoader(TensorDataset(images(), *labels), batch_size=2)
    with pytest.raises(ModelError) as caught:
        USES[use](loader)
    said = str(caught.value)
    assert f"failed on a list of {1 + len(labels)} as its one argument" in said
    assert "a DataLoader yields lists: give [batch[0] for batch in loader]" in said
    assert "larger batches" not in said
    USES[use]([batch[0] for batch in loader])
