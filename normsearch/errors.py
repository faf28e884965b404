"""The errors normsearch raises: each says what was given, the rule it breaks and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normsearch.methods.base import Refusal


class NormsearchError(Exception):
    """Anything that normsearch refuses to do."""


class MethodError(NormsearchError, ValueError):
    """A method's spelling, name or option is not valid."""


class ModelError(NormsearchError):
    """A model cannot be analysed, copied, run or edited."""


class ShapeError(NormsearchError, ValueError):
    """A normalization layer was given an input whose shape it cannot normalize."""


class ArchitectureError(NormsearchError, ValueError):
    """An architecture's name or argument is not one that normsearch builds."""


class CheckpointError(NormsearchError):
    """A checkpoint cannot be read, written or rebuilt."""


class ReportError(NormsearchError):
    """A report is malformed, or cannot be written as asked."""


class TrainingError(NormsearchError):
    """Training cannot start or go on."""


class SearchError(NormsearchError, ValueError):
    """A search was given something that it cannot search."""


class StateError(NormsearchError):
    """A state dict does not belong to the model that a plan was made for."""


class PlanError(NormsearchError):
    """A plan is malformed or does not fit the model it is applied to."""


class RefusedError(PlanError):
    """A method cannot stand at one or more sites; ``refusals`` lists every one of them."""

    def __init__(self, refusals: tuple[Refusal, ...]) -> None:
        self.refusals = refusals
        plural = "" if len(refusals) == 1 else "s"
        lines = [f"{len(refusals)} refusal{plural}:", *(f"  {refusal}" for refusal in refusals)]
        super().__init__("\n".join(lines))
