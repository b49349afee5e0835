"""Fixed windows over a split's tokens, as a map-style dataset."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bitnet_train.data.shards import TokenArray

# The target of a token that is not learnt (torch's own ignore_index).
IGNORED = -100


class Windows(Dataset[Tensor]):
    """Window i holds tokens [i * length, i * length + length]: ``length`` inputs and, shifted by one, their targets.

    Windows overlap by one token, so that every token but the first of the split is predicted exactly once. The last
    window of an evaluation may be short; training windows (``partial=False``) are all of full length.

    With a ``mask`` of the tokens (1 for those that are learnt) a window is (2, length + 1): the tokens, and the same
    with :data:`IGNORED` where there is nothing to learn. :func:`inputs_and_targets` takes either apart.
    """

    def __init__(
        self,
        tokens: TokenArray,
        length: int,
        partial: bool = False,
        limit: int | None = None,
        mask: TokenArray | None = None,
    ) -> None:
        self.tokens, self.length, self.mask = tokens, length, mask
        self.end = len(tokens) if limit is None else min(len(tokens), limit + 1)
        predicted = max(0, self.end - 1)
        self.count = -(-predicted // length) if partial else predicted // length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        start = index * self.length
        stop = min(start + self.length + 1, self.end)
        ids = torch.from_numpy(self.tokens.slice(start, stop))
        if self.mask is None:
            return ids
        return torch.stack([ids, ids.where(torch.from_numpy(self.mask.slice(start, stop)) == 1, IGNORED)])


def inputs_and_targets(batch: Tensor) -> tuple[Tensor, Tensor]:
    """(input ids, target ids), each (batch, tokens), of a batch of windows: (batch, tokens + 1), or masked ones
    (batch, 2, tokens + 1), whose targets are :data:`IGNORED` where nothing is learnt.
    """
    ids, labels = (batch[:, 0], batch[:, 1]) if batch.dim() == 3 else (batch, batch)
    return ids[:, :-1], labels[:, 1:]


def document_numbers(ids: Tensor, bos_id: int) -> Tensor:
    """Number of the document that each token of ids (batch, tokens) belongs to, counted from the window's start."""
    return (ids == bos_id).cumsum(dim=1)
