"""Scheduled, z-score and adaptive clipping, and rules by pattern, against their formulas in plain Python."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.layout import parameter_table
from bitnet_train.training.clipping.config import (
    AdaptiveClip,
    ByPatternClip,
    ClipConfig,
    NormClip,
    PatternRule,
    PercentileClip,
    ScheduledClip,
    ZScoreClip,
    ZScoreTarget,
    check_clip,
)
from bitnet_train.training.clipping.rules import build_clip
from bitnet_train.training.schedules.config import Shape
from tests.composing import compose_config
from tests.training.test_clipping import named, parameters, sequence, whole_norm

NAMES = [p.name for p in parameter_table(DecoderConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=64, vocab=97))]


def test_a_scheduled_threshold_moves_from_start_to_max_norm_and_stays() -> None:
    rule = build_clip(ScheduledClip(start=0.5, max_norm=2.5, steps=10), 100)
    found = [float(rule.clip(named(parameters(9.0)), step).threshold) for step in (0, 1, 5, 9, 10, 11, 99)]
    assert found == pytest.approx([0.5, 0.7, 1.5, 2.3, 2.5, 2.5, 2.5])
    cosine = build_clip(ScheduledClip(start=2.0, max_norm=1.0, steps=0.4, shape=Shape.cosine), 100)
    for step in (0, 7, 20, 33, 40, 70):
        made = parameters(9.0)
        result = cosine.clip(named(made), step)
        wanted = 1.0 + 0.5 * (1 + math.cos(math.pi * min(1.0, step / 40)))
        assert float(result.threshold) == pytest.approx(wanted, rel=1e-6)
        assert whole_norm(made) == pytest.approx(wanted, rel=1e-5)
        assert float(result.clipped) == pytest.approx(wanted, rel=1e-5)
    assert cosine.state_dict() == {}


class PlainZScore:
    """ZClip by the formulas of the paper, in Python floats."""

    def __init__(self, cfg: ZScoreClip) -> None:
        self.cfg, self.first, self.mean, self.variance = cfg, [], 0.0, 0.0

    def limit(self, norm: float) -> float:
        """What the norm may be at most; inf where it is no spike."""
        cfg = self.cfg
        if not math.isfinite(norm):
            return math.nan
        if len(self.first) < cfg.warmup:
            self.first.append(norm)
            self.mean, self.variance = float(np.mean(self.first)), float(np.var(self.first))
            return min(cfg.initial, cfg.max_norm or math.inf)
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + 1e-6)
        target = {"reciprocal": cfg.z_threshold**2 / z, "threshold": cfg.z_threshold, "mean": 0.0}[cfg.target.value]
        limit = self.mean + target * deviation if z > cfg.z_threshold else math.inf
        limit = min(limit, cfg.max_norm or math.inf)
        clipped = min(norm, limit)
        self.mean = cfg.alpha * self.mean + (1 - cfg.alpha) * clipped
        self.variance = cfg.alpha * self.variance + (1 - cfg.alpha) * (clipped - self.mean) ** 2
        return limit


@pytest.mark.parametrize(
    "cfg",
    [
        ZScoreClip(),
        ZScoreClip(warmup=5, alpha=0.9, z_threshold=1.5, initial=0.6),
        ZScoreClip(warmup=8, target=ZScoreTarget.threshold),
        ZScoreClip(warmup=8, target=ZScoreTarget.mean, max_norm=3.0),
    ],
    ids=["paper", "nervous", "threshold", "mean"],
)
def test_z_score_clipping_is_the_papers(cfg: ZScoreClip) -> None:
    rule, oracle = build_clip(cfg, 100), PlainZScore(cfg)
    clipped_spikes = 0
    for step, norm in enumerate(sequence(150)):
        made = parameters(norm, seed=step)
        result = rule.clip(named(made), step)
        limit = oracle.limit(float(result.norm))
        if not math.isfinite(norm):
            assert not math.isfinite(whole_norm(made))
            continue
        clipped_spikes += step >= cfg.warmup + 10 and norm > limit
        assert whole_norm(made) == pytest.approx(min(norm, limit), rel=1e-3), step
        assert float(result.clipped) == pytest.approx(whole_norm(made), rel=1e-4), step
        assert float(result.clipped) <= float(result.threshold) * (1 + 1e-5)
        assert float(rule.mean) == pytest.approx(oracle.mean, rel=1e-4)
        assert float(rule.variance) == pytest.approx(oracle.variance, rel=1e-3)
    assert clipped_spikes > 2


def test_equal_norms_are_no_spikes() -> None:
    rule = build_clip(ZScoreClip(warmup=4), 100)
    for step in range(20):
        made = parameters(0.75)
        rule.clip(named(made), step)
        assert whole_norm(made) == pytest.approx(0.75, rel=1e-5)


@pytest.mark.parametrize("cut", [1, 12, 40])
def test_a_saved_z_score_continues_identically(cut: int) -> None:
    cfg, norms = ZScoreClip(warmup=10), sequence(60)
    whole, first, again = (build_clip(cfg, 100) for _ in range(3))
    expected = [whole.clip(named(parameters(n, i)), i).threshold for i, n in enumerate(norms)]
    for i, n in enumerate(norms[:cut]):
        first.clip(named(parameters(n, i)), i)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    continued = [again.clip(named(parameters(n, i)), i).threshold for i, n in enumerate(norms) if i >= cut]
    assert torch.equal(torch.stack(continued), torch.stack(expected[cut:]))


def small_model() -> list[tuple[str, nn.Parameter]]:
    """A matrix, a norm, a convolution, an embedding and a head, with gradients of very different sizes by row."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "embed_tokens.weight": (11, 4),
        "layers.0.mlp.up_proj.weight": (6, 4),
        "norm.weight": (4,),
        "patch.weight": (3, 2, 2, 2),
        "lm_head.weight": (11, 4),
    }
    made = []
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        if name == "layers.0.mlp.up_proj.weight":
            weight[2] = 0.0
        parameter = nn.Parameter(weight)
        rows = torch.exp(3 * torch.randn(shape[:1], generator=generator)) * 0.05
        parameter.grad = torch.randn(shape, generator=generator) * rows.reshape(-1, *[1] * (len(shape) - 1))
        made.append((name, parameter))
    made.append(("unused.weight", nn.Parameter(torch.zeros(3))))
    return made


def adaptive_by_hand(weight: torch.Tensor, grad: torch.Tensor, factor: float, eps: float) -> torch.Tensor:
    """Equation 3 of the paper, row by row."""
    units = [(weight, grad)] if weight.dim() < 2 else list(zip(weight, grad, strict=True))
    done = []
    for w, g in units:
        limit = factor * max(float(w.norm()), eps)
        done.append(g * (limit / float(g.norm())) if float(g.norm()) > limit else g)
    return done[0] if weight.dim() < 2 else torch.stack(done)


@pytest.mark.parametrize("exclude", [None, [], ["*up_proj*", "norm.*"]])
def test_adaptive_clipping_is_the_papers(exclude: list[str] | None) -> None:
    cfg = AdaptiveClip(factor=0.05, eps=1e-2, exclude=exclude)
    left = {"embed_tokens.weight", "lm_head.weight"} if exclude is None else set()
    left |= {"layers.0.mlp.up_proj.weight", "norm.weight"} if exclude else set()
    made = small_model()
    before = {name: p.grad.clone() for name, p in made if p.grad is not None}
    result = build_clip(cfg, 100).clip(iter(made), 0)
    for name, parameter in made:
        if name not in before:
            assert parameter.grad is None
            continue
        wanted = before[name]
        if name not in left:
            wanted = adaptive_by_hand(parameter.detach(), wanted, 0.05, 1e-2)
            assert not torch.equal(wanted, before[name]), name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-8)
    assert float(result.norm) == pytest.approx(math.sqrt(sum(float(g.norm()) ** 2 for g in before.values())), rel=1e-5)
    assert float(result.clipped) == pytest.approx(whole_norm([p for _, p in made]), rel=1e-5)
    assert float(result.clipped) <= float(result.threshold)


def test_a_row_that_is_not_a_number_stays_so_and_zeros_stay_zeros() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    weight.grad[1, 2] = torch.nan
    result = build_clip(AdaptiveClip(), 100).clip([("layers.0.mlp.up_proj.weight", weight)], 0)
    assert torch.isnan(weight.grad[1, 2])
    assert torch.equal(weight.grad[[0, 2]], torch.zeros(2, 4))
    assert math.isnan(float(result.norm))
    assert math.isnan(float(result.clipped))


def by_pattern(*rules: tuple[str, dict[str, Any]]) -> ByPatternClip:
    return ByPatternClip(rules=[PatternRule(pattern, clip) for pattern, clip in rules])


def test_patterns_clip_their_own_parameters_and_the_last_match_wins() -> None:
    cfg = by_pattern(
        ("*", {"name": "norm", "max_norm": 0.01}),
        ("*embed*", {"name": "none"}),
        ("*_proj.weight", {"name": "norm", "max_norm": 0.2}),
        ("norm.weight", {"name": "adaptive", "factor": 0.001}),
    )
    made, whole = small_model(), small_model()
    before = dict(small_model())
    result = build_clip(cfg, 100).clip(made, 0)
    after = dict(made)
    assert torch.equal(after["embed_tokens.weight"].grad, before["embed_tokens.weight"].grad)
    assert float(after["layers.0.mlp.up_proj.weight"].grad.norm()) == pytest.approx(0.2, rel=1e-4)
    assert float(after["norm.weight"].grad.norm()) == pytest.approx(
        0.001 * float(after["norm.weight"].detach().norm()), rel=1e-4
    )
    rest = [after[name] for name in ("patch.weight", "lm_head.weight")]
    assert whole_norm(rest) == pytest.approx(0.01, rel=1e-3)
    assert float(result.norm) == pytest.approx(whole_norm([p for _, p in whole]), rel=1e-5)
    assert float(result.clipped) == pytest.approx(whole_norm([p for _, p in made]), rel=1e-5)
    assert math.isinf(float(result.threshold))


def test_limits_of_patterns_add_up_to_one_threshold() -> None:
    cfg = by_pattern(("*", {"name": "norm", "max_norm": 0.3}), ("*embed*", {"name": "norm", "max_norm": 0.4}))
    result = build_clip(cfg, 100).clip(small_model(), 0)
    assert float(result.threshold) == pytest.approx(0.5, rel=1e-6)


def test_memories_of_patterns_are_saved_apart() -> None:
    memory = {"name": "percentile", "window": 4, "min_history": 1}
    cfg = by_pattern(("*", memory), ("*embed*", memory), ("*head*", {"name": "scheduled", "steps": 5}))
    rule = build_clip(cfg, 100)
    rule.clip(small_model(), 0)
    assert set(rule.state_dict()) == {f"rules.{i}.{name}" for i in (0, 1) for name in ("history", "count")}
    first, second = (float(rule.state_dict()[f"rules.{i}.history"][0]) for i in (0, 1))
    embedding = dict(small_model())["embed_tokens.weight"].grad.norm()
    assert second == pytest.approx(float(embedding), rel=1e-5)
    assert first != second
    again = build_clip(cfg, 100)
    again.load_state_dict(copy.deepcopy(rule.state_dict()))
    thresholds = [r.clip(small_model(), 1).threshold for r in (rule, again)]
    assert torch.equal(*thresholds)


REFUSED = [
    (ScheduledClip(start=0.0), "clip.start and clip.max_norm must be positive"),
    (ScheduledClip(steps=0), "clip.steps=0 is 0 steps"),
    (ScheduledClip(steps=101), "clip.steps=101 is 101 steps, .* at most the 100"),
    (ScheduledClip(shape=Shape.constant), "clip.shape=constant never moves"),
    (ZScoreClip(z_threshold=0.0), "clip.z_threshold"),
    (ZScoreClip(max_norm=-1.0), "must be positive"),
    (ZScoreClip(alpha=1.0), "clip.alpha must lie between 0 and 1"),
    (ZScoreClip(warmup=1), "clip.warmup is 1"),
    (AdaptiveClip(factor=0.0), "clip.factor and clip.eps must be positive"),
    (AdaptiveClip(exclude=["*o_prj*"]), "clip.exclude: the pattern '\\*o_prj\\*' matches no parameter"),
    (AdaptiveClip(exclude=["*norm*", "*"]), "clip.exclude leaves no parameter to clip"),
    (PercentileClip(window=10**12), "clip.window is 1000000000000; at most 100000 past norms"),
    (by_pattern(), "no pattern matches the parameter embed_tokens.weight"),
    (by_pattern(("*proj*", {"name": "norm"})), 'begin with a rule for "\\*"'),
    (by_pattern(("*", {"name": "norm"}), ("*.o_prj.*", {"name": "none"})), "rules\\[1\\]: the pattern .* matches no"),
    (by_pattern(("*proj*", {"name": "none"}), ("*", {"name": "norm"})), "rules\\[0\\]: later patterns match every"),
    (by_pattern(("*", {"name": "norm", "max_nrm": 1})), "clip.rules\\[0\\].clip.max_nrm is not"),
    (by_pattern(("*", {"name": "norm", "max_norm": 0})), "clip.rules\\[0\\].clip.max_norm must be positive"),
    (by_pattern(("*", {"name": "by_pattern"})), "by_pattern does not exist"),
    (
        by_pattern(("*", {"name": "norm"}), ("*norm*", {"name": "adaptive", "exclude": ["*o_proj*"]})),
        "matches no param",
    ),
]


@pytest.mark.parametrize(("cfg", "wanted"), REFUSED, ids=[f"{i}-{cfg.name}" for i, (cfg, _) in enumerate(REFUSED)])
def test_what_cannot_be_is_refused(cfg: ClipConfig, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        check_clip(cfg, NAMES, 100)


@pytest.mark.parametrize("cfg", [NormClip(), ScheduledClip(), PercentileClip(), ZScoreClip(), AdaptiveClip()])
def test_defaults_pass_also_for_a_run_of_no_steps(cfg: ClipConfig) -> None:
    check_clip(cfg, NAMES, 100)
    check_clip(cfg, NAMES, 0)


def test_rules_are_composed_from_the_command_line_and_checked() -> None:
    rules = '[{pattern:"*",clip:{name:norm,max_norm:2}},{pattern:"*.o_proj.weight",clip:{name:zscore,alpha:0.9}}]'
    cfg = compose_config("+recipe=tiny", "clip=by_pattern", f"clip.rules={rules}")
    assert isinstance(cfg.clip, ByPatternClip)
    assert [rule.pattern for rule in cfg.clip.rules] == ["*", "*.o_proj.weight"]
    with pytest.raises(ConfigError, match="alfa is not a configuration key: zscore has"):
        compose_config("+recipe=tiny", "clip=by_pattern", f"clip.rules={rules.replace('alpha', 'alfa')}")
