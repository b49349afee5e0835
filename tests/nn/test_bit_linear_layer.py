"""BitLinear as a drop-in for nn.Linear, and SharedInput as a drop-in for separate layers."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.kernels.backend import BACKENDS
from bitnet_train.kernels.reference import ReferenceBackend
from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import quantise_tokens, rms_norm
from bitnet_train.quant.spec import FLOAT, LayerQuant
from bitnet_train.quant.weights import quantise_weight

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = [LayerQuant(s, groups=g) for s in ("ternary", "binary") for g in (1, 4, "row")]


def twin(linear: nn.Linear, quant: LayerQuant = LayerQuant()) -> BitLinear:  # noqa: B008  (frozen)
    """A BitLinear with the parameters of ``linear``."""
    layer = BitLinear(linear.in_features, linear.out_features, linear.bias is not None, quant=quant)
    layer.load_state_dict(linear.state_dict())
    return layer


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_have_the_mean_and_variance_of_nn_linears(quant: LayerQuant, bias: bool) -> None:
    # The bug that started it: variance 1150 against 0.33.
    linear = nn.Linear(512, 256, bias=bias)
    if bias:
        nn.init.normal_(linear.bias, 0.1, 0.3)
    x = torch.randn(1000, 512)
    y, wanted = twin(linear, quant)(x).detach(), linear(x).detach()
    offset = 0.0 if linear.bias is None else linear.bias.detach()
    # nn.Linear draws weights uniformly from (-b, b): variance b^2 / 3. Ternary: 3/4 become +-b/2, binary: all.
    share = {"ternary": 0.75 * 0.75, "binary": 0.75}[quant.scheme]
    assert (y - offset).var() / (wanted - offset).var() == pytest.approx(share, rel=0.05)
    assert abs(y.mean() - wanted.mean()) < 0.02 * wanted.std()
    assert torch.allclose(y.mean(0), wanted.mean(0), atol=0.15 * wanted.std().item())
    correlation = torch.corrcoef(torch.stack(((y - offset).flatten(), (wanted - offset).flatten())))[0, 1]
    assert correlation > {"ternary": 0.93, "binary": 0.85}[quant.scheme]


@pytest.mark.parametrize("quant", [*SCHEMES, LayerQuant(activation_bits=None), LayerQuant(threshold=0.8)])
def test_output_is_the_formula(quant: LayerQuant) -> None:
    layer = BitLinear(40, 12, bias=True, quant=quant)
    x = torch.randn(2, 5, 40)
    fake = x if quant.activation_bits is None else quantise_tokens(x).dequantise()
    assert torch.allclose(
        layer(x), F.linear(fake, quantise_weight(layer.weight, quant).dequantise(), layer.bias), atol=1e-5
    )


def test_bias_is_added_after_dequantisation() -> None:
    linear = nn.Linear(30, 8)
    layer, x = twin(linear), torch.randn(6, 30) * 50
    with_bias = layer(x)
    layer.bias = None
    assert torch.equal(with_bias, layer(x) + linear.bias)
    zero = twin(linear)(torch.zeros(1, 30))
    assert torch.equal(zero[0], linear.bias)


def test_bias_and_weight_learn() -> None:
    layer = BitLinear(8, 4)
    layer(torch.randn(3, 8)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((4,), 3.0))
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


def test_it_looks_like_nn_linear() -> None:
    layer, linear = BitLinear(8, 4, False), nn.Linear(8, 4, False)  # positional, as nn.Linear takes them
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(linear.state_dict())
    assert [n for n, _ in BitLinear(8, 4).named_parameters()] == ["weight", "bias"]
    assert BitLinear(8, 4, dtype=torch.bfloat16, device="meta").weight.dtype is torch.bfloat16
    assert "ternary" in repr(layer)
    torch.manual_seed(1)
    first = BitLinear(8, 4)
    torch.manual_seed(1)
    assert torch.equal(first.weight, nn.Linear(8, 4).weight)  # the same default initialisation


def test_state_dicts_go_both_ways() -> None:
    linear = nn.Linear(8, 4)
    layer = twin(linear)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    nn.Linear(8, 4).load_state_dict(layer.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.Linear(8, 5).state_dict())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_computes_the_same_and_is_independent(how: str, cached: bool) -> None:
    layer, x = BitLinear(16, 8), torch.randn(3, 16)
    if cached:
        CodeCache(layer)
    y = layer(x)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert other.quant == layer.quant
    assert torch.equal(other(x), y)
    with torch.no_grad():
        layer.weight.add_(torch.randn(8, 16))
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_another_type(dtype: torch.dtype) -> None:
    layer, x = BitLinear(16, 8), torch.randn(3, 16)
    wanted = layer(x)
    layer.to(dtype)
    y = layer(x.to(dtype))
    assert y.dtype is dtype
    assert torch.allclose(y.float(), wanted, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert layer.weight.grad.dtype is dtype


def test_float_schemes_and_bad_groups_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="float"):
        BitLinear(4, 4, quant=FLOAT)
    with pytest.raises(ConfigError, match="does not divide the 4"):
        BitLinear(4, 4, quant=LayerQuant(groups=3))


def test_the_backend_given_is_the_backend_used() -> None:
    class Marked(type(BACKENDS["reference"])):  # type: ignore[misc]
        def matmul(self, *args):  # type: ignore[no-untyped-def]
            return super().matmul(*args) + 1000

    layer = BitLinear(8, 4, backend=Marked())
    x = torch.randn(2, 8)
    assert bool((layer(x) > 500).all())
    assert bool((SharedInput((layer,), None)(x)[0][0] > 500).all())


# --- SharedInput ---

TERNARY, BINARY, WEIGHT_ONLY = LayerQuant(), LayerQuant("binary", groups="row"), LayerQuant(activation_bits=None)
MIXTURES = [
    (TERNARY, TERNARY, TERNARY),
    (TERNARY, BINARY, LayerQuant(groups=2)),
    (TERNARY, FLOAT, BINARY),
    (FLOAT, FLOAT, FLOAT),
    (WEIGHT_ONLY, WEIGHT_ONLY, WEIGHT_ONLY),
    (WEIGHT_ONLY, TERNARY, FLOAT),
    (TERNARY, WEIGHT_ONLY, TERNARY),
    (TERNARY,),
]


def make_layers(mixture: tuple[LayerQuant, ...], bias: bool) -> list[nn.Linear]:
    rows = (8, 4, 6)
    return [
        # The reference norms as the norm alone does, to the last bit.
        BitLinear(16, n, bias, quant=q, backend=BACKENDS["reference"]) if q.quantised else nn.Linear(16, n, bias)
        for q, n in zip(mixture, rows, strict=False)
    ]


def alone(layer: nn.Linear, x: Tensor, norm: RMSNorm | None) -> Tensor:
    """What the layer does on its own behind the norm, in float32."""
    return layer(x if norm is None else rms_norm(x, norm.weight, norm.eps)[0])


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_shared_input_equals_separate_layers(
    mixture: tuple[LayerQuant, ...], bias: bool, normed: bool, cached: bool
) -> None:
    layers = make_layers(mixture, bias)
    norm = RMSNorm(16, 1e-5) if normed else None
    if norm is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    shared = SharedInput(layers, norm)
    assert not list(shared.parameters())
    assert not shared.state_dict()
    learning = [p for layer in layers for p in layer.parameters()] + ([norm.weight] if norm else [])
    x = torch.randn(3, 7, 16, requires_grad=True)
    separate = [alone(layer, x, norm) for layer in layers]
    grads = [torch.randn_like(y) for y in separate]
    wanted = torch.autograd.grad(separate, [x, *learning], grads)
    if cached:
        CodeCache(nn.ModuleList([*layers, shared]))
    together, stream = shared(x)
    assert stream is x
    for y, expected, layer in zip(together, separate, layers, strict=True):
        if isinstance(layer, BitLinear) and layer.quant.activation_bits:
            assert torch.equal(y, expected)
        else:  # a float matmul of other shape sums in another order
            assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for got, expected in zip(torch.autograd.grad(together, [x, *learning], grads), wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_unused_output_gives_its_layer_no_gradient(mixture: tuple[LayerQuant, ...]) -> None:
    layers = make_layers(mixture, False)
    outputs, _ = SharedInput(layers, None)(torch.randn(5, 16))
    outputs[0].sum().backward()
    assert layers[0].weight.grad is not None
    for layer in layers[1:]:
        assert layer.weight.grad is None or not bool(layer.weight.grad.any())


def test_one_quantisation_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ReferenceBackend.quantise

    def counting(self, *args):  # type: ignore[no-untyped-def]
        calls.append(args[0].shape)
        return original(self, *args)

    monkeypatch.setattr(ReferenceBackend, "quantise", counting)
    SharedInput(make_layers((TERNARY, BINARY, TERNARY), False), RMSNorm(16, 1e-5))(torch.randn(5, 16))
    assert len(calls) == 1


def test_under_autocast_all_outputs_are_bf16() -> None:
    layers = make_layers((TERNARY, FLOAT, WEIGHT_ONLY), True)
    shared = SharedInput(layers, RMSNorm(16, 1e-5))
    x = torch.randn(4, 16)
    exact, _ = shared(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = shared(x)
    for y, wanted in zip(rounded, exact, strict=True):
        assert y.dtype is torch.bfloat16
        assert torch.allclose(y.float(), wanted, rtol=0.02, atol=0.02)
