"""Zoo networks built by surgery on a plain network: the public `surgeon.convert` with a stored recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from surgeon.layers.base import DynamicConv2d
from surgeon.records.recipe import Recipe, Rule, as_published, set_recipe
from surgeon.surgery.convert import convert


def operate(
    model: nn.Module,
    rules: Sequence[Rule],
    input_size: Sequence[int],
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Convert `model` in place by the rules, with layers as their papers have them, and start those from scratch that cannot hold
    the kernel.

    `layer_options` override the options of every rule ({"norm": "batch"}, {"selection": "argmax"}).

    A network that is trained from scratch has no function to preserve: layers that are cut to the paper's size (ACDA with
    `static_atoms` 0) begin at their own random start instead of a few atoms of a random kernel. The layers' random numbers
    follow from torch's generator.
    """
    seed = int(torch.randint(2**31, ()).item()) if not _on_meta(model) else 0
    published = [as_published(rule) for rule in rules]
    made = tuple(replace(rule, options={**rule.options, **(layer_options or {})}) for rule in published)
    recipe = Recipe(rules=made, seed=seed)
    converted, _ = convert(model, recipe=recipe, input_size=tuple(input_size), inplace=True, check=False)
    for layer in converted.modules():
        if isinstance(layer, DynamicConv2d):
            layer.start_untrained()
    set_recipe(converted, None)
    return converted


def _on_meta(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return first is not None and first.is_meta
