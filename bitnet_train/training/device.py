"""What the automatic settings come to on this machine."""

import shutil
from dataclasses import asdict, dataclass

import torch

from bitnet_train.errors import ConfigError
from bitnet_train.training.config import Accelerator, RunConfig, Strategy, processes

# A cold compile takes about half a minute on a CPU; shorter runs are done sooner without.
STEPS_WORTH_COMPILING = 200


@dataclass(frozen=True)
class Choices:
    """Resolved settings, each with the reason in a word, for the start-up lines and provenance.json."""

    device: str
    precision: str
    compile: bool
    why_precision: str
    why_compile: str
    processes: str = ""

    def sentences(self) -> list[str]:
        """One line per choice."""
        return [
            f"device: {self.device}, {torch.get_num_threads()} threads",
            *([f"processes: {self.processes}"] if self.processes else []),
            f"precision: {self.precision} ({self.why_precision})",
            f"compile: {'on' if self.compile else 'off'} ({self.why_compile})",
        ]

    def as_dict(self) -> dict[str, object]:
        """For provenance.json."""
        return asdict(self)


def choose(cfg: RunConfig) -> Choices:
    """Resolve accelerator, precision and compile. Raises ConfigError when a wanted device is not there."""
    device = choose_device(cfg)
    precision, why_precision = cfg.trainer.precision, "chosen in the config"
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_multiplies_bf16()
        precision = "bf16-mixed" if native else "32-true"
        why_precision = f"this {device.upper()} {'multiplies' if native else 'does not multiply'} bf16 natively"
    wanted = cfg.trainer.compile
    if sharded(cfg) and wanted == "auto":
        compiled, why_compile = False, "the gathers of fsdp break a compiled graph"
    elif wanted == "auto":
        compiled, why_compile = _worth_compiling(device, cfg.trainer.max_steps)
    else:
        compiled, why_compile = bool(wanted), "chosen in the config"
    return Choices(device, precision, compiled, why_precision, why_compile, _how_shared(cfg))


def sharded(cfg: RunConfig) -> bool:
    """Whether the weights are sharded over processes: a single one has nothing to share, whatever the strategy."""
    return cfg.trainer.strategy is Strategy.fsdp and processes(cfg.trainer) > 1


def _how_shared(cfg: RunConfig) -> str:
    world = processes(cfg.trainer)
    if world == 1:
        return ""
    what = "fsdp: master weights, gradients and optimizer states sharded" if sharded(cfg) else "ddp: gradients averaged"
    return f"{world} ({what})"


def available_devices(cfg: RunConfig) -> int:
    """What trainer.devices=auto comes to: the GPUs of this machine, or 1. Raises ConfigError as :func:`choose`."""
    return max(1, torch.cuda.device_count()) if choose_device(cfg) == "cuda" else 1


def choose_device(cfg: RunConfig) -> str:
    """cuda or cpu. Raises ConfigError when the wanted device is not there, or fewer of it than trainer.devices."""
    device, wanted = _device(cfg.trainer.accelerator), cfg.trainer.devices
    if device == "cuda" and isinstance(wanted, int) and wanted > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices={wanted}, but PyTorch sees {torch.cuda.device_count()} CUDA devices: use that number, or "
            "auto."
        )
    return device


def _device(wanted: Accelerator) -> str:
    if wanted is Accelerator.cuda and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=cuda, but PyTorch sees no CUDA device: use auto or cpu.")
    if wanted is Accelerator.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted.value


def _cpu_multiplies_bf16() -> bool:
    """AVX512-BF16, AMX or Arm's BF16: elsewhere PyTorch emulates bf16, slower than float32."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    else:  # torch 2.11 and before
        probes = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
        capabilities = {
            name: getattr(torch.cpu, probe)() for name, probe in probes.items() if hasattr(torch.cpu, probe)
        }
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def _worth_compiling(device: str, steps: int) -> tuple[bool, str]:
    if device == "cuda":
        return True, "the default on a GPU"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return False, "there is no C++ compiler"
    if steps < STEPS_WORTH_COMPILING:
        return False, f"fewer than {STEPS_WORTH_COMPILING} steps do not repay it on a CPU"
    return True, f"{steps} steps repay it"
