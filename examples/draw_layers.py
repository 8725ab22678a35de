"""Draw what varies in converted layers, on a generated picture. Writes the pictures of docs/pictures.md.

python examples/draw_layers.py [MODEL] [FOLDER]

The generators are disturbed at random, so that there is something to see: nothing here was trained.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import surgeon
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.visualize.capture import capture
from surgeon.visualize.measures import numbers, told
from surgeon.visualize.pictures import bases, pictures
from surgeon.visualize.sheet import pixels


def scene(height: int = 128, width: int = 192) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1] with near and far, smooth and rough parts: a field of poles below a sky with a sun."""
    y, x = np.mgrid[0:height, 0:width] / height
    sky = np.stack([0.45 + 0.3 * y, 0.65 + 0.2 * y, 0.95 - 0.1 * y], -1)
    grain = np.random.default_rng(0).random((height, width, 1))
    depth = np.clip((y - 0.45) / 0.55, 1e-3, 1)
    furrows = 0.5 + 0.5 * np.sin(14 * (x - 0.75) / depth + 2)
    field = np.array([0.35, 0.42, 0.15]) * (0.5 + 0.5 * furrows[..., None]) + 0.15 * grain
    image = np.where((y > 0.45)[..., None], field, sky)
    sun = np.hypot(x - 1.15, y - 0.2) < 0.09
    image[sun] = (1.0, 0.9, 0.55)
    for i, left in enumerate(np.linspace(0.06, 1.3, 9)):
        size = 0.1 + 0.8 * abs(i - 4) / 4
        pole = (abs(x - left) < 0.02 * size) & (y > 0.5 - 0.4 * size) & (y < 0.5 + 0.45 * size)
        image[pole] = (0.25 + 0.1 * i / 9, 0.16, 0.1)
    return image.clip(0, 1)


def disturbed(name: str, kind: str, layers: str) -> torch.nn.Module:
    """A converted model whose generators no longer give the same everywhere."""
    model = timm.create_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        converted, _ = surgeon.convert(model, layers=layers, type=kind, input_size=64, check=False)
        with torch.no_grad():
            for layer in dynamic_layers(converted).values():
                for key, parameter in layer.new_parameters():
                    if key.endswith(("expand.weight", "generator.weight")):
                        parameter.normal_(std=0.03)
                    elif key == "selector.expand.bias":
                        parameter.zero_()
    return converted


def main(name: str = "resnet18", folder: str | None = None) -> None:
    output = Path(folder or tempfile.mkdtemp())
    photo = scene()
    x = torch.from_numpy((photo - 0.45) / 0.23).movedim(-1, 0).float()
    for kind in ("acda", "pafu", "sekg"):
        model = disturbed(name, kind, "stage1")
        layers = dict(list(dynamic_layers(model).items())[:1])
        for seen in capture(model, layers, x).values():
            print(f"{seen.name}, {kind}: {told(numbers(seen))}")
            for what, figure in pictures(seen, photo).items():
                Image.fromarray(pixels(figure)).save(output / f"{kind}-{what}.png", optimize=True)
            if kind == "acda":
                Image.fromarray(pixels(bases(seen.layer))).save(output / "acda-bases.png", optimize=True)
    print(f"pictures in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
