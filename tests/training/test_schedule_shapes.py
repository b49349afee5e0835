"""Warm-ups, ways down and the schedules from elsewhere, against their closed forms at every border."""

import itertools
import math
from itertools import pairwise

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.training.schedules.checks import check_schedule
from bitnet_train.training.schedules.config import (
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
from bitnet_train.training.schedules.factors import glide, learning_rate, schedule_factors, weight_decay
from tests.composing import compose_config

TOTAL = 120


def curve(cfg: ScheduleConfig, total: int = TOTAL) -> list[float]:
    check_schedule(cfg, total)
    return [learning_rate(cfg, 1.0, step, total) for step in range(total)]


def kinds(**warm: object) -> list[ScheduleConfig]:
    stages = [StageConfig(share=0.5, final=0.4), StageConfig(share=0.25, lr=0.3, shape=Shape.cosine, final=0.1),
              StageConfig(share=0.25, lr=0.05, shape=Shape.constant)]  # fmt: skip
    made = [
        ConstantSchedule(),
        LinearSchedule(),
        CosineSchedule(),
        PolynomialSchedule(power=3.0),
        ExponentialSchedule(),
        InverseSqrtSchedule(timescale=25.0),
        WsdSchedule(decay=24, shape=Shape.one_minus_sqrt),
        TwoStageSchedule(stages=stages),
    ]
    for cfg in made:
        for key, value in warm.items():
            setattr(cfg, key, value)
    return made


# The last step of each of `kinds`, in the same order.
ENDS = [1.0, 0.0, 0.1, 0.0, 0.1, (1 + 99 / 25) ** -0.5, 0.0, 0.05]


@pytest.mark.parametrize("shape", [Shape.linear, Shape.cosine, Shape.exponential, Shape.one_minus_sqrt])
@pytest.mark.parametrize("start", [0.0, 0.25])
def test_every_schedule_has_every_warm_up(shape: Shape, start: float) -> None:
    if shape is Shape.exponential and start == 0:
        return
    for cfg, end in zip(kinds(warmup=20, warmup_start=start, warmup_shape=shape), ENDS, strict=True):
        values = curve(cfg)
        assert values[:20] == pytest.approx([glide(shape, start, 1.0, (step + 1) / 20) for step in range(20)])
        assert values[0] > start
        assert (values[19], values[20]) == pytest.approx((1.0, 1.0))
        assert values[-1] == pytest.approx(end, abs=1e-12)
        assert max(values) <= 1 + 1e-12


def test_warm_up_factors_by_hand() -> None:
    linear = curve(ConstantSchedule(warmup=4, warmup_start=0.2), 8)
    assert linear == pytest.approx([0.4, 0.6, 0.8, 1.0, 1, 1, 1, 1])
    cosine = curve(ConstantSchedule(warmup=4, warmup_shape=Shape.cosine), 6)
    assert cosine == pytest.approx([0.5 * (1 - math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4, 4, 4)])
    exponential = curve(ConstantSchedule(warmup=4, warmup_start=0.0625, warmup_shape=Shape.exponential), 5)
    assert exponential == pytest.approx([0.125, 0.25, 0.5, 1, 1])


@pytest.mark.parametrize("total", [1, 2, 3])
def test_runs_of_one_two_and_three_steps(total: int) -> None:
    for cfg, end in zip(kinds()[:5], ENDS, strict=False):
        values = curve(cfg, total)
        # A single step is the first one: it has the peak.
        assert values[0] == 1.0
        assert values[-1] == pytest.approx(1.0 if total == 1 else end)
    assert curve(InverseSqrtSchedule(timescale=25.0), total) == [(1 + step / 25) ** -0.5 for step in range(total)]
    assert curve(WsdSchedule(decay=1), total) == [*[1.0] * (total - 1), 0.0]
    if total > 1:
        warmed = curve(LinearSchedule(warmup=1), total)
        assert warmed[0] == 1.0
        assert warmed[1] == 1.0


def test_polynomial_and_exponential() -> None:
    assert curve(PolynomialSchedule(warmup=20, power=2.5, final=0.1))[20:] == pytest.approx(
        [0.1 + 0.9 * (1 - i / 99) ** 2.5 for i in range(100)]
    )
    assert curve(PolynomialSchedule(warmup=20)) == pytest.approx(curve(LinearSchedule(warmup=20)))
    values = curve(ExponentialSchedule(warmup=20, final=0.01))
    assert [b / a for a, b in pairwise(values[20:])] == pytest.approx([0.01 ** (1 / 99)] * 99)


def test_the_transformers_and_t5s_inverse_root() -> None:
    # Vaswani et al. (2017), equation 3, relative to its peak: min(n^-0.5, n * warm^-1.5) * warm^0.5, n from 1.
    noam = curve(InverseSqrtSchedule(warmup=16))
    assert noam[:16] == pytest.approx([n * 16**-1.5 * 4 for n in range(1, 17)])
    assert noam[16:] == pytest.approx([4 * step**-0.5 for step in range(16, TOTAL)])
    # Raffel et al. (2019), section 3.1.2: 1 / sqrt(max(n, k)), relative to its peak.
    t5 = curve(InverseSqrtSchedule(warmup=16, warmup_start=1.0, warmup_shape=Shape.constant))
    assert t5 == pytest.approx([4 / math.sqrt(max(step, 16)) for step in range(TOTAL)])


def test_inverse_root_with_a_cooldown() -> None:
    values = curve(InverseSqrtSchedule(warmup=10, timescale=40, decay=30))
    assert values[10:90] == pytest.approx([(1 + i / 40) ** -0.5 for i in range(80)])
    # On from the last step before it, on a line to zero.
    assert values[90:] == pytest.approx([values[89] * (29 - i) / 30 for i in range(30)], abs=1e-12)
    share = curve(InverseSqrtSchedule(warmup=10, timescale=1 / 3, decay=0.25))
    assert share == pytest.approx(values)


@pytest.mark.parametrize("shape", [s for s in Shape if s is not Shape.constant])
def test_every_way_down_of_wsd(shape: Shape) -> None:
    final = 0.1
    values = curve(WsdSchedule(warmup=12, decay=50, shape=shape, final=final))
    assert values[12:70] == pytest.approx([1.0] * 58)
    formulas = {
        Shape.linear: lambda p: 1 - 0.9 * p,
        Shape.cosine: lambda p: 0.1 + 0.45 * (1 + math.cos(math.pi * p)),
        Shape.one_minus_sqrt: lambda p: 0.1 + 0.9 * (1 - math.sqrt(p)),
        Shape.exponential: lambda p: 0.1**p,
        Shape.inverse: lambda p: 1 / (10 * p + (1 - p)),
        Shape.inverse_sqrt: lambda p: 1 / math.sqrt(100 * p + (1 - p)),
    }
    assert values[70:] == pytest.approx([formulas[shape](n / 50) for n in range(1, 51)])
    assert all(a > b for a, b in pairwise(values[69:]))


def test_stages_take_every_way_and_meet_where_they_are_told_to() -> None:
    for shapes in itertools.permutations([s for s in Shape if s is not Shape.constant], 3):
        ends = [(1.0, 0.5), (0.5, 0.8), (0.8, 0.2)]
        stages = [StageConfig(share=1 / 3, lr=a, shape=s, final=b) for s, (a, b) in zip(shapes, ends, strict=True)]
        values = curve(TwoStageSchedule(stages=stages))
        assert [values[i] for i in (0, 39, 40, 79, 80, 119)] == pytest.approx([1.0, 0.5, 0.5, 0.8, 0.8, 0.2])


def test_the_weight_decay_drops_at_two_thirds_and_the_learning_rate_at_half() -> None:
    trilm = [
        "schedule=two_stage",
        "schedule.stages=[{share: 0.5, final: 0.5}, {share: 0.5, lr: 0.3125, final: 0.0}]",
        "weight_decay_schedule=two_stage",
        "weight_decay_schedule.stages=[{share: 0.6666667, shape: constant}, "
        "{share: 0.3333333, lr: 0.0, shape: constant}]",
    ]
    cfg = compose_config("+recipe=tiny", *trilm, "schedule.warmup=5", "trainer.max_steps=120")
    assert all(line in (TwoStageSchedule.__doc__ or "").replace("\n", "") for line in trilm[:3])
    rates = [learning_rate(cfg.schedule, 2.4e-3, step, 120) for step in range(120)]
    decays = [weight_decay(cfg.schedule, cfg.weight_decay_schedule, 0.1, step, 120) for step in range(120)]
    assert (rates[59], rates[60], rates[119]) == pytest.approx((1.2e-3, 7.5e-4, 0.0))
    assert decays == pytest.approx([0.1] * 80 + [0.0] * 40)


def test_every_pair_of_learning_rate_and_weight_decay_schedules_multiplies() -> None:
    for lr, decay in itertools.product(kinds(warmup=20), kinds(warmup=7, warmup_shape=Shape.cosine)):
        check_schedule(decay, TOTAL, "weight_decay_schedule")
        for step in (0, 6, 7, 19, 20, 60, 90, 119):
            assert weight_decay(lr, decay, 0.1, step, TOTAL) == pytest.approx(
                0.1 * schedule_factors(decay, step, TOTAL).lr
            )
            assert learning_rate(lr, 0.3, step, TOTAL) == pytest.approx(0.3 * schedule_factors(lr, step, TOTAL).lr)


HALVES = (StageConfig(share=0.5), StageConfig(share=0.5))


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (LinearSchedule(warmup=5, warmup_start=1.5), "warmup_start"),
        (LinearSchedule(warmup_start=0.5), "no effect without"),
        (LinearSchedule(warmup_shape=Shape.cosine), "no effect without"),
        (LinearSchedule(warmup=5, warmup_shape=Shape.exponential), "never leaves"),
        (LinearSchedule(warmup=5, warmup_shape=Shape.constant), "never leaves"),
        (LinearSchedule(warmup=math.nan), "finite"),
        (CosineSchedule(final=math.inf), "finite"),
        (PolynomialSchedule(power=0), "power must be positive"),
        (ExponentialSchedule(final=0), "never reaches"),
        (InverseSqrtSchedule(), "timescale=null"),
        (InverseSqrtSchedule(timescale=0.001), "less than a step"),
        (InverseSqrtSchedule(timescale=-5), "less than a step"),
        (InverseSqrtSchedule(timescale=5, final=0.5), "have no effect without"),
        (InverseSqrtSchedule(timescale=5, warmup=100, decay=50), "longer than the run"),
        (InverseSqrtSchedule(timescale=5, decay=50, shape=Shape.inverse), "never reaches"),
        (WsdSchedule(shape=Shape.exponential), "never reaches"),
        (WsdSchedule(decay=0, final=0.5), "have no effect without"),
        (TwoStageSchedule(warmup=60, stages=list(HALVES)), "shorter than the first stage"),
        (TwoStageSchedule(stages=[StageConfig(share=0.001), StageConfig(share=0.999)]), "not a single one"),
        (TwoStageSchedule(stages=[StageConfig(share=1.0, lr=-1.0)]), "cannot be negative"),
        (TwoStageSchedule(stages=[StageConfig(share=1.0, shape=Shape.inverse)]), "above 0"),
        (TwoStageSchedule(stages=[StageConfig(share=math.nan)]), "finite"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(cfg: ScheduleConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_schedule(cfg, TOTAL, "weight_decay_schedule")
    assert "weight_decay_schedule" in str(caught.value)
