"""Which layer is quantised how: patterns, precedence, and settings that contradict themselves."""

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.quant.config import (
    ActivationQuantConfig,
    GradientConfig,
    GradientPrecision,
    OverrideConfig,
    QuantConfig,
    WeightQuantConfig,
    WeightScheme,
)
from bitnet_train.quant.spec import FLOAT, GradientPolicy, LayerQuant, QuantSpec, build_spec
from bitnet_train.quant.weights import WEIGHT_QUANTISERS

Ternary, Binary, Float = WeightScheme.ternary, WeightScheme.binary, WeightScheme.float


def spec(*overrides: OverrideConfig, bits: int | None = 8, **weight: object) -> QuantSpec:
    return build_spec(QuantConfig(WeightQuantConfig(**weight), ActivationQuantConfig(bits), overrides=list(overrides)))  # type: ignore[arg-type]


def test_the_default_is_the_papers() -> None:
    assert spec().for_layer("layers.0.self_attn.q_proj") == LayerQuant("ternary", 0.5, 1, 8)


def test_every_scheme_but_float_has_a_quantiser() -> None:
    assert {scheme.value for scheme in WeightScheme} == {*WEIGHT_QUANTISERS, "float"}


def test_the_last_matching_override_wins() -> None:
    built = spec(
        OverrideConfig("layers.*", scheme=Binary),
        OverrideConfig("layers.0.*", scheme=Float),
        OverrideConfig("*.q_proj", groups=4),
    )
    assert built.for_layer("layers.1.mlp.up_proj").scheme == "binary"
    assert built.for_layer("layers.0.mlp.up_proj") == FLOAT
    # an override starts from the default, not from an earlier override
    assert built.for_layer("layers.0.self_attn.q_proj") == LayerQuant("ternary", 0.5, 4, 8)
    assert built.for_layer("head") == LayerQuant()


def test_patterns_match_whole_names_with_case() -> None:
    built = spec(OverrideConfig("layers.1?.*.o_proj", scheme=Float))
    assert built.for_layer("layers.12.self_attn.o_proj") == FLOAT
    for other in ("layers.1.self_attn.o_proj", "layers.12.self_attn.o_proj.x", "model.layers.12.self_attn.o_proj",
                  "layers.12.self_attn.O_proj"):  # fmt: skip
        assert built.for_layer(other).quantised


def test_overrides_that_match_nothing_are_named() -> None:
    built = spec(OverrideConfig("layers.0.*", scheme=Float), OverrideConfig("layrs.*", scheme=Float))
    assert built.unmatched(iter(["layers.0.a", "layers.1.a"])) == ["layrs.*"]


def test_overrides_inherit_what_they_do_not_set() -> None:
    overrides = [
        OverrideConfig("a", groups=2),
        OverrideConfig("b", threshold=0.9),
        OverrideConfig("c", activation_bits=0),
    ]
    built = spec(*overrides, threshold=0.7, groups="row")
    assert built.for_layer("a") == LayerQuant("ternary", 0.7, 2, 8)
    assert built.for_layer("b") == LayerQuant("ternary", 0.9, "row", 8)
    assert built.for_layer("c") == LayerQuant("ternary", 0.7, "row", None)


def test_another_scheme_does_not_inherit_the_ternary_threshold() -> None:
    built = spec(OverrideConfig("a", scheme=Binary), threshold=0.7, groups=2, bits=None)
    assert built.for_layer("a") == LayerQuant("binary", 0.5, 2, None)


def test_a_float_default_can_have_quantised_exceptions() -> None:
    built = spec(OverrideConfig("mlp.*", scheme=Ternary), scheme=Float, bits=None)
    assert not built.for_layer("attn").quantised
    assert built.for_layer("mlp.up") == LayerQuant("ternary", 0.5, 1, 8)
    assert built.quantised
    assert not spec(scheme=Float, bits=None).quantised


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        ({"groups": 0}, 8, "groups is 0"),
        ({"groups": -1}, 8, "groups is -1"),
        ({"groups": "rows"}, 8, "groups is 'rows'"),
        ({"threshold": 0.0}, 8, "must be positive"),
        ({"threshold": -0.5}, 8, "must be positive"),
        ({"scheme": Binary, "threshold": 0.7}, 8, "only acts on ternary"),
        ({"scheme": Float, "groups": 2}, None, "no effect on float"),
        ({"scheme": Float}, 8, "with float weights"),
        ({}, 9, "activation.bits is 9"),
        ({}, 0, "activation.bits is 0"),
    ],
)
def test_contradicting_settings_are_refused(weight: dict[str, object], bits: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(bits=bits, **weight)


@pytest.mark.parametrize("fields", [{"threshold": 0.6}, {"groups": 2}, {"activation_bits": 8}])
def test_a_float_override_with_quantiser_settings_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="'a' is float"):
        spec(OverrideConfig("a", scheme=Float, **fields))  # type: ignore[arg-type]


def test_an_override_with_a_bad_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation\.bits is 9"):
        spec(OverrideConfig("a", activation_bits=9))
    with pytest.raises(ConfigError, match="groups is 0"):
        spec(OverrideConfig("a", groups=0))


@pytest.mark.parametrize(("groups", "rows", "count"), [(1, 7, 1), (7, 7, 7), (2, 8, 2), ("row", 9, 9)])
def test_groups_count_scales(groups: int | str, rows: int, count: int) -> None:
    assert LayerQuant(groups=groups).group_count(rows) == count


def test_gradient_precisions_of_a_configuration() -> None:
    cfg = QuantConfig(gradient=GradientConfig(GradientPrecision.fp8, GradientPrecision.int8))
    assert build_spec(cfg).gradient == GradientPolicy("fp8", "int8")
    assert build_spec(QuantConfig()).gradient == GradientPolicy()


@pytest.mark.parametrize(
    ("policy", "compute", "resolved"),
    [
        (("auto", "auto"), "bf16", ("int8", "bf16")),
        (("auto", "auto"), "fp16", ("int8", "fp16")),
        (("auto", "auto"), "fp32", ("fp32", "fp32")),
        (("bf16", "int8"), "fp32", ("bf16", "int8")),
    ],
)
def test_auto_depends_on_the_type_of_the_other_matmuls(
    policy: tuple[str, str], compute: str, resolved: tuple[str, str]
) -> None:
    assert GradientPolicy(*policy).resolve(compute) == resolved


def test_precisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant\.gradient\.dw=fp8 is not supported"):
        GradientPolicy("auto", "fp8")
    with pytest.raises(ConfigError, match=r"quant\.gradient\.dx is 'int4'; use auto, bf16, int8 or fp8"):
        GradientPolicy("int4")


def test_int8_weight_gradients_need_8_bit_inputs_somewhere() -> None:
    gradient = GradientConfig(dw=GradientPrecision.int8)
    assert build_spec(QuantConfig(gradient=gradient)).gradient.dw == "int8"
    assert build_spec(QuantConfig(gradient=gradient, activation=ActivationQuantConfig(None))).gradient.dw == "auto"
