"""``convert``: nn.Linear becomes BitLinear with the same bytes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.convert import convert, revert, tensor_digest, unquantised
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.activations import quantise_tokens
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import quantise_weight
from tests.nn.convert_models import IDS, MODELS, Before, Twice, llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    make, examples = MODELS[request.param]
    return make(), examples


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_are_the_same_bytes_and_outputs_the_same_without_quantisation(kind: str) -> None:
    make, examples = MODELS[kind]
    model, untouched = make(), make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = convert(model, examples=examples)
    assert report.layers
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    originals = dict(untouched.named_modules())
    for layer in report.layers:
        for name in layer.names:
            module = model.get_submodule(name)
            assert type(module) is BitLinear
            original = originals[layer.names[0]]
            assert set(layer.digests) == {n for n, _ in original.named_parameters()}
            assert all(tensor_digest(p) == layer.digests[n] for n, p in original.named_parameters())
    named = {name for layer in report.layers for name in layer.names}
    left = {n for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    assert left <= set(report.skipped)
    assert not named & set(report.skipped)
    outputs = report.outputs
    assert outputs is not None
    assert outputs.off == 0.0
    assert math.isfinite(outputs.on)
    assert outputs.on > 0
    assert 0.01 < outputs.on_relative < 1.5
    assert set(outputs.statistics) == {layer.names[0] for layer in report.layers}
    assert not outputs.unreached
    model.eval(), untouched.eval()
    with torch.no_grad(), unquantised(model):
        assert torch.equal(_first(model(**examples)), _first(untouched(**examples)))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("quant", [LayerQuant(), LayerQuant("binary", groups=2), LayerQuant(activation_bits=None)])
def test_a_converted_layer_computes_what_the_quantisers_say(quant: LayerQuant) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    weight, bias = (p.detach().clone() for p in model.parameters())
    x = torch.randn(5, 16)
    convert(model, quant, examples=[x])
    read = x if quant.activation_bits is None else quantise_tokens(x).dequantise()
    wanted = F.linear(read, quantise_weight(weight, quant).dequantise(), bias)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


# Uniform weights of variance 1 / (3 n), as nn.Linear draws them, on inputs of variance 1: outputs of 1/3. Codes
# times scales: ternary a^2 / 4 * 3/4 (a/2 is the mean, a quarter of the weights is below a/4), binary a^2 / 4.
VARIANCES = {"ternary": 3 / 16, "binary": 1 / 4}


@pytest.mark.parametrize("scheme", VARIANCES)
@pytest.mark.parametrize("inputs", ["normal", "uniform"])
@pytest.mark.parametrize("groups", [1, 8])
def test_output_statistics_are_those_of_nn_linear(scheme: str, inputs: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.empty(1024, 512)
    x = x.normal_(generator=generator) if inputs == "normal" else x.uniform_(-(3**0.5), 3**0.5, generator=generator)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(512, 512))
    report = convert(model, LayerQuant(scheme, groups=groups), examples=[x])
    assert report.outputs is not None
    found = report.outputs.statistics["0"]
    assert abs(found.float_mean) < 0.01
    assert abs(found.mean) < 0.01
    assert found.float_variance == pytest.approx(1 / 3, rel=0.02)
    assert found.variance == pytest.approx(VARIANCES[scheme], rel=0.02)


def test_types_devices_and_flags_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)).bfloat16().train()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    model[2].weight.tag = "kept"
    model[0]._is_residual = True
    convert(model, examples=[torch.randn(3, 8).bfloat16()])
    assert model[0].weight.dtype is model[2].bias.dtype is torch.bfloat16
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)
    assert (model.training, model[0].training, model[1].training, model[2].training) == (True, True, True, False)
    assert model[2].weight.tag == "kept"
    assert model[0]._is_residual
    assert not any(p.is_meta for p in model.parameters())


def test_converting_draws_no_random_numbers() -> None:
    model = llama().train()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    convert(model, examples=IDS)
    assert torch.equal(torch.rand(3), wanted)


def test_hooks_go_along_and_can_still_be_removed() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    report = convert(model)
    assert report.layers[0].hooks == 2
    model(torch.randn(2, 8))
    assert calls == ["before", "after"]
    handle.remove()
    model(torch.randn(2, 8))
    assert calls == ["before", "after", "before"]


def test_what_is_left_alone_is_listed_with_its_reason() -> None:
    model = MODELS["gpt2-like"][0]()
    report = convert(model, examples=IDS)
    assert [layer.names for layer in report.layers] == [("out",)]
    assert report.skipped["body.wte"] == "an embedding"
    projections = [name for name, m in model.named_modules() if isinstance(m, Conv1D)]
    assert len(projections) == 4
    assert {report.skipped[name] for name in projections} == {"Conv1D is no nn.Linear"}
    assert convert(llama(tied=True)).skipped == {
        "lm_head": "excluded by 'lm_head'",
        "model.embed_tokens": "an embedding",
    }
    # A head whose name nobody knows is found by the model's own accessor; one of a plain module by its weight.
    assert convert(llama(), exclude=()).skipped["lm_head"] == "the output head"
    report = convert(MODELS["twice"][0]())
    assert report.skipped == {
        "embed": "an embedding",
        "decoder": "tied to embed",
        "normed": "its weight is computed from other parameters",
    }
    odd = nn.Sequential(nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8))
    odd[2].register_buffer("mask", torch.ones(8))
    odd.append(nn.Linear(8, 8))
    odd.append(nn.Linear(8, 8))
    odd[4].forward = lambda x: x
    odd.append(nn.Linear(8, 8))
    assert convert(odd, QuantSpec(LayerQuant(), (("5", FLOAT),))).skipped == {
        "0": "MultiheadAttention is no nn.Linear",
        "0.out_proj": "NonDynamicallyQuantizableLinear is a subclass of nn.Linear",
        "1.linear1": "nn.TransformerEncoderLayer reads its weights past its forward",
        "1.linear2": "nn.TransformerEncoderLayer reads its weights past its forward",
        "1.self_attn": "MultiheadAttention is no nn.Linear",
        "1.self_attn.out_proj": "NonDynamicallyQuantizableLinear is a subclass of nn.Linear",
        "2": "it holds mask as well",
        "4": "its forward was replaced",
        "5": "quant leaves it float",
    }


def test_shared_layers_and_weights_stay_shared() -> None:
    model, examples = MODELS["twice"][0](), MODELS["twice"][1]
    assert isinstance(model, Twice)
    report = convert(model, examples=examples)
    assert ("first", "again") in [layer.names for layer in report.layers]
    assert model.first is model.again
    assert model.blocks[0].weight is model.blocks[1].weight
    assert model.decoder.weight is model.embed.weight
    assert type(model.decoder) is nn.Linear
    # One of two that share a weight cannot be converted without the other.
    report = convert(model := Twice(), exclude=("blocks.1",))
    assert report.skipped["blocks.0"] == "tied to blocks.1"
    assert model.blocks[0].weight is model.blocks[1].weight


def test_patterns_choose_layers_and_schemes() -> None:
    model = llama()
    spec = QuantSpec(LayerQuant(), (("*.o_proj", LayerQuant("binary")), ("model.layers.0.mlp.*", FLOAT)))
    report = convert(model, spec, include=("model.layers.*",), exclude=("*.q_proj",))
    kinds = {layer.names[0]: layer.quant.scheme for layer in report.layers}
    assert kinds["model.layers.1.self_attn.o_proj"] == "binary"
    assert kinds["model.layers.1.mlp.up_proj"] == "ternary"
    assert report.skipped["model.layers.0.mlp.up_proj"] == "quant leaves it float"
    assert report.skipped["model.layers.0.self_attn.q_proj"] == "excluded by '*.q_proj'"
    assert report.skipped["lm_head"] == "the output head"
    for bad, sentence in (
        ({"include": ("nowhere.*",)}, "include: the pattern 'nowhere.*' matches no linear layer; names look like"),
        ({"exclude": ("nowhere",)}, "exclude: the pattern 'nowhere' matches no linear layer"),
        ({"quant": QuantSpec(LayerQuant(), (("*.w", FLOAT),))}, r"overrides: the pattern '\*.w' matches no linear"),
        ({"quant": LayerQuant(groups=7)}, r"model.layers.0.self_attn.q_proj: quant.weight.groups=7 does not divide"),
        ({"quant": FLOAT}, "No layer of this model can be converted: .*quant leaves it float"),
    ):
        before = Before(model := llama())
        with pytest.raises(ConfigError, match=sentence):
            convert(model, **bad)
        before.check()


def test_models_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(ConfigError, match="a single linear layer"):
        convert(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="it has no linear layer"):
        convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ConfigError, match="0 is on the meta device: load"):
        convert(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with pytest.raises(ConfigError, match=r"0 \(quantised already\)"):
        convert(nn.Sequential(BitLinear(4, 4)))
    decoder = build_decoder(
        DecoderConfig(hidden=32, layers=1, ffn=48, context=8, vocab=20), QuantSpec(FLOAT), NormalInit(), 0
    )
    for change in (convert, revert):
        with pytest.raises(ConfigError, match="a model of bitnet_train"):
            change(decoder)


def test_reverting_gives_plain_layers_with_the_same_parameters(case: tuple[nn.Module, dict[str, Any]]) -> None:
    model, examples = case
    model.eval()
    with torch.no_grad():
        wanted = _first(model(**examples))
    report = convert(model, examples=examples)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert sorted(revert(model)) == sorted(layer.names[0] for layer in report.layers)
    assert not any(isinstance(m, BitLinear) for m in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for layer in report.layers:
        plain = model.get_submodule(layer.names[0])
        assert type(plain) is nn.Linear
        assert set(plain.__dict__) <= set(nn.Linear(1, 1).__dict__) | {"_is_hf_initialized"}
    with torch.no_grad():
        assert torch.equal(_first(model(**examples)), wanted)


def test_codes_without_weights_cannot_be_reverted() -> None:
    model = nn.Sequential(BitLinear(8, 8))
    model[0].weight = nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(ConfigError, match="0 holds codes and no master weights"):
        revert(model)


def test_a_converted_model_trains() -> None:
    model = llama()
    convert(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**IDS, labels=IDS["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert weight.grad is not None
    assert losses[-1] < losses[0] - 0.5
