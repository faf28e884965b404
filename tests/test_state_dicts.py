"""Another training run's state dict, converted by a plan."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from small_networks import FOLDING, METHODS, Shared, images, pair, trained
from timm.layers import BatchNormAct2d
from torch import nn

from normsearch import (
    PlanError,
    StateError,
    convert,
    convert_state_dict,
    plan,
)
from normsearch.plans import Plan

torch.set_num_threads(1)


@pytest.mark.parametrize("method", METHODS)
def test_another_training_runs_state_dict_converts_like_its_model(method: str) -> None:
    the_plan = plan(pair(), method)
    other = trained(pair(), seed=7)
    state = convert_state_dict(other.state_dict(), the_plan)
    loaded = convert(pair(), the_plan).eval()
    assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(loaded(images()), convert(other, the_plan).eval()(images()))


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_layers_state_dict_converts_under_both_names(method: str) -> None:
    model = trained(Shared())
    the_plan = plan(model, method)
    other = trained(Shared(), seed=7)
    state = convert_state_dict(other.state_dict(), the_plan)
    loaded = convert(model, the_plan).eval()
    loaded.load_state_dict(state)
    assert torch.equal(state["first.weight"], state["second.weight"])
    expected = convert(other, the_plan)
    torch.testing.assert_close(loaded.first.weight, expected.first.weight, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_fused_layers_state_dict_converts(method: str) -> None:
    def fused() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 32, 3), BatchNormAct2d(32, act_layer=nn.PReLU))

    the_plan = plan(trained(fused()), method)
    other = trained(fused(), seed=7)
    with torch.no_grad():
        other[1].act.weight.fill_(0.7)
    loaded = convert(fused(), the_plan).eval()
    loaded.load_state_dict(convert_state_dict(other.state_dict(), the_plan))
    assert torch.equal(loaded(images()), convert(other, the_plan).eval()(images()))


@pytest.mark.parametrize("method", FOLDING)
def test_a_plan_made_for_an_untrained_model_takes_trained_weights(method: str) -> None:
    # The usual order: build the architecture, plan, convert, then load a checkpoint.
    untrained = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))
    the_plan = plan(untrained, method)
    model = copy.deepcopy(untrained)
    trained(model)
    loaded = convert(untrained, the_plan).eval()
    loaded.load_state_dict(convert_state_dict(model.state_dict(), the_plan))
    assert torch.equal(loaded(images()), convert(model, method).eval()(images()))


def test_a_state_dict_that_would_need_an_affine_the_converted_model_lacks() -> None:
    untrained = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, affine=False))
    the_plan = plan(untrained, "group")
    model = copy.deepcopy(untrained)
    trained(model)
    # Either what comes back loads strictly, as promised, or the call says why it cannot.
    try:
        state = convert_state_dict(model.state_dict(), the_plan)
    except StateError as error:
        assert "1" in str(error)  # noqa: PT017
    else:
        convert(untrained, the_plan).load_state_dict(state)


def test_a_root_batch_norms_state_dict_converts() -> None:
    layer = trained(nn.BatchNorm2d(32))
    the_plan = plan(layer, "group")
    loaded = convert(nn.BatchNorm2d(32), the_plan)
    state = convert_state_dict(layer.state_dict(), the_plan)
    assert set(state) == {"weight", "bias"}
    assert torch.equal(state["weight"], convert(layer, the_plan).weight)
    assert loaded is not None


def edited(the_plan: Plan, **fields: Any) -> Plan:
    """Return the plan as someone would edit its JSON: other fields of the last site, or of its producer."""
    document = json.loads(the_plan.to_json())
    site = document["rows"][-1]["site"]
    for name, value in fields.items():
        (site if name in site else site["producer"])[name] = value
    return Plan.from_json(json.dumps(document))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
    return trained(nn.Sequential(*layers), seed=3)


@pytest.mark.parametrize(
    ("producer", "message"), [("9", "no 9.weight"), ("0", r"shape \(6, 3, 3, 3\).* 8 channels of 3")]
)
def test_a_plan_with_another_producer_converts_no_state_dict(producer: str, message: str) -> None:
    model = chain()
    the_plan = plan(model, "identity")
    site = json.loads(the_plan.to_json())["rows"][-1]["site"]
    the_plan = edited(the_plan, producer=site["producer"] | {"path": producer})
    with pytest.raises(StateError, match=message):
        convert_state_dict(model.state_dict(), the_plan)


def test_a_plan_that_calls_two_layers_one_converts_no_state_dict() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), seed=3)
    with torch.no_grad():
        model[2].weight.add_(1)
    the_plan = edited(plan(model, {"2": "group"}), aliases=["1"])
    with pytest.raises(StateError, match=r"2\.weight and 1\.weight are one"):
        convert_state_dict(model.state_dict(), the_plan)


def test_a_plan_without_sites_is_no_plan() -> None:
    with pytest.raises(PlanError, match="no site"):
        Plan.from_json('{"rows": [], "notes": []}')


def test_entries_of_other_layers_are_the_same_tensors() -> None:
    state = pair().state_dict()
    converted = convert_state_dict(state, plan(pair(), "group"))
    assert converted["0.weight"] is state["0.weight"]
    assert "1.running_mean" not in converted
    assert "1.running_mean" in state


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_a_state_dict_without_an_entry_is_refused_by_name(name: str) -> None:
    state = pair().state_dict()
    del state[f"1.{name}"]
    with pytest.raises(StateError, match=rf"no 1\.{name}"):
        convert_state_dict(state, plan(pair(), "group"))


def test_a_state_dict_without_the_layer_is_refused() -> None:
    state = {f"module.{name}": value for name, value in pair().state_dict().items()}
    with pytest.raises(StateError, match=r"no entry for 1;.*prefix such as module\."):
        convert_state_dict(state, plan(pair(), "group"))


def test_a_state_dict_of_another_shape_is_refused() -> None:
    state = pair().state_dict()
    state["4.running_var"] = torch.ones(7)
    with pytest.raises(StateError, match=r"4\.running_var has shape \(7,\), the plan expects \(16,\)"):
        convert_state_dict(state, plan(pair(), "group"))


def test_a_state_dict_without_a_counter_still_converts() -> None:
    # Checkpoints from before torch 0.4.1 have no num_batches_tracked.
    state = pair().state_dict()
    del state["1.num_batches_tracked"]
    the_plan = plan(pair(), "group")
    loaded = convert(pair(), the_plan)
    loaded.load_state_dict(convert_state_dict(state, the_plan))
    assert torch.equal(loaded[1].weight, convert(pair(), the_plan)[1].weight)


def test_sites_are_plain_data() -> None:
    site = plan(pair(), "group").sites[0]
    assert json.loads(json.dumps(asdict(site)))["channels"] == 32
