"""How exact low-precision gradients are: signal to noise in dB against the straight-through gradient in float64."""

import math

import torch
from torch import Tensor

from bitnet_train.kernels.backend import Backend, WeightCodes
from bitnet_train.quant.spec import GradientPolicy

# More tokens change nothing, and float64 products are slow.
MOST_TOKENS = 2048
# Degrees of freedom of Student's t that stands for heavy-tailed gradients: its variance is barely not finite.
HEAVY = 2.0


def gradient_noise(
    backend: Backend, weights: WeightCodes, tokens: int, policy: GradientPolicy, seed: int
) -> dict[str, float]:
    """dB of dX and dW for Gaussian and heavy-tailed dY (tokens, N) in bf16, on random codes of x.

    The reference takes the same bf16 dY and the same codes, so what is left is the arithmetic of the policy.
    """
    device, (n, k) = weights.codes.device, weights.codes.shape
    tokens = min(tokens, MOST_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator).to(device, torch.bfloat16)
    codes_x = backend.quantise(x, None, None, 0.0).codes
    gaussian = torch.randn(tokens, n, generator=generator)
    # Student's t: a Gaussian over the root of a chi-square over its degrees of freedom (2: an exponential variable).
    chi = torch.empty(tokens, n).exponential_(1.0 / HEAVY, generator=generator)
    found = {}
    for name, values in (("gaussian", gaussian), ("heavy", gaussian / (chi / HEAVY).sqrt())):
        grad = values.to(device, torch.bfloat16)
        dx, dw = policy.resolve("bf16")
        exact = grad.double()
        grad_x = backend.grad_input([grad], weights, dx, torch.bfloat16)
        found[f"dx_{name}"] = decibels((exact * weights.row_scale) @ weights.codes.double(), grad_x)
        (grad_w,) = backend.grad_weight([grad], codes_x, dw)
        found[f"dw_{name}"] = decibels(exact.t() @ (codes_x.codes.double() * codes_x.scale), grad_w)
    return found


def decibels(exact: Tensor, approximate: Tensor) -> float:
    """``10 log10(|exact|^2 / |approximate - exact|^2)``, infinite when they are equal."""
    noise = float((approximate.double() - exact).square().sum())
    signal = float(exact.square().sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
