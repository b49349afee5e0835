"""Which formats hold which quantiser options, the sentence when one does not, and exports of those that can."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import open_checkpoint
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.held_out import HeldOut
from bitnet_train.export.rules import FORMAT_RULES, check_formats
from bitnet_train.export.writers import load_any_export
from bitnet_train.nn.config import Activation, Norms
from bitnet_train.quant.spec import InputQuant, LateInputs, LayerQuant, QuantSpec, input_fields
from bitnet_train.quant.weights import quantise_weight
from tests.conftest import make_text
from tests.export.conftest import SmallRun, decoder_config, save_checkpoint

WIDE: dict[str, Any] = {"hidden": 256, "ffn": 256, "activation": Activation.silu}
FIRST = "layers.0.self_attn.q_proj"
HF, GGUF = {"hf-packed", "hf-master"}, {"gguf-tq2_0", "gguf-tq1_0", "gguf-i2_s"}
EVERY = {*HF, "hf-dense", "packed", *GGUF}


def inputs(*fields: Any) -> LayerQuant:
    return LayerQuant(**input_fields(InputQuant(*fields)))


LEARNED = LayerQuant(trainable_scale=True)
MEDIAN = LayerQuant(statistic="absmedian")
# Option -> the layer, and what holds it (in a model of silu whose sizes fit every format).
HOLDERS: dict[str, tuple[LayerQuant, set[str]]] = {
    "nothing": (LayerQuant(), EVERY),
    "learned": (LEARNED, EVERY - {"hf-master"}),
    "median": (MEDIAN, EVERY - {"hf-master"}),
    "rows": (LayerQuant(group_rows=64), {"hf-dense", "packed", "gguf-tq2_0", "gguf-tq1_0"}),
    "4-bit weights": (LayerQuant("symmetric", bits=4), {"hf-dense"}),
    "8-bit weights": (LayerQuant("symmetric", bits=8), {"hf-dense"}),
    "2-bit weights": (LayerQuant("symmetric", bits=2), EVERY - {"hf-master"}),
    "4-bit inputs": (inputs(4), {"hf-dense"}),
    "mean": (inputs(8, "absmean"), {"hf-dense"}),
    "group": (inputs(8, "absmax", "group", 16), {"hf-dense"}),
    "tensor": (inputs(8, "absmax", "tensor"), {"hf-dense"}),
    "top_k": (inputs(8, "absmax", "token", None, 0.5), set()),
    "hadamard": (inputs(8, "absmax", "token", None, 1.0, True), set()),
    "hadamard 4": (inputs(4, "absmean", "token", None, 1.0, True), set()),
}


def obstacle(format_name: str, layer: LayerQuant, **shape: Any) -> str | None:
    return FORMAT_RULES[format_name](decoder_config(**{**WIDE, **shape}), QuantSpec(layer), ExportConfig())


@pytest.mark.parametrize("option", HOLDERS)
def test_what_holds_which_option(option: str) -> None:
    layer, holders = HOLDERS[option]
    assert {name for name in FORMAT_RULES if obstacle(name, layer) is None} == holders


@pytest.mark.parametrize(
    ("layer", "keys"),
    [
        (inputs(4), "quant.activation.bits"),
        (inputs(4, "absmean"), "quant.activation.bits and quant.activation.statistic"),
        (inputs(8, "absmax", "tensor"), "quant.activation.granularity"),
        (inputs(8, "absmax", "token", None, 0.5, True), "quant.activation.top_k and quant.activation.hadamard"),
    ],
)
def test_consumers_that_quantise_inputs_their_own_way(layer: LayerQuant, keys: str) -> None:
    for name in (*HF, "packed", *GGUF):
        assert obstacle(name, layer) == (
            f"its consumer quantises inputs to 8 bits, one scale per token, and those of {FIRST} are otherwise ({keys})"
        )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_of_more_bits(bits: int) -> None:
    expected = f"it holds codes -1, 0 and 1, and those of {FIRST} have {bits} bits (quant.weight.bits)"
    for name in ("hf-packed", "packed", *GGUF):
        assert obstacle(name, LayerQuant("symmetric", bits=bits)) == expected


def test_master_weights_are_ternarised_by_their_mean() -> None:
    expected = "its consumer takes the mean magnitude for the scale, and that of layers.0.self_attn.q_proj is"
    assert obstacle("hf-master", LEARNED) == f"{expected} learned"
    assert obstacle("hf-master", MEDIAN) == f"{expected} the median"
    assert "is symmetric at 0.5" in str(obstacle("hf-master", LayerQuant("symmetric", bits=2)))


def test_dense_weights_neither_rotate_nor_leave_out() -> None:
    assert obstacle("hf-dense", HOLDERS["hadamard"][0]) == (
        f"its consumer does not rotate the inputs of {FIRST} (quant.activation.hadamard)"
    )
    assert obstacle("hf-dense", HOLDERS["top_k"][0]) == (
        f"its consumer does not leave out the smaller inputs of {FIRST} (quant.activation.top_k)"
    )


def test_nobodys_architecture_has_a_norm_in_every_projection() -> None:
    for name in EVERY - {"packed"}:
        assert obstacle(name, LayerQuant(), norms=Norms.inside) == (
            "no architecture of its consumer has a norm in every projection (model.norms=inside)"
        )
    assert obstacle("packed", LayerQuant(), norms=Norms.inside) is None


def test_one_layer_is_enough_and_the_sentence_names_formats_that_can() -> None:
    spec = QuantSpec(LayerQuant(), (("layers.1.mlp.up_proj", LayerQuant("symmetric", bits=4)),))
    with pytest.raises(ConfigError) as caught:
        check_formats(ExportConfig(formats=["packed"]), decoder_config(), spec)
    assert str(caught.value) == (
        "export.formats: packed cannot hold this model: it holds codes -1, 0 and 1, and those of layers.1.mlp.up_proj "
        "have 4 bits (quant.weight.bits); formats that can: hf-dense."
    )


# --- exports ---

LATE = QuantSpec(late=(LateInputs("*", 0.5, (("activation_bits", 4),)),))
RUNS: dict[str, tuple[dict[str, Any], QuantSpec]] = {
    "learned": ({}, QuantSpec(LEARNED, (("*.k_proj", LayerQuant("binary", trainable_scale=True)),))),
    "median": ({}, QuantSpec(MEDIAN)),
    "2-bit weights": ({}, QuantSpec(LayerQuant("symmetric", bits=2))),
    "rows": ({}, QuantSpec(LayerQuant(group_rows=8))),
    "learned rows": ({}, QuantSpec(LayerQuant(trainable_scale=True, groups="row"))),
    "inside": ({"norms": Norms.inside, "activation": Activation.silu}, QuantSpec()),
    "4-bit weights": ({}, QuantSpec(LayerQuant("symmetric", bits=4))),
    "8-bit weights": ({"norms": Norms.pre}, QuantSpec(LayerQuant("symmetric", bits=8, groups=4))),
    "4-bit inputs": ({}, QuantSpec(inputs(4, "absmean"))),
}
PAIRS = [
    ("learned", "packed"),
    ("learned", "hf-packed"),
    ("learned", "hf-dense"),
    ("median", "packed"),
    ("median", "hf-packed"),
    ("2-bit weights", "packed"),
    ("2-bit weights", "hf-packed"),
    ("rows", "packed"),
    ("learned rows", "packed"),
    ("inside", "packed"),
    ("4-bit weights", "hf-dense"),
    ("8-bit weights", "hf-dense"),
    ("4-bit inputs", "hf-dense"),
]
Make = Callable[[str], SmallRun]


@pytest.fixture
def make(bpe: TextTokenizer, tmp_path: Path) -> Make:
    """A run of RUNS whose learned scales have moved away from their start."""

    def run(kind: str) -> SmallRun:
        fields, spec = RUNS[kind]
        cfg = decoder_config(**fields)
        path = save_checkpoint(tmp_path / "last.ckpt", cfg, spec)
        content = torch.load(path, weights_only=True)
        for name, tensor in content["state_dict"].items():
            if name.endswith("weight_scale"):
                tensor.mul_(0.83)
        torch.save(content, path)
        ids = [index for i in range(100, 104) for index in [bpe.bos_id, *bpe.encode(make_text(i))]]
        return SmallRun(open_checkpoint(path, cfg, spec), path, bpe, HeldOut(torch.tensor(ids), 32, "def "))

    return run


@pytest.mark.parametrize(("kind", "format_name"), PAIRS)
def test_it_is_written_verified_and_read_back(make: Make, kind: str, format_name: str, tmp_path: Path) -> None:
    if format_name != "packed":
        pytest.importorskip("transformers")
    run = make(kind)
    folder = run.write(tmp_path / format_name, format_name)
    report = run.verify(folder, format_name)
    assert not report.failed
    canonical = run.canonical.with_float_activations() if format_name == "hf-dense" else run.canonical
    wanted = run.logits(canonical.decoder())
    got = run.logits(load_any_export(folder, torch.device("cpu"), None)[0])  # type: ignore[arg-type]
    if format_name == "packed":
        assert torch.equal(got, wanted)
    else:
        assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_the_canonical_codes_are_those_of_the_learned_scales(make: Make) -> None:
    canonical = make("learned").canonical
    state = torch.load(canonical.origin, weights_only=True)["state_dict"]
    assert len(canonical.learned) == 14
    for layer, quant in canonical.quantised.items():
        weight, scale = state[f"decoder.{layer}.weight"], state[f"decoder.{layer}.weight_scale"]
        wanted = quantise_weight(weight, quant, scale)
        assert torch.equal(canonical.codes(layer).codes, wanted.codes)
        assert torch.equal(canonical.codes(layer).scale, scale)
        if quant.scheme == "ternary":
            assert not torch.equal(quantise_weight(weight, quant).codes, wanted.codes)


def test_a_checkpoint_without_the_learned_scales_does_not_fit(make: Make) -> None:
    run = make("median")
    with pytest.raises(ConfigError, match=r"q_proj\.weight_scale is missing instead of \(1,\)"):
        open_checkpoint(run.checkpoint, run.canonical.cfg, QuantSpec(LEARNED))
    learned = make("learned")
    with pytest.raises(ConfigError, match=r"weight_scale is \(1,\) instead of absent"):
        open_checkpoint(learned.checkpoint, learned.canonical.cfg, QuantSpec())


@pytest.mark.parametrize(
    "spec", [QuantSpec(LEARNED), QuantSpec(MEDIAN), QuantSpec()], ids=["learned", "median", "mean"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(spec: QuantSpec, bad: float, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "last.ckpt", decoder_config(), spec)
    content = torch.load(path, weights_only=True)
    content["state_dict"][f"decoder.{FIRST}.weight"][3, 5] = bad
    torch.save(content, path)
    canonical = open_checkpoint(path, decoder_config(), spec)
    with pytest.raises(ConfigError, match=f"the weights of {FIRST} are not finite"):
        canonical.codes(FIRST)


def test_the_spec_of_a_checkpoint_is_that_of_its_last_step(tmp_path: Path) -> None:
    cfg = decoder_config()
    for step, bits in ((49, 8), (50, 8), (51, 4), (100, 4)):
        path = save_checkpoint(tmp_path / f"{step}.ckpt", cfg, LATE, step=step)
        canonical = open_checkpoint(path, cfg, LATE, lambda done: LATE.at(done - 1, 100))
        assert canonical.quantised[FIRST].activation_bits == bits
