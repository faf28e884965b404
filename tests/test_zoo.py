"""Every method on every zoo model: complete, alive, exact where promised, and nothing else changed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from zoo import WITHOUT_SITES, ZOO, Entry

import normsearch
from normsearch import METHODS, NormSite, Plan, ShapeError
from normsearch.methods import Frozen, Method

SPELLINGS = (
    *METHODS,
    "layer(axes=channel)",
    "group(groups=8)",
    "frozen(trainable=true)",
    "switchable(bn_logit=40)",
    "weight(mean_only=true)",
    "spectral(gain=fixed)",
    "group(weight_standardization=true)",
    "group(whiten=true)",
)
#: Methods that rewrite the layer before; some need it to be able to take BatchNorm's scale over.
OF_WEIGHTS = ("weight", "weight(mean_only=true)", "spectral", "spectral(gain=fixed)", "identity")
FOLDING = ("spectral(gain=fixed)", "identity")
#: Methods that need more than one element per sample and channel, in train mode too.
OF_SPACE = ("instance", "filter_response", "ibn")
#: Methods that take the place of these activations, where nothing else reads the site.
ABSORBED = {"filter_response": {"ReLU"}, "evonorm_s0": {"ReLU", "SiLU", "GELU", "Hardswish"}}
#: The one that takes longest, and variations of methods that are there already.
SLOW_SPELLINGS = (
    *("spectral", "spectral(gain=fixed)", "weight(mean_only=true)"),
    *("ghost", "sparse_switchable", "group(weight_standardization=true)", "group(whiten=true)"),
)
#: γ, β as the model starts with and the statistics of a batch; or γ, β drawn, with γ = 0 and γ < 0 in every
#: layer, and statistics that are off from a batch's, as another data set's would be.
Variant = Literal["measured", "drawn"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Key = tuple[Variant, torch.dtype]

#: The samples that are evaluated are among those whose statistics are measured.
BATCH, MEASURED = 2, 8
#: Below this an fp32 difference is rounding, whatever the original's own error is.
ROUNDING = 1e-7


# Without a repr: a failing test would print every number of four models.
@dataclass(frozen=True, repr=False)
class Subject:
    """One zoo model, in eval mode, in both variants and precisions."""

    entry: Entry
    models: dict[Key, nn.Module]
    inputs: Any
    sites: tuple[NormSite, ...]
    #: What the models put out, in fp64 as a whole and in both precisions where they are compared.
    outputs: dict[tuple[Variant, torch.dtype, str], Tensor]
    #: Parameters that get no gradient in the drawn model with fixed statistics, as behind a saturated gate.
    silent: set[str]
    #: Copies of the fp32 models' state dicts, to see that nothing changes them.
    states: dict[Variant, dict[str, Tensor]]

    @property
    def called(self) -> tuple[NormSite, ...]:
        return tuple(site for site in self.sites if site.calls)

    def model(self, variant: Variant = "measured") -> nn.Module:
        return self.models[variant, torch.float32]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    # The models are small: on a busy machine, threads that wait for each other take ten times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Module scope keeps one model alive at a time: pytest groups the tests by this parameter.
@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, one_thread: None) -> Subject:
    entry: Entry = request.param
    singles = {variant: make_model(entry, variant) for variant in VARIANTS}
    models: dict[Key, nn.Module] = {}
    for variant, model in singles.items():
        models[variant, torch.float32] = model
        models[variant, torch.float64] = copy.deepcopy(model).double()
    inputs = entry.inputs(BATCH, 0)
    sites = normsearch.find_sites(singles["measured"], inputs)
    outputs = {
        (*key, path): outputs_of(model, inputs, key[1], path)
        for key, model in models.items()
        for path in ("", entry.compared)
    }
    states = {variant: snapshot(model) for variant, model in singles.items()}
    return Subject(entry, models, inputs, sites, outputs, silent_parameters(entry, singles["drawn"]), states)


@torch.no_grad()
def make_model(entry: Entry, variant: Variant) -> nn.Module:
    torch.manual_seed(0)
    model = entry.build().eval()
    norms = [module for module in model.modules() if is_batch_norm(module)]
    if variant == "drawn":
        draw_affine(norms)
    measure_statistics(model, norms, entry.inputs(MEASURED, 0), disturbed=variant == "drawn")
    return model


def draw_affine(norms: Iterable[nn.Module]) -> None:
    for norm in norms:
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[0] = 0
            norm.weight[1::3] *= -1
            norm.bias.normal_(std=0.3)


def measure_statistics(model: nn.Module, norms: Iterable[nn.Module], inputs: Any, *, disturbed: bool) -> None:
    """Give every norm the statistics of its input in one eval-mode pass.

    Averages over training batches would not do: an untrained network in eval mode drifts away from them, more
    with every layer, until rounding is all there is to compare.
    """

    def measure(norm: nn.Module, args: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1, correction=0)
        # Channels that are dead in this batch must not be amplified by 1/√eps in the next.
        variance.clamp_(min=0.01 * float(variance.mean()))
        if disturbed:
            mean += 0.3 * variance.sqrt() * torch.randn_like(mean)
            variance *= torch.empty_like(variance).uniform_(-1, 1).exp()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(measure).remove)
        model(*arguments(inputs))


def silent_parameters(entry: Entry, model: nn.Module) -> set[str]:
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if is_batch_norm(module):
            module.eval()
    step(model, entry)
    return {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}


def step(model: nn.Module, entry: Entry) -> None:
    """Take a forward and a backward pass on samples that no statistics were measured on."""
    torch.manual_seed(0)
    outputs = numbers(model(*arguments((entry.train_inputs or entry.inputs)(BATCH, MEASURED))))
    loss = torch.stack([output.square().mean() for output in outputs]).sum()
    assert loss.isfinite()
    loss.backward()


def is_batch_norm(module: nn.Module) -> bool:
    """Tell BatchNorm layers by base class and name, not by what ``find_sites`` says."""
    named = "BatchNorm" in type(module).__name__
    return (named or isinstance(module, _BatchNorm)) and not is_ours(module)


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("normsearch.")


def is_activation(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))


def arguments(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def numbers(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Any, dtype: torch.dtype, module: str = "") -> Tensor:
    """Run the model and return every number that ``module`` (the model itself) puts out, in fp64."""
    found: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(
        lambda _module, _args, output: found.extend(numbers(output))
    )
    cast = tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) else leaf, inputs)
    try:
        model(*arguments(cast))
    finally:
        hook.remove()
    return torch.cat([tensor.double().flatten() for tensor in found])


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


class BatchNormCalls(TorchFunctionMode):
    """Collect the modules that call F.batch_norm on their input."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []
        self.running: list[nn.Module] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (F.batch_norm, torch.batch_norm):
            caller = self.running[-1]
            # Convolutions standardize their weight with it.
            if not is_ours(caller) and not isinstance(caller, _ConvNd | _InstanceNorm):
                self.callers.append(type(caller).__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def batch_norm_calls() -> Iterator[list[str]]:
    mode = BatchNormCalls()
    with ExitStack() as stack:
        enter = register_module_forward_pre_hook(lambda module, _args: mode.running.append(module))
        stack.callback(enter.remove)
        leave = register_module_forward_hook(
            lambda _module, _args, _output: mode.running.pop() and None, always_call=True
        )
        stack.callback(leave.remove)
        stack.enter_context(mode)
        yield mode.callers


def norm_at(model: nn.Module, site: NormSite) -> nn.Module:
    """Return the layer that normalizes there: a norm + act module becomes norm, drop and act."""
    module = model.get_submodule(site.path)
    return module if site.activation is None or is_batch_norm(module) else module.get_submodule("norm")


def elements_per_group(site: NormSite, spelling: str) -> int | None:
    """Count what one mean is taken over; None where the method does not take it over a sample's elements."""
    assert site.channels is not None
    spatial = site.fewest_elements or 1_000_000
    sizes = {
        "layer": site.channels * spatial,
        "layer(axes=channel)": site.channels,
        "group(groups=8)": site.channels // largest_divisor(site.channels, 8) * spatial,
    }
    return sizes.get(spelling)


def largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(most, 0, -1) if number % divisor == 0)


def check_refused(subject: Subject, spelling: str, refused: list[str]) -> None:
    """Compare where the method refused with the only places where it may: they are known from the shapes."""
    if spelling in OF_WEIGHTS:
        fed = [site for site in subject.sites if site.producer is not None]
        # Every norm of the zoo has a weight upstream; a forward pass that does not reach it cannot tell.
        assert {site.path for site in subject.called} <= {site.path for site in fed}
        able = {site.path for site in fed if site.producer.foldable or spelling not in FOLDING}
        assert refused == [site.path for site in subject.sites if site.path not in able]
    elif spelling == "group(weight_standardization=true)":
        assert refused == [site.path for site in subject.sites if site.producer is None]
    elif spelling in OF_SPACE:
        assert refused == [site.path for site in subject.sites if site.fewest_elements == 1]
        explanation = normsearch.explain(subject.model(), spelling, inputs=subject.inputs)
        assert refused == [refusal.site for refusal in explanation.refusals]
    else:
        assert refused == [site.path for site in subject.sites if elements_per_group(site, spelling) == 1]


def check_eval(subject: Subject, converted: nn.Module, the_plan: Plan) -> Tensor:
    """Run in eval mode: finite, and no BatchNorm left, as a module or as a call; return the outputs."""
    with batch_norm_calls() as callers:
        outputs = outputs_of(converted, subject.inputs, torch.float32, subject.entry.compared)
    assert outputs.isfinite().all()
    if the_plan.changes:
        assert [path for path, module in converted.named_modules() if is_batch_norm(module)] == []
        assert callers == []
    return outputs


def absorbed(site: NormSite, method: Method) -> bool:
    """Tell whether the method takes the place of the activation that follows."""
    act = site.followed_by
    if act is None or not act.removable:
        return False
    # EvoNorm needs the layer before to take BatchNorm's shift over.
    able = method.name != "evonorm_s0" or (site.producer is not None and site.producer.foldable)
    return able and act.layer.rpartition(".")[2] in ABSORBED.get(method.name, ())


def check_kept(subject: Subject, converted: nn.Module, the_plan: Plan) -> None:
    """Compare what conversion must carry over: eps, activations, drops, modes."""
    model = subject.model()
    taken: Counter[type[nn.Module]] = Counter()
    for site in subject.sites:
        old, new = model.get_submodule(site.path), converted.get_submodule(site.path)
        if the_plan[site.path].name not in OF_WEIGHTS:
            assert norm_at(converted, site).eps == old.eps == site.eps
        if isinstance(old, BatchNormAct2d) and new is not old and not is_batch_norm(new):
            act = [] if absorbed(site, the_plan[site.path]) else [type(old.act)]
            assert [type(child) for child in new.children()][1:] == [type(old.drop), *act]
        if absorbed(site, the_plan[site.path]):
            assert site.followed_by is not None
            taken[type(model.get_submodule(site.followed_by.path))] += 1
    before, after = (
        Counter(type(module) for module in one.modules() if is_activation(module))
        for one in (model, converted)
    )
    assert before - taken == after
    assert not any(module.training for module in converted.modules())


def check_alive(subject: Subject, converted: nn.Module) -> None:
    """Look at every norm's output on drawn numbers: a dead one puts out β, whatever its input."""
    dead: list[str] = []
    visited: set[str] = set()

    def look(path: str, x: Tensor, y: Tensor) -> None:
        visited.add(path)
        # An input without variation, as the pooled output of instance norm, has none afterwards either.
        if variation(x) > 1e-3 and not variation(y) > 1e-5:
            dead.append(path)

    with ExitStack() as stack:
        for site in subject.called:
            hook = norm_at(converted, site).register_forward_hook(
                lambda _module, args, output, path=site.path: look(path, args[0], output)
            )
            stack.callback(hook.remove)
        outputs_of(converted, subject.inputs, torch.float32)
    assert dead == []
    assert visited == {site.path for site in subject.called}


def variation(x: Tensor) -> float:
    """Return how much the channel that varies most does so over samples and positions, relative to all."""
    rows = x.movedim(1, -1).flatten(0, -2)
    return float(rows.std(0).max() / rows.abs().max())


def check_training(subject: Subject, converted: nn.Module, the_plan: Plan) -> None:
    """Take a training step's passes: gradients reach what is trained of called norms and producers."""
    converted.train()
    with batch_norm_calls() as callers:
        step(converted, subject.entry)
    assert callers == [] or not the_plan.changes
    for site in subject.called:
        norm, method = norm_at(converted, site), the_plan[site.path]
        frozen = method == Frozen() or ("Frozen" in site.layer and not isinstance(method, Frozen))
        for name, parameter in norm.named_parameters():
            path = f"{site.path}.{name}"
            assert parameter.requires_grad != frozen, path
            # A saturated gate or softmax may have no gradient; γ and β must.
            check_gradient(path, parameter, nonzero=name in ("weight", "bias") and path not in subject.silent)
        if site.producer is not None:
            producer = converted.get_submodule(site.producer.path)
            for name, parameter in producer.named_parameters():
                check_gradient(f"{site.producer.path}.{name}", parameter, nonzero=False)


def check_gradient(path: str, parameter: nn.Parameter, *, nonzero: bool) -> None:
    if parameter.requires_grad:
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any() or not nonzero, path


def check_exact(subject: Subject, the_plan: Plan, singles: dict[Variant, Tensor]) -> None:
    """Compare eval outputs: in fp64 to rounding, in fp32 with the original's own error."""
    double = normsearch.convert(subject.models["drawn", torch.float64], the_plan)
    for variant in ("drawn", "measured"):
        if variant == "measured":
            original = subject.models[variant, torch.float64].state_dict()
            double.load_state_dict(normsearch.convert_state_dict(original, the_plan))
        found = outputs_of(double, subject.inputs, torch.float64)
        assert distance(found, subject.outputs[variant, torch.float64, ""]) <= 1e-10, variant
        at = subject.entry.compared
        truth = subject.outputs[variant, torch.float64, at]
        own = distance(subject.outputs[variant, torch.float32, at], truth)
        assert distance(singles[variant], truth) <= 3 * own + ROUNDING, variant


def check_state_dict(subject: Subject, receiver: nn.Module, converted: nn.Module, the_plan: Plan) -> None:
    """Carry the drawn numbers into the converted measured model by its state dict alone."""
    carried = normsearch.convert_state_dict(subject.model("drawn").state_dict(), the_plan)
    receiver.load_state_dict(carried, strict=True)
    assert_same_state(receiver.state_dict(), converted.state_dict())


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def check_untouched(subject: Subject) -> None:
    for variant in VARIANTS:
        model = subject.model(variant)
        assert_same_state(model.state_dict(), subject.states[variant])
        assert not any(module.training or module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def each_entry(entries: Iterable[Entry] = ZOO) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "subject",
        [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.slow else []) for one in entries],
        indirect=True,
        scope="module",
    )


@each_entry()
def test_finds_every_site(subject: Subject) -> None:
    entry, sites = subject.entry, subject.sites
    modules = subject.model().named_modules()
    assert [site.path for site in sites] == [path for path, module in modules if is_batch_norm(module)]
    assert {site.kind for site in sites} <= {"batch", "frozen"}
    assert (
        len(sites),
        sum(site.producer is not None and site.producer.foldable for site in sites),
        sum(site.fewest_elements == 1 for site in sites),
        sum(site.calls == 0 for site in sites),
    ) == (entry.sites, entry.foldable, entry.single, entry.uncalled)
    check_untouched(subject)


@pytest.mark.parametrize(
    "spelling",
    [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW_SPELLINGS else []) for one in SPELLINGS],
)
@each_entry()
def test_converts(subject: Subject, spelling: str) -> None:
    # Another method stands in where this one refuses, an exact one if it is.
    other = "layer" if spelling in ("instance", "group(groups=8)") else "frozen(trainable=true)"
    the_plan = normsearch.plan(subject.model(), [spelling, other], inputs=subject.inputs)
    if spelling != other:
        stands_in = normsearch.parse_method(other)
        check_refused(subject, spelling, [path for path, method in the_plan.items() if method == stands_in])
    assert len(the_plan.changes) == (0 if spelling == "batch" else len(subject.sites))
    converted = {variant: normsearch.convert(subject.model(variant), the_plan) for variant in VARIANTS}
    for model in converted.values():
        check_kept(subject, model, the_plan)
    outputs = {variant: check_eval(subject, model, the_plan) for variant, model in converted.items()}
    if the_plan.exact:
        check_exact(subject, the_plan, outputs)
    check_alive(subject, converted["drawn"])
    check_state_dict(subject, converted["measured"], converted["drawn"], the_plan)
    if spelling in OF_SPACE and subject.entry.single_in_training:
        # Inputs show eval mode only: what else train mode reaches is checked when it gets there.
        with pytest.raises(ShapeError, match=subject.entry.single_in_training):
            check_training(subject, converted["drawn"], the_plan)
    else:
        check_training(subject, converted["drawn"], the_plan)
    check_untouched(subject)


@pytest.mark.parametrize("name", WITHOUT_SITES)
def test_standardized_weights_are_no_sites(name: str) -> None:
    model = timm.create_model(name, pretrained=False).eval()
    inputs = torch.randn(1, 3, 64, 64)
    assert normsearch.find_sites(model, inputs) == ()
    with pytest.raises(normsearch.PlanError, match="no BatchNorm layer"):
        normsearch.plan(model, "group", inputs=inputs)
