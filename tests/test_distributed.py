"""Two processes: data-parallel training stays in step, synchronized statistics equal the whole batch's."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from normsearch import convert

torch.set_num_threads(1)

WORLD = 2
TIMEOUT = 90
#: The second layer sees one value per sample, of which instance norm would leave nothing.
IBN = "ibn"
TRAINED = ["batch_renorm", "batch_instance", "switchable", "sparse_switchable", "ghost(size=2)", "group"]
SYNCHRONIZED = ["batch_renorm", "batch_instance", "switchable", "sparse_switchable", IBN]
#: How many of the eight samples each process gets: halves, and uneven shares.
SPLITS = [(4, 4), (2, 6)]


def net(sync: bool) -> nn.Sequential:
    """A small network in double precision; paths 1 and 4 normalize, the latter one value per sample."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 6, 5),
        nn.BatchNorm2d(6, momentum=0.3, eps=1e-3),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).double()
    with torch.no_grad():
        for index in (1, 4):
            model[index].running_mean.normal_()
            model[index].running_var.uniform_(0.5, 2)
            model[index].weight.uniform_(0.5, 1.5)
            model[index].bias.normal_()
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if sync else model


def converted(method: str, *, sync: bool) -> nn.Module:
    """The network in train mode, its gates moved off their start so that every part counts."""
    model = convert(net(sync), {"1": method, "4": "batch_instance"} if method == IBN else method).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rho"):
                parameter.copy_(torch.linspace(0.2, 0.9, len(parameter)))
            elif name.endswith("logits"):
                parameter.copy_(torch.tensor([0.3, -0.2, 0.5]))
        for name, buffer in model.named_buffers():
            if name.endswith("renorm_step"):
                # Bounds in the middle of their schedule: some corrections are clipped, some are not.
                buffer.fill_(8_000)
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 5, 5, generator=generator, dtype=torch.float64)
    # Samples differ in mean and scale, so that a half's statistics are far from the whole's.
    x = x * torch.linspace(0.5, 3, 8).reshape(-1, 1, 1, 1) + torch.linspace(-2, 2, 8).reshape(-1, 1, 1, 1)
    return x.double(), torch.randn(8, 4, generator=generator, dtype=torch.float64)


def one_pass(model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Any]:
    """Forward and backward; the loss is a sum over samples, so shares of a batch add up to the whole."""
    x = x.clone().requires_grad_()
    output = model(x)
    (output * weights).sum().backward()
    return {
        "output": output.detach(),
        "input gradient": x.grad,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def share(rank: int, split: tuple[int, ...]) -> slice:
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def work(rank: int, folder: str) -> None:
    """What each process does; results go to files, because a child's exception is all that comes back."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT),
    )
    x, weights = batch()
    results: dict[str, Any] = {}
    for method in TRAINED:
        model = nn.parallel.DistributedDataParallel(converted(method, sync=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        mine = share(rank, (4, 4))
        for _ in range(3):
            optimizer.zero_grad()
            (model(x[mine]) * weights[mine]).mean().backward()
            optimizer.step()
        results[f"trained {method}"] = {
            name: p.detach().clone() for name, p in model.module.named_parameters()
        }
    for method in SYNCHRONIZED:
        for split in SPLITS:
            mine = share(rank, split)
            results[f"{method} {split}"] = one_pass(converted(method, sync=True), x[mine], weights[mine])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes computed; they are started once, because starting them is the slow part."""
    folder = tmp_path_factory.mktemp("distributed")
    context = mp.spawn(work, args=(str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail(f"two processes did not finish within {TIMEOUT} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("method", TRAINED)
def test_data_parallel_training_keeps_processes_in_step(method: str, results: list[dict[str, Any]]) -> None:
    first, second = (result[f"trained {method}"] for result in results)
    start = dict(converted(method, sync=False).named_parameters())
    assert set(first) == set(second) == set(start)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        # The bias in front of a batch norm has no effect there, and some gates may not be asked to move.
        assert name in ("0.bias", "3.bias") or not torch.equal(value, start[name]), name


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("method", SYNCHRONIZED)
class TestSynchronized:
    """Each process has a share of the batch; together they must compute what one process does on all."""

    def test_outputs_equal_the_whole_batchs(
        self, method: str, split: tuple[int, int], results: list[dict[str, Any]]
    ) -> None:
        whole = one_pass(converted(method, sync=False), *batch())
        found = torch.cat([result[f"{method} {split}"]["output"] for result in results])
        torch.testing.assert_close(found, whole["output"], rtol=1e-10, atol=1e-11)

    def test_unsynchronized_shares_would_differ(
        self, method: str, split: tuple[int, int], results: list[dict[str, Any]]
    ) -> None:
        # Without this the test above could pass for a method that ignores the batch.
        x, weights = batch()
        mine = share(0, split)
        alone = one_pass(converted(method, sync=False), x[mine], weights[mine])
        found = results[0][f"{method} {split}"]["output"]
        assert (found - alone["output"]).norm() / found.norm() > 1e-3

    def test_input_gradients_equal_the_whole_batchs(
        self, method: str, split: tuple[int, int], results: list[dict[str, Any]]
    ) -> None:
        whole = one_pass(converted(method, sync=False), *batch())
        found = torch.cat([result[f"{method} {split}"]["input gradient"] for result in results])
        torch.testing.assert_close(found, whole["input gradient"], rtol=1e-9, atol=1e-11)

    def test_parameter_gradients_add_up_to_the_whole_batchs(
        self, method: str, split: tuple[int, int], results: list[dict[str, Any]]
    ) -> None:
        whole = one_pass(converted(method, sync=False), *batch())
        parts = [result[f"{method} {split}"]["gradients"] for result in results]
        for name, value in whole["gradients"].items():
            found = sum(part[name] for part in parts)
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")

    def test_running_statistics_equal_the_whole_batchs(
        self, method: str, split: tuple[int, int], results: list[dict[str, Any]]
    ) -> None:
        whole = one_pass(converted(method, sync=False), *batch())
        for result in results:
            found = result[f"{method} {split}"]["buffers"]
            assert set(found) == set(whole["buffers"])
            for name, value in whole["buffers"].items():
                torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
