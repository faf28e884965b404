"""The moments engine: closed-form passes against autograd, formats, precision, memory, transforms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normsearch import compiled
from normsearch.memory import peak_memory
from normsearch.methods.batch_instance import BatchInstanceNorm
from normsearch.methods.batch_renorm import BatchRenorm
from normsearch.methods.filter_response import FilterResponseNorm
from normsearch.methods.ghost import GhostBatchNorm
from normsearch.methods.ibn import InstanceBatchNorm
from normsearch.methods.rms import SampleRMSNorm
from normsearch.methods.sparse_switchable import SparseSwitchableNorm
from normsearch.methods.switchable import SwitchableNorm
from normsearch.methods.weight import MeanOnlyBatchNorm
from normsearch.moments import _differentiated, normalize
from normsearch.passes import input_gradient, spatial_affine, spatial_moments, spatial_sums

torch.set_num_threads(1)

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "switchable": SwitchableNorm,
    "sparse_switchable": SparseSwitchableNorm,
    "batch_instance": BatchInstanceNorm,
    "batch_renorm": BatchRenorm,
    "ibn": InstanceBatchNorm,
    "ghost": lambda c, **factory: GhostBatchNorm(c, size=2, **factory),
    "filter_response": FilterResponseNorm,
    "rms": SampleRMSNorm,
}
BOTH = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
EVERY = pytest.mark.parametrize("name", LAYERS)


def make(name: str, channels: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer whose every number is random, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[name](channels, dtype=dtype)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            # A threshold in the middle of the outputs would make finite differences hit its kink.
            parameter.copy_(noise * 0.8 + 0.1 if key == "rho" else noise - 9 if key == "tau" else noise + 0.2)
        for key, buffer in layer.named_buffers():
            if key.startswith("running"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    if name == "batch_renorm":
        layer.get_buffer("renorm_step").fill_(40_000)
    return layer


def layouts(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same values in every memory layout that the engine tells apart."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) + 1
    padded = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
    padded[..., ::2] = x
    found = {
        "contiguous": x,
        "strided": padded[..., ::2],
        "batch last": x.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    if len(shape) > 3:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        found["channels_last"] = x.to(memory_format=last)
    return found


def gradients(layer: nn.Module, x: Tensor, direction: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of the input and all parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), list(torch.autograd.grad(y, [x, *layer.parameters()], direction))


# 20,000 elements per sample take channels_last's other way, and several blocks.
@pytest.mark.parametrize(
    "shape", [(3, 4, 5, 2), (2, 8, 50, 50), (70, 16, 16, 16), (3, 4, 6), (2, 3, 2, 3, 2)]
)
def test_passes_equal_the_plain_formulas_in_every_layout(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    a, b, c = (torch.randn(shape[:2], generator=generator, dtype=torch.float64) for _ in range(3))
    spatial = tuple(range(2, len(shape)))
    wide = [part.reshape(*shape[:2], *(1 for _ in spatial)) for part in (a, b, c)]
    for layout, x in layouts(shape).items():
        mean, variance = spatial_moments(x)
        centred = x - x.mean(spatial, keepdim=True)
        assert torch.allclose(mean, x.mean(spatial), rtol=1e-12), layout
        assert torch.allclose(variance, centred.square().mean(spatial), rtol=1e-12), layout
        y = spatial_affine(x, mean, a, b)
        assert torch.allclose(y, centred * wide[0] + wide[1], rtol=1e-10, atol=1e-12), layout
        plain, product = spatial_sums(grad, x, mean)
        assert torch.allclose(plain, grad.sum(spatial), rtol=1e-10, atol=1e-11), layout
        assert torch.allclose(product, (grad * centred).sum(spatial), rtol=1e-10, atol=1e-11), layout
        dx = input_gradient(grad, x, mean, a, b, c)
        wanted = grad * wide[0] + centred * wide[1] + wide[2]
        assert torch.allclose(dx, wanted, rtol=1e-10, atol=1e-12), layout
        if layout in ("contiguous", "channels_last"):
            assert y.stride() == dx.stride() == x.stride(), layout


@EVERY
@BOTH
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (3, 8, 50, 50), (4, 6, 7)])
def test_closed_form_equals_autograd_in_every_layout(
    name: str, training: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = make(name, shape[1]).train(training)
    inputs = layouts(shape)
    found = {key: gradients(copy.deepcopy(layer), x, direction) for key, x in inputs.items()}
    monkeypatch.setattr("normsearch.moments._has_closed_form", lambda x: False)
    wanted_y, wanted = gradients(layer, inputs["contiguous"], direction)
    for key, (y, got) in found.items():
        assert torch.allclose(y, wanted_y, rtol=1e-9, atol=1e-10), key
        for one, other in zip(got, wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-8, atol=1e-9), key


@EVERY
@BOTH
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_differentiates_twice_in_both_modes(name: str, training: bool, last: bool) -> None:
    layer = make(name, 2).train(training)
    buffers = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    names = [key for key, _ in layer.named_parameters()]
    x = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        state = {**dict(zip(names, parameters, strict=True)), **{k: v.clone() for k, v in buffers.items()}}
        return torch.func.functional_call(layer, state, (x,))

    variables = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    if name != "batch_renorm" or not training:
        # Its r and d are constants by definition, which finite differences cannot know.
        assert torch.autograd.gradcheck(run, variables)
        assert torch.autograd.gradgradcheck(run, variables)


@EVERY
def test_first_and_second_gradients_equal_autograds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(layer: nn.Module) -> list[Tensor]:
        x = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        variables = [x.requires_grad_(), *layer.parameters()]
        first = torch.autograd.grad(layer(x).pow(3).sum(), variables, create_graph=True)
        penalty = sum(part.square().sum() for part in first)
        return list(torch.autograd.grad(penalty, variables, allow_unused=True, materialize_grads=True))

    layer = make(name, 4).train()
    got = second(copy.deepcopy(layer))
    monkeypatch.setattr("normsearch.moments._has_closed_form", lambda x: False)
    for one, other in zip(got, second(layer), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max().clamp_min(1)))


def test_a_rule_that_hides_what_it_uses_gets_its_gradients() -> None:
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(
        2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()

    def rule(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, str]:
        return factor * (variance + 1).rsqrt(), mean.square(), "handed back"

    (y, extra), (wanted, _) = normalize(x, rule), _differentiated(x, rule)
    assert extra == "handed back"
    for one, other in zip(
        torch.autograd.grad(y.pow(2).sum(), (x, factor)),
        torch.autograd.grad(wanted.pow(2).sum(), (x, factor)),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-10)


@EVERY
@BOTH
def test_nothing_of_the_inputs_size_is_kept_but_the_input(name: str, training: bool) -> None:
    layer = make(name, 8, torch.float32).train(training)
    if name == "filter_response":
        # Its threshold is a step of its own, after the normalization.
        layer.tau = None
    x = torch.randn(4, 8, 16, 16).requires_grad_()
    kept: dict[int, int] = {}

    def pack(part: Tensor) -> Tensor:
        kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return part

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        y = layer(x)
    large = {pointer for pointer, size in kept.items() if size >= x.untyped_storage().nbytes()}
    assert large == {x.untyped_storage().data_ptr()}
    y.sum().backward()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "filter_response"])
def test_peak_memory_is_that_of_batch_norm(name: str, dtype: torch.dtype, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(64, 32, 32, 32).to(dtype).to(memory_format=layout)
    grad = torch.randn_like(x)

    def peak(layer: nn.Module) -> int:
        def run() -> None:
            layer(x.detach().requires_grad_()).backward(grad)

        run()
        return peak_memory(run, torch.device("cpu"))

    assert peak(make(name, 32, torch.float32).train()) <= 1.1 * peak(nn.BatchNorm2d(32))


@EVERY
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_output_and_gradient_keep_the_memory_format(name: str, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(3, 4, 5, 5).to(memory_format=layout).requires_grad_()
    y = make(name, 4, torch.float32).train()(x)
    # A gradient in the other format, as a view or a flatten after the layer may send it.
    other = torch.contiguous_format if last else torch.channels_last
    y.backward(torch.randn(3, 4, 5, 5).to(memory_format=other))
    assert y.is_contiguous(memory_format=layout)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [16, 150])
def test_variance_keeps_its_digits_at_a_mean_of_a_thousand_deviations(size: int, last: bool) -> None:
    exact = (
        torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1000
    )
    x = exact.float().to(memory_format=torch.channels_last if last else torch.contiguous_format)
    _, variance = spatial_moments(x)
    wanted = x.double().var((2, 3), unbiased=False)
    assert ((variance - wanted) / wanted).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_half_precision_inputs_have_single_precision_statistics(dtype: torch.dtype, last: bool) -> None:
    x = (torch.randn(3, 4, 40, 40, generator=torch.Generator().manual_seed(0)) + 30).to(dtype)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    mean, variance = spatial_moments(x)
    assert mean.dtype == variance.dtype == torch.float32
    assert torch.allclose(mean.double(), x.double().mean((2, 3)), rtol=1e-6)
    assert torch.allclose(variance.double(), x.double().var((2, 3), unbiased=False), rtol=1e-4)


@pytest.mark.parametrize("name", ["switchable", "batch_instance", "batch_renorm", "ibn"])
def test_autocast_keeps_statistics_and_gradients_in_single_precision(name: str) -> None:
    layer = make(name, 4, torch.float32).train()
    plain = copy.deepcopy(layer)
    x = torch.randn(4, 4, 9, 9, generator=torch.Generator().manual_seed(0)) + 1000
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, got = gradients(layer, x, direction)
    wanted_y, wanted = gradients(plain, x, direction)
    assert torch.equal(y, wanted_y)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@EVERY
def test_what_needs_no_gradient_gets_none_and_changes_nothing(name: str) -> None:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = make(name, 4).train()
    _, (of_x, *of_parameters) = gradients(copy.deepcopy(layer), x, direction)
    alone = copy.deepcopy(layer)
    alone(x).backward(direction)
    for parameter, wanted in zip(alone.parameters(), of_parameters, strict=True):
        assert torch.allclose(parameter.grad, wanted, rtol=1e-12)
    fixed = copy.deepcopy(layer).requires_grad_(False)
    free = x.clone().requires_grad_()
    fixed(free).backward(direction)
    assert torch.allclose(free.grad, of_x, rtol=1e-12)
    assert all(parameter.grad is None for parameter in fixed.parameters())
    with torch.no_grad():
        assert not layer(x).requires_grad


@EVERY
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (2, 4, 80, 80), (4, 4, 6)])
def test_the_output_may_be_changed_in_place(name: str, shape: tuple[int, ...]) -> None:
    layer = make(name, 4).train()
    for key, x in layouts(shape).items():
        x = x.requires_grad_()
        changed, kept = copy.deepcopy(layer), copy.deepcopy(layer)
        if name == "filter_response":
            # The threshold keeps its output.
            changed.tau = kept.tau = None
        got = torch.autograd.grad(changed(x).relu_().sum(), [x, *changed.parameters()])
        wanted = torch.autograd.grad(kept(x).relu().sum(), [x, *kept.parameters()])
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other), key


@EVERY
def test_backward_can_run_twice_over_one_graph(name: str) -> None:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = make(name, 4).train()
    variables = [x.requires_grad_(), *layer.parameters()]
    loss = layer(x).pow(2).sum()
    first = torch.autograd.grad(loss, variables, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, variables), strict=True):
        assert torch.equal(one, other)


@EVERY
@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (300, 4, 2, 2), (2, 4, 1, 3)])
def test_one_sample_and_very_many(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(name, 4).train()
    x = layouts(shape)
    direction = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = [gradients(copy.deepcopy(layer), part, direction) for part in x.values()]
    monkeypatch.setattr("normsearch.moments._has_closed_form", lambda x: False)
    wanted_y, wanted = gradients(layer, x["contiguous"], direction)
    for y, got in found:
        assert torch.allclose(y, wanted_y, rtol=1e-8, atol=1e-9)
        for one, other in zip(got, wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-7, atol=1e-8)


@EVERY
@BOTH
def test_exports_as_plain_operations(name: str, training: bool) -> None:
    layer = make(name, 4, torch.float32).train(training)
    x = torch.randn(3, 4, 5, 5)
    program = torch.export.export(copy.deepcopy(layer), (x,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    # The running statistics move without gradient, which export keeps as a region of its own.
    usual = ("aten.", "<built-in function getitem>", "wrap_with_set_grad_enabled")
    assert all(target.startswith(usual) for target in targets), targets
    assert not any("native_" in target for target in targets), targets
    (y,) = (program.module()(x),)
    assert torch.allclose(y, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["switchable", "batch_instance", "rms"])
def test_torchscript_traces_eval_mode(name: str) -> None:
    layer = make(name, 4).eval()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        # torch.jit is deprecated, and the input check branches on the shape.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, (x,))
    assert torch.allclose(traced(x + 1), layer(x + 1), rtol=1e-10)


# torch's own decompositions for forward mode use the deprecated torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@EVERY
def test_forward_mode_equals_reverse_mode(name: str) -> None:
    if name == "filter_response":
        pytest.skip("its threshold has no forward mode")
    layer = make(name, 3).eval()
    generator = torch.Generator().manual_seed(0)
    x, tangent = (torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    _, forward = torch.func.jvp(layer, (x,), (tangent,))
    x.requires_grad_()
    reverse = torch.autograd.functional.jvp(layer, x, tangent)[1]
    assert torch.allclose(forward, reverse, rtol=1e-9)


@EVERY
def test_vmap_over_models_equals_each_alone(name: str) -> None:
    models = [make(name, 3).eval() for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.9)
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def call(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    together = torch.vmap(call)(parameters, buffers)
    for row, model in zip(together, models, strict=True):
        assert torch.allclose(row, model(x), rtol=1e-10)


#: The last has maps large enough for the kernels of channels_last.
COMPILED = {
    "contiguous": ((4, 16, 8, 8), torch.contiguous_format),
    "channels_last": ((4, 16, 8, 8), torch.channels_last),
    "large channels_last": ((4, 16, 48, 44), torch.channels_last),
}


@EVERY
@pytest.mark.parametrize("where", COMPILED)
def test_compiled_equals_eager(name: str, where: str) -> None:
    check_compiled(name, "aot_eager", *COMPILED[where])


@pytest.mark.parametrize("name", ["switchable", "filter_response"])
@pytest.mark.parametrize("where", COMPILED)
def test_compiled_layers_copy_nothing_of_the_inputs_size(name: str, where: str) -> None:
    shape, layout = COMPILED[where]
    layer = make(name, shape[1], torch.float32).train()
    torch.compiler.reset()
    layer.compile(fullgraph=True, backend="aot_eager")
    x, grad = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    gradients(layer, x, grad)
    with torch.profiler.profile(record_shapes=True) as profile:
        y, (dx, *_) = gradients(layer, x, grad)
    assert y.stride() == dx.stride() == x.stride()
    events = profile.events()
    assert events is not None
    called = {event.name for event in events}
    # What the sums of large maps are made of.
    own = where == "large channels_last" and name == "switchable"
    assert ("aten::native_batch_norm_backward" in called) == own
    copies = [
        event.name for event in events if event.name in ("aten::clone", "aten::copy_", "aten::contiguous")
    ]
    sizes = [event.input_shapes[0] for event in events if event.name in copies]
    assert sizes
    assert list(shape) not in sizes


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 4, 150, 150), (2, 4, 5000), (2, 4, 6, 30, 30)])
@pytest.mark.parametrize("outlier", [False, True])
def test_compiled_moments_keep_their_digits(shape: tuple[int, ...], outlier: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1000
    if outlier:
        # In the middle, where the constant is taken that is subtracted first.
        x.flatten(2)[:, :, x[0, 0].numel() // 2] += 300
    mean, variance = torch.compile(compiled._seen_moments, fullgraph=True, backend="aot_eager")(x, False)
    spatial = tuple(range(2, x.dim()))
    wanted = x.double().var(spatial, unbiased=False)
    assert torch.allclose(mean.double(), x.double().mean(spatial), rtol=1e-6)
    assert ((variance - wanted) / wanted).abs().max() < 1e-4


def test_compiled_sizes_may_be_open() -> None:
    eager = make("filter_response", 6)
    layer = copy.deepcopy(eager)
    torch.compiler.reset()
    layer.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 6, 9, 5), (2, 6, 7, 8), (3, 6, 60, 60)):
        for key in ("contiguous", "channels_last"):
            x = layouts(shape)[key]
            direction = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            (y, got), (wanted_y, wanted) = gradients(layer, x, direction), gradients(eager, x, direction)
            assert torch.allclose(y, wanted_y, rtol=1e-9, atol=1e-10), (shape, key)
            for one, other in zip(got, wanted, strict=True):
                assert torch.allclose(one, other, rtol=1e-8, atol=1e-9), (shape, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["switchable", "batch_renorm", "ibn", "sparse_switchable", "filter_response"]
)
@pytest.mark.parametrize("where", COMPILED)
def test_compiled_by_inductor_equals_eager(name: str, where: str) -> None:
    check_compiled(name, "inductor", *COMPILED[where])


def check_compiled(name: str, backend: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Compare outputs, gradients and buffers: none that forward moves may be read again in backward."""
    eager = make(name, 16, torch.float32).train()
    compiled = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled.compile(fullgraph=True, backend=backend)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (y, got), (wanted_y, wanted) = gradients(compiled, x, direction), gradients(eager, x, direction)
    assert torch.allclose(y, wanted_y, rtol=1e-4, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    for key, buffer in eager.named_buffers():
        assert torch.allclose(compiled.get_buffer(key), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_mean_only_equals_its_formula(scale: bool, last: bool) -> None:
    layer = MeanOnlyBatchNorm(4, scale=scale, dtype=torch.float64)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, got = gradients(layer, x, direction)
    centred = x - x.mean((0, 2, 3), keepdim=True)
    assert torch.allclose(y, centred, rtol=1e-10, atol=1e-12)
    assert torch.allclose(got[0], direction - direction.mean((0, 2, 3), keepdim=True), rtol=1e-10, atol=1e-12)
    assert torch.allclose(got[-1], direction.sum((0, 2, 3)), rtol=1e-10, atol=1e-11)
