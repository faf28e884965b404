"""sensitivity: each number against converting that site alone, on any model, with nothing left behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import zoo
from residual import METHODS, Residual, images, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from normsearch import (
    MethodError,
    ModelError,
    PlanError,
    Progress,
    Sensitivity,
    compare,
    convert,
    explain,
    find_sites,
    parse_method,
    sensitivity,
)
from normsearch import site_effects as module_under_test
from normsearch.memory import peak_memory
from normsearch.resumption import ResumedRuns

torch.set_num_threads(1)


class Untraceable(nn.Module):
    """Branches on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.detach().sum()) != 0.5 else x


def by_conversion(
    model: nn.Module, methods: list[str], batches: list[Any], outputs: Any = None
) -> dict[str, dict[str, float | None]]:
    """The slow way: convert a copy for each site and method, and compare it with the original."""
    found: dict[str, dict[str, float | None]] = {}
    for site in find_sites(model, batches[0]):
        row = found[site.path] = {}
        for method in methods:
            to = {site.path: method}
            if explain(model, to, inputs=batches[0]).refusals:
                row[method] = None
            else:
                converted = convert(model, to, inputs=batches[0])
                row[method] = compare(model, converted, batches, outputs=outputs).drift.relative_l2
    return found


def assert_close(
    result: Sensitivity, expected: dict[str, dict[str, float | None]], *, absolute: float = 1e-6
) -> None:
    assert {site: set(row) for site, row in result.drift.items()} == {
        s: set(row) for s, row in expected.items()
    }
    for site, row in expected.items():
        for method, value in row.items():
            assert result.drift[site][method] == (
                None if value is None else pytest.approx(value, rel=1e-3, abs=absolute)
            ), (site, method)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which runs were made for each batch."""
    made: list[str] = []
    choose = module_under_test.resumed

    def noting(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        made.append("resumed" if isinstance(chosen, ResumedRuns) else "whole")
        return chosen

    monkeypatch.setattr(module_under_test, "resumed", noting)
    return made


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Residual, Untraceable])
def test_each_value_is_that_of_converting_the_site_alone(model: type[nn.Module], kinds: list[str]) -> None:
    network = trained(model())
    result = sensitivity(network, METHODS, images())
    expected = by_conversion(network, METHODS, images())
    assert_close(result, expected)
    assert kinds == (["resumed"] * 2 if model is Residual else ["whole"] * 2)
    # The numbers say something: exact methods keep the output, others do not.
    for row in result.drift.values():
        assert row["group"] > 1e-3
        assert row["frozen"] < 1e-5
        assert row["batch"] == 0


def test_sites_come_in_the_order_of_the_data() -> None:
    result = sensitivity(trained(Residual()), "group", images())
    assert result.sites == ("first", "shared", "late")


class TakesAnotherPath(nn.Module):
    """What torch.fx sees is not what runs: a proxy is no Tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Tensor:
        return self.norm(x) if isinstance(x, Tensor) else self.norm(x * 2)


class OptionalArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(x if mask is None else x * mask)


@pytest.mark.parametrize("model", [TakesAnotherPath, OptionalArgument])
def test_a_graph_that_computes_something_else_is_not_used(model: type[nn.Module], kinds: list[str]) -> None:
    network = trained(model())
    result = sensitivity(network, ["group", "instance"], images())
    assert_close(result, by_conversion(network, ["group", "instance"], images()))
    assert kinds == ["whole", "whole"]


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": torch.ones(2, 3, 4, 4).cumsum(3), "mask": torch.rand(2, 3, 4, 4)},
        (torch.ones(2, 3, 4, 4).cumsum(2), torch.rand(2, 3, 4, 4)),
    ],
)
def test_inputs_by_name_and_by_position_along_the_graph(inputs: Any, kinds: list[str]) -> None:
    network = trained(OptionalArgument())
    result = sensitivity(network, ["group", "instance"], [inputs])
    assert_close(result, by_conversion(network, ["group", "instance"], [inputs]))
    assert kinds == ["resumed"]


class Noisy(nn.Module):
    """Random in eval mode, and works on its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return F.dropout(self.norm(x), 0.5, training=True)


def test_random_models_and_models_that_change_their_inputs() -> None:
    network, (part,) = trained(Noisy()), images(1)
    kept = part.clone()
    result = sensitivity(network, ["frozen", "group"], [part])
    assert torch.equal(part, kept)
    assert result.drift["norm"]["frozen"] < 1e-6
    with torch.no_grad():
        # Dropout hits the same elements; what it leaves drifts like the layer itself.
        layer = compare(network.norm, convert(network.norm, "group"), [2 * part]).drift.relative_l2
    assert result.drift["norm"]["group"] == pytest.approx(layer, rel=0.2)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.variance, None, None, self.training)


def test_calls_of_functional_batch_norm() -> None:
    torch.manual_seed(0)
    network = Functional().eval()
    result = sensitivity(network, ["group", "frozen"], images())
    (site,) = result.sites
    converted = convert(network, "group")
    expected = compare(network, converted, images()).drift.relative_l2
    assert result.drift[site]["group"] == pytest.approx(expected)
    assert result.drift[site]["frozen"] < 1e-6


def test_wrapped_models_keep_their_prefix() -> None:
    network = nn.DataParallel(trained(Residual()))
    result = sensitivity(network, "group", images())
    plain = sensitivity(network.module, "group", images())
    assert result.sites == tuple(f"module.{site}" for site in plain.sites)
    assert [result.drift[f"module.{site}"]["group"] for site in plain.sites] == [
        plain.drift[site]["group"] for site in plain.sites
    ]


def test_compiled_models_are_run_eagerly_inside_their_wrapper() -> None:
    network = trained(Residual())
    result = sensitivity(torch.compile(network), "group", images())
    plain = sensitivity(network, "group", images())
    assert list(result.drift.values()) == list(plain.drift.values())


def test_lazy_models_are_initialised_on_a_copy() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()).eval()
    result = sensitivity(network, ["group", "frozen"], images())
    assert result.drift["1"]["frozen"] < 1e-6 < result.drift["1"]["group"]
    assert network[0].has_uninitialized_params()


def test_frozen_parameters_stay_frozen_and_methods_may_be_objects() -> None:
    network = trained(Residual())
    network.first.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in network.parameters()]
    given = [parse_method("frozen"), parse_method("frozen(trainable=true)"), "frozen"]
    result = sensitivity(network, given, images())
    assert result.methods == ("frozen", "frozen(trainable=true)")
    assert [parameter.requires_grad for parameter in network.parameters()] == before


def test_hooks_of_the_users_fire_and_see_the_new_output() -> None:
    network = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    network[1].register_forward_hook(lambda module, args, output: output * 3 + 1)
    result = sensitivity(network, ["group", "weight"], images())
    assert_close(result, by_conversion(network, ["group", "weight"], images()))


ZOO = {entry.name: entry for entry in zoo.ZOO}
QUICK = ["shufflenet_v2_x0_5", "mobilenetv3_small_050"]
THOROUGH = [
    "densenet121",
    "googlenet",
    "levit_128s",
    "mobilevit_xxs",
    "retinanet_resnet18",
    "unet_resnet18",
    "weight_standardized",
    "deeplabv3_mobilenet_v3_large",
    "mixnet_s",
]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in THOROUGH)])
def test_resumed_and_whole_runs_agree_on_real_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    network = trained(entry.build())
    paths = [site.path for site in find_sites(network)]
    sites = paths[:: max(len(paths) // 6, 1)]
    batches, methods = [entry.inputs(2, 0)], ["group", "spectral(gain=fixed)"]
    kept = network.get_submodule(entry.compared) if entry.compared else None
    seen: list[Any] = []
    if kept is not None:
        # Detections are sorted and thrown away by their scores: the features before them are continuous.
        kept.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = (lambda output: seen.pop()) if kept is not None else None
    fast = sensitivity(network, methods, batches, sites=sites, outputs=outputs)
    monkeypatch.setattr(module_under_test, "trace", lambda *given, **options: "not asked")
    slow = sensitivity(network, methods, batches, sites=sites, outputs=outputs)
    assert fast.sites == slow.sites
    assert fast.refusals == slow.refusals
    for site in sites:
        for method in methods:
            one, other = fast.drift[site][method], slow.drift[site][method]
            assert one == (other if other is None else pytest.approx(other, rel=1e-3, abs=1e-6))
    site = fast.sites[len(fast.sites) // 2]
    expected = by_conversion_of(network, site, batches, outputs)
    assert fast.drift[site]["group"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def by_conversion_of(network: nn.Module, site: str, batches: list[Any], outputs: Any) -> float:
    return compare(network, convert(network, {site: "group"}), batches, outputs=outputs).drift.relative_l2


# --- what it costs -----------------------------------------------------------------------------------


def test_the_prefix_runs_once_for_all_sites_and_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained(models.resnet18(weights=None))
    calls = {"conv1": 0, "layer4.1.conv2": 0}
    for path in calls:

        def count(module: nn.Module, args: Any, path: str = path) -> None:
            calls[path] += 1

        network.get_submodule(path).register_forward_pre_hook(count)
    methods = ["group", "layer", "frozen"]
    sites = ["layer3.*", "layer4.*"]
    resumed = sensitivity(network, methods, images(1, 32), sites=sites)
    measured = len(resumed.sites) * len(methods)
    assert measured == 30
    few = dict(calls)
    # Once to find shapes, once for the reference, once to check the graph, once for all measurements.
    assert few["conv1"] == 4
    assert few["layer4.1.conv2"] > measured * 0.9
    monkeypatch.setattr(module_under_test, "trace", lambda *given, **options: "not asked")
    sensitivity(network, methods, images(1, 32), sites=sites)
    assert calls["conv1"] - few["conv1"] == measured + 2


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    network = trained(models.resnet18(weights=None))

    def peak(count: int) -> int:
        def stream() -> Iterator[Tensor]:
            for seed in range(count):
                yield torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

        return peak_memory(
            lambda: sensitivity(network, ["group", "instance"], stream(), sites=["layer2.*"]),
            torch.device("cpu"),
        )

    assert peak(6) == peak(3)


# --- nothing left behind -----------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "objects": [id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name in ("objects", "trainable", "modes", "hooks"):
        assert after[name] == before[name], name
    assert torch.equal(after["random"], before["random"])
    for name, tensor in before["state"].items():
        assert torch.equal(after["state"][name], tensor), name


class Stopped(BaseException):
    """Stands for Ctrl-C."""


def stopping() -> Iterator[Tensor]:
    yield images()[0]
    raise Stopped


@pytest.mark.parametrize("model", [Residual, Untraceable])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(model: type[nn.Module], training: bool) -> None:
    network = trained(model()).train(training)
    next(network.children()).eval()
    before = snapshot(network)
    sensitivity(network, METHODS, images())
    assert_unchanged(network, before)


@pytest.mark.parametrize("model", [Residual, Untraceable])
@pytest.mark.parametrize("after", range(0, 20, 3))
def test_an_interruption_at_any_point_leaves_the_model_as_it_was(model: type[nn.Module], after: int) -> None:
    network = trained(model())
    before = snapshot(network)

    def stop(progress: Progress) -> None:
        if progress.done == after:
            raise Stopped

    with pytest.raises(Stopped):
        sensitivity(network, METHODS, images(), on_progress=stop)
    assert_unchanged(network, before)
    with pytest.raises(Stopped):
        sensitivity(network, METHODS, stopping())
    assert_unchanged(network, before)


def test_an_interruption_inside_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained(Residual())
    calls = 0

    def stop(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise Stopped

    handle = network.late.register_forward_pre_hook(stop)
    before = snapshot(network)
    with pytest.raises(Stopped):
        sensitivity(network, METHODS, images())
    assert_unchanged(network, before)
    handle.remove()


def test_progress_counts_measurements() -> None:
    seen: list[Progress] = []
    sensitivity(trained(Residual()), ["group", "layer"], images(), on_progress=seen.append)
    assert [p.done for p in seen] == list(range(13))
    assert {p.total for p in seen} == {12}
    assert seen[1].detail == "first: group"
    seen.clear()
    sensitivity(trained(Residual()), ["group"], iter(images()), sites=["late"], on_progress=seen.append)
    assert [p.total for p in seen] == [2, 2, 2]
    seen.clear()
    sensitivity(
        trained(Residual()), ["group"], (part for part in images()), sites=["late"], on_progress=seen.append
    )
    assert [(p.done, p.total, p.seconds_left) for p in seen] == [(n, 0, None) for n in range(3)]


# --- refusals ----------------------------------------------------------------------------------------


def test_refused_methods_have_no_drift_and_a_reason() -> None:
    network = trained(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)
        )
    )
    result = sensitivity(network, ["instance", "identity", "group"], images())
    assert result.drift["4"]["instance"] is None
    assert result.drift["4"]["identity"] is None
    assert result.drift["1"]["identity"] < 1e-5
    assert {(r.site, r.method) for r in result.refusals} == {("4", "instance"), ("4", "identity")}
    assert all(r.reason and r.remedy for r in result.refusals)
    assert result.vetoes(threshold=100) == {"4": ("instance", "identity")}


def test_a_shape_that_only_a_later_batch_has_becomes_a_refusal() -> None:
    network = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.BatchNorm1d(8)))
    result = sensitivity(network, ["layer(axes=channel)", "group"], [images()[0], images(1, 3)[0]])
    assert result.drift["1"]["group"] > 0
    one_by_one = sensitivity(network, ["group(groups=8)"], [images()[0], images(1, 3)[0]], sites=["1"])
    assert one_by_one.methods == ("group(groups=8)",)


def test_a_site_that_no_batch_reaches_is_refused() -> None:
    network = Residual()
    network.unused = nn.BatchNorm2d(4)
    result = sensitivity(trained(network), ["group", "frozen"], images())
    assert result.sites[-1] == "unused"
    assert result.drift["unused"] == {"group": None, "frozen": None}
    assert {r.reason for r in result.refusals} == {"no batch reached the site"}
    assert result.vetoes(threshold=100) == {"unused": ("group", "frozen")}


class Custom(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_custom_layers_are_refused_and_the_rest_is_measured() -> None:
    network = trained(nn.Sequential(nn.Conv2d(3, 8, 3), Custom(8), nn.BatchNorm2d(8)))
    result = sensitivity(network, "group", images())
    assert result.drift["1"]["group"] is None
    assert "forward method of its own" in result.refusals[0].reason
    assert result.drift["2"]["group"] > 0


def test_fused_layers_keep_their_activation() -> None:
    network = trained(timm.create_model("test_efficientnet", pretrained=False))
    batches = images(1, 32)
    sites = [site.path for site in find_sites(network)][::7]
    result = sensitivity(network, "group", batches, sites=sites)
    for site in sites:
        assert result.drift[site]["group"] == pytest.approx(
            by_conversion_of(network, site, batches, None), rel=1e-3
        )


# --- errors ------------------------------------------------------------------------------------------


COUNTER = itertools.count()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": []}, ModelError, "got no batch"),
        ({"methods": []}, PlanError, "got no method"),
        ({"methods": "grupp"}, MethodError, "grupp"),
        ({"sites": ["nowhere"]}, PlanError, "no site matches 'nowhere'"),
        ({"sites": []}, PlanError, "no site matches an empty list"),
        ({"model": nn.Conv2d(3, 3, 1)}, PlanError, "no BatchNorm"),
        ({"model": "a path"}, ModelError, "expected a torch.nn.Module"),
        ({"batches": [images()[0], images()[0] * math.nan]}, ModelError, "batch 2 is not finite"),
        ({"batches": [torch.zeros(0, 3, 12, 12)]}, ModelError, "hold no number"),
        ({"batches": [torch.zeros(1, 5, 12, 12)]}, ModelError, "failed on the given inputs"),
        ({"outputs": lambda output: output.argmax(1)}, ModelError, "hold no number"),
        (
            {"outputs": lambda output: output[:, : 1 + next(COUNTER) % 4]},
            ModelError,
            "outputs do not match",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"model": trained(Residual()), "methods": ["instance"], "batches": images()} | options
    with pytest.raises(error, match=words):
        sensitivity(given.pop("model"), given.pop("methods"), given.pop("batches"), **given)


def test_an_output_that_overflows_is_infinite_drift() -> None:
    class Dividing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            # Only zero-mean outputs, which instance normalization makes, are divided by nothing.
            return y / (y.mean((2, 3), keepdim=True).abs() > 1e-4)

    network = Dividing().eval()
    nn.init.constant_(network.norm.running_mean, 5.0)
    result = sensitivity(network, ["instance", "frozen"], images(1))
    assert result.drift["norm"]["instance"] == math.inf
    assert result.drift["norm"]["frozen"] < 1e-6
    assert Sensitivity.from_json(result.to_json()) == result
