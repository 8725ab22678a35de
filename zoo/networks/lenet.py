"""LeNet for CIFAR images, plain and with ACDA: Wang et al., "Adaptive Convolutions with Per-pixel Dynamic Filter Atom", Table 1.

Two 5×5 convolutions with 6 and 16 channels without padding, each with ReLU and 2×2 max pooling, then linear layers of 120 and
84 units (LeCun et al. 1998). "Only replacing the two convolutional layers", ACDA has m = 6 atoms over two scales, 3×3 and 5×5:
a third, 7×7, would not fit into the unpadded window.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.records.recipe import Rule
from surgeon.zoo.classifiers import SmallClassifier, classifier

ACDA = {"atoms": 6, "scales": 2, "basis_size": 6, "hidden": 64, "static_atoms": 0, "extra_elements": 0}


class LeNet(SmallClassifier):
    """(N, 3, 32, 32) -> (N, classes) logits. Other sizes do not fit the first linear layer."""

    body = ("conv1", "act1", "pool1", "conv2", "act2", "pool2")
    stages = ()
    head_name = "fc3"

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg"
    ) -> None:
        super().__init__(drop_rate, global_pool)
        self.conv1 = nn.Conv2d(in_chans, 6, 5)
        self.act1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.act2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.feature_info = [
            {"num_chs": 6, "reduction": 2, "module": "pool1"},
            {"num_chs": 16, "reduction": 4, "module": "pool2"},
        ]
        self.set_head(84, num_classes)

    def set_head(self, features: int, num_classes: int) -> None:
        """The last linear layer has 84 inputs for any number of feature channels."""
        super().set_head(84, num_classes)
        self.num_features = 16

    def pool(self, x: Tensor) -> Tensor:
        """Flatten, then the two hidden linear layers: (N, 84)."""
        torch._assert(x[0, 0].numel() == 25, "LeNet takes images of 32×32 pixels")
        return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))


_ABOUT: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "head": "fc3",
    "stages": (0, 1),
    "source": __doc__,
}

classifier("lenet", LeNet, "LeNet for CIFAR: two 5×5 convolutions, three linear layers, 62 k parameters.", **_ABOUT)
classifier(
    "lenet_acda",
    LeNet,
    "LeNet with ACDA in both convolutions (ACDA Table 1).",
    plain="lenet",
    rules=(Rule(layers="conv1,conv2", type="acda", options=ACDA),),
    **_ABOUT,
)
