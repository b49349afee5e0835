"""What of a transformer block is kept for its backward pass, and what is computed again there.

``full`` keeps a block's inputs (Chen et al. 2016, arXiv 1604.06174). ``selective`` keeps what costs much to compute and
little to keep, in the way of Korthikanti et al. (arXiv 2205.05198), whose choice is another for ternary layers: their
wide products (q/k/v, gate and up) are one integer matmul from int8 codes, which the gradient of the weights needs
anyway, and take twice the bytes of those codes and more. So the codes stay and the products go.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bitnet_train.kernels.operators import INPUT_QUANTISERS, PRODUCTS
from bitnet_train.nn.config import ActivationCheckpointing

# Attention's cost grows with the square of the context, its result does not.
ATTENTION = {
    f"aten::_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable",
    )
}  # fmt: skip


def kept(operator: str, arguments: tuple[Any, ...]) -> bool:
    """Whether ``selective`` keeps what ``operator`` (its qualified name) gives for ``arguments``.

    Attention; the codes made together with the residual stream, which is kept as the block's input is; products
    narrower than their input (the down projection's, which is the next block's input as well).
    """
    if operator in ATTENTION:
        return True
    if operator in INPUT_QUANTISERS:
        return arguments[1] is not None  # delta
    if operator in PRODUCTS:
        codes, weights = arguments[0], arguments[2]
        return bool(weights.shape[0] < codes.shape[1])
    if operator in ("aten::mm", "aten::addmm"):
        left, right = arguments[-2:]
        return bool(right.shape[1] < left.shape[1])
    return False


def _policy(_: SelectiveCheckpointContext, operator: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    # Higher-order operators have no qualified name; none of them is kept.
    found = isinstance(operator, torch._ops.OpOverload) and kept(operator.name(), arguments)
    return CheckpointPolicy.MUST_SAVE if found else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(what: ActivationCheckpointing, compute: Callable[..., Any], *arguments: Any) -> Any:
    """``compute(*arguments)``, of whose insides the backward pass finds what ``what`` keeps. The results and gradients
    are the same bit for bit where the operators are deterministic; ``compute`` must draw no random numbers."""
    if what is ActivationCheckpointing.none or not torch.is_grad_enabled():
        return compute(*arguments)
    # Two calls, because torch.compile does not take a context that is chosen in an expression.
    again = partial(checkpoint, compute, *arguments, use_reentrant=False, preserve_rng_state=False)
    if what is ActivationCheckpointing.selective:
        return again(context_fn=partial(create_selective_checkpoint_contexts, _policy))
    return again()
