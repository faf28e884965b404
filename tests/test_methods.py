"""The contract that every registered method keeps: values, gradients, exactness, dtypes, state."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import REFERENCES, WEIGHT_REFERENCES
from torch import Tensor, nn

from normsearch import METHODS, MethodError, find_sites, parse_method
from normsearch.methods import Method, TrainedNorm

SPELLINGS = tuple(REFERENCES)
#: Methods that replace the site alone; the others have tests of their own in test_weights.py.
OF_SITES = list(dict.fromkeys(parse_method(spelling).name for spelling in SPELLINGS))
#: Not defined where a sample has one element per channel or group.
NEED_SPACE = ("instance", "filter_response", "ibn", "evonorm_s0(groups=2)")
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
STATISTICS_OF_THE_BATCH = (
    *("batch", "batch_renorm", "batch_instance", "switchable"),
    *("ghost", "ibn", "sparse_switchable"),
)


def trained(
    shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> nn.Module:
    """A BatchNorm for inputs of ``shape`` whose every number is random; γ has a zero and a negative."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    layer = LAYERS[len(shape)](channels, dtype=dtype, **options)
    with torch.no_grad():
        if layer.affine:
            layer.weight.copy_(torch.randn(channels, generator=generator))
            layer.weight[0] = 0
            layer.weight[-1] = -layer.weight[-1].abs() - 0.1
            layer.bias.copy_(torch.randn(channels, generator=generator))
        if layer.track_running_stats:
            layer.running_mean.copy_(torch.randn(channels, generator=generator))
            layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.3)
            layer.num_batches_tracked.fill_(7)
    return layer


def built(spelling: str | Method, layer: nn.Module, x: Tensor | None = None) -> nn.Module:
    """What the method puts in the layer's place."""
    (site,) = find_sites(layer)
    if x is not None:
        site = replace(site, input_shapes=(tuple(x.shape),), calls=1)
    method = parse_method(spelling) if isinstance(spelling, str) else spelling
    new = method.resolve(site).build(site, TrainedNorm.of(copy.deepcopy(layer), site)).module
    return new.train(layer.training)


def scrambled(layer: nn.Module, seed: int = 3) -> nn.Module:
    """Move every parameter off its initial value, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "rho":
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters (with gradient) and buffers by name, as before a forward pass."""
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return {**dict(layer.named_parameters()), **buffers}


def inputs_for(spelling: str, draw: st.DrawFn) -> Tensor:
    """An input on which the method is defined: some need space, batch statistics two values."""
    ranks = [3, 4, 5] if spelling in NEED_SPACE else [2, 3, 4, 5]
    rank = draw(st.sampled_from(ranks))
    batch = 4 if spelling == "ghost(size=2)" else draw(st.integers(2, 3))
    channels = draw(st.sampled_from([2, 4, 6]))
    least = 2 if spelling in NEED_SPACE else 1
    spatial = [draw(st.integers(least, 3)) for _ in range(rank - 2)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    offset = draw(st.sampled_from([0.0, 1.0, -30.0]))
    return torch.randn(batch, channels, *spatial, generator=generator, dtype=torch.float64) + offset


def test_every_registered_method_has_a_reference() -> None:
    spellings = (*REFERENCES, *WEIGHT_REFERENCES)
    assert {parse_method(spelling).name for spelling in spellings} == set(METHODS)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_layer_equals_its_slow_reference_in_values_and_gradients(
    spelling: str, training: bool, data: st.DataObject
) -> None:
    x = data.draw(st.composite(lambda draw: inputs_for(spelling, draw))())
    layer = scrambled(built(spelling, trained(tuple(x.shape)), x)).train(training)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    state = state_of(layer)
    x.requires_grad_()
    wanted = REFERENCES[spelling](x, state, layer.eps, training)
    got = layer(x)
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    variables = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(
            got, variables, direction, retain_graph=True, allow_unused=True, materialize_grads=True
        ),
        torch.autograd.grad(wanted, variables, direction, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s != "batch_renorm"])
def test_gradcheck(spelling: str, training: bool) -> None:
    # batch_renorm's r and d are constants by definition, which finite differences cannot know; with
    # r_max=1, d_max=0 they are, and the reference test covers its gradient elsewhere.
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer = scrambled(built(spelling, trained((3, 4, 2, 2)), x)).train(training)
    names = [name for name, _ in layer.named_parameters()]
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        state = {**dict(zip(names, parameters, strict=True)), **{k: v.clone() for k, v in buffers.items()}}
        return torch.func.functional_call(layer, state, (x,))

    variables = [x, *(parameter.detach().clone() for parameter in layer.parameters())]
    assert torch.autograd.gradcheck(run, [variable.requires_grad_() for variable in variables])


@pytest.mark.parametrize("spelling", STATISTICS_OF_THE_BATCH)
@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 2, 3)])
def test_running_statistics_move_as_in_batchnorm(
    spelling: str, momentum: float | None, shape: tuple[int, ...]
) -> None:
    if spelling in NEED_SPACE and len(shape) == 2:
        pytest.skip("not defined without space")
    old = trained(shape, momentum=momentum).train()
    new = built(spelling, old)
    for seed in range(3):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        old(x)
        new(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(new, name), getattr(old, name), rtol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "shape", [(4, 6), (2, 6, 5), (2, 6, 3, 3), (2, 6, 2, 2, 3), (1, 1, 4, 4), (2, 6, 1, 1)]
)
@pytest.mark.parametrize("spelling", [*OF_SITES, "switchable(bn_logit=40)", "frozen(trainable=true)"])
def test_exact_methods_keep_the_eval_function(spelling: str, shape: tuple[int, ...], affine: bool) -> None:
    method = parse_method(spelling)
    old = trained(shape, affine=affine).eval()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3 + 1
    (site,) = find_sites(old)
    if method.refusal(replace(site, input_shapes=(shape,))) is not None:
        assert not method.exact
        return
    drift = (built(method, old, x)(x) - old(x)).norm() / old(x).norm()
    assert (drift <= 1e-10) == method.exact


@pytest.mark.parametrize("spelling", OF_SITES)
def test_new_layers_have_the_numbers_that_a_method_says_they_have(spelling: str) -> None:
    method, old = parse_method(spelling), trained((2, 8, 4, 4))
    new, (site,) = built(spelling, old), find_sites(old)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert (getattr(new, name, None) is not None) == (name in method.leaves(site))
    for carried, names in (
        (method.carries_parameters, ("weight", "bias")),
        (method.carries_statistics, ("running_mean", "running_var")),
    ):
        for name in names if carried else ():
            assert torch.equal(getattr(new, name), getattr(old, name))


@pytest.mark.parametrize("spelling", [s for s in OF_SITES if s not in ("batch", "frozen")])
def test_untrained_layer_gets_the_methods_own_initialisation(spelling: str) -> None:
    new = built(spelling, nn.BatchNorm2d(8))
    assert torch.equal(new.weight, torch.ones(8))
    assert torch.equal(new.bias, torch.zeros(8))
    if "switchable" in spelling:
        assert torch.equal(new.mean_logits, torch.zeros(3))
    if spelling == "sparse_switchable":
        assert new.sparse_step == 0
    if spelling == "evonorm_s0":
        assert torch.equal(new.v, torch.ones(8))
    if spelling == "batch_renorm":
        assert new.renorm_step == 0
    if spelling == "batch_instance":
        assert torch.equal(new.rho, torch.ones(8))


def test_trained_network_skips_the_warm_up_of_batch_renorm() -> None:
    r_max, d_max = built("batch_renorm", trained((2, 8, 4, 4))).bounds()
    assert (float(r_max), float(d_max)) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("step", "r_max", "d_max"),
    [
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (90_000, 3, 5),
    ],
)
def test_batch_renorm_schedule(step: int, r_max: float, d_max: float) -> None:
    layer = built("batch_renorm", nn.BatchNorm2d(4))
    layer.renorm_step.fill_(step)
    assert [float(bound) for bound in layer.bounds()] == pytest.approx([r_max, d_max])


def test_unbounded_batch_renorm_trains_with_the_running_statistics() -> None:
    old = trained((8, 4, 3, 3))
    x = torch.randn(8, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4 + 2
    new = built("batch_renorm(r_max=1e9, d_max=1e9)", old).train()
    assert torch.allclose(new(x), old.eval()(x), rtol=1e-9)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_group_norm_with_one_group_is_layer_and_with_c_groups_is_instance(channels: int) -> None:
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    old = trained((2, channels, 3, 3))
    assert torch.equal(built("group(groups=1)", old, x)(x), built("layer", old, x)(x))
    whole = built(f"group(groups={channels})", old, x)(x)
    assert torch.allclose(whole, built("instance", old, x)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(512, 32), (64, 4), (19, 1), (48, 3), (16, 1), (1, 1), (33, 1), (96, 6), (1000, 25)],
)
def test_default_groups_leave_at_least_sixteen_channels_each(channels: int, groups: int) -> None:
    (site,) = find_sites(nn.BatchNorm2d(channels))
    assert str(parse_method("group").resolve(site)) == f"group(groups={groups})"


def test_explicit_groups_become_a_divisor_and_warn_at_one_channel_each() -> None:
    (site,) = find_sites(nn.BatchNorm2d(19))
    method = parse_method("group(groups=32)")
    assert str(method.resolve(site)) == "group(groups=19)"
    assert method.notes(site) == (
        "32 groups do not divide 19 channels: 19, the next number that does",
        "one channel per group: this is instance normalization (19 groups)",
    )
    assert str(parse_method("group(groups=18)").resolve(site)) == "group(groups=1)"


def _train_towards_instance_norm(layer: nn.Module, optimizer: str, gate: str, scale: float) -> nn.Module:
    """Regress on instance norm's output of inputs whose contrast differs from sample to sample."""
    generator = torch.Generator().manual_seed(0)
    groups = [
        {
            "params": [p for n, p in layer.named_parameters() if gate in n],
            "lr": 1e-2 * scale,
            "weight_decay": 0.0,
        },
        {"params": [p for n, p in layer.named_parameters() if gate not in n], "lr": 1e-2},
    ]
    step = torch.optim.SGD(groups, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(groups)
    teacher = nn.InstanceNorm2d(4)
    for _ in range(300):
        style = torch.rand(16, 4, 1, 1, generator=generator) * 3 + 0.2
        x = torch.randn(16, 4, 6, 6, generator=generator) * style + style
        loss = (layer(x) - teacher(x)).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
    return layer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rho_leaves_its_bound_and_reaches_instance_norm_where_that_is_right(optimizer: str) -> None:
    old = nn.BatchNorm2d(4)
    with torch.no_grad():
        old.running_mean.fill_(1.7)
        old.running_var.fill_(4.0)
    layer = built("batch_instance", old.train())
    assert torch.equal(layer.rho, torch.ones(4))
    _train_towards_instance_norm(layer, optimizer, "rho", 10)
    assert layer.rho.clamp(0, 1).max() < 0.05


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_switchable_logits_leave_batch_norm_where_instance_norm_is_right(optimizer: str) -> None:
    old = nn.BatchNorm2d(4)
    with torch.no_grad():
        old.running_mean.fill_(1.7)
        old.running_var.fill_(4.0)
    layer = built("switchable", old.train())
    assert layer.mean_logits.softmax(0)[2] > 0.9
    _train_towards_instance_norm(layer, optimizer, "logits", 10)
    assert layer.mean_logits.softmax(0)[0] > 0.6
    assert layer.var_logits.softmax(0)[0] > 0.6


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_low_precision_stays_close_to_double(spelling: str, dtype: torch.dtype, training: bool) -> None:
    old = trained((8, 4, 5, 5), dtype=dtype).train(training)
    x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer, exact = built(spelling, old, x), built(spelling, old, x).double()
    y, wanted = layer(x), exact(x.double())
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    assert (y.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_autocast_trains_with_single_precision_parameters(spelling: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), built(spelling, trained((2, 4, 5, 5), dtype=torch.float32)).train()
    )
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(model)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert (y.float() - wanted).norm() / wanted.norm() < 3e-2
    assert model[0].weight.grad.dtype == torch.float32


# frozen, rms and filter_response have no variance of their own.
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s not in ("frozen", "rms", "filter_response")])
def test_variance_survives_a_mean_of_a_thousand_deviations(spelling: str) -> None:
    x = torch.randn(4, 4, 9, 9, generator=torch.Generator().manual_seed(0)) + 1000
    layer = built(spelling, nn.BatchNorm2d(4), x).train()
    wanted = built(spelling, nn.BatchNorm2d(4), x).double().train()(x.double())
    assert (layer(x).double() - wanted).norm() / wanted.norm() < 2e-3


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_channels_last_gives_the_same_values(spelling: str, training: bool) -> None:
    old = trained((3, 4, 5, 5)).train(training)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, last = built(spelling, old, x), built(spelling, old, x)
    assert torch.allclose(plain(x), last(x.to(memory_format=torch.channels_last)), rtol=1e-10)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_saves_loads_and_copies(spelling: str) -> None:
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = scrambled(built(spelling, trained((3, 4, 5, 5)).train(), x))
    layer(x)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    fresh = built(spelling, nn.BatchNorm2d(4, dtype=torch.float64), x)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    layer.eval()
    assert torch.equal(fresh.eval()(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert repr(layer).startswith(type(layer).__name__ + "(")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_graph_breaks(spelling: str, training: bool) -> None:
    old = trained((3, 4, 5, 5)).train(training)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, compiled = built(spelling, old, x), built(spelling, old, x)
    torch.compiler.reset()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(x), plain(x), rtol=1e-10)
    for name, buffer in plain.named_buffers():
        assert torch.allclose(compiled.get_buffer(name), buffer, rtol=1e-10)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if parse_method(s).batch_independent])
def test_batch_independent_layers_give_per_sample_gradients_under_vmap(spelling: str) -> None:
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = scrambled(built(spelling, trained((5, 4, 3, 3)), x))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None],)).pow(3).sum()

    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for row, sample in enumerate(x):
        for name, gradient in torch.func.grad(loss)(parameters, sample).items():
            assert torch.allclose(together[name][row], gradient, rtol=1e-10)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_differentiates_twice(spelling: str) -> None:
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = built(spelling, trained((3, 2, 2, 2)), x).eval()
    assert torch.autograd.gradgradcheck(layer, [x.requires_grad_()])


@pytest.mark.parametrize("shape", [(4,), (4, 5, 5), (2, 3, 5, 5), (1, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize(
    "spelling",
    [
        *("rms", "layer(axes=channel)", "frozen", "batch_renorm", "batch_instance", "switchable"),
        *("filter_response", "evonorm_s0", "ghost", "ibn", "sparse_switchable"),
    ],
)
def test_own_layers_refuse_other_shapes_by_name(spelling: str, shape: tuple[int, ...]) -> None:
    layer = built(spelling, nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"expects \(N, 4\).*x\[None\]"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("grup", "unknown method 'grup'; there are batch,"),
        ("group(8)", "write option=value"),
        ("group(groups=8, groups=4)", "gives groups twice"),
        ("group(groups=0)", "at least 1"),
        ("evonorm_s0(groups=0)", "at least 1"),
        ("ghost(size=0)", "at least 1"),
        ("sparse_switchable(steps=0)", "at least 1"),
        ("group(weight_standardization=1)", "true or false"),
        ("group(groups=2.5)", "a whole number"),
        ("group(groups=true)", "a whole number"),
        ("group(size=3)", "it has groups"),
        ("instance(eps=1)", "has no option 'eps': it has none"),
        ("layer(axes=time)", "all or channel"),
        ("batch_renorm(r_max=0.5)", "at least 1"),
        ("switchable(bn_logit=nan)", "a number"),
        ("frozen(trainable=1)", "true or false"),
        ("__import__('os')", "cannot read"),
        ("group(groups=__import__)", "cannot read|a whole number"),
        ("g" * 300, "at most 200 characters, got 300"),
        ("", "cannot read"),
    ],
)
def test_invalid_spellings_say_what_is_wrong(spelling: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        parse_method(spelling)


@pytest.mark.parametrize(
    "spelling",
    [
        "group",
        "group(groups=8)",
        "group(groups=8, weight_standardization=true)",
        "layer(axes=channel)",
        "layer(axes=channel, whiten=true)",
        "ghost(size=8)",
        "sparse_switchable(steps=100)",
        "switchable(bn_logit=5.0)",
        "batch_renorm(r_max=2.0)",
        "frozen(trainable=true)",
    ],
)
def test_spelling_round_trips(spelling: str) -> None:
    assert str(parse_method(spelling)) == spelling
    assert parse_method(str(parse_method(spelling))) == parse_method(spelling)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="agroupxs(=),. 0123456789-_e\n", max_size=40))
def test_parser_never_fails_but_by_name(text: str) -> None:
    try:
        method = parse_method(text)
    except MethodError:
        return
    assert parse_method(str(method)) == method


@pytest.mark.parametrize("spelling", [3, None, b"group"])
def test_a_spelling_is_text(spelling: object) -> None:
    with pytest.raises(MethodError, match="a method's spelling is text"):
        parse_method(spelling)  # type: ignore[arg-type]
