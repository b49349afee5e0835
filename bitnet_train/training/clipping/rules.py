"""The clip rules by their configuration: a fixed norm, a scheduled one, or one that follows the gradients."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.sharded_codes import whole
from bitnet_train.steps import as_steps
from bitnet_train.training.clipping.adaptive import AdaptiveRule
from bitnet_train.training.clipping.base import ClipResult, ClipRule, gradients
from bitnet_train.training.clipping.by_pattern import PatternedRule
from bitnet_train.training.clipping.config import (
    AdaptiveClip,
    ByPatternClip,
    ClipConfig,
    NoClip,
    NormClip,
    PercentileClip,
    ScheduledClip,
    ZScoreClip,
    inner_clips,
)
from bitnet_train.training.clipping.zscore import ZScoreRule
from bitnet_train.training.schedules.factors import glide

__all__ = ["CLIP_RULES", "ClipResult", "ClipRule", "build_clip"]


class NoRule(ClipRule):
    """Measures the norm and clips nothing."""

    @torch.no_grad()
    def clip(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> ClipResult:
        norm = whole(torch.nn.utils.get_total_norm(gradients(parameters)))
        return ClipResult(norm, torch.full_like(norm, torch.inf), norm)


class NormRule(ClipRule):
    """A fixed largest norm (Pascanu et al. 2013)."""

    def __init__(self, cfg: NormClip, total_steps: int) -> None:
        super().__init__(cfg, total_steps)
        self.max_norm = cfg.max_norm

    def threshold(self, norm: Tensor, step: int) -> Tensor:
        return torch.full_like(norm, self.max_norm)


class ScheduledRule(ClipRule):
    """A largest norm that is a pure function of the step: from ``start`` in step 0 to ``max_norm`` in step ``steps``
    and after it."""

    def __init__(self, cfg: ScheduledClip, total_steps: int) -> None:
        super().__init__(cfg, total_steps)
        self.cfg, self.steps = cfg, max(1, as_steps(cfg.steps, total_steps))

    def threshold(self, norm: Tensor, step: int) -> Tensor:
        return torch.full_like(norm, glide(self.cfg.shape, self.cfg.start, self.cfg.max_norm, step / self.steps))


class PercentileRule(ClipRule):
    """AutoClip (Seetharaman et al. 2020, arXiv 2007.14469): the threshold is a percentile of the past norms.

    The norm at hand joins the history before the percentile is taken, as in the paper, unless it is not finite.
    """

    history: Tensor
    count: Tensor

    def __init__(self, cfg: PercentileClip, total_steps: int) -> None:
        super().__init__(cfg, total_steps)
        self.cfg = cfg
        self.register_buffer("history", torch.full((cfg.window,), torch.nan))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def threshold(self, norm: Tensor, step: int) -> Tensor:
        finite = torch.isfinite(norm)
        slot = (self.count % self.cfg.window).reshape(1)
        self.history.index_copy_(0, slot, torch.where(finite, norm.float(), self.history[slot].squeeze()).reshape(1))
        self.count += finite
        known = torch.nanquantile(self.history, self.cfg.percentile / 100)
        return torch.where(self.count >= self.cfg.min_history, known, torch.full_like(known, self.cfg.initial))


def _patterned(cfg: ByPatternClip, total_steps: int) -> PatternedRule:
    return PatternedRule(cfg, total_steps, [build_clip(inner, total_steps) for inner in inner_clips(cfg)])


# Add a clip rule: a dataclass in training.config.CLIP_CONFIGS, and its module here.
# A function (config, optimizer steps of the run) -> rule.
CLIP_RULES: dict[type[ClipConfig], Callable[..., ClipRule]] = {
    NoClip: NoRule,
    NormClip: NormRule,
    ScheduledClip: ScheduledRule,
    PercentileClip: PercentileRule,
    ZScoreClip: ZScoreRule,
    AdaptiveClip: AdaptiveRule,
    ByPatternClip: _patterned,
}


def build_clip(cfg: ClipConfig, total_steps: int) -> ClipRule:
    """The clip rule of a configuration, whose values :func:`check_run` has checked, for a run of ``total_steps``."""
    if type(cfg) not in CLIP_RULES:
        raise ConfigError(f"clip={cfg.name} has no entry in bitnet_train.training.clipping.rules.CLIP_RULES")
    return CLIP_RULES[type(cfg)](cfg, total_steps)
