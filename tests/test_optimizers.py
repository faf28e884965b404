"""An optimizer follows an in-place conversion: groups, order, state and names."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_networks import METHODS, images, pair, trained
from timm.layers import BatchNormAct2d
from torch import nn

from normsearch import (
    PlanError,
    convert,
)

torch.set_num_threads(1)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images()).square().mean().backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[object], torch.optim.Optimizer]] = {
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_follows_an_in_place_conversion(method: str, kind: str) -> None:
    model = pair().train()
    optimizer = OPTIMIZERS[kind](model.parameters())
    _step(model, optimizer)
    convert(model, method, in_place=True, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= held
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _step(model, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    # ρ at 1 moves only where instance statistics would help, and normalized inputs may not ask for it.
    assert expected - moved <= {name for name in expected if name.endswith("rho")}
    assert not moved - expected


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_keeps_the_state_of_parameters_that_live_on(kind: str) -> None:
    model = pair().train()
    optimizer = OPTIMIZERS[kind](model.parameters())
    _step(model, optimizer)
    key = "momentum_buffer" if "SGD" in kind else "exp_avg"
    conv, gamma, folded = model[0].weight, model[1].weight, model[4].weight
    kept = [optimizer.state[p][key].clone() for p in (conv, gamma)]
    convert(model, {"1": "batch_renorm", "4": "group"}, in_place=True, optimizer=optimizer)
    assert model[1].weight is gamma
    for parameter, state in zip((conv, gamma), kept, strict=True):
        torch.testing.assert_close(optimizer.state[parameter][key], state, rtol=0, atol=0)
    assert folded not in optimizer.state
    assert model[4].weight not in optimizer.state


def test_replaced_parameters_stay_in_their_group_and_position() -> None:
    model = pair()
    decayed = [model[0].weight, model[3].weight, model[3].bias, model[7].weight, model[7].bias]
    norms = [model[1].weight, model[1].bias, model[4].weight, model[4].bias]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0, "lr": 0.5}]
    )
    convert(model, {"1": "group", "4": "switchable"}, in_place=True, optimizer=optimizer)
    first, second = optimizer.param_groups
    assert list(map(id, first["params"])) == list(map(id, decayed))
    expected = [
        model[1].weight,
        model[1].bias,
        model[4].weight,
        model[4].bias,
        model[4].mean_logits,
        model[4].var_logits,
    ]
    assert list(map(id, second["params"])) == list(map(id, expected))
    assert (second["weight_decay"], second["lr"]) == (0.0, 0.5)


def test_a_layer_that_the_optimizer_does_not_train_stays_out_of_it() -> None:
    model = pair()
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[4].parameters()], lr=0.1)
    convert(model, "switchable", in_place=True, optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert not held & {id(p) for p in model[1].parameters()}
    assert {id(p) for p in model[4].parameters()} <= held


def test_affine_gained_by_folding_joins_the_optimizer() -> None:
    model = pair(affine=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "group", in_place=True, optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(model[1].weight), id(model[1].bias), id(model[4].weight), id(model[4].bias)} <= held


def test_an_optimizer_made_from_named_parameters_keeps_names_and_parameters_together() -> None:
    model = pair()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    convert(model, {"1": "group", "4": "switchable"}, in_place=True, optimizer=optimizer)
    group = optimizer.param_groups[0]
    names = {id(p): name for name, p in model.named_parameters()}
    assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_the_optimizer_inside_a_fused_layer_follows_too() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "group", in_place=True, optimizer=optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters()]


def test_an_optimizer_state_dict_round_trips_after_conversion() -> None:
    model = pair().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    _step(model, optimizer)
    convert(model, "group", in_place=True, optimizer=optimizer)
    _step(model, optimizer)
    twin = copy.deepcopy(model)
    fresh = torch.optim.AdamW(twin.parameters(), lr=0.05)
    # load_state_dict keeps the very tensors it is given: without a copy both would step the same state.
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _step(model, optimizer)
    _step(twin, fresh)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_optimizer_without_in_place_is_an_error() -> None:
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="in_place=True"):
        convert(model, "group", optimizer=optimizer)
