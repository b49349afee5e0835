"""The AVX-512 backend: int8 matmuls with the scales applied in registers, on x86 CPUs with VNNI instructions.

``torch._int_mm`` multiplies at the same rate, but its int32 results go through memory and their scaling, the rounding
of gradients and the quantisers around it are passes of their own, which together took longer than the multiplication.
Here each matmul is one pass that quantises what it must, and writes the final type. The C++ is compiled on first use.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet_train.kernels.avx512.build import load
from bitnet_train.kernels.backend import Quantised, WeightCodes
from bitnet_train.kernels.cpu import CpuBackend
from bitnet_train.kernels.operators import matmul_fake, operator, quantise_fake
from bitnet_train.kernels.reference import check_width
from bitnet_train.quant.activations import TokenCodes
from bitnet_train.quant.spec import LayerQuant
from bitnet_train.quant.weights import SCALE_FLOOR, Codes

# Tokens up to which weights are unpacked in registers instead of in memory; the kernel takes no more.
FEW_ROWS = 4
# The types that the kernels read and write, as their enum Type numbers them.
TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Avx512Backend(CpuBackend):
    """What the kernels do not cover (float16, float64, binary weights, float gradients) runs as in the cpu backend."""

    name = "avx512"

    def unsupported(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it needs a CPU, not {device.type}"
        library = load()
        return library if isinstance(library, str) else None

    def quantise_weight(
        self,
        weight: Tensor,
        layer: LayerQuant,
        codes: Tensor | None = None,
        backward: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Codes:
        known = layer.scheme == "ternary" and layer.statistic == "absmean" and scale is None
        if not known or weight.dtype is not torch.float32:
            return super().quantise_weight(weight, layer, codes, backward, scale)
        groups, weight = layer.group_count(weight.shape[0]), weight.detach().contiguous()
        if codes is None:
            codes = torch.empty_like(weight, dtype=torch.int8)
        assert codes.is_contiguous()
        assert backward is None
        scale, spans = torch.empty(groups), (groups, weight.numel() // groups)
        _call("absolute_means", weight, scale, SCALE_FLOOR, *spans)
        _call("ternarise", weight, scale, layer.threshold, codes, *spans)
        return Codes(codes, scale)

    def quantise(self, x: Tensor, delta: Tensor | None, norm_weight: Tensor | None, eps: float) -> Quantised:
        if x.dtype not in TYPES or (delta is not None and delta.dtype not in TYPES):
            return super().quantise(x, delta, norm_weight, eps)
        codes, scale, rstd, stream = torch.ops.bitnet_train.avx512_quantise(x, delta, norm_weight, eps)
        return Quantised(
            TokenCodes(codes, scale), x if delta is None else stream, None if norm_weight is None else rstd
        )

    def matmul(self, x: TokenCodes, w: WeightCodes, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        if out_dtype not in TYPES:
            return super().matmul(x, w, bias, out_dtype)
        check_width(x.codes)
        if w.packed:
            return torch.ops.bitnet_train.avx512_packed_matmul(x.codes, x.scale, w.codes, w.row_scale, bias, out_dtype)
        product: Tensor = torch.ops.bitnet_train.avx512_matmul(x.codes, x.scale, w.codes, w.row_scale, bias, out_dtype)
        return product

    def grad_input(self, grads: Sequence[Tensor], w: WeightCodes, dx: str, out_dtype: torch.dtype) -> Tensor:
        if dx != "int8" or grads[0].dtype not in TYPES or out_dtype not in TYPES:
            return super().grad_input(grads, w, dx, out_dtype)
        grad_x: Tensor = torch.ops.bitnet_train.avx512_grad_input(list(grads), w.codes, w.row_scale, out_dtype)
        return grad_x

    def grad_weight(self, grads: Sequence[Tensor], x: TokenCodes, dw: str) -> list[Tensor]:
        if dw != "int8" or grads[0].dtype not in TYPES:
            return super().grad_weight(grads, x, dw)
        grad_w: Tensor = torch.ops.bitnet_train.avx512_grad_weight(list(grads), x.codes, x.scale)
        return list(torch.split(grad_w, [grad.shape[1] for grad in grads]))


class _Parts:
    """Matrices (M, N_i) that a kernel reads as one, (M, sum of N_i): pointers and widths as C arrays."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = [part.contiguous() for part in parts]
        self.pointers = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in self.parts))
        self.widths = (ctypes.c_int64 * len(parts))(*(part.shape[1] for part in parts))


def _call(name: str, *arguments: Any) -> None:
    """Calls a kernel: tensors as pointers (None as null), types by number, integers as int64, then the thread count.

    The tensors must be contiguous and stay alive, which the caller's references see to.
    """
    library = load()
    assert not isinstance(library, str)
    converted: list[Any] = []
    for argument in arguments:
        if argument is None:
            converted.append(ctypes.c_void_p(0))
        elif isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, _Parts):
            converted.extend((argument.pointers, argument.widths, ctypes.c_int(len(argument.widths))))
        elif isinstance(argument, torch.dtype):
            converted.append(ctypes.c_int(TYPES[argument]))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(ctypes.c_int64(argument))
    getattr(library, name)(*converted, ctypes.c_int(torch.get_num_threads()))


# --- operators that torch.compile treats as one node each, with fake implementations that give shapes and types ---


@operator(
    "avx512_quantise(Tensor x, Tensor? delta, Tensor? norm, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    quantise_fake,
    "CPU",
)
def _quantise(
    x: Tensor, delta: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale, rstd, stream = quantise_fake(x, delta, norm, eps)
    x = x.contiguous()
    delta = None if delta is None else delta.contiguous()
    norm = None if norm is None else norm.float().contiguous()
    delta_type = x.dtype if delta is None else delta.dtype
    _call("quantise_tokens", x, x.dtype, delta, delta_type, stream, norm, eps, codes, scale, rstd, *x.shape)
    return codes, scale, rstd, stream


@operator(
    "avx512_matmul(Tensor codes, Tensor scale, Tensor codes_w, Tensor row_scale, Tensor? bias, ScalarType out_dtype)"
    " -> Tensor",
    matmul_fake,
    "CPU",
)
def _matmul(
    codes: Tensor, scale: Tensor, codes_w: Tensor, row_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    out = matmul_fake(codes, scale, codes_w, row_scale, bias, out_dtype)
    codes, scale, row_scale = codes.contiguous(), scale.contiguous(), row_scale.contiguous()
    codes_w, transposed = _rows_or_columns(codes_w)
    bias = None if bias is None else bias.float().contiguous()
    # The kernel calls a right operand (N, K) transposed, as its plain form is (K, N).
    shape = (*out.shape, codes.shape[1])
    _call("int8_matmul", codes, codes_w, not transposed, scale, row_scale, bias, out, out_dtype, *shape)
    return out


@operator(
    "avx512_packed_matmul(Tensor codes, Tensor scale, Tensor packed, Tensor row_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    matmul_fake,
    "CPU",
)
def _packed_matmul(
    codes: Tensor, scale: Tensor, packed: Tensor, row_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    (m, k), packed = codes.shape, packed.contiguous()
    if m > FEW_ROWS:  # worth unpacking once, a layer at a time
        codes_w = torch.empty(packed.shape[0], k, dtype=torch.int8)
        _call("unpack_codes", packed, codes_w, *codes_w.shape)
        return _matmul(codes, scale, codes_w, row_scale, bias, out_dtype)
    out = matmul_fake(codes, scale, packed, row_scale, bias, out_dtype)
    codes, scale, row_scale = codes.contiguous(), scale.contiguous(), row_scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    _call("packed_matmul", codes, packed, scale, row_scale, bias, out, out_dtype, *out.shape, k)
    return out


def _rows_or_columns(codes_w: Tensor) -> tuple[Tensor, bool]:
    """Codes (N, K) that are contiguous, or whose transpose is, which is then returned with True."""
    if codes_w.is_contiguous() or not codes_w.t().is_contiguous():
        return codes_w.contiguous(), False
    return codes_w.t(), True


def _grad_input_fake(grads: list[Tensor], codes_w: Tensor, row_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return codes_w.new_empty((grads[0].shape[0], codes_w.shape[1]), dtype=out_dtype)


@operator(
    "avx512_grad_input(Tensor[] grads, Tensor codes_w, Tensor row_scale, ScalarType out_dtype) -> Tensor",
    _grad_input_fake,
    "CPU",
)
def _grad_input(grads: list[Tensor], codes_w: Tensor, row_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    out = _grad_input_fake(grads, codes_w, row_scale, out_dtype)
    codes_w, transposed = _rows_or_columns(codes_w)
    n = codes_w.shape[1 if transposed else 0]
    by = row_scale.contiguous()
    _call("gradient_matmul", _Parts(grads), grads[0].dtype, by, codes_w, transposed, out, out_dtype, *out.shape, n)
    return out


def _grad_weight_fake(grads: list[Tensor], codes_x: Tensor, scale_x: Tensor) -> Tensor:
    return scale_x.new_empty((sum(grad.shape[1] for grad in grads), codes_x.shape[1]))


@operator("avx512_grad_weight(Tensor[] grads, Tensor codes_x, Tensor scale_x) -> Tensor", _grad_weight_fake, "CPU")
def _grad_weight(grads: list[Tensor], codes_x: Tensor, scale_x: Tensor) -> Tensor:
    out = _grad_weight_fake(grads, codes_x, scale_x)
    codes_x, scale_x = codes_x.contiguous(), scale_x.contiguous()
    _call("block_weight_gradient", _Parts(grads), grads[0].dtype, scale_x, codes_x, out, len(codes_x), *out.shape)
    return out
