"""Graphs: module calls and F.batch_norm calls are rewritten alike, and equal the conversion of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from test_methods import trained
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normsearch
from normsearch import METHODS, convert, find_sites
from normsearch.graph import rewrite

#: Real models that plain torch.fx traces; in all but resnet18 BatchNorm comes out as F.batch_norm calls.
MODELS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: timm.create_model(name) for name in ("resnet18", "mixnet_s", "rexnet_100")
}
SPELLINGS = [name for name in METHODS if name != "batch"]


def randomized(model: nn.Module) -> nn.Module:
    """Every number of every BatchNorm random, γ = 0 and γ < 0 among them; double precision."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.normal_(generator=generator)
                module.weight[0] = 0
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.num_batches_tracked.fill_(3)
    return model.double()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return randomized(MODELS[request.param]())


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_rewrite_equals_the_eager_conversion(model: nn.Module, training: bool) -> None:
    model.train(training)
    graph = fx.symbolic_trace(model)
    graph.train(training)
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # One of each kind: torch's own layer, own layer, batch statistics, weights with and without a fold.
    for spelling in ("group", "rms", "switchable", "batch_renorm", "weight", "spectral", "identity"):
        choice = [spelling, "frozen"]
        rewritten, eager = rewrite(graph, normsearch.plan(graph, choice)), convert(model, choice)
        torch.manual_seed(0)
        got = rewritten(x)
        torch.manual_seed(0)
        assert distance(got, eager(x)) < 1e-12, spelling
        assert find_sites(rewritten) == ()
        counters = {"num_batches_tracked"}
        keys = [
            {k for k in m.state_dict() if k.rpartition(".")[2] not in counters} for m in (rewritten, eager)
        ]
        assert keys[0] == keys[1], spelling
        assert not [n for n in rewritten.graph.nodes if n.target is F.batch_norm]
        rewritten.graph.lint()
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())


class Relu(nn.Module):
    """An activation that is a call, which no method takes the place of."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Functional(nn.Module):
    """BatchNorm written as a function, its tensors kept by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gamma, self.beta = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.after = trained((2, 4, 5, 5), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(
            self.conv(x), self.mean, self.var, self.gamma, bias=self.beta, training=self.training, eps=1e-3
        )
        return self.after(y.relu())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_functional_batch_norm_is_converted_through_its_graph(spelling: str) -> None:
    torch.manual_seed(0)
    model, x = Functional().double().eval(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    sites = find_sites(model, x)
    assert [(s.path, s.kind, s.eps, s.channels, s.input_shapes) for s in sites if s.kind == "functional"] == [
        ("norm", "functional", 1e-3, 4, ((4, 4, 4, 4),))
    ]
    choice = {"norm": spelling, "after": "batch"}
    converted = convert(model, choice)
    assert isinstance(converted, fx.GraphModule)
    assert not [node for node in converted.graph.nodes if node.target is F.batch_norm]
    # The same network with a layer in place of the call, converted as a module.
    twin = nn.Sequential(copy.deepcopy(model.conv), nn.BatchNorm2d(4, eps=1e-3).double(), Relu(), model.after)
    twin[1].load_state_dict(
        {
            "weight": model.gamma,
            "bias": model.beta,
            "running_mean": model.mean,
            "running_var": model.var,
            "num_batches_tracked": torch.tensor(1),
        }
    )
    wanted = convert(twin.eval(), {"1": spelling, "3": "batch"})
    assert distance(converted(x), wanted(x)) < 1e-12
    assert distance(converted.train()(x), wanted.train()(x)) < 1e-12
    names = set(converted.state_dict())
    assert not names & {"gamma", "beta", "mean", "var"}
    assert isinstance(model, Functional)


def test_what_differs_between_modes_is_refused_with_the_reason() -> None:
    class Differing(Functional):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if self.training else y

    model = Differing()
    with pytest.raises(normsearch.RefusedError, match="differ in more than the training flag"):
        convert(model, "group")
    converted = convert(model, "group", where=lambda site: site.kind != "functional")
    assert isinstance(converted, Differing)
    assert isinstance(converted.after, nn.GroupNorm)


def test_computed_affine_is_reported_and_left_alone() -> None:
    class Computed(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, self.gamma * 2, self.beta, self.training)

    with pytest.raises(normsearch.RefusedError, match="computed weight or statistic"):
        convert(Computed(), "group")


def test_cannot_be_done_in_place() -> None:
    with pytest.raises(normsearch.ModelError, match="use the return value of convert without in_place"):
        convert(Functional(), "group", in_place=True)


def test_weight_standardization_is_left_alone() -> None:
    model = timm.create_model("nf_regnet_b0")
    assert find_sites(model) == ()
    graph = fx.symbolic_trace(model)
    assert len([node for node in graph.graph.nodes if node.target is F.batch_norm]) > 50
    assert find_sites(graph) == ()


def test_metadata_of_nodes_stays() -> None:
    graph = fx.symbolic_trace(Functional().eval())
    (node,) = [node for node in graph.graph.nodes if node.target is F.batch_norm]
    node.meta["mark"] = "kept"
    rewritten = rewrite(graph, normsearch.plan(graph, "group"))
    assert [node.target for node in rewritten.graph.nodes if node.meta.get("mark") == "kept"] == ["norm"]
    assert not [node for node in rewritten.graph.nodes if node.op == "get_attr"]


def test_rewrite_takes_graphs_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(normsearch.ModelError, match=r"takes a torch\.fx\.GraphModule"):
        rewrite(model, normsearch.plan(model, "group"))
