"""Search: which plan to try next. The only place that imports optuna."""

from normsearch.searching.leases import LeaseTerms
from normsearch.searching.sampler import NormSampler
from normsearch.searching.storage import check_shared, open_storage
from normsearch.searching.trials import counted_trials, run_trials

__all__ = ["LeaseTerms", "NormSampler", "check_shared", "counted_trials", "open_storage", "run_trials"]
