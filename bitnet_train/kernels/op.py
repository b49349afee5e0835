"""The public op: RMSNorm (optional) -> int8 codes -> one matmul with ternary codes -> floats, and its gradients.

Several linear layers that read the same input are one call: the input is quantised once, the code matrices are stacked
along their output rows for one matmul, while the parameters stay separate and each receives its own gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet_train.kernels.avx512.backend import Avx512Backend
from bitnet_train.kernels.backend import BACKENDS, Backend, WeightCodes, choose_backend, register_backend
from bitnet_train.kernels.cpu import CpuBackend
from bitnet_train.kernels.reference import FLOATS, ReferenceBackend
from bitnet_train.quant.activations import TokenCodes, rms_norm
from bitnet_train.quant.spec import GradientPolicy

register_backend(ReferenceBackend())
register_backend(CpuBackend())
register_backend(Avx512Backend())


def bit_linear(
    x: Tensor,
    codes_w: Tensor,
    row_scale: Tensor,
    masters: Sequence[Tensor | None],
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    activation_bits: int | None = 8,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    gradient: GradientPolicy = GradientPolicy(),  # noqa: B008  (frozen)
    backward_codes: Tensor | None = None,
) -> Tensor:
    """Quantise ``x`` and multiply it with ternary or binary weights.

    Args:
        x: input (..., K), any float dtype.
        codes_w: int8 (N, K), the codes of one layer or of several stacked along the rows.
        row_scale: float32 (N,), the scale of every output row.
        masters: the master weights that the codes came from, in stacking order, rows summing to N; they receive the
            gradients and are not read. ``[None]`` for weights that exist only as codes.
        bias: (N,), added in float32 after dequantisation.
        norm_weight: (K,), for an RMSNorm before the quantiser; norm and quantiser are one float32 operation.
        norm_eps: the norm's epsilon.
        activation_bits: 8, or None to multiply the float input with ``codes_w * row_scale``.
        out_dtype: type of the result and of the gradient matmuls; the autocast type or the type of ``x`` by default.
        backend: from :func:`choose_backend`; the automatic choice for the device of ``x`` by default.
        gradient: precision of the two gradient matmuls.
        backward_codes: the codes in the backend's backward layout, when the caller keeps them.

    Returns:
        (..., N) in ``out_dtype``. A token with a NaN or an infinity gives a row of NaN.

    Gradients pass straight through both quantisers (BitNet, arXiv 2310.11453, section 2.2), nothing masked::

        dX = (dY * row_scale) @ codes_w          dW = dY.T @ (codes_x * scale_x)
    """
    y, _ = bit_linear_residual(
        x, None, codes_w, row_scale, masters, bias=bias, norm_weight=norm_weight, norm_eps=norm_eps,
        activation_bits=activation_bits, out_dtype=out_dtype, backend=backend, gradient=gradient,
        backward_codes=backward_codes,
    )  # fmt: skip
    return y


def bit_linear_residual(
    x: Tensor,
    delta: Tensor | None,
    codes_w: Tensor,
    row_scale: Tensor,
    masters: Sequence[Tensor | None],
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    activation_bits: int | None = 8,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    gradient: GradientPolicy = GradientPolicy(),  # noqa: B008  (frozen)
    backward_codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`bit_linear` of the residual stream ``x + delta``, which is returned as well, in the type of ``x``.

    ``delta`` (..., K) is what the layers before add to the stream ``x`` (..., K), or None for nothing; adding it is
    part of the input quantiser's one pass over memory.
    """
    if out_dtype is None:
        out_dtype = compute_dtype(x)
    if backend is None:
        backend = BACKENDS[_default_backend(x.device.type)]
    flat = x.reshape(-1, x.shape[-1])
    flat_delta = None if delta is None else delta.reshape(flat.shape)
    if activation_bits is None:
        stream = flat if flat_delta is None else (flat.float() + flat_delta.float()).to(flat.dtype)
        y = _WeightOnlyLinear.apply(
            stream if norm_weight is None else rms_norm(stream, norm_weight, norm_eps)[0],
            bias, codes_w, row_scale, backward_codes, out_dtype, backend, gradient, *masters,
        )  # fmt: skip
    else:
        y, stream = _BitLinear.apply(
            flat, flat_delta, norm_weight, bias, codes_w, row_scale, backward_codes, norm_eps, out_dtype, backend,
            gradient, *masters,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], codes_w.shape[0]), x if delta is None else stream.reshape(x.shape)


@torch.compiler.assume_constant_result
def _default_backend(device: str) -> str:
    # torch.compile takes the answer and does not look into how compilers are searched for.
    return choose_backend(device).backend.name


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type a matmul on ``x`` would run in: autocast's when it is on, otherwise that of ``x``."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


_COMPUTE = {dtype: name for name, dtype in FLOATS.items()}


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
        delta: Tensor | None,
        norm_weight: Tensor | None,
        bias: Tensor | None,
        codes_w: Tensor,
        row_scale: Tensor,
        backward_codes: Tensor | None,
        norm_eps: float,
        out_dtype: torch.dtype,
        backend: Backend,
        gradient: GradientPolicy,
        *masters: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        weights = WeightCodes(codes_w, row_scale, backward_codes)
        codes_x, stream, rstd = backend.quantise(x, delta, norm_weight, norm_eps)
        y = backend.matmul(codes_x, weights, bias, out_dtype)
        # The int8 codes are all that dW needs; the stream only for the norm, where it is alive as the residual anyway.
        normed = norm_weight is not None
        ctx.save_for_backward(*codes_x, *weights, *((stream, norm_weight, rstd) if normed else ()))
        ctx.normed, ctx.backend, ctx.dtype, ctx.x_dtype = normed, backend, out_dtype, x.dtype
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.policy = gradient.resolve(_COMPUTE[out_dtype])
        ctx.shapes = [(m.shape[0], m.dtype) for m in masters if m is not None]
        ctx.set_materialize_grads(False)
        return y, None if delta is None else stream

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_stream: Tensor | None) -> tuple[Any, ...]:
        if grad is None:  # only the stream was used
            nothing = [None] * (len(ctx.needs_input_grad) - 2)
            delta = None if grad_stream is None or ctx.delta_dtype is None else grad_stream.to(ctx.delta_dtype)
            return grad_stream, delta, *nothing
        codes, scale, *rest = ctx.saved_tensors
        weights, norm = WeightCodes(*rest[:3]), rest[3:]
        backend: Backend = ctx.backend
        dx, dw = ctx.policy
        needs_x, needs_delta, needs_norm, needs_bias = ctx.needs_input_grad[:4]
        grad_x = grad_norm_weight = None
        if needs_x or needs_delta or needs_norm:
            grad_x = backend.grad_input(grad, weights, dx, ctx.dtype)
            if ctx.normed:
                grad_x, grad_norm_weight = backend.grad_norm(grad_x, *norm, grad_stream)
                grad_norm_weight = grad_norm_weight.to(norm[1].dtype)
            elif grad_stream is not None:
                grad_x = grad_x.float() + grad_stream.float()
            grad_x = grad_x.to(ctx.x_dtype)
        grad_delta = grad_x.to(ctx.delta_dtype) if needs_delta and grad_x is not None else None
        grad_bias = grad.float().sum(0).to(ctx.bias_dtype) if needs_bias else None
        grad_masters: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 11)
        if any(ctx.needs_input_grad[11:]):
            grad_w = backend.grad_weight(grad, TokenCodes(codes, scale), dw)
            grad_masters = list(_split_rows(grad_w, grad_masters, ctx.shapes))
        return grad_x, grad_delta, grad_norm_weight, grad_bias, *[None] * 7, *grad_masters


class _WeightOnlyLinear(torch.autograd.Function):
    """Float activations, quantised weights (W1.58A16, the setting of TriLM, arXiv 2407.12327)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes_w: Tensor,
        row_scale: Tensor,
        backward_codes: Tensor | None,
        out_dtype: torch.dtype,
        backend: Backend,
        gradient: GradientPolicy,
        *masters: Tensor | None,
    ) -> Tensor:
        x_cast = x.to(out_dtype)
        with torch.autocast(x.device.type, enabled=False):
            # Codes are exact in every float type; the scale is applied to the result, in float32.
            y = (x_cast @ codes_w.to(out_dtype).t()).float() * row_scale
            y = (y if bias is None else y + bias.float()).to(out_dtype)
        ctx.save_for_backward(x_cast, codes_w, row_scale, backward_codes)
        ctx.backend, ctx.dtype, ctx.x_dtype = backend, out_dtype, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.policy = gradient.resolve(_COMPUTE[out_dtype])
        ctx.shapes = [(m.shape[0], m.dtype) for m in masters if m is not None]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        dx, dw = ctx.policy
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.backend.grad_input(grad, WeightCodes(*rest), dx, ctx.dtype).to(ctx.x_dtype)
        grad_bias = grad.float().sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        grad_masters: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 8)
        if any(ctx.needs_input_grad[8:]):
            with torch.autocast(grad.device.type, enabled=False):
                grad_w = grad.to(FLOATS[dw]).t() @ x.to(FLOATS[dw])
            grad_masters = list(_split_rows(grad_w, grad_masters, ctx.shapes))
        return grad_x, grad_bias, *[None] * 6, *grad_masters
