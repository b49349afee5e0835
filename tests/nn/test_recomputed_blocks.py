"""Blocks that are computed again in the backward pass give the same losses and gradients, bit for bit."""

import pytest
import torch
from torch import Tensor

from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit, Norms
from bitnet_train.nn.decoder import Block
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.training.losses.cross_entropy import linear_cross_entropy

SHAPE = DecoderConfig(vocab=61, hidden=32, layers=3, heads=2, kv_heads=1, ffn=48, context=16)


def gradients(shape: DecoderConfig, spec: QuantSpec, recompute: bool, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = build_decoder(shape, spec, NormalInit(std=0.1), 3)
    model.checkpoint_activations(recompute)
    CodeCache(model)
    ids = torch.arange(2 * 17).reshape(2, 17) * 7 % 61
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = linear_cross_entropy(model.hidden_states(ids[:, :-1]), model.head_weight, ids[:, 1:])
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("norms", [Norms.pre_sub, Norms.inside])
@pytest.mark.parametrize("quant", [LayerQuant(), FLOAT, LayerQuant(activation_bits=None)])
def test_losses_and_gradients_are_the_same_bit_for_bit(quant: LayerQuant, norms: Norms, bf16: bool) -> None:
    shape = DecoderConfig(**{**vars(SHAPE), "norms": norms})
    loss, wanted = gradients(shape, QuantSpec(quant), False, bf16)
    again, found = gradients(shape, QuantSpec(quant), True, bf16)
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
    gradients(SHAPE, QuantSpec(), True, False)
    assert len(calls) == 2 * SHAPE.layers
    model = build_decoder(SHAPE, QuantSpec(), NormalInit(), 3)
    model.checkpoint_activations()
    calls.clear()
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert len(calls) == SHAPE.layers
