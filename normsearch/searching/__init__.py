"""Search: which plan to try next. The only place that imports optuna."""

from normsearch.searching.sampler import NormSampler

__all__ = ["NormSampler"]
