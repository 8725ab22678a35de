"""How the inputs of a fine-tuned model are made of images: what its recipe records, for timm and for other programs."""

import json
from typing import TYPE_CHECKING, Any

from surgeon.records.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


def recorded_inputs(recipe: Recipe | None) -> dict[str, Any]:
    """`input_size`, `mean`, `std` and the like by timm's names, as far as the recipe's task records them."""
    task = None if recipe is None else recipe.task
    return {} if task is None else task.inputs


def tell_timm(model: "nn.Module", inputs: dict[str, Any]) -> None:
    """Put the inputs into the model's `pretrained_cfg`, from which `timm.data.resolve_model_data_config` reads; if it has one.

    The channels stay timm's: they tell which architecture it is.
    """
    old = getattr(model, "pretrained_cfg", None)
    if not inputs or not isinstance(old, dict):
        return
    new = {key: value for key, value in old.items() if key not in ("test_input_size", "test_crop_pct")} | inputs
    if "input_size" in inputs:
        new["input_size"] = (*tuple(old.get("input_size", inputs["input_size"]))[:1], *inputs["input_size"][1:])
    settings: Any = model
    settings.pretrained_cfg = new
    if getattr(model, "default_cfg", None) is old:
        settings.default_cfg = new


def metadata(recipe: Recipe | None) -> dict[str, str]:
    """The inputs and the names of the classes as text, numbers and lists in JSON, for the metadata of a file."""
    classes = {} if recipe is None or recipe.classes is None else {"classes": recipe.classes}
    values = recorded_inputs(recipe) | classes
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in values.items()
    }
