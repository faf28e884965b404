"""Reports: what a conversion changed, as JSON and as one HTML file that needs nothing else."""

from normsearch.reporting.documents import Document
from normsearch.reporting.measuring import document
from normsearch.reporting.sections import (
    CalibrationPart,
    Cost,
    Dependence,
    Gates,
    HeatMap,
    Layers,
    Metric,
    Notes,
    Summary,
)

__all__ = [
    "CalibrationPart",
    "Cost",
    "Dependence",
    "Document",
    "Gates",
    "HeatMap",
    "Layers",
    "Metric",
    "Notes",
    "Summary",
    "document",
]
