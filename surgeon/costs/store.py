"""Cost tables on disk, keyed by the hash of everything they depend on."""

import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import surgeon
import surgeon.layers
from surgeon.costs.settings import Settings
from surgeon.costs.table import CostRow, CostTable, Option
from surgeon.errors import CheckpointError
from surgeon.util.files import cache_folder, writing

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Folder of the tables."""
    return cache_folder() / "cost"


def key(model: nn.Module, options: Sequence[Option], layers: Any, settings: Settings) -> str | None:
    """Content hash of the request; None if it depends on a function (a custom loss or optimizer)."""
    if settings.loss is not None or not isinstance(settings.optimizer, str):
        return None
    text = json.dumps(
        {
            "model": _structure(model),
            "options": [option.label for option in options],
            "layers": layers if layers is None or isinstance(layers, str) else list(layers),
            "settings": asdict(settings),
            "versions": [surgeon.__version__, torch.__version__, _sources()],
        },
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _structure(model: nn.Module) -> list[str]:
    modules = [
        f"{name} {type(m).__module__}.{type(m).__qualname__} {m.extra_repr()}" for name, m in model.named_modules()
    ]
    values = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [
        *modules,
        *(f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad} {t.is_contiguous()}" for name, t in values),
    ]


@cache
def _sources() -> str:
    """Hash of the source of this package and of the layers: a changed formula invalidates tables."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parent, *map(Path, surgeon.layers.__path__)):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def load(key: str) -> CostTable | None:
    """The table of this hash; None if there is none, or it cannot be read."""
    try:
        with np.load(folder() / f"{key}.npz", allow_pickle=False) as file:
            text = json.loads(str(file["text"]))
            return CostTable(
                layers=tuple(text["layers"]),
                options=tuple(text["options"]),
                rows=tuple(CostRow(**{**row, "reasons": tuple(row["reasons"])}) for row in text["rows"]),
                base=text["base"],
                allowed=file["allowed"],
                windows=file["windows"],
                memory=file["memory"],
            )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def save(key: str, table: CostTable) -> None:
    """Store a table; without a writable cache folder it is not stored."""
    text = json.dumps(
        {
            "layers": table.layers,
            "options": table.options,
            "rows": [asdict(row) for row in table.rows],
            "base": dict(table.base),
        }
    )
    try:
        with writing(folder() / f"{key}.npz") as fresh:
            np.savez_compressed(
                fresh, text=np.array(text), allowed=table.allowed, windows=table.windows, memory=table.memory
            )
    except CheckpointError as error:
        logger.debug("not kept: %s", error)
