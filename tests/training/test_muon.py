"""Muon and AdamW as one optimizer: equal to both run by hand, hooks, state dicts, copies and forks."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.quant.weights import quantise_weight
from bitnet_train.training.config import RunConfig
from bitnet_train.training.micro_batch import optimizer_bytes
from bitnet_train.training.optimizers.build import build_optimizer, set_rates
from bitnet_train.training.optimizers.config import AdamWConfig, AdjustLr, GroupConfig, MuonConfig, OptimizerConfig
from bitnet_train.training.optimizers.joined import JoinedOptimizer

CFG = DecoderConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=64, context=64, vocab=97)
SETTINGS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 4, "adamw_lr": 0.3}


def small() -> Any:
    return build_decoder(CFG, QuantSpec(), NormalInit(), 3)


def take_gradients(model: Any, step: int) -> None:
    model.zero_grad()
    ids = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(step))
    model(ids).square().mean().backward()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        take_gradients(model, step)
        set_rates(optimizer, 0.02 / (step + 1), 0.1 * (step % 2))
        optimizer.step()


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def through_a_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", AdjustLr)
def test_it_is_torchs_muon_and_adamw_run_by_hand(adjust: AdjustLr, nesterov: bool) -> None:
    model, twin = small(), small()
    train(model, build_optimizer(MuonConfig(**SETTINGS, adjust_lr_fn=adjust, nesterov=nesterov), model), range(4))
    blocks = [p for n, p in twin.named_parameters() if n.startswith("layers.") and p.dim() == 2]
    table = [twin.embed_tokens.weight]
    norms = [p for p in twin.parameters() if p.dim() == 1]
    muon = torch.optim.Muon(blocks, momentum=0.9, nesterov=nesterov, ns_steps=4, adjust_lr_fn=adjust.value)
    adamw = torch.optim.AdamW([{"params": table}, {"params": norms}], betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(4):
        take_gradients(twin, step)
        lr, decay = 0.02 / (step + 1), 0.1 * (step % 2)
        muon.param_groups[0] |= {"lr": lr, "weight_decay": decay}
        for group, wd in zip(adamw.param_groups, (decay, 0.0), strict=True):
            group |= {"lr": 0.3 * lr, "weight_decay": wd}
        muon.step()
        adamw.step()
    assert torch.equal(weights(model), weights(twin))


def test_hooks_run_once_and_the_codes_follow() -> None:
    model = small()
    optimizer = build_optimizer(MuonConfig(lr=0.05), model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    CodeCache(model, optimizer)
    layer = model.layers[0].self_attn.q_proj
    before = layer.codes.clone()
    take_gradients(model, 0)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert calls == ["before", "after"]
    assert not torch.equal(layer.codes, before)
    assert torch.equal(layer.codes, quantise_weight(layer.weight, layer.quant).codes)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cfg", [MuonConfig(**SETTINGS), AdamWConfig(lr=0.02)], ids=lambda cfg: cfg.name)
def test_a_saved_state_goes_on_bit_for_bit(cfg: OptimizerConfig) -> None:
    cfg.groups = [GroupConfig("layers.0.*", lr=0.5)]
    whole, first = small(), small()
    train(whole, build_optimizer(cfg, whole), range(6))
    optimizer = build_optimizer(cfg, first)
    train(first, optimizer, range(3))
    saved, then = through_a_file(optimizer.state_dict()), small()
    then.load_state_dict(first.state_dict())
    resumed = build_optimizer(cfg, then)
    resumed.load_state_dict(saved)
    train(then, resumed, range(3, 6))
    assert torch.equal(weights(then), weights(whole))
    assert sum(len(s) for s in resumed.state.values()) == sum(len(s) for s in optimizer.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_whole_and_its_own(copied: Any) -> None:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(5, 4), "layers": torch.nn.ModuleList([torch.nn.Linear(4, 4)])}
    )
    optimizer = build_optimizer(MuonConfig(), model)

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model["layers"][0](model["embed"].weight).square().sum().backward()
        optimizer.step()

    step(model, optimizer)
    twin, twins = copied((model, optimizer))
    assert isinstance(twins, JoinedOptimizer)
    step(model, optimizer)
    assert not torch.equal(weights(model), weights(twin))
    step(twin, twins)
    assert torch.equal(weights(model), weights(twin))


def test_a_group_may_be_added_to_a_part() -> None:
    model = small()
    optimizer = build_optimizer(MuonConfig(lr=0.02), model)
    extra = torch.nn.Parameter(torch.ones(4, 4))
    group = {"params": [("extra", extra)], "lr_factor": 1.0, "weight_decay_factor": 0.0}
    with pytest.raises(ValueError, match="must be one of muon, adamw"):
        optimizer.add_param_group(dict(group))
    optimizer.add_param_group({**group, "algorithm": "muon", "weight_decay": 0.0})
    extra.grad = torch.eye(4)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[extra]
    assert not torch.equal(extra, torch.ones(4, 4))


def test_a_fork_keeps_its_own_settings_and_the_past_of_what_is_trained_alike() -> None:
    model = small()
    adamw = build_optimizer(AdamWConfig(lr=0.02, betas=[0.9, 0.95]), model)
    train(model, adamw, range(2))
    saved = through_a_file(adamw.state_dict())
    names = {p: name for name, p in model.named_parameters()}
    other = build_optimizer(AdamWConfig(lr=0.02, betas=[0.8, 0.9], groups=[GroupConfig("layers.1.*", 0.1)]), model)
    other.load_state_dict(saved)
    assert all(group["betas"] == (0.8, 0.9) for group in other.param_groups)
    assert {group["lr_factor"] for group in other.param_groups} == {0.1, 1.0}
    for p in model.parameters():
        assert torch.equal(other.state[p]["exp_avg"], adamw.state[p]["exp_avg"]), names[p]
    muon = build_optimizer(MuonConfig(), model)
    with pytest.warns(UserWarning, match=r"14 parameters, layers.0.self_attn.q_proj.weight the first"):
        muon.load_state_dict(saved)
    kept = {names[p] for p, state in muon.state.items() if state}
    assert kept == {n for n, p in model.named_parameters() if p.dim() == 1 or n == "embed_tokens.weight"}
    train(model, muon, range(2, 4))
    assert torch.isfinite(weights(model)).all()


def test_states_without_names_are_taken_by_place_or_refused() -> None:
    model = small()
    optimizer = build_optimizer(AdamWConfig(), model)
    train(model, optimizer, range(1))
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        for key in ("param_names", "lr_factor", "weight_decay_factor", "algorithm"):
            del group[key]
    again = build_optimizer(AdamWConfig(), model)
    again.load_state_dict(old)
    for p in model.parameters():
        assert torch.equal(again.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
    assert [group["lr_factor"] for group in again.param_groups] == [1.0, 1.0]
    with pytest.raises(ConfigError, match="restore the optimizer's settings"):
        build_optimizer(AdamWConfig(layer_lr_decay=0.5), model).load_state_dict(old)


@pytest.mark.parametrize("cfg", [MuonConfig(), AdamWConfig()], ids=lambda cfg: cfg.name)
def test_the_state_is_known_before_it_exists(cfg: OptimizerConfig) -> None:
    model = small()
    optimizer = build_optimizer(cfg, model)
    train(model, optimizer, range(1))
    real = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert optimizer_bytes(RunConfig(model=CFG, optimizer=cfg)) == real
