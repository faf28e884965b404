"""parameter_groups and finetune: groups, values against a hand-written AdamW, and exact resumption."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from normsearch import (
    METHODS,
    CheckpointError,
    Progress,
    TrainingError,
    convert,
    finetune,
    parameter_groups,
)
from normsearch.methods.batch_instance import BatchInstanceNorm
from normsearch.methods.sparse_switchable import SparseSwitchableNorm
from normsearch.methods.switchable import SwitchableNorm

torch.set_num_threads(1)


def net(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small trained-looking network: convolution, BatchNorm, linear."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(8 * 9, 3),
    ).to(dtype)
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def pairs(count: int = 4, size: int = 3, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# --- parameter_groups --------------------------------------------------------------------------------


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_weights_decay_normalization_does_not_and_gates_learn_ten_times_as_fast() -> None:
    model = convert(nn.Sequential(net(), nn.BatchNorm1d(3)), {"0.1": "switchable", "1": "batch_instance"})
    groups = parameter_groups(model, lr=0.01, weight_decay=0.1)
    assert by_name(model, groups) == {
        "weights": {"0.0.weight", "0.5.weight"},
        "normalization": {"0.0.bias", "0.5.bias", "0.1.weight", "0.1.bias", "1.weight", "1.bias"},
        "gates": {"0.1.mean_logits", "0.1.var_logits", "1.rho"},
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"weights": (0.01, 0.1), "normalization": (0.01, 0.0), "gates": (0.1, 0.0)}


def test_every_layers_gates_are_its_parameters() -> None:
    for layer in (SwitchableNorm(4), SparseSwitchableNorm(4), BatchInstanceNorm(4)):
        assert layer.gates
        assert set(layer.gates) == {n for n, _ in layer.named_parameters()} - {"weight", "bias"}


@given(
    methods=st.lists(st.sampled_from([*METHODS, "weight(mean_only=true)"]), min_size=2, max_size=2),
    frozen=st.lists(st.booleans(), min_size=12, max_size=12),
    shared=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_trainable_parameter_is_in_one_group_once(
    methods: list[str], frozen: list[bool], shared: bool
) -> None:
    convolution = nn.Conv2d(4, 4, 1)
    layers = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), convolution, nn.BatchNorm2d(4), nn.LayerNorm((4, 3, 3))
    )
    if shared:
        layers.append(convolution)
    model = convert(layers, {"1": [methods[0], "frozen"], "3": [methods[1], "frozen"]})
    for parameter, freeze in zip(model.parameters(), frozen, strict=False):
        parameter.requires_grad_(not freeze)
    model.requires_grad_(True) if all(not p.requires_grad for p in model.parameters()) else None
    groups = parameter_groups(model, lr=0.1, weight_decay=0.2)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    for group in groups:
        assert group["params"]
        if group["name"] == "weights":
            assert all(p.dim() > 1 for p in group["params"])


def test_gain_and_bias_of_normalized_weights_do_not_decay() -> None:
    model = convert(net(), "weight")
    names = by_name(model, parameter_groups(model, lr=0.1, weight_decay=0.1))
    assert names["weights"] == {"0.weight_v", "5.weight"}
    assert {"0.weight_g", "0.bias"} <= names["normalization"]


def test_layer_norm_over_maps_does_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm((4, 3, 3)))
    assert by_name(model, parameter_groups(model, lr=0.1, weight_decay=0.1))["weights"] == {"0.weight"}


def test_a_weight_that_is_a_gate_too_is_treated_as_one() -> None:
    norm, linear = BatchInstanceNorm(4), nn.Linear(4, 1, bias=False)
    holder = nn.Module()
    holder.weight, holder.norm, holder.linear = norm.rho, norm, linear
    names = by_name(holder, parameter_groups(holder, lr=0.1, weight_decay=0.1))
    assert names["gates"] == {"weight"}
    assert names["weights"] == {"linear.weight"}


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad],
)
def test_groups_fit_torchs_optimizers(optimizer: Any) -> None:
    model = convert(net(), "switchable")
    made = optimizer(parameter_groups(model, lr=0.01, weight_decay=0.1))
    model(pairs()[0][0]).sum().backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    made.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "numbers", "words"),
    [
        (nn.ReLU(), {}, "no parameter that requires a gradient"),
        (nn.LazyLinear(3), {}, "no shape yet"),
        (nn.Linear(2, 2), {"lr": 0.0}, "lr=0.0"),
        (nn.Linear(2, 2), {"lr": math.nan}, "lr=nan"),
        (nn.Linear(2, 2), {"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_what_cannot_be_grouped_is_refused(model: nn.Module, numbers: dict[str, float], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        parameter_groups(model, **{"lr": 0.1, "weight_decay": 0.1} | numbers)


# --- finetune: values --------------------------------------------------------------------------------


def slow_adamw(
    model: nn.Module, batches: list[Any], steps: int, lr: float, decay: float, warmup: int, clip: float
) -> nn.Module:
    """AdamW, warm-up and clipping written out, one scalar rule at a time."""
    model = copy.deepcopy(model).train()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(1, steps + 1):
        x, y = batches[(step - 1) % len(batches)]
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        with torch.no_grad():
            for name, p in model.named_parameters():
                gate = name.endswith(("rho", "logits"))
                rate = lr * (10 if gate else 1) * min(1.0, step / warmup)
                gradient = p.grad * min(1.0, clip / (float(norm) + 1e-6))
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                if p.dim() > 1:
                    p.mul_(1 - rate * decay)
                p.sub_(rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
    return model


@pytest.mark.parametrize("method", ["group", "switchable", "batch_instance", "weight"])
@pytest.mark.parametrize("clip", [0.5, math.inf])
def test_steps_are_those_of_adamw_written_out(method: str, clip: float) -> None:
    model = convert(net(dtype=torch.float64), method)
    batches = pairs(dtype=torch.float64)
    expected = slow_adamw(model, batches, 7, 0.02, 0.3, 4, clip)
    trained = finetune(
        model, batches, loss=F.cross_entropy, steps=7, lr=0.02, weight_decay=0.3, warmup=4, clip=clip
    )
    for (name, parameter), reference in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            parameter, reference, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_it_learns_at_batch_size_one_and_leaves_the_given_model() -> None:
    model = convert(net(), "group").eval()
    before = copy.deepcopy(model)
    batches = [(x[:1], y[:1]) for x, y in pairs(8)]

    def total(one: nn.Module) -> float:
        return sum(float(F.cross_entropy(one(x), y).detach()) for x, y in batches)

    trained = finetune(model, batches, loss=F.cross_entropy, steps=80, lr=0.01)
    assert total(trained.eval()) < 0.1 * total(before)
    assert states_equal(model, before)
    assert not model.training
    assert all(p.grad is None for p in trained.parameters())


def test_in_place_trains_the_model_itself_and_restores_its_modes() -> None:
    model = net()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model)
    assert finetune(model, pairs(), loss=F.cross_entropy, steps=2, lr=0.01, in_place=True) is model
    assert [module.training for module in model.modules()] == modes
    assert not states_equal(model, before)
    # In train mode meanwhile: the running statistics moved.
    assert not torch.equal(model[1].running_mean, before[1].running_mean)


def test_dict_and_tuple_inputs_and_none_targets() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, one: Tensor, other: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.linear(one) - other).square().mean()}

    batches = [
        ((torch.ones(1, 2), torch.ones(1, 1)), None),
        ({"one": torch.ones(1, 2), "other": torch.ones(1, 1)}, None),
    ]
    losses = []
    trained = finetune(
        Two(),
        batches,
        loss=lambda output, _: output["loss"],
        steps=120,
        lr=0.05,
        on_progress=lambda p: losses.append(p.detail),
    )
    assert float(trained(torch.ones(1, 2), torch.ones(1, 1))["loss"].detach()) < 1e-2
    assert losses[-1].startswith("loss ")


def test_the_same_random_state_gives_the_same_network_and_progress_counts_steps() -> None:
    seen: list[Progress] = []

    def run() -> nn.Module:
        torch.manual_seed(5)
        loader = DataLoader(
            TensorDataset(*(torch.cat(part) for part in zip(*pairs(), strict=True))), 5, shuffle=True
        )
        return finetune(
            net(dropout=0.3), loader, loss=F.cross_entropy, steps=6, lr=0.01, on_progress=seen.append
        )

    assert states_equal(run(), run())
    assert [p.done for p in seen] == [*range(7)] * 2
    assert {p.total for p in seen} == {6}


# --- finetune: interruption --------------------------------------------------------------------------


class Stopped(BaseException):
    """Stands for Ctrl-C or a killed process."""


def resumable_run(
    path: Path | None, *, own_generator: bool, stop: int | None = None, every: int = 3, steps: int = 14
) -> nn.Module:
    torch.manual_seed(11)
    data = TensorDataset(*(torch.cat(part) for part in zip(*pairs(5, 4), strict=True)))
    generator = torch.Generator().manual_seed(2) if own_generator else None
    loader = DataLoader(data, 3, shuffle=True, generator=generator)

    def look(progress: Progress) -> None:
        if progress.done == stop:
            raise Stopped

    return finetune(
        convert(net(dropout=0.4), "switchable"),
        loader,
        loss=F.cross_entropy,
        steps=steps,
        lr=0.02,
        warmup=5,
        checkpoint=path,
        checkpoint_every=every,
        on_progress=look,
    )


@given(
    stops=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    every=st.integers(1, 9),
    own_generator=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_a_run_interrupted_anywhere_ends_as_if_it_were_not(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], every: int, own_generator: bool
) -> None:
    path = tmp_path_factory.mktemp("run") / "run.pt"
    whole = resumable_run(None, own_generator=own_generator)
    for stop in sorted(stops):
        with pytest.raises(Stopped):
            resumable_run(path, own_generator=own_generator, stop=stop, every=every)
    random = None
    resumed = resumable_run(path, own_generator=own_generator, every=every)
    random = torch.get_rng_state()
    assert states_equal(whole, resumed)
    resumable_run(None, own_generator=own_generator)
    assert torch.equal(random, torch.get_rng_state())


def test_half_precision_is_refused_and_bfloat16_is_not() -> None:
    half, batches = net().half(), [(x.half(), y) for x, y in pairs(2, 4)]
    with pytest.raises(TrainingError, match=r"0\.weight is float16.*train model\.float\(\)"):
        finetune(half, batches, loss=F.cross_entropy, steps=1, lr=0.1)
    # What is not trained may be of any type.
    low = net().bfloat16()
    low.extra = nn.Parameter(torch.ones(2).half(), requires_grad=False)
    finetune(low, [(x.bfloat16(), y) for x, y in pairs(2, 4)], loss=F.cross_entropy, steps=1, lr=0.1)


def test_a_finished_run_takes_no_step_and_may_be_prolonged(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    done = resumable_run(path, own_generator=False)
    seen: list[int] = []
    again = finetune(
        convert(net(dropout=0.4), "switchable"),
        DataLoader(TensorDataset(*(torch.cat(p) for p in zip(*pairs(5, 4), strict=True))), 3, shuffle=True),
        loss=F.cross_entropy,
        steps=14,
        lr=0.02,
        warmup=5,
        checkpoint=path,
        on_progress=lambda p: seen.append(p.done),
    )
    assert seen == [14]
    assert states_equal(done, again)
    assert states_equal(
        resumable_run(path, own_generator=False, steps=20), resumable_run(None, own_generator=False, steps=20)
    )


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        resumable_run(path, own_generator=False, stop=4)
    before = path.read_bytes()
    save = torch.save

    def half(document: Any, target: Any) -> None:
        save(document, target)
        target.write_bytes(target.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match="No space left"):
        resumable_run(path, own_generator=False)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


class Bomb:
    """A pickle that would leave a trace if it were executed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_checkpoint_is_read_without_running_anything(tmp_path: Path) -> None:
    path, trace = tmp_path / "run.pt", tmp_path / "trace"
    torch.save({"format": "normsearch.finetune.1", "step": Bomb(trace)}, path)
    with pytest.raises(CheckpointError, match="cannot read"):
        resumable_run(path, own_generator=False)
    assert not trace.exists()


def some_run(path: Path | None, **changed: Any) -> nn.Module:
    options: dict[str, Any] = {
        "loss": F.cross_entropy,
        "steps": 4,
        "lr": 0.01,
        "warmup": 1,
        "checkpoint": path,
    }
    model, loader = changed.pop("model", None), changed.pop("loader", None)
    return finetune(model or net(), loader or pairs(), **options | changed)


def test_a_network_that_was_interrupted_in_place_goes_on(tmp_path: Path) -> None:
    steps = 0

    def interrupting(output: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    options: dict[str, Any] = {"steps": 12, "lr": 1e-2, "checkpoint_every": 5, "in_place": True}
    options |= {"loss": interrupting}
    whole = finetune(net(), pairs(), **options | {"loss": F.cross_entropy})
    half = net()
    with pytest.raises(KeyboardInterrupt):
        finetune(half, pairs(), **options, checkpoint=tmp_path / "run.pt")
    # As it stands it is neither what the run began with nor what the file holds.
    again = finetune(half, pairs(), **options, checkpoint=tmp_path / "run.pt")
    assert steps == 8 + 7
    assert states_equal(again, whole)


def scaled(model: nn.Sequential) -> nn.Sequential:
    """Return the network with one tensor a hundredth larger, as another conversion would leave it."""
    with torch.no_grad():
        model[1].weight.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.02}, "lr=0.01, this run has lr=0.02"),
        ({"weight_decay": 0.5}, "weight_decay=0.01"),
        ({"clip": 2.0}, "clip=1.0"),
        ({"warmup": 2}, "warmup=1"),
        ({"steps": 3}, "step 4, this run ends at step 3"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(50, 3))}, "other trainable parameters"),
        ({"model": nn.Sequential(*net()[:5], nn.Linear(72, 4))}, "does not fit"),
        ({"loader": pairs(2), "steps": 5}, "now ends earlier"),
        ({"model": net(seed=1)}, "started from other weights; give the model"),
        ({"model": scaled(net()), "steps": 9}, "started from other weights; give the model"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    path = tmp_path / "run.pt"
    some_run(path)
    written = path.read_bytes()
    with pytest.raises(CheckpointError, match=words):
        some_run(path, **changed)
    assert path.read_bytes() == written


def test_a_run_goes_on_from_its_start_from_what_it_reached_and_from_files_without_a_start(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.pt"
    reached = some_run(path)
    expected = some_run(None, steps=6)
    # Rounded otherwise, as by another machine.
    again = net()
    with torch.no_grad():
        again[0].weight.mul_(1 + 1e-6)
    for model in (net(), reached, again):
        written = path.read_bytes()
        assert states_equal(some_run(path, model=model, steps=6), expected)
        path.write_bytes(written)
    document = torch.load(path, weights_only=True)
    del document["start"]
    torch.save(document, path)
    assert states_equal(some_run(path, model=net(seed=1), steps=6), expected)


def test_a_prolonged_run_keeps_the_warmup_that_it_began_with(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    some_run(path, steps=6, warmup=None)
    assert states_equal(some_run(path, steps=60, warmup=None), some_run(None, steps=60, warmup=0))
    with pytest.raises(CheckpointError, match="written with warmup=0, this run has warmup=6"):
        some_run(path, steps=60, warmup=6)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.pt"
    if content is None:
        torch.save(net().state_dict(), path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="remove the file to start anew"):
        some_run(path)
    assert path.read_bytes() == before


def test_a_folder_that_does_not_exist_is_found_out_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        some_run(tmp_path / "nowhere" / "run.pt")


# --- finetune: errors --------------------------------------------------------------------------------


def once() -> Iterator[tuple[Tensor, Tensor]]:
    yield from pairs(2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loader": []}, "gave no batch"),
        ({"loader": once()}, "can be read only once"),
        ({"loader": [pairs()[0][0]]}, "must give pairs"),
        ({"loader": [(1, 2, 3)]}, "tuple of 3"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"warmup": -1}, "warmup=-1"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"loss": lambda output, targets: output}, "a tensor of one number, got shape"),
        ({"loss": lambda output, targets: 0.5}, "got float"),
        ({"loss": lambda output, targets: torch.zeros(())}, "does not depend on any trainable"),
        ({"loss": lambda output, targets: output.sum() * math.nan}, "the loss is nan at step 1"),
        ({"loss": lambda output, targets: (output.sum() * 0).sqrt()}, "norm is nan at step 1"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error(changed: dict[str, Any], words: str) -> None:
    loader = changed.pop("loader", None)
    options: dict[str, Any] = {"loss": F.cross_entropy, "steps": 4, "lr": 0.01}
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(TrainingError, match=words):
        finetune(model, pairs() if loader is None else loader, **options | changed)
    assert states_equal(model, before)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_switched_off_are_named(without: Any) -> None:
    with without(), pytest.raises(TrainingError, match="gradients are switched off here"):
        finetune(net(), pairs(), loss=F.cross_entropy, steps=1, lr=0.1)
