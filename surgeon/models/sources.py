"""Building models from each source: timm, torchvision, the zoo, a caller's factory; bare, or with published weights."""

import contextlib
import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.errors import ModelError, SurgeonError
from surgeon.models.places import HUB, check_module_of
from surgeon.models.programs import read_program
from surgeon.models.weights import bounded_network
from surgeon.records.providers import providers
from surgeon.records.recipe import BaseModel, Weights
from surgeon.surgery.sizes import bounded
from surgeon.util.files import told
from surgeon.util.machine import TooLargeError
from surgeon.util.near import did_you_mean, refused_argument

STRUCTURES = ("weights", "weights_backbone")  # torchvision's options that name weights for their structure alone
_LONGEST = 300  # characters of a library's error


def construct(base: BaseModel) -> nn.Module:
    """Call the model's factory without weights; raises `ModelError` for options it does not take."""
    with (
        _telling(f"{base.source} cannot build {base.name} with {base.kwargs or 'its defaults'}"),
        warnings.catch_warnings(),
        _bounded(base),
    ):
        # torchvision's googlenet and inception warn about their own defaults
        warnings.simplefilter("ignore", FutureWarning)
        return _bare(base)


def _bare(base: BaseModel) -> nn.Module:
    builders: dict[str, Callable[[BaseModel], nn.Module]] = {
        "timm": _timm_model,
        "torchvision": _torchvision_model,
        "factory": _factory_model,
        "program": _program,
    }
    if base.source in builders:
        return builders[base.source](base)
    return providers()[base.source].create(base.name, **base.kwargs)


def _bounded(base: BaseModel) -> contextlib.AbstractContextManager[None]:
    """Context that raises `TooLargeError` for options beyond this machine's memory; a caller's factory is not checked."""
    if base.source in ("factory", "program") or HUB.fullmatch(base.name):
        return contextlib.nullcontext()
    return bounded(lambda: _bare(base), base.kwargs, f"{base.name} with {told(base.kwargs)}")


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turn the errors of a library into one `ModelError`."""
    try:
        yield
    except (ModelError, TooLargeError):
        raise
    except Exception as error:  # the libraries' factories and hubs raise arbitrary errors
        text = " ".join(str(error).split()) or type(error).__name__
        told = refused_argument(error) or (text if isinstance(error, SurgeonError) else text[:_LONGEST])
        if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "URLError", "ConnectError"):
            told = "not in the cache, and the network cannot be reached"
        raise ModelError(f"{what}: {told.rstrip('.')}") from error


@contextlib.contextmanager
def _telling_where(name: str) -> Iterator[None]:
    """Turn what the module of the factory `name` raises into a `ModelError` with the exception's type and the line."""
    try:
        yield
    except SurgeonError:
        raise
    except (Exception, SystemExit) as error:
        if refused_argument(error) or isinstance(error, ImportError | SyntaxError):  # these name their place
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
        frame = [*frames[-1:], *(one for one in frames if one.filename == own)][-1]
        what = "called sys.exit" if isinstance(error, SystemExit) else f"raised {type(error).__name__}"
        text = " ".join(str(error).split())[:_LONGEST]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ModelError(f"{name} {what}{f': {text}' if text else ''} ({place})") from error


def _timm_model(base: BaseModel) -> nn.Module:
    import timm

    providers()  # register their classifiers with timm
    model: nn.Module = timm.create_model(base.name, pretrained=False, **base.kwargs)
    return model


def _torchvision_model(base: BaseModel) -> nn.Module:
    """With the structure of the named pretrained weights, if any: frozen norms, no auxiliary heads."""
    from torchvision import models

    kwargs = _plain(base)
    builder = models.get_model_builder(base.name)
    backbone = inspect.signature(builder).parameters.get("weights_backbone")
    members: dict[str, Any] = {
        "weights": models.get_model_weights(base.name),
        "weights_backbone": type(getattr(backbone, "default", None)),
    }
    for key, known in members.items():
        if key in base.kwargs:
            if not issubclass(known, models.WeightsEnum):
                raise ModelError(f"{base.name} may not have {key}")
            kwargs[key] = known[base.kwargs[key]]
        elif key == "weights" or backbone is not None:
            kwargs[key] = None
    named = any(kwargs.get(key) is not None for key in STRUCTURES)
    with _no_state_dicts() if named else contextlib.nullcontext():
        return _as_module(builder(**kwargs))


@contextlib.contextmanager
def _no_state_dicts() -> Iterator[None]:
    """Let torchvision's factories build for given weights without fetching or loading them."""
    from unittest.mock import patch  # only torchvision's models need it

    from torchvision.models import WeightsEnum

    with patch.object(WeightsEnum, "get_state_dict", return_value={}), patch.object(nn.Module, "load_state_dict"):
        yield


def torchvision_names() -> list[str]:
    """The names of torchvision's models, without the quantized ones."""
    from torchvision import models

    # The quantized variants consist of packed integer modules: nothing in them can be replaced.
    return [name for name in models.list_models() if not name.startswith("quantized_")]


def torchvision_size(name: str) -> tuple[int, ...]:
    """(C, H, W) for the model's default weights; () for video and optical flow, which take no single images."""
    from torchvision import models

    module = models.get_model_builder(name).__module__
    if module.startswith(("torchvision.models.video", "torchvision.models.optical_flow")):
        return ()
    options = getattr(models.get_model_weights(name)["DEFAULT"].transforms, "keywords", {})
    crop = int(options.get("crop_size", 224))
    return (3, crop, crop)


def named_factory(name: str) -> Any:
    """The class or function named `package.module:factory`; raises `ModelError` if the module has none of this name."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _telling_where(name):
            factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(factory, part):
                known = [key for key, value in vars(factory).items() if callable(value)]
                hint = did_you_mean(part, known)
                if module_name in ("timm", "torchvision"):
                    hint = f" Its models are named {module_name}/NAME, as {module_name}/resnet18"
                raise ModelError(f"{module_name} has no {attribute!r}.{hint}".removesuffix("."))
            factory = getattr(factory, part)
    finally:
        sys.path.pop(0)
    return factory


def _factory_model(base: BaseModel) -> nn.Module:
    check_module_of(base.name)
    factory = named_factory(base.name)  # a variable, as `refused_argument` needs it
    with _telling_where(base.name):
        return _as_module(factory(**base.kwargs))


def _program(base: BaseModel) -> nn.Module:
    return read_program(base.name)


def _as_module(made: Any) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(f"the factory made a {type(made).__name__}, not a torch.nn.Module")
    return made


def _plain(base: BaseModel) -> dict[str, Any]:
    """The options without torchvision's records of weights, which determine the structure."""
    return {key: value for key, value in base.kwargs.items() if base.source != "torchvision" or key not in STRUCTURES}


def as_published(base: BaseModel) -> BaseModel:
    """With the structure of its published weights, where it differs: GoogLeNet's has no auxiliary classifiers.

    Options of the caller's decide instead, if there are any.
    """
    from torchvision import models

    if base.source != "torchvision" or base.kwargs or not len(models.get_model_weights(base.name)):
        return base
    return replace(base, kwargs={"weights": "DEFAULT"})


def pretrained(base: BaseModel) -> tuple[nn.Module, BaseModel]:
    """The model with its published weights; raises `ModelError` if they are unavailable."""
    failed = f"pretrained weights of {base.name} are unavailable"
    if base.source in providers():
        raise ModelError(f"{failed}: the {base.source} publishes none")
    if base.source == "factory":
        raise ModelError(f"{failed}: a factory brings its own weights (--weights auto)")
    with _bounded(base), bounded_network(), _telling(failed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _timm_pretrained(base) if base.source == "timm" else _torchvision_pretrained(base)


def _timm_pretrained(base: BaseModel) -> tuple[nn.Module, BaseModel]:
    import timm

    hub = base.weights.path if base.weights.kind == "pretrained" else base.name
    spec = str(hub) if HUB.fullmatch(str(hub)) else base.name
    model = timm.create_model(spec, pretrained=True, **base.kwargs)
    cfg: Any = model.pretrained_cfg
    if HUB.fullmatch(spec):
        weights = Weights(kind="pretrained", path=spec)
        return model, replace(resolve_hub(base), weights=weights)
    name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
    weights = Weights(kind="pretrained", path=cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("file") or None)
    return model, replace(base, name=name, weights=weights)


def resolve_hub(base: BaseModel) -> BaseModel:
    """The timm architecture and options behind `hf-hub:...` or `local-dir:...`, so that it can be built without either."""
    from timm.models import load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path

    found = HUB.fullmatch(base.name)
    if found is None:
        return base
    read = load_model_config_from_path if base.name.startswith("local-dir") else load_model_config_from_hf
    with bounded_network(), _telling(f"{base.name} is unavailable"):
        cfg, architecture, arguments = read(found["id"])
    size = base.input_size or tuple(cfg.get("input_size", (3, 224, 224)))
    kwargs = {"num_classes": cfg.get("num_classes", 1000), "in_chans": size[0]} | dict(arguments or {}) | base.kwargs
    return replace(base, name=architecture, kwargs=kwargs, input_size=(kwargs["in_chans"], *size[1:]))


def _torchvision_pretrained(base: BaseModel) -> tuple[nn.Module, BaseModel]:
    from torchvision import models

    member = models.get_model_weights(base.name)[base.kwargs.get("weights", "DEFAULT")]
    plain, weights = _plain(base), Weights(kind="pretrained", path=str(member))
    classes = plain.get("num_classes")
    others = {key: value for key, value in plain.items() if key != "num_classes"}
    model = models.get_model_builder(base.name)(weights=member, **others)
    if classes not in (None, len(member.meta["categories"])):  # torchvision itself refuses another number
        given, base = model.state_dict(), replace(base, kwargs=plain, weights=weights)
        model = _torchvision_model(base)
        own = model.state_dict()
        fitting = {key: value for key, value in given.items() if key in own and value.shape == own[key].shape}
        model.load_state_dict(fitting, strict=False)
        return model, base
    return _as_module(model), replace(base, kwargs=base.kwargs | {"weights": member.name}, weights=weights)
