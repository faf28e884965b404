"""Code that reads a layer's numbers from outside: what is named, what is refused, what goes on running."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import close, images, trained
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from normsearch import RefusedError, convert, explain, find_sites, plan

torch.set_num_threads(1)


class Reparameterizable(nn.Module):
    """Folds its BatchNorm when asked, as RepVGG does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def reparameterize(self) -> Tensor:
        return self.conv.weight * (self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()).reshape(
            -1, 1, 1, 1
        )


def test_a_method_that_reads_running_statistics_gets_a_note() -> None:
    model = nn.Sequential(Reparameterizable(), Reparameterizable())
    (note,) = plan(model, "group").notes
    assert note.startswith("Reparameterizable.reparameterize reads running statistics")
    assert explain(model, "group").notes == (note,)
    assert plan(model, "batch").notes == ()


class Attentive(nn.Module):
    """Uses a layer's γ outside the layer, and prepares it in a method that has run already."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.ones_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.weight.abs().reshape(1, -1, 1, 1)


def test_a_forward_that_reads_a_sites_scale_gets_a_note() -> None:
    model = nn.Sequential(Attentive(), nn.ReLU())
    (note,) = plan(model, "group").notes
    assert note.startswith("Attentive.forward reads bn.weight, which holds other numbers")


class Indirect(Attentive):
    """Reads it in a method that forward calls, by way of a local name and beside the parent's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.attention().reshape(1, -1, 1, 1)

    def attention(self) -> Tensor:
        layer = self.bn
        return layer.weight.data.abs() / layer.weight.data.abs().sum()


class Around(nn.Module):
    """Reads a number of a layer two levels below."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Reparameterizable()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * torch.stack([self.block.bn.weight[i] for i in range(8)]).reshape(1, 8, 1, 1)


class Parent(nn.Module):
    """Has a method that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.bn.weight.abs().reshape(1, -1, 1, 1)


class Child(Parent):
    """Calls that method by way of super()."""

    def scaled(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return super().scaled(self.bn(self.conv(x)))


class Named(Attentive):
    """Names the layer within an expression."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if (layer := self.bn) is None else layer(x) * layer.weight.abs().reshape(1, -1, 1, 1)


EXACT = ["weight", "weight(mean_only=true)", "spectral", "switchable(bn_logit=40)", "frozen", "batch_renorm"]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("network", [Attentive, Indirect, Around, Child, Named])
def test_where_forward_reads_a_sites_scale_what_is_called_exact_is(
    network: type[nn.Module], method: str
) -> None:
    model = trained(nn.Sequential(network(), nn.ReLU())).eval()
    the_plan = plan(model, [method, "batch_renorm"], inputs=images())
    assert the_plan.sites[0].read == ("weight",)
    converted = convert(model, the_plan)
    assert the_plan.exact == (str(next(iter(the_plan.values()))) in ("frozen", "batch_renorm"))
    assert the_plan.exact != any(".weight, which holds other numbers" in note for note in the_plan.notes)
    if the_plan.exact:
        close(converted(images()), model(images()))
    else:
        assert converted(images()).isfinite().all()


def test_a_traced_graph_reads_what_its_model_reads() -> None:
    model = trained(nn.Sequential(Attentive(), nn.ReLU())).eval()
    traced = torch.fx.symbolic_trace(model)
    assert find_sites(traced)[0].read == find_sites(model)[0].read == ("weight",)
    assert not plan(traced, "weight").exact
    with pytest.raises(RefusedError, match=r"numbers are read by .* too"):
        plan(torch.export.export(model, (images(),)), "weight")


def test_a_method_without_a_scale_is_refused_where_forward_reads_one() -> None:
    class Untraced(Attentive):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -1e9 else x

    for method in ("identity", "spectral", "weight"):
        for network in (Attentive, Untraced):
            model = trained(network()).eval()
            rows = explain(model, [method, "batch"], inputs=images()).rows
            convert(model, {"*": str(rows[0].method)}, inputs=images())(images())
    (refusal,) = explain(FusedReader(), "group").refusals
    assert refusal.reason.startswith("a forward method of the model reads its weight")


class FusedReader(nn.Module):
    """Reads a fused layer's scale, which lies one level below after a conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) * self.bn.weight.mean()


class Reader(Reparameterizable):
    """Computes with the running statistics itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.reparameterize()) + self.bn.bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("method", ["group", "identity", "weight(mean_only=true)", "filter_response"])
def test_a_forward_that_reads_what_the_new_layer_lacks_is_refused(method: str) -> None:
    model = trained(nn.Sequential(Reader(), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3))).eval()
    assert find_sites(model)[0].read == ("bias", "running_var", "weight")
    with pytest.raises(RefusedError, match=r"reads its .*running_var.*, which the new layer does not have"):
        plan(model, method, inputs=images())
    converted = convert(model, method, inputs=images(), where=lambda site: not site.read)
    assert type(converted[0].bn) is nn.BatchNorm2d
    assert converted(images()).shape == model(images()).shape


def test_a_forward_that_is_overridden_reads_nothing() -> None:
    class Plain(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    model = trained(Plain()).eval()
    assert find_sites(model)[0].read == ()
    close(convert(model, "identity")(images()), model(images()))


@pytest.mark.parametrize("method", ["frozen", "batch_renorm", "batch_instance", "switchable", "ibn", "ghost"])
def test_a_forward_that_reads_what_the_new_layer_has_runs_on(method: str) -> None:
    model = trained(Reader()).eval()
    the_plan = plan(model, method, inputs=images())
    assert "Reader.reparameterize reads running statistics" in the_plan.notes[0]
    converted = convert(model, the_plan)
    assert torch.equal(converted.bn.running_var, model.bn.running_var)
    if the_plan.exact:
        close(converted(images()), model(images()))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min")
def test_a_layer_prepared_for_quantization_is_refused_by_what_reads_its_statistics() -> None:
    quantization = torch.ao.quantization
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(quantization.fuse_modules_qat(model, [["0", "1", "2"]]))
    with pytest.raises(RefusedError, match="reads its running_mean and running_var"):
        plan(model, "group")
    assert any(
        "_forward_approximate reads running statistics" in note for note in plan(model, "frozen").notes
    )
    assert convert(model, "frozen")(images()).shape == (4, 8, 4, 4)


def test_an_attribute_that_is_a_layers_method_gets_a_note() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.steps = [torch.relu, self.bn.forward]

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    model = nn.Sequential(Holder())
    (note,) = plan(model, "group").notes
    assert note.startswith("0.steps is the method forward of 0.bn, which stays that of the old layer")
    assert plan(model, "batch").notes == ()
