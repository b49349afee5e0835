"""Weights packed four codes to a byte, in models that are only read from: the same results bit for bit."""

import pytest
import torch

from bitnet_train.export.canonical import assemble_decoder
from bitnet_train.kernels.backend import BACKENDS, Backend, WeightCodes
from bitnet_train.nn.code_cache import pack_kept_codes
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import quantised_layers
from bitnet_train.quant.activations import quantise_tokens
from bitnet_train.quant.packing import pack_quarters
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import quantise_weight

REFERENCE = BACKENDS["reference"]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (17, 64), (64, 256), (7, 257), (96, 255), (5, 1031), (130, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_unpacked_codes(backend: Backend, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(m * n + k)
    x = torch.randn(m, k, generator=generator)
    x[0, :] *= 100
    codes = torch.randint(-1, 2, (n, k), generator=generator).to(torch.int8)
    scale, bias = torch.rand(n, generator=generator), torch.randn(n, generator=generator)
    tokens = quantise_tokens(x)
    wanted = REFERENCE.matmul(tokens, WeightCodes(codes, scale), bias, dtype)
    packed = WeightCodes(pack_quarters(codes), scale)
    assert packed.packed
    assert torch.equal(packed.unpacked(k).codes, codes)
    assert torch.equal(backend.matmul(tokens, packed, bias, dtype), wanted)
    assert torch.equal(
        backend.matmul(tokens, packed, None, dtype), REFERENCE.matmul(tokens, WeightCodes(codes, scale), None, dtype)
    )


def test_a_row_of_nan_stays_one(backend: Backend) -> None:
    x = torch.randn(3, 70)
    x[1, 4] = torch.nan
    packed = WeightCodes(pack_quarters(torch.randint(-1, 2, (9, 70)).to(torch.int8)), torch.rand(9))
    assert backend.matmul(quantise_tokens(x), packed, None, torch.float32).isnan().any(1).tolist() == [
        False,
        True,
        False,
    ]


SPECS = {
    "ternary": QuantSpec(),
    "groups": QuantSpec(LayerQuant(groups=2)),
    "binary": QuantSpec(LayerQuant("binary")),
    "some float": QuantSpec(LayerQuant(), (("*.k_proj", FLOAT), ("layers.1.mlp.*", FLOAT))),
    "float inputs": QuantSpec(LayerQuant(activation_bits=None)),
    "mixed inputs": QuantSpec(LayerQuant(), (("*.v_proj", LayerQuant(activation_bits=None)),)),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("norms", [Norms.pre_sub, Norms.pre])
def test_a_decoder_gives_the_same_logits(backend: Backend, kind: str, norms: Norms) -> None:
    spec = SPECS[kind]
    cfg = DecoderConfig(
        hidden=40, layers=2, heads=4, kv_heads=2, ffn=56, context=32, vocab=50, norms=norms, activation=Activation.silu
    )
    trained = build_decoder(cfg, spec, NormalInit(std=0.2), 0)
    layers = quantised_layers(cfg, spec)
    tensors = {name: p.detach() for name, p in trained.named_parameters()}
    codes = {name: quantise_weight(tensors[f"{name}.weight"], layer) for name, layer in layers.items()}
    model = assemble_decoder(cfg, spec, codes, tensors, backend)
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        whole, single = model(ids), model(ids[:1, :1])
        before = sum(b.nbytes for b in model.buffers())
        pack_kept_codes(model)
        pack_kept_codes(model)  # once is enough
        assert torch.equal(model(ids), whole)
        assert torch.equal(model(ids[:1, :1]), single)
    after = sum(b.nbytes for b in model.buffers())
    assert (after < before) == (kind not in ("float inputs",))
    for name, wanted in codes.items():
        layer = model.get_submodule(name)
        found = layer.quantised()  # type: ignore[operator]
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scale, wanted.scale)


def test_a_model_in_training_is_not_packed() -> None:
    trained = build_decoder(
        DecoderConfig(hidden=32, layers=1, heads=2, kv_heads=2, ffn=32, vocab=9), QuantSpec(), NormalInit(), 0
    )
    pack_kept_codes(trained)
    assert all(b.dtype is not torch.uint8 for b in trained.buffers())
