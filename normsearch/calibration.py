"""calibrate: bring a converted model back to its original with a few unlabelled inputs."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from normsearch.affine_fitting import least_squares, whiten, whitenable
from normsearch.batches import Batches
from normsearch.closing import closed, record_in
from normsearch.distillation import distill, site_parameters
from normsearch.errors import ModelError, PlanError
from normsearch.forward import refuse_meta
from normsearch.opening import Model, opened
from normsearch.pairing import Errors, Outputs, Pair
from normsearch.programs import with_layers
from normsearch.progress import OnProgress, Stage
from normsearch.reports import Change

Parameters = Literal["all", "affine"]

#: A held-out error at which nothing is left to do but rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Rung:
    """One thing that ``calibrate`` tried.

    Attributes:
        name: ``whitening``, ``least squares``, ``affine`` or ``all`` (parameters that were distilled); of
            ONNX graphs ``whitening and least squares`` or ``least squares``.
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
        gained_bias: paths of the layers that gained a bias for it.
        batches: how many batches there were.
        held_out: how many of them measured the error and trained nothing.

    """

    error: Change[float]
    sites: dict[str, Change[float]]
    rungs: tuple[Rung, ...]
    whitened: tuple[str, ...]
    gained_bias: tuple[str, ...]
    batches: int
    held_out: int

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(asdict(self), indent=2)


M = TypeVar("M", nn.Module, ExportedProgram, nn.Module | ExportedProgram)

_RECORDS: weakref.WeakKeyDictionary[Model, Calibration] = weakref.WeakKeyDictionary()


def calibration_record(model: Model) -> Calibration | None:
    """Return what ``calibrate`` did when it made ``model``; None if it did not make it, or for a copy."""
    return _RECORDS.get(model)


def calibrate(
    converted: M,
    original: M,
    batches: Iterable[Any],
    *,
    budget: int = 200,
    parameters: Parameters = "all",
    outputs: Outputs | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> M:
    """Bring a converted model back to its original with a few unlabelled inputs.

    Four rungs, each kept only if it lowers the error on held-out batches:

    1. whitening: a site's input is normalized by the original's running statistics inside the layer before
       it, where that layer feeds nothing else and the site's output comes closer to the original's;
    2. least squares: γ and β per channel, site after site in the order of the data;
    3. distillation of the outputs and of every site's output into the parameters of the new layers;
    4. the same into all parameters.

    Both models run in evaluation mode, so that dropout is off and running statistics stay. The result is the
    converted model with other numbers; a layer that whitens and has no bias gains one. One batch and some six
    copies of the parameters are in memory, however many batches there are. The inputs are read without any
    accounting for privacy.

    Args:
        converted: what ``convert`` made of ``original``; it is left untouched.
        original: the trained model; it is left untouched. Both may be exported programs.
        batches: inputs, never labels, two batches at least: a tuple is ``*args``, a dict ``**kwargs``,
            anything else one argument. They are read several times and must be the same each time, as those
            of a list are, and of a DataLoader that shuffles by torch's own generator. Of the first 64 every
            fourth is held out, or the last one of fewer than four.
        budget: the most optimisation steps, one batch each; a third of them for the new layers alone.
        parameters: ``all``, or ``affine`` to change nothing but those of the new layers, without whitening.
            With ``all``, parameters elsewhere with ``requires_grad=False`` are whitened but never trained.
        outputs: picks what to match from a model's output; by default every floating-point tensor in it.
            ``lambda output: ()`` matches the sites' outputs alone, as a detector's lists of boxes need.
        seed: for loaders that shuffle; the same seed gives the same result.
        on_progress: called after every step, with a time estimate for the stage.

    Returns:
        A new model; ``calibration_record`` tells what was done.

    Raises:
        ModelError: there are fewer than two batches, they can be read only once, change or hold NaN; a model
            fails; outputs do not match or are not finite; the models do not belong together.
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
    if isinstance(converted, ExportedProgram) or isinstance(original, ExportedProgram):
        if not (isinstance(converted, ExportedProgram) and isinstance(original, ExportedProgram)):
            raise ModelError(
                "one of the models is an exported program and the other is not; give two of a kind"
            )
        calibrated = calibrate(
            with_layers(converted, original),
            opened(original, share=True),
            batches,
            budget=budget,
            parameters=parameters,
            outputs=outputs,
            seed=seed,
            on_progress=on_progress,
        )
        assert isinstance(calibrated, fx.GraphModule)
        program = closed(calibrated, record_in(converted))
        _RECORDS[program] = _RECORDS[calibrated]
        return program  # type: ignore[return-value]
    for model in (original, converted):
        if isinstance(model, nn.Module):
            refuse_meta(model, "calibrate")
    with torch.random.fork_rng(devices=[]):
        data = Batches(batches, seed)
        pair = Pair(original, converted, outputs, data.first)
    with pair.evaluating():
        ladder = _Ladder(pair, data, on_progress)
        if ladder.before.total > _ROUNDING:
            ladder.climb(budget, parameters)
    _RECORDS[pair.model] = ladder.record()
    return pair.model


class _Ladder:
    """The rungs, what each brought, and the way back from those that brought nothing."""

    def __init__(self, pair: Pair, data: Batches, on_progress: OnProgress | None) -> None:
        self._pair, self._data, self._on_progress = pair, data, on_progress
        self.before = self.now = self._measure()
        self._rungs: list[Rung] = []
        self._whitened: tuple[str, ...] = ()
        self._biased = self._with_bias()

    def climb(self, budget: int, parameters: Parameters) -> None:
        """Try one rung after the other."""
        may_whiten = parameters == "all" and whitenable(self._pair)
        if may_whiten and not self._try("whitening", self._whiten):
            self._whitened = ()
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
            tuple(path for path in self._with_bias() if path not in self._biased),
            self._data.count,
            self._data.held_out_count,
        )

    def _with_bias(self) -> dict[str, None]:
        modules = self._pair.network.named_modules()
        return {path: None for path, module in modules if module._parameters.get("bias") is not None}

    def _measure(self) -> Errors:
        return self._pair.errors(self._data.held_out())

    def _try(self, name: str, rung: Callable[[], int]) -> bool:
        """Climb one rung, and step back and return False if it does not lower the held-out error."""
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
        return kept

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
