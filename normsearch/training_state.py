"""Where a training run stands: what a checkpoint holds, so that an interrupted run ends as if it were not."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from normsearch.errors import CheckpointError, TrainingError
from normsearch.files import write_atomically

_FORMAT = "normsearch.finetune.1"


class Batches:
    """A loader's pairs, over and over, and the place that a run has reached in them."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._generators = generators_of(loader)
        self._iterator: Iterator[Any] | None = None
        self._started_with: dict[str, Any] = {}
        self._taken = 0
        self._read = False

    def next(self) -> tuple[Any, Any]:
        """Return the next pair (inputs, targets); begin anew at the end.

        Raises:
            TrainingError: there is none, or it is no pair.

        """
        item = self._following()
        if not isinstance(item, tuple | list) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            raise TrainingError(
                f"the loader must give pairs (inputs, targets), got a {type(item).__name__}{size}; several "
                "inputs are one tuple: ((first, second), targets)"
            )
        return item[0], item[1]

    def _following(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._start()
            assert self._iterator is not None
            for item in self._iterator:
                self._taken += 1
                self._read = True
                return item
            self._iterator = None
        raise TrainingError(
            f"the loader gave no {'further ' if self._read else ''}batch; give one that holds some and "
            "starts anew each time, such as a DataLoader or a list (a generator can be read only once)"
        )

    def _start(self) -> None:
        self._started_with = self.random_state()
        self._iterator, self._taken = iter(self._loader), 0

    def random_state(self) -> dict[str, Any]:
        """Return the states of torch's generators and of the loader's own."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        own = [generator.get_state() for generator in self._generators]
        return {"cpu": torch.get_rng_state(), "cuda": cuda, "loader": own}

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        for generator, own in zip(self._generators, state["loader"], strict=True):
            generator.set_state(own)

    def place(self) -> dict[str, Any]:
        """Return the place as plain data."""
        return {"started_with": self._started_with, "taken": self._taken, "now": self.random_state()}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Read the loader up to a place again, with the random states of then, and leave those of then."""
        self._set_random_state(place["started_with"])
        self._start()
        assert self._iterator is not None
        for _ in range(place["taken"]):
            if next(self._iterator, None) is None:
                raise CheckpointError(
                    f"the checkpoint was written after {place['taken']} batches of the loader, which now "
                    "ends earlier; give the same data"
                )
        self._taken = place["taken"]
        self._set_random_state(place["now"])


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader or its samplers draw from, each once."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = (loader, sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


Sums = dict[str, tuple[float, float]]
#: How far a start's sums may be off, as a share of a tensor's norm: what is made again elsewhere is rounded
#: otherwise, and weights drawn or trained otherwise differ by much more.
_SAME = 1e-3


def _sums(state: Mapping[str, Any]) -> Sums:
    """Return the sum and the L2 norm of each tensor, by which a state dict is known again."""
    found = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            wide = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().double()
            found[name] = (float(wide.sum()), float(wide.square().sum().sqrt()))
    return found


def _same_sums(a: Sums, b: Sums) -> bool:
    return a.keys() == b.keys() and all(
        abs(one - other) <= _SAME * max(a[name][1], b[name][1])
        for name in a
        for one, other in zip(a[name], b[name], strict=True)
    )


#: What networks of this process started their last run from: one interrupted in place is half trained.
_STARTS: WeakKeyDictionary[nn.Module, Sums] = WeakKeyDictionary()


class TrainingState:
    """A run's checkpoint file, which is read at once if it exists.

    Raises:
        CheckpointError: the file is something else, or its folder does not exist.

    """

    def __init__(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches
    ) -> None:
        self._path, self._model, self._optimizer, self._batches = path, model, optimizer, batches
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        # What must be the same for a run to go on as if it had not stopped.
        self._identity: dict[str, Any] = {"trained": trained, "start": _sums(model.state_dict())}
        self._document: dict[str, Any] | None = None
        if path.exists():
            self._document = self._read()
        elif not path.parent.is_dir():
            # Found out now and not after the first hundred steps.
            raise CheckpointError(f"{path}: the folder does not exist; make it first")

    def number(self, name: str, default: int) -> int:
        """Return a number of the recipe that the file was written with; ``default`` if there is no file."""
        return default if self._document is None else int(self._document["recipe"].get(name, default))

    def write(self, step: int) -> None:
        """Replace the file by one of this moment.

        Raises:
            CheckpointError: it cannot be written.

        """
        document = {
            "format": _FORMAT,
            "step": step,
            **self._identity,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.place(),
        }
        write_atomically(self._path, lambda target: torch.save(document, target), force=True)

    def resume(self, steps: int, recipe: Mapping[str, float]) -> int:
        """Restore a run from the file and return how many steps it has done; 0 if there is no file.

        Args:
            steps: how many the run is to have in the end.
            recipe: the numbers that must be those of the file, and are written to it.

        Raises:
            CheckpointError: the file is of another run.

        """
        self._identity["recipe"] = dict(recipe)
        document, self._document = self._document, None
        if document is None:
            _STARTS[self._model] = self._identity["start"]
            return 0
        self._check(document, steps)
        try:
            self._model.load_state_dict(document["model"])
            self._optimizer.load_state_dict(document["optimizer"])
            self._batches.go_to(document["batches"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} does not fit this model or loader ({error}); remove the file to start anew"
            ) from error
        if "start" in document:
            self._identity["start"] = document["start"]
        _STARTS[self._model] = self._identity["start"]
        return int(document["step"])

    def _read(self) -> dict[str, Any]:
        try:
            document = torch.load(self._path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"cannot read {self._path} ({type(error).__name__}); {_WAY_OUT}") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise CheckpointError(f"{self._path} is not a checkpoint of finetune; {_WAY_OUT}")
        return document

    def _check(self, document: Mapping[str, Any], steps: int) -> None:
        recipe = self._identity["recipe"]
        for name, value in recipe.items():
            before = document["recipe"].get(name)
            if before != value:
                raise CheckpointError(
                    f"{self._path} was written with {name}={before}, this run has {name}={value}; give the "
                    "same, or remove the file to start anew"
                )
        if document["trained"] != self._identity["trained"]:
            raise CheckpointError(
                f"{self._path} was written for other trainable parameters; give the same model, or remove "
                "the file to start anew"
            )
        # Files from before it was kept have no start. A model with what the run has reached goes on too.
        known = [document["start"], _sums(document["model"])] if "start" in document else []
        own = [self._identity["start"], *filter(None, [_STARTS.get(self._model)])]
        shapes = [
            {name: getattr(value, "shape", None) for name, value in state.items()}
            for state in (self._model.state_dict(), document["model"])
        ]
        if (
            known
            and shapes[0] == shapes[1]
            and not any(_same_sums(mine, one) for mine in own for one in known)
        ):
            raise CheckpointError(
                f"{self._path} was written by a run that started from other weights; give the model that it "
                "started from, or remove the file to start anew"
            )
        if document["step"] > steps:
            raise CheckpointError(
                f"{self._path} is of step {document['step']}, this run ends at step {steps}; give more "
                "steps, or remove the file to start anew"
            )


_WAY_OUT = "give another name, or remove the file to start anew"
