"""Replace a trained network's BatchNorm layers with another normalization and keep what it learned."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from normsearch.progress import Progress

if TYPE_CHECKING:
    from normsearch import reporting
    from normsearch.architectures import Architecture, build
    from normsearch.calibration import Calibration, calibrate, calibration_record
    from normsearch.checkpoints import Checkpoint, load, save
    from normsearch.conversion import convert
    from normsearch.dependence import BatchDependence, Crop
    from normsearch.exporting import export
    from normsearch.forward import Arguments
    from normsearch.lipschitz import OperatorNorms, operator_norms
    from normsearch.measurement import compare, profile
    from normsearch.methods import METHODS, Method, Refusal, parse_method
    from normsearch.plans import Explanation, Plan, explain, plan
    from normsearch.recalibration import recalibrate
    from normsearch.reports import Profile, Report
    from normsearch.searching.searches import search
    from normsearch.sensitivities import Sensitivity
    from normsearch.site_effects import sensitivity
    from normsearch.sites import NormSite, find_sites
    from normsearch.state_dicts import convert_state_dict
    from normsearch.training import finetune, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Architecture",
    "ArchitectureError",
    "Arguments",
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

#: Where the others are: torch takes two seconds to import, Optuna half of one, and some need neither.
_HOMES = {
    "architectures": "Architecture build",
    "calibration": "Calibration calibrate calibration_record",
    "checkpoints": "Checkpoint load save",
    "conversion": "convert",
    "dependence": "BatchDependence Crop",
    "exporting": "export",
    "forward": "Arguments",
    "lipschitz": "OperatorNorms operator_norms",
    "measurement": "compare profile",
    "methods": "METHODS Method Refusal parse_method",
    "plans": "Explanation Plan explain plan",
    "recalibration": "recalibrate",
    "reports": "Profile Report",
    "sensitivities": "Sensitivity",
    "site_effects": "sensitivity",
    "sites": "NormSite find_sites",
    "state_dicts": "convert_state_dict",
    "training": "finetune parameter_groups",
    "searching.searches": "search",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"normsearch.{_HOME[name]}"), name)
    elif name == "reporting":
        value = import_module("normsearch.reporting")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
