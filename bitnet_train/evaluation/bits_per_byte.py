"""Loss, perplexity and bits per byte of a decoder on token windows or on a text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.data.windows import IGNORED, document_numbers, inputs_and_targets
from bitnet_train.errors import ConfigError
from bitnet_train.nn.decoder import Decoder


@dataclass(frozen=True)
class TextLoss:
    """Sums over predicted tokens: negative log-likelihood in nats, tokens, and the UTF-8 bytes they stand for."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode one byte of the text: comparable between tokenizers and with gzip and xz."""
        return self.nats / math.log(2) / max(1, self.bytes)

    @property
    def figure(self) -> str:
        """The figure to judge by, in words."""
        return f"{self.bits_per_byte:.4f} bits per byte"

    @property
    def short(self) -> str:
        """The same in little room."""
        return f"{self.bits_per_byte:.3f} bpb"


def total(losses: list[TextLoss]) -> TextLoss:
    """The loss on several texts together."""
    return TextLoss(sum(x.nats for x in losses), sum(x.tokens for x in losses), sum(x.bytes for x in losses))


@torch.no_grad()
def windows_loss(
    model: Decoder,
    batches: Iterable[Tensor],
    byte_lengths: np.ndarray,
    *,
    bos_id: int | None = None,
) -> TextLoss:
    """The loss of ``model`` summed over windows, in the autocast type if autocast is on.

    Args:
        model: called as it is; put it into eval mode.
        batches: ids (batch, tokens + 1); each token but the first of a window is predicted from those before it. With
            masks (``data.windows``) only the tokens that are learnt count, also their bytes.
        byte_lengths: bytes of each id, from :meth:`TextTokenizer.byte_lengths`. Special tokens count no bytes, but
            predicting them costs nats.
        bos_id: keep attention inside documents, which start with this id.
    """
    device = model.embed_tokens.weight.device
    lengths = torch.from_numpy(byte_lengths).to(device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    size = torch.zeros((), dtype=torch.int64, device=device)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        ids = batch.to(device)
        inputs, targets = inputs_and_targets(ids)
        documents = None if bos_id is None else document_numbers(inputs, bos_id)
        logits = model.forward(inputs, documents)
        nats += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        counted = targets != IGNORED
        size += (lengths[targets.clamp(min=0)] * counted).sum()
        tokens += counted.sum()
    return TextLoss(float(nats), int(tokens), int(size))


def text_loss(model: Decoder, tokenizer: TextTokenizer, text: str, window: int, batch: int = 16) -> TextLoss:
    """The loss of ``model`` on one text, read as a document of its own, in windows of ``window`` tokens.

    Windows do not overlap (each starts without context), as in validation during training. Raises ConfigError for an
    empty text.
    """
    if not text:
        raise ConfigError("The text to measure is empty.")
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
    return windows_loss(model, cut_windows(ids, window, batch), tokenizer.byte_lengths())


def cut_windows(ids: Tensor, window: int, batch: int) -> Iterable[Tensor]:
    """Batches (up to ``batch``, window + 1) of ids (n,), overlapping by one token; the short rest comes last."""
    full = (len(ids) - 1) // window
    for first in range(0, full, batch):
        starts = range(first, min(first + batch, full))
        yield torch.stack([ids[i * window : (i + 1) * window + 1] for i in starts])
    if (len(ids) - 1) % window:
        yield ids[None, full * window :]
