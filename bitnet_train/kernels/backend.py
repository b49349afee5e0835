"""The interface that every backend of the quantise-matmul op fills, the registry, and the choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.kernels.config import unknown_backend
from bitnet_train.quant.activations import TokenCodes
from bitnet_train.quant.packing import unpack_quarters
from bitnet_train.quant.spec import LayerQuant
from bitnet_train.quant.weights import Codes


class Quantised(NamedTuple):
    """What the input quantiser returns: codes, the stream that was normed and quantised (M, K), the norm's 1/rms."""

    codes: TokenCodes
    stream: Tensor
    rstd: Tensor | None


class WeightCodes(NamedTuple):
    """Weights as a matmul wants them: codes int8 (N, K), a float32 scale per row (N,), and the codes once more in the
    layout of the backward (see :meth:`Backend.backward_layout`), or None. ``largest`` is the largest magnitude that a
    code may have.

    In a model that is only read from, codes may be packed four to a byte, uint8 (N, ceil(K / 4)), by
    :func:`bitnet_train.quant.packing.pack_quarters`.
    """

    codes: Tensor
    row_scale: Tensor
    backward: Tensor | None = None
    largest: int = 1

    @property
    def packed(self) -> bool:
        """Whether the codes are packed."""
        return self.codes.dtype is torch.uint8

    def unpacked(self, columns: int) -> "WeightCodes":
        """The same with codes int8 (N, ``columns``)."""
        return self._replace(codes=unpack_quarters(self.codes, columns)) if self.packed else self


class Backend(Protocol):
    """The pieces of arithmetic. ``M`` tokens, ``K`` inputs, ``N`` outputs; codes are int8, scales float32.

    The codes and ``matmul`` are the same bit for bit in every backend, given the same input; so are the codes that
    low-precision gradients are rounded to. Everything else agrees within the rounding of its type.
    """

    name: str
    device_types: tuple[str, ...] | None  # that it is written for; None for any

    def unsupported(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device``, or None when it can."""

    def quantise_weight(
        self,
        weight: Tensor,
        layer: LayerQuant,
        codes: Tensor | None = None,
        backward: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Codes:
        """Codes and scale of a master weight (N, K); written into ``codes`` and ``backward`` when they are given.

        ``backward`` is this layer's part of a :meth:`backward_layout` buffer, ``scale`` (groups,) a learned one.
        """

    def backward_layout(self, codes_w: Tensor, dx: str) -> Tensor | None:
        """The codes (N, K) in the layout that ``grad_input`` reads at precision ``dx``, or None when it takes them as
        they are. Column ``n`` of the result is row ``n`` of the codes, so stacked layers are neighbouring columns."""

    def quantise(self, x: Tensor, delta: Tensor | None, norm_weight: Tensor | None, eps: float) -> Quantised:
        """``x + delta`` (M, K) in the type of x, through an RMSNorm unless ``norm_weight`` is None, to codes."""

    def matmul(self, x: TokenCodes, w: WeightCodes, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """``(codes_x @ codes_w.T) * scale_x * row_scale + bias`` -> (M, N), float32 rounded once to ``out_dtype``."""

    def grad_input(self, grads: Sequence[Tensor], w: WeightCodes, dx: str, out_dtype: torch.dtype) -> Tensor:
        """``(grad * row_scale) @ codes_w`` -> (M, K), with ``dx`` one of fp64, fp32, fp16, bf16, int8, fp8.

        ``grads`` (M, N_i), of one type, are those of the layers whose codes are stacked, ``grad`` is them side by side.
        """

    def grad_weight(self, grads: Sequence[Tensor], x: TokenCodes, dw: str) -> list[Tensor]:
        """``grad.T @ (codes_x * scale_x)`` -> (N_i, K) for each of ``grads`` (M, N_i), with ``dw`` one of fp64, fp32,
        fp16, bf16, int8."""

    def grad_norm(
        self, grad: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, grad_stream: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Backward of the RMSNorm, plus ``grad_stream`` that reaches the stream from elsewhere: the gradient of the
        stream (M, K) in its type and of the norm's weight (K,) in float32."""


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
            fastest = f"{'the fastest' if backend.device_types else 'no faster kernels are written'} for {device.type}"
            return BackendChoice(backend, "; ".join(passed_over) or fastest)
        if backend.device_types is None or device.type in backend.device_types:
            passed_over.append(f"{backend.name}: {obstacle}")
    raise ConfigError(f"no kernel backend can run on {device}: {'; '.join(passed_over)}.")
