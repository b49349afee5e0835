"""Published rates of GPUs, for plans on paper. Peak figures, dense (NVIDIA prints those with sparsity, twice as
much).

* A100 80 GB SXM: NVIDIA A100 Tensor Core GPU data sheet (2021); one 200 Gb/s card per GPU: DGX A100 data sheet
* H100 SXM: NVIDIA H100 Tensor Core GPU data sheet (2023); one 400 Gb/s card per GPU: DGX H100 data sheet
* H200 SXM: NVIDIA H200 Tensor Core GPU data sheet (2024); DGX H200 data sheet
"""

from dataclasses import dataclass

from bitnet_train.planning.config import EstimateConfig, GpuKind
from bitnet_train.planning.roofline import DeviceRates


@dataclass(frozen=True)
class Gpu:
    """Operations per second, bytes and bytes per second; ``nvlink`` and ``network`` are of one GPU, one way."""

    name: str
    fp32: float
    bf16: float
    int8: float
    fp8: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float


GPUS = {
    # Without fp8 units; NVLink of 600 GB/s both ways together.
    GpuKind.a100: Gpu("A100 80GB SXM", 19.5e12, 312e12, 624e12, 312e12, 80e9, 2.039e12, 300e9, 25e9),
    # NVLink of 900 GB/s both ways together.
    GpuKind.h100: Gpu("H100 SXM", 67e12, 989.4e12, 1978.9e12, 1978.9e12, 80e9, 3.35e12, 450e9, 50e9),
    GpuKind.h200: Gpu("H200 SXM", 67e12, 989.4e12, 1978.9e12, 1978.9e12, 141e9, 4.8e12, 450e9, 50e9),
}


def assumed_rates(gpu: Gpu, cfg: EstimateConfig) -> DeviceRates:
    """The rates that are assumed to be reached."""
    matmul = cfg.matmul_share
    return DeviceRates(
        matmul * gpu.fp32, matmul * gpu.bf16, matmul * gpu.int8, matmul * gpu.fp8, cfg.memory_share * gpu.bandwidth
    )
