"""Optimizers and their parameter groups."""

from collections.abc import Callable

import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.training.optimizers.config import AdamWConfig, OptimizerConfig


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings with weight decay, norms and biases (one dimension) without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "decays": True},
        {"params": [p for p in parameters if p.dim() < 2], "decays": False, "weight_decay": 0.0},
    ]


def _adamw(cfg: AdamWConfig, model: nn.Module) -> torch.optim.Optimizer:
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(
        parameter_groups(model),
        lr=cfg.lr,
        betas=(cfg.betas[0], cfg.betas[1]),
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=fused,
    )


# Add an optimizer: a dataclass in training.config.OPTIMIZER_CONFIGS, and its builder here.
OPTIMIZERS: dict[type[OptimizerConfig], Callable[..., torch.optim.Optimizer]] = {AdamWConfig: _adamw}


def build_optimizer(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration over the parameters of ``model``, fused where the device has it."""
    if type(cfg) not in OPTIMIZERS:
        raise ConfigError(f"optimizer={cfg.name} has no entry in bitnet_train.training.optimizers.build.OPTIMIZERS")
    return OPTIMIZERS[type(cfg)](cfg, model)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Put the learning rate into every group and the weight decay into the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
