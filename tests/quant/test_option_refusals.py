"""Quantiser options that contradict themselves are refused, and what overrides set is what holds."""

import re
from typing import Any

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.layout import check_spec
from bitnet_train.quant.config import (
    ActivationQuantConfig,
    BitsProgressive,
    BitStage,
    GradientConfig,
    GradientPrecision,
    Granularity,
    LambdaProgressive,
    LayerwiseProgressive,
    NoiseProgressive,
    NotProgressive,
    OverrideConfig,
    ProgressiveConfig,
    QuantConfig,
    Statistic,
    SwitchProgressive,
    WeightQuantConfig,
    WeightScheme,
)
from bitnet_train.quant.progress import check_progressive
from bitnet_train.quant.spec import FLOAT, InputQuant, LayerQuant, QuantSpec, build_spec
from bitnet_train.steps import as_steps

Symmetric, Binary, Float = WeightScheme.symmetric, WeightScheme.binary, WeightScheme.float
CONFIG = DecoderConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, context=16, vocab=70)


def build(
    weight: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
    overrides: list[dict[str, Any]] | None = None,
    **more: Any,
) -> QuantSpec:
    lists = [OverrideConfig(**fields) for fields in overrides or []]
    return build_spec(
        QuantConfig(WeightQuantConfig(**weight or {}), ActivationQuantConfig(**inputs or {}), overrides=lists, **more)
    )


WEIGHTS = [
    ({"scheme": Symmetric}, "scheme=symmetric needs quant.weight.bits=2, 3, 4 or 8"),
    ({"bits": 4}, "bits=4 belongs to quant.weight.scheme=symmetric, not to ternary"),
    ({"scheme": Binary, "bits": 2}, "bits=2 belongs to quant.weight.scheme=symmetric, not to binary"),
    ({"scheme": Symmetric, "bits": 5}, "quant.weight.bits is 5; use 2, 3, 4 or 8"),
    ({"scheme": Symmetric, "bits": 1}, "quant.weight.bits is 1"),
    ({"statistic": Statistic.absmax}, "statistic=absmax does not go with ternary weights: use absmean or absmedian"),
    ({"scheme": Binary, "statistic": Statistic.absmax}, "does not go with binary weights"),
    ({"scheme": Symmetric, "bits": 4, "statistic": Statistic.absmedian}, "absmedian does not go with symmetric"),
    ({"scheme": Symmetric, "bits": 4, "threshold": 0.7}, "threshold only acts on ternary weights, not on 'symmetric'"),
    ({"group_rows": 0}, "group_rows=0 must be at least 1"),
    ({"group_rows": 4, "groups": 2}, "group_rows=4 must be at least 1 and stands in the place of quant.weight.groups"),
    ({"group_rows": 4, "groups": "row"}, "leave one of them out"),
]
FLOATS = [
    ({"group_rows": 4}, "groups has no effect on float"),
    ({"bits": 4}, "bits, statistic and trainable_scale have no effect on float weights"),
    ({"trainable_scale": True}, "trainable_scale have no effect on float"),
    ({"statistic": Statistic.absmedian}, "statistic and trainable_scale have no effect on float"),
    ({"threshold": 0.6}, "threshold only acts on ternary weights, not on 'float'"),
]
Group, Tensor = Granularity.group, Granularity.tensor
INPUTS = [
    ({"bits": 1}, "activation.bits is 1; use 2 to 8, or null"),
    ({"bits": 9}, "activation.bits is 9"),
    ({"statistic": Statistic.absmedian}, "activation.statistic is absmedian; use absmax or absmean"),
    ({"granularity": Group}, "group_size is None with granularity=group: granularity=group needs it"),
    ({"group_size": 8}, "group_size is 8 with granularity=token"),
    ({"granularity": Tensor, "group_size": 8}, "group_size is 8 with granularity=tensor"),
    ({"granularity": Group, "group_size": 0}, "group_size is 0; it must be at least 1"),
    ({"top_k": 0.0}, "top_k is 0; it is a share above 0 and at most 1"),
    ({"top_k": 1.5}, "top_k is 1.5"),
    ({"top_k": float("nan")}, "top_k is nan"),
    *(
        ({"bits": None} | fields, "do nothing to float inputs (quant.activation.bits=null): remove them")
        for fields in (
            {"statistic": Statistic.absmean},
            {"granularity": Tensor},
            {"granularity": Group, "group_size": 8},
            {"top_k": 0.5},
            {"hadamard": True},
        )
    ),
]
OVERRIDES = [
    ([{"pattern": "a", "bits": 4}], "bits=4 belongs to quant.weight.scheme=symmetric"),
    ([{"pattern": "a", "scheme": Symmetric}], "scheme=symmetric needs"),
    ([{"pattern": "a", "group_rows": 4, "groups": 2}], "stands in the place of quant.weight.groups"),
    ([{"pattern": "a", "scheme": Float, "trainable_scale": True}], "'a' is float, so trainable_scale would do nothing"),
    ([{"pattern": "a", "scheme": Float, "top_k": 0.5, "hadamard": True}], "so top_k and hadamard would do nothing"),
    ([{"pattern": "a", "activation_bits": 0, "hadamard": True}], "do nothing to float inputs"),
    ([{"pattern": "a", "activation_bits": 12}], "activation.bits is 12"),
    ([{"pattern": "a", "since": 0.5, "scheme": Binary}], "'a' since 0.5: scheme cannot change on the way"),
    ([{"pattern": "a", "since": 0.5, "hadamard": True}], "hadamard cannot change on the way; only activation_*"),
    ([{"pattern": "a", "since": 9, "groups": 2, "top_k": 0.5}], "'a' since 9: groups cannot change"),
    ([{"pattern": "a", "since": 0.5}], "give the activation_* settings that change then (8 to 2 bits)"),
    ([{"pattern": "a", "since": 0.5, "activation_bits": 0}], "give the activation_* settings"),
    ([{"pattern": "a", "since": 0.0, "activation_bits": 4}], "since 0: it must be positive: a step, or below 1"),
    ([{"pattern": "a", "since": -3, "top_k": 0.5}], "it must be positive"),
]


@pytest.mark.parametrize(("weight", "message"), WEIGHTS)
def test_weights(weight: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(weight)


@pytest.mark.parametrize(("weight", "message"), FLOATS)
def test_float_weights(weight: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build({"scheme": Float} | weight, {"bits": None})


@pytest.mark.parametrize(("inputs", "message"), INPUTS)
def test_inputs(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(inputs=inputs)


@pytest.mark.parametrize(("overrides", "message"), OVERRIDES)
def test_overrides(overrides: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(overrides=overrides)


@pytest.mark.parametrize(
    ("weight", "overrides"),
    [
        ({"scheme": Symmetric, "bits": 8}, []),
        ({}, [{"pattern": "a", "scheme": Symmetric, "bits": 8}]),
    ],
)
def test_fp8_gradients_hold_no_8_bit_codes(weight: dict[str, Any], overrides: list[dict[str, Any]]) -> None:
    fp8 = GradientConfig(dx=GradientPrecision.fp8)
    with pytest.raises(ConfigError, match="fp8 does not hold 8-bit weight codes exactly: use int8 or bf16"):
        build(weight, overrides=overrides, gradient=fp8)
    assert build({"scheme": Symmetric, "bits": 4}, gradient=fp8).gradient.dx == "fp8"


# --- what overrides come to ---


def test_overrides_set_every_option() -> None:
    fields: dict[str, Any] = {
        "scheme": Symmetric, "bits": 4, "statistic": Statistic.absmean, "group_rows": 2, "trainable_scale": True,
        "activation_bits": 4, "activation_statistic": Statistic.absmean, "activation_granularity": Group,
        "activation_group_size": 16, "top_k": 0.5, "hadamard": True,
    }  # fmt: skip
    layer = build(overrides=[{"pattern": "a", **fields}]).for_layer("a")
    assert layer == LayerQuant(
        "symmetric", 0.5, 1, 4, 4, "absmean", 2, True, "absmean", "group", 16, 0.5, True
    )  # fmt: skip
    assert layer.inputs == InputQuant(4, "absmean", "group", 16, 0.5, True)
    assert build(overrides=[{"pattern": "a", **fields}]).for_layer("b") == LayerQuant()


def test_another_scheme_starts_from_its_own_statistic_and_bits() -> None:
    weight = {"scheme": Symmetric, "bits": 4, "groups": 2}
    overrides = [{"pattern": "t", "scheme": WeightScheme.ternary}, {"pattern": "e", "bits": 8}]
    spec = build(weight, overrides=overrides)
    assert spec.for_layer("t") == LayerQuant("ternary", groups=2)
    assert spec.for_layer("e") == LayerQuant("symmetric", groups=2, bits=8)
    assert spec.for_layer("e").statistic == "absmax"
    assert build({"statistic": Statistic.absmedian}, overrides=[{"pattern": "s", "scheme": Symmetric, "bits": 2}]
                 ).for_layer("s").statistic == "absmax"  # fmt: skip


def test_groups_and_rows_of_a_group_replace_each_other() -> None:
    rows = build({"group_rows": 4}, overrides=[{"pattern": "a", "groups": 2}, {"pattern": "b", "group_rows": 8}])
    assert (rows.for_layer("a").groups, rows.for_layer("a").group_rows) == (2, None)
    assert (rows.for_layer("b").groups, rows.for_layer("b").group_rows) == (1, 8)
    groups = build({"groups": "row"}, overrides=[{"pattern": "a", "group_rows": 2}])
    assert (groups.for_layer("a").groups, groups.for_layer("a").group_rows) == (1, 2)


def test_float_inputs_inherit_no_settings_of_quantised_ones() -> None:
    spec = build(inputs={"bits": 4, "hadamard": True, "top_k": 0.5}, overrides=[{"pattern": "a", "activation_bits": 0}])
    assert spec.for_layer("a").inputs == InputQuant(None)


# --- late inputs ---

LATE = [
    {"pattern": "*.o_proj", "hadamard": True},
    {"pattern": "*", "activation_bits": 4, "activation_statistic": Statistic.absmean, "since": 0.5},
    {"pattern": "*.o_proj", "top_k": 0.5, "since": 80},
]


def test_late_inputs_hold_from_their_step_on_and_count_as_begun_without_one() -> None:
    spec, o, q = build(overrides=LATE), "layers.0.self_attn.o_proj", "layers.0.self_attn.q_proj"
    rotated = InputQuant(hadamard=True)
    four, rotated_four = InputQuant(4, "absmean"), InputQuant(4, "absmean", hadamard=True)
    sparse = InputQuant(4, "absmean", top_k=0.5, hadamard=True)
    wanted = {0: (rotated, InputQuant()), 49: (rotated, InputQuant()), 50: (rotated_four, four),
              79: (rotated_four, four), 80: (sparse, four), 99: (sparse, four)}  # fmt: skip
    for step, (of_o, of_q) in wanted.items():
        now = spec.at(step, 100)
        assert (now.for_layer(o).inputs, now.for_layer(q).inputs) == (of_o, of_q), step
    assert (spec.for_layer(o).inputs, spec.for_layer(q).inputs) == (sparse, four)
    assert spec.for_layer(o).scheme == "ternary"


def test_the_order_of_late_changes_is_that_of_the_list() -> None:
    one, two = {"activation_bits": 4, "since": 20}, {"activation_bits": 6, "since": 10}
    first = build(overrides=[{"pattern": "*", **one}, {"pattern": "*", **two}])
    assert [first.at(step, 99).for_layer("a").activation_bits for step in (9, 10, 20)] == [8, 6, 6]
    second = build(overrides=[{"pattern": "*", **two}, {"pattern": "*", **one}])
    assert [second.at(step, 99).for_layer("a").activation_bits for step in (9, 10, 20)] == [8, 6, 4]


def test_late_changes_are_held_against_the_layers_that_they_meet() -> None:
    # One layer's float inputs have no top_k; that the other one's have is no contradiction.
    apart = build(overrides=[
        {"pattern": "*.q_proj", "activation_bits": 0}, {"pattern": "*.o_proj", "top_k": 0.5, "since": 0.5},
    ])  # fmt: skip
    check_spec(CONFIG, apart)
    met = build(overrides=[
        {"pattern": "*.q_proj", "activation_bits": 0}, {"pattern": "*", "top_k": 0.5, "since": 0.5},
    ])  # fmt: skip
    with pytest.raises(ConfigError, match="do nothing to float inputs"):
        check_spec(CONFIG, met)


def test_late_patterns_that_meet_nothing_are_refused() -> None:
    nothing = build(overrides=[{"pattern": "layers.7.*", "top_k": 0.5, "since": 0.5}])
    with pytest.raises(ConfigError, match=r"'layers\.7\.\*' matches no linear layer"):
        check_spec(CONFIG, nothing)
    dense = build({"scheme": Float}, {"bits": None}, [{"pattern": "*", "activation_bits": 4, "since": 0.5}])
    with pytest.raises(ConfigError, match=r"'\*' since 0\.5 matches no quantised layer"):
        check_spec(CONFIG, dense)


def test_groups_of_channels_divide_every_quantised_layers_inputs() -> None:
    group = {"granularity": Group, "group_size": 32}
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj: .*group_size=32 does not divide its 48 inputs"):
        check_spec(CONFIG, build(inputs=group))
    check_spec(CONFIG, build(inputs=group, overrides=[{"pattern": "*.down_proj", "scheme": Float}]))
    check_spec(CONFIG, build(inputs=group | {"group_size": 16}))


def test_rotations_mix_no_more_than_two_levels_of_channels() -> None:
    with pytest.raises(ConfigError, match="mixes at most 16,384 channels"):
        InputQuant(hadamard=True).check_width("layers.0.mlp.down_proj", 2**15)
    InputQuant(hadamard=True).check_width("layers.0.mlp.down_proj", 2**15 - 2**14)
    InputQuant().check_width("layers.0.mlp.down_proj", 2**15)


def test_rows_of_a_group_divide_every_quantised_layers_rows() -> None:
    with pytest.raises(ConfigError, match=r"k_proj: quant\.weight\.group_rows=32 does not divide the 16 output rows"):
        check_spec(CONFIG, build({"group_rows": 32}))


# --- progressive ---

TERNARY = QuantSpec()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (LambdaProgressive(until=0.0), "quant.progressive.until=0 is step 0, which must lie within the run"),
        (LambdaProgressive(until=100), "until=100 is step 100, which must lie within the run of trainer.max_steps=100"),
        (LambdaProgressive(until=-0.5), "until=-0.5 is step -50"),
        (LambdaProgressive(until=0.999), "is step 100"),
        (LambdaProgressive(until=float("nan")), "until is nan, which is no number of steps"),
        (SwitchProgressive(at=200), "quant.progressive.at=200 is step 200"),
        (SwitchProgressive(at=float("inf")), "at is inf, which is no number of steps"),
        (LayerwiseProgressive(until=0.001), "until=0.001 is step 0"),
        (NoiseProgressive(until=100), "so that what is trained last is what ships"),
        (NoiseProgressive(rate=0.0), "rate is 0; it is a share between 0 and 1"),
        (NoiseProgressive(rate=1.0), "rate is 1; it is a share"),
        (BitsProgressive(stages=[]), "stages is empty: give at least one, for example {bits: 8, until: 0.1}"),
        (BitsProgressive(stages=[BitStage(5, 0.5)]), "bits must be 3, 4 or 8"),
        (BitsProgressive(stages=[BitStage(4, 0.2), BitStage(2, 0.5)]), "a stage of 2 bits changes nothing"),
        (BitsProgressive(stages=[BitStage(8, 0.5), BitStage(4, 0.5)]), "end at steps 50, 50, which must grow"),
        (BitsProgressive(stages=[BitStage(8, 0.5), BitStage(4, 0.4)]), "end at steps 50, 40"),
        (BitsProgressive(stages=[BitStage(8, 0.001)]), "end at steps 0"),
        (BitsProgressive(stages=[BitStage(8, 100)]), "lie within the run of trainer.max_steps=100"),
    ],
)
def test_ways_that_do_not_end_in_the_run(cfg: ProgressiveConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_progressive(cfg, TERNARY, 100)


@pytest.mark.parametrize(
    "cfg",
    [LambdaProgressive(), SwitchProgressive(), LayerwiseProgressive(), NoiseProgressive(), BitsProgressive()],
    ids=lambda cfg: cfg.name,
)
def test_defaults_fit_a_run_and_a_float_model_has_nothing_to_quantise(cfg: ProgressiveConfig) -> None:
    check_progressive(cfg, TERNARY, 100)
    with pytest.raises(ConfigError, match=f"progressive={cfg.name} has nothing to quantise with quant=none"):
        check_progressive(cfg, QuantSpec(FLOAT), 100)
    check_progressive(NotProgressive(), QuantSpec(FLOAT), 100)


@pytest.mark.parametrize("learned", [QuantSpec(LayerQuant(trainable_scale=True)),
                                     QuantSpec(LayerQuant(), (("a", LayerQuant(trainable_scale=True)),))])  # fmt: skip
def test_learned_scales_do_not_follow_falling_bits(learned: QuantSpec) -> None:
    with pytest.raises(ConfigError, match="which a learned one cannot follow: set quant"):
        check_progressive(BitsProgressive(), learned, 100)
    check_progressive(LambdaProgressive(), learned, 100)


def test_fp8_gradients_do_not_hold_an_8_bit_stage() -> None:
    spec = build(gradient=GradientConfig(dx=GradientPrecision.fp8))
    with pytest.raises(ConfigError, match=r"fp8 does not hold the 8-bit weight codes of quant\.progressive\.stages"):
        check_progressive(BitsProgressive(), spec, 100)
    check_progressive(BitsProgressive(stages=[BitStage(4, 0.2)]), spec, 100)


@pytest.mark.parametrize("since", [100, 0.999, 0.001])
def test_late_inputs_begin_within_the_run(since: float) -> None:
    spec = build(overrides=[{"pattern": "*", "activation_bits": 4, "since": since}])
    with pytest.raises(ConfigError, match=rf"'\*' since {since:g} is step {as_steps(since, 100)}, which must lie"):
        check_progressive(NotProgressive(), spec, 100)


def test_steps_and_shares() -> None:
    assert [as_steps(v, 200) for v in (0, 0.25, 0.999, 1, 1.0, 30, 2e3)] == [0, 50, 200, 1, 1, 30, 2000]
    for value in (1.5, 199.6, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="which is no number of steps: give a whole number"):
            as_steps(value, 200)
