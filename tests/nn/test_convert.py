"""``convert``: nn.Linear becomes BitLinear with the same bytes, or nothing changes at all."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from bitnet_train.errors import ConfigError, ConversionError
from bitnet_train.nn import convert as module_under_test
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.convert import convert, revert, tensor_digest, unquantised
from bitnet_train.nn.convert_checks import Bounds
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.activations import quantise_tokens
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import quantise_weight

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS: dict[str, Any] = {"vocab_size": 60, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
IDS = {"input_ids": torch.arange(24).reshape(2, 12)}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
CAUSAL = {"attn_implementation": "eager"}


def llama(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=tied, **CAUSAL))


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **TOKENS, tie_word_embeddings=True, **CAUSAL))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=5))


class Gpt2Like(nn.Module):
    """GPT-2's blocks, whose projections are Conv1D, and a plain linear layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        cfg = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=1)
        self.body = GPT2Model(cfg)
        self.out = nn.Linear(32, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.body(input_ids).last_hidden_state)


class Twice(nn.Module):
    """One layer in two places, two layers with one weight, a tied head of another name, a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.blocks[1].weight = self.blocks[0].weight
        self.normed = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.decoder = nn.Linear(8, 20, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(self.embed(ids))))
        for block in self.blocks:
            x = x + block(x)
        return self.decoder(self.normed(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, IDS),
    "llama tied": (lambda: llama(tied=True), IDS),
    "qwen2": (qwen2, IDS),
    "vit": (vit, IMAGES),
    "gpt2-like": (Gpt2Like, IDS),
    "twice": (Twice, {"ids": torch.arange(12).reshape(2, 6)}),
}


class Before:
    """Everything that a rollback must restore."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        self.parameters = [(name, id(p), tensor_digest(p), p.requires_grad) for name, p in model.named_parameters()]
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check(self) -> None:
        assert self.modules == [(name, id(module), module.training) for name, module in self.model.named_modules()]
        now = [(name, id(p), tensor_digest(p), p.requires_grad) for name, p in self.model.named_parameters()]
        assert self.parameters == now
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for name, tensor in self.state.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, equal_nan=True)
        for module in self.model.modules():
            assert not isinstance(module, BitLinear)
            assert "forward" not in module.__dict__


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


# --- broken transfers ---


def _transposed(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().t().contiguous() if parameter.dim() == 2 else parameter.detach().clone())


def _rounded(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().half().to(parameter.dtype))


def _thawed(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=not parameter.requires_grad)


def _aliased_and_zeroed(parameter: nn.Parameter) -> nn.Parameter:
    copied = nn.Parameter(parameter.detach().clone())
    copied.data.zero_()
    return copied


def _raises(parameter: nn.Parameter) -> nn.Parameter:
    raise RuntimeError("out of paper")


BROKEN = {
    "transposed": (_transposed, r"checksum: the bytes of weight|shape of weight"),
    "rounded": (_rounded, "checksum: the bytes of (weight|bias)"),
    "zeroed": (_aliased_and_zeroed, "checksum: the bytes of weight"),
    "double": (
        lambda p: nn.Parameter(p.detach().double()),
        r"type of weight: torch\.float64 instead of torch\.float32",
    ),
    "thawed": (_thawed, "requires_grad of weight: False instead of True"),
    "raises": (_raises, r"the transfer failed \(RuntimeError: out of paper\)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_transfer_changes_nothing(
    fault: str, case: tuple[nn.Module, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = case
    before = Before(model)
    broken, sentence = BROKEN[fault]
    monkeypatch.setattr(module_under_test, "copy_parameter", broken)
    with pytest.raises(ConversionError, match=sentence) as caught:
        convert(model, examples=examples)
    assert str(caught.value).split(":")[0] in dict(model.named_modules())
    assert caught.value.exit_code == 4
    before.check()


def test_a_fault_in_the_last_layer_takes_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before, copied, real = Before(model), [], module_under_test.copy_parameter

    def last_is_wrong(parameter: nn.Parameter) -> nn.Parameter:
        copied.append(parameter)
        fresh = real(parameter)
        if len(copied) == 14:
            fresh.data[0, 0] += 1
        return fresh

    monkeypatch.setattr(module_under_test, "copy_parameter", last_is_wrong)
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.down_proj: checksum"):
        convert(model)
    before.check()


@pytest.fixture
def patched_bit_linear(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    real = BitLinear.forward

    def patch(forward: Callable[..., Any]) -> None:
        # Broken while it quantises; with quantisation off it is the plain layer.
        either = lambda self, x: forward(self, x) if self.weight_blend is None else real(self, x)  # noqa: E731
        monkeypatch.setattr(BitLinear, "forward", either)

    return patch


def test_a_dropped_bias_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    before, real = Before(model), module_under_test._take_along

    def drop(old: nn.Linear, new: nn.Linear) -> None:
        real(old, new)
        new.bias = None

    monkeypatch.setattr(module_under_test, "_take_along", drop)
    with pytest.raises(ConversionError, match="parameters: bias is not in both layers"):
        convert(model, examples=IMAGES)
    before.check()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_found(value: float) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    before = Before(model)
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj: finite: weight holds NaN or infinity"):
        convert(model)
    before.check()


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        # The statistics of a much copied early package: no scale on the way back.
        (
            lambda self, x: quantise_tokens(x).codes.float() @ self.quantised().codes.float().t(),
            "statistics: the variance",
        ),
        (lambda self, x: F.linear(x, self.weight) * 0, "statistics: the variance"),
        (lambda self, x: F.linear(x, self.weight) + 50, "statistics: the mean of its outputs is 50"),
        (lambda self, x: F.linear(x, self.weight) * math.nan, "finite: its quantised outputs are not"),
    ],
)
def test_outputs_of_a_broken_layer_are_found(
    forward: Callable[..., Any], sentence: str, patched_bit_linear: Callable[[Callable[..., Any]], None]
) -> None:
    model = llama().train()
    before = Before(model)
    patched_bit_linear(forward)
    with pytest.raises(ConversionError, match=r"^model\.layers\.0\.self_attn\.q_proj: " + sentence):
        convert(model, examples=IDS)
    before.check()


def test_a_difference_with_quantisation_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = Before(model)

    class Unhelpful:
        def __init__(self, model: nn.Module) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(module_under_test, "unquantised", Unhelpful)
    with pytest.raises(ConversionError, match=r"layers\.0\.self_attn\.q_proj: outputs: with quantisation off they"):
        convert(model, examples=IDS)
    before.check()


def test_bounds_can_be_set() -> None:
    model = llama()
    before = Before(model)
    with pytest.raises(ConversionError, match="statistics: the variance of its outputs is"):
        convert(model, examples=IDS, bounds=Bounds(variance=1.01))
    before.check()


class PastItsLayers(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def test_layers_that_the_model_runs_past_are_found() -> None:
    model = PastItsLayers()
    before = Before(model)
    with pytest.raises(ConversionError, match="none of the layers is called"):
        convert(model, examples=[torch.randn(2, 8)])
    before.check()
    both = nn.Sequential(nn.Linear(8, 8), PastItsLayers())
    report = convert(both, examples=[torch.randn(2, 8)])
    assert report.outputs is not None
    assert report.outputs.unreached == ["1.layer"]


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = Before(model)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module_under_test, "compare_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, examples=IDS)
    before.check()


def test_a_model_that_fails_on_its_examples_is_not_touched() -> None:
    model = llama()
    before = Before(model)
    with pytest.raises(ValueError, match="specify exactly one"):
        convert(model, examples={"no_such_argument": 1})
    before.check()


# --- the way back, and on ---


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
