"""Clip rules against torch's own and against a reimplementation in numpy."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from bitnet_train.training.clipping.config import CLIP_CONFIGS, NoClip, NormClip, PercentileClip
from bitnet_train.training.clipping.rules import CLIP_RULES, ClipRule, build_clip


def parameters(norm: float, seed: int = 0) -> list[nn.Parameter]:
    """Three parameters, one without a gradient, whose whole gradient has the L2 norm ``norm``."""
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2,))]
    grads = [torch.randn(p.shape, generator=generator) for p in made[:2]]
    length = torch.sqrt(sum((g**2).sum() for g in grads)) if math.isfinite(norm) else torch.tensor(1.0)
    for parameter, grad in zip(made, grads, strict=False):
        parameter.grad = grad * (norm / length)
    return made


def named(made: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}.weight", parameter) for i, parameter in enumerate(made)]


def whole_norm(made: list[nn.Parameter]) -> float:
    return float(torch.sqrt(sum((p.grad.double() ** 2).sum() for p in made if p.grad is not None)))


def test_every_rule_has_a_module() -> None:
    assert set(CLIP_CONFIGS.values()) == set(CLIP_RULES)
    for option in CLIP_CONFIGS.values():
        assert isinstance(build_clip(option(), 100), ClipRule)


@pytest.mark.parametrize("norm", [0.0, 0.3, 0.999, 1.0, 1.001, 50.0])
@pytest.mark.parametrize("limit", [0.5, 0.7, 1.0])
def test_a_fixed_norm_is_torchs(norm: float, limit: float) -> None:
    ours, theirs = parameters(norm), parameters(norm)
    result = build_clip(NormClip(max_norm=limit), 100).clip(named(ours), 0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert torch.equal(result.norm, expected)
    assert float(result.threshold) == pytest.approx(limit, rel=1e-7)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad)


def test_no_rule_measures_and_changes_nothing() -> None:
    made = parameters(7.0)
    before = [None if p.grad is None else p.grad.clone() for p in made]
    result = build_clip(NoClip(), 100).clip(named(made), 0)
    assert float(result.norm) == pytest.approx(7.0)
    assert math.isinf(float(result.threshold))
    for parameter, grad in zip(made, before, strict=True):
        assert grad is None or torch.equal(parameter.grad, grad)


class NumpyPercentile:
    """AutoClip in numpy: the finite norms of the last ``window`` steps, the one at hand included."""

    def __init__(self, cfg: PercentileClip) -> None:
        self.cfg, self.norms = cfg, []

    def threshold(self, norm: float) -> float:
        if np.isfinite(norm):
            self.norms.append(np.float32(norm))
        if len(self.norms) < self.cfg.min_history:
            return self.cfg.initial
        return float(np.percentile(np.array(self.norms[-self.cfg.window :], dtype=np.float64), self.cfg.percentile))


def sequence(steps: int, seed: int = 3) -> list[float]:
    """Norms with spikes, NaN and inf among them."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0, 0.7, steps))
    norms[rng.random(steps) < 0.05] *= 100
    norms[rng.random(steps) < 0.06] = np.nan
    norms[rng.random(steps) < 0.04] = np.inf
    norms[0] = np.nan
    return [float(n) for n in norms]


@pytest.mark.parametrize(
    "cfg",
    [
        PercentileClip(percentile=90, window=16, min_history=5, initial=0.7),
        PercentileClip(percentile=50, window=7, min_history=7, initial=1.0),
        PercentileClip(percentile=100, window=4, min_history=1, initial=1.0),
        PercentileClip(percentile=10, window=256, min_history=16, initial=2.0),
    ],
    ids=lambda cfg: f"p{cfg.percentile:g}-w{cfg.window}",
)
def test_the_percentile_is_numpys(cfg: PercentileClip) -> None:
    rule, oracle = build_clip(cfg, 100), NumpyPercentile(cfg)
    for step, norm in enumerate(sequence(120)):
        made = parameters(norm, seed=step)
        result = rule.clip(named(made), 0)
        threshold = oracle.threshold(float(result.norm))
        assert float(result.threshold) == pytest.approx(threshold, rel=1e-5), step
        if math.isfinite(norm):
            assert float(result.norm) == pytest.approx(norm, rel=1e-5)
            assert whole_norm(made) == pytest.approx(min(norm, threshold), rel=1e-4)


def test_what_is_not_a_number_is_not_remembered() -> None:
    rule = build_clip(PercentileClip(window=4, min_history=2), 100)
    for norm in (1.0, float("nan"), 2.0, float("inf")):
        rule.clip(named(parameters(norm)), 0)
    assert int(rule.count) == 2
    assert rule.history[:2].tolist() == pytest.approx([1.0, 2.0])
    assert torch.isnan(rule.history[2:]).all()


@pytest.mark.parametrize("cut", [1, 9, 40, 63])
def test_a_saved_state_continues_identically(cut: int) -> None:
    cfg = PercentileClip(percentile=80, window=16, min_history=5)
    norms = sequence(80)
    whole, first = build_clip(cfg, 100), build_clip(cfg, 100)
    expected = [whole.clip(named(parameters(n, i)), i).threshold for i, n in enumerate(norms)]
    for i, n in enumerate(norms[:cut]):
        first.clip(named(parameters(n, i)), i)
    again = build_clip(cfg, 100)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    continued = [again.clip(named(parameters(n, cut + i)), cut + i).threshold for i, n in enumerate(norms[cut:])]
    assert torch.equal(torch.stack(continued), torch.stack(expected[cut:]))


def test_rules_without_memory_save_nothing() -> None:
    assert build_clip(NormClip(), 100).state_dict() == build_clip(NoClip(), 100).state_dict() == {}


def test_a_low_precision_gradient_is_clipped_too() -> None:
    made = [nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))]
    made[0].grad = torch.full((64,), 2.0, dtype=torch.bfloat16)
    result = build_clip(PercentileClip(min_history=1, window=2, percentile=50), 100).clip(named(made), 0)
    assert float(result.norm) == pytest.approx(16.0)
    assert torch.isfinite(made[0].grad).all()
