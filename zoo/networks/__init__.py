"""One file a network; importing them registers their names."""

from surgeon.zoo.networks import carn, demosaicnet, dncnn, mcnn, resnet_cifar

__all__ = ["carn", "demosaicnet", "dncnn", "mcnn", "resnet_cifar"]
