"""Makes the meta device dispatch like CUDA: autocast, fused dropout, fused attention.

On meta tensors PyTorch ignores autocast and uses the CPU's composite forms, which save other tensors for backward than CUDA's.
Here, kernels with CUDA's policies are registered under a dispatch key that no backend uses, and that key is enabled for the
duration of a trace. The policies are those of `ATen/autocast_mode.h`; the operators that have one are read from the dispatcher.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_KEY = "AutocastIPU"
_KEYS = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

_LOW_NAMES = """
_cudnn_rnn _scaled_dot_product_flash_attention _thnn_fused_gru_cell _thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm
    _convolution chain_matmul conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution
    cudnn_convolution cudnn_convolution_transpose einsum gru_cell linalg_multi_dot linalg_vecdot linear lstm_cell matmul mm mv prelu
    rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention
"""
_LOW = frozenset(_LOW_NAMES.split())
_PROMOTE_NAMES = "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot"
_PROMOTE = frozenset(_PROMOTE_NAMES.split())
_DTYPE_NAMES = "prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum"
_DTYPE_ARGUMENT = frozenset(_DTYPE_NAMES.split())
# Everything else that CUDA registers for autocast runs in float32.


class _State:
    """The current emulation: the autocast dtype (None: off), and its casts of weights by identity, until autocast ends."""

    def __init__(self) -> None:
        self.active = False
        self.dtype: torch.dtype | None = None
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}
        self.registered: set[str] = set()
        self.known = 0  # number of operators when kernels were last registered
        self.libraries: dict[str, torch.library.Library] = {}


_STATE = _State()


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point() or value.dtype in (dtype, torch.float64):
        return value
    cacheable = dtype is _STATE.dtype and value.dtype is torch.float32 and value.requires_grad and value.is_leaf
    if not cacheable or value._is_view():
        return value.to(dtype)
    key = id(value)
    if key not in _STATE.weights:
        _STATE.weights[key] = (value, value.to(dtype))  # holding the weight keeps its id from being reused
    return _STATE.weights[key][1]


def _policy(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """The autocast policy for an operator's arguments."""

    def low(args: Any, kwargs: Any) -> Any:
        dtype = _STATE.dtype
        return (args, kwargs) if dtype is None else tree_map_only(Tensor, lambda t: _cast(t, dtype), (args, kwargs))

    def full(args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: _cast(t, torch.float32), (args, kwargs))

    def promote(args: Any, kwargs: Any) -> Any:
        found: list[torch.dtype] = []
        tree_map_only(Tensor, lambda t: found.append(t.dtype), (args, kwargs))
        return full(args, kwargs) if torch.float32 in found else low(args, kwargs)

    def dtype_argument(args: Any, kwargs: Any) -> Any:
        given = kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args)
        eligible = args[0].is_floating_point() and args[0].dtype is not torch.float64
        return (args, {**kwargs, "dtype": torch.float32}) if eligible and not given else (args, kwargs)

    if name in _LOW:
        return low
    if name in _PROMOTE:
        return promote
    return dtype_argument if name in _DTYPE_ARGUMENT else full


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    if train and 0 < p < 1 and x.numel() > 0:
        return torch.native_dropout(x, p, True)[0]
    out: Tensor = torch.ops.aten.dropout.default(x, p, train)
    return out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """CUDA's choice, simplified: flash for half precision without a mask, else memory-efficient; neither saves the scores."""
    fits = query.dim() == 4 and query.shape[-1] == value.shape[-1] and query.shape[-1] <= 256
    aten = torch.ops.aten
    if fits and attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):  # grouped queries, too
        out: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out
    if fits and not enable_gqa:
        mask = attn_mask
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        if mask is not None:
            mask = mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout_p, is_causal, scale=scale
        )[0]
        return out
    kwargs = {"scale": scale, "enable_gqa": enable_gqa}
    out = aten.scaled_dot_product_attention.default(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    return out


_INSTEAD: dict[str, Callable[..., Any]] = {
    "aten::dropout": _dropout,
    "aten::scaled_dot_product_attention": _attention,
}


def _kernel(qualified: str) -> Callable[..., Any]:
    namespace, name = qualified.split("::")
    packet, _, overload = name.partition(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    run = _INSTEAD.get(qualified, op)
    # custom operators: as `register_autocast` does
    cast = _policy(packet) if namespace == "aten" else _policy("linear")
    has_policy = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "AutocastCUDA")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if _STATE.dtype is not None and has_policy:
                args, kwargs = cast(args, kwargs)
            return run(*args, **kwargs)

    return kernel


def _register() -> None:
    """Register a kernel for every operator that autocasts on CUDA and is known by now."""
    if not _STATE.registered:
        library = torch.library.Library("_", "IMPL", _KEY)
        library.fallback(torch.library.fallthrough_kernel)
        _STATE.libraries["_"] = library
    names = torch._C._dispatch_get_all_op_names()
    if len(names) == _STATE.known:
        return
    _STATE.known = len(names)
    for qualified in names:
        wanted = qualified in _INSTEAD or torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "AutocastCUDA")
        if not wanted or qualified in _STATE.registered:
            continue
        namespace, name = qualified.split("::")
        if namespace not in _STATE.libraries:
            _STATE.libraries[namespace] = torch.library.Library(namespace, "IMPL")
        _STATE.libraries[namespace].impl(name, _kernel(qualified), _KEY)
        _STATE.registered.add(qualified)


@contextmanager
def _answering_for_meta() -> Iterator[None]:
    """Make torch's autocast queries, and regions that disable autocast, answer for the meta device."""
    enabled, lower, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    available = torch.amp.is_autocast_available
    emulated = ("meta", "cuda")

    def is_autocast_enabled(device_type: str | None = None) -> bool:
        if device_type is None or device_type in emulated:
            return _STATE.dtype is not None
        return bool(enabled(device_type))

    def get_autocast_dtype(device_type: str) -> torch.dtype:
        return _STATE.dtype or torch.float16 if device_type in emulated else lower(device_type)

    def region(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **rest: Any) -> Any:
        if device_type not in emulated:
            return autocast(device_type, dtype=dtype, enabled=enabled, **rest)
        return _region((dtype or _STATE.dtype or torch.float16) if enabled else None)

    def is_autocast_available(device_type: str) -> bool:
        return device_type in emulated or available(device_type)

    patches: list[tuple[Any, str, Any]] = [
        (torch, "is_autocast_enabled", is_autocast_enabled),
        (torch, "get_autocast_dtype", get_autocast_dtype),
        (torch, "autocast", region),
        (torch.amp, "autocast", region),
        (torch.amp, "is_autocast_available", is_autocast_available),
    ]
    before = [getattr(module, name) for module, name, _ in patches]
    try:
        for module, name, function in patches:
            setattr(module, name, function)
        yield
    finally:
        for (module, name, _), function in zip(patches, before, strict=True):
            setattr(module, name, function)


@contextmanager
def _region(dtype: torch.dtype | None) -> Iterator[None]:
    outer, _STATE.dtype = _STATE.dtype, dtype
    try:
        yield
    finally:
        _STATE.dtype = outer


@contextmanager
def cuda_dispatch(dtype: torch.dtype | None) -> Iterator[None]:
    """Dispatch meta tensors like CUDA tensors, under autocast to `dtype` (None: no autocast).

    torch's own autocast functions answer for the meta device meanwhile. Reentrant; the casts of weights are dropped when the
    outermost context ends, as under autocast.
    """
    _register()
    outer = (_STATE.active, _STATE.dtype)
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    _STATE.active, _STATE.dtype = True, dtype
    try:
        with _answering_for_meta(), torch._C._ForceDispatchKeyGuard(include | _KEYS, exclude - _KEYS):
            yield
    finally:
        _STATE.active, _STATE.dtype = outer
        if not _STATE.active:
            _STATE.weights.clear()


class _CopyToMeta(TorchFunctionMode):
    """Makes a deep copy drop the data of tensors that are neither parameters nor buffers, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return _meta(args[0])
        return func(*args, **(kwargs or {}))


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, made without copying any data; tied parameters stay tied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        like = _meta(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            like = nn.Parameter(like, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = like
    with _CopyToMeta():
        return deepcopy(model, memo)


def to_channels_last(model: nn.Module) -> None:
    """Convert all four-dimensional parameters and buffers to channels last, in place; others do not change."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
