"""Which implementation computes the ternary arithmetic: the ``kernels`` part of the configuration."""

from collections.abc import Iterable
from dataclasses import dataclass

from bitnet_train.errors import ConfigError, did_you_mean

# Names of the registered backends, so that a typo is answered before torch is loaded.
BACKEND_NAMES = ("reference", "cpu", "avx512", "triton")


@dataclass
class KernelConfig:
    # "auto" takes the fastest backend for the device; or the name of one: reference (plain PyTorch), cpu (oneDNN
    # int8 matmuls), avx512 (own int8 matmuls, compiled on first use), triton
    # (fused kernels for NVIDIA GPUs).
    backend: str = "auto"


def unknown_backend(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a backend that does not exist."""
    known = ("auto", *known)
    return ConfigError(
        f"kernels.backend={name} does not exist; choose one of {', '.join(known)}.{did_you_mean(name, known)}"
    )


def check_kernels(cfg: KernelConfig) -> None:
    """Raises ConfigError for a backend that does not exist."""
    if cfg.backend != "auto" and cfg.backend not in BACKEND_NAMES:
        raise unknown_backend(cfg.backend, BACKEND_NAMES)
