"""Registers kernels as PyTorch operators, so that torch.compile treats each as one node and needs no graph break."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("bitnet_train", "FRAGMENT")


Function = Callable[..., Any]

# Qualified names of the operators that quantise inputs, and of those that multiply their codes with weights.
INPUT_QUANTISERS: set[str] = set()
PRODUCTS: set[str] = set()


def operator(signature: str, fake: Function, device: str) -> Callable[[Function], Function]:
    """Decorates the implementation of ``torch.ops.bitnet_train.<name>``.

    Args:
        signature: the operator's schema, ``name(Tensor x, ...) -> ...``.
        fake: gives outputs of the right shape, type and device without computing (and may serve to allocate them).
        device: dispatch key of the implementation: ``CPU``, or ``CompositeExplicitAutograd`` for any.
    """
    name = signature.partition("(")[0]
    _LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"bitnet_train::{name}", fake, lib=_LIBRARY)
    for kind, names in ((quantise_fake, INPUT_QUANTISERS), (matmul_fake, PRODUCTS)):
        if fake is kind:
            names.add(f"bitnet_train::{name}")

    def implement(kernel: Function) -> Function:
        _LIBRARY.impl(name, kernel, device)
        return kernel

    return implement


def quantise_fake(
    x: Tensor, delta: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, 1/rms and stream of an input quantiser; the last two empty when there is no norm, no delta."""
    m, k = x.shape
    return (
        x.new_empty((m, k), dtype=torch.int8),
        x.new_empty((m, 1), dtype=torch.float32),
        x.new_empty((m, 1) if norm is not None else (0,), dtype=torch.float32),
        x.new_empty((m, k) if delta is not None else (0,)),
    )


def matmul_fake(
    codes: Tensor, scale: Tensor, codes_w: Tensor, row_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The product (M, N)."""
    return scale.new_empty((codes.shape[0], codes_w.shape[0]), dtype=out_dtype)
