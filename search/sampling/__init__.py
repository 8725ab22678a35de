"""Decisions as Optuna parameters, and the samplers."""
