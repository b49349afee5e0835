"""Learned scales: float32 whatever the model's type, in step with their codes, and in the checkpoint."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.code_cache import CodeCache, keep_codes
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.convert import convert
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import learned_scales
from bitnet_train.quant.spec import LayerQuant, QuantSpec
from bitnet_train.quant.weights import Codes, quantise_weight, statistic_scale

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=16, layers=2, heads=4, kv_heads=2, ffn=24, context=16, vocab=30)
LEARNED = QuantSpec(
    LayerQuant(trainable_scale=True),
    (
        ("*.o_proj", LayerQuant("symmetric", bits=4, trainable_scale=True, groups=2)),
        ("*.k_proj", LayerQuant()),
        ("layers.1.mlp.down_proj", LayerQuant("symmetric", bits=8, trainable_scale=True, activation_bits=None)),
        ("layers.0.mlp.gate_proj", LayerQuant("binary", trainable_scale=True, group_rows=8)),
    ),
)
IDS = torch.arange(20).reshape(2, 10)


def decoder(seed: int = 0) -> Decoder:
    return build_decoder(CONFIG, LEARNED, NormalInit(std=0.3), seed)


def bit_layers(model: nn.Module) -> dict[str, BitLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {n: layer.weight_scale for n, layer in bit_layers(model).items() if layer.weight_scale is not None}


def assert_fresh(model: Decoder) -> None:
    for layer in bit_layers(model).values():
        fresh = quantise_weight(layer.weight, layer.quant, layer.weight_scale)
        assert torch.equal(layer.quantised().codes, fresh.codes)
        assert torch.equal(layer.quantised().scale, fresh.scale)
    clean = Decoder(model.cfg, model.spec)
    clean.load_state_dict(model.state_dict())
    assert torch.equal(model(IDS), clean(IDS))


def step(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    optimizer.step()


def test_scales_start_at_the_statistic_of_their_weights() -> None:
    model = decoder()
    found = scales(model)
    assert {f"{name}.weight_scale": tuple(s.shape) for name, s in found.items()} == learned_scales(CONFIG, LEARNED)
    assert len(found) == 12
    for name, scale in found.items():
        layer = bit_layers(model)[name]
        assert torch.equal(scale, statistic_scale(layer.weight, layer.quant))
    # They draw no random numbers: the weights are those of the model without them.
    plain = build_decoder(CONFIG, QuantSpec(), NormalInit(std=0.3), 0)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("fused", [False, True])
def test_codes_and_scales_move_together(fused: bool) -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    CodeCache(model, optimizer)
    assert_fresh(model)
    for _ in range(3):
        before = {name: scale.detach().clone() for name, scale in scales(model).items()}
        step(model, optimizer)
        assert_fresh(model)
        assert all(not torch.equal(scale, before[name]) for name, scale in scales(model).items())


def test_codes_follow_a_scale_alone() -> None:
    model = decoder()
    optimizer = torch.optim.SGD(scales(model).values(), lr=0.5)
    CodeCache(model, optimizer)
    before = {name: layer.quantised().codes.clone() for name, layer in bit_layers(model).items()}
    weights = {name: layer.weight.detach().clone() for name, layer in bit_layers(model).items()}
    for _ in range(3):
        step(model, optimizer)
    assert_fresh(model)
    moved = [
        name for name, layer in bit_layers(model).items() if not torch.equal(layer.quantised().codes, before[name])
    ]
    assert moved
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in bit_layers(model).items())


def test_with_and_without_kept_codes_it_is_the_same_run() -> None:
    ends = []
    for cached in (True, False):
        model = decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        if cached:
            CodeCache(model, optimizer)
        for _ in range(3):
            step(model, optimizer)
        ends.append(model(IDS))
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_keep_their_float32_values_when_the_model_changes_type(dtype: torch.dtype) -> None:
    model = decoder()
    cache = CodeCache(model)
    before = {name: scale.detach().clone() for name, scale in scales(model).items()}
    assert any(not torch.equal(scale, scale.bfloat16().float()) for scale in before.values())
    model.to(dtype)
    cache.refresh()
    for name, scale in scales(model).items():
        assert isinstance(scale, nn.Parameter)
        assert scale.requires_grad
        assert scale.dtype is torch.float32
        assert torch.equal(scale, before[name])
        assert torch.equal(bit_layers(model)[name].quantised().scale, scale)
    layer = bit_layers(model)["layers.0.self_attn.q_proj"]
    layer(torch.randn(3, 16, dtype=dtype)).float().sum().backward()
    assert layer.weight_scale is not None
    assert layer.weight_scale.grad is not None
    assert layer.weight_scale.grad.dtype is torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_scales_of_its_own(how: str) -> None:
    model = decoder()
    CodeCache(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    wanted = model(IDS)
    assert torch.equal(other(IDS), wanted)
    with torch.no_grad():
        for scale in scales(other).values():
            scale.mul_(2)
    assert_fresh(other)
    assert torch.equal(model(IDS), wanted)


def test_scales_are_in_the_state_dict_and_loading_refreshes_the_codes() -> None:
    model, other = decoder(), decoder(seed=1)
    assert set(learned_scales(CONFIG, LEARNED)) <= set(model.state_dict())
    CodeCache(model)
    with torch.no_grad():
        for scale in scales(other).values():
            scale.mul_(1.5)
    model.load_state_dict(other.state_dict())
    assert_fresh(model)
    assert torch.equal(model(IDS), other(IDS))


def test_codes_without_weights_have_no_scales_to_learn() -> None:
    model, other = decoder(), decoder(seed=1)
    other.load_state_dict(model.state_dict())
    keep_codes(other, {n: Codes(*(t.clone() for t in layer.quantised())) for n, layer in bit_layers(model).items()})
    assert torch.equal(other(IDS), model(IDS))
    assert not scales(other)
    other.to("cpu")


def test_a_scale_below_the_floor_counts_as_the_floor() -> None:
    layer, x = BitLinear(8, 4, quant=LayerQuant(trainable_scale=True)), torch.randn(3, 8)
    assert layer.weight_scale is not None
    layer.weight_scale.data.fill_(-1.0)
    y = layer(x)
    assert bool(torch.isfinite(y).all())
    assert y.abs().max() < 1e-2 + layer.bias.abs().max()
    y.sum().backward()
    assert bool(torch.isfinite(layer.weight_scale.grad).all())


def test_a_weight_that_is_not_finite_shows() -> None:
    layer, x = BitLinear(8, 4, quant=LayerQuant(trainable_scale=True, groups=2)), torch.randn(3, 8)
    layer.weight.data[3, 1] = float("nan")
    assert layer(x).isnan().any(0).tolist() == [False, False, True, True]
    CodeCache(layer)
    assert layer(x).isnan().any(0).tolist() == [False, False, True, True]


def test_a_converted_layer_starts_with_the_statistic_of_its_weights() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    weight = model[0].weight.detach().clone()
    convert(model, LayerQuant(trainable_scale=True, groups=2))
    layer = model[0]
    assert isinstance(layer, BitLinear)
    assert layer.weight_scale is not None
    torch.testing.assert_close(layer.weight_scale.detach(), weight.reshape(2, -1).abs().mean(1))


def test_convert_refuses_a_rotation() -> None:
    with pytest.raises(ConfigError, match="rotated basis"):
        convert(torch.nn.Sequential(torch.nn.Linear(16, 8)), LayerQuant(hadamard=True))
