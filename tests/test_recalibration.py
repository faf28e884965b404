"""recalibrate: pooled statistics against the whole input at once, and nothing changed on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from normsearch import ModelError, Progress, convert, recalibrate

torch.set_num_threads(1)

#: Methods whose layers have running statistics.
RUNNING = ["batch", "batch_renorm", "batch_instance", "switchable", "weight(mean_only=true)"]
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel of everything at once, in double precision."""
    rows = x.double().transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, unbiased=True)


def batches(count: int = 3, channels: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Batches of different sizes, maps and statistics."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(2 + i, channels, 3 + i, 4, generator=generator, dtype=torch.float64) * (i + 1) + i).to(
            dtype
        )
        for i in range(count)
    ]


def whole(parts: list[Tensor]) -> Tensor:
    """All values of each channel, whatever the maps' sizes."""
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).T


def net(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    """Two sites; the convolution before the first makes weight(mean_only=true) possible."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 1, bias=False),
        nn.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.BatchNorm2d(5, **options),
    ).to(dtype)
    for layer in (model[1], model[4]):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
        nn.init.uniform_(layer.weight, 0.5, 2)
        layer.num_batches_tracked.fill_(9)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert {k: v for k, v in after.items() if k not in ("state", "random")} == {
        k: v for k, v in before.items() if k not in ("state", "random")
    }
    assert torch.equal(after["random"], before["random"])
    assert list(after["state"]) == list(before["state"])
    for name, tensor in before["state"].items():
        assert torch.equal(after["state"][name], tensor), name


# --- values ------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    rank=st.sampled_from([2, 3, 4, 5]),
    momentum=st.sampled_from([0.0, None, 0.1, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    shift=st.sampled_from([0.0, -7.0, 1e3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_statistics_are_those_of_all_inputs_at_once(
    sizes: list[int], rank: int, momentum: float | None, scale: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spatial = (2, 3, 2)[: rank - 2]
    # A batch of one value per channel has no variance to train with.
    parts = [
        torch.randn(max(n, 2), 3, *spatial, generator=generator, dtype=torch.float64) * scale + shift * i
        for i, n in enumerate(sizes)
    ]
    layer = LAYERS[rank](3, momentum=momentum, dtype=torch.float64)
    result = recalibrate(layer, parts)
    mean, variance = moments(torch.cat(parts))
    torch.testing.assert_close(result.running_mean, mean, rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(result.running_var, variance, rtol=1e-9, atol=0.0)
    assert int(result.num_batches_tracked) == len(parts)
    assert result.momentum == momentum


@pytest.mark.parametrize("method", RUNNING)
@pytest.mark.parametrize("momentum", [0.0, None, 0.1])
def test_every_layer_with_running_statistics(method: str, momentum: float | None) -> None:
    model = convert(net(momentum=momentum), method)
    parts = batches()
    result = recalibrate(model, parts)
    first = whole([result[0](part) for part in parts])
    mean, variance = moments(first)
    torch.testing.assert_close(result[1].running_mean, mean)
    if result[1].running_var is not None:
        torch.testing.assert_close(result[1].running_var, variance)
    # The second layer's are those of the activations in training: each batch by its own statistics.
    training = copy.deepcopy(model).eval()
    for index in (1, 4):
        training[index].train()
        if method == "batch_renorm":
            training[index].renorm_step.zero_()
    with torch.no_grad():
        second = whole([training[:4](part) for part in parts])
    mean, variance = moments(second)
    torch.testing.assert_close(result[4].running_mean, mean)
    if result[4].running_var is not None:
        torch.testing.assert_close(result[4].running_var, variance)
    assert int(result[4].num_batches_tracked) == 3


def test_batch_renorm_normalizes_plainly_and_keeps_its_schedule() -> None:
    plain, renorm = net(), convert(net(), "batch_renorm")
    step = int(renorm[1].renorm_step)
    assert step > 0
    expected, result = recalibrate(plain, batches()), recalibrate(renorm, batches())
    torch.testing.assert_close(result[4].running_var, expected[4].running_var, rtol=1e-12, atol=0)
    assert int(result[1].renorm_step) == step


def test_one_batch_gives_that_batchs_training_output_in_eval_mode() -> None:
    model = net()
    (part,) = batches(1)
    # BatchNorm normalizes by the biased variance in training; the running one is unbiased.
    result = recalibrate(model, [part])
    n = part.numel() // part.shape[1]
    for layer in (result[1], result[4]):
        layer.running_var.mul_((n - 1) / n)
    with torch.no_grad():
        torch.testing.assert_close(result(part), model.train()(part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_keeps_the_digits_that_lower_precision_loses(dtype: torch.dtype) -> None:
    # Mean a thousand standard deviations away, in many small batches.
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(16, 3, generator=generator) + 1000).to(dtype) for _ in range(50)]
    layer = nn.BatchNorm1d(3, dtype=dtype)
    result = recalibrate(layer, parts)
    mean, variance = moments(torch.cat(parts))
    torch.testing.assert_close(result.running_mean, mean.to(dtype), rtol=1e-7, atol=0)
    torch.testing.assert_close(result.running_var, variance.to(dtype), rtol=1e-6, atol=0)
    assert result.running_var.dtype == dtype


def test_a_shared_layer_pools_all_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()
            self.alias = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(x) + self.norm(3 * x + 1)

    parts = [part.mean((2, 3)) for part in batches()]
    result = recalibrate(Twice(), parts)
    mean, variance = moments(torch.cat([*parts, *(3 * part + 1 for part in parts)]))
    torch.testing.assert_close(result.norm.running_mean, mean)
    torch.testing.assert_close(result.norm.running_var, variance)
    assert int(result.norm.num_batches_tracked) == 6
    assert result.alias is result.norm


def test_dropout_is_off_and_fused_activations_are_kept() -> None:
    fused = timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout).double()
    model = nn.Sequential(nn.Dropout(0.5), fused)
    parts = batches()
    result = recalibrate(model, parts)
    mean, variance = moments(whole(parts))
    torch.testing.assert_close(result[1].running_mean, mean)
    torch.testing.assert_close(result[1].running_var, variance)


@pytest.mark.parametrize(
    "layer",
    [nn.SyncBatchNorm(4), timm.layers.SyncBatchNormAct(4), type("Own", (nn.BatchNorm2d,), {})(4)],
    ids=lambda layer: type(layer).__name__,
)
def test_every_class_of_batch_norm(layer: nn.Module) -> None:
    parts = batches()
    result = recalibrate(nn.Sequential(layer.double()), parts)
    mean, variance = moments(whole(parts))
    torch.testing.assert_close(result[0].running_mean, mean)
    torch.testing.assert_close(result[0].running_var, variance)


def test_what_has_no_statistics_to_estimate_stays() -> None:
    model = convert(
        nn.Sequential(*net(), nn.BatchNorm2d(5).double()), {"1": "frozen", "4": "group", "5": "batch"}
    )
    model.append(nn.BatchNorm2d(5, track_running_stats=False).double())
    before = snapshot(model)
    result = recalibrate(model, batches())
    assert_unchanged(model, before)
    changed = {
        name for name, tensor in result.state_dict().items() if not torch.equal(before["state"][name], tensor)
    }
    assert changed == {"5.running_mean", "5.running_var", "5.num_batches_tracked"}


def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(4).double(), nn.BatchNorm1d(4).double()
            nn.init.constant_(self.unused.running_mean, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    result = recalibrate(Branch(), [part.mean((2, 3)) for part in batches()])
    assert torch.equal(result.unused.running_mean, torch.full((4,), 5.0, dtype=torch.float64))
    assert int(result.unused.num_batches_tracked) == 0
    assert int(result.used.num_batches_tracked) == 3


def test_inputs_by_name_and_by_position() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2).double()

        def forward(self, x: Tensor, factor: float) -> Tensor:
            return self.norm(input=x * factor)

    x = torch.randn(6, 2, dtype=torch.float64)
    for inputs in ((x, 2.0), {"x": x, "factor": 2.0}):
        torch.testing.assert_close(recalibrate(Two(), [inputs]).norm.running_mean, (2 * x).mean(0))


# --- nothing changed on the way ----------------------------------------------------------------------


def test_a_copy_is_changed_unless_in_place() -> None:
    model = net()
    before = snapshot(model)
    result = recalibrate(model, batches())
    assert_unchanged(model, before)
    assert result is not model
    assert recalibrate(model, batches(), in_place=True) is model
    for name, tensor in result.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert [m.training for m in model.modules()] == before["modes"]


def test_training_flags_do_not_matter_and_survive() -> None:
    model = net().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    result = recalibrate(model, batches())
    assert [m.training for m in result.modules()] == modes
    expected = recalibrate(net(), batches())
    assert torch.equal(result[1].running_mean, expected[1].running_mean)


class Stopped(BaseException):
    """Stands for Ctrl-C."""


def stopping() -> Iterator[Tensor]:
    yield batches()[0]
    raise Stopped


@pytest.mark.parametrize("method", RUNNING)
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            lambda: [batches()[0], torch.full((2, 4, 3, 3), math.nan, dtype=torch.float64)],
            ModelError,
            "1 in batch 2 is not finite",
        ),
        (
            lambda: [batches()[0], torch.zeros(2, 3, 3, 3, dtype=torch.float64)],
            ModelError,
            "failed on the given inputs with RuntimeError",
        ),
        (list, ModelError, "got no batch"),
        (stopping, Stopped, None),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(
    method: str, given: Any, error: type[BaseException], words: str | None
) -> None:
    model = convert(net(), method)
    before = snapshot(model)
    with pytest.raises(error, match=words):
        recalibrate(model, given(), in_place=True)
    assert_unchanged(model, before)


def test_an_interrupting_callback_leaves_the_model_as_it_was() -> None:
    model = net()
    before = snapshot(model)

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        recalibrate(model, batches(), in_place=True, on_progress=stop)
    assert_unchanged(model, before)


def test_progress_counts_batches_with_and_without_a_length() -> None:
    seen: list[Progress] = []
    recalibrate(net(), batches(), on_progress=seen.append)
    assert [(p.done, p.total) for p in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    seen.clear()
    recalibrate(net(), iter(part for part in batches()), on_progress=seen.append)
    assert [(p.done, p.total, p.seconds_left) for p in seen] == [(n, 0, None) for n in range(4)]


# --- errors ------------------------------------------------------------------------------------------


def test_one_value_per_channel_is_explained() -> None:
    with pytest.raises(ModelError, match="give larger batches"):
        recalibrate(nn.BatchNorm1d(4), [torch.zeros(1, 4)])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_nothing_to_estimate(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="no layer with running statistics"):
        recalibrate(model, [torch.zeros(2, 2)])


def test_no_module() -> None:
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        recalibrate({}, [])  # type: ignore[arg-type]


def test_accuracy_after_a_shift_of_the_inputs() -> None:
    # What recalibration is for: other inputs, the same weights.
    generator = torch.Generator().manual_seed(0)
    model = net(dtype=torch.float32)
    x = torch.randn(64, 4, 5, 5, generator=generator)
    model = recalibrate(model, x.split(16))
    with torch.no_grad():
        before = model(x)
        off = F.mse_loss(model(5 * x + 3), before)
        adapted = recalibrate(model, (5 * x + 3).split(16))
        assert F.mse_loss(adapted(5 * x + 3), before) < 1e-3 * off
