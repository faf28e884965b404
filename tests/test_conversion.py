"""What a conversion carries over besides the function, and what it refuses to lose."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from normsearch import (
    MethodError,
    PlanError,
    RefusedError,
    StateError,
    convert,
    convert_state_dict,
    find_sites,
    plan,
)
from normsearch.plans import Plan

torch.set_num_threads(1)

METHODS = [
    "frozen",
    "frozen(trainable=true)",
    "group",
    "layer",
    "layer(axes=channel)",
    "rms",
    "instance",
    "batch_renorm",
    "batch_instance",
    "switchable",
]
EXACT = ["frozen", "frozen(trainable=true)", "batch_renorm", "batch_instance", "switchable(bn_logit=40)"]
FOLDING = ["group", "layer", "layer(axes=channel)", "rms", "instance", "switchable"]
#: These keep γ and β themselves, the very same Parameters.
CARRYING = ["frozen", "frozen(trainable=true)", "batch_renorm", "batch_instance"]


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm the numbers of a trained one: nothing at its default."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked.fill_(100)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(generator=generator)
    return model


def net(**options: object) -> nn.Sequential:
    """Two convolutions with a trained BatchNorm each; paths 1 and 4."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1),
        nn.BatchNorm2d(16, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 5),
    )
    trained(model)
    return model


def images(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything a refused conversion must leave as it was, identities included."""
    return {
        "modules": [(path, id(module), module.training) for path, module in model.named_modules()],
        "parameters": [
            (name, id(p), p.requires_grad, p.detach().clone().tolist())
            for name, p in model.named_parameters()
        ],
        "buffers": [(name, id(b), b.clone().tolist()) for name, b in model.named_buffers()],
        "hooks": [
            (path, list(module._forward_hooks), list(module._forward_pre_hooks))
            for path, module in model.named_modules()
        ],
    }


# --- the numbers of the layer itself --------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_eps_survives(method: str) -> None:
    converted = convert(net(eps=0.25), method)
    assert [converted[1].eps, converted[4].eps] == [0.25, 0.25]


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_keep_the_eval_function(method: str) -> None:
    model = net(eps=0.25).double().eval()
    x = images().double()
    torch.testing.assert_close(convert(model, method)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", CARRYING)
def test_affine_false_stays_false_where_nothing_is_folded(method: str) -> None:
    the_plan = plan(net(affine=False), method)
    converted = convert(net(affine=False), the_plan)
    assert converted[1].weight is None
    assert converted[1].bias is None
    assert not any("gains" in note for row in the_plan.rows for note in row.notes)


@pytest.mark.parametrize("method", FOLDING)
def test_affine_false_gains_one_where_folding_needs_it_and_the_plan_says_so(method: str) -> None:
    the_plan = plan(net(affine=False), method)
    converted = convert(net(affine=False), the_plan)
    assert converted[1].weight.shape == converted[1].bias.shape == (32,)
    assert converted[1].affine
    for row, channels in zip(the_plan.rows, (32, 16), strict=True):
        assert any(f"gains a weight and a bias ({channels} each)" in note for note in row.notes)


@pytest.mark.parametrize("method", FOLDING)
def test_untrained_affine_false_gains_nothing(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, affine=False))
    the_plan = plan(model, method)
    converted = convert(model, the_plan)
    assert converted[1].weight is None
    assert converted[1].bias is None
    assert not any("gains" in note for row in the_plan.rows for note in row.notes)


def test_folded_affine_has_the_written_formula() -> None:
    model = net(affine=False, eps=1e-3).double()
    mean, variance = model[1].running_mean.reshape(2, 16), model[1].running_var.reshape(2, 16)
    centre = mean.mean(1, keepdim=True)
    spread = variance.mean(1, keepdim=True) + ((mean - centre) ** 2).mean(1, keepdim=True)
    scale = 1 / (variance + 1e-3).sqrt()
    converted = convert(model, "group")
    torch.testing.assert_close(converted[1].weight, (scale * (spread + 1e-3).sqrt()).reshape(-1))
    torch.testing.assert_close(converted[1].bias, (scale * (centre - mean)).reshape(-1))


@pytest.mark.parametrize("method", METHODS)
def test_meta_device_survives(method: str) -> None:
    with torch.device("meta"):
        model = net()
    converted = convert(model, method)
    tensors = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    assert {name: t.device.type for name, t in tensors.items()} == dict.fromkeys(tensors, "meta")
    assert tensors["1.weight"].shape == (32,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_survives(method: str, dtype: torch.dtype) -> None:
    converted = convert(net().to(dtype), method).eval()
    floating = [t for t in (*converted.parameters(), *converted.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {dtype}
    output = converted(images().to(dtype))
    assert output.dtype == dtype
    # A conversion in a narrow type is the conversion in a wide one, up to rounding.
    wide = convert(net().to(dtype).double(), method).eval()(images().to(dtype).double())
    error = (output.double() - wide).norm() / wide.norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_a_half_precision_model_with_single_precision_norms_stays_mixed(method: str, training: bool) -> None:
    model = net().bfloat16()
    for index in (1, 4):
        model[index].float()
    converted = convert(model, method).train(training)
    for index in (1, 4):
        floating = [*converted[index].parameters(), *converted[index].buffers()]
        assert {t.dtype for t in floating if t.is_floating_point()} == {torch.float32}
    assert converted[0].weight.dtype == torch.bfloat16
    output = converted(images().bfloat16())
    assert output.dtype == torch.bfloat16
    wide = convert(net().bfloat16().double(), method).train(training)(images().double())
    assert (output.double() - wide).norm() / wide.norm() < 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_stays_where_torch_keeps_it(method: str, training: bool) -> None:
    layer = trained(nn.BatchNorm2d(32)).train(training)
    x = torch.randn(4, 32, 6, 6).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    output = convert(nn.Sequential(layer), method, inputs=x)(x)
    # torch's own InstanceNorm2d returns the default layout, whatever comes in.
    assert output.is_contiguous(memory_format=torch.channels_last) == (method != "instance")
    expected = convert(nn.Sequential(layer), method, inputs=x)(x.contiguous())
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_the_default_layout_stays_too(method: str, training: bool) -> None:
    # Opacus' per-sample gradients of a following convolution are wrong, silently, for any other layout.
    layer = trained(nn.BatchNorm2d(32)).train(training)
    x = torch.randn(4, 32, 6, 6)
    assert convert(nn.Sequential(layer), method, inputs=x)(x).is_contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_to_convert_afterwards(method: str) -> None:
    converted = convert(net(), method)
    assert find_sites(converted) == ()
    assert find_sites(converted, images()) == ()
    with pytest.raises(PlanError, match="has no BatchNorm layer"):
        convert(converted, "group")


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_flags_survive_per_module(method: str) -> None:
    model = net().train()
    model[1].eval()
    model[5].eval()
    flags = {path: module.training for path, module in model.named_modules()}
    converted = convert(model, method)
    assert {path: converted.get_submodule(path).training for path in flags} == flags


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("frozen")])
def test_requires_grad_survives_per_parameter(method: str) -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    model[0].weight.requires_grad_(False)
    converted = convert(model, method)
    names = ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias", "3.weight"]
    found = {name: converted.get_parameter(name).requires_grad for name in names}
    assert list(found.values()) == [False, False, True, True, False, True]


@pytest.mark.parametrize("method", ["batch_instance", "switchable"])
@pytest.mark.parametrize("trainable", [True, False])
def test_parameters_that_a_method_adds_are_trained_where_the_layer_was(method: str, trainable: bool) -> None:
    model = net().requires_grad_(trainable)
    converted = convert(model, method)
    added = [p for name, p in converted[1].named_parameters() if name not in ("weight", "bias")]
    assert added
    assert {p.requires_grad for p in added} == {trainable}


def test_frozen_trains_nothing_and_its_trainable_form_keeps_what_the_user_froze() -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    frozen, trainable = convert(model, "frozen"), convert(model, "frozen(trainable=true)")
    assert [frozen[1].weight.requires_grad, frozen[1].bias.requires_grad] == [False, False]
    assert [trainable[1].weight.requires_grad, trainable[1].bias.requires_grad] == [False, True]


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_place", [True, False])
def test_hooks_go_on_working(method: str, in_place: bool) -> None:
    model = net().eval()
    calls: list[str] = []
    model[1].register_forward_pre_hook(lambda m, args: (calls.append("pre"), (args[0] + 1,))[1])
    model[1].register_forward_hook(lambda m, args, y: (calls.append("forward"), y * 2)[1])
    model[1].register_forward_hook(
        lambda m, args, kwargs, y: calls.append(f"kwargs {kwargs}"), with_kwargs=True
    )
    model[1].register_full_backward_hook(lambda m, given, got: calls.append("backward"))
    model[1].register_full_backward_pre_hook(lambda m, got: calls.append("backward pre"))
    without = net().eval()
    plain = convert(nn.Sequential(without[1]), method)
    converted = convert(model, method, in_place=in_place)
    x = images()
    hidden = converted[0](x).detach().requires_grad_()
    y = converted[1](hidden)
    torch.testing.assert_close(y, plain(hidden + 1) * 2)
    y.sum().backward()
    assert calls == ["pre", "forward", "kwargs {}", "backward pre", "backward"]


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_handle_still_removes_its_hook_after_in_place_conversion(method: str) -> None:
    model = net().eval()
    seen: list[str] = []
    handles = [
        model[1].register_forward_hook(lambda m, args, y: seen.append("forward")),
        model[1].register_forward_pre_hook(lambda m, args: seen.append("pre")),
        model[1].register_full_backward_hook(lambda m, given, got: seen.append("backward")),
        model[1].register_forward_hook(lambda m, a, k, y: seen.append("kwargs"), with_kwargs=True),
    ]
    convert(model, method, in_place=True)
    model(images()).sum().backward()
    assert seen == ["pre", "forward", "kwargs", "backward"]
    for handle in handles:
        handle.remove()
    model(images()).sum().backward()
    assert seen == ["pre", "forward", "kwargs", "backward"]


def test_a_removed_hook_stays_on_the_copy_and_leaves_the_original() -> None:
    model = net().eval()
    seen: list[str] = []
    handle = model[1].register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    converted = convert(model, "group")
    handle.remove()
    converted(images())
    model(images())
    assert seen == ["GroupNorm"]


# --- sharing --------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One BatchNorm under two names, in a list attribute, a dict, a tuple and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.BatchNorm2d(8)
        self.second = self.first
        self.layers = [self.conv, self.first]
        self.by_name = {"norm": self.first, "pair": (self.conv, self.first)}
        self._private = [self.first]
        # Keeps a second reference out of the module tree, as some code bases do.
        object.__setattr__(self, "unregistered", self.first)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.second(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_place", [True, False])
def test_one_layer_under_two_names_stays_one(method: str, in_place: bool) -> None:
    converted = convert(trained(Shared()), method, in_place=in_place)
    assert converted.first is converted.second
    assert not isinstance(converted.first, nn.BatchNorm2d)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "reference",
    [
        lambda m: m.layers[1],
        lambda m: m.by_name["norm"],
        lambda m: m.by_name["pair"][1],
        lambda m: m._private[0],
        lambda m: m.unregistered,
    ],
    ids=["list", "dict", "tuple inside a dict", "private list", "unregistered attribute"],
)
def test_plain_references_follow_the_new_layer(
    in_place: bool, reference: Callable[[Shared], nn.Module]
) -> None:
    converted = convert(trained(Shared()), "group", in_place=in_place)
    assert reference(converted) is converted.first


def test_a_list_that_the_user_holds_follows_an_in_place_conversion() -> None:
    model = trained(Shared())
    held = model.layers
    convert(model, "group", in_place=True)
    assert held is model.layers
    assert held[1] is model.first


# --- fused layers and parametrizations ------------------------------------------------------------


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
def test_a_fused_layer_keeps_its_activation(method: str, activation: type[nn.Module]) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=activation))).eval()
    converted = convert(model, method)
    torch.testing.assert_close(converted(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_a_fused_layer_keeps_its_dropout_between_norm_and_activation() -> None:
    layer = BatchNormAct2d(8, act_layer=nn.Sigmoid, drop_layer=nn.Dropout)
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), layer)).train()
    model[1].act.eval()
    converted = convert(model, "group")
    x = images()
    torch.manual_seed(3)
    got = converted(x)
    norm = convert(nn.Sequential(model[0], _bare(layer)), "group")
    torch.manual_seed(3)
    expected = torch.sigmoid(nn.functional.dropout(norm(x), 0.5))
    torch.testing.assert_close(got, expected)
    assert (got == 0.5).float().mean() > 0.3
    assert [converted[1].drop.training, converted[1].act.training] == [True, False]


def _bare(layer: BatchNormAct2d) -> nn.BatchNorm2d:
    bare = nn.BatchNorm2d(layer.num_features, layer.eps)
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if "." not in k})
    return bare


def test_a_fused_layer_without_activation_gets_none() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, apply_act=False))).eval()
    x = images()
    output = convert(model, "frozen")(x)
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)
    assert output.min() < 0


def test_hooks_on_a_fused_layer_see_what_comes_after_the_activation() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8))).eval()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    convert(model, "frozen")(images())
    model(images())
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_convolutions_stay_parametrized(
    parametrization: Callable[[nn.Module], nn.Module],
) -> None:
    model = net().eval()
    parametrization(model[0])
    x = images()
    before = model(x)
    converted = convert(model, "frozen(trainable=true)")
    assert parametrize.is_parametrized(converted[0], "weight")
    assert [k for k in converted.state_dict() if k.startswith("0.")] == [
        k for k in model.state_dict() if k.startswith("0.")
    ]
    torch.testing.assert_close(converted(x), before, rtol=1e-4, atol=1e-5)


# --- optimizers -----------------------------------------------------------------------------------


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
    model = net().train()
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
    model = net().train()
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
    model = net()
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
    model = net()
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[4].parameters()], lr=0.1)
    convert(model, "switchable", in_place=True, optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert not held & {id(p) for p in model[1].parameters()}
    assert {id(p) for p in model[4].parameters()} <= held


def test_affine_gained_by_folding_joins_the_optimizer() -> None:
    model = net(affine=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "group", in_place=True, optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(model[1].weight), id(model[1].bias), id(model[4].weight), id(model[4].bias)} <= held


def test_an_optimizer_made_from_named_parameters_keeps_names_and_parameters_together() -> None:
    model = net()
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
    model = net().train()
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
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="in_place=True"):
        convert(model, "group", optimizer=optimizer)


# --- keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["group", "batch_renorm", "switchable", "frozen"])
def test_keep_affine_carries_gamma_and_beta_only(method: str) -> None:
    model = net()
    layer = convert(model, method, keep="affine")[1]
    torch.testing.assert_close(layer.weight, model[1].weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, model[1].bias, rtol=0, atol=0)
    if method != "group":
        assert torch.equal(layer.running_mean, torch.zeros(32))
        assert torch.equal(layer.running_var, torch.ones(32))


@pytest.mark.parametrize("method", ["group", "batch_renorm", "switchable", "frozen"])
def test_keep_nothing_resets_the_layer(method: str) -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    layer = convert(model, method, keep="nothing")[1]
    assert torch.equal(layer.weight, torch.ones(32))
    assert torch.equal(layer.bias, torch.zeros(32))
    assert [layer.weight.requires_grad, layer.bias.requires_grad] == [False, method != "frozen"]
    if method != "group":
        assert torch.equal(layer.running_mean, torch.zeros(32))
        assert torch.equal(layer.running_var, torch.ones(32))


def test_keep_nothing_gives_batch_renorm_its_warm_up_back() -> None:
    assert int(convert(net(), "batch_renorm", keep="nothing")[1].renorm_step) == 0
    assert int(convert(net(), "batch_renorm")[1].renorm_step) == 40_000


def test_keep_without_statistics_adds_no_affine() -> None:
    layer = convert(net(affine=False), "group", keep="affine")[1]
    assert layer.weight is None


def test_an_unknown_keep_names_the_choices() -> None:
    with pytest.raises(PlanError, match="'all' is not one of function, affine, nothing"):
        convert(net(), "group", keep="all")  # type: ignore[arg-type]


# --- in place, copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_original_is_left_untouched(method: str) -> None:
    model = net().train()
    before, x = snapshot(model), images()
    converted = convert(model, method, inputs=x)
    assert converted is not model
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    converted.train()(x)
    assert snapshot(model) == before


def test_in_place_returns_the_model_and_keeps_other_modules() -> None:
    model = net()
    others = [id(model[index]) for index in (0, 2, 3, 5, 6, 7)]
    assert convert(model, "group", in_place=True) is model
    assert [id(model[index]) for index in (0, 2, 3, 5, 6, 7)] == others
    assert [type(model[index]) for index in (1, 4)] == [nn.GroupNorm, nn.GroupNorm]


def test_in_place_equals_the_copy() -> None:
    copied = convert(net(), "group").eval()
    edited = convert(net(), "group", in_place=True).eval()
    assert torch.equal(copied(images()), edited(images()))


def test_a_refused_in_place_conversion_leaves_the_model_untouched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False))
    before = snapshot(model)
    with pytest.raises(RefusedError, match="no running statistics") as caught:
        convert(model, "frozen", in_place=True)
    assert [refusal.site for refusal in caught.value.refusals] == ["2"]
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["frozen", "instance", "group"])
def test_an_optimizer_of_another_model_leaves_the_model_untouched(method: str) -> None:
    model, other = nn.Sequential(nn.Conv2d(3, 8, 3), trained(nn.BatchNorm2d(8))), net()
    before = snapshot(model)
    with pytest.raises(PlanError, match="no parameter of this model"):
        convert(model, method, in_place=True, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    assert snapshot(model) == before


def test_a_failed_forward_pass_leaves_the_model_untouched() -> None:
    model = net().train()
    before = snapshot(model)
    with pytest.raises(Exception, match="failed on the given inputs"):
        convert(model, "group", inputs=torch.zeros(1, 7), in_place=True)
    assert snapshot(model) == before


def test_random_numbers_are_not_used_up() -> None:
    model = net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    convert(model, "switchable", inputs=images())
    assert torch.equal(torch.rand(3), expected)


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_survives_json() -> None:
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.BatchNorm2d(32, momentum=None),
            BatchNormAct2d(32),
            nn.BatchNorm2d(32, affine=False),
        )
    )
    methods = {"1": "group(groups=8)", "2": "switchable(bn_logit=5)", "*": "layer(axes=channel)"}
    the_plan = plan(model, methods, inputs=images())
    read = Plan.from_json(the_plan.to_json())
    assert read == the_plan
    assert [str(read[path]) for path in ("1", "2", "3")] == [
        "group(groups=8)",
        "switchable(bn_logit=5.0)",
        "layer(axes=channel)",
    ]
    assert torch.equal(convert(model, read)(images()), convert(model, the_plan)(images()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda document: document["rows"][0].pop("method"), "rows.0.method"),
        (lambda document: document["rows"].append(document["rows"][0]), "occurs twice"),
        (lambda document: document["rows"][0]["site"].update(colour="red"), "unknown field 'colour'"),
        (lambda document: document["rows"][0]["site"].update(channels="many"), "channels"),
        (lambda document: document.update(version=2), "version"),
    ],
)
def test_a_malformed_plan_is_refused(change: Callable[[dict], object], match: str) -> None:
    document = json.loads(plan(net(), "group").to_json())
    change(document)
    with pytest.raises(PlanError, match=match):
        Plan.from_json(json.dumps(document))


def test_a_plan_with_an_unknown_method_is_refused() -> None:
    text = plan(net(), "group").to_json().replace("group(groups=2)", "bogus")
    with pytest.raises(MethodError, match="unknown method 'bogus'"):
        Plan.from_json(text)


def test_text_that_is_no_json_is_no_plan() -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json("{")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 3)), "has no BatchNorm layer"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.BatchNorm2d(32)),
            "nothing of 1 of the 2 sites of Sequential, '2' among them",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "channels 32 .* the model has 8"),
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, eps=1)), "eps 1e-05 .* has 1.0"),
        (lambda: nn.Sequential(nn.Conv1d(3, 32, 3), nn.BatchNorm1d(32)), "layer .*BatchNorm2d .*BatchNorm1d"),
    ],
)
def test_a_plan_for_another_model_is_refused(other: Callable[[], nn.Module], match: str) -> None:
    the_plan = plan(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)), "group")
    with pytest.raises(PlanError, match=match):
        convert(other(), the_plan)


def test_a_plan_is_refused_where_the_model_lost_its_running_statistics() -> None:
    the_plan = plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "frozen")
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(PlanError, match=r"running statistics|track_running_stats"):
        convert(other, the_plan)


def test_a_plan_is_refused_where_a_forward_was_patched_since() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    the_plan = plan(model, "group")
    model[1].forward = lambda x: x
    with pytest.raises(PlanError, match=r"forward method of its own|kind"):
        convert(model, the_plan, in_place=True)


def test_a_plan_is_refused_where_parameters_were_tied_since() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    the_plan = plan(trained(model), "group")
    model[2].weight = model[1].weight
    with pytest.raises(PlanError, match="weight"):
        convert(model, the_plan, in_place=True)


def test_a_plan_with_where_is_an_error() -> None:
    with pytest.raises(PlanError, match="where="):
        convert(net(), plan(net(), "group"), where=lambda site: True)


def test_sites_that_no_pattern_matches_stay_batch() -> None:
    model = net()
    the_plan = plan(model, {"4": "group"})
    converted = convert(model, the_plan)
    assert {path: str(method) for path, method in the_plan.items()} == {"1": "batch", "4": "group(groups=1)"}
    assert type(converted[1]) is nn.BatchNorm2d
    assert [site.path for site, _ in the_plan.changes] == ["4"]


def test_where_keeps_sites_batch() -> None:
    the_plan = plan(net(), "group", where=lambda site: site.channels != 16)
    assert [str(method) for method in the_plan.values()] == ["group(groups=2)", "batch"]


def test_the_first_method_that_does_not_refuse_is_taken() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    the_plan = plan(model, ["instance", "group"], inputs=images())
    assert [str(method) for method in the_plan.values()] == ["instance", "group(groups=1)"]


def test_every_refusal_is_collected() -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(8, track_running_stats=False) for _ in range(3)))
    with pytest.raises(RefusedError) as caught:
        plan(model, "frozen")
    assert [refusal.site for refusal in caught.value.refusals] == ["0", "1", "2"]


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_another_training_runs_state_dict_converts_like_its_model(method: str) -> None:
    the_plan = plan(net(), method)
    other = trained(net(), seed=7)
    state = convert_state_dict(other.state_dict(), the_plan)
    loaded = convert(net(), the_plan).eval()
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
    state = net().state_dict()
    converted = convert_state_dict(state, plan(net(), "group"))
    assert converted["0.weight"] is state["0.weight"]
    assert "1.running_mean" not in converted
    assert "1.running_mean" in state


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_a_state_dict_without_an_entry_is_refused_by_name(name: str) -> None:
    state = net().state_dict()
    del state[f"1.{name}"]
    with pytest.raises(StateError, match=rf"no 1\.{name}"):
        convert_state_dict(state, plan(net(), "group"))


def test_a_state_dict_without_the_layer_is_refused() -> None:
    state = {f"module.{name}": value for name, value in net().state_dict().items()}
    with pytest.raises(StateError, match=r"no entry for 1;.*prefix such as module\."):
        convert_state_dict(state, plan(net(), "group"))


def test_a_state_dict_of_another_shape_is_refused() -> None:
    state = net().state_dict()
    state["4.running_var"] = torch.ones(7)
    with pytest.raises(StateError, match=r"4\.running_var has shape \(7,\), the plan expects \(16,\)"):
        convert_state_dict(state, plan(net(), "group"))


def test_a_state_dict_without_a_counter_still_converts() -> None:
    # Checkpoints from before torch 0.4.1 have no num_batches_tracked.
    state = net().state_dict()
    del state["1.num_batches_tracked"]
    the_plan = plan(net(), "group")
    loaded = convert(net(), the_plan)
    loaded.load_state_dict(convert_state_dict(state, the_plan))
    assert torch.equal(loaded[1].weight, convert(net(), the_plan)[1].weight)


def test_sites_are_plain_data() -> None:
    site = plan(net(), "group").sites[0]
    assert json.loads(json.dumps(asdict(site)))["channels"] == 32
