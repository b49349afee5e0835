"""Which steps the guard skips, and that a skipped step leaves everything as it was, bit for bit."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bitnet_train.errors import ConfigError, DivergedError
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.training.clipping.config import PercentileClip, ZScoreClip
from bitnet_train.training.clipping.rules import build_clip
from bitnet_train.training.guard.config import GuardConfig, check_guard
from bitnet_train.training.guard.events import (
    Rollback,
    cut_rollbacks,
    go_back,
    read_rollbacks,
    resume_point,
    write_rollbacks,
)
from bitnet_train.training.guard.rule import REMEMBERED, Guard, SkippedStep, build_guard, describe, skip_step
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.optimizers.config import AdamWConfig
from bitnet_train.training.run_folder import RunFolder
from bitnet_train.training.step import clip_gradients

NAN, INF = math.nan, math.inf
OUTLIERS = GuardConfig(skip_non_finite=True, outlier_sigma=3.0, window=16, min_history=5)


def judged(guard: Guard, steps: list[tuple[float, float]], first: int = 0) -> list[bool]:
    return [bool(guard.judge(torch.tensor(a), torch.tensor(b), first + i)) for i, (a, b) in enumerate(steps)]


def history(steps: int = 120) -> list[tuple[float, float]]:
    """Losses and norms with jumps of either, falls, NaN and inf."""
    rng = np.random.default_rng(2)
    values = np.stack([5 + rng.normal(0, 0.1, steps), np.exp(rng.normal(0, 0.2, steps))], 1)
    values[rng.random(steps) < 0.05, 0] += 3
    values[rng.random(steps) < 0.05, 1] *= 30
    values[rng.random(steps) < 0.05, 0] -= 3
    values[rng.random(steps) < 0.04, 1] = INF
    values[[0, 3, 50, 51, 52], 0] = NAN
    return [(float(np.float32(a)), float(np.float32(b))) for a, b in values]


def skipped_by_hand(cfg: GuardConfig, steps: list[tuple[float, float]]) -> list[bool]:
    """The rule in numpy."""
    kept: list[tuple[float, float]] = []
    found = []
    for pair in steps:
        finite = all(math.isfinite(v) for v in pair)
        skip = cfg.skip_non_finite and not finite
        if cfg.outlier_sigma is not None and len(kept) >= cfg.min_history:
            past = np.array(kept[-cfg.window :])
            skip = skip or any(
                v - past[:, i].mean() > cfg.outlier_sigma * past[:, i].std(ddof=1) for i, v in enumerate(pair)
            )
        if finite and not skip:
            kept.append(pair)
        found.append(skip)
    return found


@pytest.mark.parametrize(
    "cfg",
    [GuardConfig(skip_non_finite=True), OUTLIERS, GuardConfig(outlier_sigma=2.0, window=7, min_history=2)],
    ids=["non-finite", "both", "outliers"],
)
def test_the_steps_that_are_skipped_are_numpys(cfg: GuardConfig) -> None:
    guard, steps = Guard(cfg), history()
    found, wanted = judged(guard, steps), skipped_by_hand(cfg, steps)
    assert found == wanted
    assert 4 < sum(found) < 60
    assert int(guard.skipped) == sum(found)
    assert int(guard.in_a_row) == (0 if not found[-1] else found[::-1].index(False))
    remembered = [(s.step, s.loss, s.norm) for s in guard.recent_steps()]
    expected = [(i + 1, *steps[i]) for i, skip in enumerate(found) if skip][-REMEMBERED:]
    assert np.array_equal(remembered, expected, equal_nan=True)


def test_steps_in_a_row_are_counted_and_forgotten() -> None:
    guard = Guard(GuardConfig(skip_non_finite=True))
    rows = []
    for loss in (1.0, NAN, NAN, 1.0, NAN):
        judged(guard, [(loss, 1.0)])
        rows.append(int(guard.in_a_row))
    assert rows == [0, 1, 2, 0, 1]
    assert guard.skipped_last()


def test_a_sudden_fall_is_no_outlier_and_a_long_bad_stretch_does_not_become_the_norm() -> None:
    guard = Guard(OUTLIERS)
    judged(guard, [(5.0 + 0.01 * (i % 3), 1.0 + 0.01 * (i % 2)) for i in range(16)])
    assert judged(guard, [(1.0, 0.01)]) == [False]
    assert judged(guard, [(50.0, 1.0)] * 40) == [True] * 40


@pytest.mark.parametrize("cut", [2, 17, 51, 90])
def test_a_saved_guard_continues_identically(cut: int) -> None:
    steps = history()
    whole, first, again = Guard(OUTLIERS), Guard(OUTLIERS), Guard(OUTLIERS)
    expected = judged(whole, steps)
    judged(first, steps[:cut])
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert judged(again, steps[cut:], cut) == expected[cut:]
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name].nan_to_num(), value.nan_to_num()), name


def test_no_guard_is_built_where_nothing_is_skipped() -> None:
    assert build_guard(GuardConfig()) is None
    assert isinstance(build_guard(GuardConfig(outlier_sigma=6.0)), Guard)


CFG = DecoderConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=64, context=64, vocab=97)
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "built": lambda model: build_optimizer(AdamWConfig(lr=0.01), model),
    "fused-sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
    "unfused-adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=False, foreach=False),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5, weight_decay=0.1),
}


def set_gradients(model: nn.Module, seed: int, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if value is not None:
            parameter.grad.flatten()[0] = value


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state: dict[int, Any] = optimizer.state_dict()["state"]
    found = [p.detach().clone() for p in model.parameters()]
    found += [m.codes.clone() for m in model.modules() if isinstance(getattr(m, "codes", None), Tensor)]
    return found + [v.clone() for s in state.values() for _, v in sorted(s.items()) if isinstance(v, Tensor)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [NAN, INF, 1e30], ids=str)
def test_a_skipped_step_leaves_weights_moments_counters_and_codes(name: str, value: float) -> None:
    model = build_decoder(CFG, QuantSpec(), NormalInit(), 3)
    optimizer = OPTIMIZERS[name](model)
    CodeCache(model, optimizer)
    for seed in range(3):
        set_gradients(model, seed)
        skip_step(optimizer, torch.tensor(False))
        optimizer.step()
    before = everything(model, optimizer)
    assert len(before) > 2 * len(list(model.parameters()))
    set_gradients(model, 7, value)
    skip_step(optimizer, torch.tensor(True))
    optimizer.step()
    for old, new in zip(before, everything(model, optimizer), strict=True):
        assert torch.equal(old, new)
    set_gradients(model, 8)
    skip_step(optimizer, torch.tensor(False))
    optimizer.step()
    assert not all(torch.equal(old, new) for old, new in zip(before, everything(model, optimizer), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_around_a_skipped_one_are_those_of_a_run_without_it(name: str) -> None:
    results = []
    for seeds in ([0, None, 1, 2], [0, 1, 2]):
        model = build_decoder(CFG, QuantSpec(), NormalInit(), 3)
        optimizer = OPTIMIZERS[name](model)
        for seed in seeds:
            set_gradients(model, 9 if seed is None else seed, NAN if seed is None else None)
            if len(seeds) == 4:
                skip_step(optimizer, torch.tensor(seed is None))
            optimizer.step()
        results.append(everything(model, optimizer))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_only_optimizers_that_cannot_skip_on_the_device_lose_their_gradients() -> None:
    for name, keeps in (("built", True), ("rmsprop", False)):
        model = build_decoder(CFG, QuantSpec(), NormalInit(), 3)
        optimizer = OPTIMIZERS[name](model)
        set_gradients(model, 0)
        skip_step(optimizer, torch.tensor(True))
        assert all((p.grad is not None) is keeps for p in model.parameters())


@pytest.mark.parametrize("clip", [PercentileClip(min_history=2), ZScoreClip(warmup=3)])
def test_a_skipped_step_leaves_nothing_in_the_clip_rule(clip: Any) -> None:
    model = build_decoder(CFG, QuantSpec(), NormalInit(), 3)
    optimizer = build_optimizer(AdamWConfig(lr=0.01), model)
    rule, guard = build_clip(clip, 100), Guard(OUTLIERS)
    for step in range(8):
        set_gradients(model, step)
        clip_gradients(model, rule, guard, optimizer, torch.tensor(3.0 + 0.01 * step), step)
    before = copy.deepcopy(rule.state_dict())
    set_gradients(model, 8)
    result = clip_gradients(model, rule, guard, optimizer, torch.tensor(99.0), 8)
    assert guard.skipped_last()
    assert math.isfinite(float(result.clipped))
    for name, value in rule.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


REFUSED = [
    (GuardConfig(outlier_sigma=0.0), "guard.outlier_sigma must be positive"),
    (GuardConfig(outlier_sigma=6.0, window=1, min_history=1), "guard.window=1 must be at least 2"),
    (GuardConfig(outlier_sigma=6.0, window=10**12), "guard.window=1000000000000 must be .* at most 100000"),
    (
        GuardConfig(outlier_sigma=6.0, window=32, min_history=33),
        "guard.min_history=33 at least 2 and at most guard.window",
    ),
    (GuardConfig(skip_non_finite=True, rollback_after=0), "guard.rollback_after is 0"),
    (GuardConfig(skip_non_finite=True, rollback_after=2, max_rollbacks=-1), "guard.max_rollbacks is -1"),
    (GuardConfig(rollback_after=2), "no step is ever skipped"),
    (GuardConfig(window=256), "no step is ever skipped"),
    (GuardConfig(skip_non_finite=True, min_history=20), "guard.min_history has no effect"),
    (GuardConfig(skip_non_finite=True, max_rollbacks=1), "guard.max_rollbacks has no effect"),
]


@pytest.mark.parametrize(("cfg", "wanted"), REFUSED, ids=[wanted[:40] for _, wanted in REFUSED])
def test_what_cannot_be_is_refused(cfg: GuardConfig, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        check_guard(cfg)


def test_what_can_be_passes() -> None:
    assert GuardConfig(window=9).known_steps == 4
    for cfg in (
        GuardConfig(),
        OUTLIERS,
        GuardConfig(outlier_sigma=6.0, window=2),
        GuardConfig(skip_non_finite=True, rollback_after=1, max_rollbacks=0),
    ):
        check_guard(cfg)


def test_skipped_steps_in_words() -> None:
    steps = [SkippedStep(i, 9.5, NAN) for i in (4, 5, 6)]
    assert describe(steps) == "steps 4 to 6 (not finite; the last had loss 9.5 and gradient norm nan)"
    apart = [SkippedStep(4, NAN, NAN), SkippedStep(7, 9.5, 2.0)]
    assert describe(apart) == "steps 4, 7 (far above the steps before; the last had loss 9.5 and gradient norm 2)"


def test_rollbacks_are_kept_in_a_file_up_to_the_step_that_a_run_starts_from(tmp_path: Path) -> None:
    path = tmp_path / "divergence.jsonl"
    assert cut_rollbacks(path, 10) == []
    made = [Rollback(12, 10, 96, 16, "a"), Rollback(15, 10, 136, 40, "b"), Rollback(25, 20, 216, 40, "c")]
    write_rollbacks(path, made)
    assert read_rollbacks(path) == made
    assert resume_point(made, 10) == 136
    assert resume_point(made, 20) == 216
    assert resume_point(made, 15) is None
    with path.open("a") as stream:
        stream.write('{"step": 30, "back')
    assert read_rollbacks(path) == made
    assert cut_rollbacks(path, 19) == made[:2] == read_rollbacks(path)


def test_one_return_too_many_is_a_divergence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    console = Console(file=(tmp_path / "out").open("w"), width=1000)
    first, second = Rollback(12, 10, 96, 16, "skipped step 12 (x)"), Rollback(15, 10, 136, 40, "skipped step 15 (y)")
    go_back(first, [], 1, folder, console)
    assert read_rollbacks(folder.divergence_file) == [first]
    console.file.flush()
    assert "back from step 12 to step 10, and on behind sample 96 (16 left out); return 1 of 1" in (
        (tmp_path / "out").read_text()
    )
    with pytest.raises(DivergedError, match=r"at step 15: .*step 15 \(y\).*max_rollbacks=1 times \(step 12 to 10"):
        go_back(second, [first], 1, folder, console)
    assert read_rollbacks(folder.divergence_file) == [first]
