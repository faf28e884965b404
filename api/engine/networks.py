"""What a file holds, a checkpoint in its network or an exported program, and what can be done with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import normsearch
from api.tasks import Calibrating, Format, InputOf
from normsearch import reporting
from normsearch.admission import legacy, torch_zip
from normsearch.architectures import Architecture
from normsearch.checkpoints import Checkpoint, load, save
from normsearch.errors import CheckpointError
from normsearch.methods import Method
from normsearch.opening import Model, as_module, opening_of
from normsearch.plans import Plan
from normsearch.progress import OnProgress
from normsearch.site_outputs import site_drift
from normsearch.sites import NormSite


class Network(ABC):
    """A network as a file holds it.

    Attributes:
        library: the functions for networks of its kind, which have the same names and arguments.
        suffix: of the files that are made from it.
        kind: of the file.
        model: an nn.Module, an exported program, or a graph of onnx-ir.
        architecture: what built it; None where the file says itself what its network is.
        plan: what was changed in it; None where nothing was, or the file does not say.
        notes: what was done to read it.
        inputs: what the file says of its inputs; None where it says nothing.

    """

    library: Any = normsearch
    suffix = ".safetensors"

    def __init__(
        self,
        kind: Format,
        model: Any,
        architecture: Architecture | None = None,
        plan: Plan | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.kind, self.model, self.architecture, self.plan, self.notes = (
            kind,
            model,
            architecture,
            plan,
            notes,
        )
        self.inputs: list[InputOf] | None = None

    @abstractmethod
    def made(self, file: Path, plan: Path | None, *, configured: bool) -> tuple[Any, Plan | None]:
        """Return what was made of this network, and its plan, if that is known.

        Args:
            file: of the same kind.
            plan: where the plan is, for files that do not say theirs.
            configured: whether the operator wrote the architecture.

        """

    @abstractmethod
    def write(self, model: Any, file: Path, plan: Plan | None) -> None:
        """Write what was made of this network."""

    @abstractmethod
    def calibrate(
        self, converted: Any, batches: Iterable[Any], asked: Calibrating, follow: OnProgress
    ) -> Any:
        """Bring what was converted back to this network."""

    @abstractmethod
    def document(self, *given: Any, **options: Any) -> reporting.Document:
        """Return the report of a conversion, as ``reporting.document`` does after its first argument."""

    @abstractmethod
    def order(self, sites: Sequence[NormSite], first: Any) -> tuple[str, ...] | None:
        """Return the paths of sites in the order in which data reach them, as far as that is known.

        Args:
            sites: all of them.
            first: the inputs of a forward pass, or None.

        """

    @abstractmethod
    def runnable(self) -> nn.Module:
        """Return a module that computes what the network computes."""

    @property
    @abstractmethod
    def typed(self) -> Model:
        """What has parameters of the type that inputs should have."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters."""

    def notes_on(self, site: NormSite, method: Method) -> tuple[str, ...]:
        """Return what a user should know of a method at a site."""
        return method.notes(site)

    @property
    def batch_size(self) -> int | None:
        """The only batch size that the network takes; None where it is open."""
        sizes = {one.shape[0] for one in self.inputs or () if one.shape}
        return (sizes.pop() or None) if len(sizes) == 1 else None


class _TorchNetwork(Network):
    """What torch runs; as it stands, a checkpoint in its network."""

    def made(self, file: Path, plan: Path | None, *, configured: bool) -> tuple[Any, Plan | None]:
        found = load(file, self.architecture, allow_factories=configured)
        return found.model, found.plan

    def write(self, model: Any, file: Path, plan: Plan | None) -> None:
        save(model, file, architecture=self.architecture, plan=plan)

    def calibrate(
        self, converted: Any, batches: Iterable[Any], asked: Calibrating, follow: OnProgress
    ) -> Any:
        return normsearch.calibrate(
            converted,
            self.model,
            batches,
            budget=asked.budget,
            parameters=asked.parameters,
            seed=asked.seed,
            on_progress=follow,
        )

    def document(self, *given: Any, **options: Any) -> reporting.Document:
        return reporting.document(self.model, *given, **options)

    def order(self, sites: Sequence[NormSite], first: Any) -> tuple[str, ...] | None:
        if first is None:
            return None
        # The model beside itself: nothing drifts, and the order of the forward pass is told.
        reached = site_drift(self.model, self.model, [first], sites=sites)
        depths = {one.site: one.depth for one in reached if one.depth is not None}
        return tuple(sorted(depths, key=lambda path: depths[path]))

    def runnable(self) -> nn.Module:
        return as_module(self.model)

    @property
    def typed(self) -> Model:
        model: Model = self.model
        return model

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class _Program(_TorchNetwork):
    """What torch.export made of a network."""

    suffix = ".pt2"

    def __init__(self, found: Checkpoint) -> None:
        super().__init__("exported program", found.model, None, found.plan, found.notes)
        names = set(self.model.graph_signature.user_inputs)
        nodes = [node for node in self.model.graph.find_nodes(op="placeholder") if node.name in names]
        self.inputs = [_input_of(node.name, node.meta.get("val")) for node in nodes]

    def order(self, sites: Sequence[NormSite], first: Any) -> tuple[str, ...] | None:
        opening = opening_of(self.runnable())
        assert opening is not None
        # Layers are found in the order of the graph.
        found = {site.path for site in sites}
        return tuple(path for path in opening.layers if path in found)


def _input_of(name: str, value: Any) -> InputOf:
    if not isinstance(value, Tensor):
        return InputOf(name=name, dtype=None, shape=None)
    sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
    return InputOf(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=sizes)


def read(file: Path, architecture: Architecture | None, entry: str | None, *, configured: bool) -> Network:
    """Return the network in a file, of whichever kind its name says.

    Args:
        file: the file.
        architecture: what built the network; None where the file says it.
        entry: which entry of a training checkpoint.
        configured: whether the operator wrote the architecture.

    Raises:
        CheckpointError: it cannot be read, does not fit the architecture, or what reads it is not installed.

    """
    if file.suffix == ".onnx":
        return _onnx(file)
    found = load(file, architecture, entry=entry, allow_factories=configured)
    if found.architecture is None:
        return _Program(found)
    return _TorchNetwork(_format(file), found.model, found.architecture, found.plan, found.notes)


def _format(file: Path) -> Format:
    with file.open("rb") as opened:
        head = opened.read(64)
    if head.startswith(torch_zip.MAGIC):
        return "torch zip"
    return "torch legacy" if head.startswith(legacy.MAGIC) else "safetensors"


def _onnx(file: Path) -> Network:
    try:
        from api.engine import onnx_networks
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file.name} is an ONNX file, which needs {error.name}, and this service does not have it; ask "
            "the operator to install normsearch[onnx], or give an exported program or a checkpoint"
        ) from error
    return onnx_networks.read(file)
