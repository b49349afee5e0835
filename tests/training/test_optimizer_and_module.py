"""The optimizer's groups, the rates of each step, accumulation, and what compiling must not change."""

import copy
from typing import Any

import pytest
import torch

from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.quant.weights import quantise_weight
from bitnet_train.training.callbacks.samples import HEADING, cut_samples
from bitnet_train.training.config import RunConfig, TrainerConfig, batch_plan
from bitnet_train.training.losses.cross_entropy import linear_cross_entropy
from bitnet_train.training.module import PretrainingModule
from bitnet_train.training.optimizers.build import build_optimizer, set_rates
from bitnet_train.training.optimizers.config import AdamWConfig

CFG = DecoderConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=64, context=64, vocab=97)


def small_decoder() -> Any:
    return build_decoder(CFG, QuantSpec(), NormalInit(), 3)


def test_matrices_decay_and_norms_do_not() -> None:
    model = small_decoder()
    optimizer = build_optimizer(AdamWConfig(lr=1e-3, weight_decay=0.3), model)
    set_rates(optimizer, 2e-3, 0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decays) == set(names.values())
    assert all(decay == (0.0 if "norm" in name else 0.2) for name, decay in decays.items())
    assert all(group["lr"] == 2e-3 for group in optimizer.param_groups)


def test_the_fused_optimizer_updates_the_codes() -> None:
    model = small_decoder()
    optimizer = build_optimizer(AdamWConfig(lr=0.05), model)
    assert optimizer.defaults["fused"]
    CodeCache(model, optimizer)
    layer = model.layers[0].self_attn.q_proj
    before = layer.codes.clone()
    loss_of(model, torch.arange(21)[None]).backward()
    optimizer.step()
    assert not torch.equal(layer.codes, before)
    assert torch.equal(layer.codes, quantise_weight(layer.weight, layer.quant).codes)


def loss_of(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(model.hidden_states(ids[:, :-1]), model.head_weight, ids[:, 1:])


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model = small_decoder()
    twin = copy.deepcopy(model)
    ids = torch.randint(0, 97, (4, 17), generator=torch.Generator().manual_seed(0))
    loss_of(model, ids).backward()
    for part in ids.split(1):
        (loss_of(twin, part) / 4).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("micro", "accumulation"), [(None, 1), (16, 1), (4, 4), (1, 16)])
def test_tokens_are_cut_into_micro_batches(micro: int | None, accumulation: int) -> None:
    plan = batch_plan(TrainerConfig(batch_tokens=4096, micro_batch=micro), 256)
    assert (plan.batch_sequences, plan.micro_batch, plan.accumulation) == (16, micro or 16, accumulation)


def test_compiled_and_eager_modules_agree() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 97, (2, 33))
    cfg = RunConfig(model=CFG)
    gradients = []
    for compiled in (False, True):
        decoder = small_decoder()
        CodeCache(decoder)
        module = PretrainingModule(cfg, decoder, 0, compiled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module.training_step(ids, 0)
        loss.backward()
        gradients.append((loss.detach(), torch.cat([p.grad.flatten() for p in decoder.parameters()])))
    (eager_loss, eager), (compiled_loss, compiled_grad) = gradients
    torch.testing.assert_close(compiled_loss, eager_loss, rtol=2e-3, atol=0)
    assert torch.nn.functional.cosine_similarity(eager, compiled_grad, dim=0) > 0.98


def test_samples_past_the_step_are_cut(tmp_path: Any) -> None:
    path = tmp_path / "samples.md"
    path.write_text("".join(f"{HEADING}{step}\n\n````text\n## Step by step\n````\n\n" for step in (5, 10, 15)))
    whole = path.read_text()
    cut_samples(path, 15)
    assert path.read_text() == whole
    cut_samples(path, 10)
    assert path.read_text() == whole[: whole.index(f"{HEADING}15")]
