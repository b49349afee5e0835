"""Which models a format cannot hold, and the sentence that says so: the layer, the setting, and what would do."""

from typing import Any

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.export import rules
from bitnet_train.export.config import EmbeddingType, ExportConfig, LinearClass
from bitnet_train.export.rules import (
    FORMAT_RULES,
    PACKAGES,
    check_formats,
    fitting_formats,
    missing_packages,
    no_export,
)
from bitnet_train.export.writers import FORMATS
from bitnet_train.nn.config import Activation, Norms
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from tests.export.conftest import KINDS, decoder_config, held_by

HF, GGUF = ("hf-packed", "hf-master", "hf-dense"), ("gguf-tq2_0", "gguf-tq1_0", "gguf-i2_s")
MAIN_LINE = GGUF[:2]
FIRST = "layers.0.self_attn.q_proj"
TERNARY = QuantSpec()
WIDE: dict[str, Any] = {"hidden": 256, "ffn": 256, "activation": Activation.silu}


def obstacle(format_name: str, spec: QuantSpec = TERNARY, export: ExportConfig | None = None, **shape: Any) -> str:
    found = FORMAT_RULES[format_name](decoder_config(**shape), spec, export or ExportConfig())
    return "" if found is None else found


def refusal(formats: list[str], spec: QuantSpec = TERNARY, **shape: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_formats(ExportConfig(formats=formats), decoder_config(**shape), spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def installed(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """An environment that has everything but ``missing``."""
    monkeypatch.setattr(rules, "find_spec", lambda name: None if name in missing else object())


# Kind -> formats that hold it, beside hf-dense and packed, which hold everything.
HOLDERS = {
    "2b4t": {"hf-packed", "hf-master"},
    "silu": {"hf-packed", "hf-master"},
    "gqa untied": {"hf-packed", "hf-master"},
    "llama": {"hf-packed", "hf-master"},
    "llama relu2 untied": {"hf-packed", "hf-master"},
    "qwen2": {"hf-packed", "hf-master"},
    "qwen3": {"hf-packed", "hf-master"},
    "qwen2 floats": set(),
    "long heads": {"hf-packed", "hf-master"},
    "all parts": set(),
    "binary": {"hf-packed"},
    "mixed": {"hf-packed"},
    "some float": {"hf-packed", "hf-master"},
    "groups": set(),
    "rows": set(),
    "float inputs": set(),
    "unquantised": set(),
    "wide silu": {"hf-packed", "hf-master", *GGUF},
    "wide llama": {"hf-packed", "hf-master", *GGUF},
    "wide llama untied": {"hf-packed", "hf-master", *GGUF},
    "wide groups": {*MAIN_LINE},
    "wide rows": {*MAIN_LINE},
    "wide llama rows": {*MAIN_LINE},
    "wide binary": {"hf-packed", *GGUF},
    "wide mixed": {"hf-packed", *GGUF},
    "half wide 2b4t": {"hf-packed", "hf-master", "gguf-i2_s"},
    "half wide silu": {"hf-packed", "hf-master", "gguf-i2_s"},
    "half wide llama": {"hf-packed", "hf-master", "gguf-i2_s"},
    "half wide odd numbers": {"hf-packed", "hf-master", "gguf-i2_s"},
    "half wide mixed": {"hf-packed", "gguf-i2_s"},
}


def test_every_format_has_a_rule_a_writer_and_its_packages() -> None:
    assert set(FORMAT_RULES) == set(FORMATS) == set(PACKAGES) == {*HF, *GGUF, "packed"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_holds_which_kind(kind: str) -> None:
    holders = {name for name in FORMAT_RULES if kind in held_by(name)}
    # No architecture of transformers has all parts at once.
    assert holders == HOLDERS[kind] | ({"packed"} if kind == "all parts" else {"hf-dense", "packed"})


def test_four_rows_to_a_byte() -> None:
    assert obstacle("hf-packed", ffn=90) == "it packs 4 output rows into a byte, and layers.0.mlp.gate_proj has 90"
    assert not obstacle("hf-master", ffn=90)
    only_down = QuantSpec(FLOAT, (("*.down_proj", LayerQuant()),))
    assert not obstacle("hf-packed", only_down, ffn=90)


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master", *GGUF])
def test_nothing_quantised(format_name: str) -> None:
    assert obstacle(format_name, QuantSpec(FLOAT), **WIDE) == "no layer is quantised"


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master", "gguf-i2_s"])
def test_one_scale_per_tensor(format_name: str) -> None:
    expected = f"it holds one scale per tensor, and {FIRST} has 4 (quant.weight.groups)"
    assert obstacle(format_name, QuantSpec(LayerQuant(groups=4)), **WIDE) == expected
    by_row = QuantSpec(LayerQuant(), (("layers.1.mlp.up_proj", LayerQuant(groups="row")),))
    assert "layers.1.mlp.up_proj has 256" in obstacle(format_name, by_row, **WIDE)


@pytest.mark.parametrize("format_name", ["hf-packed", "hf-master", *GGUF])
def test_inputs_that_are_quantised(format_name: str) -> None:
    expected = f"its consumer quantises activations, and the inputs of {FIRST} are floats (quant.activation.bits)"
    assert obstacle(format_name, QuantSpec(LayerQuant(activation_bits=None)), **WIDE) == expected
    one = QuantSpec(LayerQuant(), (("layers.1.mlp.up_proj", LayerQuant(activation_bits=None)),))
    assert "the inputs of layers.1.mlp.up_proj are floats" in obstacle(format_name, one, **WIDE)


@pytest.mark.parametrize(
    ("layer", "words"),
    [(LayerQuant("binary"), f"{FIRST} is binary at 0.5"), (LayerQuant(threshold=0.7), f"{FIRST} is ternary at 0.7")],
)
def test_master_weights_are_ternarised_at_half_the_scale(layer: LayerQuant, words: str) -> None:
    assert obstacle("hf-master", QuantSpec(layer)) == f"its consumer ternarises at half the scale, and {words}"
    assert not obstacle("hf-packed", QuantSpec(layer))


@pytest.mark.parametrize("format_name", MAIN_LINE)
@pytest.mark.parametrize("norms", [Norms.pre_sub, Norms.pre])
def test_the_main_line_computes_silu(format_name: str, norms: Norms) -> None:
    shape = {**WIDE, "activation": Activation.relu2, "norms": norms}
    assert obstacle(format_name, **shape) == (
        "llama.cpp's main line computes SiLU in the FFN, whatever the file says (model.activation=relu2)"
    )


def test_the_llama_architecture_computes_silu() -> None:
    shape = {**WIDE, "activation": Activation.relu2}
    assert obstacle("gguf-i2_s", **shape, norms=Norms.pre) == (
        "the llama architecture computes SiLU in the FFN (model.activation=relu2 with model.norms=pre)"
    )
    assert not obstacle("gguf-i2_s", **shape)


@pytest.mark.parametrize("format_name", GGUF)
def test_the_bitnet_architectures_have_a_tied_head(format_name: str) -> None:
    expected = "its BitNet architectures use the embedding as the head (model.tie_embeddings=false)"
    assert obstacle(format_name, **WIDE, tie_embeddings=False) == expected
    assert not obstacle(format_name, **WIDE, tie_embeddings=False, norms=Norms.pre)


@pytest.mark.parametrize(("format_name", "multiple"), [*((name, 256) for name in MAIN_LINE), ("gguf-i2_s", 128)])
def test_rows_of_whole_blocks(format_name: str, multiple: int) -> None:
    expected = f"its rows are whole blocks of {multiple} weights, and those of {FIRST} have 320"
    assert obstacle(format_name, **{**WIDE, "hidden": 320}) == expected
    ffn = obstacle(format_name, **{**WIDE, "ffn": 320})
    assert "those of layers.0.mlp.down_proj have 320" in ffn
    float_down = QuantSpec(LayerQuant(), (("*.down_proj", FLOAT),))
    assert not obstacle(format_name, float_down, **{**WIDE, "ffn": 320})


@pytest.mark.parametrize("format_name", GGUF)
def test_an_embedding_of_whole_blocks(format_name: str) -> None:
    q6_k, q8_0 = ExportConfig(embedding=EmbeddingType.q6_k), ExportConfig(embedding=EmbeddingType.q8_0)
    narrow = {**WIDE, "hidden": 128}
    only_down = QuantSpec(FLOAT, (("*.down_proj", LayerQuant()),))
    assert obstacle(format_name, only_down, q6_k, **narrow) == (
        "export.embedding=q6_k needs model.hidden in multiples of 256, it is 128"
    )
    assert not obstacle(format_name, only_down, q8_0, **narrow)
    assert not obstacle(format_name, only_down, q6_k, **WIDE)
    assert obstacle(format_name, only_down, q8_0, **{**WIDE, "hidden": 72}) == (
        "export.embedding=q8_0 needs model.hidden in multiples of 32, it is 72"
    )


@pytest.mark.parametrize("format_name", ["hf-dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_formats_hold_everything(kind: str, format_name: str) -> None:
    fields, spec = KINDS[kind]
    if (kind, format_name) != ("all parts", "hf-dense"):
        assert not obstacle(format_name, spec, **fields)


PRE: dict[str, Any] = {**WIDE, "norms": Norms.pre}


@pytest.mark.parametrize("format_name", HF)
def test_parts_that_no_architecture_of_transformers_has_together(format_name: str) -> None:
    for part, value in (("attention_bias", True), ("qk_norm", True), ("head_width", 32)):
        expected = f"its BitNet architecture has sub-norms and not model.{part}={value} as well"
        assert obstacle(format_name, **{**WIDE, part: value}) == expected
        assert not obstacle(format_name, **{**PRE, part: value})
    both = obstacle(format_name, **PRE, attention_bias=True, qk_norm=True)
    assert both == "its llama has model.attention_bias, its Qwen3 model.qk_norm, and none has both"


def test_autobitlinear_scales_biases() -> None:
    export = ExportConfig(linear_class=LinearClass.autobitlinear)
    assert "multiplies biases by the weight's scale" in obstacle("hf-packed", export=export, **PRE, attention_bias=True)
    assert not obstacle("hf-packed", export=export, **PRE)
    assert not obstacle(
        "hf-packed", export=ExportConfig(linear_class=LinearClass.bitlinear), **PRE, attention_bias=True
    )


@pytest.mark.parametrize("format_name", GGUF)
@pytest.mark.parametrize(("part", "value"), [("attention_bias", True), ("qk_norm", True), ("head_width", 32)])
def test_gguf_files_are_written_without_qwens_parts(format_name: str, part: str, value: object) -> None:
    expected = f"its architectures llama and bitnet are written without it (model.{part}={value})"
    assert obstacle(format_name, **{**PRE, part: value}) == expected


def test_a_named_format_that_cannot_hold_the_model_names_those_that_can() -> None:
    assert refusal(["hf-packed"], QuantSpec(LayerQuant(groups=4))) == (
        f"export.formats: hf-packed cannot hold this model: it holds one scale per tensor, and {FIRST} has 4 "
        "(quant.weight.groups); formats that can: hf-dense, packed."
    )
    assert "formats that can: hf-dense, packed, gguf-tq2_0, gguf-tq1_0." in refusal(
        ["packed", "gguf-i2_s"], QuantSpec(LayerQuant(groups=4)), **WIDE
    )


def test_an_unknown_format_is_named_with_the_nearest() -> None:
    message = refusal(["hf-packd"])
    assert "'hf-packd' does not exist; choose from hf-packed, hf-master, hf-dense, packed, gguf-tq2_0" in message
    assert message.endswith("Did you mean 'hf-packed'?")
    assert not refusal(["nonsense"]).endswith("?")


@pytest.mark.parametrize("tokens", [1, 0, -5])
def test_a_comparison_takes_two_tokens(tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"export.verify_tokens is {tokens}; it must be at least 2"):
        check_formats(ExportConfig(verify_tokens=tokens), decoder_config(), TERNARY)
    check_formats(ExportConfig(verify_tokens=2), decoder_config(), TERNARY)


@pytest.mark.parametrize(
    ("format_name", "missing", "expected"),
    [
        ("hf-packed", ["transformers"], 'transformers, not installed here: pip install "bitnet-train[export]"'),
        ("hf-dense", ["accelerate"], 'accelerate, not installed here: pip install "bitnet-train[export]"'),
        (
            "hf-master",
            ["transformers", "accelerate"],
            'transformers and accelerate, not installed here: pip install "bitnet-train[export]"',
        ),
        ("gguf-i2_s", ["gguf"], 'gguf, not installed here: pip install "bitnet-train[export]"'),
        ("gguf-tq2_0", ["llama_cpp"], 'llama-cpp, not installed here: pip install "bitnet-train[llama-cpp]"'),
        (
            "gguf-tq1_0",
            ["gguf", "llama_cpp"],
            'gguf and llama-cpp, not installed here: pip install "bitnet-train[export,llama-cpp]"',
        ),
    ],
)
def test_packages_that_are_missing(
    format_name: str, missing: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, *missing)
    assert missing_packages(format_name) == f"it is verified with {expected}"
    cfg = ExportConfig(formats=[format_name])
    with pytest.raises(ConfigError) as caught:
        fitting_formats(cfg, decoder_config(**WIDE), TERNARY)
    assert str(caught.value) == f"export.formats: {format_name}: it is verified with {expected}."


def test_nothing_is_missing_where_everything_is(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    assert all(missing_packages(name) is None for name in FORMAT_RULES)
    installed(monkeypatch, "transformers", "accelerate", "gguf", "llama_cpp")
    assert [name for name in FORMAT_RULES if missing_packages(name) is None] == ["packed"]


def test_without_a_wish_every_format_is_written_that_fits_and_can_be_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "llama_cpp")
    names, left_out = fitting_formats(ExportConfig(), decoder_config(**WIDE), QuantSpec(LayerQuant("binary")))
    assert names == ["hf-packed", "hf-dense", "packed", "gguf-i2_s"]
    assert list(left_out) == ["hf-master", "gguf-tq2_0", "gguf-tq1_0"]
    assert "ternarises at half the scale" in left_out["hf-master"]
    assert "llama-cpp, not installed here" in left_out["gguf-tq2_0"]


def test_named_formats_are_written_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    cfg = ExportConfig(formats=["packed", "hf-dense"])
    assert fitting_formats(cfg, decoder_config(), TERNARY) == (["packed", "hf-dense"], {})


def test_a_model_that_no_format_holds_is_said() -> None:
    assert no_export(ExportConfig(), decoder_config(), TERNARY) is None
    rotated = QuantSpec(default=LayerQuant("ternary", hadamard=True, activation_bits=4))
    sentence = no_export(ExportConfig(), decoder_config(), rotated) or ""
    assert sentence.startswith("no export format can hold this model (packed: ")
    assert "hf-dense: " in sentence
    assert "\n" not in sentence
