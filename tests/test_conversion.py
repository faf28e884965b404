"""What a conversion carries over besides the function, and what it refuses to lose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_networks import FOLDING, METHODS, Shared, images, pair, trained
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from normsearch import (
    PlanError,
    RefusedError,
    convert,
    find_sites,
    plan,
)

torch.set_num_threads(1)

EXACT = ["frozen", "frozen(trainable=true)", "batch_renorm", "batch_instance", "switchable(bn_logit=40)"]
#: These keep γ and β themselves, the very same Parameters.
CARRYING = ["frozen", "frozen(trainable=true)", "batch_renorm", "batch_instance"]


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
    converted = convert(pair(eps=0.25), method)
    assert [converted[1].eps, converted[4].eps] == [0.25, 0.25]


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_keep_the_eval_function(method: str) -> None:
    model = pair(eps=0.25).double().eval()
    x = images().double()
    torch.testing.assert_close(convert(model, method)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", CARRYING)
def test_affine_false_stays_false_where_nothing_is_folded(method: str) -> None:
    the_plan = plan(pair(affine=False), method)
    converted = convert(pair(affine=False), the_plan)
    assert converted[1].weight is None
    assert converted[1].bias is None
    assert not any("gains" in note for row in the_plan.rows for note in row.notes)


@pytest.mark.parametrize("method", FOLDING)
def test_affine_false_gains_one_where_folding_needs_it_and_the_plan_says_so(method: str) -> None:
    the_plan = plan(pair(affine=False), method)
    converted = convert(pair(affine=False), the_plan)
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
    model = pair(affine=False, eps=1e-3).double()
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
        model = pair()
    converted = convert(model, method)
    tensors = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    assert {name: t.device.type for name, t in tensors.items()} == dict.fromkeys(tensors, "meta")
    assert tensors["1.weight"].shape == (32,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_survives(method: str, dtype: torch.dtype) -> None:
    converted = convert(pair().to(dtype), method).eval()
    floating = [t for t in (*converted.parameters(), *converted.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {dtype}
    output = converted(images().to(dtype))
    assert output.dtype == dtype
    # A conversion in a narrow type is the conversion in a wide one, up to rounding.
    wide = convert(pair().to(dtype).double(), method).eval()(images().to(dtype).double())
    error = (output.double() - wide).norm() / wide.norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_a_half_precision_model_with_single_precision_norms_stays_mixed(method: str, training: bool) -> None:
    model = pair().bfloat16()
    for index in (1, 4):
        model[index].float()
    converted = convert(model, method).train(training)
    for index in (1, 4):
        floating = [*converted[index].parameters(), *converted[index].buffers()]
        assert {t.dtype for t in floating if t.is_floating_point()} == {torch.float32}
    assert converted[0].weight.dtype == torch.bfloat16
    output = converted(images().bfloat16())
    assert output.dtype == torch.bfloat16
    wide = convert(pair().bfloat16().double(), method).train(training)(images().double())
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
    converted = convert(pair(), method)
    assert find_sites(converted) == ()
    assert find_sites(converted, images()) == ()
    with pytest.raises(PlanError, match="has no BatchNorm layer"):
        convert(converted, "group")


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_flags_survive_per_module(method: str) -> None:
    model = pair().train()
    model[1].eval()
    model[5].eval()
    flags = {path: module.training for path, module in model.named_modules()}
    converted = convert(model, method)
    assert {path: converted.get_submodule(path).training for path in flags} == flags


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("frozen")])
def test_requires_grad_survives_per_parameter(method: str) -> None:
    model = pair()
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
    model = pair().requires_grad_(trainable)
    converted = convert(model, method)
    added = [p for name, p in converted[1].named_parameters() if name not in ("weight", "bias")]
    assert added
    assert {p.requires_grad for p in added} == {trainable}


def test_frozen_trains_nothing_and_its_trainable_form_keeps_what_the_user_froze() -> None:
    model = pair()
    model[1].weight.requires_grad_(False)
    frozen, trainable = convert(model, "frozen"), convert(model, "frozen(trainable=true)")
    assert [frozen[1].weight.requires_grad, frozen[1].bias.requires_grad] == [False, False]
    assert [trainable[1].weight.requires_grad, trainable[1].bias.requires_grad] == [False, True]


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_place", [True, False])
def test_hooks_go_on_working(method: str, in_place: bool) -> None:
    model = pair().eval()
    calls: list[str] = []
    model[1].register_forward_pre_hook(lambda m, args: (calls.append("pre"), (args[0] + 1,))[1])
    model[1].register_forward_hook(lambda m, args, y: (calls.append("forward"), y * 2)[1])
    model[1].register_forward_hook(
        lambda m, args, kwargs, y: calls.append(f"kwargs {kwargs}"), with_kwargs=True
    )
    model[1].register_full_backward_hook(lambda m, given, got: calls.append("backward"))
    model[1].register_full_backward_pre_hook(lambda m, got: calls.append("backward pre"))
    without = pair().eval()
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
    model = pair().eval()
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
    model = pair().eval()
    seen: list[str] = []
    handle = model[1].register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    converted = convert(model, "group")
    handle.remove()
    converted(images())
    model(images())
    assert seen == ["GroupNorm"]


# --- sharing --------------------------------------------------------------------------------------


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
    model = pair().eval()
    parametrization(model[0])
    x = images()
    before = model(x)
    converted = convert(model, "frozen(trainable=true)")
    assert parametrize.is_parametrized(converted[0], "weight")
    assert [k for k in converted.state_dict() if k.startswith("0.")] == [
        k for k in model.state_dict() if k.startswith("0.")
    ]
    torch.testing.assert_close(converted(x), before, rtol=1e-4, atol=1e-5)


# --- keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["group", "batch_renorm", "switchable", "frozen"])
def test_keep_affine_carries_gamma_and_beta_only(method: str) -> None:
    model = pair()
    layer = convert(model, method, keep="affine")[1]
    torch.testing.assert_close(layer.weight, model[1].weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, model[1].bias, rtol=0, atol=0)
    if method != "group":
        assert torch.equal(layer.running_mean, torch.zeros(32))
        assert torch.equal(layer.running_var, torch.ones(32))


@pytest.mark.parametrize("method", ["group", "batch_renorm", "switchable", "frozen"])
def test_keep_nothing_resets_the_layer(method: str) -> None:
    model = pair()
    model[1].weight.requires_grad_(False)
    layer = convert(model, method, keep="nothing")[1]
    assert torch.equal(layer.weight, torch.ones(32))
    assert torch.equal(layer.bias, torch.zeros(32))
    assert [layer.weight.requires_grad, layer.bias.requires_grad] == [False, method != "frozen"]
    if method != "group":
        assert torch.equal(layer.running_mean, torch.zeros(32))
        assert torch.equal(layer.running_var, torch.ones(32))


def test_keep_nothing_gives_batch_renorm_its_warm_up_back() -> None:
    assert int(convert(pair(), "batch_renorm", keep="nothing")[1].renorm_step) == 0
    assert int(convert(pair(), "batch_renorm")[1].renorm_step) == 40_000


def test_keep_without_statistics_adds_no_affine() -> None:
    layer = convert(pair(affine=False), "group", keep="affine")[1]
    assert layer.weight is None


def test_an_unknown_keep_names_the_choices() -> None:
    with pytest.raises(PlanError, match="'all' is not one of function, affine, nothing"):
        convert(pair(), "group", keep="all")  # type: ignore[arg-type]


# --- in place, copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_original_is_left_untouched(method: str) -> None:
    model = pair().train()
    before, x = snapshot(model), images()
    converted = convert(model, method, inputs=x)
    assert converted is not model
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    converted.train()(x)
    assert snapshot(model) == before


def test_in_place_returns_the_model_and_keeps_other_modules() -> None:
    model = pair()
    others = [id(model[index]) for index in (0, 2, 3, 5, 6, 7)]
    assert convert(model, "group", in_place=True) is model
    assert [id(model[index]) for index in (0, 2, 3, 5, 6, 7)] == others
    assert [type(model[index]) for index in (1, 4)] == [nn.GroupNorm, nn.GroupNorm]


def test_in_place_equals_the_copy() -> None:
    copied = convert(pair(), "group").eval()
    edited = convert(pair(), "group", in_place=True).eval()
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
    model, other = nn.Sequential(nn.Conv2d(3, 8, 3), trained(nn.BatchNorm2d(8))), pair()
    before = snapshot(model)
    with pytest.raises(PlanError, match="no parameter of this model"):
        convert(model, method, in_place=True, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    assert snapshot(model) == before


def test_a_failed_forward_pass_leaves_the_model_untouched() -> None:
    model = pair().train()
    before = snapshot(model)
    with pytest.raises(Exception, match="failed on the given inputs"):
        convert(model, "group", inputs=torch.zeros(1, 7), in_place=True)
    assert snapshot(model) == before


def test_random_numbers_are_not_used_up() -> None:
    model = pair()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    convert(model, "switchable", inputs=images())
    assert torch.equal(torch.rand(3), expected)
