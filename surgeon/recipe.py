"""A recipe says how a model is made: from which base model, and what each chosen convolution became.

Recipes are versioned JSON. The same form serves as input (`rules` select by stage, glob, predicate) and as the record of a
conversion (`rules` name single layers, with every option resolved, so that a state dict fits).
"""

from dataclasses import dataclass, field
from typing import Any

FORMAT = "surgeon-recipe"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the base model's weights came from. `sha256` is over the state dict (names, dtypes, shapes, bytes)."""

    kind: str  # "pretrained" | "random" | "file" | "given" (the caller's own model object)
    seed: int | None = None
    path: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """How to build the base model again: `source` is timm, torchvision, zoo or factory."""

    source: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    input_size: tuple[int, ...] = (3, 224, 224)
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Layers (a selection, see `surgeon.select`) that become one type with these options. Of two rules the later wins."""

    layers: str
    type: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules, the base model if it is known, the seed of the conversion, and the versions it was made with."""

    rules: tuple[Rule, ...]
    base: BaseModel | None = None
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
