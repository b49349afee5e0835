"""Keys and values of past tokens, allocated once."""

import torch
from torch import Tensor

from bitnet_train.nn.config import DecoderConfig


class KVCache:
    """Keys and values of all blocks for up to ``capacity`` tokens of ``batch`` sequences.

    ``padding`` (batch,) counts the tokens at the start of each sequence that are none: they are never looked at, and
    positions begin behind them. ``length`` tokens are filled; :meth:`Decoder.forward` advances it after all blocks have
    appended theirs.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        padding: Tensor | None = None,
    ) -> None:
        if capacity > cfg.context:
            raise ValueError(f"a cache of {capacity} tokens is longer than the model's context of {cfg.context}")
        shape = (cfg.layers, batch, cfg.kv_heads, capacity, cfg.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.padding = padding

    @property
    def capacity(self) -> int:
        """Most tokens that fit."""
        return self.keys.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (batch, kv_heads, new, head_dim) behind the filled tokens; returns all of the layer's.

        Raises ValueError when they do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:  # one token too many would be broadcast into an empty slice, and lost
            raise ValueError(f"{end} tokens do not fit a KV cache of {self.capacity} tokens")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
