"""How weights start, and the audit of what is really quantised."""

import math

import pytest
import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.audit import audit
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import DecoderConfig, DepthScaledInit, InitConfig, NormalInit, Norms, check_init
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder, init_weights
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=64, layers=3, heads=4, kv_heads=2, ffn=96, context=16, vocab=200)
UNTIED = DecoderConfig(hidden=64, layers=3, heads=4, kv_heads=2, ffn=96, context=16, vocab=200, tie_embeddings=False)
MIXED = QuantSpec(LayerQuant(), (("*.o_proj", FLOAT), ("layers.2.*", LayerQuant("binary"))))
IDS = torch.arange(10)[None]


# --- init ---


@pytest.mark.parametrize("cfg", [NormalInit(std=0.05), DepthScaledInit(std=0.05)])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(FLOAT)])
def test_every_matrix_is_normal_with_its_spread(cfg: InitConfig, spec: QuantSpec) -> None:
    for name, parameter in build_decoder(UNTIED, spec, cfg, seed=1).named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        residual_writer = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.05 / math.sqrt(6) if residual_writer and isinstance(cfg, DepthScaledInit) else 0.05
        n = parameter.numel()
        assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n)), name
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(n), name
        kurtosis = (parameter / std).pow(4).mean().item()
        assert kurtosis == pytest.approx(3, abs=4 * math.sqrt(96 / n)), name  # 1.8 for uniform


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    first = build_decoder(CONFIG, QuantSpec(), NormalInit(), seed=3).state_dict()
    torch.manual_seed(12345)
    torch.randn(100)
    second = build_decoder(CONFIG, QuantSpec(), NormalInit(), seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_decoder(CONFIG, QuantSpec(), NormalInit(), seed=4).state_dict()
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_the_ternary_and_the_dense_twin_start_alike() -> None:
    ternary, dense = (
        build_decoder(CONFIG, spec, DepthScaledInit(), 0).state_dict() for spec in (QuantSpec(), QuantSpec(FLOAT))
    )
    assert list(ternary) == list(dense)
    assert all(torch.equal(ternary[name], dense[name]) for name in ternary)


def test_initialising_leaves_the_global_random_numbers_alone() -> None:
    model = Decoder(CONFIG, QuantSpec())
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    init_weights(model, NormalInit(), 5)
    assert torch.equal(torch.rand(3), wanted)


def test_no_two_matrices_are_alike() -> None:
    firsts = [
        p.flatten()[0].item() for p in build_decoder(UNTIED, QuantSpec(), NormalInit(), 0).parameters() if p.dim() > 1
    ]
    assert len(set(firsts)) == len(firsts)


def test_biases_start_at_zero() -> None:
    model = build_decoder(CONFIG, QuantSpec(), NormalInit(), 0)
    layer = model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.ones(96))
    init_weights(model, NormalInit(), 0)
    assert not bool(layer.bias.any())


def test_unknown_and_impossible_inits_are_refused() -> None:
    class Other(InitConfig):
        pass

    with pytest.raises(ConfigError, match="no entry in"):
        init_weights(Decoder(CONFIG, QuantSpec()), Other(name="other"), 0)
    for bad in (NormalInit(std=0.0), DepthScaledInit(std=-1.0)):
        with pytest.raises(ConfigError, match=r"init\.std"):
            check_init(bad, Norms.pre_sub)


def test_the_gain_of_the_sub_norms_alone_can_start_elsewhere() -> None:
    model = build_decoder(CONFIG, QuantSpec(), NormalInit(sub_norm_gain=0.25), 0)
    gains = {name: set(p.tolist()) for name, p in model.named_parameters() if p.dim() == 1}
    assert all(gain == ({0.25} if "sub_norm" in name else {1.0}) for name, gain in gains.items())
    assert any("sub_norm" in name for name in gains)
    with pytest.raises(ConfigError, match=r"sub_norm_gain must be positive"):
        check_init(NormalInit(sub_norm_gain=0.0), Norms.pre_sub)
    with pytest.raises(ConfigError, match=r"has no effect with model\.norms=pre"):
        check_init(NormalInit(sub_norm_gain=0.5), Norms.pre)


# --- audit ---


def test_the_audit_counts_layers_and_parameters() -> None:
    model = build_decoder(UNTIED, MIXED, NormalInit(), 0)
    report = audit(model)
    per_block = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96
    o_proj = 64 * 64
    assert report.linears == {"ternary": 12, "float": 2, "binary": 7}
    assert report.parameters == {"ternary": 2 * (per_block - o_proj), "float": 2 * o_proj, "binary": per_block}
    assert report.total_parameters == sum(p.numel() for p in model.parameters())
    assert report.quantised_linears == 19
    assert report.quantised_share == pytest.approx((3 * per_block - 2 * o_proj) / report.total_parameters)
    sentence = report.sentence()
    assert sentence.startswith("21 linear layers (12 ternary, 2 float, 7 binary); ")
    assert f"{report.quantised_share:.1%} of {report.total_parameters:,} parameters" in sentence


@pytest.mark.parametrize("cfg", [CONFIG, UNTIED])
def test_a_dense_model_passes_as_dense(cfg: DecoderConfig) -> None:
    report = audit(build_decoder(cfg, QuantSpec(FLOAT), NormalInit(), 0))
    assert report.linears == {"float": 21}
    assert report.quantised_share == 0


def test_a_swapped_in_float_layer_is_refused() -> None:
    model = build_decoder(CONFIG, QuantSpec(), NormalInit(), 0)
    model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj should be ternary and is Linear\."):
        audit(model)


def test_all_wrong_layers_are_counted() -> None:
    model = build_decoder(CONFIG, QuantSpec(), NormalInit(), 0)
    for block in model.layers:
        block.mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(ConfigError, match=r"\(and 2 more\)"):
        audit(model)


@pytest.mark.parametrize(
    "actual", [LayerQuant("binary"), LayerQuant(groups=2), LayerQuant(threshold=0.6), LayerQuant(activation_bits=None)]
)
def test_a_layer_of_another_quantisation_is_refused(actual: LayerQuant) -> None:
    model = build_decoder(CONFIG, QuantSpec(), NormalInit(), 0)
    model.layers[0].self_attn.k_proj = BitLinear(64, 32, bias=False, quant=actual)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj should be ternary"):
        audit(model)


def test_a_quantised_layer_where_a_float_one_belongs_is_refused() -> None:
    model = build_decoder(CONFIG, MIXED, NormalInit(), 0)
    model.layers[0].self_attn.o_proj = BitLinear(64, 64, bias=False)
    with pytest.raises(ConfigError, match=r"o_proj should be float and is LayerQuant"):
        audit(model)


def test_a_missing_layer_is_refused() -> None:
    model = build_decoder(CONFIG, QuantSpec(), NormalInit(), 0)
    del model.layers[0].mlp.gate_proj
    with pytest.raises(ConfigError, match="gate_proj should be ternary and is missing"):
        audit(model)


@pytest.mark.parametrize("cached", [False, True])
def test_a_swapped_layer_is_either_used_or_refused(cached: bool) -> None:
    # SharedInput holds the layers it was built with: a replacement must not be silently without effect.
    from bitnet_train.nn.code_cache import CodeCache

    model = build_decoder(CONFIG, QuantSpec(), NormalInit(std=0.2), 0)
    before = model(IDS)
    model.layers[0].self_attn.q_proj = BitLinear(64, 64, bias=False)
    try:
        audit(model)
    except ConfigError:
        return
    if cached:
        CodeCache(model)
    assert not torch.equal(model(IDS), before)
