"""Gains of sub-norms that are put into a model: closed forms, and the function that is left."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms, SubNorms, check_init
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.sub_norms import fit_gains
from bitnet_train.quant.spec import FLOAT, QuantSpec
from tests.composing import compose_config

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = DecoderConfig(
    hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, context=32, vocab=60, norms=Norms.pre, activation=Activation.silu,
    norm_eps=1e-8,
)  # fmt: skip
IDS = torch.randint(60, (4, 24), generator=torch.Generator().manual_seed(0))


def plain(activation: Activation = Activation.silu) -> Decoder:
    cfg = replace(PLAIN, activation=activation)
    return build_decoder(cfg, QuantSpec(FLOAT), NormalInit(std=0.2), 0).eval()


def inputs(model: Decoder) -> dict[str, Tensor]:
    """What goes into o_proj and down_proj, (tokens, width)."""
    seen: dict[str, Tensor] = {}
    for number, block in enumerate(model.layers):
        attention, ffn = f"layers.{number}.self_attn.attn_sub_norm.weight", f"layers.{number}.mlp.ffn_sub_norm.weight"
        block.self_attn.out.register_forward_pre_hook(lambda _, x, name=attention: seen.update({name: x[0]}))

        def keep(_: object, x: tuple[Tensor], options: dict[str, Tensor], name: str = ffn) -> None:
            gate = options["gate"]
            active = torch.relu(gate) ** 2 if options["activation"] == "relu2" else torch.nn.functional.silu(gate)
            seen[name] = active * x[0]

        block.mlp.down.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(IDS)
    return {name: x.reshape(-1, x.shape[-1]).double() for name, x in seen.items()}


@pytest.mark.parametrize("activation", Activation)
def test_gains_are_the_least_squares_ones(activation: Activation) -> None:
    model = plain(activation)
    found = fit_gains(model, [(IDS[:1], None), (IDS[1:], None)])
    sources = inputs(model)
    assert set(found.scalar) == set(found.channel) == set(sources)
    assert len(sources) == 4
    for name, x in sources.items():
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)
        best = torch.stack([torch.linalg.lstsq(normed[:, [c]], x[:, c]).solution[0] for c in range(x.shape[1])])
        torch.testing.assert_close(found.channel[name].double(), best, rtol=1e-4, atol=1e-6)
        one = torch.linalg.lstsq(normed.reshape(-1, 1), x.reshape(-1)).solution
        torch.testing.assert_close(found.scalar[name].double(), one.expand(x.shape[1]), rtol=1e-4, atol=1e-6)
        # The mean of the tokens' root mean squares.
        torch.testing.assert_close(one[0], x.square().mean(-1).sqrt().mean(), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_calibrated_norms_keep_more_of_the_function_than_ones() -> None:
    source = plain()
    wanted = source(IDS)
    found = fit_gains(source, [(IDS, None)])
    target = Decoder(replace(PLAIN, norms=Norms.pre_sub), QuantSpec(FLOAT)).eval()
    errors = {}
    ones = {name: torch.ones_like(gain) for name, gain in found.scalar.items()}
    for name, gains in (("ones", ones), ("scalar", found.scalar), ("channel", found.channel)):
        target.load_state_dict({**source.state_dict(), **gains})
        errors[name] = float((target(IDS) - wanted).norm() / wanted.norm())
    assert max(errors["scalar"], errors["channel"]) < 0.8 * errors["ones"]


def test_a_function_of_one_scale_is_kept_to_rounding() -> None:
    # Where every token has the same root mean square, a gain can undo the norm.
    source = plain()
    source.load_state_dict({n: torch.ones_like(p) * p.flatten()[0] for n, p in source.state_dict().items()})
    found = fit_gains(source, [(IDS[:1, :1], None)])
    target = Decoder(replace(PLAIN, norms=Norms.pre_sub), QuantSpec(FLOAT)).eval()
    for gains in (found.scalar, found.channel):
        target.load_state_dict({**source.state_dict(), **gains})
        with torch.no_grad():
            torch.testing.assert_close(target(IDS[:1, :1]), source(IDS[:1, :1]), rtol=1e-5, atol=1e-6)


def test_documents_are_kept_apart() -> None:
    model = plain()
    documents = torch.zeros_like(IDS)
    documents[:, 12:] = 1
    whole, apart = fit_gains(model, [(IDS, None)]), fit_gains(model, [(IDS, documents)])
    name = "layers.1.self_attn.attn_sub_norm.weight"
    assert not torch.equal(whole.channel[name], apart.channel[name])


def test_silent_channels_get_the_common_gain() -> None:
    model = plain()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[5] = 0
    name = "layers.0.mlp.ffn_sub_norm.weight"
    found = fit_gains(model, [(IDS, None)])
    assert found.channel[name][5] == found.scalar[name][5]
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.isfinite(fit_gains(model, [(IDS, None)]).channel[name]).all()


def test_settings_without_effect_are_refused() -> None:
    for name in ("ones", "calibrate"):
        with pytest.raises(ConfigError, match=rf"init\.sub_norms={name} has no effect without init\.from"):
            compose_config("+recipe=tiny", f"init.sub_norms={name}")
    with pytest.raises(ConfigError, match=r"no effect with model\.norms=pre, which has no sub-norms"):
        compose_config("+recipe=tiny", "init.sub_norms=ones", "init.from=x", "model.norms=pre", "init.sub_norm_gain=1")
    compose_config("+recipe=tiny", "init.sub_norms=ones", "init.from=x")
    with pytest.raises(ConfigError, match=r"without init\.from"):
        check_init(NormalInit(sub_norms=SubNorms.ones), Norms.pre_sub)
