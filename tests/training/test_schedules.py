"""Schedules against their closed forms, step by step."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.errors import ConfigError
from bitnet_train.steps import as_steps
from bitnet_train.training.schedules.checks import check_schedule
from bitnet_train.training.schedules.config import (
    SCHEDULE_CONFIGS,
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    PolynomialSchedule,
    ScheduleConfig,
    Shape,
    StageConfig,
    TwoStageSchedule,
    WsdSchedule,
)
from bitnet_train.training.schedules.factors import (
    POSITIVE,
    SCHEDULES,
    glide,
    learning_rate,
    schedule_factors,
    weight_decay,
)

TOTAL = 200
STAGES = [
    StageConfig(share=0.25, lr=1.0, shape=Shape.cosine, final=0.5, weight_decay=1.0,
                weight_decay_shape=Shape.cosine, weight_decay_final=0.0),
    StageConfig(share=0.75, lr=0.2, shape=Shape.linear, final=0.0, weight_decay=0.3),
]  # fmt: skip
EVERY = [
    ConstantSchedule(warmup=10),
    LinearSchedule(warmup=0.1, final=0.1),
    CosineSchedule(warmup=10, final=0.2),
    WsdSchedule(warmup=10, decay=40, final=0.1),
    WsdSchedule(warmup=10, decay=0.2, shape=Shape.cosine),
    WsdSchedule(warmup=10, decay=0.2, shape=Shape.one_minus_sqrt),
    WsdSchedule(warmup=10, decay=0.2, shape=Shape.exponential, final=0.1),
    WsdSchedule(warmup=10, decay=0.2, shape=Shape.inverse, final=0.2),
    PolynomialSchedule(warmup=10, power=2.0, final=0.05),
    ExponentialSchedule(warmup=10, final=0.05),
    InverseSqrtSchedule(warmup=10),
    InverseSqrtSchedule(warmup=10, timescale=30, decay=0.2, shape=Shape.inverse_sqrt, final=0.1),
    TwoStageSchedule(warmup=10, stages=STAGES),
]


def curve(cfg: ScheduleConfig, total: int = TOTAL) -> list[float]:
    return [learning_rate(cfg, 1.0, step, total) for step in range(total)]


def test_every_schedule_is_tested() -> None:
    assert {type(cfg) for cfg in EVERY} == set(SCHEDULE_CONFIGS.values()) == set(SCHEDULES)


@pytest.mark.parametrize("cfg", EVERY, ids=lambda cfg: cfg.name)
def test_warm_up_rises_on_a_line_to_the_peak(cfg: ScheduleConfig) -> None:
    warm = as_steps(cfg.warmup, TOTAL)
    values = curve(cfg)
    assert values[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert values[0] > 0
    assert values[warm] == pytest.approx(1.0)
    assert max(values) == pytest.approx(1.0)


def test_constant() -> None:
    assert curve(ConstantSchedule()) == [1.0] * TOTAL


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_reaches_its_final_value_in_the_last_step(final: float) -> None:
    values = curve(LinearSchedule(warmup=20, final=final))
    expected = [1 - (1 - final) * (step - 20) / (TOTAL - 1 - 20) for step in range(20, TOTAL)]
    assert values[20:] == pytest.approx(expected)
    assert values[-1] == pytest.approx(final, abs=1e-15)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_half_a_cosine(final: float) -> None:
    values = curve(CosineSchedule(warmup=20, final=final))
    expected = [
        final + (1 - final) * (1 + math.cos(math.pi * (step - 20) / (TOTAL - 21))) / 2 for step in range(20, TOTAL)
    ]
    assert values[20:] == pytest.approx(expected)
    assert values[-1] == pytest.approx(final, abs=1e-15)


@pytest.mark.parametrize("decay", [50, 0.25])
def test_wsd_is_flat_and_then_falls(decay: float) -> None:
    values = curve(WsdSchedule(warmup=20, decay=decay, final=0.1))
    assert values[20:150] == pytest.approx([1.0] * 130)
    assert values[150:] == pytest.approx([1 - 0.9 * (i + 1) / 50 for i in range(50)])
    assert values[-1] == pytest.approx(0.1)


def test_wsd_without_decay_stays() -> None:
    assert curve(WsdSchedule(decay=0)) == [1.0] * TOTAL


def test_two_stages_have_their_own_peaks_shapes_and_ends() -> None:
    cfg = TwoStageSchedule(warmup=10, stages=STAGES)
    values = curve(cfg)
    first = [0.5 + 0.5 * (1 + math.cos(math.pi * (step - 10) / 39)) / 2 for step in range(10, 50)]
    second = [0.2 - 0.2 * (step - 50) / 149 for step in range(50, TOTAL)]
    assert values[10:50] == pytest.approx(first)
    assert values[50:] == pytest.approx(second)
    assert (values[49], values[50]) == pytest.approx((0.5, 0.2))
    assert values[-1] == 0


def test_two_stages_have_their_own_weight_decay() -> None:
    cfg, flat = TwoStageSchedule(warmup=10, stages=STAGES), ConstantSchedule()
    values = [weight_decay(cfg, flat, 0.1, step, TOTAL) for step in range(TOTAL)]
    # The weight decay's own way starts with the stage, not with the end of the learning rate's warm-up.
    assert values[:50] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 49)) for step in range(50)], abs=1e-12)
    assert values[50:] == pytest.approx([0.03] * 150)


def test_stages_cover_every_step_whatever_the_rounding() -> None:
    stages = [StageConfig(share=1 / 3, lr=float(i), shape=Shape.constant) for i in (1, 2, 3)]
    for total in range(3, 40):
        values = curve(TwoStageSchedule(stages=stages), total)
        assert values == sorted(values)
        for i in (1, 2, 3):
            assert abs(values.count(float(i)) - total / 3) < 1


def test_a_decay_without_its_own_schedule_is_the_peak() -> None:
    for cfg in EVERY[:-1]:
        assert {weight_decay(cfg, ConstantSchedule(), 0.1, step, TOTAL) for step in range(TOTAL)} == {0.1}


def test_weight_decay_is_peak_times_stage_times_its_own_schedule() -> None:
    own = LinearSchedule(warmup=20, final=0.5)
    for cfg in EVERY:
        for step in range(TOTAL):
            product = 0.1 * schedule_factors(cfg, step, TOTAL).weight_decay * schedule_factors(own, step, TOTAL).lr
            assert weight_decay(cfg, own, 0.1, step, TOTAL) == pytest.approx(product)
    assert weight_decay(EVERY[0], own, 0.1, 0, TOTAL) == pytest.approx(0.1 / 20)
    assert weight_decay(EVERY[0], own, 0.1, TOTAL - 1, TOTAL) == pytest.approx(0.05)


@pytest.mark.parametrize("cfg", EVERY, ids=lambda cfg: cfg.name)
def test_a_pure_function_of_the_step(cfg: ScheduleConfig) -> None:
    forwards = [schedule_factors(cfg, step, TOTAL) for step in range(TOTAL)]
    backwards = [schedule_factors(cfg, step, TOTAL) for step in reversed(range(TOTAL))]
    assert forwards == backwards[::-1]
    assert learning_rate(cfg, 3e-3, 77, TOTAL) == pytest.approx(3e-3 * forwards[77].lr)


@pytest.mark.parametrize("cfg", EVERY, ids=lambda cfg: cfg.name)
def test_neighbouring_steps_are_close_except_at_a_border(cfg: ScheduleConfig) -> None:
    # 1 - sqrt falls steeply in the first step of its 40: by 0.158.
    jumps = [step for step, (a, b) in enumerate(pairwise(curve(cfg))) if abs(a - b) > 0.16]
    assert jumps == ([49] if isinstance(cfg, TwoStageSchedule) else [])


@given(st.sampled_from(list(Shape)), st.floats(0, 2), st.floats(0, 2), st.floats(-1, 2))
def test_glide_stays_between_its_ends(shape: Shape, start: float, end: float, progress: float) -> None:
    if shape in POSITIVE:
        start, end = start + 0.01, end + 0.01
    value = glide(shape, start, end, progress)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12
    assert glide(shape, start, end, 0.0) == pytest.approx(start)
    if shape is not Shape.constant:
        assert glide(shape, start, end, 1.0) == pytest.approx(end)


@given(st.sampled_from(EVERY), st.integers(20, 3000))
def test_no_factor_is_negative_or_above_the_peak(cfg: ScheduleConfig, total: int) -> None:
    try:
        check_schedule(cfg, total)
    except ConfigError:
        return
    for step in {0, 1, total // 4, total // 2, total - 2, total - 1}:
        factors = schedule_factors(cfg, step, total)
        assert 0 <= factors.lr <= 1 + 1e-12
        assert 0 <= factors.weight_decay <= 1 + 1e-12


def test_shares_and_steps() -> None:
    assert (as_steps(0.05, 500), as_steps(25, 500), as_steps(0, 500), as_steps(1, 500)) == (25, 25, 0, 1)


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (LinearSchedule(warmup=200), "warmup=200"),
        (LinearSchedule(warmup=-1), "warmup=-1"),
        (LinearSchedule(final=-0.1), "final"),
        (WsdSchedule(warmup=100, decay=101), "longer than the run"),
        (TwoStageSchedule(), "stages is empty"),
        (TwoStageSchedule(stages=[StageConfig(share=0.6), StageConfig(share=0.6)]), "add up to 1.2"),
        (TwoStageSchedule(stages=[StageConfig(share=1.5), StageConfig(share=-0.5)]), "share must be positive"),
        (TwoStageSchedule(warmup=60, stages=STAGES), "shorter than the first stage"),
        (TwoStageSchedule(stages=[StageConfig(share=1.0, shape=Shape.constant, final=0.5)]), "has no effect"),
        (TwoStageSchedule(stages=[StageConfig(share=1.0, weight_decay_final=0.5)]), "has no effect"),
    ],
)  # fmt: skip
def test_impossible_schedules_are_refused(cfg: ScheduleConfig, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_schedule(cfg, TOTAL, "weight_decay_schedule")
    assert said in str(caught.value)
    assert "weight_decay_schedule" in str(caught.value)


def test_a_stage_of_the_weight_decays_own_schedule_has_no_second_weight_decay() -> None:
    good = TwoStageSchedule(stages=[StageConfig(share=0.5), StageConfig(share=0.5, lr=0.0, shape=Shape.constant)])
    check_schedule(good, 100, "weight_decay_schedule")
    bad = TwoStageSchedule(stages=[StageConfig(share=1.0, weight_decay=0.5)])
    check_schedule(bad, 100)
    with pytest.raises(ConfigError, match="have no effect"):
        check_schedule(bad, 100, "weight_decay_schedule")
