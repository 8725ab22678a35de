"""Data as people have them: links, deep colors, odd annotations, other classes, changes between two sittings."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from surgeon.errors import ConfigError, DataError, InputError
from surgeon.util.picture_files import files_below
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.tasks import Task, create_task
from surgeon.zoo.tasks.data.files import check_images, list_images, open_image
from surgeon.zoo.tasks.data.images import in_tiles
from surgeon.zoo.tasks.data.labeled import _folder
from surgeon.zoo.tasks.data.masks import mask_pairs, read_mask
from surgeon.zoo.tasks.data.points import point_files, read_points
from surgeon.zoo.tasks.support.metrics import psnr
from tests.support.training.task_data import picture

# --- what is found --------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of which one half lies elsewhere, and a link back to itself."""
    for index in range(3):
        picture(tmp_path / f"pool/DIV2K/{index}.png", index)
    for index in range(2):
        picture(tmp_path / f"train/own{index}.png", index)
    (tmp_path / "train/DIV2K").symlink_to(tmp_path / "pool/DIV2K")
    (tmp_path / "pool/DIV2K/again").symlink_to(tmp_path / "train")
    return tmp_path / "train"


def test_pictures_behind_a_link_to_a_folder_are_seen_once(linked: Path) -> None:
    """T3: symlinked folders in data; a link into itself ends."""
    assert sorted(path.name for path in list_images(linked)) == ["0.png", "1.png", "2.png", "own0.png", "own1.png"]


def test_classes_masks_and_points_behind_links_are_seen(tmp_path: Path) -> None:
    """T3: the other readers of folders: labeled, mask_pairs, point_files."""
    picture(tmp_path / "pool/a.png")
    picture(tmp_path / "pool_masks/a.png", mode="L")
    np.save(tmp_path / "pool/a.npy", np.ones((2, 2)))
    (tmp_path / "classes/ant").mkdir(parents=True)
    (tmp_path / "classes/ant/more").symlink_to(tmp_path / "pool")
    for name, folder in (("images", "pool"), ("masks", "pool_masks")):
        (tmp_path / "pairs" / name).mkdir(parents=True)
        (tmp_path / "pairs" / name / "set").symlink_to(tmp_path / folder)
    (tmp_path / "crowd").mkdir()
    (tmp_path / "crowd/set").symlink_to(tmp_path / "pool")
    assert len(_folder("classification", tmp_path / "classes", False).items) == 1
    assert len(mask_pairs("segmentation", tmp_path / "pairs")) == 1
    assert len(point_files(tmp_path / "crowd")) == 1


def test_links_that_lead_nowhere_are_named(linked: Path) -> None:
    """T3: dangling links."""
    (linked / "Flickr2K").symlink_to("/nowhere/Flickr2K")
    with pytest.raises(DataError, match=r"broken links \(1\):\n.*train/Flickr2K -> /nowhere/Flickr2K"):
        list_images(linked)


def test_leftovers_are_no_classes_and_no_pictures(tmp_path: Path) -> None:
    """T24: `__MACOSX` counts as a class; `@eaDir` thumbnails taken in."""
    picture(tmp_path / "ant/1.png")
    picture(tmp_path / "__MACOSX/ant/._1.png")
    picture(tmp_path / "ant/@eaDir/1.png/SYNOPHOTO_THUMB.png")
    found = _folder("classification", tmp_path, False)
    assert found.classes == ["ant"]
    assert len(found.items) == 1


def test_jfif_is_read_and_other_pictures_are_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """T24: .gif, .jfif left out silently."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jfif", format="JPEG")
    picture(tmp_path / "b.gif")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in files_below(tmp_path)] == ["a.jfif"]
    assert "skipped 1 picture, because .gif is not supported: save as .png (b.gif)" in caplog.text


def test_skipped_pictures_of_all_classes_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ant", "bee", "cat"):
        picture(tmp_path / name / "1.png")
        picture(tmp_path / name / "2.gif")
        (tmp_path / name / "3.heic").touch()
    (tmp_path / "4.png").touch()
    with caplog.at_level(logging.WARNING):
        assert _folder("classification", tmp_path, False).labels == [0, 1, 2]
    (line,) = caplog.messages
    assert "skipped 6 pictures, because .gif, .heic are not supported: save as .png (ant/2.gif, ant/3.heic, " in line
    assert line.endswith(", cat/2.gif, ...)")


def test_what_is_skipped_in_a_folder_is_not_read_by_name_either(tmp_path: Path) -> None:
    for name in ("a.gif", "a.GIF"):
        with pytest.raises(DataError, match=r"cannot read the image .*: \.(gif|GIF) is not supported .*\.png"):
            open_image(picture(tmp_path / name))


def test_large_pictures_are_let_in_by_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T24: pictures above 179 MP refused as bombs without a way out."""
    file = tmp_path / "large.png"
    Image.new("1", (20_000, 9_000)).save(file)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=r"20000x9000 pixels, more than 178,956,970, .* SURGEON_MAX_PIXELS=180000000"):
        check_images("denoising", [file])
    assert before == Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv("SURGEON_MAX_PIXELS", "180000000")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)
    assert open_image(file).size == (20_000, 9_000)


# --- 16 bits --------------------------------------------------------------------------------------------------------


def _png(color_type: int, channels: int) -> bytes:
    """A dark PNG of 4x4 pixels with 16 bits per channel."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">H", 200) * 4 * channels
    head = struct.pack(">IIBBBBB", 4, 4, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits_is_refused_not_cut(tmp_path: Path, color_type: int, channels: int) -> None:
    """T4: RGB(A) and LA PNG."""
    file = tmp_path / "deep.png"
    file.write_bytes(_png(color_type, channels))
    for call in (open_image, lambda path: check_images("denoising", [path])):
        with pytest.raises(DataError, match=r"deep.png has 16 bits per channel, which would be cut to 8"):
            call(file)


def test_tiff_and_ppm_of_16_bits_are_refused(tmp_path: Path) -> None:
    """T4: RGB TIFF; PPM is scaled down in the same way."""
    import struct

    tags = [(256, 3, 4), (257, 3, 4), (258, 3, 16), (259, 3, 1), (262, 3, 2), (273, 4, 8), (277, 3, 3), (278, 3, 4)]
    tags += [(279, 4, 96), (284, 3, 1)]
    content = struct.pack("<2sHI", b"II", 42, 8 + 96) + struct.pack("<H", 200) * 48 + struct.pack("<H", len(tags))
    bits = 8 + 96 + 2 + 12 * len(tags) + 4
    for tag, kind, value in tags:
        count, value = (3, bits) if tag == 258 else (1, value)
        content += struct.pack("<HHII", tag, kind, count, value)
    (tmp_path / "deep.tif").write_bytes(content + struct.pack("<IHHH", 0, 16, 16, 16))
    (tmp_path / "deep.ppm").write_bytes(b"P6 4 4 65535\n" + struct.pack(">H", 200) * 48)
    for name in ("deep.tif", "deep.ppm"):
        with pytest.raises(DataError, match=f"{name} has 16 bits per channel"):
            open_image(tmp_path / name)


def test_files_of_8_bits_are_read_as_before(tmp_path: Path) -> None:
    """T4: what is not deep is not refused, 16 bits a *pixel* (BMP 5-6-5) included."""
    import struct

    pixels = struct.pack("<16H", *range(0, 1600, 100))
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    head = struct.pack("<2sIHHI", b"BM", 66 + len(pixels), 0, 0, 66)
    info = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    (tmp_path / "565.bmp").write_bytes(head + info + masks + pixels)
    assert open_image(tmp_path / "565.bmp").mode == "RGB"
    for name in ("a.png", "a.tif", "a.ppm", "a.webp", "a.jpg"):
        assert open_image(picture(tmp_path / name)).size == (20, 20)


def test_calibration_looks_at_files_in_the_same_way(tmp_path: Path) -> None:
    """T3, T4: `--calibrate`, the other reader of pictures."""
    from surgeon.models.images import read_images
    from surgeon.records.recipe import BaseModel, Weights

    base = BaseModel(source="factory", name="x", input_size=(3, 8, 8), weights=Weights(kind="random"))
    picture(tmp_path / "pool/a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path / "pool")
    assert read_images(tmp_path / "set", torch.nn.Flatten(), base).shape == (1, 3, 8, 8)
    (tmp_path / "pool/deep.png").write_bytes(_png(2, 3))
    with pytest.raises(InputError, match="16 bits per channel"):
        read_images(tmp_path / "set", torch.nn.Flatten(), base)
    (tmp_path / "pool/deep.png").write_text("no picture")
    with pytest.raises(
        InputError, match=r"^--calibrate: cannot read the image .*deep\.png: it is damaged, or its content is not an"
    ) as told:
        read_images(tmp_path / "set", torch.nn.Flatten(), base)
    assert str(told.value).count("deep.png") == 1
    (tmp_path / "pool/deep.png").unlink()
    picture(tmp_path / "pool/b.png", (40, 30))
    restorer = torch.nn.Identity()  # what returns images looks at pictures as they are: resizing changes their noise
    assert read_images(tmp_path / "set", restorer, base).shape == (2, 3, 16, 16)


# --- annotations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [np.ones((72, 64)), np.zeros((72, 64), bool), np.ones((72, 64), np.int64), np.ones((9, 4)), np.ones((5, 2), bool)],
)
def test_maps_are_no_points(tmp_path: Path, array: np.ndarray) -> None:
    """T11: crowd `.npy` that is a density or boolean map."""
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"a.npy.*not points \(n, 2\)"):
        read_points(tmp_path / "a.npy", (72, 64))


def test_a_map_of_a_narrow_picture_is_no_points(tmp_path: Path) -> None:
    """T11: never the picture's shape; points with a third column stay points."""
    np.save(tmp_path / "a.npy", np.ones((40, 2)))
    with pytest.raises(DataError, match=r"a map \(40, 2\) of float64"):
        read_points(tmp_path / "a.npy", (40, 2))
    assert read_points(tmp_path / "a.npy", (40, 64)).shape == (40, 2)
    np.save(tmp_path / "b.npy", np.ones((4, 3)))
    assert read_points(tmp_path / "b.npy", (40, 64)).shape == (4, 2)


def test_one_file_of_points_for_two_pictures_is_refused(tmp_path: Path) -> None:
    """T12: `0.png` beside `0.jpg`, here with one `0.npy`."""
    picture(tmp_path / "0.png")
    picture(tmp_path / "0.jpg")
    np.save(tmp_path / "0.npy", np.ones((2, 2)))
    with pytest.raises(DataError, match=r"0.npy has two pictures"):
        point_files(tmp_path)


def segmentation(root: Path, values: dict[str, list[int]], suffix: str = ".png", **options: Any) -> Task:
    """A task with one picture a split, whose mask has stripes of these values."""
    for split, stripes in values.items():
        picture(root / split / "images/0.png")
        mask = np.repeat(np.array(stripes, np.uint8), 20)[None].repeat(20, 0)[:, :: len(stripes)]
        (root / split / "masks").mkdir(parents=True)
        Image.fromarray(mask).save(root / split / f"masks/0{suffix}")
    return create_task("segmentation", data=root, **options)


def test_masks_of_0_and_255_are_refused_whatever_classes_says(tmp_path: Path) -> None:
    """T12: masks 0/255 with `classes=2`: a constant predictor gets mIoU 1.0."""
    task = segmentation(tmp_path, {"train": [0, 255], "val": [0, 255]}, classes=2)
    with pytest.raises(
        DataError, match=r"contain only \[0\] besides ignore_index=255; at least two classes are needed"
    ):
        task.check()


def test_lossy_masks_are_refused(tmp_path: Path) -> None:
    """T12: JPEG masks (255 classes), also under another name."""
    task = segmentation(tmp_path, {"train": [0, 1], "val": [0, 1]}, ".jpg")
    (tmp_path / "val/masks/0.jpg").rename(tmp_path / "val/masks/0.png")
    with pytest.raises(DataError, match=r"masks/0.jpg is a JPEG: .*masks must be lossless"):
        task.check()
    with pytest.raises(DataError, match=r"masks/0.png is a JPEG"):
        read_mask(tmp_path / "val/masks/0.png")


def test_gaps_between_labels_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """T12: masks 0/128."""
    task = segmentation(tmp_path, {"train": [0, 128], "val": [0, 128]})
    with caplog.at_level(logging.WARNING):
        task.check()
    told = "no mask has labels 1 to 127: 127 of 129 classes do not occur; the largest label, 128, is in "
    assert f"{told}{tmp_path / 'train/masks/0.png'} (ignore_index=128 leaves it out;" in caplog.text


def test_validation_masks_without_a_class_are_refused(tmp_path: Path) -> None:
    """T12: all-void validation (nan)."""
    task = segmentation(tmp_path, {"train": [0, 1], "val": [255]})
    with pytest.raises(DataError, match="the masks of val contain only ignore_index=255"):
        task.check()


def test_two_pictures_of_one_mask_are_refused(tmp_path: Path) -> None:
    """T12: `0.png` beside `0.jpg`."""
    task = segmentation(tmp_path, {"train": [0, 1], "val": [0, 1]})
    picture(tmp_path / "train/images/0.jpg")
    with pytest.raises(DataError, match=r"images/0.jpg and .*images/0.png would both belong to one pair"):
        task.check()


def test_the_psnr_of_a_perfect_pair_is_a_number() -> None:
    """T22: one perfect pair: mean PSNR inf."""
    image = torch.rand(2, 3, 16, 16)
    other = image.clone()
    other[1] = (other[1] + 0.1).clamp(0, 1)
    values = psnr(other, image)
    assert values[0] == 100
    assert 19 < values[1] < 25


# --- layouts --------------------------------------------------------------------------------------------------------


def test_the_layout_of_div2k_is_known(tmp_path: Path) -> None:
    """T14: LR and validation pictures are taken for training HR."""
    for folder in ("DIV2K_train_HR", "DIV2K_valid_HR", "DIV2K_train_LR_bicubic/X2", "DIV2K_valid_LR_bicubic/X2"):
        picture(tmp_path / folder / "0001.png", side=32)
    task = create_task("super-resolution", data=tmp_path, patch=16)
    task.check()
    for split, folder in (("train", "DIV2K_train_HR"), ("val", "DIV2K_valid_HR")):
        assert [item.parent.name for _, item in task.items(split)] == [folder]


def test_reduced_images_beside_others_are_refused(tmp_path: Path) -> None:
    """T14: other sets with a folder of reduced images."""
    for folder in ("Flickr2K_HR", "Flickr2K_LR_bicubic/X2"):
        picture(tmp_path / folder / "0001.png", side=32)
    with pytest.raises(DataError, match=r"also contains reduced images \(Flickr2K_LR_bicubic\)"):
        create_task("denoising", data=tmp_path, patch=16).check()


# --- what was asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(40, 40), (37, 90), (16, 100)])
def test_tiles_give_what_the_whole_gives(sizes: tuple[int, int]) -> None:
    """T26: tiled evaluation of large pictures; where the overlap covers what the network sees, nothing differs."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 5, padding=2), torch.nn.PixelShuffle(2))
    x = torch.rand(1, 3, *sizes)
    with torch.no_grad():
        assert torch.allclose(in_tiles(net, x, 32, 8, 2), net(x), atol=1e-6)


def test_restoration_is_evaluated_in_tiles(tmp_path: Path) -> None:
    """T26: a task option; a network that gives less than it gets is told."""
    for split in ("train", "val"):
        picture(tmp_path / split / "0.png", side=60)
    seen = []

    class Net(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape[-2:]))
            return super().forward(x)

    task = create_task("denoising", data=tmp_path, patch=16, tile=32, tile_overlap=8)
    net = task.bind(Net(3, 3, 3, padding=1))
    plain = create_task("denoising", data=tmp_path, patch=16)
    whole, seen[:] = evaluate(net, plain), []
    assert evaluate(net, task) == pytest.approx(whole, rel=1e-5)
    assert max(max(size) for size in seen) == 32
    with pytest.raises(InputError, match="tile is for networks whose output is 1 times as large"):
        evaluate(create_task("denoising", data=tmp_path, patch=16).bind(torch.nn.Conv2d(3, 3, 3)), task)
    with pytest.raises(ConfigError, match="tile must be more than twice tile_overlap=32"):
        create_task("denoising", data=tmp_path, tile=64)


def test_classes_can_be_weighed(tmp_path: Path) -> None:
    """T26: class weights, for classification and segmentation."""
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            picture(tmp_path / split / name / "0.png", side=8)
    logits, target = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    task = create_task("classification", data=tmp_path, class_weights=(3.0, 1.0))
    expected = (each * torch.tensor([3.0, 1.0, 1.0, 3.0])).mean()
    assert torch.allclose(task.loss(logits, {"target": target}), expected)
    pixels = segmentation(tmp_path / "masks", {"train": [0, 1], "val": [0, 1]}, class_weights=(3.0, 1.0))
    picture_logits, labels = logits.T[None, :, None], target[None, None]
    assert torch.allclose(pixels.loss(picture_logits, {"target": labels}), expected)
    with pytest.raises(ConfigError, match="class_weights must be 2 numbers"):
        create_task("classification", data=tmp_path, class_weights=(1.0,)).loss(logits, {"target": target})
