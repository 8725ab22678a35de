"""Providers: networks by name that the core learns of only when their module registers them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import ModelError, RecipeError
from surgeon.models.identify import identify
from surgeon.models.names import build_model
from surgeon.models.specs import model_names
from surgeon.records import providers
from surgeon.records.recipe import Recipe, Rule


class Tiny(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(3, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Mine(providers.Provider):
    def names(self) -> list[str]:
        return ["tiny_of_mine"]

    def create(self, name: str, **options: Any) -> nn.Module:
        return Tiny(**options)

    def input_size(self, name: str) -> tuple[int, ...]:
        return (3, 8, 8)

    def rules(self, name: str) -> tuple[Rule, ...]:
        if name != "tiny_of_mine":
            raise RecipeError(f"no rules for {name}")
        return (Rule(layers="all", type="acda", options={"atoms": 2}),)

    def adapt(self, state: dict[str, torch.Tensor], name: str, model: nn.Module) -> dict[str, torch.Tensor]:
        return {key.removeprefix("old."): value for key, value in state.items()}

    def made_in(self, module: str) -> list[str]:
        return self.names() if module == Tiny.__module__ else []


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    assert set(providers.providers()) == {"zoo"}
    providers.register("mine", Mine())
    yield
    del providers._PROVIDERS["mine"]


def test_names_recipes_and_folders_take_a_further_provider(tmp_path: Any) -> None:
    assert model_names("*_of_mine") == ["mine/tiny_of_mine"]
    weights = tmp_path / "weights.pt"
    torch.save({f"old.{key}": value for key, value in Tiny().state_dict().items()}, weights)
    model, base = build_model("mine/tiny_of_mine", weights=str(weights))
    assert base is not None
    assert (base.source, base.input_size) == ("mine", (3, 8, 8))
    found = identify(Tiny(width=4))
    assert found is not None
    assert (found.source, found.name) == ("mine", "tiny_of_mine")
    converted, report = surgeon.convert(model, recipe=Recipe.read("mine/tiny_of_mine"), input_size=(3, 8, 8))
    surgeon.save(converted, tmp_path / "run", report=report, base=base)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(surgeon.load(tmp_path / "run")(x), converted.eval()(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        providers.register("mine", Mine())
    with pytest.raises(ModelError, match="the mine publishes none"):
        build_model("mine/tiny_of_mine", weights="pretrained")
    with pytest.raises(RecipeError, match="no rules for huge"):
        Recipe.read("mine/huge")
