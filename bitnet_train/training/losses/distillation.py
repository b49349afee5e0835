"""``loss=distillation``: cross-entropy, and the distance from a teacher's distributions, states and relations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.nn.collector import Collector
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.training.losses.config import (
    DistillationLoss,
    HiddenDistance,
    hidden_blocks,
    relation_block,
    relation_heads,
)
from bitnet_train.training.losses.cross_entropy import IGNORED, LinearLossOptions, linear_loss
from bitnet_train.training.losses.parts import LossParts, Taught
from bitnet_train.training.losses.relations import relation_loss


class Distillation:
    """A :class:`Loss` that needs a teacher (BitDistill, arXiv 2510.13998, equation 13)::

        total = nll + z_loss * log(Z)^2 + logits * temperature^2 * KL(teacher || student)
                + hidden * distance of hidden states + relations * (KL of Q-Q + KL of K-K + KL of V-V relations)

    Means over the tokens that are learnt, those whose target is not -100 (of relations, how these see all the others).
    The result is the same whether a teacher's tensors carry a history or not: it gets no gradients.
    """

    def __init__(self, cfg: DistillationLoss, model: DecoderConfig) -> None:
        self.cfg = cfg
        self.hidden_blocks = hidden_blocks(cfg, model.layers)
        self.relation_block = relation_block(cfg, model.layers)
        self.relation_heads = relation_heads(cfg, model)
        self.options = LinearLossOptions(cfg.z_loss, False, cfg.logits, cfg.temperature)

    def collector(self) -> Collector | None:
        if not self.hidden_blocks and self.relation_block is None:
            return None
        block = self.relation_block
        return Collector(frozenset(self.hidden_blocks), frozenset(() if block is None else (block,)))

    def __call__(
        self,
        states: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        collector: Collector | None = None,
        taught: Taught | None = None,
    ) -> LossParts:
        if taught is None:
            raise ValueError("loss=distillation needs a teacher")
        cfg = self.cfg
        head = (taught.states, taught.head_weight) if cfg.logits else None
        found = linear_loss(states, head_weight, targets, self.options, head)
        learnt, further = targets != IGNORED, list[Tensor]()
        if collector is not None and self.hidden_blocks:
            distances = [
                hidden_distance(collector.streams[block], taught.streams[block], cfg.hidden_distance, learnt)
                for block in self.hidden_blocks
            ]
            further.append(cfg.hidden * torch.stack(distances).mean())
        if collector is not None and self.relation_block is not None:
            pairs = zip(
                collector.projections[self.relation_block], taught.projections[self.relation_block], strict=True
            )
            parts = [
                relation_loss(ours, theirs, self.relation_heads, cfg.relation_form, cfg.relation_mask, learnt)
                for ours, theirs in pairs
            ]
            further.append(cfg.relations * torch.stack(parts).sum())
        total, distilled = found.total, cfg.logits * found.kl
        for part in further:
            total, distilled = total + part, distilled + part.detach()
        return LossParts(total, found.nll, cfg.z_loss * found.z if cfg.z_loss else None, distilled)


def hidden_distance(ours: Tensor, theirs: Tensor, distance: HiddenDistance, learnt: Tensor | None = None) -> Tensor:
    """The distance between hidden states (batch, tokens, hidden) in float32, a mean over tokens, or over those where
    ``learnt`` (batch, tokens) is true; 0 where none is.

    mse: the mean of the squared differences of all numbers. cosine: 1 - cos of the angle.
    """
    wide = torch.float64 if ours.dtype is torch.float64 else torch.float32
    ours, theirs = ours.to(wide), theirs.detach().to(wide)
    if distance is HiddenDistance.mse:
        found = F.mse_loss(ours, theirs, reduction="none").mean(dim=-1)
    else:
        found = 1 - F.cosine_similarity(ours, theirs, dim=-1)
    if learnt is None:
        return found.mean()
    return found.masked_fill(~learnt, 0.0).sum() / learnt.sum().clamp(min=1)
