"""Search: which normalization should each site have? The only place that imports optuna."""

from normsearch.searching.constraints import BatchIndependent, Constraint, MaxDrop, MaxLatency, MaxMemory
from normsearch.searching.costs import CostTable, measure_costs
from normsearch.searching.documents import search_report
from normsearch.searching.leases import LeaseTerms
from normsearch.searching.objectives import Objective
from normsearch.searching.resident import Resident
from normsearch.searching.results import SearchResult
from normsearch.searching.sampler import NormSampler
from normsearch.searching.searches import search
from normsearch.searching.space import SearchSpace
from normsearch.searching.stepwise import Search
from normsearch.searching.storage import check_shared, open_storage
from normsearch.searching.supernet import sense
from normsearch.searching.tasks import Recipe, Task, accuracy
from normsearch.searching.trials import counted_trials, run_trials
from normsearch.searching.workers import join

__all__ = [
    "BatchIndependent",
    "Constraint",
    "CostTable",
    "LeaseTerms",
    "MaxDrop",
    "MaxLatency",
    "MaxMemory",
    "NormSampler",
    "Objective",
    "Recipe",
    "Resident",
    "Search",
    "SearchResult",
    "SearchSpace",
    "Task",
    "accuracy",
    "check_shared",
    "counted_trials",
    "join",
    "measure_costs",
    "open_storage",
    "run_trials",
    "search",
    "search_report",
    "sense",
]
