"""Optimizers and their parameter groups."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.training.optimizers.config import AdamW8bitConfig, AdamWConfig, MuonConfig, OptimizerConfig
from bitnet_train.training.optimizers.eight_bit import build_adamw_8bit
from bitnet_train.training.optimizers.factors import block_number, depth_factor, matches
from bitnet_train.training.optimizers.joined import JoinedOptimizer
from bitnet_train.training.optimizers.restore import fit_saved_state

Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, cfg: OptimizerConfig) -> Groups:
    """Parameters that share their factors of the rates: matrices and embeddings first, then norms and biases.

    Each group holds its parameters by name, ``lr_factor`` (pattern times depth) and ``weight_decay_factor`` (0 for
    parameters of one dimension). ``algorithm`` is adamw.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = max((number + 1 for name, _ in named if (number := block_number(name)) is not None), default=0)
    groups: dict[tuple[bool, float, float], dict[str, Any]] = {}
    for name, parameter in named:
        lr, decay = 1.0, 1.0
        for group in cfg.groups:
            if matches(group.pattern, name):
                lr, decay = group.lr, group.weight_decay
        lr *= depth_factor(cfg.layer_lr_decay, name, blocks)
        flat = parameter.dim() < 2
        decay = 0.0 if flat else decay
        new = {"params": [], "lr_factor": lr, "weight_decay_factor": decay, "algorithm": "adamw"}
        groups.setdefault((flat, lr, decay), new)["params"].append((name, parameter))
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _adamw_of(groups: Groups, cfg: AdamWConfig | MuonConfig) -> torch.optim.Optimizer:
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for _, p in group["params"])
    return torch.optim.AdamW(
        groups,
        lr=cfg.lr,
        betas=(cfg.betas[0], cfg.betas[1]),
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=fused,
    )


def _adamw(cfg: AdamWConfig, model: nn.Module) -> torch.optim.Optimizer:
    return _adamw_of(parameter_groups(model, cfg), cfg)


def _adamw_8bit(cfg: AdamW8bitConfig, model: nn.Module) -> torch.optim.Optimizer:
    return build_adamw_8bit([{**group, "algorithm": cfg.name} for group in parameter_groups(model, cfg)], cfg)


def _muon(cfg: MuonConfig, model: nn.Module) -> torch.optim.Optimizer:
    matrices: Groups = []
    others: Groups = []
    for group in parameter_groups(model, cfg):
        inside = [(name, p) for name, p in group["params"] if p.dim() == 2 and block_number(name) is not None]
        outside = [(name, p) for name, p in group["params"] if p.dim() != 2 or block_number(name) is None]
        if inside:
            matrices.append({**group, "params": inside, "algorithm": "muon"})
        if outside:
            others.append({**group, "params": outside, "lr_factor": group["lr_factor"] * cfg.adamw_lr})
    muon = torch.optim.Muon(
        matrices,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        ns_steps=cfg.ns_steps,
        adjust_lr_fn=cfg.adjust_lr_fn.value,
    )
    return JoinedOptimizer({"muon": muon, "adamw": _adamw_of(others, cfg)})


# Add an optimizer: a dataclass in training.config.OPTIMIZER_CONFIGS, and its builder here.
OPTIMIZERS: dict[type[OptimizerConfig], Callable[..., torch.optim.Optimizer]] = {
    AdamWConfig: _adamw,
    AdamW8bitConfig: _adamw_8bit,
    MuonConfig: _muon,
}


def build_optimizer(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration over the parameters of ``model``, fused where the device has it.

    A state that is loaded into it keeps the groups and settings of ``cfg`` (:func:`fit_saved_state`).
    """
    if type(cfg) not in OPTIMIZERS:
        raise ConfigError(f"optimizer={cfg.name} has no entry in bitnet_train.training.optimizers.build.OPTIMIZERS")
    optimizer = OPTIMIZERS[type(cfg)](cfg, model)
    optimizer.register_load_state_dict_pre_hook(fit_saved_state)
    set_rates(optimizer, cfg.lr, cfg.weight_decay)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Put the learning rate and the weight decay, each times the group's factor, into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
        group["weight_decay"] = weight_decay * group["weight_decay_factor"]
