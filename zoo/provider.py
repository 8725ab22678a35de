"""The zoo as a provider of models for the core."""

from typing import Any

from torch import Tensor, nn

from surgeon.errors import RecipeError
from surgeon.records.providers import Provider
from surgeon.records.recipe import Rule
from surgeon.zoo.foreign import adapt
from surgeon.zoo.registry import create, entry, names, options_of


class ZooProvider(Provider):
    """The registered networks; importing `surgeon.zoo` registers those of `zoo.networks`."""

    def names(self) -> list[str]:
        return names()

    def create(self, name: str, **options: Any) -> nn.Module:
        return create(name, **options)

    def input_size(self, name: str) -> tuple[int, ...]:
        return tuple(entry(name).input_size)

    def rules(self, name: str) -> tuple[Rule, ...]:
        found = entry(name)
        if not found.rules:
            why = f": {found.by_hand}" if found.by_hand else ""
            raise RecipeError(f"no recipe makes zoo/{name} from another network{why}")
        return found.rules

    def adapt(self, state: dict[str, Tensor], name: str, model: nn.Module) -> dict[str, Tensor]:
        return adapt(state, entry(name), model)

    def made_in(self, module: str) -> list[str]:
        return [name for name in names() if entry(name).factory.__module__ == module]

    def options(self, name: str, model: nn.Module) -> dict[str, Any]:
        return options_of(model, name)
