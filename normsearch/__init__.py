"""Replace a trained network's BatchNorm layers with another normalization and keep what it learned."""

from normsearch.conversion import convert, convert_state_dict
from normsearch.dependence import BatchDependence, Crop
from normsearch.errors import (
    MethodError,
    ModelError,
    NormsearchError,
    PlanError,
    RefusedError,
    ShapeError,
    StateError,
)
from normsearch.measurement import compare, profile
from normsearch.methods import METHODS, Method, Refusal, parse_method
from normsearch.plans import Explanation, Plan, explain, plan
from normsearch.reports import Profile, Report
from normsearch.sites import NormSite, find_sites

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BatchDependence",
    "Crop",
    "Explanation",
    "Method",
    "MethodError",
    "ModelError",
    "NormSite",
    "NormsearchError",
    "Plan",
    "PlanError",
    "Profile",
    "Refusal",
    "RefusedError",
    "Report",
    "ShapeError",
    "StateError",
    "compare",
    "convert",
    "convert_state_dict",
    "explain",
    "find_sites",
    "parse_method",
    "plan",
    "profile",
]
