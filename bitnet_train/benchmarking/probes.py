"""What this device can do at most, measured in about a second: matmul rates by type, and memory bandwidth."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_train.kernels.backend import Backend, WeightCodes
from bitnet_train.planning.roofline import DeviceRates
from bitnet_train.quant.activations import TokenCodes

# (M, K, N) of the matmuls, and bytes of the copies: the largest rate of a few sizes counts.
SIZES = {
    "cpu": ((1024, 512, 1024), (2048, 512, 1536), (1024, 1024, 2048)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192)),
}
COPIES = {"cpu": (64 * 2**20, 256 * 2**20), "cuda": (2**28, 2**30)}
# Seconds per probe; at least three runs, so that the first, slow one cannot be all.
BUDGET = 0.06


def measure_rates(device: torch.device, backend: Backend) -> DeviceRates:
    """The largest rates seen. int8 is the faster of ``torch._int_mm`` and the backend's own kernel; fp8 counts as int8
    on a GPU, where their tensor cores are equally fast, and as bf16 on a CPU, which multiplies fp8 no other way."""
    with torch.no_grad():
        fp32, bf16 = (_best_matmul(device, lambda a, b: a @ b, t) for t in (torch.float32, torch.bfloat16))
        int8 = max(_best_matmul(device, _int_mm, torch.int8), _best_matmul(device, _own(backend), torch.int8))
        bandwidth = max(_bandwidth(device, size) for size in COPIES[device.type])
    return DeviceRates(fp32, bf16, int8, int8 if device.type == "cuda" else bf16, bandwidth)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch._int_mm(a, b)


def _own(backend: Backend) -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        ones = torch.ones(a.shape[0], 1, device=a.device), torch.ones(b.shape[1], device=a.device)
        return backend.matmul(TokenCodes(a, ones[0]), WeightCodes(b.t(), ones[1]), None, torch.bfloat16)

    return product


def _best_matmul(device: torch.device, product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    best = 0.0
    for m, k, n in SIZES[device.type]:
        a = torch.randint(-1, 2, (m, k), device=device).to(dtype)
        # Transposed, as weights are.
        b = torch.randint(-1, 2, (n, k), device=device).to(dtype).t()
        try:
            best = max(best, 2.0 * m * k * n / _fastest(lambda a=a, b=b: product(a, b), device))  # type: ignore[misc]
        except RuntimeError:  # this device or this size has no such kernel
            continue
    if best == 0.0:
        raise RuntimeError(f"no {dtype} matmul runs on {device}")
    return best


def _bandwidth(device: torch.device, size: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < BUDGET:
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        seconds = time.perf_counter() - start
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
