"""Models that break tools which swap layers: each is carried over, or refused with a way out."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from small_networks import close, images, net, trained
from torch import Tensor, nn
from torch import distributed as dist

from normsearch import (
    ModelError,
    PlanError,
    RefusedError,
    convert,
    find_sites,
    plan,
)

torch.set_num_threads(1)

METHODS = ["frozen", "group", "layer", "layer(axes=channel)", "rms", "batch_renorm", "batch_instance"]
METHODS += ["instance", "switchable"]


# --- shared modules, frozen parameters, hooks, dtypes ---------------------------------------------


class Twice(nn.Module):
    """One BatchNorm under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.one = nn.BatchNorm2d(3)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.one(x)))


class Hiding(nn.Module):
    """Keeps a block in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
        self.blocks = [nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[0](self.seen(x))
        return y


def test_layers_in_a_plain_list_are_named() -> None:
    found = plan(Hiding(), "group")
    assert list(found) == ["seen.1"]
    (note,) = found.notes
    assert note.startswith("blocks (list) hides 1 BatchNorm layers")
    with pytest.raises(RefusedError, match="a layer that is no submodule"):
        plan(Hiding(), "group", inputs=torch.randn(2, 3, 4, 4))
    assert not plan(Hiding().seen, "group").notes


def test_a_shared_module_is_one_site_and_stays_shared() -> None:
    model = trained(Twice()).eval()
    (site,) = find_sites(model, images())
    assert (site.path, site.aliases, site.calls) == ("one", ("other",), 2)
    converted = convert(model, "frozen")
    assert converted.one is converted.other
    close(converted(images()), model(images()))


def test_a_shared_module_matches_patterns_by_any_of_its_names() -> None:
    converted = convert(trained(Twice()), {"other": "group"})
    assert isinstance(converted.one, nn.GroupNorm)
    assert converted.one is converted.other


@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
def test_frozen_parameters_stay_frozen_and_are_still_converted(method: str) -> None:
    model = net().requires_grad_(False)
    converted = convert(model, method)
    assert not isinstance(converted[1], nn.BatchNorm2d)
    assert not any(p.requires_grad for p in converted.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_requires_grad_is_kept_for_each_parameter(method: str, name: str) -> None:
    model = net()
    getattr(model[1], name).requires_grad_(False)
    layer = convert(model, method)[1]
    assert {"weight": layer.weight.requires_grad, "bias": layer.bias.requires_grad} == {
        "weight": name != "weight",
        "bias": name != "bias",
    }


def test_hooks_are_kept() -> None:
    model = net()
    shapes: list[tuple[int, ...]] = []
    model[1].register_forward_hook(lambda m, args, y: shapes.append(tuple(y.shape)))
    convert(model, "group")(images())
    assert shapes == [(4, 8, 6, 6)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_double_and_bfloat16_models_train_in_their_own_type(method: str, dtype: torch.dtype) -> None:
    converted = convert(net().to(dtype), method).train()
    output = converted(images().to(dtype))
    output.sum().backward()
    assert output.dtype == dtype
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert {p.grad.dtype for p in converted.parameters() if p.grad is not None} == {dtype}


# --- models that cannot be pickled or copied ------------------------------------------------------


def test_a_lambda_attribute_does_not_stand_in_the_way() -> None:
    model = net().eval()
    model.scale = lambda x: 2 * x
    converted = convert(model, "frozen")
    close(converted(images()), model(images()))
    assert converted.scale(3) == 6


def test_a_local_class_does_not_stand_in_the_way() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = trained(Local()).eval()
    converted = convert(model, "frozen")
    assert type(converted) is Local
    close(converted(images()), model(images()))


def test_a_model_that_cannot_be_copied_says_so_and_is_converted_in_place() -> None:
    model = net().eval()
    model.lock = threading.Lock()
    expected = model(images())
    with pytest.raises(ModelError, match=r"Sequential cannot be copied \(TypeError.*in_place=True"):
        convert(model, "frozen")
    assert type(model[1]) is nn.BatchNorm2d
    assert convert(model, "frozen", in_place=True) is model
    assert type(model[1]).__name__ == "FrozenBatchNorm"
    close(model(images()), expected)


def test_a_lazy_model_that_cannot_be_copied_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        find_sites(model, images())
    with pytest.raises(ModelError, match="cannot be copied"):
        convert(model, "group", inputs=images())


# --- wrappers -------------------------------------------------------------------------------------


def test_data_parallel_is_converted_inside() -> None:
    inner = net().eval()
    model = nn.DataParallel(inner)
    converted = convert(model, "group")
    assert type(converted) is nn.DataParallel
    assert [site.path for site in find_sites(model, images())] == ["module.1"]
    close(converted(images()), convert(inner, "group")(images()))


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("method", ["group", "frozen", "switchable"])
def test_a_compiled_model_converts_like_the_one_inside(method: str, in_place: bool, ran_before: bool) -> None:
    inner = net().eval()
    expected = convert(inner, method)(images())
    model = torch.compile(inner, backend="eager")
    if ran_before:
        # Compiled code of the old layers must not be reused.
        model(images())
    converted = convert(model, method, in_place=in_place)
    assert type(converted) is type(model)
    close(converted(images()), expected)
    assert [site.path for site in find_sites(converted)] == []


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_models_sites_have_the_wrappers_prefix() -> None:
    model = torch.compile(net(), backend="eager")
    (site,) = find_sites(model, images())
    assert (site.path, site.input_shapes, site.producer.path) == (
        "_orig_mod.1",
        ((4, 8, 6, 6),),
        "_orig_mod.0",
    )


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_batch_norm_runs_the_new_layer_or_is_refused(in_place: bool) -> None:
    # The wrapper holds the compiled forward of the very module that would be replaced.
    layer = trained(nn.BatchNorm2d(3)).eval()
    expected = convert(layer, "group")(images())
    model = torch.compile(layer, backend="eager")
    try:
        converted = convert(model, "group", in_place=in_place)
    except ModelError as error:
        assert "_orig_mod" in str(error)  # noqa: PT017
    else:
        close(converted(images()), expected)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_by_its_method_converts(in_place: bool) -> None:
    model = net().eval()
    expected = convert(model, "group")(images())
    model.compile(backend="eager")
    model(images())
    converted = convert(model, "group", in_place=in_place)
    close(converted(images()), expected)


def test_distributed_data_parallel_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(ModelError, match=r"DistributedDataParallel.*convert model\.module"):
            convert(model, "group")
        with pytest.raises(ModelError, match=r"1 is wrapped in DistributedDataParallel"):
            convert(nn.Sequential(nn.ReLU(), model), "group")
        assert type(convert(model.module, "group")[1]) is nn.GroupNorm
    finally:
        dist.destroy_process_group()


# --- the model is a BatchNorm ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_a_batch_norm_is_converted(method: str) -> None:
    layer = trained(nn.BatchNorm2d(8)).eval()
    x = torch.randn(4, 8, 5, 5)
    converted = convert(layer, method)
    inside = convert(nn.Sequential(layer), method)
    assert not isinstance(converted, nn.BatchNorm2d)
    assert not converted.training
    torch.testing.assert_close(converted(x), inside(x), rtol=0, atol=0)


def test_a_model_that_is_a_batch_norm_cannot_be_replaced_in_place() -> None:
    layer = trained(nn.BatchNorm2d(8))
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ModelError, match=r"the model itself is a BatchNorm2d.*without in_place"):
        convert(layer, "frozen", in_place=True)
    assert layer.weight.requires_grad
    torch.testing.assert_close(layer.state_dict(), state)


# --- lazy, scripted, meta -------------------------------------------------------------------------


def lazy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(eps=0.5), nn.ReLU())


# torch warns that lazy modules are young.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
class TestLazy:
    def test_it_is_refused_without_inputs(self) -> None:
        with pytest.raises(RefusedError, match=r"1: group refused: its number of channels is not known yet"):
            convert(lazy(), "group")

    @pytest.mark.parametrize("in_place", [True, False])
    def test_it_is_converted_with_inputs(self, in_place: bool) -> None:
        converted = convert(lazy(), "group", inputs=images(), in_place=in_place)
        assert (type(converted[1]), converted[1].num_channels, converted[1].eps) == (nn.GroupNorm, 8, 0.5)

    def test_a_copy_leaves_it_lazy(self) -> None:
        model = lazy()
        convert(model, "group", inputs=images())
        assert model[1].has_uninitialized_params()

    def test_finding_sites_leaves_it_lazy(self) -> None:
        model = lazy()
        (site,) = find_sites(model, images())
        assert model[1].has_uninitialized_params()
        assert model[0].has_uninitialized_params()
        assert (site.kind, site.channels, site.input_shapes) == ("lazy", None, ((4, 8, 4, 4),))
        assert find_sites(model)[0].kind == "lazy"

    def test_a_plan_made_with_inputs_knows_the_channels(self) -> None:
        # The refusal of a lazy layer says "give inputs=": that must be enough for plan() too.
        model = lazy()
        the_plan = plan(model, "group(groups=4)", inputs=images())
        assert str(the_plan["1"]) == "group(groups=4)"
        assert model[1].has_uninitialized_params()

    def test_after_a_forward_pass_it_is_a_batch_norm(self) -> None:
        model = lazy()
        model(images())
        assert find_sites(model)[0].kind == "batch"
        assert type(convert(model, "group")[1]) is nn.GroupNorm


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        # TorchScript is deprecated; models in it are not gone.
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def test_a_scripted_model_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match=r"compiled TorchScript.*convert the nn\.Module it was made from"):
        convert(scripted(net()), "group")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "batch"])
def test_a_converted_model_may_be_traced(method: str) -> None:
    converted = convert(net(), method).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(converted, images())
    other = images().flip(0)
    torch.testing.assert_close(traced(other), converted(other))


def test_a_scripted_part_is_refused_by_name_and_can_be_left_out() -> None:
    model = nn.Sequential(net(), scripted(nn.Sequential(nn.BatchNorm2d(4))))
    assert [(site.path, site.kind) for site in find_sites(model, images())] == [
        ("0.1", "batch"),
        ("1.0", "scripted"),
    ]
    with pytest.raises(RefusedError, match=r"1\.0: group refused: it is compiled TorchScript"):
        convert(model, "group")
    converted = convert(model, {"0.*": "group"})
    assert converted(images()).shape == (4, 4, 6, 6)


@pytest.mark.parametrize(
    "method",
    [
        *METHODS,
        "switchable(bn_logit=40)",
        "sparse_switchable",
        "ghost",
        "ibn",
        "filter_response",
        "evonorm_s0",
        "group(weight_standardization=true)",
        "rms(whiten=true)",
        "weight",
        "spectral",
        "identity",
    ],
)
def test_a_model_on_the_meta_device_converts_to_the_same_shapes(method: str) -> None:
    with torch.device("meta"):
        model = net()
    converted = convert(model, method, inputs=images().to("meta"))
    real = convert(net(), method, inputs=images())
    assert find_sites(model)[0].trained is None
    assert {k: (v.shape, v.dtype) for k, v in converted.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in real.state_dict().items()
    }
    assert {v.device.type for v in converted.state_dict().values()} == {"meta"}


# --- nothing to convert ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), nn.Identity()])
def test_a_model_without_batch_norm_is_a_plan_error(model: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"{type(model).__name__} has no BatchNorm layer"):
        convert(model, "group")


def test_a_pattern_that_matches_nothing_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match=r"no site matches 'layer4\.\*'; paths look like '1'"):
        convert(net(), {"1": "group", "layer4.*": "layer"})


@pytest.mark.parametrize("model", [{"state": 1}, None, "resnet18"])
def test_what_is_no_module_is_a_model_error(model: object) -> None:
    for call in (lambda: convert(model, "group"), lambda: find_sites(model)):  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=f"expected a torch.nn.Module, got {type(model).__name__}"):
            call()


def test_inputs_that_the_model_cannot_take_are_a_model_error() -> None:
    with pytest.raises(ModelError, match="Sequential failed on the given inputs with RuntimeError"):
        plan(net(), "group", inputs=torch.randn(1, 5, 6, 6))
