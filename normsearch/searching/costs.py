"""CostTable: what each method costs at each site, measured once, so that a plan's cost is a sum."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsearch.errors import ModelError, SearchError
from normsearch.forward import evaluating, restored_modes, try_call, unwrapped
from normsearch.methods import parse_method
from normsearch.plans import Plan
from normsearch.progress import OnProgress, Stage
from normsearch.searching.resident import Resident
from normsearch.searching.space import SearchSpace
from normsearch.surgery import candidate

#: What a plan can cost beside its score.
COSTS = ("latency", "memory")
_REPEATS = 7

Table = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class CostTable:
    """What each method adds at each site to what the original costs.

    Attributes:
        latency: seconds of a forward pass in eval mode more than with BatchNorm, by site and spelling.
        memory: bytes kept for the backward pass in train mode more than with BatchNorm, likewise.
        base_latency: seconds of the original's forward pass.
        base_memory: bytes that the original keeps for the backward pass, parameters left out.
        device: where it was measured.
        threads: with how many threads.

    """

    latency: Table
    memory: Table
    base_latency: float
    base_memory: float
    device: str
    threads: int

    def table(self, cost: str) -> Table:
        """Return ``latency`` or ``memory``.

        Raises:
            SearchError: there is no such cost.

        """
        check_cost(cost)
        found: Table = getattr(self, cost)
        return found

    def base(self, cost: str) -> float:
        """Return what the original costs."""
        check_cost(cost)
        return float(getattr(self, f"base_{cost}"))

    def of(self, plan: Plan, cost: str) -> float:
        """Return a plan's expected cost: the original's and the sum over its sites."""
        table = self.table(cost)
        added = sum(table[path][_spelled(plan, path, table[path])] for path in plan if path in table)
        return self.base(cost) + added


def _spelled(plan: Plan, path: str, row: Mapping[str, float]) -> str:
    """Return the row's spelling of a plan's resolved method."""
    site = next(site for site in plan.sites if site.path == path)
    for spelling in row:
        if parse_method(spelling).resolve(site) == plan[path]:
            return spelling
    raise SearchError(f"{plan[path]} at {path!r} was not measured; measured were {', '.join(row)}")


def check_cost(cost: str) -> None:
    """Raise a ``SearchError`` for anything but a cost's name."""
    if cost not in COSTS:
        raise SearchError(f"{cost!r} is no cost; choose from {', '.join(COSTS)}")


def measure_costs(
    resident: Resident, space: SearchSpace, inputs: Any, *, on_progress: OnProgress | None = None
) -> CostTable:
    """Measure what every method costs at every site, each layer alone on inputs of the shape seen there.

    Latency is the median of several passes that alternate with the BatchNorm layer's own, in seconds;
    memory counts what autograd keeps, each storage once, without parameters, buffers and the layer's input,
    which the layer before keeps or not whatever stands here. Layers that a method rewrites upstream count.
    What fuses across layers (compilers) is not seen.

    Args:
        resident: the model.
        space: what is searched.
        inputs: one forward pass's inputs, as large as they will be.
        on_progress: called after every layer.

    Raises:
        ModelError: the model fails on ``inputs``.

    """
    model = resident.model
    seen = _inputs_of_layers(model, inputs)
    latency: dict[str, dict[str, float]] = defaultdict(dict)
    memory: dict[str, dict[str, float]] = defaultdict(dict)
    stage = Stage("measuring costs", sum(map(len, space.allowed.values())), on_progress)
    sites = {site.path: site for site in space.sites}
    for path, spellings in space.allowed.items():
        for spelling in spellings:
            method = parse_method(spelling)
            latency[path][spelling] = memory[path][spelling] = 0.0
            if method.name != "batch":
                pairs = candidate(model, sites[path], method.resolve(sites[path]))
                for old, new in pairs:
                    given = seen.get(id(old), [])
                    before, after = _seconds(old, new, given)
                    latency[path][spelling] += after - before
                    memory[path][spelling] += _kept_bytes(new, given) - _kept_bytes(old, given)
            stage.advance(f"{path}: {spelling}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        seconds = [_timed(lambda: try_call(model, inputs), device) for _ in range(_REPEATS + 1)]
    base_memory = _kept_bytes(model, [inputs if isinstance(inputs, tuple | dict) else (inputs,)])
    return CostTable(
        dict(latency), dict(memory), median(seconds[1:]), base_memory, str(device), torch.get_num_threads()
    )


def _inputs_of_layers(model: nn.Module, inputs: Any) -> dict[int, list[tuple[Any, ...]]]:
    """Return what each layer is called with in one forward pass."""
    seen: dict[int, list[tuple[Any, ...]]] = defaultdict(list)

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[id(module)].append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))

    handles = [
        module.register_forward_pre_hook(note)
        for module in unwrapped(model)[0].modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with evaluating(model):
            try_call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _seconds(old: nn.Module, new: nn.Module, calls: list[tuple[Any, ...]]) -> tuple[float, float]:
    """Return the median seconds of all calls for two layers, measured by turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for layer in (old, new):
        _check_runs(layer, calls)
    with evaluating(old), evaluating(new):
        for _ in range(_REPEATS):
            for layer, spent in zip((old, new), times, strict=True):
                total = 0.0
                for args in calls:
                    device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
                    total += _timed(lambda layer=layer, args=args: layer.forward(*args), device)
                spent.append(total)
    return median(times[0]), median(times[1])


def _check_runs(layer: nn.Module, calls: list[tuple[Any, ...]]) -> None:
    with evaluating(layer):
        for args in calls:
            try:
                layer.forward(*args)
            except Exception as error:
                raise ModelError(
                    f"a {type(layer).__name__} failed on what its place in the model is given "
                    f"({type(error).__name__}: {error}); leave the method or the site out"
                ) from error


def _timed(run: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _kept_bytes(module: nn.Module, calls: list[Any]) -> float:
    """Return the bytes that autograd keeps for all calls in train mode, without state and inputs."""
    state = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    sizes: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in state:
            sizes[storage._cdata] = storage.nbytes()
            # Held, so that no other tensor takes its address while we count.
            held.append(tensor)
        return tensor

    with (
        restored_modes(module),
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        for part in module.modules():
            part.training = True
        for args in calls:
            fresh = args
            if isinstance(args, tuple):
                fresh = tuple(
                    a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
                    for a in args
                )
            state |= {x.untyped_storage()._cdata for x in tree_leaves(fresh) if isinstance(x, Tensor)}
            try_call(module, fresh)
    for buffer, before in buffers:
        buffer.copy_(before)
    return float(sum(sizes.values()))
