"""Layer types by name."""

import pytest

import surgeon.layers
from surgeon.errors import ConfigError
from surgeon.layers import DynamicConv2d, layer_class, layer_types, register


def test_every_type_is_found_by_its_name() -> None:
    assert "pafu" in layer_types()
    assert layer_types() == sorted(layer_types())
    for name in layer_types():
        cls = layer_class(name)
        assert issubclass(cls, DynamicConv2d)
        assert cls.type_name == name
        assert cls.Config() == cls.Config.from_dict(cls.Config().to_dict())


def test_an_unknown_type_names_the_known_and_the_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown layer type 'paffu'; there are .*pafu.*Did you mean 'pafu'\?"):
        layer_class("paffu")
    with pytest.raises(ConfigError, match=r"unknown layer type 'xyz'; there are [^.]*\.$"):
        layer_class("xyz")


def test_a_name_is_taken_only_once() -> None:
    with pytest.raises(ValueError, match="'pafu' is registered twice, by PAFUConv2d and Other"):

        @register
        class Other(DynamicConv2d):
            type_name = "pafu"


def test_the_public_names_are_there_once() -> None:
    names = surgeon.layers.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(surgeon.layers, name) for name in names)
    configs = {cls.Config.__name__ for cls in map(layer_class, layer_types())}
    layers = {layer_class(name).__name__ for name in layer_types()}
    assert configs | layers <= set(names)
