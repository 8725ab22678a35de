"""Rules become a plan: the later rule wins, refusals have reasons."""

import pytest
from torch import nn

from surgeon.errors import ConfigError, SelectionError
from surgeon.layers.registry import layer_class, layer_types
from surgeon.records.recipe import Rule
from surgeon.sites.sites import ConvSite, find_sites
from surgeon.surgery.plan import can_become, make_plan, nothing_replaced, why_not
from tests.support.fake_layer import FakeConfig, FakeConv2d

pytestmark = pytest.mark.usefixtures("fake_type")


@pytest.fixture(scope="module")
def sites() -> tuple[ConvSite, ...]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, padding=3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)
    )
    return find_sites(model, input_size=32).convs


def test_the_later_rule_wins(sites: tuple[ConvSite, ...]) -> None:
    rules = [
        Rule(layers="all,k=3", type="fake", options={"hidden": 2}),
        Rule(layers="1", type="pafu", options={"group_size": 3}),
    ]
    plans = make_plan(sites, rules)
    assert [(p.site.name, p.layer.type_name) for p in plans] == [("1", "pafu"), ("2", "fake"), ("3", "fake")]
    assert plans[1].config == FakeConfig(hidden=2)
    assert plans[2].reasons == ("it is a ConvTranspose2d: only 2-D convolutions are replaced",)


def test_reasons_come_from_the_site_and_from_the_layer(sites: tuple[ConvSite, ...]) -> None:
    assert why_not(sites[0], FakeConv2d) == ["the fake layer wants no 7x7 kernels"]
    assert why_not(sites[1], FakeConv2d) == []
    assert can_become(sites[1])["fake"] == []
    assert all(reasons for reasons in can_become(sites[3]).values())
    assert set(can_become(sites[1])) == set(layer_types())


def test_wrong_rules_are_errors(sites: tuple[ConvSite, ...]) -> None:
    with pytest.raises(ConfigError, match="unknown layer type 'fkae'"):
        make_plan(sites, [Rule(layers="all", type="fkae")])
    with pytest.raises(ConfigError, match="has no option 'hiden'"):
        make_plan(sites, [Rule(layers="all", type="fake", options={"hiden": 3})])
    with pytest.raises(ConfigError, match="hidden must be an integer >= 1, got 0"):
        make_plan(sites, [Rule(layers="all", type="fake", options={"hidden": 0})])
    with pytest.raises(SelectionError):
        make_plan(sites, [Rule(layers="nowhere", type="fake")])


def test_a_refusal_of_everything_lists_the_reasons(sites: tuple[ConvSite, ...]) -> None:
    error = nothing_replaced([(site, ["because"]) for site in sites] + [(sites[0], ["another"])])
    assert "each of the 5 selected convolutions was refused. 0, 1, 2 and 1 more: because; 0: another" in str(error)
    assert error.exit_code == 1


def test_compressing_options_are_known(sites: tuple[ConvSite, ...]) -> None:
    geometry = sites[1].geometry
    assert geometry is not None
    acda = layer_class("acda").Config
    assert not acda().may_compress(geometry)
    assert acda.from_dict({"static_atoms": 0}).may_compress(geometry)
    assert not acda.from_dict({"static_atoms": 3}).may_compress(geometry)  # 6 + 3 atoms span every 3x3 kernel
