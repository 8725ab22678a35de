"""PAFU: the layer and its operator."""

from surgeon.layers.pafu.layer import PAFUConfig, PAFUConv2d

__all__ = ["PAFUConfig", "PAFUConv2d"]
