"""Fold dynamic layers that do not vary back into convolutions."""
