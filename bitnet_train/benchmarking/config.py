"""What ``command=benchmark`` measures: the ``benchmark`` part of the configuration. Nothing heavy is imported here."""

import re
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from bitnet_train.errors import ConfigError, did_you_mean

# What is compared, by the name that users type; the order is that of the tables.
BASELINES = {
    "ternary": "the recipe itself",
    "dense": "quant=none, everything else of the recipe",
    "dense_eager": "dense without torch.compile",
    "textbook_fp32_eager": "BitLinear as in BitNet's FAQ, float32, without torch.compile",
    "textbook_bf16_compiled": "BitLinear as in BitNet's FAQ, bf16 autocast, torch.compile",
    "torchao": "torchao bitnet_training() on the blocks' linear layers",
    "torchao_int8_mixed": "torchao int8_mixed_precision_training() (not ternary)",
    "torchao_float8": "torchao convert_to_float8_training() (not ternary)",
    "onebitllms": "onebitllms BitNetLinear",
    "fla": "fla FusedBitLinear",
}


class What(Enum):
    """Which benchmark: whole training steps, single layers, or both."""

    step = "step"
    layers = "layers"
    all = "all"


@dataclass
class VariantConfig:
    """The recipe with other settings, as one more contender."""

    # Its name in the tables.
    name: str = MISSING
    # Settings that differ from the recipe, for example [quant.gradient.dw=int8, clip=none].
    overrides: list[str] = field(default_factory=list)


@dataclass
class BenchmarkConfig:
    # step (a whole training step), layers (single layers), or all.
    what: What = What.step
    # Contenders by name (see the README of benchmarks/); null for all that can run here.
    baselines: list[str] | None = None
    # More contenders: the recipe with other settings.
    variants: list[VariantConfig] = field(default_factory=list)
    # Steps of every contender before anything is timed; the first one compiles.
    warmup: int = 3
    # Timed rounds; in each every contender runs once, in rotating order.
    rounds: int = 15
    # Whether the peak memory of every contender's step is measured, in a process of its own each.
    memory: bool = True
    # Whether the time of ternary and dense steps is told apart by kind of operation (in a process of its own each).
    profile: bool = False
    # Layers: [K, N] pairs (inputs, outputs) instead of the model's own.
    shapes: list[list[int]] | None = None
    # Layers: numbers of tokens; null for the recipe's micro-batch, on a GPU 4096, 8192, 16384 and 32768.
    tokens: list[int] | None = None


def check_benchmark(cfg: BenchmarkConfig) -> None:
    """Raises ConfigError for names that do not exist and numbers that measure nothing."""
    for name in ("warmup", "rounds"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"benchmark.{name} is {getattr(cfg, name)}; it must be at least 1.")
    if cfg.baselines is not None:
        _check_baselines(cfg.baselines)
    for variant in cfg.variants:
        if not re.fullmatch(r"[\w.+-]+", variant.name):
            raise ConfigError(
                f"benchmark.variants: the name '{variant.name}' may hold letters, digits and _ . + - only."
            )
        if not variant.overrides:
            raise ConfigError(
                f"benchmark.variants: {variant.name} has no overrides, so it would measure the recipe again: give "
                "overrides=[key=value]."
            )
    names = [*BASELINES, *(variant.name for variant in cfg.variants)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"benchmark.variants: the name {twice} is taken: choose another.")
    if cfg.shapes is not None and (not cfg.shapes or any(len(s) != 2 or min(s) < 1 for s in cfg.shapes)):
        raise ConfigError(
            f"benchmark.shapes={cfg.shapes} must be [K, N] pairs of positive numbers (inputs, outputs), such as "
            "[[2560,6912]], or null for the model's own."
        )
    if cfg.tokens is not None and (not cfg.tokens or min(cfg.tokens) < 1):
        raise ConfigError(
            f"benchmark.tokens={cfg.tokens} must be positive numbers, such as [4096,8192], or null for the default."
        )


def _check_baselines(names: list[str]) -> None:
    if not names:
        raise ConfigError(f"benchmark.baselines is empty: choose among {', '.join(BASELINES)}, or null for all.")
    for name in names:
        if name not in BASELINES:
            raise ConfigError(
                f"benchmark.baselines: '{name}' does not exist; choose among {', '.join(BASELINES)}."
                f"{did_you_mean(name, BASELINES)}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"benchmark.baselines names {name} twice.")
