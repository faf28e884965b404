"""sense: what each method is worth at each site, from one network that shares its weights among all plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from normsearch.errors import SearchError
from normsearch.forward import call, restored_modes
from normsearch.methods import parse_method
from normsearch.methods.running import RunningNorm
from normsearch.progress import OnProgress, Stage
from normsearch.searching.resident import Resident
from normsearch.searching.space import SearchSpace, random_params
from normsearch.searching.tasks import Task, seed_loader
from normsearch.surgery import candidate, put
from normsearch.training import parameter_groups
from normsearch.training_state import Batches

#: In trials' worth of training steps; evaluations cost about as much again.
_TRAINING = 2.0
#: Batches that statistics are refreshed with before, and batches that a plan's loss is measured on.
_REFRESH, _SCORED = 4, 4
#: Forward passes that cost what a training step does.
_PASSES_PER_STEP = 3.0
#: Evaluations that a site's method is credited with none of the difference for.
_SHRINKAGE = 4.0


def sense(
    resident: Resident,
    space: SearchSpace,
    task: Task,
    *,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, dict[str, float]]:
    """Return what each method contributes at each choice, as a single-path supernet tells; larger is better.

    Every site holds all its methods at once, initialised from the trained layer, and all plans share the
    network's other weights. Each step trains one plan drawn at random: in the first half normalization
    parameters alone, then all. Afterwards random plans are scored by their loss in eval mode on further
    batches of the training split, statistics refreshed with a few batches first; a choice's contribution is
    its mean score, as normal scores of the ranks (some plans are ruined), less the mean of all, shrunk
    towards 0 by the number of plans that had it. Training costs two trials, scoring about as much; no other
    split is read.

    Args:
        resident: the model; it is put back.
        space: what is searched.
        task: data, loss and recipe.
        seed: of plans and batches.
        on_progress: called after every step.

    Returns:
        A table by parameter and spelling: what ``NormSampler(prior=…)`` takes.

    Raises:
        SearchError: nothing is left to choose, or no plan gave a finite loss.
        TrainingError: the training split gives no pairs.

    Source: Guo et al., 2020, arXiv:1904.00420 (single path, uniform sampling).

    """
    rng = np.random.default_rng([seed, 0x5E25E])
    steps = max(2, round(_TRAINING * task.recipe.steps))
    count = max(24, round(_TRAINING * task.recipe.steps * _PASSES_PER_STEP / (_REFRESH + _SCORED)))
    stage = Stage("sensing", steps + count, on_progress)
    with torch.random.fork_rng(devices=[]), resident.borrowed() as model, restored_modes(model):
        torch.manual_seed(seed)
        seed_loader(task.train)
        net = _Supernet(model, space)
        batches = Batches(task.train)
        model.train()
        net.train(batches, task, steps, rng, stage)
        held = [batches.next() for _ in range(_REFRESH + _SCORED)]
        plans, losses = [], []
        for _ in range(count):
            plan = random_params(space, rng)
            plans.append(plan)
            losses.append(net.loss(plan, held, task))
            stage.advance()
    return _contributions(space, plans, np.array(losses))


class _Supernet:
    """A model whose sites can hold any of their methods; layers change places, weights stay."""

    def __init__(self, model: nn.Module, space: SearchSpace) -> None:
        self._model, self._space = model, space
        self._layers: dict[tuple[str, str], dict[int, nn.Module]] = {}
        sites = {site.path: site for site in space.sites}
        self._olds: dict[int, nn.Module] = {}
        for path, spellings in space.allowed.items():
            for spelling in spellings:
                method = parse_method(spelling)
                pairs = (
                    []
                    if method.name == "batch"
                    else candidate(model, sites[path], method.resolve(sites[path]))
                )
                self._olds |= {id(old): old for old, _ in pairs}
                self._layers[path, spelling] = {id(old): new for old, new in pairs}

    def _chosen(self, plan: Mapping[str, str]) -> dict[int, nn.Module]:
        new: dict[int, nn.Module] = {}
        for choice in self._space.choices:
            spelling = plan.get(choice.name, choice.methods[0])
            for path in choice.sites:
                allowed = self._space.allowed[path]
                new |= self._layers[path, spelling if spelling in allowed else allowed[0]]
        return new

    @contextmanager
    def _as(self, plan: Mapping[str, str]) -> Iterator[nn.Module]:
        """Give the model with a plan's layers in their places."""
        new = self._chosen(plan)
        put(self._model, new)
        try:
            yield self._model
        finally:
            put(self._model, {id(layer): self._olds[key] for key, layer in new.items()})

    def train(self, batches: Batches, task: Task, steps: int, rng: np.random.Generator, stage: Stage) -> None:
        """Train a random plan at each step."""
        recipe = task.recipe
        everything = nn.ModuleList(
            [self._model, *(nn.ModuleList(new.values()) for new in self._layers.values())]
        )
        groups = parameter_groups(everything, lr=recipe.lr, weight_decay=recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups)
        warmup = max(1, steps // 10)
        failed: list[Exception] = []
        for step in range(steps):
            first = step < steps // 2
            inputs, targets = batches.next()
            with self._as(random_params(self._space, rng)) as model:
                try:
                    loss = task.loss(call(model, inputs), targets)
                except Exception as error:
                    # A last batch of one sample, say, which some methods cannot be trained on.
                    failed.append(error)
                    stage.advance()
                    continue
            optimizer.zero_grad()
            if loss.isfinite():
                loss.backward()
                for group in optimizer.param_groups:
                    if first and group["name"] == "weights":
                        for parameter in group["params"]:
                            parameter.grad = None
                    group["lr"] = (
                        recipe.lr * (10 if group["name"] == "gates" else 1) * min(1, (step + 1) / warmup)
                    )
                found = [p for group in optimizer.param_groups for p in group["params"]]
                norm = nn.utils.clip_grad_norm_(found, recipe.clip)
                # One ruined plan must not take the others' weights with it.
                if norm.isfinite():
                    optimizer.step()
            stage.advance()
        if 2 * len(failed) > steps:
            raise SearchError(
                f"{len(failed)} of {steps} steps of the supernet failed, the last with "
                f"{type(failed[-1]).__name__}: {failed[-1]}; search with sense=False"
            ) from failed[-1]
        optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, plan: Mapping[str, str], held: Sequence[tuple[Any, Any]], task: Task) -> float:
        """Return a plan's mean loss in eval mode after its running statistics have seen a few batches."""
        with self._as(plan) as model:
            model.train()
            try:
                with _forgetful(model):
                    for inputs, _ in held[:_REFRESH]:
                        call(model, inputs)
                model.eval()
                losses = [
                    float(task.loss(call(model, inputs), targets)) for inputs, targets in held[_REFRESH:]
                ]
            except Exception:
                # What cannot run on these batches is as bad as what diverges.
                return math.inf
            finally:
                model.train()
        return float(np.mean(losses))


@contextmanager
def _forgetful(model: nn.Module) -> Iterator[None]:
    """Let running statistics become the mean over the batches to come, whatever they were.

    Statistics of a layer depend on what stands before it, so each plan needs its own.
    """
    kinds = (nn.modules.batchnorm._BatchNorm, RunningNorm)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
            layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def _contributions(
    space: SearchSpace, plans: Sequence[Mapping[str, str]], losses: NDArray[np.float64]
) -> dict[str, dict[str, float]]:
    if not np.isfinite(losses).any():
        raise SearchError(
            "no plan of the supernet gave a finite loss; lower the recipe's lr, or search without sense"
        )
    scores = _normal_scores(-np.where(np.isfinite(losses), losses, np.inf))
    table: dict[str, dict[str, float]] = {}
    for name, distribution in space.distributions.items():
        table[name] = {}
        for spelling in distribution.choices:
            mine = scores[[plan[name] == spelling for plan in plans]]
            table[name][str(spelling)] = float(mine.sum() / (len(mine) + _SHRINKAGE))
    return table


def _normal_scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return standard normal quantiles of the ranks: larger values get larger scores."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    shares = torch.tensor((ranks + 0.5) / len(values))
    quantiles: NDArray[np.float64] = torch.special.ndtri(shares).numpy()
    return quantiles
