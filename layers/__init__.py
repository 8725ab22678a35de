"""The dynamic layers. Importing this registers every layer type."""

if __name__ != "surgeon.layers":
    raise ImportError("this folder is a part of surgeon: import surgeon.layers, not layers")

from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.pafu import PAFUConfig, PAFUConv2d
from surgeon.layers.registry import layer_class, layer_types, register
from surgeon.layers.regularizer import regularization
from surgeon.layers.source import ConvSource

__all__ = [
    "ConvGeometry",
    "ConvSource",
    "DynamicConv2d",
    "LayerConfig",
    "PAFUConfig",
    "PAFUConv2d",
    "layer_class",
    "layer_types",
    "register",
    "regularization",
]
