"""Measurements of the search: its sampler on known landscapes, and the whole on real tasks."""
