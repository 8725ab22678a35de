"""Convert a timm model, train one step, save it, load it again.

python examples/convert_timm.py [MODEL] [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch

import surgeon


def main(name: str = "resnet18", folder: str | None = None) -> None:
    model = timm.create_model(name, num_classes=10)
    size = model.pretrained_cfg["input_size"]
    model, report = surgeon.convert(model, layers="stage4", type="acda", atoms=4)
    print(report.to_text(), end="")

    images, labels = torch.randn(4, *size), torch.randint(0, 10, (4,))
    optimizer = torch.optim.AdamW(surgeon.parameter_groups(model.train(), lr=1e-4))
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / "converted"
        surgeon.save(model, path, report=report)
        again = surgeon.load(path)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
    print("saved, loaded, and the outputs are the same")


if __name__ == "__main__":
    main(*sys.argv[1:])
