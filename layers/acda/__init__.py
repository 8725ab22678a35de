"""ACDA: the layer, its math and its operator."""

from surgeon.layers.acda.layer import ACDAConfig, ACDAConv2d

__all__ = ["ACDAConfig", "ACDAConv2d"]
