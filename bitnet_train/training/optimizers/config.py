"""Update rules and their peak rates: the ``optimizer`` part of the configuration."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec

from omegaconf import MISSING

from bitnet_train.errors import ConfigError
from bitnet_train.nn.layout import ParameterInfo
from bitnet_train.training.optimizers.factors import block_number, matches


@dataclass
class GroupConfig:
    """Rates of the parameters that a pattern finds."""

    # Which parameters: a pattern of their names ("layers.0.*", "embed_tokens.weight") or of their layers' ("*.o_proj").
    pattern: str = MISSING
    # Factor of the learning rate; 0 keeps the weights as they are.
    lr: float = 1.0
    # Factor of the weight decay; norms and biases have none, whatever stands here.
    weight_decay: float = 1.0


@dataclass
class OptimizerConfig:
    """Base of the optimizers; every subclass is an option of the ``optimizer`` group."""

    name: str = MISSING
    # Peak learning rate; the schedule is a factor of it.
    lr: float = 1e-3
    # Peak decoupled weight decay of matrices and embeddings (not of norms and biases); schedules are factors of it.
    weight_decay: float = 0.1
    # Rates of single layers or kinds of parameters; of several patterns that find a parameter, the last wins.
    groups: list[GroupConfig] = field(default_factory=list)
    # Factor of the learning rate from one block to the one below, for fine-tuning (arXiv 2003.10555, 2106.08254). Of n
    # blocks the last has 1 and the first this to the power n - 1; the embedding, even where it is the head, has this to
    # the power n; the final norm and a head of its own have 1. Multiplies what groups say. 1 is off.
    layer_lr_decay: float = 1.0


@dataclass
class AdamWConfig(OptimizerConfig):
    name: str = "adamw"
    # Decay rates of the first and second moment.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # Added to the root of the second moment.
    eps: float = 1e-8


@dataclass
class AdamW8bitConfig(AdamWConfig):
    """AdamW whose moments take 8 bits: 2 bytes per parameter instead of 8 (torchao; arXiv 2110.02861)."""

    name: str = "adamw_8bit"
    # Numbers of a moment that share a scale. Parameters of fewer than 4096 numbers, or of no multiple of this, keep
    # float32 moments.
    block_size: int = 256


class AdjustLr(Enum):
    """How Muon's rate depends on the shape of a matrix (torch.optim.Muon's adjust_lr_fn)."""

    original = "original"
    match_rms_adamw = "match_rms_adamw"


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for the matrices of the blocks, AdamW for the embedding, the head, norms and biases (arXiv 2502.16982)."""

    name: str = "muon"
    # Factor of optimizer.lr for AdamW's part: 1 fits match_rms_adamw; with original and a peak of 0.02, some 0.015.
    adamw_lr: float = 1.0
    # Decay rate of the gradients' running mean, which is orthogonalised.
    momentum: float = 0.95
    # Look one step ahead, as Nesterov's momentum.
    nesterov: bool = True
    # Newton-Schulz iterations of the orthogonalisation.
    ns_steps: int = 5
    # For a matrix of (out, in): match_rms_adamw multiplies the rate by 0.2 sqrt(max(out, in)), so that updates are as
    # large as AdamW's and its peak fits (arXiv 2502.16982); original by sqrt(max(1, out / in)) (K. Jordan).
    adjust_lr_fn: AdjustLr = AdjustLr.match_rms_adamw
    # AdamW's decay rates of the first and second moment.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # AdamW's addition to the root of the second moment.
    eps: float = 1e-8


OPTIMIZER_CONFIGS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "adamw_8bit": AdamW8bitConfig,
    "muon": MuonConfig,
}


def check_optimizer(cfg: OptimizerConfig, parameters: Iterable[ParameterInfo]) -> None:
    """Raises ConfigError for values that no optimizer takes, and for groups that no parameter belongs to."""
    if not 0 < cfg.lr < math.inf:
        raise ConfigError(f"optimizer.lr must be positive, it is {cfg.lr:g}.")
    if not 0 <= cfg.weight_decay < math.inf:
        raise ConfigError(f"optimizer.weight_decay cannot be negative, it is {cfg.weight_decay:g}.")
    if not 0 < cfg.layer_lr_decay <= 1:
        raise ConfigError(
            f"optimizer.layer_lr_decay is {cfg.layer_lr_decay:g}; it is a factor above 0 and at most 1, which is off."
        )
    parameters = list(parameters)
    _check_groups(cfg.groups, parameters)
    if isinstance(cfg, AdamWConfig | MuonConfig) and (
        len(cfg.betas) != 2 or not all(0 <= b < 1 for b in cfg.betas) or not 0 < cfg.eps < math.inf
    ):
        raise ConfigError(
            f"optimizer.betas must be two numbers in [0, 1) and eps positive, they are {cfg.betas} and {cfg.eps:g}."
        )
    if isinstance(cfg, AdamW8bitConfig):
        if cfg.block_size < 1:
            raise ConfigError(f"optimizer.block_size is {cfg.block_size}; it must be at least 1.")
        if find_spec("torchao") is None:
            raise ConfigError('optimizer=adamw_8bit is torchao\'s: install it with pip install "bitnet-train[lowbit]".')
    if isinstance(cfg, MuonConfig):
        _check_muon(cfg)
        if not any(block_number(p.name) is not None and len(p.shape) == 2 for p in parameters):
            raise ConfigError("optimizer=muon is for the matrices of blocks, and this model has none: use adamw.")


def _check_muon(cfg: MuonConfig) -> None:
    if not 0 < cfg.adamw_lr < math.inf:
        raise ConfigError(f"optimizer.adamw_lr must be positive, it is {cfg.adamw_lr:g}: a factor of optimizer.lr.")
    if not 0 <= cfg.momentum < 1:
        raise ConfigError(f"optimizer.momentum must be in [0, 1), it is {cfg.momentum:g}.")
    if cfg.nesterov and cfg.momentum == 0:
        raise ConfigError("optimizer.nesterov has no effect with optimizer.momentum=0: set optimizer.nesterov=false.")
    if not 1 <= cfg.ns_steps < 100:
        raise ConfigError(f"optimizer.ns_steps must be from 1 to 99, it is {cfg.ns_steps}.")


def _check_groups(groups: list[GroupConfig], parameters: list[ParameterInfo]) -> None:
    for number, group in enumerate(groups):
        key = f"optimizer.groups[{number}]"
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(group, name) < math.inf:
                raise ConfigError(f"{key}.{name} is {getattr(group, name):g}; it is a factor and cannot be negative.")
        found = [p for p in parameters if matches(group.pattern, p.name)]
        if not found:
            raise ConfigError(
                f"{key}: the pattern '{group.pattern}' matches no parameter; names look like "
                f"'{_example(parameters)}' and '{parameters[0].name}'."
            )
        if group.weight_decay != 1 and all(len(p.shape) < 2 for p in found):
            raise ConfigError(
                f"{key}.weight_decay has no effect: '{group.pattern}' matches norms and biases only, which have none."
            )
        if not any(_last(groups, p) is group for p in found):
            raise ConfigError(
                f"{key}: later patterns match all that '{group.pattern}' matches: move it down or remove it."
            )


def _example(parameters: list[ParameterInfo]) -> str:
    names = [p.name for p in parameters if block_number(p.name) is not None and len(p.shape) == 2]
    return next((name for name in names if name.endswith("o_proj.weight")), (names or [parameters[-1].name])[0])


def _last(groups: list[GroupConfig], parameter: ParameterInfo) -> GroupConfig | None:
    return next((group for group in reversed(groups) if matches(group.pattern, parameter.name)), None)
