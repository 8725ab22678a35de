"""BatchNorm folding: a dynamic layer that computes in eval mode what the layer and the norm after it compute."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from surgeon.errors import ConfigError
from surgeon.layers.base import DynamicConv2d


def fold_batchnorm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """A copy of a dynamic layer or a convolution with `norm` folded into it, adaptive or not.

    Like `torch.nn.utils.fusion.fuse_conv_bn_eval`, which supports convolutions only. Both modules must be in eval mode.
    The learned dynamics stay. The layer gets a bias if it had none: its state dict then fits only a layer that was folded, too.
    Raises `ConfigError` if the norm is not a BatchNorm with running statistics, and `UnsupportedLayerError` if the layer's
    parameters cannot absorb it: a `SEKGConv2d` whose channels share generated kernels.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ConfigError(f"only a BatchNorm with running statistics can be folded, got {type(norm).__name__}")
    if conv.training or norm.training:
        raise ConfigError("fold a norm in eval mode: in training mode it uses the statistics of the batch")
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
