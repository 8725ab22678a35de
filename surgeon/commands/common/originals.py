"""A network to compare a run with, named on the command line: which weights it gets, and the note on them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel


def named_original(
    spec: str, weights: str | None, base: "BaseModel | None", *, flag: str, seed: int = 0, trust_factory: bool = False
) -> "tuple[nn.Module, str | None]":
    """The network named as a run's original, in eval mode, and a sentence on its weights; None for a folder, which has its own.

    If it is the run's base model, it has the weights that were converted, unless `weights` (the option `flag`) names others.
    Raises `ModelError`.
    """
    from surgeon.models.names import build_model, names, restore

    known = base is not None and (base.source != "factory" or base.weights.sha256 is not None)
    if weights is None and base is not None and known and names(spec, base):
        return restore(
            base, trust_factory=True, head="weights", flag=flag
        ), f"{spec} has the weights that were converted"
    model, built = build_model(spec, weights=weights or "auto", seed=seed, head="weights", trust_factory=trust_factory)
    if built is None or not names(spec, built):
        return model, None
    own = built.weights
    told = {
        "pretrained": f"its published weights{f' ({own.path})' if own.path else ''}",
        "random": f"random weights (seed {own.seed})",
        "file": f"the weights of {own.path}",
        "given": f"the weights that it makes itself; {flag} FILE loads others",
    }
    return model, f"{spec} has {told[own.kind]}"
