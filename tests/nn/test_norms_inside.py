"""The family with a norm in every projection, against a decoder written out in plain PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms, check_init
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import Role, block_norms, parameter_table
from bitnet_train.quant.activations import quantise_tokens
from bitnet_train.quant.spec import FLOAT, InputQuant, LayerQuant, QuantSpec, input_fields
from bitnet_train.quant.weights import quantise_weight

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
SPECS = {
    "float": QuantSpec(FLOAT),
    "ternary": QuantSpec(),
    "mixed": QuantSpec(
        LayerQuant(),
        (
            ("*.o_proj", LayerQuant("symmetric", bits=4)),
            ("*.k_proj", FLOAT),
            ("*.up_proj", LayerQuant("binary", **input_fields(InputQuant(4, "absmean")))),
            ("*.down_proj", LayerQuant(activation_bits=None)),
        ),
    ),
}


def make(spec: QuantSpec, seed: int = 0, **fields: Any) -> Decoder:
    """With large random weights and random gains, so that every part matters."""
    shape = {"hidden": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 56, "context": 24, "vocab": 61}
    cfg = DecoderConfig(**{**shape, "norms": Norms.inside, "activation": Activation.silu, **fields})  # type: ignore[arg-type]
    model = build_decoder(cfg, spec, NormalInit(std=0.15), seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def some_ids(batch: int = 2, tokens: int = 20) -> Tensor:
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(0))


def rotary(x: Tensor, theta: float) -> Tensor:
    """Rotate-half positions for x (batch, heads, tokens, head_dim)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] / theta ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def by_hand(model: Decoder, ids: Tensor) -> Tensor:
    """The logits from the state dict alone; quantised linears as their papers write them."""
    cfg, state = model.cfg, model.state_dict()

    def linear(name: str, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (x.shape[-1],), state[f"{name}_norm.weight"], cfg.norm_eps)
        quant, weight = model.spec.for_layer(name), state[f"{name}.weight"]
        if not quant.quantised:
            return F.linear(x, weight)
        if quant.activation_bits == 8:
            x = quantise_tokens(x).dequantise()
        elif quant.activation_bits == 4:
            b = x.abs().mean(-1, keepdim=True)
            x = b / 7**0.5 * torch.clamp(torch.round(7**0.5 / b * x), -8, 7)
        return F.linear(x, quantise_weight(weight, quant).dequantise())

    def heads(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, cfg.head_dim).transpose(1, 2)

    x = state["embed_tokens.weight"][ids]
    for layer in range(cfg.layers):
        at = f"layers.{layer}.self_attn"
        q, k, v = (heads(linear(f"{at}.{n}_proj", x)) for n in "qkv")
        q, k = rotary(q, cfg.rope_theta), rotary(k, cfg.rope_theta)
        k, v = (t.repeat_interleave(cfg.heads // cfg.kv_heads, 1) for t in (k, v))
        scores = q @ k.mT / cfg.head_dim**0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{at}.o_proj", attended)
        at = f"layers.{layer}.mlp"
        gate, up = linear(f"{at}.gate_proj", x), linear(f"{at}.up_proj", x)
        gate = F.silu(gate) if cfg.activation is Activation.silu else F.relu(gate).square()
        x = x + linear(f"{at}.down_proj", gate * up)
    x = F.rms_norm(x, (cfg.hidden,), state["norm.weight"], cfg.norm_eps)
    return F.linear(x, state["embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"])


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_decoder_written_out(activation: Activation, tied: bool) -> None:
    model = make(SPECS["float"], activation=activation, tie_embeddings=tied)
    got, wanted = model(some_ids()), by_hand(model, some_ids())
    assert torch.allclose(got, wanted, rtol=1e-3, atol=2e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("spec", ["ternary", "mixed"])
def test_quantised_it_is_the_same_up_to_a_code_here_and_there(spec: str, cached: bool) -> None:
    model = make(SPECS[spec])
    if cached:
        CodeCache(model)
    got, wanted = model(some_ids()), by_hand(model, some_ids())
    # A norm that rounds otherwise moves an input by a code, and what reads it by its share.
    assert (got - wanted).norm() < 0.03 * wanted.norm()
    assert ((got - wanted).norm(dim=-1) < 1e-4 * wanted.norm(dim=-1)).float().mean() > 0.3
    dense = make(SPECS["float"])
    assert (dense(some_ids()) - wanted).norm() > 0.1 * wanted.norm()  # so the test can tell


def test_gradients_are_those_of_the_decoder_written_out() -> None:
    model = make(SPECS["float"])
    by_model = torch.autograd.grad(model(some_ids()).square().mean(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    written = type("Written", (), {"cfg": model.cfg, "spec": model.spec, "state_dict": lambda self: state})()
    wanted = torch.autograd.grad(by_hand(written, some_ids()).square().mean(), [state[name] for name in names])
    for name, got, expected in zip(names, by_model, wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_names_and_layout(spec: str, tied: bool) -> None:
    model = make(SPECS[spec], tie_embeddings=tied)
    cfg = model.cfg
    table = {p.name: p.shape for p in parameter_table(cfg)}
    assert table == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert set(table) == set(model.state_dict())
    assert block_norms(cfg) == {f"{n}_norm": cfg.ffn if n == "mlp.down_proj" else cfg.hidden for n in PROJECTIONS}
    roles = [p.role for p in parameter_table(cfg)]
    assert roles.count(Role.norm) == 3 * 7 + 1
    assert not any("layernorm" in name or "sub_norm" in name for name in table)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("first", [1, 7, 19])
def test_with_a_cache_it_computes_the_same(spec: str, first: int) -> None:
    model, tokens = make(SPECS[spec]), some_ids()
    with torch.inference_mode():
        whole = model(tokens)
        cache = model.new_cache(2, 24)
        parts = [model(tokens[:, :first], cache=cache)]
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(first, tokens.shape[1])]
    error = (torch.cat(parts, 1) - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert error.max() < 0.05
    assert error.median() < 1e-5


def test_sub_norm_gain_is_that_of_the_norms_before_the_writers() -> None:
    cfg = DecoderConfig(hidden=32, layers=2, heads=4, kv_heads=4, ffn=48, context=8, vocab=30, norms=Norms.inside)
    init = NormalInit(sub_norm_gain=0.25)
    check_init(init, cfg.norms)
    model = build_decoder(cfg, QuantSpec(), init, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            small = name.endswith(("o_proj_norm.weight", "down_proj_norm.weight"))
            assert bool((parameter == (0.25 if small else 1.0)).all()), name
