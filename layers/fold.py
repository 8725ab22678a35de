"""BatchNorm folding: a dynamic layer that computes what it and the norm behind it compute in eval mode."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from surgeon.errors import ConfigError
from surgeon.layers.base import DynamicConv2d


def fold_batchnorm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """A copy of a dynamic layer, or of a convolution, that computes what `norm` makes of its output, adaptive or not.

    It stands for `torch.nn.utils.fusion.fuse_conv_bn_eval`, which fits convolutions only. Both modules must be in eval mode. What
    was learned to vary stays. The layer gets a bias where it had none: its state dict then fits no layer that was not folded.
    Raises `ConfigError` for a norm that is no BatchNorm with running statistics, and `UnsupportedLayerError` where the layer's
    parameters cannot take it: a `SEKGConv2d` whose channels share generated kernels.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ConfigError(f"only a BatchNorm with running statistics can be folded, got {type(norm).__name__}")
    if conv.training or norm.training:
        raise ConfigError("fold a norm in eval mode: in training it computes with the statistics of the batch")
    if not isinstance(conv, DynamicConv2d):
        assert isinstance(conv, nn.Conv2d)
        return fuse_conv_bn_eval(conv, norm)
    layer = copy.deepcopy(conv)
    layer.scale_output(*_scale_and_shift(norm, norm.running_mean, norm.running_var))
    layer.geometry = replace(layer.geometry, bias=layer.bias is not None)
    return layer


@torch.no_grad()
def _scale_and_shift(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(mean.dtype, torch.float32)
    scale = (variance.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    shift = -mean.to(wide) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(wide)
