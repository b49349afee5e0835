"""Blocks that are computed again in the backward pass give the same losses and gradients, bit for bit."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet_train.kernels.backend import BACKENDS, Backend
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import ActivationCheckpointing, DecoderConfig, NormalInit, Norms
from bitnet_train.nn.decoder import Block
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.recompute import ATTENTION, kept
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.training.losses.cross_entropy import linear_cross_entropy

SHAPE = DecoderConfig(vocab=61, hidden=32, layers=3, heads=2, kv_heads=1, ffn=48, context=16)
AGAIN = [ActivationCheckpointing.selective, ActivationCheckpointing.full]


def gradients(
    shape: DecoderConfig, spec: QuantSpec, what: ActivationCheckpointing, bf16: bool, backend: Backend | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    model = build_decoder(shape, spec, NormalInit(std=0.1), 3, backend)
    model.checkpoint_activations(what)
    CodeCache(model)
    ids = torch.arange(2 * 17).reshape(2, 17) * 7 % 61
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = linear_cross_entropy(model.hidden_states(ids[:, :-1]), model.head_weight, ids[:, 1:])
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("norms", [Norms.pre_sub, Norms.inside])
@pytest.mark.parametrize("quant", [LayerQuant(), FLOAT, LayerQuant(activation_bits=None)])
@pytest.mark.parametrize("what", AGAIN)
def test_losses_and_gradients_are_the_same_bit_for_bit(
    quant: LayerQuant, norms: Norms, bf16: bool, what: ActivationCheckpointing
) -> None:
    shape = DecoderConfig(**{**vars(SHAPE), "norms": norms})
    loss, wanted = gradients(shape, QuantSpec(quant), ActivationCheckpointing.none, bf16)
    again, found = gradients(shape, QuantSpec(quant), what, bf16)
    assert torch.equal(loss, again)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_blocks_are_computed_twice_in_training_and_once_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compute = Block._compute

    def count(self: Block, *arguments: object) -> tuple[Tensor, Tensor]:
        calls.append(self)
        return compute(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Block, "_compute", count)
    gradients(SHAPE, QuantSpec(), ActivationCheckpointing.full, False)
    assert len(calls) == 2 * SHAPE.layers
    model = build_decoder(SHAPE, QuantSpec(), NormalInit(), 3)
    model.checkpoint_activations(ActivationCheckpointing.full)
    calls.clear()
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert len(calls) == SHAPE.layers


class Counted(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.name().partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))


def test_selective_computes_wide_products_again_and_neither_attention_nor_the_codes_of_the_stream() -> None:
    cpu = torch.device("cpu")
    if BACKENDS["avx512"].unsupported(cpu):
        pytest.skip("this machine has no AVX-512")
    counts = {}
    for what in ActivationCheckpointing:
        with Counted() as counts[what]:
            gradients(SHAPE, QuantSpec(), what, True, BACKENDS["avx512"])
    none, selective, full = (counts[what].names for what in ActivationCheckpointing)
    blocks, attention = SHAPE.layers, "_scaled_dot_product_flash_attention_for_cpu"
    products, quantisers = "avx512_matmul", "avx512_quantise"
    assert (none[products], none[attention]) == (4 * blocks, blocks)
    # Computed again: q/k/v, o, gate and up. The down projection is narrow.
    assert (selective[products], selective[attention]) == (7 * blocks, blocks)
    assert full[attention] == 2 * blocks
    # Without a residual to add: the first block's input, and those of o and down, which are inside a sub-layer.
    assert selective[quantisers] - none[quantisers] == 2 * blocks + 1


@pytest.mark.parametrize("kind", ["avx512", "triton"])
def test_what_selective_keeps(kind: str) -> None:
    x, narrow, wide = torch.zeros(5, 8), torch.zeros(4, 8), torch.zeros(9, 8)
    assert kept(f"bitnet_train::{kind}_quantise", (x, x, None, 0.0))
    assert not kept(f"bitnet_train::{kind}_quantise", (x, None, None, 0.0))
    assert kept(f"bitnet_train::{kind}_matmul", (x, x, narrow, None, None, torch.float32))
    assert not kept(f"bitnet_train::{kind}_matmul", (x, x, wide, None, None, torch.float32))
    assert kept("aten::mm", (x, narrow.t()))
    assert not kept("aten::addmm", (torch.zeros(9), x, wide.t()))
    assert not kept("aten::mul", (x, x))


def test_attention_on_a_gpu_is_kept_by_its_names_in_torch() -> None:
    assert all(hasattr(torch.ops.aten, name.partition("::")[2]) for name in ATTENTION)


@pytest.mark.slow
@pytest.mark.parametrize("what", AGAIN)
def test_compiled_blocks_give_the_gradients_of_eager_ones(what: ActivationCheckpointing) -> None:
    ids = torch.arange(2 * 17).reshape(2, 17) * 7 % 61
    found = []
    for compiled in (False, True):
        model = build_decoder(SHAPE, QuantSpec(), NormalInit(std=0.1), 3)
        model.checkpoint_activations(what)
        CodeCache(model)
        states = torch.compile(model.hidden_states) if compiled else model.hidden_states
        linear_cross_entropy(states(ids[:, :-1]), model.head_weight, ids[:, 1:]).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-2, atol=1e-5) for name in found[0])
