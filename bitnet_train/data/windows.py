"""Fixed windows over a split's tokens, as a map-style dataset."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bitnet_train.data.shards import TokenArray


class Windows(Dataset[Tensor]):
    """Window i holds tokens [i * length, i * length + length]: ``length`` inputs and, shifted by one, their targets.

    Windows overlap by one token, so that every token but the first of the split is predicted exactly once. The last
    window of an evaluation may be short; training windows (``partial=False``) are all of full length.
    """

    def __init__(self, tokens: TokenArray, length: int, partial: bool = False, limit: int | None = None) -> None:
        self.tokens, self.length = tokens, length
        self.end = len(tokens) if limit is None else min(len(tokens), limit + 1)
        predicted = max(0, self.end - 1)
        self.count = -(-predicted // length) if partial else predicted // length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        start = index * self.length
        return torch.from_numpy(self.tokens.slice(start, min(start + self.length + 1, self.end)))


def document_numbers(ids: Tensor, bos_id: int) -> Tensor:
    """Number of the document that each token of ids (batch, tokens) belongs to, counted from the window's start."""
    return (ids == bos_id).cumsum(dim=1)
