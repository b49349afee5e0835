"""Peak memory of a training step, in a process of its own: what one contender leaves behind is no other's burden.

On a CPU the figure is the kernel's high-water mark of resident memory (Linux: proc_pid_status(5), VmHWM, reset through
proc_pid_clear_refs(5)); elsewhere ``ru_maxrss``, which cannot be reset and so includes building and compiling. On a GPU
it is what PyTorch allocated. ``held_before`` is what the process held before the model existed: Python, libraries and,
for a compiled contender, the compiler, which has compiled something small by then.
"""

import gc
import platform
import resource
from dataclasses import dataclass

import torch

from bitnet_train.benchmarking.contenders import Contender
from bitnet_train.benchmarking.peers import PEERS, load_peer
from bitnet_train.benchmarking.step import TrainingStep, compiled_alone, training_mode
from bitnet_train.planning.machine_memory import ResidentMemory, give_back_free_memory

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


class _Resident:
    """VmRSS and VmHWM of this process, free pages given back first: what building left behind is not the step's."""

    how = "resident memory (VmHWM)"

    def __init__(self) -> None:
        self._memory = ResidentMemory()

    def now(self) -> int:
        give_back_free_memory()
        return self._memory.now()

    def reset(self) -> None:
        give_back_free_memory()
        self._memory.reset_peak()

    def peak(self) -> int:
        return self._memory.peak()


class _LargestResident:
    """ru_maxrss since the process began."""

    how = "largest resident memory since the process began (ru_maxrss), building and compiling included"

    def now(self) -> int:
        return self.peak()

    def reset(self) -> None:
        give_back_free_memory()

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


def _meter(device: str) -> _Resident | _LargestResident | _Allocated:
    if device == "cuda":
        return _Allocated()
    try:
        return _Resident()
    except OSError:
        return _LargestResident()


def _load_compiler(device: str) -> None:
    def small(x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x) @ x.t()).sum()

    compiled_alone(small, "nothing")(torch.ones(8, 8, device=device, requires_grad=True)).backward()
