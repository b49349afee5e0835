"""The Triton backend: the fused kernels of this folder as operators, on NVIDIA GPUs from Ampere on.

Triton itself is imported when a kernel is first launched, as it is not there on every platform.
"""

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitnet_train.kernels.backend import Quantised, WeightCodes
from bitnet_train.kernels.operators import matmul_fake, operator, quantise_fake
from bitnet_train.kernels.reference import FLOATS, ReferenceBackend, check_width
from bitnet_train.quant.activations import TokenCodes
from bitnet_train.quant.gradients import FP8
from bitnet_train.quant.spec import LayerQuant
from bitnet_train.quant.weights import Codes

# Of compute capability: int8 tensor cores with the layouts the kernels use; fp8 tensor cores.
OLDEST, OLDEST_FP8 = (8, 0), (8, 9)
ANY_DEVICE = "CompositeExplicitAutograd"


class TritonBackend(ReferenceBackend):
    """What the kernels do not cover (float64, and fp8 before Ada) runs as in the reference."""

    name = "triton"
    device_types: tuple[str, ...] | None = ("cuda",)

    def unsupported(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it needs a CUDA device, not {device.type}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if torch.version.hip:
            return "its kernels are written for NVIDIA GPUs"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {capability[0]}.{capability[1]}"
        return None

    def quantise_weight(
        self,
        weight: Tensor,
        layer: LayerQuant,
        codes: Tensor | None = None,
        backward: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Codes:
        known = layer.scheme != "symmetric" and layer.statistic == "absmean" and scale is None
        if not known or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return super().quantise_weight(weight, layer, codes, backward, scale)
        kernels, groups = _kernels("weights"), layer.group_count(weight.shape[0])
        if codes is None:
            codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        if layer.scheme == "binary":
            return Codes(codes, kernels.binarise_into(weight, groups, codes, backward))
        scale = kernels.absmean_scale(weight, groups)
        kernels.ternarise_into(weight, scale, layer.threshold, codes, backward)
        assert scale is not None
        return Codes(codes, scale)

    def backward_layout(self, codes_w: Tensor, dx: str) -> Tensor | None:
        # int8 and fp8 tensor cores contract along contiguous elements, which for dX are the weights' output rows.
        if dx == "int8":
            return codes_w.t().contiguous()
        return _as_fp8(codes_w.t()) if dx == "fp8" and _has_fp8(codes_w.device) else None

    def quantise(self, x: Tensor, delta: Tensor | None, norm_weight: Tensor | None, eps: float) -> Quantised:
        if any(t is not None and t.dtype is torch.float64 for t in (x, delta)):
            return super().quantise(x, delta, norm_weight, eps)
        codes, scale, rstd, stream = torch.ops.bitnet_train.triton_quantise(x, delta, norm_weight, eps)
        return Quantised(
            TokenCodes(codes, scale), x if delta is None else stream, None if norm_weight is None else rstd
        )

    def matmul(self, x: TokenCodes, w: WeightCodes, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        check_width(x.codes)
        if out_dtype is torch.float64:
            return super().matmul(x, w, bias, out_dtype)
        if w.packed:
            packed: Tensor = _kernels("matmul").int8_matmul_packed(
                x.codes, w.codes, x.scale, w.row_scale, bias, out_dtype
            )
            return packed
        product: Tensor = torch.ops.bitnet_train.triton_matmul(x.codes, x.scale, w.codes, w.row_scale, bias, out_dtype)
        return product

    def grad_input(self, grads: Sequence[Tensor], w: WeightCodes, dx: str, out_dtype: torch.dtype) -> Tensor:
        if dx == "fp64" or out_dtype is torch.float64 or (dx == "fp8" and not _has_fp8(w.codes.device)):
            return super().grad_input(grads, w, dx, out_dtype)
        grad_x: Tensor = torch.ops.bitnet_train.triton_grad_input(
            _side_by_side(grads), w.codes, w.row_scale, w.backward, dx, out_dtype
        )
        return grad_x

    def grad_weight(self, grads: Sequence[Tensor], x: TokenCodes, dw: str) -> list[Tensor]:
        if dw == "fp64":
            return super().grad_weight(grads, x, dw)
        grad = _side_by_side(grads)
        grad_w: Tensor = torch.ops.bitnet_train.triton_grad_weight(grad, x.codes, x.scale, dw)
        return list(torch.split(grad_w, [part.shape[1] for part in grads]))

    def grad_norm(
        self, grad: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, grad_stream: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if torch.float64 in (grad.dtype, stream.dtype):
            return super().grad_norm(grad, stream, weight, rstd, grad_stream)
        grad_x, grad_weight = torch.ops.bitnet_train.triton_grad_norm(grad, stream, weight, rstd, grad_stream)
        return grad_x, grad_weight


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"bitnet_train.kernels.triton.{module}")


def _side_by_side(grads: Sequence[Tensor]) -> Tensor:
    return grads[0] if len(grads) == 1 else torch.cat(list(grads), dim=1)


def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST_FP8


def _as_fp8(codes: Tensor) -> Tensor:
    """-1, 0 and 1 as float8_e4m3fn, exactly."""
    return codes.float().to(FP8).contiguous()


@operator(
    "triton_quantise(Tensor x, Tensor? delta, Tensor? norm, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    quantise_fake,
    ANY_DEVICE,
)
def _quantise(
    x: Tensor, delta: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, stream, rstd = _kernels("activations").quantise(x, delta, norm, eps)
    # An operator returns tensors: empty ones stand for what was not asked for.
    nothing = x.new_empty((0,), dtype=torch.float32)
    return codes, scale, nothing if rstd is None else rstd, x.new_empty((0,)) if stream is None else stream


@operator(
    "triton_matmul(Tensor codes, Tensor scale, Tensor codes_w, Tensor row_scale, Tensor? bias, ScalarType out_dtype)"
    " -> Tensor",
    matmul_fake,
    ANY_DEVICE,
)
def _matmul(
    codes: Tensor, scale: Tensor, codes_w: Tensor, row_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    product: Tensor = _kernels("matmul").int8_matmul(codes, codes_w, scale, row_scale, bias, out_dtype)
    return product


def _grad_input_fake(
    grad: Tensor, codes_w: Tensor, row_scale: Tensor, backward: Tensor | None, dx: str, out_dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((grad.shape[0], codes_w.shape[1]), dtype=out_dtype)


@operator(
    "triton_grad_input(Tensor grad, Tensor codes_w, Tensor row_scale, Tensor? backward, str dx, ScalarType out_dtype)"
    " -> Tensor",
    _grad_input_fake,
    ANY_DEVICE,
)
def _grad_input(
    grad: Tensor, codes_w: Tensor, row_scale: Tensor, backward: Tensor | None, dx: str, out_dtype: torch.dtype
) -> Tensor:
    matmul = _kernels("matmul")
    product: Tensor
    if dx in FLOATS:
        product = matmul.bf16_matmul_codes(grad.to(FLOATS[dx]), row_scale, codes_w, out_dtype)
        return product
    rows = _kernels("gradients").quantise_rows
    if dx == "int8":
        codes, scale = rows(grad, row_scale)
        columns = backward if backward is not None else codes_w.t().contiguous()
        product = matmul.int8_matmul(codes, columns, scale, None, None, out_dtype)
        return product
    codes, scale = rows(grad, row_scale, FP8)
    columns = backward if backward is not None and backward.dtype is FP8 else _as_fp8(codes_w.t())
    product = matmul.fp8_matmul(codes, columns, scale, None, out_dtype)
    return product


def _grad_weight_fake(grad: Tensor, codes_x: Tensor, scale_x: Tensor, dw: str) -> Tensor:
    return scale_x.new_empty((grad.shape[1], codes_x.shape[1]))


@operator(
    "triton_grad_weight(Tensor grad, Tensor codes_x, Tensor scale_x, str dw) -> Tensor", _grad_weight_fake, ANY_DEVICE
)
def _grad_weight(grad: Tensor, codes_x: Tensor, scale_x: Tensor, dw: str) -> Tensor:
    kernels = _kernels("weight_gradient")
    grad_w: Tensor
    if dw in FLOATS:
        grad_w = kernels.weight_gradient(grad, codes_x, scale_x, FLOATS[dw])
    else:
        codes, scale = _kernels("gradients").quantise_blocks(grad, scale_x)
        grad_w = kernels.block_weight_gradient(codes, scale, codes_x)
    return grad_w


def _grad_norm_fake(
    grad: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, grad_stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    return stream.new_empty(stream.shape), rstd.new_empty(weight.shape)


@operator(
    "triton_grad_norm(Tensor grad, Tensor stream, Tensor weight, Tensor rstd, Tensor? grad_stream) -> (Tensor, Tensor)",
    _grad_norm_fake,
    ANY_DEVICE,
)
def _grad_norm(
    grad: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, grad_stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    grads: tuple[Any, Any] = _kernels("activations").norm_backward(grad, stream, weight, rstd, grad_stream)
    return grads
