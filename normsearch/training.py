"""parameter_groups and finetune: how to train a network whose layers were replaced."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from normsearch.errors import TrainingError
from normsearch.forward import LISTED, call, copied, refuse_meta, restored_modes
from normsearch.methods.running import RunningNorm
from normsearch.progress import OnProgress, Stage
from normsearch.training_state import Batches, TrainingState

#: How much faster than the weights ρ and the logits learn, as batch-instance normalization's paper has it.
GATE_RATE = 10.0

#: Their γ and β may have several dimensions; those of other layers are recognised as vectors.
_NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

Loss = Callable[[Any, Any], Tensor]


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return a model's trainable parameters in up to three groups for any optimizer that takes groups.

    ``weights`` decay. ``normalization`` does not: every parameter of a normalization layer, and every
    vector, since after folding a γ may be a gain and a β the bias of a convolution. ``gates``, ρ of
    ``batch_instance`` and the logits of ``switchable``, do not decay and learn ten times as fast. Each
    parameter is in one group, once, however many layers share it; frozen ones are in none.

    Args:
        model: the network.
        lr: the learning rate of all but the gates.
        weight_decay: of the weights.

    Returns:
        One dict with ``name``, ``params``, ``lr`` and ``weight_decay`` per group that is not empty.

    Raises:
        TrainingError: nothing can be trained, a parameter has no shape yet, or a number is out of range.

    Source: He et al., 2018, arXiv:1812.01187 (no decay of biases, γ and β); Nam and Kim, 2018,
    arXiv:1805.07925 (the rate of ρ).

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> switchable = normsearch.convert(model, "switchable")
        >>> groups = parameter_groups(switchable, lr=0.01, weight_decay=1e-4)
        >>> [(group["name"], len(group["params"]), group["lr"]) for group in groups]
        [('weights', 1, 0.01), ('normalization', 3, 0.01), ('gates', 2, 0.1)]
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)

    """
    _check_rates(lr, weight_decay)
    kinds: dict[int, str] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if is_lazy(parameter):
                raise TrainingError(f"{path}.{name} has no shape yet; run one forward pass first")
            kind = _kind(module, name, parameter)
            # A weight that is also a normalization's, or a gate's, is treated as that.
            kinds[id(parameter)] = max(kind, kinds.get(id(parameter), kind), key=_KINDS.index)
            parameters[id(parameter)] = parameter
    if not parameters:
        raise TrainingError(
            f"{type(model).__name__} has no parameter that requires a gradient; call requires_grad_(True) on "
            "what should be trained"
        )
    rates = {"weights": (lr, weight_decay), "normalization": (lr, 0.0), "gates": (GATE_RATE * lr, 0.0)}
    groups = []
    for kind in _KINDS:
        members = [parameter for key, parameter in parameters.items() if kinds[key] == kind]
        if members:
            rate, decay = rates[kind]
            groups.append({"name": kind, "params": members, "lr": rate, "weight_decay": decay})
    return groups


_KINDS = ("weights", "normalization", "gates")


def _kind(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, RunningNorm) and name in module.gates:
        return "gates"
    return "normalization" if parameter.dim() <= 1 or isinstance(module, _NORMALIZATIONS) else "weights"


@dataclass(frozen=True)
class _Recipe:
    """The numbers that a run must keep when it is resumed."""

    lr: float
    weight_decay: float
    warmup: int
    clip: float


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss,
    steps: int,
    lr: float,
    weight_decay: float = 1e-2,
    warmup: int | None = None,
    clip: float = 1.0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    in_place: bool = False,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Train a network for a number of steps: AdamW over ``parameter_groups``, warm-up, clipped gradients.

    At step t = 1, 2, … the learning rates are min(1, t / warmup) times those of the groups, and gradients
    are scaled down to a joint L2 norm of ``clip``. The model runs in train mode (``model.train()``); its
    modes are restored afterwards. The same random state gives the same result.

    With ``checkpoint`` a run that was interrupted goes on where it stood and gives the same result as one
    that was not: weights, optimizer, place in the loader and torch's random states are restored. For that
    the loader's order must follow from torch's random state or from its own ``generator``.

    Args:
        model: the network; a copy is trained unless ``in_place``.
        loader: pairs (inputs, targets), read again from the start when it ends: a DataLoader or a list.
            inputs as everywhere: a tuple is ``*args``, a dict ``**kwargs``, anything else one argument.
            Both are used on the device where they are.
        loss: maps the model's output and the targets to a scalar to minimise.
        steps: how many batches are learned from, those before an interruption included.
        lr: learning rate; ten times that for the gates.
        weight_decay: AdamW's, of the weights alone.
        warmup: steps over which the rates rise linearly; by default a tenth of ``steps``, or what
            the checkpoint was begun with.
        clip: the largest joint norm of the gradients; ``math.inf`` leaves them as they are.
        checkpoint: a file that is written now and then and read if it exists. It is read with
            ``weights_only``, replaced as a whole, and refused where it belongs to another run, with other
            numbers or from other weights.
        checkpoint_every: steps between two writings; the last step is written too.
        in_place: train the model itself.
        on_progress: called after every step with the loss in ``detail``.

    Returns:
        The trained network.

    Raises:
        TrainingError: a number is out of range, the loader gives no pairs, nothing can be trained, a
            parameter is float16, loss or gradients are not finite, or gradients are switched off.
        CheckpointError: the checkpoint cannot be read or written, or belongs to another run.
        ModelError: the model cannot be copied, or is on the meta device.

    Source: Loshchilov and Hutter, 2019, arXiv:1711.05101; Goyal et al., 2017, arXiv:1706.02677 (warm-up).

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16))
        >>> batches = [(torch.randn(1, 4), torch.tensor([2])) for _ in range(8)]
        >>> trained = normsearch.finetune(
        ...     normsearch.convert(model, "group"),
        ...     batches,
        ...     loss=torch.nn.functional.cross_entropy,
        ...     steps=20,
        ...     lr=1e-3,
        ... )

    """
    check_recipe(steps=steps, lr=lr, weight_decay=weight_decay, warmup=warmup, clip=clip)
    _check_number("checkpoint_every", checkpoint_every, least=1)
    if not torch.is_grad_enabled():
        raise TrainingError(
            "gradients are switched off here, by torch.no_grad() or torch.inference_mode(); call finetune "
            "outside of it"
        )
    refuse_meta(model, "train")
    _refuse_half(model)
    trained = model if in_place else copied(model)
    groups = parameter_groups(trained, lr=lr, weight_decay=weight_decay)
    rates = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    # One kernel for all parameters where torch has it: small networks spend half their step here.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.AdamW(groups, fused=fused)
    batches = Batches(loader)
    state = None if checkpoint is None else TrainingState(Path(checkpoint), trained, optimizer, batches)
    if warmup is None:
        warmup = steps // 10 if state is None else state.number("warmup", steps // 10)
    recipe = _Recipe(float(lr), float(weight_decay), warmup, float(clip))
    done = 0 if state is None else state.resume(steps, vars(recipe))
    stage = Stage("fine-tuning", steps, on_progress, done=done)
    with restored_modes(trained):
        trained.train()
        for step in range(done + 1, steps + 1):
            inputs, targets = batches.next()
            value = loss(_called(trained, inputs), targets)
            _check_loss(value, step)
            optimizer.zero_grad()
            value.backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            if not norm.isfinite():
                raise TrainingError(_diverged(f"the gradients' norm is {float(norm)}", step))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, step / warmup if warmup else 1.0)
            optimizer.step()
            if state is not None and (step % checkpoint_every == 0 or step == steps):
                state.write(step)
            stage.advance(f"loss {float(value.detach()):.4g}")
    optimizer.zero_grad()
    return trained


def _refuse_half(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise TrainingError(
                f"{name} is float16, whose smallest number is 6e-8: squares of gradients, by which AdamW "
                "divides, are zero there; train model.float() on inputs.float(), then take .half() of it"
            )


def _called(model: nn.Module, inputs: Any) -> Any:
    try:
        return call(model, inputs)
    except TypeError as error:
        if isinstance(inputs, list):
            raise TrainingError(f"{type(model).__name__} failed (TypeError: {error}); {LISTED}") from error
        raise


def check_recipe(*, steps: Any, lr: Any, weight_decay: Any, warmup: Any, clip: Any) -> None:
    """Raise a ``TrainingError`` for arguments of ``finetune`` that are out of range."""
    _check_number("steps", steps, least=1)
    _check_rates(lr, weight_decay)
    if warmup is not None:
        _check_number("warmup", warmup, least=0)
    if not _is_a(numbers.Real, clip) or not clip > 0:
        raise TrainingError(
            f"clip={clip!r}: give a number above 0, or math.inf to leave gradients as they are"
        )


def _check_rates(lr: Any, weight_decay: Any) -> None:
    for name, value, rule in (("lr", lr, "above 0"), ("weight_decay", weight_decay, "at least 0")):
        fits = _is_a(numbers.Real, value) and math.isfinite(value)
        if not fits or value < 0 or (name == "lr" and value == 0):
            raise TrainingError(f"{name}={value!r}: give a finite number {rule}")


def _check_number(name: str, value: Any, *, least: int) -> None:
    if not _is_a(numbers.Integral, value) or value < least:
        raise TrainingError(f"{name}={value!r}: give a whole number at least {least}")


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is a number of a kind; NumPy's are, True is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_loss(value: Any, step: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TrainingError(f"the loss must be a tensor of one number, got {what}")
    if not value.requires_grad:
        raise TrainingError("the loss does not depend on any trainable parameter; give a differentiable loss")
    if not value.isfinite():
        raise TrainingError(_diverged(f"the loss is {float(value.detach())}", step))


def _diverged(what: str, step: int) -> str:
    return f"{what} at step {step}; lower lr, lengthen warmup, or look for NaN in the batches"
