"""A small network, batches for it, and the report of its conversion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normsearch
from normsearch.calibration import Calibration, Rung
from normsearch.reporting import Document, document, sections
from normsearch.reports import Change, Environment


class Net(nn.Module):
    """Four sites: one twice per pass, one never reached, one followed by an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.unused = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.twice = nn.BatchNorm2d(16)
        self.last = nn.BatchNorm2d(16)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x))
        x = self.last(self.twice(x.relu_()) + self.middle(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
    return model.eval()


def network() -> nn.Module:
    """Return the network, in double precision, trained as it were."""
    torch.manual_seed(0)
    return trained(Net().double())


def inputs() -> list[Tensor]:
    """Return two batches."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 7, 7, dtype=torch.float64, generator=generator) for size in (4, 3)]


def outputs_at(model: nn.Module, path: str, batches: list[Tensor]) -> list[Tensor]:
    """Every output of one layer, copied as it leaves the layer."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    with torch.no_grad():
        for given in batches:
            model(given)
    handle.remove()
    return seen


def reference(original: nn.Module, converted: nn.Module, path: str, batches: list[Tensor]) -> float:
    """Return how far one layer's outputs are from the original ones."""
    old, new = (torch.cat([y.flatten() for y in outputs_at(m, path, batches)]) for m in (original, converted))
    return float((new - old).norm() / old.norm())


def report(net: nn.Module, batches: list[Tensor]) -> tuple[Document, nn.Module, nn.Module, nn.Module]:
    """Return a report with everything in it, and the original, converted and calibrated networks."""
    plan = normsearch.plan(
        net, {"first*": "batch_instance", "twice": "switchable", "last": "group"}, inputs=batches[0]
    )
    converted = normsearch.convert(net, plan)
    calibrated = normsearch.convert(net, plan)
    calibrated.get_submodule("last").weight.data *= 1.01
    rho = calibrated.get_submodule("first.1").rho.data
    rho.copy_(torch.linspace(-0.2, 1.2, 16))
    logits = calibrated.get_submodule("twice").mean_logits.data
    logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    sensitivity = normsearch.sensitivity(net, ["group", "instance", "identity"], batches)
    record = Calibration(
        error=Change(0.3, 0.1),
        sites={},
        rungs=(Rung("whitening", 0.2, True, 0, 1.5), Rung("affine", float("nan"), False, 20, 2.0)),
        whitened=("last",),
        gained_bias=("middle",),
        batches=8,
        held_out=2,
    )
    found = document(
        net,
        converted,
        plan,
        batches,
        calibrated=calibrated,
        calibration=record,
        sensitivity=sensitivity,
        threshold=0.2,
        metric=lambda model: float(model(batches[0]).sum()),
        metric_name="sum of outputs",
        logits=True,
        title="a small network",
        notes=("made in a test",),
    )
    return found, net, converted, calibrated


def small() -> Document:
    """Return a report of a single layer."""
    row = sections.LayerRow(
        site="a",
        layer="BatchNorm2d",
        channels=4,
        method="group",
        changed=True,
        exact=False,
        depth=0,
        converted=0.5,
    )
    return Document(
        title="t",
        environment=Environment("cpu", "float32", 1, "2", "3"),
        normsearch="0",
        created="2026-01-01T00:00:00+00:00",
        sections=(sections.Layers(rows=(row,)),),
    )
