"""Different clip rules for different parameters."""

from collections.abc import Iterable

import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.training.clipping.adaptive import total
from bitnet_train.training.clipping.base import ClipResult, ClipRule
from bitnet_train.training.clipping.config import ByPatternClip, deciding_rule


class PatternedRule(ClipRule):
    """Each rule clips the parameters that its pattern decides (the last match wins), as if there were no others.

    The reported norms and the threshold are those of the whole gradient: roots of the sums of the rules' squares. Where
    a rule sets no limit, there is none on the whole either.

    Args:
        cfg: the patterns.
        total_steps: optimizer steps of the run.
        rules: the rule of each pattern.
    """

    def __init__(self, cfg: ByPatternClip, total_steps: int, rules: Iterable[ClipRule]) -> None:
        super().__init__(cfg, total_steps)
        self.rules = nn.ModuleList(rules)
        self._patterns = [rule.pattern for rule in cfg.rules]
        self._decided: dict[str, int] = {}

    def rule_of(self, name: str) -> int:
        """The number of the rule for the parameter ``name``. Raises ConfigError when no pattern matches it."""
        if name not in self._decided:
            found = deciding_rule(self._patterns, name)
            if found is None:
                raise ConfigError(f'clip.rules: no pattern matches the parameter {name}: begin with a rule for "*".')
            self._decided[name] = found
        return self._decided[name]

    @torch.no_grad()
    def clip(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> ClipResult:
        parts: list[list[tuple[str, nn.Parameter]]] = [[] for _ in self.rules]
        for name, parameter in parameters:
            if parameter.grad is not None:
                parts[self.rule_of(name)].append((name, parameter))
        results = []
        for rule, part in zip(self.rules, parts, strict=True):
            assert isinstance(rule, ClipRule)
            if part:
                results.append(rule.clip(part, step))
        norm, threshold, clipped = (total([result[i].float() for result in results]) for i in range(3))
        return ClipResult(norm, threshold, clipped)
