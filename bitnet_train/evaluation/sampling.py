"""Which token comes next: temperature, top-k, top-p and min-p."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. The filters look at the distribution at ``temperature``, in this order:

    ``top_k``: the k most likely tokens (all that share the k-th's logit); ``top_p``: the fewest most likely tokens
    whose probabilities add up to p (arXiv 1904.09751); ``min_p``: tokens at least min_p times as likely as the most
    likely one (arXiv 2407.01082). Temperature 0 takes the most likely token.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 and 1")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (..., vocab) to what is sampled from, float32, at a temperature above 0; at least one token stays."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    chances = torch.softmax(logits, dim=-1)
    if sampling.top_p < 1:
        ordered, order = chances.sort(dim=-1, descending=True)
        # A token is superfluous when those before it already add up to p; the first never is.
        superfluous = ordered.cumsum(-1) - ordered >= sampling.top_p
        chances = chances.masked_fill(superfluous.scatter(-1, order, superfluous), 0.0)
    if sampling.min_p > 0:
        chances = chances.masked_fill(chances < sampling.min_p * chances.amax(-1, keepdim=True), 0.0)
    return chances / chances.sum(-1, keepdim=True)


def choose_tokens(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """One id for each row of logits (batch, vocab), each row from a generator of its own."""
    if sampling.temperature == 0:
        return logits.float().argmax(-1).tolist()
    chances = probabilities(logits, sampling).cpu()
    return [int(torch.multinomial(c, 1, generator=g)) for c, g in zip(chances, generators, strict=True)]
