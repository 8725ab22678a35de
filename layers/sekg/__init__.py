"""SEKG: the layer, DConv with its operator, and ADFNet's blocks."""

from surgeon.layers.sekg.layer import SEKGConfig, SEKGConv2d

__all__ = ["SEKGConfig", "SEKGConv2d"]
