"""Registers kernels as PyTorch operators, so that torch.compile treats each as one node and needs no graph break."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("bitnet_train", "FRAGMENT")


Function = Callable[..., Any]


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

    def implement(kernel: Function) -> Function:
        _LIBRARY.impl(name, kernel, device)
        return kernel

    return implement
