"""Which implementation computes the ternary arithmetic: the ``kernels`` part of the configuration."""

from dataclasses import dataclass


@dataclass
class KernelConfig:
    # "auto" takes the fastest backend for the device; or the name of one: reference (plain PyTorch), cpu (int8 matmul).
    backend: str = "auto"
