"""calibrate: every rung against a slow reference, never worse, repeatable, and nothing else changed."""

from __future__ import annotations

import copy
import json
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zoo import ZOO, Entry

import normsearch
from normsearch import (
    Calibration,
    ModelError,
    PlanError,
    Progress,
    calibrate,
    calibration_record,
    compare,
    convert,
)
from normsearch.affine_fitting import least_squares, whiten
from normsearch.memory import peak_memory
from normsearch.pairing import Pair
from normsearch.progress import Stage
from normsearch.rebuilding import scripts

torch.set_num_threads(1)


def images(count: int = 48, seed: int = 1) -> Tensor:
    """Images whose channels differ much in mean and scale, and whose samples differ in contrast."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    x = x * (0.5 + torch.rand(count, 1, 1, 1, generator=generator))
    return x * torch.tensor([0.3, 1.0, 3.0]).reshape(3, 1, 1) + torch.tensor([1.0, -2.0, 0.0]).reshape(
        3, 1, 1
    )


def with_statistics(model: nn.Module, *inputs: Any) -> nn.Module:
    """Give the BatchNorm layers of a model γ, β and the statistics of some inputs; return it in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            module.momentum = None
    with torch.no_grad():
        model.train()(*inputs)
    return model.eval()


def network(**options: Any) -> nn.Module:
    """Two convolutions with BatchNorm and a linear head, as trained."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, **options),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, **options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        for index in (0, 3):
            # Channels of one group differ in scale, as those of trained networks do.
            model[index].weight.mul_(torch.logspace(-0.7, 0.7, 16).reshape(16, 1, 1, 1))
    return with_statistics(model, images())


def record_of(model: nn.Module) -> Calibration:
    record = calibration_record(model)
    assert record is not None
    return record


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what it achieves -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["group(groups=4)", "layer", "layer(axes=channel)", "rms"])
def test_the_error_on_held_out_batches_falls(method: str) -> None:
    original, batches = network(), images().split(6)
    converted = convert(original, method)
    calibrated = calibrate(converted, original, batches, budget=60)
    record = record_of(calibrated)
    held_out = [batches[3], batches[7]]
    for model, error in ((converted, record.error.before), (calibrated, record.error.after)):
        assert compare(original, model, held_out).drift.relative_l2 == pytest.approx(error, rel=1e-5)
    assert record.error.after < 0.6 * record.error.before
    assert (record.batches, record.held_out) == (8, 2)


def test_inputs_never_seen_profit_too() -> None:
    original = network()
    converted = convert(original, "layer")
    calibrated = calibrate(converted, original, images().split(6), budget=60)
    fresh = [images(32, seed=7)]
    before, after = (compare(original, model, fresh).drift.relative_l2 for model in (converted, calibrated))
    assert after < 0.7 * before


@pytest.mark.parametrize("method", ["frozen", "identity", "batch_renorm"])
def test_an_exact_conversion_is_left_alone(method: str) -> None:
    original = network()
    converted = convert(original, method)
    calibrated = calibrate(converted, original, images().split(12), budget=5)
    assert calibrated is not converted
    assert same(state(calibrated), state(converted))
    assert record_of(calibrated).rungs == ()


def test_a_rung_that_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original, batches = network(), images().split(12)
    converted = convert(original, "group(groups=4)")

    def spoil(pair: Pair, *args: Any) -> Any:
        for parameter in pair.network.parameters():
            parameter.mul_(1.7)
        layer = pair.network.get_submodule("0")
        layer.register_parameter("bias", nn.Parameter(torch.ones(16)))
        return ("1",)

    monkeypatch.setattr("normsearch.calibration.whiten", torch.no_grad()(spoil))
    calibrated = calibrate(converted, original, batches, budget=0)
    record = record_of(calibrated)
    assert (record.rungs[0].name, record.rungs[0].kept) == ("whitening", False)
    assert (record.whitened, record.gained_bias) == ((), ())
    assert calibrated.state_dict().keys() == converted.state_dict().keys()
    assert torch.equal(calibrated[0].weight, converted[0].weight)
    assert record.error.after <= record.error.before


def test_affine_changes_nothing_but_the_new_layers() -> None:
    original = network()
    converted = convert(original, "group(groups=4)")
    calibrated = calibrate(converted, original, images().split(12), budget=60, parameters="affine")
    changed = {
        name
        for name, tensor in calibrated.state_dict().items()
        if not torch.equal(tensor, converted.state_dict()[name])
    }
    assert changed == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert {rung.name for rung in record_of(calibrated).rungs} == {"least squares", "affine"}


def test_frozen_weights_are_not_trained_and_flags_return() -> None:
    original = network()
    original[3].requires_grad_(False)
    original[1].requires_grad_(False)
    converted = convert(original, "rms")
    flags = [parameter.requires_grad for parameter in converted.parameters()]
    calibrated = calibrate(converted, original, images().split(12), budget=20)
    # Whitening only scales the rows of a weight.
    ratio = calibrated[3].weight / converted[3].weight
    assert torch.allclose(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-4)
    names = dict(calibrated.named_parameters())
    gained = [f"{path}.bias" for path in record_of(calibrated).gained_bias]
    assert flags == [p.requires_grad for name, p in names.items() if name not in gained]
    assert all(parameter.grad is None for parameter in calibrated.parameters())


# --- whitening and least squares against their definitions ---------------------------------------


def test_whitening_goes_into_the_layer_before() -> None:
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Conv2d(3, 8, 3, bias=False), (12, 3, 8, 8)),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), (12, 4, 5, 5)),
        (nn.Linear(5, 8), (12, 5)),
    ):
        norm = nn.BatchNorm1d(8) if len(shape) == 2 else nn.BatchNorm2d(8)
        x = torch.randn(shape, dtype=torch.double)
        scales = torch.logspace(-1, 1, 8).double()
        model = nn.Sequential(layer, norm).double()
        with torch.no_grad():
            weight = model[0].weight
            if isinstance(layer, nn.ConvTranspose2d):
                weight.view(2, 2, 4, 3, 3).mul_(scales.view(2, 1, 4, 1, 1))
            else:
                weight.mul_(scales.view(-1, *(1 for _ in weight.shape[1:])))
        model = with_statistics(model, x)
        plan = normsearch.plan(model, "group(groups=1)", inputs=x)
        pair = Pair(model, convert(model, plan), None, x)
        assert whiten(pair, [x], Stage("", 1, None)) == ("1",)
        bn, wide = model[1], (-1, *(1 for _ in shape[2:]))
        standard = model[0](x) - bn.running_mean.view(wide)
        standard = standard / (bn.running_var + bn.eps).sqrt().view(wide)
        over = tuple(range(1, len(shape)))
        centred = standard - standard.mean(over, keepdim=True)
        reference = centred / (centred.square().mean(over, keepdim=True) + bn.eps).sqrt()
        reference = reference * bn.weight.view(wide) + bn.bias.view(wide)
        torch.testing.assert_close(pair.network(x), reference, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["group(groups=2)", "rms", "instance"]), st.integers(1, 3))
def test_least_squares_is_the_regression_per_channel(seed: int, method: str, parts: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(6, 4, 5, 5).double() * torch.rand(6, 4, 1, 1).double()
    model = with_statistics(nn.Sequential(nn.BatchNorm2d(4)).double(), x)
    pair = Pair(model, convert(model, method), None, x)
    y, t = pair.network(x).detach(), model(x).detach()
    least_squares(pair, x.split(-(-6 // parts)), Stage("", parts, None))
    fitted = pair.network(x)
    for c in range(4):
        ones = torch.ones(y[:, c].numel(), dtype=torch.double)
        design = torch.stack([y[:, c].flatten(), ones], 1)
        solution = torch.linalg.lstsq(design, t[:, c].flatten()[:, None]).solution
        torch.testing.assert_close(fitted[:, c].flatten(), (design @ solution)[:, 0], rtol=1e-8, atol=1e-8)


def test_least_squares_sees_the_layers_before_as_fitted() -> None:
    original, x = network().double(), images().double()
    pair = Pair(original, convert(original, "rms"), None, x)
    least_squares(pair, [x], Stage("", 1, None))
    # After one pass over one batch, the last site is optimal for what the first has become.
    y, t = pair.network[:5](x).detach(), original[:5](x).detach()
    slope = ((y - y.mean((0, 2, 3), True)) * (t - t.mean((0, 2, 3), True))).sum((0, 2, 3)) / (
        y - y.mean((0, 2, 3), True)
    ).square().sum((0, 2, 3))
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-8, atol=1e-8)


def test_a_channel_that_is_constant_gets_its_mean_alone() -> None:
    original = network()
    with torch.no_grad():
        original[1].weight[3] = 0
    converted = convert(original, "layer")
    pair = Pair(original, converted, None, images())
    least_squares(pair, images().split(12), Stage("", 4, None))
    assert pair.network[1].weight[3] == 0
    torch.testing.assert_close(pair.network[1].bias[3], original[1].bias[3])


def test_fused_layers_are_fitted_before_their_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), BatchNormAct2d(16), nn.Conv2d(16, 4, 1))
    model = with_statistics(model.double(), images().double())
    x = images().double()
    pair = Pair(model, convert(model, "rms"), None, x)
    least_squares(pair, [x], Stage("", 1, None))
    y = pair.network[1].norm(pair.network[0](x)).detach()
    bn: Any = model[1]
    t = F.batch_norm(model[0](x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps).detach()
    residual = t - y
    assert residual.mean((0, 2, 3)).abs().max() < 1e-9
    assert (residual * y).mean((0, 2, 3)).abs().max() < 1e-9
    assert record_of(calibrate(pair.model, model, x.split(12), budget=4)).sites.keys() == {"1"}


# --- what it leaves alone -------------------------------------------------------------------------


def _looks(model: nn.Module) -> list[Any]:
    return [
        (
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            [p.requires_grad for p in module.parameters(recurse=False)],
            sorted(vars(module)),
        )
        for module in model.modules()
    ]


def _interrupt(stage: str) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.done:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(
    "stage",
    [None, "whitening", "least squares", "distilling into the new layers", "distilling into all parameters"],
)
def test_the_given_models_are_untouched_also_when_interrupted(stage: str | None) -> None:
    original = network()
    original[4].train()
    converted = convert(original, {"1": "group(groups=4)", "4": "batch_renorm"})
    converted[4].train()
    before = state(original), state(converted), _looks(original), _looks(converted)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    if stage is None:
        calibrate(converted, original, images().split(12), budget=12)
    else:
        with pytest.raises(KeyboardInterrupt):
            calibrate(converted, original, images().split(12), budget=12, on_progress=_interrupt(stage))
    assert same(before[0], state(original))
    assert same(before[1], state(converted))
    assert before[2:] == (_looks(original), _looks(converted))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in (*original.parameters(), *converted.parameters()))


def test_running_statistics_and_modes_stay_and_dropout_is_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.9), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
    )
    model = with_statistics(model, images()).train()
    converted = convert(model, {"1": "layer"})
    calibrated = calibrate(converted, model, images().split(12), budget=30)
    for name, buffer in converted.named_buffers():
        assert torch.equal(buffer, calibrated.get_buffer(name))
    assert all(module.training for module in calibrated.modules())
    # With nine of ten values dropped, no error could fall so far.
    assert record_of(calibrated).error.after < 0.3


def test_the_same_seed_gives_the_same_result_with_a_shuffling_loader_too() -> None:
    original = network()
    converted = convert(original, "group(groups=4)")
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))
        loader: Any = DataLoader(list(images()), batch_size=8, shuffle=True)
        results.append(state(calibrate(converted, original, loader, budget=15, seed=seed)))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_a_loader_with_a_generator_of_its_own_is_refused() -> None:
    original = network()
    generator = torch.Generator().manual_seed(0)
    loader: Any = DataLoader(list(images()), batch_size=8, shuffle=True, generator=generator)
    with pytest.raises(ModelError, match="other inputs each time"):
        calibrate(convert(original, "rms"), original, loader, budget=1)


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    original = network()
    converted = convert(original, "group(groups=4)")

    class Many:
        def __init__(self, count: int) -> None:
            self.count = count

        def __iter__(self) -> Iterator[Tensor]:
            for index in range(self.count):
                yield images(6, seed=index)

    peaks = [
        peak_memory(lambda: calibrate(converted, original, Many(count), budget=10), torch.device("cpu"))  # noqa: B023
        for count in (4, 24)
    ]
    assert peaks[1] < 1.05 * peaks[0]


# --- models and outputs of every kind -------------------------------------------------------------


class Wrapped(nn.Module):
    """A network whose output is a container, and which takes keywords."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = network(), kind

    def forward(self, x: Tensor, gain: float = 1.0) -> Any:
        y = gain * self.net(x)
        boxes = [{"boxes": part[: int(part.sum() * 100) % 4], "labels": part.argmax()} for part in y]
        return {"tuple": (y, y.argmax(1)), "dict": {"out": y, "aux": 2 * y}, "boxes": boxes}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, 2.0), lambda x: {"x": x, "gain": 2.0}])
def test_outputs_in_containers_and_inputs_of_every_form(kind: str, form: Callable[[Tensor], Any]) -> None:
    original = Wrapped(kind).eval()
    batches = [form(x) for x in images().split(12)]
    calibrated = calibrate(convert(original, "rms"), original, batches, budget=20)
    record = record_of(calibrated)
    assert record.error.after < 0.7 * record.error.before


def test_detections_are_matched_as_the_caller_says() -> None:
    original = Wrapped("boxes").eval()
    converted, batches = convert(original, "rms"), images().split(12)
    with pytest.raises(ModelError, match="outputs=lambda output: \\(\\)"):
        calibrate(converted, original, batches, budget=1)
    record = record_of(calibrate(converted, original, batches, budget=90, outputs=lambda output: ()))
    assert record.error.after < 0.9 * record.error.before
    mean = sum(change.after for change in record.sites.values()) / len(record.sites)
    assert record.error.after == pytest.approx(mean)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_zoo_model(entry: Entry) -> None:
    torch.manual_seed(0)
    original, batches = entry.build(), [entry.inputs(2, seed) for seed in range(2)]
    with torch.no_grad():
        # Statistics that are not quite those of the inputs, as trained ones are.
        for module in original.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    converted = convert(original.eval(), ["group", "frozen"], inputs=batches[0])
    before = state(original), state(converted)
    calibrated = calibrate(converted, original, batches, budget=2, outputs=lambda output: ())
    record = record_of(calibrated)
    assert record.error.after <= record.error.before
    assert any(rung.kept for rung in record.rungs)
    assert same(before[0], state(original))
    assert same(before[1], state(converted))
    assert all(
        torch.equal(buffer, before[1][name])
        for name, buffer in calibrated.state_dict().items()
        if name in dict(calibrated.named_buffers())
    )


def test_layers_called_twice_and_never() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
            self.bn, self.idle = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.stem(x)).relu_()
            return self.bn(self.conv(y)).relu_()

    torch.manual_seed(0)
    original = with_statistics(Twice(), images())
    record = record_of(calibrate(convert(original, "layer"), original, images().split(12), budget=20))
    assert record.error.after < record.error.before
    assert (record.sites.keys(), record.whitened) == ({"bn"}, ())


def test_a_network_that_caches_in_eval_mode() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.bias, self.cache = network(), nn.Parameter(torch.randn(5)), {}

        def forward(self, x: Tensor) -> Tensor:
            if self.training or "bias" not in self.cache:
                self.cache = {} if self.training else {"bias": self.bias.exp()}
            return self.net(x) + (self.bias.exp() if self.training else self.cache["bias"])

    torch.manual_seed(0)
    original = Caching().eval()
    calibrated = calibrate(convert(original, "rms"), original, images().split(12), budget=15)
    assert calibrated.cache == {}
    assert record_of(calibrated).error.after < record_of(calibrated).error.before


def test_functional_calls_wrappers_and_half_precision() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.register_buffer("mean", torch.linspace(-1, 1, 16))
            self.register_buffer("var", torch.linspace(0.1, 3, 16))
            self.gamma, self.beta = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(
                self.conv(x), self.mean, self.var, self.gamma, self.beta, self.training
            ).relu()

    torch.manual_seed(0)
    for original in (Functional().eval(), nn.DataParallel(network()), network().bfloat16()):
        dtype = next(original.parameters()).dtype
        batches = [x.to(dtype) for x in images().split(12)]
        converted = convert(original, "layer")
        calibrated = calibrate(converted, original, batches, budget=20)
        assert type(calibrated).__mro__[1] is type(converted).__mro__[1]
        assert {p.dtype for p in calibrated.parameters()} == {dtype}
        record = record_of(calibrated)
        assert record.error.after < 0.9 * record.error.before, type(original)


def test_tied_weights_stay_tied() -> None:
    original = network()
    original.add_module("9", nn.Linear(5, 16))
    original.add_module("10", nn.Linear(16, 5))
    original[10].weight = original[8].weight
    calibrated = calibrate(convert(original, "layer"), original, images().split(12), budget=12)
    assert calibrated[10].weight is calibrated[8].weight


# --- the record, progress, checkpoints ------------------------------------------------------------


def test_the_record_says_what_was_done() -> None:
    original = network()
    calibrated = calibrate(convert(original, "group(groups=4)"), original, images().split(12), budget=30)
    record = record_of(calibrated)
    assert [rung.name for rung in record.rungs] == ["whitening", "least squares", "affine", "all"]
    assert [rung.steps for rung in record.rungs] == [0, 0, 10, 20]
    kept = [rung.error for rung in record.rungs if rung.kept]
    assert kept == sorted(kept, reverse=True)
    assert record.error.after == kept[-1]
    assert set(record.whitened) <= {"1", "4"}
    assert set(record.gained_bias) == {{"1": "0", "4": "3"}[path] for path in record.whitened}
    assert json.loads(record.to_json())["error"] == {
        "before": record.error.before,
        "after": record.error.after,
    }
    assert calibration_record(original) is None
    assert calibration_record(copy.deepcopy(calibrated)) is None


def test_progress_of_every_stage() -> None:
    seen: list[Progress] = []
    original = network()
    calibrate(convert(original, "rms"), original, images().split(12), budget=30, on_progress=seen.append)
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == [
        "whitening",
        "least squares",
        "distilling into the new layers",
        "distilling into all parameters",
    ]
    for stage in stages:
        steps = [progress for progress in seen if progress.stage == stage]
        assert [progress.done for progress in steps] == list(range(steps[0].total + 1))
        assert all(progress.seconds_left is not None for progress in steps[1:])
    assert "held-out error" in seen[-1].detail


def test_a_calibrated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    architecture = normsearch.Architecture("torchvision/resnet18", {"num_classes": 3})
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    model = with_statistics(normsearch.build(architecture), x)
    plan = normsearch.plan(model, "group")
    calibrated = calibrate(convert(model, plan), model, x.split(2), budget=1)
    assert "layer1.0.conv1" in record_of(calibrated).gained_bias
    path = tmp_path / "net.safetensors"
    normsearch.save(calibrated, path, architecture=architecture, plan=plan)
    with torch.no_grad():
        assert torch.equal(normsearch.load(path).model(x), calibrated(x))
    for name, text in scripts(calibrated, architecture, plan, path.name).items():
        (tmp_path / name).write_text(text)
    script = runpy.run_path(str(tmp_path / "model.py"))
    with torch.no_grad():
        assert torch.equal(script["load"]()(x), calibrated(x))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "holds 0 of them"),
        ([images()], "holds 1 of them"),
        (iter([images(), images()]), "can be read only once"),
        (images(), "single Tensor"),
        ([images(), images() / 0 * 0], "batch 2 holds NaN"),
        ([images(), images() * 1e38], "not finite"),
        ([images(), images()[:0]], "the batch is empty"),
        ([images(), torch.randn(2, 4, 8, 8)], "failed on the given inputs"),
    ],
)
def test_batches_that_cannot_be_used(batches: Any, message: str) -> None:
    original = network()
    with pytest.raises(ModelError, match=message):
        calibrate(convert(original, "group(groups=4)"), original, batches, budget=1)


def test_models_that_do_not_belong_together() -> None:
    original = network()
    other = nn.Sequential(*list(original.children())[:7], nn.Flatten(), nn.Linear(16, 6))
    with pytest.raises(ModelError, match="outputs do not match"):
        calibrate(convert(other, "rms"), original, images().split(12))
    with pytest.raises(ModelError, match="normalizes at '1'"):
        calibrate(nn.Linear(3, 3), original, images().split(12))
    with pytest.raises(ModelError, match=r"expected two torch\.nn\.Module, got int"):
        calibrate(3, original, images().split(12))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no floating-point tensor"):
        calibrate(_Classes(convert(original, "rms")), _Classes(original), images().split(12))


def test_a_model_that_cannot_be_copied() -> None:
    original = network()
    converted = convert(original, "rms")
    converted.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match="calibration leaves what it is given untouched"):
        calibrate(converted, original, images().split(12))


def test_a_forward_pass_without_gradients_is_fitted_but_not_trained() -> None:
    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

    original = Inference().eval()
    record = record_of(calibrate(convert(original, "rms"), original, images().split(12), budget=9))
    assert [rung.steps for rung in record.rungs if rung.name in ("affine", "all")] == [0, 0]


class _Classes(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.net(x).argmax(1))


@pytest.mark.parametrize("options", [{"budget": -1}, {"budget": 1.5}, {"parameters": "none"}])
def test_arguments_out_of_range(options: dict[str, Any]) -> None:
    original = network()
    with pytest.raises(PlanError, match=next(iter(options))):
        calibrate(convert(original, "rms"), original, images().split(12), **options)
