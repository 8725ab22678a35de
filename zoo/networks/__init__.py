"""One file a network; importing them registers their names."""

from surgeon.zoo.networks import ad_resnet, adfnet, carn, crowd, demosaicnet, dncnn, lenet, mcnn, resnet_cifar

__all__ = ["ad_resnet", "adfnet", "carn", "crowd", "demosaicnet", "dncnn", "lenet", "mcnn", "resnet_cifar"]
