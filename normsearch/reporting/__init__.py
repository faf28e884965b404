"""Reports: what a conversion changed, as JSON and as one HTML file that needs nothing else."""

from normsearch.reporting.documents import Document
from normsearch.reporting.measuring import document

__all__ = ["Document", "document"]
