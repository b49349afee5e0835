"""Peak memory of a training step, in a process of its own: what one contender leaves behind is no other's burden.

On a CPU the figure is the kernel's high-water mark of resident memory (Linux: proc_pid_status(5), VmHWM, reset through
proc_pid_clear_refs(5)); elsewhere ``ru_maxrss``, which cannot be reset and so includes building and compiling. On a GPU
it is what PyTorch allocated. ``held_before`` is what the process held before the model existed: Python, libraries and,
for a compiled contender, the compiler, which has compiled something small by then.
"""

import ctypes
import gc
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from bitnet_train.benchmarking.contenders import Contender
from bitnet_train.benchmarking.peers import PEERS, load_peer
from bitnet_train.benchmarking.step import TrainingStep, compiled_alone, training_mode

MEASURED_STEPS = 3


@dataclass(frozen=True)
class StepMemory:
    """Bytes. ``peak`` of the whole process (GPU: of what PyTorch allocated), ``held_before`` the model was built."""

    peak: int
    held_before: int
    how: str

    @property
    def model(self) -> int:
        """What the model and its steps add: the peak without what was there before."""
        return self.peak - self.held_before


def step_memory(contender: Contender, warmup: int) -> StepMemory:
    """Build, warm up, reset the peak, run three steps. For a fresh process."""
    with training_mode(contender.device):
        if contender.compiled:
            _load_compiler(contender.device)
        if contender.layers in PEERS:
            load_peer(contender.layers)
        meter = _meter(contender.device)
        held = meter.now()
        step = TrainingStep(contender)
        for number in range(warmup):
            step.run(number, step.batches(number))
        step.synchronise()
        meter.reset()
        for number in range(warmup, warmup + MEASURED_STEPS):
            step.run(number, step.batches(number))
        step.synchronise()
        return StepMemory(meter.peak(), held, meter.how)


class _ResidentMemory:
    """VmRSS and VmHWM of this process."""

    how = "resident memory (VmHWM)"

    def now(self) -> int:
        _tidy()
        return _status("VmRSS")

    def reset(self) -> None:
        _tidy()
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM")


class _LargestResident:
    """ru_maxrss since the process began."""

    how = "largest resident memory since the process began (ru_maxrss), building and compiling included"

    def now(self) -> int:
        return self.peak()

    def reset(self) -> None:
        _tidy()

    def peak(self) -> int:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest * (1 if platform.system() == "Darwin" else 1024)


class _Allocated:
    """What PyTorch has allocated on the current GPU."""

    how = "memory that PyTorch allocated on the GPU"

    def now(self) -> int:
        torch.cuda.init()
        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


def _meter(device: str) -> _ResidentMemory | _LargestResident | _Allocated:
    if device == "cuda":
        return _Allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _ResidentMemory()
    except OSError:
        return _LargestResident()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _tidy() -> None:
    """Give free pages back, so that what building and compiling left behind is not counted as the step's."""
    gc.collect()
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _load_compiler(device: str) -> None:
    def small(x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x) @ x.t()).sum()

    compiled_alone(small, "nothing")(torch.ones(8, 8, device=device, requires_grad=True)).backward()
