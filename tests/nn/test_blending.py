"""Between float and quantised: the ends, the way between, masks, and what passes back."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import quantise_inputs, rms_norm
from bitnet_train.quant.hadamard import rotate
from bitnet_train.quant.spec import FLOAT, InputQuant, LayerQuant, input_fields

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR = input_fields(InputQuant(4, "absmean", "group", 8))
LAYERS = [
    LayerQuant(),
    LayerQuant("binary", groups="row"),
    LayerQuant("symmetric", bits=4, groups=2, **FOUR),
    LayerQuant(activation_bits=None),
    LayerQuant(hadamard=True, top_k=0.5),
    LayerQuant(trainable_scale=True, groups=3),
]
layers = pytest.mark.parametrize("quant", LAYERS, ids=str)


def strength(value: float) -> Tensor:
    return torch.tensor(value)


def blended(layer: BitLinear, weights: Tensor, inputs: Tensor) -> BitLinear:
    layer.blend(weights, inputs)
    return layer


@layers
def test_nothing_of_the_quantiser_is_the_linear_layer_exactly(quant: LayerQuant) -> None:
    layer, x = BitLinear(16, 12, quant=quant), torch.randn(3, 5, 16)
    blended(layer, strength(0.0), strength(0.0))
    read = rotate(x) if quant.hadamard else x
    assert torch.equal(layer(x), F.linear(read, layer.weight, layer.bias))


@layers
def test_all_of_the_quantiser_is_the_product_of_integers(quant: LayerQuant) -> None:
    layer, x = BitLinear(16, 12, quant=quant), torch.randn(3, 5, 16)
    wanted = layer(x)
    assert torch.allclose(blended(layer, strength(1.0), strength(1.0))(x), wanted, rtol=1e-5, atol=1e-5)
    layer.blend(None, None)
    assert torch.equal(layer(x), wanted)


@layers
@pytest.mark.parametrize("share", [0.25, 0.9])
def test_the_way_between_is_a_straight_line_of_weights_and_of_inputs(quant: LayerQuant, share: float) -> None:
    layer, x = blended(BitLinear(16, 12, quant=quant), strength(share), strength(share)), torch.randn(7, 16)
    weight = layer.weight + share * (layer.quantised().dequantise() - layer.weight)
    read = rotate(x) if quant.hadamard else x
    if quant.activation_bits:
        read = read + share * (quantise_inputs(read, quant.inputs).dequantise() - read)
    assert torch.allclose(layer(x), F.linear(read, weight, layer.bias), rtol=1e-5, atol=1e-5)


@layers
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gradients_pass_straight_through(quant: LayerQuant, share: float) -> None:
    layer, x = BitLinear(16, 12, quant=quant), torch.randn(7, 16, requires_grad=True)
    blended(layer, strength(share), strength(share))
    grad = torch.randn(7, 12)
    layer(x).backward(grad)
    read = rotate(x.detach()) if quant.hadamard else x.detach()
    if quant.activation_bits:
        read = read + share * (quantise_inputs(read, quant.inputs).dequantise() - read)
    with torch.no_grad():
        weight = layer.weight + share * (layer.quantised().dequantise() - layer.weight)
        back = grad @ weight
    assert x.grad is not None
    assert torch.allclose(x.grad, rotate(back) if quant.hadamard else back, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.weight.grad, grad.t() @ read, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.bias.grad, grad.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_learned_scale_learns_by_its_share(share: float) -> None:
    quant = LayerQuant("symmetric", bits=4, groups=3, trainable_scale=True, activation_bits=None)
    layer, x, grad = BitLinear(16, 12, quant=quant), torch.randn(7, 16), torch.randn(7, 12)
    layer(x).backward(grad)
    assert layer.weight_scale is not None
    whole = layer.weight_scale.grad
    assert whole is not None
    assert bool(whole.any())
    layer.weight_scale.grad = None
    blended(layer, strength(share), strength(share))(x).backward(grad)
    assert layer.weight_scale.grad is not None
    assert torch.allclose(layer.weight_scale.grad, share * whole, rtol=1e-4, atol=1e-6)


def test_a_mask_quantises_what_it_chooses() -> None:
    layer, x = BitLinear(16, 12), torch.randn(7, 16)
    mask = torch.zeros(12, 16).bernoulli_(0.5)
    blended(layer, mask, strength(1.0))
    weight = torch.where(mask.bool(), layer.quantised().dequantise(), layer.weight)
    read = quantise_inputs(x, layer.quant.inputs).dequantise()
    assert torch.allclose(layer(x), F.linear(read, weight, layer.bias), rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, read.sum(0).expand(12, 16), rtol=1e-4, atol=1e-4)  # of all of them


def test_strengths_are_edited_in_place() -> None:
    layer, x = BitLinear(16, 12), torch.randn(7, 16)
    value = strength(0.0)
    blended(layer, value, value)
    first = layer(x)
    value.fill_(0.5)
    assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_as_far_on_the_way(how: str) -> None:
    layer, x = blended(BitLinear(16, 12), strength(0.3), strength(0.3)), torch.randn(7, 16)
    other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))
    assert layer.weight_blend is not None
    layer.weight_blend.fill_(0.9)
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_strengths_stay_float32_and_results_have_the_weights_type(dtype: torch.dtype) -> None:
    layer, x = blended(BitLinear(16, 12), strength(0.3), strength(0.3)), torch.randn(7, 16)
    wanted = layer(x)
    layer.to(dtype)
    assert layer.weight_blend is not None
    assert layer.weight_blend.dtype is torch.float32
    assert layer.weight_blend.item() == pytest.approx(0.3, abs=1e-7)
    y = layer(x.to(dtype))
    assert y.dtype is dtype
    assert torch.allclose(y.float(), wanted, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert layer.weight.grad.dtype is dtype


def test_the_state_dict_holds_no_strengths() -> None:
    layer = BitLinear(16, 12)
    names = list(layer.state_dict())
    assert list(blended(layer, strength(0.3), strength(0.3)).state_dict()) == names


# --- several layers of one input ---

MIXTURES = [
    (LAYERS[0], LAYERS[0], LAYERS[0]),
    (LAYERS[0], LAYERS[2], LAYERS[3]),
    (LAYERS[0], FLOAT, LAYERS[4]),
    (LAYERS[1], LAYERS[5], FLOAT),
]


def make(mixture: tuple[LayerQuant, ...]) -> list[nn.Linear]:
    return [
        BitLinear(16, 12, quant=q, bias=i != 1) if q.quantised else nn.Linear(16, 12) for i, q in enumerate(mixture)
    ]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("blending", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("cached", [False, True])
def test_blended_and_whole_layers_share_an_input(
    mixture: tuple[LayerQuant, ...], blending: tuple[bool, ...], cached: bool
) -> None:
    members, norm = make(mixture), RMSNorm(16, 1e-5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    one = strength(0.4)
    for layer, blends in zip(members, blending, strict=True):
        if blends and isinstance(layer, BitLinear):
            layer.blend(one, one)
    shared = SharedInput(members, norm)
    x, delta = torch.randn(3, 7, 16, requires_grad=True), torch.randn(3, 7, 16, requires_grad=True)
    learning = [x, delta, norm.weight, *(p for layer in members for p in layer.parameters())]
    separate = [layer(rms_norm(x + delta, norm.weight, norm.eps)[0]) for layer in members]
    grads = [torch.randn_like(y) for y in separate]
    wanted = torch.autograd.grad(separate, learning, grads)
    if cached:
        CodeCache(nn.ModuleList([*members, shared]))
    together, stream = shared(x, delta)
    assert torch.equal(stream, x + delta)
    for y, expected in zip(together, separate, strict=True):
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    for got, expected in zip(torch.autograd.grad(together, learning, grads), wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * (1 + expected.abs().max().item()))


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_a_gated_input_can_be_blended(activation: str) -> None:
    layer = blended(BitLinear(16, 12), strength(0.4), strength(0.4))
    up, gate = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    (y,), _ = SharedInput((layer,), None)(up, gate=gate, activation=activation)
    inner = (F.silu(gate) if activation == "silu" else F.relu(gate).square()) * up
    wanted = layer(inner)
    assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (up, gate, layer.weight)) for out in (y, wanted)]
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_inputs_of_layers_that_blend_alike_are_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet_train.nn import blending

    calls = []
    original = blending.quantise_inputs
    monkeypatch.setattr(blending, "quantise_inputs", lambda *args: calls.append(1) or original(*args))
    members = make(MIXTURES[0])
    one = strength(0.4)
    for layer in members:
        assert isinstance(layer, BitLinear)
        layer.blend(one, one)
    SharedInput(members, None)(torch.randn(5, 16))
    assert len(calls) == 1
