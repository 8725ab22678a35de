"""The dynamic layers. Importing this registers every layer type."""

if __name__ != "surgeon.layers":
    raise ImportError("this folder is a part of surgeon: import surgeon.layers, not layers")

from surgeon.layers.acda import ACDAConfig, ACDAConv2d
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.layers.fold import fold_batchnorm
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.pafu import PAFUConfig, PAFUConv2d
from surgeon.layers.registry import layer_class, layer_types, register
from surgeon.layers.regularizer import regularization
from surgeon.layers.sekg import SEKGConfig, SEKGConv2d
from surgeon.layers.sekg.dconv import SEKG, DConv2d
from surgeon.layers.source import ConvSource

__all__ = [
    "SEKG",
    "ACDAConfig",
    "ACDAConv2d",
    "ConvGeometry",
    "ConvSource",
    "DConv2d",
    "DynamicConv2d",
    "LayerConfig",
    "PAFUConfig",
    "PAFUConv2d",
    "SEKGConfig",
    "SEKGConv2d",
    "fold_batchnorm",
    "layer_class",
    "layer_types",
    "register",
    "regularization",
]
