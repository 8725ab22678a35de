"""The names that models are given by: which there are, what each means, and what was probably meant."""

import difflib
import fnmatch
import re
from pathlib import Path

from surgeon.errors import ModelError
from surgeon.models.places import HUB, LIBRARIES, no_folder
from surgeon.models.programs import SUFFIX
from surgeon.models.sources import torchvision_names, torchvision_size
from surgeon.records.providers import providers
from surgeon.records.recipe import BaseModel, Weights

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def model_names(pattern: str = "*") -> list[str]:
    """Every name known to `build_model` that matches the glob, with or without its prefix (torchvision/, zoo/)."""
    import timm

    provided = {prefix: provider.names() for prefix, provider in providers().items()}
    own = {name for names in provided.values() for name in names}  # timm may know them as well
    names = [name for name in timm.list_models() if name not in own]
    names += [f"torchvision/{name}" for name in torchvision_names()]
    names += [f"{prefix}/{name}" for prefix, listed in provided.items() for name in listed]
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    return [name for name in names if any(fnmatch.fnmatchcase(x, pattern) for x in (name, name.rpartition("/")[2]))]


def parse(spec: str) -> BaseModel:
    """The model named by a spec, with the options and input size determined by the name alone."""
    import timm

    unset = Weights(kind="random")
    if HUB.fullmatch(spec):
        return BaseModel(source="timm", name=spec, input_size=(), weights=unset)
    if FACTORY.fullmatch(spec):
        return BaseModel(source="factory", name=spec, input_size=(), weights=unset)
    prefix, _, name = spec.rpartition("/")
    for source, provider in providers().items():
        if prefix in ("", source) and name in provider.names():
            return BaseModel(source=source, name=name, input_size=provider.input_size(name), weights=unset)
    if prefix in ("", "timm") and timm.is_model(name.split(".")[0]):
        _check_tag(name)
        cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        size = tuple(cfg.input_size) if cfg is not None else ()
        return BaseModel(source="timm", name=name, input_size=size, weights=unset)
    if prefix == "torchvision" and name in torchvision_names():
        return BaseModel(source="torchvision", name=name, input_size=torchvision_size(name), weights=unset)
    if spec.endswith(SUFFIX):
        raise ModelError(f"there is no file {spec}")
    if Path(spec).is_dir() or ("/" in spec and prefix not in LIBRARIES):
        raise no_folder(spec)
    if Path(f"{spec}.py").is_file():
        raise ModelError(
            f"there is no model {spec!r}: for a network in {spec}.py, name its class or function, {spec}:NAME"
        )
    raise ModelError(f"there is no model {spec!r}{nearest(spec)} (`surgeon models PATTERN` lists the names)")


def nearest(spec: str) -> str:
    """The nearest known names, formatted as the end of an error message."""
    by_tail: dict[str, list[str]] = {}
    for name in model_names():
        by_tail.setdefault(name.rpartition("/")[2], []).append(name)
    tails = difflib.get_close_matches(spec.rpartition("/")[2].lower(), by_tail, n=3, cutoff=0.6)
    near = [name for tail in tails for name in by_tail[tail]]
    return f". Did you mean {', '.join(near[:4])}?" if near else ""


def _check_tag(name: str) -> None:
    """Raise `ModelError` for a tag of pretrained weights that timm does not have."""
    import timm

    stem, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{stem}.*")]
    if tag and tag not in tags:
        raise ModelError(f"timm's {stem} has no weights {tag!r}; it has {', '.join(tags) or 'none'}")


def has_fixed_size(name: str) -> bool:
    """Whether timm's model of this name takes no other image size than its own."""
    import timm

    cfg = None if HUB.fullmatch(name) else timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(cfg is not None and cfg.fixed_input_size)
