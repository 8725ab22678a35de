"""Zoo networks built by surgery on a plain network: the public `surgeon.convert` with a stored recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from surgeon.layers.acda import ACDAConv2d
from surgeon.records.recipe import Recipe, Rule, as_published, set_recipe
from surgeon.surgery.convert import convert


def operate(
    model: nn.Module,
    rules: Sequence[Rule],
    input_size: Sequence[int],
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Convert `model` in place by the rules, with layers and ACDA initialization as in their papers.

    `layer_options` override the options of every rule ({"norm": "batch"}, {"selection": "argmax"}).

    A network trained from scratch has no function to preserve: ACDA layers truncated to the paper's size
    (`static_atoms` 0) get their own random initialization instead of a few atoms of a random kernel. The layers' random
    numbers come from torch's generator.
    """
    seed = int(torch.randint(2**31, ()).item()) if not _on_meta(model) else 0
    published = [as_published(rule) for rule in rules]
    made = tuple(replace(rule, options={**rule.options, **(layer_options or {})}) for rule in published)
    recipe = Recipe(rules=made, seed=seed)
    converted, _ = convert(model, recipe=recipe, input_size=tuple(input_size), inplace=True, check=False)
    for layer in converted.modules():
        if isinstance(layer, ACDAConv2d) and layer.config.static_atoms == 0:
            layer.load_state_dict(ACDAConv2d(layer.geometry, layer.config).state_dict())
    set_recipe(converted, None)
    return converted


def _on_meta(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return first is not None and first.is_meta
