"""The layout, which answers without torch, against the real module."""

import itertools

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import Activation, DecoderConfig, Norms
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import Role, check_spec, parameter_table, quantised_layers
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec

FAMILIES = ((Norms.pre_sub, Activation.relu2), (Norms.pre_sub, Activation.silu), (Norms.pre, Activation.silu))
CASES = list(itertools.product(FAMILIES, (True, False), (4, 2, 1)))


def config(family: tuple[Norms, Activation], tied: bool, kv_heads: int) -> DecoderConfig:
    norms, activation = family
    return DecoderConfig(
        hidden=32, layers=3, heads=4, kv_heads=kv_heads, ffn=48, context=16, vocab=70,
        norms=norms, activation=activation, tie_embeddings=tied,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "tied", "kv_heads"), CASES)
def test_the_table_is_the_module(family: tuple[Norms, Activation], tied: bool, kv_heads: int) -> None:
    cfg = config(family, tied, kv_heads)
    with torch.device("meta"):
        model = Decoder(cfg, QuantSpec())
    table = {p.name: p.shape for p in parameter_table(cfg)}
    assert table == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.size for p in parameter_table(cfg)) == sum(p.numel() for p in model.parameters())
    assert set(table) == set(model.state_dict())


@pytest.mark.parametrize(("family", "tied", "kv_heads"), CASES)
def test_roles(family: tuple[Norms, Activation], tied: bool, kv_heads: int) -> None:
    by_role = {role: [p for p in parameter_table(config(family, tied, kv_heads)) if p.role is role] for role in Role}
    assert len(by_role[Role.embedding]) == 1
    assert len(by_role[Role.head]) == (0 if tied else 1)
    assert len(by_role[Role.linear]) == 3 * 7
    assert len(by_role[Role.norm]) == 3 * (4 if family[0] is Norms.pre_sub else 2) + 1
    assert all(len(p.shape) == 1 for p in by_role[Role.norm])


def test_quantised_layers_are_the_bit_linears() -> None:
    spec = QuantSpec(
        LayerQuant(), (("layers.1.*", FLOAT), ("layers.1.mlp.*", LayerQuant("binary")), ("*k_proj", FLOAT))
    )
    cfg = config(FAMILIES[0], True, 2)
    model = Decoder(cfg, spec)
    built = {name: module.quant for name, module in model.named_modules() if isinstance(module, BitLinear)}
    assert quantised_layers(cfg, spec) == built
    assert {layer.scheme for layer in built.values()} == {"ternary", "binary"}


def test_a_pattern_that_meets_nothing_and_groups_that_do_not_divide_are_refused() -> None:
    cfg = config(FAMILIES[0], True, 2)
    check_spec(cfg, QuantSpec(LayerQuant(groups=16)))
    check_spec(cfg, QuantSpec(LayerQuant(groups="row")))
    with pytest.raises(ConfigError, match="matches no linear layer"):
        check_spec(cfg, QuantSpec(LayerQuant(), (("layers.9.*", FLOAT),)))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj.*groups=32.*16 output rows"):
        check_spec(cfg, QuantSpec(LayerQuant(groups=32)))
