"""Search: which normalization each layer should have. The only place that imports optuna."""

from normsearch.searching.sampler import NormSampler

__all__ = ["NormSampler"]
