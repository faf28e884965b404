"""How far the output of each site is from the original one."""

from __future__ import annotations

import pytest
import reported
import torch
from reported import reference
from torch import Tensor, nn
from torch.nn import functional as F

import normsearch
from normsearch import ModelError, site_outputs
from normsearch.site_outputs import SiteDrift, site_drift


@pytest.fixture
def net() -> nn.Module:
    return reported.network()


@pytest.fixture
def batches() -> list[Tensor]:
    return reported.inputs()


def test_site_drift_is_that_of_the_outputs(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, "group")
    found = {drift.site: drift for drift in site_drift(net, converted, batches)}
    assert list(found) == ["first.1", "unused", "twice", "last"]
    for path in ("first.1", "twice", "last"):
        assert found[path].relative_l2 == pytest.approx(reference(net, converted, path, batches), rel=1e-12)
    assert {path: drift.depth for path, drift in found.items()} == {
        "first.1": 0,
        "unused": None,
        "twice": 1,
        "last": 2,
    }
    assert found["unused"] == SiteDrift("unused", None, None, "the forward pass does not reach it")


@pytest.mark.parametrize("most", [0, 10_000, 30_000])
def test_site_drift_in_several_passes_is_the_same(
    most: int, net: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = normsearch.convert(net, "layer")
    whole = site_drift(net, converted, batches)
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(site_outputs, "_MOST_BYTES", most)
    assert site_drift(net, converted, batches) == whole
    assert len(passes) > len(batches)


def test_site_drift_leaves_models_as_they_were(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, "group")
    for model in (net, converted):
        model.train()
        model.get_submodule("first").eval()
    before = [
        ({k: v.clone() for k, v in m.state_dict().items()}, [x.training for x in m.modules()])
        for m in (net, converted)
    ]
    random = torch.get_rng_state()
    site_drift(net, converted, batches)
    for model, (state, modes) in zip((net, converted), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_folded_layers_keep_an_output_to_compare(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, {"first.1": "identity"})
    assert isinstance(converted.get_submodule("first.1"), nn.Identity)
    drift = site_drift(net, converted, batches)[0]
    assert drift.relative_l2 is not None
    assert drift.relative_l2 < 1e-12


def test_what_cannot_be_compared_says_why(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, "group")
    converted.last = nn.Sequential()
    del converted.twice
    converted.forward = lambda x: converted.last(converted.first(x))[:, :, 1:].mean((2, 3))
    found = {drift.site: drift for drift in site_drift(net, converted, batches)}
    assert found["twice"].reason == "the converted model has no layer there"
    converted = normsearch.convert(net, "group")
    converted.last = nn.Flatten()
    converted.head = nn.Identity()
    converted.forward = lambda x: converted.last(converted.twice(converted.first(x)))
    found = {drift.site: drift for drift in site_drift(net, converted, batches)}
    assert found["last"].reason == "its outputs before and after have no common shape"
    assert found["twice"].reason == "called 2 times before and 1 times after"
    broken = normsearch.convert(net, "group")
    broken.get_submodule("last").weight.data[0] = float("nan")
    assert site_drift(net, broken, batches)[3].reason == "an output there is not finite"
    with pytest.raises(ModelError, match="got no batch"):
        site_drift(net, converted, [])


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.register_buffer("mean", torch.full((32,), 0.3))
        self.register_buffer("var", torch.full((32,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)


def test_functional_sites_have_a_drift() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    x = torch.randn(4, 3, 8, 8)
    converted = normsearch.convert(model, "group", inputs=x)
    (drift,) = site_drift(model, converted, [x])
    with torch.no_grad():
        old, new = model(x), converted(x)
    assert drift.relative_l2 == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
