"""Storms: server, workers, children and PostgreSQL are killed at random; no job is lost, stuck or doubled."""
