"""Where the time of a training step goes, by kind of operation, from torch.profiler. For a fresh process.

Operators are told apart by name, by the sizes they see and by what called them; what torch.compile fused is told apart
by the operators in the fused kernel's name, so a kernel that spans two kinds counts as one of them. On a CPU the time
is that of the operators themselves, and what is left of the wall time (Python, the framework, waiting) is "other"; on a
GPU it is that of the kernels, and "other" is what the GPU idles.
"""

import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bitnet_train.benchmarking.contenders import Contender
from bitnet_train.benchmarking.step import TrainingStep, training_mode
from bitnet_train.quant.spec import build_spec

PROFILED_STEPS = 3
CLIP, REFRESHING = "benchmark::clip", "benchmark::refresh"
ATTENTION, HEAD, PASSES = "attention", "head and loss", "norms, quantisers, elementwise"
OPTIMIZER, REFRESH, OTHER = "clip and optimizer", "code refresh", "other"
# Fragments of operator and fused kernel names. The first that fits decides.
ATTENTION_NAMES = re.compile(r"bmm|softmax|scaled_dot_product|flash_attention|masked_fill|fmha")
HEAD_NAMES = re.compile(r"logsumexp|gather|nll_loss|aten::exp$|(^|_)exp_")
MATMUL_NAMES = re.compile(r"aten::(mm|addmm|linear|_int_mm|_scaled_mm)$|mkldnn|onednn|gemm|nvjet|cutlass")


def profile_step(contender: Contender, warmup: int) -> dict[str, float]:
    """Seconds per step by kind of operation."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
    if contender.device == "cpu" and contender.compiled:
        import torch._inductor.config

        # Gives every fused kernel an event of its own; changes the generated code, so it must be set before compiling.
        torch._inductor.config.cpp.enable_kernel_profile = True
    with training_mode(contender.device):
        step = TrainingStep(contender)
        step.clip.clip = _recorded(step.clip.clip, CLIP)  # type: ignore[method-assign]
        # The optimizer's hook looks it up at every step.
        step.cache.refresh = _recorded(step.cache.refresh, REFRESHING)  # type: ignore[method-assign]
        for number in range(warmup):
            step.run(number, step.batches(number))
        batches = [step.batches(warmup + i) for i in range(PROFILED_STEPS)]
        step.synchronise()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if contender.device == "cuda" else [])]
        with profile(activities=activities, record_shapes=True) as profiler:
            start = time.perf_counter()
            for number, batch in enumerate(batches):
                step.run(warmup + number, batch)
            step.synchronise()
            wall = time.perf_counter() - start
    events = profiler.events()
    assert events is not None
    classify = Classifier(contender)
    found = _on_gpu(events, classify) if contender.device == "cuda" else _on_cpu(events, classify)
    named = {kind: microseconds / 1e6 / PROFILED_STEPS for kind, microseconds in found.items()}
    named[OTHER] = max(0.0, wall / PROFILED_STEPS - sum(s for kind, s in named.items() if kind != OTHER))
    return dict(sorted(named.items(), key=lambda item: (item[0] == OTHER, -item[1])))


class Classifier:
    """(operator's name, sizes of its inputs, names of its callers) -> kind of operation, None for no real work."""

    def __init__(self, contender: Contender) -> None:
        self.vocab = contender.cfg.decoder.vocab
        self.compute = "bf16" if contender.precision == "bf16-mixed" else "fp32"
        spec = build_spec(contender.cfg.quant)
        self.dx, self.dw = spec.gradient.resolve(self.compute)

    def __call__(self, name: str, shapes: Any, callers: tuple[str, ...]) -> str:
        """The kind of operation."""
        chain = (name, *callers)
        if REFRESHING in chain:
            return REFRESH
        if CLIP in chain or any(caller.startswith("Optimizer.") for caller in chain):
            return OPTIMIZER
        if name.startswith("bitnet_train::"):
            return self._own(name)
        for caller in callers:
            if caller.startswith("bitnet_train::"):
                return self._own(caller)
        if MATMUL_NAMES.search(name):
            if any(self.vocab in shape for shape in shapes or () if isinstance(shape, list | tuple)):
                return HEAD
            return f"block matmuls, {'int8' if '_int_mm' in name else self.compute}"
        if ATTENTION_NAMES.search(name):
            return ATTENTION
        if HEAD_NAMES.search(name):
            return HEAD
        if name.startswith(("aten::", "triton_", "void ")) or "cpp_fused" in name:
            return PASSES
        return OTHER

    def _own(self, name: str) -> str:
        if "grad_input" in name:
            return f"block matmuls, {self.dx}"
        if "grad_weight" in name:
            return f"block matmuls, {self.dw}"
        return "block matmuls, int8" if "matmul" in name else PASSES


def _callers(event: Any) -> tuple[str, ...]:
    names, parent = [], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    return tuple(names)


def _on_cpu(events: Iterable[Any], classify: Classifier) -> dict[str, float]:
    found: dict[str, float] = {}
    for event in events:
        kind = classify(event.name, event.input_shapes, _callers(event))
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total
    return found


def _on_gpu(events: Iterable[Any], classify: Classifier) -> dict[str, float]:
    """Kernels by the operator that launched them; those that no operator did (fused ones), by their own name."""
    found: dict[str, float] = {}
    launched: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] = kernels.get(event.name, 0.0) + event.self_device_time_total
            continue
        for kernel in event.kernels:
            kind = classify(event.name, event.input_shapes, _callers(event))
            found[kind] = found.get(kind, 0.0) + kernel.duration
            launched[kernel.name] = launched.get(kernel.name, 0.0) + kernel.duration
    for name, total in kernels.items():
        rest = total - launched.get(name, 0.0)
        if rest > 0 and not name.startswith(("Optimizer.", CLIP, REFRESHING)):
            kind = classify(name, None, ())
            found[kind] = found.get(kind, 0.0) + rest
    return found


def _recorded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return call
