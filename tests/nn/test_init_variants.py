"""The spread of every matrix under each initialisation, and exceptions by pattern."""

import hashlib
import math
from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import (
    DecoderConfig,
    DepthScaledInit,
    FanInInit,
    InitConfig,
    InitOverride,
    MitchellInit,
    NormalInit,
    Norms,
    SmallInit,
    check_init,
)
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import check_init_overrides
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.quant.weights import quantise_weight
from tests.composing import compose_config

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=64, layers=3, heads=4, kv_heads=2, ffn=96, context=16, vocab=200, tie_embeddings=False)
EVERYWHERE = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def matrices(cfg: InitConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    model = build_decoder(CONFIG, QuantSpec(), cfg, seed)
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


def wanted(cfg: InitConfig, name: str) -> float:
    """The closed form for hidden 64, ffn 96 and 3 blocks."""
    kind = name.split(".")[-2]
    inputs = 96 if kind == "down_proj" else 64
    writer, block = kind in ("o_proj", "down_proj"), int(name.split(".")[1]) if "layers" in name else 0
    if isinstance(cfg, FanInInit):
        return cfg.embedding_std if cfg.embedding_std and kind in EVERYWHERE[:2] else cfg.gain / math.sqrt(inputs)
    if isinstance(cfg, SmallInit):
        return 2 / (3 * 8) if writer else math.sqrt(2 / 320)
    assert isinstance(cfg, MitchellInit)
    # The standard deviation of a normal cut off at 3 is 0.98658 of the whole one's.
    return 0.98658 / math.sqrt(inputs * (2 * (block + 1) if writer else 1))


@pytest.mark.parametrize(
    "cfg", [FanInInit(), FanInInit(gain=0.5, embedding_std=0.07), SmallInit(), MitchellInit()], ids=lambda c: c.name
)
def test_every_matrix_has_the_published_spread(cfg: InitConfig) -> None:
    found = matrices(cfg)
    assert {name.split(".")[-2] for name in found} == set(EVERYWHERE)
    for name, weight in found.items():
        n = weight.numel()
        assert weight.std().item() == pytest.approx(wanted(cfg, name), rel=4 / math.sqrt(2 * n)), name
        assert abs(weight.mean().item()) < 4 * wanted(cfg, name) / math.sqrt(n), name


def test_mitchell_alone_is_cut_off_at_three_standard_deviations() -> None:
    def largest(cfg: InitConfig) -> float:
        return max(w.abs().max().item() / wanted(MitchellInit(), n) * 0.98658 for n, w in matrices(cfg).items())

    assert 2.5 < largest(MitchellInit()) <= 3 + 1e-5
    assert largest(FanInInit()) > 3.2


def test_the_draws_of_the_older_variants_have_not_moved() -> None:
    # sha256 of all matrices before the other variants and the overrides existed.
    for cfg, digest in (
        (NormalInit(), "5169179f02f03a06"),
        (DepthScaledInit(std=0.05, embedding_std=0.1), "668892d626e72c54"),
    ):
        joined = hashlib.sha256()
        for weight in matrices(cfg, seed=3).values():
            joined.update(weight.numpy().tobytes())
        assert joined.hexdigest()[:16] == digest


def test_the_last_matching_override_wins_and_leaves_other_draws_alone() -> None:
    overrides = [
        InitOverride("layers.*.self_attn.*", factor=2.0),
        InitOverride("layers.1.*", std=0.5),
        InitOverride("*.o_proj", factor=0.5),
        InitOverride("embed_tokens", std=1.0),
    ]
    plain = matrices(DepthScaledInit(std=0.02))
    for name, weight in matrices(DepthScaledInit(std=0.02, overrides=overrides)).items():
        factor = 2.0 if "self_attn" in name else 1.0
        if name.startswith("layers.1."):
            factor = 0.5 / (0.02 / math.sqrt(6) if "down_proj" in name else 0.02)
        if "o_proj" in name:
            factor = 0.5
        if name.startswith("embed_tokens"):
            factor = 50.0
        torch.testing.assert_close(weight, plain[name] * factor, rtol=1e-5, atol=0, msg=name)


def test_a_factor_changes_scales_and_no_codes() -> None:
    plain, wide = (matrices(NormalInit(overrides=o)) for o in ([], [InitOverride("layers.*", factor=4.0)]))
    for name in (n for n in plain if n.startswith("layers")):
        for layer in (QuantSpec().default,):
            one, other = quantise_weight(plain[name], layer), quantise_weight(wide[name], layer)
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scale * 4, other.scale)


def test_an_override_of_a_cut_off_variant_is_cut_off_at_its_own_spread() -> None:
    found = matrices(MitchellInit(overrides=[InitOverride("lm_head", std=0.3)]))["lm_head.weight"]
    assert found.std().item() == pytest.approx(0.3 * 0.98658, rel=0.03)
    assert 0.75 < found.abs().max().item() <= 0.9 + 1e-6


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (FanInInit(gain=0.0), r"init\.gain and init\.embedding_std must be positive"),
        (FanInInit(embedding_std=-1.0), r"init\.gain and init\.embedding_std must be positive"),
        (SmallInit(overrides=[InitOverride("a")]), "'a' has neither std nor factor: give one"),
        (SmallInit(overrides=[InitOverride("a", 1.0, 1.0)]), "'a' has both std and factor: give one"),
        (SmallInit(overrides=[InitOverride("a", std=0.0)]), "std of 'a' must be positive, it is 0"),
        (NormalInit(overrides=[InitOverride("a", factor=-2.0)]), "factor of 'a' must be positive, it is -2"),
        (NormalInit(overrides=[InitOverride("a", factor=math.inf)]), "factor of 'a' must be positive, it is inf"),
        (NormalInit(overrides=[InitOverride("a", factor=math.nan)]), "factor of 'a' must be positive, it is nan"),
    ],
)
def test_impossible_spreads_are_refused(cfg: InitConfig, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_init(cfg, Norms.pre_sub)


def test_overrides_meet_the_model_when_a_recipe_is_composed() -> None:
    def compose(pattern: str, *more: str) -> Any:
        overrides = f"init.overrides=[{{pattern: {pattern}, std: 0.01}}]"
        return compose_config("+recipe=tiny", overrides, *more).init

    assert compose("'*.down_proj'").overrides == [InitOverride("*.down_proj", std=0.01)]
    for name, kind in (("fan_in", FanInInit), ("small", SmallInit), ("mitchell", MitchellInit)):
        assert type(compose("embed_tokens", f"init={name}")) is kind
    for pattern in ("layers.99.*", "'*norm'", "'*.o_proj.weight'"):
        with pytest.raises(ConfigError, match="matches no weight matrix; names look like"):
            compose(pattern)
    with pytest.raises(ConfigError, match=r"with model\.tie_embeddings the head is embed_tokens"):
        compose("lm_head")
    compose("lm_head", "model.tie_embeddings=false")
    with pytest.raises(ConfigError, match=r"no effect with init\.from"):
        compose("embed_tokens", "init.from=somewhere")
    check_init_overrides(CONFIG, NormalInit(overrides=[InitOverride("layers.2.mlp.*", 0.1)]))
