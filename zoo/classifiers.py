"""Classifiers of the zoo, also registered with timm: `timm.create_model("ad_resnet_s")` after `import surgeon.zoo`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgeon.errors import ConfigError
from surgeon.records.recipe import Rule
from surgeon.zoo.registry import Size, register
from surgeon.zoo.surgery import operate

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

default_cfgs: dict[str, dict[str, Any]] = {}  # timm's register_model reads it


def classifier(
    name: str,
    build: Callable[..., nn.Module],
    doc: str,
    *,
    input_size: Size = (3, 224, 224),
    num_classes: int = 1000,
    head: str = "fc",
    stages: Sequence[int] = (0, 1, 2, 3, 4),
    rules: Sequence[Rule] = (),
    **about: Any,
) -> None:
    """Register a classifier with the zoo and with timm.

    `build` makes the plain network from timm's keyword options; `rules` say how surgery changes it. `head` is the name of the
    last linear layer, `stages` are the feature maps of `features_only`. `about` holds fields of the zoo's `Entry`.
    """

    def plain_or_operated(layer_options: Mapping[str, Any] | None = None, **options: Any) -> nn.Module:
        model = build(**options)
        size = (options.get("in_chans", input_size[0]), *input_size[1:])
        return operate(model, rules, size, layer_options) if rules else model

    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        features = {"out_indices": tuple(stages)}
        model: nn.Module = build_model_with_cfg(plain_or_operated, name, pretrained, feature_cfg=features, **options)
        return model

    small = input_size[1] < 64
    default_cfgs[name] = {
        "url": "",
        "num_classes": num_classes,
        "input_size": input_size,
        "pool_size": None,
        "crop_pct": 1.0 if small else 0.875,
        "interpolation": "bilinear",
        "mean": CIFAR_MEAN if small else IMAGENET_MEAN,
        "std": CIFAR_STD if small else IMAGENET_STD,
        "first_conv": "conv1",
        "classifier": head,
    }
    make.__name__ = make.__qualname__ = name
    make.__doc__ = doc
    register(name, input_size=input_size, rules=tuple(rules), **about)(make)
    register_model(make)


class SmallClassifier(nn.Module):
    """timm's classifier interface for networks that consist of children in sequence, average pooling and one linear layer.

    A subclass creates its children in execution order, lists them in `body`, lists those that may be
    checkpointed in `stages`, describes its maps in `feature_info`, and calls `set_head`.
    """

    body: tuple[str, ...]
    stages: tuple[str, ...]
    head_name: str
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]

    def __init__(self, drop_rate: float = 0.0, global_pool: str = "avg") -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.global_pool = global_pool

    def set_head(self, features: int, num_classes: int) -> None:
        """Create the linear layer; none if `num_classes` is 0. Without pooling there can be none."""
        if self.global_pool not in ("", "avg") or (num_classes and not self.global_pool):
            raise ConfigError(
                f"{type(self).__name__} pools by 'avg', or not at all ('') without a classifier; got "
                f"global_pool={self.global_pool!r} with {num_classes} classes"
            )
        self.num_features = self.head_hidden_size = features
        self.num_classes = num_classes
        self.add_module(self.head_name, nn.Linear(features, num_classes) if num_classes > 0 else nn.Identity())

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The linear layer, or its name."""
        return self.head_name if name_only else self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer; `global_pool` is "avg" or "" (none: return unpooled features)."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = next(self.parameters())
        self.set_head(self.num_features, num_classes)
        self.get_submodule(self.head_name).to(like.device, like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for layer-wise learning rates."""
        stem = "|".join(name for name in self.body if name not in self.stages)
        blocks = "|".join(self.stages)
        return {"stem": rf"^({stem})\.", "blocks": rf"^({blocks})" + ("" if coarse else r"\.(\d+)")}

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F, H', W')."""
        for name in self.body:
            child = self.get_submodule(name)
            if self.grad_checkpointing and name in self.stages and torch.is_grad_enabled():
                x = checkpoint(child, x, use_reentrant=False)
            else:
                x = child(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, F, H', W') -> (N, classes), or (N, F) with `pre_logits`."""
        if self.global_pool:
            x = self.pool(x)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_submodule(self.head_name)(x)

    def pool(self, x: Tensor) -> Tensor:
        """The average of each map."""
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        return self.forward_head(self.forward_features(x))
