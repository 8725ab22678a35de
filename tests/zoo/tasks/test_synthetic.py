"""SAD and pattern detection: the papers' images, and the solutions that they are made for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgeon.errors import ConfigError, InputError
from surgeon.zoo.tasks import create_task
from surgeon.zoo.tasks.pattern_detection import pattern
from surgeon.zoo.tasks.sad import sad_image

# --- SAD --------------------------------------------------------------------------------------------------------------


def test_black_pixels_are_dilated_and_all_others_kept() -> None:
    x, y = sad_image(0.3, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (3, 89, 89)
    black = (x == 0).all(0)
    squares = (y == 0).all(0)
    assert ((x == 0).any(0) == black).all()
    assert x[:, ~black].min() > 0
    assert x.max() <= 1
    grown = F.max_pool2d(black[None].float(), 5, stride=1, padding=2)[0] > 0
    assert torch.equal(squares, grown)
    assert torch.equal(x[:, ~squares], y[:, ~squares])
    assert squares.sum() == 25 * black.sum()  # no overlap, none cut
    rows, columns = black.nonzero().T
    assert rows.min() >= 3
    assert columns.max() <= 83
    assert ((rows - 3) % 5 == 0).all()
    assert black.sum().item() == pytest.approx(0.3 * 17 * 17, rel=0.25)
    assert x[:, ~black].mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_dirac_and_a_zero_filter_solve_it() -> None:
    x, y = sad_image(0.2, torch.Generator().manual_seed(1))
    near_black = F.max_pool2d((x == 0).all(0)[None].float(), 5, stride=1, padding=2)
    assert torch.equal(torch.where(near_black > 0, torch.zeros_like(x), x), y)


def test_training_and_validation_images_differ() -> None:
    task = create_task("sad", seed=0, images=3, val_images=3)
    assert (len(task.dataset("train")), len(task.dataset("val"))) == (3, 3)
    images = [task.dataset(split)[index]["input"] for split in ("train", "val") for index in range(3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


# --- pattern detection ------------------------------------------------------------------------------------------------


def test_twenty_five_patterns_at_three_scales() -> None:
    task = create_task("pattern-detection", noise=0.0)
    sample = task.dataset("train")[0]
    x, y = sample["input"][0], sample["target"][0]
    assert x.shape == (100, 100)
    assert y.sum() == 25
    assert set(y.unique().tolist()) == {0, 1}
    found = {3: 0, 5: 0, 7: 0}
    rebuilt = torch.zeros_like(x)
    for row, column in y.nonzero().tolist():
        for side in (7, 5, 3):
            r = side // 2
            window = x[row - r - 1 : row + r + 2, column - r - 1 : column + r + 2]  # with the free pixel around
            if window.shape == (side + 2, side + 2) and torch.equal(window, F.pad(pattern(side), (1, 1, 1, 1))):
                found[side] += 1
                rebuilt[row - r : row + r + 1, column - r : column + r + 1] += pattern(side)
                break
            clipped = x[max(row - r, 0) : row + r + 1, max(column - r, 0) : column + r + 1]
            if torch.equal(clipped, pattern(side)) and min(row, column) == r:  # at the border
                found[side] += 1
                rebuilt[row - r : row + r + 1, column - r : column + r + 1] += pattern(side)
                break
    assert found == {3: 9, 5: 8, 7: 8}
    assert torch.equal(rebuilt, x)


def test_validation_is_the_training_image_moved() -> None:
    task = create_task("pattern-detection", seed=2)
    still, moved = task.dataset("train")[0], task.dataset("val")[0]
    for key in ("input", "target"):
        assert torch.equal(moved[key][:, 20:, 20:], still[key][:, :80, :80])
    assert moved["target"].sum() == 25
    border = torch.cat([moved["input"][0, :20].flatten(), moved["input"][0, 20:, :20].flatten()])
    assert border.std().item() == pytest.approx(0.1, rel=0.05)
    assert len(task.dataset("train")) == 100
    assert torch.equal(task.dataset("train")[57]["input"], still["input"])  # the paper has a single one


def test_a_convolution_is_shift_equivariant_on_it() -> None:
    task = create_task("pattern-detection")
    model = nn.Conv2d(1, 1, 7, padding=3)
    task.bind(model)
    with torch.no_grad():
        a, b = (model(task.dataset(split)[0]["input"][None]) for split in ("train", "val"))
    assert torch.equal(b[..., 23:97, 23:97], a[..., 3:77, 3:77])  # where neither sees the padding


def test_metrics_by_hand() -> None:
    task = create_task("pattern-detection")
    target = torch.zeros(1, 1, 10, 10)
    target[..., 0, :4] = 1
    output = torch.zeros_like(target)
    output[..., 0, :3] = 2
    output[..., 5, :2] = 0.6
    metrics = task.metrics()
    task.update(metrics, output, {"target": target})
    assert metrics["mse"].compute().item() == pytest.approx((3 * 1 + 1 + 2 * 0.36) / 100)
    assert metrics["f1"].compute().item() == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert task.loss(output, {"target": target}).item() == pytest.approx(metrics["mse"].compute().item())


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("sad", {"share": 2}),
        ("sad", {"images": 0}),
        ("sad", {"data": "x"}),
        ("pattern-detection", {"shift": 90}),
        ("pattern-detection", {"noise": -1}),
        ("pattern-detection", {"data": "x"}),
        ("pattern-detection", {"repeats": 0}),
    ],
)
def test_wrong_options(task: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        create_task(task, **options)


@pytest.mark.parametrize("task", ["sad", "pattern-detection"])
def test_models_must_keep_the_shape(task: str) -> None:
    channels = 3 if task == "sad" else 1
    create_task(task).bind(nn.Conv2d(channels, channels, 3, padding=1))
    with pytest.raises(InputError, match="keep the shape"):
        create_task(task).bind(nn.Conv2d(channels, channels, 3))
