"""What is quantised how in which step: the borders of every way from float to quantised."""

import itertools
import math
from collections.abc import Callable

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.quant.config import (
    BitsProgressive,
    BitStage,
    BlockOrder,
    LambdaProgressive,
    LayerwiseProgressive,
    NoiseProgressive,
    NotProgressive,
    ProgressiveConfig,
    Ramp,
    SwitchProgressive,
)
from bitnet_train.quant.progress import QuantState, block_order, finished_spec, moved_back, quant_state, ramp
from bitnet_train.quant.spec import LateInputs, LayerQuant, QuantSpec

LATE = QuantSpec(late=(LateInputs("*", 0.9, (("activation_bits", 4),)),))
TOTAL, BLOCKS = 100, 5


def states(cfg: ProgressiveConfig, spec: QuantSpec = QuantSpec(), blocks: int = BLOCKS) -> list[QuantState]:  # noqa: B008
    """Of every step of a run."""
    return [quant_state(cfg, spec, step, TOTAL, blocks) for step in range(TOTAL)]


@pytest.mark.parametrize("shape", list(Ramp))
@pytest.mark.parametrize(("until", "end"), [(0.2, 20), (0.5, 50), (37, 37), (1, 1)])
def test_lambda_grows_from_0_to_1_and_ends_exactly(shape: Ramp, until: float, end: int) -> None:
    found = states(LambdaProgressive(until=until, shape=shape))
    assert all(state.complete for state in found[end:])
    ramped = [state.strengths for state in found[:end]]
    assert not any(state.complete for state in found[:end])
    assert all(strengths is not None and len(set(strengths)) == 1 and len(strengths) == BLOCKS for strengths in ramped)
    values = [strengths[0] for strengths in ramped if strengths]
    assert values[0] == 0
    assert all(a < b < 1 for a, b in itertools.pairwise(values))
    closed: dict[Ramp, Callable[[float], float]] = {
        Ramp.linear: lambda t: t,
        Ramp.cosine: lambda t: (1 - math.cos(math.pi * t)) / 2,
        Ramp.exponential: lambda t: (1 - math.exp(-5 * t)) / (1 - math.exp(-5)),
    }
    assert values == pytest.approx([closed[shape](step / end) for step in range(end)])


@pytest.mark.parametrize("shape", list(Ramp))
def test_a_ramp_ends_at_one(shape: Ramp) -> None:
    assert ramp(shape, 0.0) == 0
    assert ramp(shape, 1.0) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("at", "step"), [(0.2, 20), (99, 99), (1, 1)])
def test_a_switch_is_float_up_to_its_step(at: float, step: int) -> None:
    found = states(SwitchProgressive(at=at))
    assert [state.complete for state in found] == [False] * step + [True] * (TOTAL - step)
    assert all(state.strengths == (0.0,) * BLOCKS for state in found[:step])


ORDERS = {
    BlockOrder.first_to_last: [0, 1, 2, 3, 4],
    BlockOrder.last_to_first: [4, 3, 2, 1, 0],
    BlockOrder.outside_in: [0, 4, 1, 3, 2],
}


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_are_quantised_one_after_the_other(order: BlockOrder) -> None:
    assert block_order(order, BLOCKS) == ORDERS[order]
    found = states(LayerwiseProgressive(until=0.4, order=order))
    seen = [state.strengths or (1.0,) * BLOCKS for state in found]
    began = [next(step for step in range(TOTAL) if seen[step][block] == 1) for block in ORDERS[order]]
    assert began == [0, 10, 20, 30, 40]  # at equal distances: the first at once, the last at `until`
    for before, after in itertools.pairwise(seen):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    assert [state.complete for state in found] == [False] * 40 + [True] * 60


def test_outside_in_of_an_even_number() -> None:
    assert block_order(BlockOrder.outside_in, 4) == [0, 3, 1, 2]


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_layerwise_ends_with_every_block_whatever_their_number(blocks: int) -> None:
    found = states(LayerwiseProgressive(until=30), blocks=blocks)
    counts = [int(sum(state.strengths)) if state.strengths else blocks for state in found]
    assert counts[0] == (1 if blocks > 1 else 0)
    assert counts[29] == blocks - 1
    assert counts[30:] == [blocks] * 70
    assert counts == sorted(counts)


def test_bits_fall_stage_by_stage_and_the_integers_stay_integers() -> None:
    cfg = BitsProgressive(stages=[BitStage(8, 0.1), BitStage(4, 30), BitStage(3, 0.5)])
    found = states(cfg)
    assert [state.spec.stage_bits for state in found] == [8] * 10 + [4] * 20 + [3] * 20 + [None] * 50
    assert all(state.complete for state in found)
    layers = [found[step].spec.for_layer("layers.0.x") for step in (0, 10, 30, 50)]
    assert [layer.bits for layer in layers] == [8, 4, 3, None]
    assert [layer.statistic for layer in layers] == ["absmax", "absmax", "absmax", "absmean"]
    assert layers[-1] == LayerQuant()


def test_a_stage_takes_no_bits_away() -> None:
    mixed = QuantSpec(LayerQuant(threshold=0.7, groups=2), (
        ("a", LayerQuant("symmetric", bits=8, statistic="absmean")), ("b", LayerQuant("binary")),
        ("c", LayerQuant("float", activation_bits=None)),
    ))  # fmt: skip
    four = quant_state(BitsProgressive(stages=[BitStage(4, 0.5)]), mixed, 0, TOTAL, BLOCKS).spec
    assert four.for_layer("x") == LayerQuant("symmetric", groups=2, bits=4)
    assert four.for_layer("a") == mixed.for_layer("a")
    assert four.for_layer("b") == LayerQuant("symmetric", bits=4)
    assert four.for_layer("c") == mixed.for_layer("c")


def test_noise_ends_with_everything_quantised() -> None:
    found = states(NoiseProgressive(rate=0.3, until=0.9))
    assert [state.noise for state in found] == [0.3] * 90 + [None] * 10
    assert [state.complete for state in found] == [False] * 90 + [True] * 10
    assert all(state.strengths is None for state in found)


WAYS = [
    NotProgressive(),
    LambdaProgressive(),
    SwitchProgressive(),
    LayerwiseProgressive(),
    BitsProgressive(),
    NoiseProgressive(),
]


@pytest.mark.parametrize("cfg", WAYS, ids=lambda cfg: cfg.name)
def test_late_inputs_go_with_every_way(cfg: ProgressiveConfig) -> None:
    bits = [state.spec.for_layer("layers.0.x").activation_bits for state in states(cfg, LATE)]
    assert bits == [8] * 90 + [4] * 10


@pytest.mark.parametrize("cfg", WAYS, ids=lambda cfg: cfg.name)
def test_the_last_step_is_what_ships_and_a_state_is_a_function_of_the_step(cfg: ProgressiveConfig) -> None:
    last = quant_state(cfg, LATE, TOTAL - 1, TOTAL, BLOCKS)
    assert last.complete
    assert last.spec == LATE
    forwards = states(cfg, LATE)
    backwards = [quant_state(cfg, LATE, step, TOTAL, BLOCKS) for step in reversed(range(TOTAL))]
    assert forwards == backwards[::-1]


def test_without_a_way_everything_is_quantised_from_the_first_step_on() -> None:
    assert all(state == QuantState(QuantSpec()) and state.complete for state in states(NotProgressive()))


def test_a_finished_spec_is_that_of_the_last_step() -> None:
    way, spec = SwitchProgressive(at=0.5), QuantSpec()
    assert finished_spec(way, spec, 10, 10, 4, "x") == spec
    assert finished_spec(way, spec, 6, 10, 4, "x") == spec
    with pytest.raises(ConfigError, match="x is of step 5, where the weights are still on their way to codes"):
        finished_spec(way, spec, 5, 10, 4, "x")


@pytest.mark.parametrize(
    ("way", "done", "before", "total", "steps"),
    [
        (SwitchProgressive(at=0.5), 6, 6, 20, "steps 7 to 10 "),
        (SwitchProgressive(at=4), 6, 6, 20, None),
        (SwitchProgressive(at=0.5), 6, 6, 10, None),
        (SwitchProgressive(at=0.5), 2, 6, 20, None),
        (LambdaProgressive(until=0.5), 10, 10, 40, "steps 11 to 20 "),
        (BitsProgressive(stages=[BitStage(8, 0.2), BitStage(4, 0.4)]), 20, 20, 100, "steps 21 to 40 "),
        (LayerwiseProgressive(until=0.5), 8, 20, 60, "steps 9 to 22 "),
        (LayerwiseProgressive(until=10), 8, 20, 60, None),
        (NotProgressive(), 6, 6, 20, None),
    ],
)
def test_borders_that_move_back_are_said(
    way: ProgressiveConfig, done: int, before: int, total: int, steps: str | None
) -> None:
    said = moved_back(way, QuantSpec(), done, before, total, blocks=8)
    assert (said is None) is (steps is None)
    if said is not None:
        assert f"trainer.max_steps went from {before} to {total}" in said
        assert steps is not None
        assert steps in said


def test_late_inputs_that_move_back_are_said() -> None:
    late = LateInputs("*", 0.8, (("activation_bits", 4),))
    said = moved_back(NotProgressive(), QuantSpec(late=(late,)), 40, 40, 80, blocks=8)
    assert said is not None
    assert "steps 41 to 64 " in said
