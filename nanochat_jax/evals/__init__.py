"""Evaluations: each takes parameters and data, none loads a model itself."""
