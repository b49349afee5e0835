"""What ``command=estimate`` reckons beside the recipe: GPUs that it might run on."""

from dataclasses import dataclass
from enum import Enum

from bitnet_train.errors import ConfigError


class GpuKind(Enum):
    """GPUs whose published figures are known (``planning/gpus.py``)."""

    a100 = "a100"
    h100 = "h100"
    h200 = "h200"


@dataclass
class EstimateConfig:
    # Numbers of GPUs to reckon a plan for, on paper, such as [8,64,1024]; null for none.
    gpus: list[int] | None = None
    # Which GPU: a100 (80 GB), h100 or h200, the SXM modules of NVIDIA's DGX systems.
    gpu: GpuKind = GpuKind.h100
    # GPUs of a node, which NVLink joins; between nodes every GPU has a network card of its own.
    gpus_per_node: int = 8
    # Share of the published rate that large matmuls are assumed to reach.
    matmul_share: float = 0.6
    # Share of the published memory bandwidth that is assumed to be reached.
    memory_share: float = 0.8
    # Share of the published bandwidth that NVLink and the network are assumed to reach.
    network_share: float = 0.8


def check_estimate(cfg: EstimateConfig, on_images: bool) -> None:
    """Raises ConfigError for a plan that cannot be reckoned."""
    if cfg.gpus is not None and (not cfg.gpus or min(cfg.gpus) < 1 or max(cfg.gpus) > 10**6):
        raise ConfigError(
            f"estimate.gpus={cfg.gpus} must be numbers of GPUs from 1 to a million, such as [8,64,1024], or null."
        )
    if cfg.gpus is not None and on_images:
        raise ConfigError("estimate.gpus plans language models only: leave it out for image classifiers.")
    if not 1 <= cfg.gpus_per_node <= 1024:
        raise ConfigError(f"estimate.gpus_per_node is {cfg.gpus_per_node}; it must be from 1 to 1024.")
    for name in ("matmul_share", "memory_share", "network_share"):
        if not 0 < getattr(cfg, name) <= 1:
            raise ConfigError(f"estimate.{name} is {getattr(cfg, name)}; it must be above 0 and at most 1.")
