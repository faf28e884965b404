"""calibrate: bring a converted model back to its original with a few unlabelled inputs."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsearch.affine_fitting import least_squares, whiten, whitenable
from normsearch.distillation import distill, site_parameters
from normsearch.errors import ModelError, PlanError
from normsearch.pairing import Errors, Outputs, Pair
from normsearch.progress import OnProgress, Stage
from normsearch.reports import Change

Parameters = Literal["all", "affine"]

#: Of so many first batches every fourth is held out; the other ones are what statistics are fitted to.
_FITTED, _HELD_OUT_EVERY = 64, 4
#: A held-out error at which nothing is left to do but rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Rung:
    """One thing that ``calibrate`` tried.

    Attributes:
        name: ``whitening``, ``least squares``, ``affine`` or ``all`` (parameters that were distilled).
        error: the held-out error with it.
        kept: whether it lowered the error and was kept.
        steps: optimisation steps taken.
        seconds: time taken.

    """

    name: str
    error: float
    kept: bool
    steps: int
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` did; ``calibration_record`` returns it.

    Attributes:
        error: the held-out error before and after: ‖converted − original‖ / ‖original‖ of the outputs, or of
            the sites' outputs on average where no output was matched.
        sites: the same for the output of each site that a forward pass reaches, by path.
        rungs: what was tried, in order.
        whitened: paths of the sites whose input is whitened by the layer before.
        batches: how many batches there were.
        held_out: how many of them measured the error and trained nothing.

    """

    error: Change[float]
    sites: dict[str, Change[float]]
    rungs: tuple[Rung, ...]
    whitened: tuple[str, ...]
    batches: int
    held_out: int

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(asdict(self), indent=2)


_RECORDS: weakref.WeakKeyDictionary[nn.Module, Calibration] = weakref.WeakKeyDictionary()


def calibration_record(model: nn.Module) -> Calibration | None:
    """Return what ``calibrate`` did when it made ``model``; None if it did not make it, or for a copy."""
    return _RECORDS.get(model)


def calibrate(
    converted: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    budget: int = 200,
    parameters: Parameters = "all",
    outputs: Outputs | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Bring a converted model back to its original with a few unlabelled inputs.

    Four rungs, each kept only if it lowers the error on held-out batches:

    1. whitening: a site's input is normalized by the original's running statistics inside the layer before
       it, where that layer may be changed and the site's output comes closer to the original's;
    2. least squares: γ and β per channel, site after site in the order of the data;
    3. distillation of the outputs and of every site's output into the parameters of the new layers;
    4. the same into all parameters.

    The result is the converted model with other numbers; a whitened layer without a bias gains one. It
    reads the data as they are: with differential privacy, the inputs given here are not accounted for.

    Args:
        converted: what ``convert`` made of ``original``; it is left untouched.
        original: the trained model; it is left untouched.
        batches: inputs, never labels, two batches at least: a tuple is ``*args``, a dict ``**kwargs``,
            anything else one argument. They are read several times and must be the same each time, as those
            of a list or a DataLoader are (shuffling is repeated; workers that draw random numbers of their
            own are not). Of the first 64 every fourth is held out, or the last one of fewer than four.
        budget: the most optimisation steps, one batch each; a third of them for the new layers alone.
        parameters: ``all``, or ``affine`` for those of the new layers only. Parameters with
            ``requires_grad=False`` elsewhere never change, but for the weights that whitening rewrites.
        outputs: picks what to match from a model's output; by default every floating-point tensor in it.
            ``lambda output: ()`` matches the sites' outputs alone, as a detector's lists of boxes need.
        seed: for loaders that shuffle; the same seed gives the same result.
        on_progress: called after every step, with a time estimate for the stage.

    Returns:
        A new model; ``calibration_record`` tells what was done.

    Raises:
        ModelError: there are fewer than two batches, they can be read only once or hold NaN; a model fails;
            outputs do not match or are not finite; the models do not belong together.
        PlanError: ``budget`` or ``parameters`` is not valid.

    Source: folding as in Jacob et al., 2018, arXiv:1712.05877; distillation as in Hinton et al., 2015,
    arXiv:1503.02531.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> _ = model(torch.randn(64, 3, 8, 8) * torch.tensor([1.0, 2, 3]).reshape(3, 1, 1))
        >>> converted, inputs = normsearch.convert(model, "group"), torch.randn(64, 3, 8, 8)
        >>> calibrated = normsearch.calibrate(converted, model, inputs.split(8), budget=20)
        >>> record = normsearch.calibration_record(calibrated)
        >>> record.error.after < record.error.before
        True

    """
    if not isinstance(budget, int) or budget < 0:
        raise PlanError(f"budget={budget!r}: give a number of optimisation steps, at least 0")
    if parameters not in get_args(Parameters):
        raise PlanError(f"parameters={parameters!r} is not one of {', '.join(get_args(Parameters))}")
    pair = Pair(original, converted, outputs)
    with pair.evaluating():
        data = _Batches(batches, seed)
        ladder = _Ladder(pair, data, on_progress)
        if ladder.before.total > _ROUNDING:
            ladder.climb(budget, parameters)
    _RECORDS[pair.model] = ladder.record()
    return pair.model


class _Batches:
    """Batches that can be read again and again, in two parts: for training and held out."""

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        if isinstance(batches, Iterator):
            raise ModelError(
                f"batches is a {type(batches).__name__}, which can be read only once, and calibration reads "
                "its inputs several times; give a list or a DataLoader"
            )
        if isinstance(batches, Tensor | dict | str):
            raise ModelError(
                f"batches is a single {type(batches).__name__}; give batches of inputs, for example "
                "inputs.split(32)"
            )
        self._batches, self._seed = batches, seed
        self.count = 0
        for inputs in self._read():
            self.count += 1
            _refuse_nan(inputs, self.count)
        if self.count < 2:
            raise ModelError(
                f"batches holds {self.count} of them, and calibration needs two at least, one to fit and one "
                "to hold out; split the inputs, for example inputs.split(32)"
            )

    @property
    def held_out_count(self) -> int:
        """The number of batches held out."""
        return sum(self._is_held_out(index) for index in range(self.count))

    def _read(self) -> Iterator[Any]:
        # A loader that shuffles draws from this generator: every pass is the same.
        torch.manual_seed(self._seed)
        yield from self._batches

    def _is_held_out(self, index: int) -> bool:
        if self.count < _HELD_OUT_EVERY:
            return index == self.count - 1
        return index < _FITTED and index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1

    def held_out(self) -> Iterator[Any]:
        """Yield the held-out batches."""
        for index, inputs in enumerate(self._read()):
            if index >= _FITTED:
                return
            if self._is_held_out(index):
                yield inputs

    def fitted(self) -> Iterator[Any]:
        """Yield the training batches that statistics are fitted to: those among the first."""
        for index, inputs in enumerate(self._read()):
            if index >= _FITTED:
                return
            if not self._is_held_out(index):
                yield inputs

    @property
    def fitted_count(self) -> int:
        """The number of batches that statistics are fitted to."""
        return min(self.count, _FITTED) - self.held_out_count

    def training(self) -> Iterator[Any]:
        """Yield every batch that is not held out."""
        for index, inputs in enumerate(self._read()):
            if not self._is_held_out(index):
                yield inputs


def _refuse_nan(inputs: Any, number: int) -> None:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
            raise ModelError(f"batch {number} holds NaN; clean the inputs, or leave that batch out")


class _Ladder:
    """The rungs, what each brought, and the way back from those that brought nothing."""

    def __init__(self, pair: Pair, data: _Batches, on_progress: OnProgress | None) -> None:
        self._pair, self._data, self._on_progress = pair, data, on_progress
        self.before = self.now = self._measure()
        self._rungs: list[Rung] = []
        self._whitened: tuple[str, ...] = ()

    def climb(self, budget: int, parameters: Parameters) -> None:
        """Try one rung after the other."""
        if whitenable(self._pair):
            self._try("whitening", self._whiten)
        self._try("least squares", self._least_squares)
        others = [p for p in self._pair.network.parameters() if p.requires_grad]
        affine = site_parameters(self._pair)
        both = list(dict.fromkeys([*affine, *others]))
        if parameters == "affine":
            self._distill("affine", affine, budget)
        else:
            self._distill("affine", affine, budget // 3)
            self._distill("all", both, budget - budget // 3)

    def record(self) -> Calibration:
        """Return what was done."""
        sites = {
            path: Change(error, self.now.sites[path])
            for path, error in self.before.sites.items()
            if path in self.now.sites
        }
        return Calibration(
            Change(self.before.total, self.now.total),
            sites,
            tuple(self._rungs),
            self._whitened,
            self._data.count,
            self._data.held_out_count,
        )

    def _measure(self) -> Errors:
        return self._pair.errors(self._data.held_out())

    def _try(self, name: str, rung: Callable[[], int]) -> None:
        """Climb one rung, and step back if it does not lower the held-out error."""
        start = time.monotonic()
        network = self._pair.network
        parameters = [(module, dict(module._parameters)) for module in network.modules()]
        values = [(p, p.detach().clone()) for p in network.parameters()]
        steps = rung()
        errors = self._measure()
        kept = errors.total < self.now.total
        if kept:
            self.now = errors
        else:
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)
            for module, own in parameters:
                module._parameters = own
        self._rungs.append(Rung(name, errors.total, kept, steps, time.monotonic() - start))

    def _whiten(self) -> int:
        stage = Stage("whitening", self._data.fitted_count, self._on_progress)
        self._whitened = whiten(self._pair, self._data.fitted(), stage)
        return 0

    def _least_squares(self) -> int:
        stage = Stage("least squares", self._data.fitted_count, self._on_progress)
        least_squares(self._pair, self._data.fitted(), stage)
        return 0

    def _distill(self, name: Parameters, parameters: list[nn.Parameter], budget: int) -> None:
        if not parameters or not budget:
            return
        words = "the new layers" if name == "affine" else "all parameters"
        stage = Stage(f"distilling into {words}", budget, self._on_progress)

        def rung() -> int:
            return distill(
                self._pair,
                parameters,
                self._data.training,
                lambda: self._measure().total,
                budget,
                stage,
            )

        self._try(name, rung)
