"""Replace a trained network's BatchNorm layers with another normalization and keep what it learned."""

from typing import TYPE_CHECKING, Any

from normsearch import reporting
from normsearch.architectures import Architecture, build
from normsearch.calibration import Calibration, calibrate, calibration_record
from normsearch.checkpoints import Checkpoint, load, save
from normsearch.conversion import convert
from normsearch.dependence import BatchDependence, Crop
from normsearch.errors import (
    ArchitectureError,
    CheckpointError,
    MethodError,
    ModelError,
    NormsearchError,
    PlanError,
    RefusedError,
    ReportError,
    SearchError,
    ShapeError,
    StateError,
    TrainingError,
)
from normsearch.exporting import export
from normsearch.lipschitz import OperatorNorms, operator_norms
from normsearch.measurement import compare, profile
from normsearch.methods import METHODS, Method, Refusal, parse_method
from normsearch.plans import Explanation, Plan, explain, plan
from normsearch.progress import Progress
from normsearch.recalibration import recalibrate
from normsearch.reports import Profile, Report
from normsearch.sensitivities import Sensitivity
from normsearch.site_effects import sensitivity
from normsearch.sites import NormSite, find_sites
from normsearch.state_dicts import convert_state_dict
from normsearch.training import finetune, parameter_groups

if TYPE_CHECKING:
    from normsearch.searching.searches import search

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Architecture",
    "ArchitectureError",
    "BatchDependence",
    "Calibration",
    "Checkpoint",
    "CheckpointError",
    "Crop",
    "Explanation",
    "Method",
    "MethodError",
    "ModelError",
    "NormSite",
    "NormsearchError",
    "OperatorNorms",
    "Plan",
    "PlanError",
    "Profile",
    "Progress",
    "Refusal",
    "RefusedError",
    "Report",
    "ReportError",
    "SearchError",
    "Sensitivity",
    "ShapeError",
    "StateError",
    "TrainingError",
    "build",
    "calibrate",
    "calibration_record",
    "compare",
    "convert",
    "convert_state_dict",
    "explain",
    "export",
    "find_sites",
    "finetune",
    "load",
    "operator_norms",
    "parameter_groups",
    "parse_method",
    "plan",
    "profile",
    "recalibrate",
    "reporting",
    "save",
    "search",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    # Optuna takes half a second to import: only for those who search.
    if name == "search":
        from normsearch.searching.searches import search

        return search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
