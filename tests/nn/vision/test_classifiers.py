"""The image classifiers: their layout, what is quantised, and that they compute what plain operations compute."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.audit import audit
from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DepthScaledInit, InitConfig, NormalInit, Norms
from bitnet_train.nn.layout import Role, parameter_table
from bitnet_train.nn.vision.base import Classifier
from bitnet_train.nn.vision.config import (
    ClassifierConfig,
    MlpConfig,
    PlainActivation,
    VitConfig,
    check_classifier,
    check_classifier_init,
)
from bitnet_train.nn.vision.model import activated, build_classifier, patches
from bitnet_train.quant.activations import quantise_tokens, rms_norm
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import quantise_weight

MLP = MlpConfig(image_size=6, channels=1, classes=5, hidden=16, layers=4)
VIT = VitConfig(image_size=8, channels=3, classes=5, patch=4, hidden=16, layers=2, heads=2, ffn=24)
TERNARY, BINARY, DENSE = (
    QuantSpec(LayerQuant(scheme="ternary")),
    QuantSpec(LayerQuant(scheme="binary")),
    QuantSpec(FLOAT),
)
CONFIGS = [
    MLP,
    replace(MLP, norm=False, activation=PlainActivation.silu),
    replace(MLP, quantise_ends=True, layers=2),
    VIT,
    replace(VIT, norms=Norms.pre, activation=PlainActivation.relu2),
    replace(VIT, quantise_ends=True, activation=PlainActivation.relu),
]


def build(cfg: ClassifierConfig, spec: QuantSpec = TERNARY, init: InitConfig | None = None) -> Classifier:
    return build_classifier(cfg, spec, init or NormalInit(std=0.2), seed=3)


def pictures(cfg: ClassifierConfig, count: int = 3) -> Tensor:
    return torch.randn(count, cfg.channels, cfg.image_size, cfg.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cfg", CONFIGS)
@pytest.mark.parametrize("spec", [TERNARY, BINARY, DENSE], ids=["ternary", "binary", "none"])
def test_the_layout_is_that_of_the_module(cfg: ClassifierConfig, spec: QuantSpec) -> None:
    model = build(cfg, spec)
    assert {p.name: p.shape for p in parameter_table(cfg)} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert model(pictures(cfg)).shape == (3, cfg.classes)


@pytest.mark.parametrize("cfg", CONFIGS)
@pytest.mark.parametrize("spec", [TERNARY, BINARY, DENSE], ids=["ternary", "binary", "none"])
def test_the_audit_counts_the_layers_between_first_and_last(cfg: ClassifierConfig, spec: QuantSpec) -> None:
    table = parameter_table(cfg)
    inner = [p for p in table if p.role is Role.linear]
    ends = {"input_proj", "patch_embed", "head"} & {p.layer_name for p in inner}
    assert len(ends) == (2 if cfg.quantise_ends else 0)
    report = audit(build(cfg, spec))
    assert report.linears == {spec.default.scheme: len(inner)}
    assert report.parameters == {spec.default.scheme: sum(p.size for p in inner)}
    assert report.total_parameters == sum(p.size for p in table)


def test_an_override_leaves_a_layer_alone_and_the_audit_sees_a_replaced_one() -> None:
    model = build(VIT, QuantSpec(LayerQuant(), overrides=(("layers.0.self_attn.*", FLOAT),)))
    assert audit(model).linears == {"ternary": 8, "float": 4}
    assert type(model.get_submodule("layers.0.self_attn.q_proj")) is nn.Linear
    model.get_submodule("layers.1.mlp").up_proj = nn.Linear(16, 24, bias=False)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj should be ternary and is Linear"):
        audit(model)


@pytest.mark.parametrize("pattern", ["head", "input_proj", "layers.7.*", "layers.0.norm"])
def test_a_pattern_that_meets_no_quantised_layer_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"matches no linear layer; names look like 'layers\.0\.proj'"):
        build(MLP, QuantSpec(LayerQuant(), overrides=((pattern, FLOAT),)))


def by_hand(layer: nn.Linear, x: Tensor, norm: nn.Module | None) -> Tensor:
    """Norm, 8-bit codes, codes times codes, scales: with the plain functions of ``quant``."""
    x = x if norm is None else rms_norm(x, norm.weight, norm.eps)[0]
    if not isinstance(layer, BitLinear):
        return x @ layer.weight.T
    codes, scale = quantise_tokens(x)
    weight = quantise_weight(layer.weight, layer.quant)
    return (codes.double() @ weight.codes.double().T).float() * scale * weight.row_scale()


@pytest.mark.parametrize("spec", [TERNARY, BINARY, DENSE], ids=["ternary", "binary", "none"])
@pytest.mark.parametrize("cfg", [CONFIGS[0], CONFIGS[1], CONFIGS[2]])
def test_the_mlp_computes_what_plain_operations_compute(cfg: MlpConfig, spec: QuantSpec) -> None:
    model, images = build(cfg, spec), pictures(cfg)
    x = activated(by_hand(model.input_proj, images.flatten(1), None), cfg.activation)
    for layer in model.layers:
        x = activated(by_hand(layer.proj, x, layer.norm), cfg.activation)
    torch.testing.assert_close(model(images), by_hand(model.head, x, model.norm), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [TERNARY, BINARY, DENSE], ids=["ternary", "binary", "none"])
@pytest.mark.parametrize("cfg", [CONFIGS[3], CONFIGS[4], CONFIGS[5]])
def test_the_transformer_computes_what_plain_operations_compute(cfg: VitConfig, spec: QuantSpec) -> None:
    model, images = build(cfg, spec), pictures(cfg)
    x = by_hand(model.patch_embed, patches(images, cfg.patch), None) + model.positions.weight
    for block in model.layers:
        own, mlp = block.self_attn, block.mlp
        q, k, v = (
            by_hand(layer, x, block.input_layernorm).view(3, cfg.tokens, cfg.heads, -1).transpose(1, 2)
            for layer in (own.q_proj, own.k_proj, own.v_proj)
        )
        mixed = (torch.softmax(q @ k.mT / cfg.head_dim**0.5, dim=-1) @ v).transpose(1, 2).reshape(3, cfg.tokens, -1)
        x = x + by_hand(own.o_proj, mixed, own.attn_sub_norm)
        inner = activated(by_hand(mlp.up_proj, x, block.post_attention_layernorm), cfg.activation)
        x = x + by_hand(mlp.down_proj, inner, mlp.ffn_sub_norm)
    wanted = by_hand(model.head, x.mean(1), model.norm)
    # A rounding on the way may move an 8-bit code.
    torch.testing.assert_close(model(images), wanted, rtol=0.02, atol=0.02 if spec.quantised else 1e-5)


def test_queries_keys_and_values_share_one_quantised_input() -> None:
    block = build(VIT).get_submodule("layers.0")
    own = block.self_attn
    shared = [m for m in block.modules() if isinstance(m, SharedInput)]
    assert set(map(id, shared[0].layers)) == {id(own.q_proj), id(own.k_proj), id(own.v_proj)}
    assert [m.norm_ref[0] is not None for m in shared] == [True] * 4


@pytest.mark.parametrize("cfg", [MLP, VIT])
def test_kept_codes_compute_the_same_and_gradients_reach_every_parameter(cfg: ClassifierConfig) -> None:
    model, images = build(cfg), pictures(cfg)
    derived = model(images)
    CodeCache(model)
    assert torch.equal(model(images), derived)
    F.cross_entropy(model(images), torch.tensor([0, 1, 4])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_the_statistics_of_a_bit_linear_are_those_of_a_linear(scheme: str) -> None:
    """A BitLinear with wrong statistics gave outputs of mean -0.57 and variance 1150 where nn.Linear gave 0.33.

    Of Gaussian weights with spread 1, scale is mean|w| = sqrt(2 / pi). ``kept`` weights are not zero: all (binary), or
    those beyond t = scale / 2 (ternary), whose absolute values sum to 2 * density(t) per weight. So codes times scale
    have the variance kept * scale^2, and their squared correlation with the weights is (2 * density(t))^2 / kept; the
    outputs inherit both.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 512, generator=generator), torch.randn(384, 512, generator=generator) / 512**0.5
    layer = BitLinear(512, 384, bias=False, quant=LayerQuant(scheme=scheme))
    with torch.no_grad():
        layer.weight.copy_(weight)
        dense, ours = x @ weight.T, layer(x)
    scale = math.sqrt(2 / math.pi)
    threshold = 0.0 if scheme == "binary" else scale / 2
    kept = math.erfc(threshold / math.sqrt(2))
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    assert abs(float(ours.mean())) < 0.02
    assert float(ours.var() / dense.var()) == pytest.approx(kept * scale**2, rel=0.03)
    correlation = float(torch.corrcoef(torch.stack([ours.flatten(), dense.flatten()]))[0, 1])
    assert correlation**2 == pytest.approx((2 * density) ** 2 / kept, abs=0.01)


def test_patches_are_cut_row_by_row() -> None:
    image = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    cut = patches(image, 2)
    assert cut.shape == (1, 4, 8)
    assert torch.equal(cut[0, 1], torch.cat([image[0, c, 0:2, 2:4].flatten() for c in range(2)]))
    assert torch.equal(cut[0, 2], torch.cat([image[0, c, 2:4, 0:2].flatten() for c in range(2)]))


def test_init_reaches_the_parts_that_it_names() -> None:
    model = build(VIT, init=DepthScaledInit(std=0.02, embedding_std=0.5, sub_norm_gain=0.25))
    for name, spread in (("patch_embed", 0.5), ("positions", 0.5), ("head", 0.5), ("layers.0.mlp.up_proj", 0.02)):
        assert float(model.get_submodule(name).weight.detach().std()) == pytest.approx(spread, rel=0.25)
    assert float(model.get_submodule("layers.1.self_attn.o_proj").weight.detach().std()) == pytest.approx(0.01, rel=0.2)
    assert torch.equal(model.get_submodule("layers.0.mlp.ffn_sub_norm").weight, torch.full((24,), 0.25))
    assert torch.equal(model.get_submodule("norm").weight, torch.ones(16))


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [
        (replace(MLP, layers=2), "quantise_ends"),
        (replace(MLP, layers=1), "model.layers is 1"),
        (replace(MLP, hidden=0), "model.hidden is 0"),
        (replace(VIT, patch=3), "model.patch=3 does not divide"),
        (replace(VIT, heads=3), "model.heads=3 does not divide"),
        (replace(VIT, classes=1), "model.classes is 1"),
        (replace(VIT, norm_eps=0.0), "model.norm_eps"),
    ],
)
def test_numbers_that_make_no_classifier_are_refused(cfg: ClassifierConfig, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        check_classifier(cfg)


@pytest.mark.parametrize(
    ("cfg", "init", "wanted"),
    [
        (MLP, DepthScaledInit(), "init=depth_scaled"),
        (MLP, NormalInit(sub_norm_gain=0.5), "init.sub_norm_gain"),
        (replace(VIT, norms=Norms.pre), NormalInit(sub_norm_gain=0.5), "init.sub_norm_gain"),
        (VIT, NormalInit(std=0.0), "init.std"),
    ],
)
def test_an_init_that_does_nothing_is_refused(cfg: ClassifierConfig, init: InitConfig, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        check_classifier_init(init, cfg)
