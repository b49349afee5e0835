"""Rates of single layers: which parameter gets which factor, what reaches the optimizer, and what is refused."""

from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import parameter_table
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.training.optimizers.build import build_optimizer, set_rates
from bitnet_train.training.optimizers.config import (
    OPTIMIZER_CONFIGS,
    AdamWConfig,
    GroupConfig,
    MuonConfig,
    OptimizerConfig,
    check_optimizer,
)
from bitnet_train.training.optimizers.factors import block_number, depth_factor
from tests.composing import compose_config

CFG = DecoderConfig(hidden=32, layers=3, heads=2, kv_heads=1, ffn=64, context=64, vocab=97, tie_embeddings=False)


def rates_of(cfg: OptimizerConfig, lr: float = 1.0, weight_decay: float = 1.0) -> dict[str, tuple[float, float]]:
    """Name -> (learning rate, weight decay) as the optimizer of ``cfg`` has them after ``set_rates``."""
    check_optimizer(cfg, parameter_table(CFG))
    model = build_decoder(CFG, QuantSpec(), NormalInit(), 3)
    optimizer = build_optimizer(cfg, model)
    set_rates(optimizer, lr, weight_decay)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        found |= dict.fromkeys(group["param_names"], (group["lr"], group["weight_decay"]))
    assert found.keys() == {p.name for p in parameter_table(CFG)}
    return found


@pytest.mark.parametrize("kind", OPTIMIZER_CONFIGS.values())
def test_the_last_pattern_wins_and_norms_never_decay(kind: type[OptimizerConfig]) -> None:
    groups = [GroupConfig("layers.*", 0.5, 0.25), GroupConfig("layers.1.*", 2.0), GroupConfig("embed_tokens", 0.1, 0.0)]
    found = rates_of(kind(groups=groups), 0.3, 0.2)
    for name, (lr, decay) in found.items():
        wanted = {None: (1.0, 1.0), 0: (0.5, 0.25), 1: (2.0, 1.0), 2: (0.5, 0.25)}[block_number(name)]
        if name == "embed_tokens.weight":
            wanted = (0.1, 0.0)
        assert lr == pytest.approx(0.3 * wanted[0]), name
        assert decay == pytest.approx(0.0 if "norm" in name else 0.2 * wanted[1]), name


@pytest.mark.parametrize("kind", OPTIMIZER_CONFIGS.values())
def test_the_rate_falls_from_the_top_to_the_embedding(kind: type[OptimizerConfig]) -> None:
    found = rates_of(kind(layer_lr_decay=0.5, groups=[GroupConfig("*.q_proj", lr=3.0)]))
    for name, (lr, decay) in found.items():
        number = block_number(name)
        power = 3 if name == "embed_tokens.weight" else 0 if number is None else 2 - number
        assert lr == pytest.approx(0.5**power * (3.0 if "q_proj" in name else 1.0)), name
        assert decay == (0.0 if "norm" in name else 1.0)
    assert [depth_factor(0.9, f"encoder.layer.{n}.x", 2) for n in (0, 1)] == [0.9, 1.0]
    assert depth_factor(0.9, "patch_embedding.weight", 2) == pytest.approx(0.81)
    assert depth_factor(0.9, "lm_head.weight", 2) == 1.0


def test_without_factors_there_are_the_two_groups_of_always() -> None:
    model = build_decoder(CFG, QuantSpec(), NormalInit(), 3)
    groups = build_optimizer(AdamWConfig(), model).param_groups
    assert [{p.dim() for p in group["params"]} for group in groups] == [{2}, {1}]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    order = [p for p in model.parameters() if p.dim() == 2] + [p for p in model.parameters() if p.dim() == 1]
    assert all(a is b for a, b in zip(order, (p for g in groups for p in g["params"]), strict=True))


def test_muon_gives_adamws_part_its_own_peak() -> None:
    found = rates_of(MuonConfig(adamw_lr=0.25, groups=[GroupConfig("lm_head", lr=2.0)]), 0.4)
    for name, (lr, _) in found.items():
        inside = block_number(name) is not None and "norm" not in name
        assert lr == pytest.approx(0.4 * (1.0 if inside else 0.5 if "lm_head" in name else 0.25)), name


@pytest.mark.parametrize("kind", OPTIMIZER_CONFIGS.values())
def test_a_factor_of_zero_keeps_the_weights(kind: type[OptimizerConfig]) -> None:
    model = build_decoder(CFG, QuantSpec(), NormalInit(), 3)
    optimizer = build_optimizer(kind(groups=[GroupConfig("layers.0.*", lr=0.0)]), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(12)[None]).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any(name.startswith("layers.0.") for name in moved)
    assert {"embed_tokens.weight", "layers.1.self_attn.q_proj.weight"} <= moved


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"groups": [GroupConfig("layers.7.*")]}, "matches no parameter"),
        ({"groups": [GroupConfig("*o_proj", lr=-1.0)]}, "cannot be negative"),
        ({"groups": [GroupConfig("*o_proj", weight_decay=float("inf"))]}, "cannot be negative"),
        ({"groups": [GroupConfig("*norm*", weight_decay=0.5)]}, "no effect"),
        ({"groups": [GroupConfig("*.o_proj"), GroupConfig("layers.*")]}, "move it down"),
        ({"layer_lr_decay": 0.0}, "layer_lr_decay"),
        ({"layer_lr_decay": 1.5}, "layer_lr_decay"),
        ({"lr": float("nan")}, "optimizer.lr"),
        ({"betas": [0.9]}, "betas"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_optimizer(AdamWConfig(**settings), parameter_table(CFG))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"momentum": 1.0}, "momentum"), ({"momentum": 0.0}, "nesterov"), ({"ns_steps": 0}, "ns_steps"),
     ({"adamw_lr": 0.0}, "adamw_lr"), ({"eps": 0.0}, "eps")],
)  # fmt: skip
def test_muons_impossible_values_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_optimizer(MuonConfig(**settings), parameter_table(CFG))


def test_groups_come_from_the_command_line_and_are_checked_against_the_recipes_model() -> None:
    cfg = compose_config("+recipe=tiny", "optimizer.groups=[{pattern: embed_tokens, lr: 0.2}]", "optimizer.lr=0.01")
    assert cfg.optimizer.groups == [GroupConfig("embed_tokens", 0.2, 1.0)]
    with pytest.raises(ConfigError, match=r"optimizer.groups\[0\].*matches no parameter"):
        compose_config("+recipe=tiny", "optimizer.groups=[{pattern: layers.99.*}]")
