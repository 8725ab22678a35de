"""FLOPs of single operators from their shapes: 1 MAC = 2 FLOPs.

Counted are the multiply-accumulates of matrix products, convolutions, sampling and multiply-then-sum. By convention (that of
fvcore, ptflops and the papers) biases, normalizations, activations, pooling, interpolation and elementwise arithmetic count
as zero. An operator in neither group is *unknown*: it is listed, never silently zero.
"""

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from surgeon.errors import SurgeonError

Formula = Callable[..., int]  # (out, *args, **kwargs) -> FLOPs; only the shapes of tensors are read


class UnknownOperatorError(SurgeonError):
    """With `strict`, the counter found an operator without a FLOP formula."""

    exit_code = 1


_FORMULAS: dict[str, Formula] = {}


def register_formula(*names: str) -> Callable[[Formula], Formula]:
    """Decorator: `formula(out, *args, **kwargs)` returns the FLOPs of the named operators (`namespace::name`, all overloads)."""

    def add(formula: Formula) -> Formula:
        for name in names:
            _FORMULAS[name] = formula
        return formula

    return add


def convolution_macs(x: Tensor, weight: Tensor, out: Tensor, transposed: bool = False) -> int:
    """MACs of a convolution of any dimension and grouping; weight (C_out, C_in/g, …), transposed (C_in, C_out/g, …)."""
    spatial = (x if transposed else out).shape[2:]
    return x.shape[0] * prod(spatial) * weight.numel()


@register_formula(
    "aten::convolution", "aten::_convolution", "aten::cudnn_convolution", "aten::convolution_overrideable"
)
def _convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *rest: Any,
    **kwargs: Any,
) -> int:
    return 2 * convolution_macs(x, weight, out, transposed)


@register_formula("aten::convolution_backward")
def _convolution_backward(
    out: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: list[bool],
) -> int:
    # The gradients of input and weight pair the same elements as the forward pass, for any grouping (torch's own
    # formula treats grouped weight gradients as dense).
    return 2 * convolution_macs(x, weight, grad, transposed) * (output_mask[0] + output_mask[1])


@register_formula("aten::mv")
def _mv(out: Tensor, a: Tensor, b: Tensor) -> int:
    return 2 * a.numel()


@register_formula("aten::addmv")
def _addmv(out: Tensor, c: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> int:
    return 2 * a.numel()


@register_formula("aten::dot", "aten::vdot")
def _dot(out: Tensor, a: Tensor, b: Tensor) -> int:
    return 2 * a.numel()


@register_formula("aten::addcmul", "aten::addcmul_")
def _addcmul(out: Tensor, c: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> int:
    return 2 * out.numel()


_TAPS = {0: 4, 1: 0, 2: 20}  # MACs per sample: bilinear; nearest copies; bicubic, four rows of four and their sum


@register_formula("aten::grid_sampler_2d", "aten::cudnn_grid_sampler")
def _grid_sampler(out: Tensor, x: Tensor, grid: Tensor, interpolation: int = 0, *rest: Any) -> int:
    return 2 * _TAPS[interpolation] * out.numel()


@register_formula("aten::grid_sampler_2d_backward")
def _grid_sampler_backward(
    out: Any, grad: Tensor, x: Tensor, grid: Tensor, interpolation: int, padding: int, corners: bool, output_mask: Any
) -> int:
    # Gradient of x: the same taps, scattered; of the grid: the same taps with the two derivatives of their weights.
    return 2 * _TAPS[interpolation] * grad.numel() * (bool(output_mask[0]) + 2 * bool(output_mask[1]))


@register_formula("torchvision::deform_conv2d")
def _deform_conv2d(out: Tensor, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, *rest: Any) -> int:
    return 2 * (convolution_macs(x, weight, out) + _deform_samples(out, x, weight) * (4 + bool(rest[-1])))


@register_formula("torchvision::_deform_conv2d_backward")
def _deform_conv2d_backward(
    out: Any, grad: Tensor, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, *rest: Any
) -> int:
    # Gradients of columns and weight, each one convolution. Per sample: sampled again (4, for the weight), scattered (4),
    # differentiated by two offsets (8); with a mask one product in each of the three and its own gradient (4).
    samples = _deform_samples(grad, x, weight)
    return 2 * (2 * convolution_macs(x, weight, grad) + samples * (16 + 7 * bool(rest[-1])))


def _deform_samples(out: Tensor, x: Tensor, weight: Tensor) -> int:
    return x.shape[0] * x.shape[1] * prod(weight.shape[2:]) * prod(out.shape[2:])


_ADAPTIVE_SAMPLES = 2  # samples per side of a bin, assumed if each region chooses its own number


@register_formula("torchvision::roi_align")
def _roi_align(
    out: Tensor, x: Tensor, rois: Tensor, scale: float, height: Any, width: Any, samples: int, *rest: Any
) -> int:
    return 2 * 4 * out.numel() * (samples if samples > 0 else _ADAPTIVE_SAMPLES) ** 2


@register_formula("torchvision::_roi_align_backward")
def _roi_align_backward(out: Tensor, grad: Tensor, *rest: Any) -> int:
    samples = int(rest[-2])
    return 2 * 4 * grad.numel() * (samples if samples > 0 else _ADAPTIVE_SAMPLES) ** 2


# Operators without multiply-accumulates. Pointwise operators and views are recognized by their tags.
_ZERO_NAMES = """
_adaptive_avg_pool2d _adaptive_avg_pool2d_backward _assert_async _assert_scalar _batch_norm_with_update
_fused_rms_norm _fused_rms_norm_backward _local_scalar_dense _log_softmax _log_softmax_backward_data
_native_batch_norm_legit _native_batch_norm_legit_no_training _pdist_forward _prelu_kernel _prelu_kernel_backward
_reshape_copy _safe_softmax _softmax _softmax_backward_data _to_copy _unique2 _unsafe_index _unsafe_index_put
_unsafe_view _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward _upsample_bilinear2d_aa
_upsample_bilinear2d_aa_backward adaptive_max_pool2d adaptive_max_pool2d_backward all amax amin aminmax any arange
argmax argmin argsort as_strided_copy avg_pool1d avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward
batch_norm_backward bernoulli_ binary_cross_entropy binary_cross_entropy_backward
binary_cross_entropy_with_logits bincount bucketize can_cast cat
cauchy_ channel_shuffle clone col2im constant_pad_nd copy copy_ count_nonzero cummax cumprod cumsum diag_embed
diagonal_backward div_ dropout elu_backward embedding embedding_dense_backward empty empty_like empty_strided
exponential_ eye fill fill_ flip floor_divide full full_like gather gelu_backward geometric_ glu glu_backward hardshrink_backward
hardsigmoid_backward hardswish hardswish_backward hardtanh_backward huber_loss huber_loss_backward im2col index index_add
index_fill index_put index_put_ index_select index_select_backward is_same_size isin leaky_relu_backward lerp
lift_fresh lift_fresh_copy linalg_vector_norm linspace log_normal_ log_sigmoid_backward logit_backward logsumexp
masked_fill masked_fill_ masked_scatter masked_select max max_pool1d max_pool2d max_pool2d_with_indices
max_pool2d_with_indices_backward max_pool3d_with_indices max_pool3d_with_indices_backward max_unpool2d mean median
min mish_backward mse_loss mse_loss_backward multinomial nansum native_batch_norm native_batch_norm_backward
native_channel_shuffle native_dropout native_dropout_backward native_group_norm native_group_norm_backward
native_layer_norm native_layer_norm_backward new_empty new_empty_strided new_full new_ones new_zeros
nll_loss2d_backward nll_loss2d_forward nll_loss_backward nll_loss_forward nonzero norm normal normal_ one_hot ones
ones_like pad_sequence pixel_shuffle pixel_unshuffle pow prod promote_types rand rand_like randint randint_like
randn randn_like random_ randperm range record_stream reflection_pad1d reflection_pad1d_backward reflection_pad2d
reflection_pad2d_backward renorm repeat repeat_interleave replication_pad2d replication_pad2d_backward result_type
roll rrelu_with_noise scalar_tensor scatter scatter_ scatter_add scatter_reduce select_backward select_scatter set_
sigmoid_backward silu_backward slice_backward slice_scatter smooth_l1_loss smooth_l1_loss_backward softplus_backward
softshrink_backward sort split_with_sizes_copy stack std std_mean sum tanh_backward threshold_backward topk tril
triu unfold_backward uniform_ unsqueeze_copy upsample_bicubic2d upsample_bicubic2d_backward upsample_bilinear2d
upsample_bilinear2d_backward upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest2d_backward
upsample_trilinear3d value_selecting_reduction_backward var var_mean vector_norm view_copy where zero_ zeros
zeros_like
"""
_ZERO = frozenset(_ZERO_NAMES.split())
_ZERO_ELSEWHERE = frozenset({"torchvision::nms", "prims::_make_token", "profiler::_record_function_enter_new"})


def is_zero(op: OpOverload) -> bool:
    """Whether the operator is known to have no multiply-accumulates."""
    if op.is_view or torch.Tag.pointwise in op.tags:
        return True
    namespace, name = op._schema.name.split("::")
    if namespace != "aten":
        return op._schema.name in _ZERO_ELSEWHERE
    plain = name.removesuffix("_")  # some in-place operators lack the tag of their functional form
    if name in _ZERO or plain in _ZERO or name.startswith("_foreach_"):
        return True
    form = getattr(torch.ops.aten, plain, None)
    return form is not None and any(torch.Tag.pointwise in getattr(form, o).tags for o in form.overloads())


class FlopCounter:
    """Counts the FLOPs of operators as they are dispatched; `unknown` lists those without a formula, with call counts.

    A product `a * b` whose elements all go into a `sum` is one contraction: 2 FLOPs per element.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.unknown: Counter[str] = Counter()
        self._formula: dict[OpOverload, Formula | None] = {}
        self._products: dict[int, int] = {}  # storage -> elements of the product that it holds

    def forget(self, storage: int) -> None:
        """Note that a new tensor is stored at this address."""
        self._products.pop(storage, None)

    def count(self, op: OpOverload, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """FLOPs of one call; raises `UnknownOperatorError` when strict."""
        if op not in self._formula:
            self._formula[op] = self._look_up(op)
        formula = self._formula[op]
        return 0 if formula is None else formula(out, *args, **kwargs)

    def note_product(self, op: OpOverload, out: Any) -> None:
        """Record a product; call it after `forget` for the outputs of the same call."""
        if op is torch.ops.aten.mul.Tensor and isinstance(out, Tensor) and out.is_floating_point():
            self._products[out.untyped_storage()._cdata] = out.numel()

    def _look_up(self, op: OpOverload) -> Formula | None:
        name = op._schema.name
        if name in _FORMULAS:
            return _FORMULAS[name]
        theirs = flop_registry.get(op.overloadpacket)
        if theirs is not None:
            return lambda out, *args, **kwargs: int(theirs(*args, **kwargs, out_val=out))
        if name == "aten::sum":
            return self._sum
        if is_zero(op):
            return None
        return self._unknown(name)

    def _sum(self, out: Tensor, x: Tensor, *rest: Any, **kwargs: Any) -> int:
        elements = self._products.get(x.untyped_storage()._cdata)
        return 2 * elements if elements == x.numel() else 0

    def _unknown(self, name: str) -> Formula:
        def listed(out: Any, *args: Any, **kwargs: Any) -> int:
            if self.strict:
                raise UnknownOperatorError(
                    f"no FLOP formula for the operator {name}; register one with surgeon.costs.register_formula({name!r}), "
                    "or count without strict to list it instead"
                )
            self.unknown[name] += 1
            return 0

        return listed
