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
from bitnet_train.kernels.gating import gated, gated_backward
from bitnet_train.kernels.reference import FLOATS, ReferenceBackend
from bitnet_train.kernels.triton.backend import TritonBackend
from bitnet_train.quant.activations import TokenCodes, quantise_inputs, residual_sum, rms_norm
from bitnet_train.quant.hadamard import rotate
from bitnet_train.quant.spec import EIGHT_BITS, GradientPolicy, InputQuant
from bitnet_train.quant.weights import SCALE_FLOOR, Codes, scale_gradient

register_backend(ReferenceBackend())
register_backend(CpuBackend())
register_backend(Avx512Backend())
register_backend(TritonBackend())


def bit_linear(
    x: Tensor,
    codes_w: Tensor,
    row_scale: Tensor,
    master: Tensor | None,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    inputs: InputQuant = EIGHT_BITS,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    gradient: GradientPolicy = GradientPolicy(),  # noqa: B008  (frozen)
    backward_codes: Tensor | None = None,
    largest_code: int = 1,
) -> Tensor:
    """Quantise ``x`` and multiply it with weights that are codes.

    Args:
        x: input (..., K), any float dtype.
        codes_w: int8 (N, K).
        row_scale: float32 (N,), the scale of every output row.
        master: the master weight (N, K) that the codes came from; it receives the gradient and is not read. None for
            weights that exist only as codes.
        bias: (N,), added in float32 after dequantisation.
        norm_weight: (K,), for an RMSNorm before the quantiser; norm and quantiser are one float32 operation.
        norm_eps: the norm's epsilon.
        inputs: how ``x`` is quantised: 8 bits per token by default; without bits the float input is multiplied with
            ``codes_w * row_scale``. What differs from the default is done by plain operations before the matmul.
        out_dtype: type of the result and of the gradient matmuls; the autocast type or the type of ``x`` by default.
        backend: from :func:`choose_backend`; the automatic choice for the device of ``x`` by default.
        gradient: precision of the two gradient matmuls.
        backward_codes: the codes in the backend's backward layout, when the caller keeps them.
        largest_code: the largest magnitude of a code in ``codes_w``.

    Returns:
        (..., N) in ``out_dtype``. A token with a NaN or an infinity gives a row of NaN.

    Gradients pass straight through both quantisers (BitNet, arXiv 2310.11453, section 2.2), nothing masked::

        dX = (dY * row_scale) @ codes_w          dW = dY.T @ (codes_x * scale_x)
    """
    (y,), _ = shared_bit_linear(
        x, None, WeightCodes(codes_w, row_scale, backward_codes, largest_code), [master], bias=bias,
        norm_weight=norm_weight, norm_eps=norm_eps, inputs=inputs, out_dtype=out_dtype, backend=backend,
        gradient=gradient,
    )  # fmt: skip
    return y


def shared_bit_linear(
    x: Tensor,
    delta: Tensor | None,
    weights: WeightCodes,
    masters: Sequence[Tensor | None],
    *,
    rows: Sequence[int] | None = None,
    gate: Tensor | None = None,
    activation: str = "",
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    inputs: InputQuant = EIGHT_BITS,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    gradient: GradientPolicy = GradientPolicy(),  # noqa: B008  (frozen)
    learned: Sequence[Tensor | None] | None = None,
    limits: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """:func:`bit_linear` for several layers that read one input, the residual stream ``x + delta``.

    ``delta`` (..., K) is what the layers before add to the stream ``x`` (..., K), or None for nothing; adding it is
    part of the input quantiser's one pass over memory. ``weights`` are the layers' codes stacked along their output
    rows, ``rows`` how many belong to each (all to the first by default), ``masters`` their master weights in that order
    and ``bias`` (N,) their stacked biases. With ``gate`` (..., K), which excludes ``delta``, the input is
    ``activation(gate) * x``, computed again in the backward pass instead of kept; ``activation`` is silu or relu2.
    ``learned`` are the layers' learned scales (groups,), which receive LSQ's gradient
    (:func:`bitnet_train.quant.weights.scale_gradient`), ``limits`` the largest magnitude of each layer's codes (1).
    Returns the layers' outputs, and the stream in the type of ``x`` (with ``gate``: x itself).
    """
    if gate is not None and delta is not None:
        raise ValueError("a gated input has no residual to be added to it")
    if out_dtype is None:
        out_dtype = compute_dtype(x)
    if backend is None:
        backend = BACKENDS[_default_backend(x.device.type)]
    rows = list(rows or weights.codes.shape[:1])
    flat = x.reshape(-1, x.shape[-1])
    flat_delta = None if delta is None else delta.reshape(flat.shape)
    flat_gate = None if gate is None else gate.reshape(flat.shape)
    scales, limits = list(learned or [None] * len(rows)), list(limits or [1] * len(rows))
    if not inputs.standard:
        # Plain operations up to the codes: nothing is fused for what is not BitNet b1.58's own quantiser.
        if flat_gate is not None:
            flat, flat_gate = gated(flat_gate, flat, activation), None
        stream = residual_sum(flat, flat_delta)
        flat, flat_delta = stream if norm_weight is None else rms_norm(stream, norm_weight, norm_eps)[0], None
        flat, norm_weight = rotate(flat) if inputs.hadamard else flat, None
    if inputs.bits is None:
        parts = _WeightOnlyLinear.apply(
            flat, bias, *weights, rows, out_dtype, backend, gradient, limits, *masters, *scales
        )
    elif not inputs.standard:
        _, *parts = _BitLinear.apply(
            flat, None, None, None, bias, *weights, "", 0.0, rows, out_dtype, backend, gradient, inputs, limits,
            *masters, *scales,
        )  # fmt: skip
    elif not torch.is_grad_enabled():
        # What _BitLinear computes, without the bookkeeping that costs as much as a small matmul.
        read = flat if flat_gate is None else gated(flat_gate, flat, activation)
        codes_x, stream, _ = backend.quantise(read, flat_delta, norm_weight, norm_eps)
        y = backend.matmul(codes_x, weights, bias, out_dtype)
        parts = list(torch.split(y, rows, dim=1)) if len(rows) > 1 else [y]
    else:
        stream, *parts = _BitLinear.apply(
            flat,
            flat_delta,
            flat_gate,
            norm_weight,
            bias,
            *weights,
            activation,
            norm_eps,
            rows,
            out_dtype,
            backend,
            gradient,
            inputs,
            limits,
            *masters,
            *scales,
        )
    outputs = [part.reshape(*x.shape[:-1], part.shape[-1]) for part in parts]
    return outputs, x if delta is None else stream.reshape(x.shape)


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


def _master_gradients(
    backend_gradients: Sequence[Tensor], needs: Sequence[bool], types: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """The gradient of every master that wants one, in its type."""
    parts = zip(backend_gradients, needs[: len(types)], types, strict=True)
    return [grad.to(dtype) if need and dtype is not None else None for grad, need, dtype in parts]


def _float_weight_gradients(grads: Sequence[Tensor], x: Tensor, dw: str) -> list[Tensor]:
    """``grad.T @ x`` for each of ``grads`` (M, N_i) and float inputs (M, K), in the float type ``dw``."""
    with torch.autocast(x.device.type, enabled=False):
        return [grad.to(FLOATS[dw]).t() @ x.to(FLOATS[dw]) for grad in grads]


def _scale_gradients(
    grads_w: Sequence[Tensor], scaled: Sequence[Tensor | None], weights: WeightCodes, ctx: Any
) -> list[Tensor | None]:
    """The gradient of every learned scale from that of its layer's weights; ``scaled`` are the master weights of layers
    with such a scale, then the scales."""
    layers = len(grads_w)
    parts = zip(
        grads_w, scaled[:layers], scaled[layers:], torch.split(weights.codes, ctx.rows), ctx.limits, strict=True
    )
    found: list[Tensor | None] = []
    for grad, master, scale, codes, limit in parts:
        if master is None or scale is None:
            found.append(None)
        else:
            used = Codes(codes, scale.float().clamp(min=SCALE_FLOOR))
            found.append(scale_gradient(master, grad, used, limit).to(scale.dtype))
    return found


def _product(
    backend: Backend, x: TokenCodes, weights: WeightCodes, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The matmul of codes (M, K) and weights; with several scales per token the sum of a matmul per group."""
    groups = x.scale.shape[-1]
    if groups == 1:
        return backend.matmul(x, weights, bias, out_dtype)
    weights = weights.unpacked(x.codes.shape[-1])
    total = x.scale.new_zeros(len(x.codes), len(weights.codes))
    width = x.codes.shape[-1] // groups
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        columns = weights._replace(codes=weights.codes[:, part].contiguous(), backward=None)
        codes = TokenCodes(x.codes[:, part].contiguous(), x.scale[:, group : group + 1].contiguous())
        total += backend.matmul(codes, columns, None, torch.float32)
    return (total if bias is None else total + bias.float()).to(out_dtype)


def _fill_in(grads: Sequence[Tensor | None], like: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Zeros (M, rows) for the outputs that nothing used."""
    parts = zip(grads, rows, strict=True)
    return [like.new_zeros(like.shape[0], n) if grad is None else grad for grad, n in parts]


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        gate: Tensor | None,
        norm_weight: Tensor | None,
        bias: Tensor | None,
        codes_w: Tensor,
        row_scale: Tensor,
        backward_codes: Tensor | None,
        largest: int,
        activation: str,
        norm_eps: float,
        rows: list[int],
        out_dtype: torch.dtype,
        backend: Backend,
        gradient: GradientPolicy,
        inputs: InputQuant,
        limits: list[int],
        *masters: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        weights = WeightCodes(codes_w, row_scale, backward_codes, largest)
        read = x if gate is None else gated(gate, x, activation)
        if inputs.standard:
            codes_x, stream, rstd = backend.quantise(read, delta, norm_weight, norm_eps)
        else:
            codes_x, stream, rstd = quantise_inputs(read, inputs), read, None
        y = _product(backend, codes_x, weights, bias, out_dtype)
        # The int8 codes are all that dW needs; the stream only for the norm, where it is alive as the residual anyway.
        # A gated input and its codes are computed again from the gate and the other factor, which its gradient needs.
        normed = norm_weight is not None
        kept = x if gate is not None else stream if normed else None
        codes, scale = codes_x if gate is None else (None, None)
        known, learned = masters[: len(rows)], masters[len(rows) :]
        # Master weights are read again only where a scale is learned.
        scaled = [None if scale is None else master for master, scale in zip(known, learned, strict=True)]
        ctx.save_for_backward(codes, scale, *weights[:3], kept, gate, norm_weight, rstd, *scaled, *learned)
        ctx.norm_eps, ctx.largest, ctx.limits = norm_eps, largest, limits
        ctx.activation, ctx.normed, ctx.backend, ctx.rows = activation, normed, backend, rows
        ctx.dtype, ctx.x_dtype = out_dtype, x.dtype
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.policy = gradient.resolve(_COMPUTE[out_dtype])
        ctx.types = [None if m is None else m.dtype for m in known]
        ctx.set_materialize_grads(False)
        parts = torch.split(y, rows, dim=1) if len(rows) > 1 else (y,)
        return stream if delta is not None else None, *parts

    @staticmethod
    def backward(ctx: Any, grad_stream: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        codes, scale, codes_w, row_scale, backward_codes, kept, gate, norm_weight, rstd, *scaled = ctx.saved_tensors
        weights = WeightCodes(codes_w, row_scale, backward_codes, ctx.largest)
        backend: Backend = ctx.backend
        dx, dw = ctx.policy
        needs_x, needs_delta, needs_gate, needs_norm, needs_bias = ctx.needs_input_grad[:5]
        used = next((grad for grad in grads if grad is not None), None)
        if used is None:  # only the stream was
            delta = None if grad_stream is None or not needs_delta else grad_stream.to(ctx.delta_dtype)
            return grad_stream, delta, *[None] * (len(ctx.needs_input_grad) - 2)
        filled = _fill_in(grads, used, ctx.rows)
        stream = kept if gate is None else gated(gate, kept, ctx.activation)
        grad_x = grad_gate = grad_norm_weight = None
        if needs_x or needs_delta or needs_gate or needs_norm:
            grad_x = backend.grad_input(filled, weights, dx, ctx.dtype)
            if ctx.normed:
                grad_x, grad_norm_weight = backend.grad_norm(grad_x, stream, norm_weight, rstd, grad_stream)
                grad_norm_weight = grad_norm_weight.to(norm_weight.dtype)
            elif grad_stream is not None:
                grad_x = grad_x.float() + grad_stream.float()
            if gate is not None:
                grad_gate, grad_x = gated_backward(grad_x, gate, kept, ctx.activation)
            grad_x = grad_x.to(ctx.x_dtype)
        grad_delta = grad_x.to(ctx.delta_dtype) if needs_delta and grad_x is not None else None
        grad_bias = torch.cat([g.float().sum(0) for g in filled]).to(ctx.bias_dtype) if needs_bias else None
        needs = ctx.needs_input_grad[17:]
        grad_masters: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            again = TokenCodes(codes, scale)
            if gate is not None:
                again = backend.quantise(stream, None, norm_weight, ctx.norm_eps).codes
            if again.scale.shape[-1] == 1:
                grads_w = backend.grad_weight(filled, again, dw)
            else:
                # No int8 product has one scale per token and group: the type of the other matmuls instead.
                dw = _COMPUTE[ctx.dtype] if dw == "int8" else dw
                grads_w = _float_weight_gradients(filled, again.dequantise(), dw)
            grad_masters = _master_gradients(grads_w, needs, ctx.types)
            grad_masters += _scale_gradients(grads_w, scaled, weights, ctx)
        return grad_x, grad_delta, grad_gate, grad_norm_weight, grad_bias, *[None] * 12, *grad_masters


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
        largest: int,
        rows: list[int],
        out_dtype: torch.dtype,
        backend: Backend,
        gradient: GradientPolicy,
        limits: list[int],
        *masters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x_cast = x.to(out_dtype)
        with torch.autocast(x.device.type, enabled=False):
            # Codes are exact in every float type; the scale is applied to the result, in float32.
            y = (x_cast @ codes_w.to(out_dtype).t()).float() * row_scale
            y = (y if bias is None else y + bias.float()).to(out_dtype)
        known, learned = masters[: len(rows)], masters[len(rows) :]
        # Master weights are read again only where a scale is learned.
        scaled = [None if scale is None else master for master, scale in zip(known, learned, strict=True)]
        ctx.save_for_backward(x_cast, codes_w, row_scale, backward_codes, *scaled, *learned)
        ctx.largest, ctx.limits = largest, limits
        ctx.backend, ctx.rows, ctx.dtype, ctx.x_dtype = backend, rows, out_dtype, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        dx, dw = gradient.resolve(_COMPUTE[out_dtype])
        ctx.policy = dx, _COMPUTE[out_dtype] if dw == "int8" else dw  # a float input has no codes to multiply
        ctx.types = [None if m is None else m.dtype for m in known]
        ctx.set_materialize_grads(False)
        return torch.split(y, rows, dim=1) if len(rows) > 1 else (y,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, codes_w, row_scale, backward_codes, *scaled = ctx.saved_tensors
        weights = WeightCodes(codes_w, row_scale, backward_codes, ctx.largest)
        dx, dw = ctx.policy
        used = next((grad for grad in grads if grad is not None), None)
        if used is None:
            return (None,) * len(ctx.needs_input_grad)
        filled = _fill_in(grads, used, ctx.rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.backend.grad_input(filled, weights, dx, ctx.dtype).to(ctx.x_dtype)
        needs_bias, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[11:]
        grad_bias = torch.cat([g.float().sum(0) for g in filled]).to(ctx.bias_dtype) if needs_bias else None
        grad_masters: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            grads_w = _float_weight_gradients(filled, x, dw)
            grad_masters = _master_gradients(grads_w, needs, ctx.types)
            grad_masters += _scale_gradients(grads_w, scaled, weights, ctx)
        return grad_x, grad_bias, *[None] * 9, *grad_masters
