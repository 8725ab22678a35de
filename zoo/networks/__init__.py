"""One file per network; importing them registers their names."""

from surgeon.zoo.networks import (
    ad_resnet,
    adfnet,
    carn,
    crowd,
    demosaicnet,
    dncnn,
    lenet,
    mcnn,
    pspnet,
    rdn,
    resdnet,
    resnet_cifar,
    resnet_pafu,
    restorer,
    superres,
    vdn,
)

__all__ = [
    "ad_resnet",
    "adfnet",
    "carn",
    "crowd",
    "demosaicnet",
    "dncnn",
    "lenet",
    "mcnn",
    "pspnet",
    "rdn",
    "resdnet",
    "resnet_cifar",
    "resnet_pafu",
    "restorer",
    "superres",
    "vdn",
]
