"""A resident model takes plans on and off again; what plans cost."""

from __future__ import annotations

import pytest
import timm
import torch
from searched import INPUTS, SPACE, assert_same, network, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import normsearch
from normsearch.errors import SearchError
from normsearch.searching import (
    Resident,
    measure_costs,
)
from normsearch.searching.space import METHODS

MORE = [*METHODS, "weight", "weight(mean_only=true)", "spectral", "filter_response", "evonorm_s0", "frozen"]


@pytest.mark.parametrize("method", MORE)
@pytest.mark.parametrize("name", ["net", "resnet10t", "tinynet_e"])
def test_resident_is_what_convert_gives_and_then_itself_again(method: str, name: str) -> None:
    torch.manual_seed(0)
    model = network() if name == "net" else timm.create_model(name, num_classes=3).eval()
    x = INPUTS if name == "net" else torch.randn(2, 3, 64, 64)
    resident = Resident(model)
    plan = normsearch.plan(model, method)
    before = snapshot(resident.model)
    wanted = normsearch.convert(model, plan)
    for _ in range(2):
        with resident.converted(plan) as converted:
            assert list(converted.state_dict()) == list(wanted.state_dict())
            assert torch.equal(converted(x), wanted(x))
            converted.train()
            converted(x).square().sum().backward()
            with torch.no_grad():
                for parameter in converted.parameters():
                    parameter.add_(1)
        assert_same(before, snapshot(resident.model))


@pytest.mark.parametrize("spoil", ["double", "requires_grad", "hook", "attribute", "error"])
def test_whatever_is_done_to_a_resident_is_undone(spoil: str) -> None:
    resident = Resident(network())
    before = snapshot(resident.model)
    plan = normsearch.plan(resident.model, {"*": "switchable"})
    try:
        with resident.converted(plan) as converted:
            if spoil == "double":
                converted.double()
            elif spoil == "requires_grad":
                converted.requires_grad_(False)
            elif spoil == "hook":
                converted.a[0].register_forward_pre_hook(lambda module, args: None)
            elif spoil == "attribute":
                converted.a[0].weight = nn.Parameter(torch.zeros(4, 1, 3, 3))
                converted.a.extra = nn.Linear(2, 2)
            else:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert spoil == "error"
    assert_same(before, snapshot(resident.model))


class Calls(nn.Module):
    """A model that calls F.batch_norm itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4) * 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)


def test_resident_of_functional_calls() -> None:
    model = Calls().eval()
    resident = Resident(model)
    plan = normsearch.plan(model, "group")
    with resident.converted(plan) as converted:
        assert torch.allclose(converted(INPUTS), normsearch.convert(model, plan)(INPUTS))
    assert torch.allclose(resident.model(INPUTS), model(INPUTS))


def test_a_plans_cost_is_the_sum_of_its_sites() -> None:
    resident = Resident(network())
    table = measure_costs(resident, SPACE, INPUTS)
    assert table.of(SPACE.plan(SPACE.uniform("batch")), "latency") == table.base_latency > 0
    mixed = SPACE.plan({"a.1": "group", "b.1": "switchable", "c.1": "batch", "d.1": "batch"})
    wanted = table.base_memory + table.memory["a.1"]["group"] + table.memory["b.1"]["switchable"]
    assert table.of(mixed, "memory") == wanted
    assert table.base_memory > INPUTS.numel() * 4
    with pytest.raises(SearchError, match="was not measured"):
        table.of(normsearch.plan(network(), "rms"), "latency")
    with pytest.raises(SearchError, match="'energy' is no cost"):
        table.table("energy")
