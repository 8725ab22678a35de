"""The selector language, on made-up convolutions."""

import pytest

from surgeon.errors import SelectionError
from surgeon.sites.select import select, split_items
from surgeon.sites.sites import ConvSite


def site(name: str, stage: str | None, k: int = 3, c_in: int = 16, c_out: int = 16, **more: object) -> ConvSite:
    values: dict[str, object] = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "first_of_stage": False}
    return ConvSite(
        name=name,
        module="Conv2d",
        geometry=None,
        in_channels=c_in,
        out_channels=c_out,
        kernel_size=(k, k),
        params=0,
        stage=stage,
        **(values | more),
    )


SITES = [
    site("conv1", "stem", k=7, c_in=3),
    site("layer1.0.conv1", "stage1", first_of_stage=True),
    site("layer1.0.down", "stage1", k=1),
    site("layer2.0.conv1", "stage2", stride=(2, 2), first_of_stage=True, c_out=32),
    site("layer2.0.conv_dw", "stage2", k=5, c_in=32, c_out=32, groups=32),
    site("layer2.1.pw", "stage2", k=1, c_in=32, c_out=64),
    site("layer20.conv", None, aliases=("twin.conv",), c_in=64, c_out=64, dilation=(2, 2), groups=4, last_spatial=True),
]


def names(layers: str | list[str]) -> list[str]:
    return [s.name for s in select(SITES, layers)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("conv1", ["conv1"]),
        ("layer2", ["layer2.0.conv1", "layer2.0.conv_dw"]),  # neither layer20 nor the 1x1
        ("layer2.1.pw", ["layer2.1.pw"]),  # a 1x1 by its full name
        ("stem,stage1", ["conv1", "layer1.0.conv1"]),
        (["stage2", "stem"], ["conv1", "layer2.0.conv1", "layer2.0.conv_dw"]),  # in module order
        ("*.conv1", ["layer1.0.conv1", "layer2.0.conv1"]),
        ("layer?", ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv_dw"]),
        ("re:conv1$", ["conv1", "layer1.0.conv1", "layer2.0.conv1"]),
        (r"re:^layer\d{1,1}\.", ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv_dw"]),
        ("all,k=1", ["layer1.0.down", "layer2.1.pw"]),
        ("stage2,k<=3", ["layer2.0.conv1", "layer2.1.pw"]),
        ("k>=5", ["conv1", "layer2.0.conv_dw"]),
        ("k>3,k<7", ["layer2.0.conv_dw"]),
        ("k!=3", ["conv1", "layer1.0.down", "layer2.0.conv_dw", "layer2.1.pw"]),
        ("depthwise", ["layer2.0.conv_dw"]),
        ("dense,in>=16", ["layer1.0.conv1", "layer2.0.conv1"]),
        ("stride=2", ["layer2.0.conv1"]),
        ("dilation=2,groups=4", ["layer20.conv"]),
        ("out == 32", ["layer2.0.conv1", "layer2.0.conv_dw"]),
        ("first-of-stage", ["layer1.0.conv1", "layer2.0.conv1"]),
        ("last-spatial", ["layer20.conv"]),
        ("all,!stem,!depthwise", ["layer1.0.conv1", "layer2.0.conv1", "layer20.conv"]),
        ("!layer1,!re:dw", ["conv1", "layer2.0.conv1", "layer20.conv"]),
        ("all,!k=7", ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv_dw", "layer20.conv"]),
        ("twin", ["layer20.conv"]),  # an alias
    ],
)
def test_selections(layers: str | list[str], expected: list[str]) -> None:
    assert names(layers) == expected


def test_a_module_called_like_a_keyword_is_found_by_its_name() -> None:
    sites = [site("stem", "stage1"), site("dense.conv", "stage1"), site("other", "stem")]
    assert [s.name for s in select(sites, "stem")] == ["stem"]
    assert [s.name for s in select(sites, "dense")] == ["dense.conv"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layr2", r"'layr2' matches no convolution; the closest names are .*'layer2'"),
        ("stage7", r"the model's stages are stage1, stage2, stem"),
        (
            "layer3",
            r"closest names are .*'layer1'.*; the model's stages are stage1, stage2, stem\. surgeon inspect lists",
        ),
        ("nothing-like-it", r"'nothing-like-it' matches no convolution; the model's stages are stage1, stage2, stem\."),
        ("stage2,layr2", "'layr2' matches no convolution"),
        ("last", "'last' matches no convolution; the closest names are 'last-spatial'"),
        ("all,!layr2", "'layr2' matches no convolution"),
        ("stage1,k=5", r"'stage1' matches 2 convolutions, 'k=5' removes 2"),
        ("stage1,!layer1", r"'stage1' matches 2 convolutions, '!layer1' removes 2"),
        ("layer2.1", r"the rule on 1×1 convolutions .* removes 1: layer2\.1\.\w+"),
        ("", "empty item"),
        ("stem,,stage1", "empty item"),
        ("!", "`!` must be followed"),
        ("k=three", "must compare with a whole number, got 'three'"),
        ("width>=3", "unknown filter 'width>=3'; comparable values are k, in, out"),
        ("re:[", "is not a regular expression"),
    ],
)
def test_a_bad_selection_says_what_is_wrong(layers: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(SITES, layers)


def test_a_model_without_convolutions_is_told() -> None:
    with pytest.raises(SelectionError, match="the model has no convolution"):
        select([], "stage1")


def test_what_is_no_string_is_an_error() -> None:
    with pytest.raises(SelectionError, match="got 3"):
        split_items(["stem", 3])


def test_commas_in_brackets_do_not_separate() -> None:
    assert split_items("re:a{1,2}, b") == ["re:a{1,2}", "b"]
