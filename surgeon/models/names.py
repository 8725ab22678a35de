"""Models by common names: timm, torchvision, the zoo, a surgeon folder, a `.pt2` file, `package.module:factory`.

`build_model` builds a model from a name, with weights. It records how in a `BaseModel`, from which `build_structure`
rebuilds the bare architecture (no downloads, no third-party code) and `restore` the exact weights.
"""

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from surgeon.errors import ModelError, SurgeonError, called, offered
from surgeon.models.heads import HeadError
from surgeon.models.places import HUB, check_own, in_file, untrusted
from surgeon.models.places import WEIGHTS as WORDS
from surgeon.models.programs import SUFFIX, is_program
from surgeon.models.sources import (
    STRUCTURES,
    as_published,
    construct,
    named_factory,
    pretrained,
    resolve_hub,
)
from surgeon.models.specs import FACTORY, has_fixed_size, parse
from surgeon.models.weight_files import load_weights_file
from surgeon.models.weights import mismatches, state_sha256
from surgeon.records.providers import providers
from surgeon.records.recipe import BaseModel, Recipe, Weights, get_recipe, set_recipe
from surgeon.util.outputs import WEIGHTS, is_surgeon_folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.\-]+")
_FORBIDDEN = re.compile(r"pretrained|checkpoint|cache_dir|weights|_file|file$|url")


def build_model(
    spec: str,
    *,
    weights: str = "auto",
    seed: int = 0,
    num_classes: int | None = None,
    in_chans: int | None = None,
    input_size: tuple[int, ...] | None = None,
    options: dict[str, Any] | None = None,
    trust_factory: bool = False,
    head: Literal["own", "weights"] = "own",
) -> tuple[nn.Module, BaseModel | None]:
    """Build the model named by `spec`, in eval mode, and return how it was built.

    `weights` is auto (pretrained if available, otherwise random, with a logged warning), pretrained, random, shapes (random,
    in the structure of the pretrained ones), or a file. Random weights depend on `seed`. `input_size` is (C, H, W) or (H, W).
    `options` go to the model's own factory. `trust_factory` lets a surgeon folder run the factory that its recipe names. `head` is
    own, or weights: one with as many outputs as the weights of a file have, unless the options say how many.
    The second result is None only for a surgeon folder whose base model is unknown. Raises `ModelError`.
    """
    from surgeon.models.hub import folder_if_any

    found = folder_if_any(spec)
    if is_surgeon_folder(found) or is_program(spec):
        own = dict(options or {}) | ({} if in_chans is None else {"in_chans": in_chans})
        check_own(spec, weights=weights, num_classes=num_classes, options=own)
        if is_program(spec):
            return _from_program(spec, input_size)
        model, recorded = _from_folder(found, trust_factory=trust_factory)
        if recorded is not None and input_size is not None:
            recorded = replace(recorded, input_size=_example_size(recorded.input_size, input_size, None))
        return model, recorded
    base = parse(spec)
    size = _example_size(base.input_size, input_size, in_chans)
    kwargs = _kwargs(base, options, num_classes)
    if base.source == "timm" and size and size[0] != (*base.input_size, 3)[0]:
        kwargs["in_chans"] = size[0]
        if in_chans is None:
            logger.warning("%s is built with in_chans=%d, the channels of the given size", base.name, size[0])
    elif in_chans is not None:
        kwargs["in_chans"] = in_chans
    if input_size is not None and base.source == "timm" and has_fixed_size(base.name):
        kwargs.setdefault("img_size", list(input_size[-2:]))
    base = replace(base, kwargs=kwargs, input_size=size)
    try:
        model, base = _with_weights(base, weights, seed)
    except HeadError as error:
        name = _head_option(base, error)
        given = name is not None and name in base.kwargs
        if name is None or given or head == "own":
            later = "; finetune and try put in the head that the data need" if given else ""
            raise ModelError(f"{error}{_told_option(name, error)}{later}") from error
        model, base = _with_weights(replace(base, kwargs=base.kwargs | {name: error.outputs}), weights, seed)
    return model.eval(), base


def _kwargs(base: BaseModel, options: dict[str, Any] | None, num_classes: int | None) -> dict[str, Any]:
    """The factory's options, with those given."""
    return base.kwargs | (options or {}) | ({} if num_classes is None else {"num_classes": num_classes})


def _head_option(base: BaseModel, error: HeadError) -> str | None:
    """The option of the model's factory with which it gets the head that the weights have; None if none does."""
    names = ["num_classes"]
    if base.source == "factory":
        with contextlib.suppress(ValueError, TypeError):  # some callables have no signature
            parameters = inspect.signature(named_factory(base.name)).parameters.values()
            names += [one.name for one in parameters if type(one.default) is int or one.default is one.empty]
    for name in names:
        with contextlib.suppress(SurgeonError):
            twin = build_shapes(replace(base, kwargs=base.kwargs | {name: error.outputs}), trust_factory=True)
            if not mismatches(error.state, twin):
                return name
    return None


def _told_option(name: str | None, error: HeadError) -> str:
    """This option as it is given, as the end of a message; empty if there is none."""
    if name == "num_classes":
        flag, told = "--num-classes", called(f"--num-classes {error.outputs}", f"num_classes={error.outputs}")
    else:
        flag = "--model-args"
        told = called(f"{flag} {name}={error.outputs}", f"options={{{name!r}: {error.outputs}}}")
    return f": {told}" if name is not None and offered(flag) else ""


def names(spec: str, base: BaseModel) -> bool:
    """Whether `spec` is the name of this base model, regardless of its weights."""
    with contextlib.suppress(ModelError):
        named = parse(spec)
        return (named.source, named.name) == (base.source, base.name)
    return False


def open_model(spec: str, **options: Any) -> nn.Module:
    """The model named by `spec`, in eval mode: a library's name, a surgeon folder, a `.pt2` file or `package.module:factory`.

    `options` are those of `build_model`. The model carries how it was built, so a folder saved from it loads without `base=`.
    Raises `ModelError`.
    """
    model, base = build_model(spec, **options)
    if base is not None and get_recipe(model) is None:
        set_recipe(model, Recipe(rules=(), base=base))
    return model


def factory_base(spec: str, options: Mapping[str, Any] | None = None) -> BaseModel:
    """The base model that the function or class `module:NAME` builds with these arguments. Raises `ModelError` for another name."""
    if not FACTORY.fullmatch(spec):
        raise ModelError(f"factory must be module:NAME, a function or class that returns the network, got {spec!r}")
    return replace(parse(spec), kwargs=dict(options or {}), weights=Weights(kind="given"))


def as_made(base: BaseModel) -> tuple[nn.Module, BaseModel]:
    """The network with the weights that its factory gives it, from seed 0, and the record of both. Raises `ModelError`."""
    return _with_weights(base, "auto", 0)


def _example_size(own: tuple[int, ...], wanted: tuple[int, ...] | None, in_chans: int | None) -> tuple[int, ...]:
    """(C, H, W) to run the model at: the requested size, completed by the model's own; () if neither is known."""
    if wanted is not None and len(wanted) == 3:
        return wanted
    sides = own[1:] if wanted is None else wanted
    return (in_chans or (*own, 3)[0], *sides) if sides else ()


def build_structure(base: BaseModel, *, trust_factory: bool = False) -> nn.Module:
    """The architecture of a base model with arbitrary weights: no downloads, and no code except that of the libraries.

    Raises `ModelError`, also for untrusted factories: a factory is code named by a recipe.
    """
    _check_base(base, trust_factory=trust_factory)
    with torch.random.fork_rng(devices=[]):
        return construct(base)


def build_shapes(base: BaseModel, *, trust_factory: bool = False) -> nn.Module:
    """The structure on the meta device, which needs no memory; on the CPU if the factory computes with values."""
    try:
        with torch.device("meta"):
            return build_structure(base, trust_factory=trust_factory)
    except ModelError:
        return build_structure(base, trust_factory=trust_factory)


def shapes_of(spec: str, *, num_classes: int | None = None, options: dict[str, Any] | None = None) -> nn.Module:
    """A model by its name, in eval mode, with shapes only; nothing is fetched. `options` as of `build_model`.

    Raises `ModelError`.
    """
    if is_program(spec):
        return build_model(spec, num_classes=num_classes, options=options)[0]
    base = parse(spec)
    if base.source == "factory" or HUB.fullmatch(base.name):
        return build_model(spec, weights="random", num_classes=num_classes, options=options)[0]
    return build_shapes(as_published(replace(base, kwargs=_kwargs(base, options, num_classes)))).eval()


def size_of(spec: str) -> tuple[int, ...] | None:
    """(C, H, W) of a model's inputs according to its folder or library, None if neither knows. Raises `ModelError`."""
    from surgeon.models.hub import folder_if_any

    folder = folder_if_any(spec)
    if is_surgeon_folder(folder):
        base = Recipe.read(folder).base
        return (base.input_size or None) if base is not None else None
    return None if is_program(spec) else parse(spec).input_size or None


def chosen_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) that a model was converted or trained at, by its recipe, if that is not its library's own size."""
    recipe = get_recipe(model)
    base = None if recipe is None else recipe.base
    if base is None and recipe is not None and len(recipe.input_size) == 3:
        channels, height, width = recipe.input_size
        return channels, height, width
    if base is None or len(base.input_size) != 3:
        return None
    own = () if base.source in ("factory", "program") else parse(f"{base.source}/{base.name}").input_size
    channels, height, width = base.input_size
    return (channels, height, width) if base.input_size != own else None


def restore(
    base: BaseModel,
    *,
    weights: str | None = None,
    trust_factory: bool = False,
    head: Literal["own", "weights"] = "own",
    flag: str | None = None,
) -> nn.Module:
    """The base model with its weights at conversion, in eval mode; their SHA-256 is verified.

    `weights` names a file to read them from instead; `flag` is the option for it in messages. A model that got another head after
    its conversion has no weights for it: with `head="weights"` it comes with the head of the weights. Raises `ModelError`.
    """
    recorded = base.weights
    _check_base(base, trust_factory=trust_factory)
    hint = "" if flag is None else f"; pass their file with {flag}"
    if weights is None and recorded.kind == "given" and (base.source != "factory" or recorded.sha256 is None):
        raise ModelError(f"the weights of {base.name} came from a model object and are not recorded{hint}")
    if (
        weights is None
        and recorded.sha256 is None
        and recorded.kind in ("file", "pretrained")
        and base.source != "factory"
    ):
        raise ModelError(
            f"the recipe names weights of {base.name} ({recorded.path or recorded.kind}) without their SHA-256{hint}"
        )
    from_file = weights is None and recorded.kind == "file" and base.source != "program"
    if from_file and not in_file(str(recorded.path))[0].is_file():
        raise ModelError(f"the weights of {base.name}, recorded as {recorded.path}, are gone{hint}")
    if base.source == "program" and weights is not None and str(recorded.path).endswith(SUFFIX):
        raise ModelError(f"an exported program has its own weights: leave {flag or 'weights'} out")
    kind = weights or {"file": str(recorded.path), "given": "auto"}.get(recorded.kind, recorded.kind)
    model, found, option = _as_converted(base, kind)
    if recorded.sha256 not in (None, found.weights.sha256):
        raise ModelError(
            f"the weights of {base.name} ({found.weights.kind}{f' {found.weights.path}' if found.weights.path else ''}) are "
            f"not those that were converted: SHA-256 of the state dict {str(found.weights.sha256)[:16]}.., expected "
            f"{recorded.sha256[:16]}.."
        )
    if option is not None:
        if head == "own":
            whose, instead = ("the original", "compare with a plain run that was trained as long")
            if weights is not None:
                whose, instead = weights, "give the weights that it had when it was converted"
            classes = base.kwargs.get(option)
            raise ModelError(f"{base.name} got a new classifier of {classes} classes that {whose} never had: {instead}")
        base = replace(base, kwargs=found.kwargs)
    set_recipe(model, Recipe(rules=(), base=base))
    return model.eval()


def _as_converted(base: BaseModel, kind: str) -> tuple[nn.Module, BaseModel, str | None]:
    """The model with these weights; with their head if only then they fit or are the recorded ones, and the option for it."""
    recorded = base.weights
    seed = recorded.seed or 0
    try:
        model, found = _with_weights(base, kind, seed)
    except HeadError as error:
        if (name := _head_option(base, error)) is None:
            raise
        return *_with_weights(replace(base, kwargs=base.kwargs | {name: error.outputs}), kind, seed), name
    same = recorded.sha256 in (None, found.weights.sha256)
    if not same and "num_classes" in base.kwargs and recorded.kind in ("pretrained", "random"):
        kwargs = {key: value for key, value in base.kwargs.items() if key != "num_classes"}
        own = _with_weights(replace(base, kwargs=kwargs), kind, seed)
        if own[1].weights.sha256 == recorded.sha256:
            return *own, "num_classes"
    return model, found, None


def _check_base(base: BaseModel, *, trust_factory: bool) -> None:
    """Raise `ModelError` for what an untrusted recipe must not do: third-party code, downloads, pickles."""
    if base.source == "factory" and not trust_factory:
        raise untrusted(base.name)
    bad = sorted(
        key for key in base.kwargs if _FORBIDDEN.search(key) and (base.source != "torchvision" or key not in STRUCTURES)
    )
    if bad or not (base.source in ("factory", "program") or _NAME.fullmatch(base.name)):
        raise ModelError(f"the recipe's base model {base.name!r} may not have {', '.join(bad) or 'such a name'}")


# --- building -----------------------------------------------------------------------------------------------------


def _with_weights(base: BaseModel, weights: str, seed: int) -> tuple[nn.Module, BaseModel]:
    """The model with the requested weights, and the record of both."""
    if weights == "shapes":
        base, weights = as_published(base), "random"
    if base.source == "program":
        model = construct(base)
        if weights in WORDS or weights.endswith(SUFFIX):  # the program's own
            return model, _recorded(base, model, base.weights)
        return model, _recorded(base, model, Weights(kind="file", path=load_weights_file(model, weights)))
    if base.source == "factory" and weights == "auto":
        with _seeded(seed):
            model = construct(base)
        return model, _recorded(base, model, Weights(kind="given", seed=seed))
    if weights in ("auto", "pretrained"):
        try:
            model, base = pretrained(base)
        except ModelError as error:
            if HUB.fullmatch(base.name):
                raise
            other = f"{called('--weights FILE', 'weights=FILE')} takes a file's"
            if weights == "pretrained":
                raise ModelError(f"{error}; {other}, {called('--weights random', 'random')} does without") from error
            logger.warning("%s. CONTINUING WITH RANDOM WEIGHTS from seed %d; %s.", error, seed, other)
        else:
            return model, _recorded(base, model, base.weights)
    if HUB.fullmatch(base.name):
        base = resolve_hub(base)
    with _seeded(seed):
        model = construct(base)
    if weights in ("auto", "random"):
        return model, _recorded(base, model, Weights(kind="random", seed=seed))
    path = load_weights_file(model, weights, partial(_named_for, base, model))
    return model, _recorded(base, model, Weights(kind="file", path=path))


def _recorded(base: BaseModel, model: nn.Module, weights: Weights) -> BaseModel:
    return replace(base, weights=replace(weights, sha256=state_sha256(model)))


def _named_for(base: BaseModel, model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Public weights for a provider's network, under that network's names."""
    provider = providers().get(base.source)
    return state if provider is None else provider.adapt(state, base.name, model)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _from_program(path: str, input_size: tuple[int, ...] | None) -> tuple[nn.Module, BaseModel]:
    weights = Weights(kind="file", path=str(Path(path).resolve()))
    base = BaseModel(source="program", name=str(Path(path).resolve()), input_size=input_size or (), weights=weights)
    model, base = _with_weights(base, "auto", 0)
    return model.eval(), base


def _from_folder(path: str, *, trust_factory: bool) -> tuple[nn.Module, BaseModel | None]:
    from surgeon.models.checkpoint import load

    model, recipe = load(path, trust_factory=trust_factory), Recipe.read(path)
    base = recipe.base
    if base is None or recipe.rules:
        return model, base
    file = Path(path, WEIGHTS).resolve()  # a trained plain network: the weights are the folder's
    return model, _recorded(base, model, Weights(kind="file", path=str(file)))
