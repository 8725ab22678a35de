"""Layers that do not vary, back to convolutions."""
