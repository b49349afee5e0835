"""The public op: RMSNorm (optional) -> int8 codes -> one matmul with ternary codes -> floats, and its gradients.

Several linear layers that read the same input are one call: the input is quantised once, the code matrices are stacked
along their output rows for one matmul, while the parameters stay separate and each receives its own gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet_train.kernels.backend import Backend, choose_backend, register_backend
from bitnet_train.kernels.cpu import CpuBackend
from bitnet_train.kernels.reference import ReferenceBackend
from bitnet_train.quant.activations import TokenCodes, rms_norm

register_backend(ReferenceBackend())
register_backend(CpuBackend())


def bit_linear(
    x: Tensor,
    codes_w: Tensor,
    row_scale: Tensor,
    masters: Sequence[Tensor | None],
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    activation_bits: int | None = 8,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Quantise ``x`` and multiply it with ternary or binary weights.

    Args:
        x: input (..., K), any float dtype.
        codes_w: int8 (N, K), the codes of one layer or of several stacked along the rows.
        row_scale: float32 (N,), the scale of every output row.
        masters: the master weights that the codes came from, in stacking order, rows summing to N; they receive the
            gradients and are not read. ``[None]`` for weights that exist only as codes.
        norm_weight: (K,), for an RMSNorm before the quantiser; norm and quantiser are one float32 operation.
        norm_eps: the norm's epsilon.
        activation_bits: 8, or None to multiply the float input with ``codes_w * row_scale``.
        out_dtype: type of the result and of the gradient matmuls; the autocast type or the type of ``x`` by default.
        backend: from :func:`choose_backend`; the automatic choice for the device of ``x`` by default.

    Returns:
        (..., N) in ``out_dtype``. A token with a NaN or an infinity gives a row of NaN.

    Gradients pass straight through both quantisers (BitNet, arXiv 2310.11453, section 2.2), nothing masked::

        dX = (dY * row_scale) @ codes_w          dW = dY.T @ (codes_x * scale_x)
    """
    if out_dtype is None:
        out_dtype = compute_dtype(x)
    if backend is None:
        backend = choose_backend(x.device).backend
    flat = x.reshape(-1, x.shape[-1])
    if activation_bits is None:
        y = _WeightOnlyLinear.apply(
            flat if norm_weight is None else rms_norm(flat, norm_weight, norm_eps)[0],
            codes_w, row_scale, out_dtype, backend, *masters,
        )  # fmt: skip
    else:
        y = _BitLinear.apply(flat, norm_weight, norm_eps, codes_w, row_scale, out_dtype, backend, *masters)
    return y.reshape(*x.shape[:-1], codes_w.shape[0])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type a matmul on ``x`` would run in: autocast's when it is on, otherwise that of ``x``."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _split_rows(
    grad: Tensor, masters: Sequence[Tensor | None], shapes: Sequence[tuple[int, torch.dtype]]
) -> list[Tensor]:
    parts = torch.split(grad, [rows for rows, _ in shapes])
    return [part.to(dtype) for part, (_, dtype) in zip(parts, shapes, strict=True)]


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_eps: float,
        codes_w: Tensor,
        row_scale: Tensor,
        out_dtype: torch.dtype,
        backend: Backend,
        *masters: Tensor | None,
    ) -> Tensor:
        codes_x, rstd = backend.quantise(x, norm_weight, norm_eps)
        y = backend.matmul(codes_x, codes_w, row_scale, out_dtype)
        # The int8 codes are all that dW needs; x itself only for the norm, where it is alive as the residual anyway.
        normed = norm_weight is not None
        ctx.save_for_backward(
            codes_x.codes, codes_x.scale, codes_w, row_scale, *((x, norm_weight, rstd) if normed else ())
        )
        ctx.normed, ctx.backend, ctx.dtype, ctx.x_dtype = normed, backend, out_dtype, x.dtype
        ctx.shapes = [(m.shape[0], m.dtype) for m in masters if m is not None]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codes, scale, codes_w, row_scale, *norm = ctx.saved_tensors
        backend: Backend = ctx.backend
        grad_x = grad_norm_weight = None
        needs_x, needs_norm = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        if needs_x or needs_norm:
            grad_x = backend.grad_input(grad, codes_w, row_scale, ctx.dtype)
            if ctx.normed:
                grad_x, grad_norm_weight = backend.grad_norm(grad_x, *norm)
                grad_norm_weight = grad_norm_weight.to(norm[1].dtype)
            grad_x = grad_x.to(ctx.x_dtype)
        grad_masters: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 7)
        if any(ctx.needs_input_grad[7:]):
            grad_w = backend.grad_weight(grad, TokenCodes(codes, scale), ctx.dtype)
            grad_masters = list(_split_rows(grad_w, grad_masters, ctx.shapes))
        return grad_x, grad_norm_weight, None, None, None, None, None, *grad_masters


class _WeightOnlyLinear(torch.autograd.Function):
    """Float activations, quantised weights (W1.58A16, the setting of TriLM, arXiv 2407.12327)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes_w: Tensor,
        row_scale: Tensor,
        out_dtype: torch.dtype,
        backend: Backend,
        *masters: Tensor | None,
    ) -> Tensor:
        x_cast = x.to(out_dtype)
        with torch.autocast(x.device.type, enabled=False):
            # Codes are exact in every float type; the scale is applied to the result, in float32.
            y = ((x_cast @ codes_w.to(out_dtype).t()).float() * row_scale).to(out_dtype)
        ctx.save_for_backward(x_cast, codes_w, row_scale)
        ctx.backend, ctx.dtype, ctx.x_dtype = backend, out_dtype, x.dtype
        ctx.shapes = [(m.shape[0], m.dtype) for m in masters if m is not None]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, codes_w, row_scale = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.backend.grad_input(grad, codes_w, row_scale, ctx.dtype).to(ctx.x_dtype)
        grad_masters: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 5)
        if any(ctx.needs_input_grad[5:]):
            with torch.autocast(grad.device.type, enabled=False):
                grad_w = grad.to(ctx.dtype).t() @ x
            grad_masters = list(_split_rows(grad_w, grad_masters, ctx.shapes))
        return grad_x, None, None, None, None, *grad_masters
