"""Gains for sub-norms that a model did not have: how much of its function stays when they are put in.

BitDistill (arXiv 2510.13998, section 3.1) puts RMSNorms before o_proj and down_proj of a pre-trained model. A norm
divides every token by its own root mean square, so no gain keeps the function; these come closest, in the mean square
over the tokens of a text. With ``x`` the input of the projection and ``n = x / rms(x)``::

    per channel c:  g_c = sum(x_c n_c) / sum(n_c^2)        scalar:  g = sum(x n) / sum(n^2) = mean rms(x)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_train.kernels.gating import gated
from bitnet_train.nn.decoder import Block, Decoder
from bitnet_train.quant.activations import rms_norm


@dataclass(frozen=True)
class SubNormGains:
    """Weights of every sub-norm by parameter name, float32: one value for all channels, or one for each."""

    scalar: dict[str, Tensor]
    channel: dict[str, Tensor]


@torch.no_grad()
def fit_gains(model: Decoder, batches: Iterable[tuple[Tensor, Tensor | None]]) -> SubNormGains:
    """The gains that ``model``, which has no sub-norms, comes closest to itself with.

    ``batches`` are ids (batch, tokens) with the number of each token's document, or None for one document.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    eps = model.cfg.norm_eps

    def measure(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            x = inputs[0] if "gate" not in options else gated(options["gate"], inputs[0], options["activation"])
            x = x.reshape(-1, x.shape[-1]).double()
            normed = rms_norm(x, None, eps)[0].double()
            both, square = (x * normed).sum(0), normed.square().sum(0)
            if name in sums:
                both, square = both + sums[name][0], square + sums[name][1]
            sums[name] = both, square

        return hook

    handles = []
    for number, block in enumerate(model.layers):
        assert isinstance(block, Block)
        readers: tuple[tuple[str, nn.Module], ...] = (
            ("self_attn.attn_sub_norm", block.self_attn.out),
            ("mlp.ffn_sub_norm", block.mlp.down),
        )
        for name, reader in readers:
            hook = measure(f"layers.{number}.{name}.weight")
            handles.append(reader.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        for ids, documents in batches:
            model.hidden_states(ids, documents)
    finally:
        for handle in handles:
            handle.remove()
    scalar, channel = {}, {}
    for name, (both, square) in sums.items():
        mean = both.sum() / square.sum().clamp(min=torch.finfo(torch.float64).tiny)
        scalar[name] = mean.float().expand(len(both)).clone()
        # A channel that was always zero has no gain of its own.
        channel[name] = torch.where(square > 0, both / square, mean).float()
    return SubNormGains(scalar, channel)
