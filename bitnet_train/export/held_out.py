"""The text that exports are compared on, and what a consumer's logits say about it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.evaluation.bits_per_byte import TextLoss, cut_windows

# Tokens per forward of a comparison.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HeldOut:
    """What the comparison is made on: ids (n,) of the run's validation text, windows of ``window`` tokens, a prompt."""

    ids: Tensor
    window: int
    prompt: str

    def batches(self) -> list[Tensor]:
        """Ids (batch, window + 1), the short rest last."""
        return list(cut_windows(self.ids, self.window, max(1, BATCH_TOKENS // self.window)))


def documents(ids: Tensor, tokenizer: TextTokenizer) -> list[str]:
    """The texts between the bos ids of ids (n,): real held-out documents, the last one cut where the ids end."""
    texts: list[list[int]] = [[]]
    for index in ids.tolist():
        if index == tokenizer.bos_id:
            texts.append([])
        else:
            texts[-1].append(index)
    return [text for part in texts if part and (text := tokenizer.decode(part))]


def consumer_loss(logits_of: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> TextLoss:
    """The loss of a model that maps ids (batch, n) to logits (batch, n, vocab); bytes are not counted."""
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    for ids in batches:
        logits = logits_of(ids[:, :-1])
        nats += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        tokens += ids[:, 1:].numel()
    return TextLoss(float(nats), tokens, 0)
