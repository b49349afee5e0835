"""The interface that every backend of the quantise-matmul op fills, the registry, and the choice."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.kernels.config import unknown_backend
from bitnet_train.quant.activations import TokenCodes


class Backend(Protocol):
    """Five pieces of arithmetic. ``M`` tokens, ``K`` inputs, ``N`` outputs; codes are int8, scales float32.

    The results of ``quantise`` and ``matmul`` are the same bit for bit in every backend; gradients agree within the
    rounding of the type they are computed in.
    """

    name: str

    def unsupported(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device``, or None when it can."""

    def quantise(self, x: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[TokenCodes, Tensor | None]:
        """x (M, K), through an RMSNorm unless ``norm_weight`` is None, to codes; also the norm's 1/rms (M, 1)."""

    def matmul(self, x: TokenCodes, codes_w: Tensor, row_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """``(codes_x @ codes_w.T) * scale_x * row_scale`` -> (M, N) in ``out_dtype``."""

    def grad_input(self, grad: Tensor, codes_w: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """``(grad * row_scale) @ codes_w`` -> (M, K), multiplied in ``dtype``."""

    def grad_weight(self, grad: Tensor, x: TokenCodes, dtype: torch.dtype) -> Tensor:
        """``grad.T @ (codes_x * scale_x)`` -> (N, K), multiplied in ``dtype``."""

    def grad_norm(self, grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Backward of the RMSNorm: gradients of x (M, K) in float32 and of the norm's weight (K,)."""


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Makes a backend selectable by name; the automatic choice prefers the one registered last."""
    BACKENDS[backend.name] = backend


@dataclass(frozen=True)
class BackendChoice:
    """A chosen backend and the sentence that says why."""

    backend: Backend
    reason: str


def choose_backend(device: torch.device | str, wanted: str = "auto") -> BackendChoice:
    """The backend for ``device``: ``wanted`` by name, or with "auto" the last registered one that supports it.

    Raises ConfigError for an unknown name and for a backend that cannot run on the device.
    """
    device = torch.device(device)
    if wanted != "auto":
        if wanted not in BACKENDS:
            raise unknown_backend(wanted, BACKENDS)
        obstacle = BACKENDS[wanted].unsupported(device)
        if obstacle:
            raise ConfigError(f"kernels.backend={wanted} cannot run here: {obstacle}. Use kernels.backend=auto.")
        return BackendChoice(BACKENDS[wanted], "chosen in the config (kernels.backend)")
    passed_over: list[str] = []
    for backend in reversed(BACKENDS.values()):
        obstacle = backend.unsupported(device)
        if obstacle is None:
            because = "; ".join(passed_over) or f"the fastest for {device.type}"
            return BackendChoice(backend, because)
        passed_over.append(f"{backend.name}: {obstacle}")
    raise ConfigError(f"no kernel backend can run on {device}: {'; '.join(passed_over)}.")
