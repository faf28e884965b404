"""The contract of a normalization method, and what a trained BatchNorm hands over to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError, ShapeError, StateError
from normsearch.sites import STATE, NormSite, broken_statistics, is_trained

Keep = Literal["function", "affine", "nothing"]


@dataclass(frozen=True)
class Refusal:
    """Why a method cannot stand at a site, and what to do about it."""

    site: str
    method: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.site or '(the model itself)'}: {self.method} refused: {self.reason}; {self.remedy}"


class Built(NamedTuple):
    """What a method puts in place: the new layer, and a new producer where it rewrites that too."""

    module: nn.Module
    producer: nn.Module | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedNorm:
    """The numbers of a BatchNorm layer, whatever its class: what a method is initialised from.

    Attributes:
        channels: number of channels C.
        eps: constant added to the variance.
        momentum: step of the running statistics; None means a cumulative average.
        weight: γ of shape (C,); the layer's own Parameter, or a plain tensor where it was a buffer.
        bias: β of shape (C,), likewise.
        running_mean: μ of shape (C,).
        running_var: σ² of shape (C,).
        num_batches_tracked: number of updates, a scalar.
        trained: whether the layer carries anything; False once its statistics were dropped by ``reset``.
        training: the layer's training flag.
        synchronized: whether batch statistics were taken over a process group.
        process_group: that group; None is the default group.

    """

    channels: int
    eps: float
    momentum: float | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    trained: bool
    training: bool = True
    synchronized: bool = False
    process_group: Any = None

    @classmethod
    def of(cls, module: nn.Module, site: NormSite) -> Self:
        """Read a layer found by ``find_sites``."""
        state = {name: getattr(module, name, None) for name in STATE}
        return cls._from(state, site, module.training, getattr(module, "process_group", None))

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str, site: NormSite) -> Self:
        """Read the entries of one layer from a state dict.

        Raises:
            StateError: an entry that the site must have is missing or has another shape, or the statistics
                are not finite.

        """
        state = {name: state_dict.get(f"{prefix}{name}") for name in STATE}
        needed = ("running_mean", "running_var") if site.track_running_stats else ()
        for name in needed + (("weight",) if site.affine else ()) + (("bias",) if site.bias else ()):
            if state[name] is None:
                raise StateError(
                    f"the state dict has no {prefix}{name}, which {site.layer} at {site.path} must have; "
                    "give a state dict saved from the model that the plan was made for"
                )
        for name, tensor in state.items():
            if name != "num_batches_tracked" and tensor is not None and tensor.shape != (site.channels,):
                raise StateError(
                    f"{prefix}{name} has shape {tuple(tensor.shape)}, the plan expects ({site.channels},); "
                    "give a state dict saved from the model that the plan was made for"
                )
        broken = broken_statistics(state["running_mean"], state["running_var"], site.eps)
        if broken is not None:
            raise StateError(
                f"{prefix.removesuffix('.') or 'the layer'}: {broken}, by which nothing can be normalized; "
                "repair the checkpoint"
            )
        return cls._from(state, site, True, None)

    @classmethod
    def _from(cls, state: dict[str, Tensor | None], site: NormSite, training: bool, group: Any) -> Self:
        assert site.channels is not None
        trained = is_trained(state)
        return cls(
            channels=site.channels,
            eps=site.eps,
            momentum=0.1 if site.kind == "frozen" else site.momentum,
            # Numbers on the meta device cannot be read; such a model is rewritten as if it were trained.
            trained=trained is not False,
            training=training,
            synchronized=site.kind == "sync",
            process_group=group,
            **state,
        )

    @classmethod
    def absent(cls, site: NormSite) -> Self:
        """Stand in for the BatchNorm that a site of kind ``weight`` does not have."""
        state: dict[str, Tensor | None] = dict.fromkeys(STATE)
        return cls._from(state, site, True, None)

    def reset(self, keep: Keep) -> Self:
        """Drop the statistics (``affine``), or the statistics and γ, β (``nothing``)."""
        if keep == "function":
            return self
        kept = replace(
            self,
            trained=False,
            running_mean=None if self.running_mean is None else torch.zeros_like(self.running_mean),
            running_var=None if self.running_var is None else torch.ones_like(self.running_var),
            num_batches_tracked=_zero(self.num_batches_tracked),
        )
        if keep == "affine":
            return kept
        return replace(
            kept,
            weight=_parameter_like(self.weight, torch.ones_like),
            bias=_parameter_like(self.bias, torch.zeros_like),
        )

    @property
    def factory(self) -> dict[str, Any]:
        """The device and dtype of the layer, for the constructors of torch's layers."""
        for tensor in (self.weight, self.bias, self.running_mean):
            if tensor is not None:
                return {"device": tensor.device, "dtype": tensor.dtype}
        return {}

    @property
    def has_affine(self) -> bool:
        """Whether the layer has a weight or a bias."""
        return self.weight is not None or self.bias is not None

    @property
    def needs_affine(self) -> bool:
        """Whether a method that folds statistics needs a weight and a bias of its own."""
        return self.has_affine or self.trained

    @property
    def trainable(self) -> bool:
        """Whether parameters that the new method adds should be trained: not inside a frozen layer."""
        parts = [part for part in (self.weight, self.bias) if part is not None]
        return not parts or any(part.requires_grad for part in parts)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return μ and σ² in double precision; 0 and 1 where the layer has none."""
        if self.running_mean is None or self.running_var is None:
            zeros = torch.zeros(self.channels, dtype=torch.float64, device=self.factory.get("device"))
            return zeros, zeros + 1
        return self.running_mean.detach().double(), self.running_var.detach().double()

    def carry(self, layer: nn.Module) -> None:
        """Give ``layer`` the very γ and β of this one: the same Parameters, shared and trained as before."""
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor.detach().clone(), requires_grad=False)
            layer.register_parameter(name, tensor)

    def fold(self, layer: nn.Module, mean: Tensor, variance: Tensor) -> None:
        """Give ``layer`` the γ', β' that keep the function where its statistics are ``mean``, ``variance``.

        With s = γ / √(σ² + eps): γ' = s √(variance + eps), β' = β + s (mean − μ). An untrained layer has
        nothing to fold and is carried as it is.

        Args:
            layer: the new layer; its parameters are replaced.
            mean: the expected mean per channel, shape (C,) or scalar, double precision.
            variance: the expected variance per channel, likewise.

        """
        if not self.trained:
            self.carry(layer)
            return
        mu, var = self.statistics()
        gamma = torch.ones_like(mu) if self.weight is None else self.weight.detach().double()
        beta = torch.zeros_like(mu) if self.bias is None else self.bias.detach().double()
        scale = gamma / (var + self.eps).sqrt()
        folded = {
            "weight": (scale * (variance + self.eps).sqrt(), self.weight),
            "bias": (beta + scale * (mean - mu), self.bias),
        }
        for name, (value, old) in folded.items():
            trainable = self.trainable if old is None else old.requires_grad
            layer.register_parameter(name, nn.Parameter(value.to(**self.factory), requires_grad=trainable))


def _zero(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _parameter_like(tensor: Tensor | None, make: Any) -> Tensor | None:
    if tensor is None:
        return None
    fresh = make(tensor, requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fresh, requires_grad=tensor.requires_grad)
    return torch.as_tensor(fresh)


@dataclass(frozen=True)
class Method(ABC):
    """A normalization method with its options.

    A subclass is a frozen dataclass whose fields are the options (``int``, ``float``, ``bool`` or a
    ``Literal`` of bare words; ``| None`` for one that is resolved per site). Its spelling, ``str(method)``,
    is ``name`` or ``name(option=value, ...)`` and is read back by ``parse_method``.

    Attributes:
        name: the method's spelling without options.
        title: its name in the literature.
        citation: where it comes from.
        carries_parameters: whether γ and β live on in the new layer, unchanged, so that they may be tied.
        carries_statistics: whether the new layer has the running statistics, unchanged, by the same names.
        activates: whether it brings an activation, which may take the place of the one that follows.
        of_weights: whether it can stand at a convolution or linear layer without BatchNorm too.

    """

    name: ClassVar[str]
    title: ClassVar[str]
    citation: ClassVar[str]
    carries_parameters: ClassVar[bool] = False
    carries_statistics: ClassVar[bool] = False
    activates: ClassVar[bool] = False
    of_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option, hint in _options(type(self)).items():
            value = getattr(self, option)
            if not _fits(value, hint):
                raise MethodError(f"{self.name}({option}={value!r}): {option} must be {_describe(hint)}")
            if isinstance(value, int) and float in (hint, *get_args(hint)) and not isinstance(value, bool):
                object.__setattr__(self, option, float(value))
        self.validate()

    def validate(self) -> None:  # noqa: B027 (most methods have nothing to check)
        """Check what the types of the options cannot say; raise ``MethodError``."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether the eval-mode function of a trained BatchNorm is kept exactly."""

    @property
    @abstractmethod
    def batch_independent(self) -> bool:
        """Whether a sample's output never depends on the other samples, in train mode too."""

    @property
    def needs_producer(self) -> bool:
        """Whether it must know which layer feeds the site, whose weight it may rewrite."""
        return False

    def rewrites_producer(self, site: NormSite) -> bool:
        """Whether it rewrites the layer that feeds this site, where that is known."""
        return self.needs_producer

    @property
    def needs_dataflow(self) -> bool:
        """Whether it must know what stands before or after the site."""
        return self.needs_producer or self.activates

    def exact_at(self, site: NormSite) -> bool:
        """Whether the eval-mode function is kept exactly at this site."""
        same = (("weight", "bias") if self.carries_parameters else ()) + (
            ("running_mean", "running_var") if self.carries_statistics else ()
        )
        return self.exact and set(site.read) <= set(same)

    def leaves(self, site: NormSite) -> tuple[str, ...]:
        """Return which of BatchNorm's weight, bias, running_mean and running_var the new layer has too."""
        return ("weight", "bias", *(("running_mean", "running_var") if self.carries_statistics else ()))

    def absorbs(self, site: NormSite) -> bool:
        """Whether it takes the place of the activation that follows the site."""
        return False

    def resolve(self, site: NormSite) -> Method:
        """Return this method with every option that depends on the site filled in."""
        return self

    def refusal(self, site: NormSite) -> Refusal | None:
        """Return why the method cannot stand at ``site``, or None."""
        return None

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Return what a user should know about the method at ``site``."""
        return ()

    @abstractmethod
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return the layer that replaces ``old``, initialised from it.

        Args:
            site: where the layer will stand; the method is resolved for it and does not refuse it.
            old: the trained BatchNorm's numbers.
            producer: the layer that feeds the site, for methods that rewrite weights; it is not modified.
                None where another site's method has rewritten it already: then only the site is left to do.

        """

    def initialise(  # noqa: B027 (most methods need no data)
        self, model: nn.Module, untrained: Sequence[tuple[TrainedNorm, Built]], inputs: Any
    ) -> None:
        """Initialise the layers built for untrained sites from one batch, where the method's paper does.

        Args:
            model: the converted model, with the layers in place.
            untrained: the sites that were never trained: what stood there and what ``build`` returned.
            inputs: one forward pass's inputs.

        """

    def refuse(self, site: NormSite, reason: str, remedy: str) -> Refusal:
        """Return a refusal of this method at ``site``."""
        return Refusal(site.path, str(self), reason, remedy)

    def __str__(self) -> str:
        options = [
            f"{field.name}={spelled(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name


@cache
def _options(method: type[Method]) -> dict[str, Any]:
    hints = get_type_hints(method)
    return {field.name: hints[field.name] for field in fields(method)}


def _fits(value: object, hint: Any) -> bool:
    if get_args(hint) and not _is_literal(hint):
        return any(_fits(value, part) for part in get_args(hint))
    if _is_literal(hint):
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_literal(hint: Any) -> bool:
    return bool(get_args(hint)) and all(isinstance(word, str) for word in get_args(hint))


def _describe(hint: Any) -> str:
    if _is_literal(hint):
        return " or ".join(get_args(hint))
    parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(words[part] for part in parts)


def spelled(value: object) -> str:
    """Return an option's value as it is spelled; None is chosen per site, which no spelling says."""
    if value is None:
        return "per site"
    return str(value).lower() if isinstance(value, bool) else str(value)


class ElementGuard:
    """A forward pre-hook that names the site where a layer gets one element to normalize over.

    Torch's layers return a constant or read (N, C) as unbatched there. Registered only where the input's
    shape was not known when the model was converted.
    """

    def __init__(
        self,
        site: str,
        method: str,
        channels_per_group: int,
        consequence: str = "whose output would be constant",
    ) -> None:
        self.site = site
        self.method = method
        self.channels_per_group = channels_per_group
        self.consequence = consequence

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Check the shape of the layer's input.

        Raises:
            ShapeError: there is one element per group.

        """
        shape = inputs[0].shape
        # What has no channels is for the layer itself to refuse.
        if len(shape) > 1 and self.channels_per_group * shape[2:].numel() == 1:
            raise ShapeError(
                f"{self.site}: {self.method} got an input of shape {tuple(shape)}, one element per group, "
                f"{self.consequence}; choose layer, group or frozen for this site "
                "(plan(model, ..., inputs=example) refuses such sites where the forward pass reaches them)"
            )
