"""The step benchmark: build and warm up everyone, alternate, then memory and profiles in processes of their own."""

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from bitnet_train.benchmarking.child import ChildError, in_child
from bitnet_train.benchmarking.config import BenchmarkConfig
from bitnet_train.benchmarking.contenders import Contender, Line
from bitnet_train.benchmarking.memory import step_memory
from bitnet_train.benchmarking.predict import predict_step
from bitnet_train.benchmarking.probes import measure_rates
from bitnet_train.benchmarking.profile import profile_step
from bitnet_train.benchmarking.results import ContenderResult, StepResults
from bitnet_train.benchmarking.step import TrainingStep, training_mode
from bitnet_train.benchmarking.timing import alternate, one_line, timed
from bitnet_train.kernels.backend import choose_backend
from bitnet_train.planning.roofline import DeviceRates

# Whose time is told apart by kind of operation.
PROFILED = ("ternary", "dense")

Say = Callable[[str], None]


def run_step(line: Line, cfg: BenchmarkConfig, results: StepResults, say: Say) -> None:
    """Measure the contenders of ``line`` into ``results``, which hold everything so far at any moment."""
    results.not_measured |= line.not_measured
    rates = probe(line.contenders[0], say)
    results.rates = asdict(rates)
    with training_mode(line.contenders[0].device):
        steps = _warm_up(line, cfg.warmup, rates, results, say)
        _alternate(steps, cfg, results, say)
    steps.clear()
    if cfg.memory:
        _measure_memory(cfg.warmup, results, say)
    if cfg.profile:
        _profile(cfg.warmup, results, say)
    results.complete = True


def probe(contender: Contender, say: Say) -> DeviceRates:
    """The rates of the device, said in one line."""
    backend = choose_backend(contender.device, contender.cfg.kernels.backend).backend
    rates = measure_rates(torch.device(contender.device), backend)
    figures = ", ".join(f"{kind} {rates.matmul(kind) / 1e12:.3g}" for kind in ("fp32", "bf16", "int8"))
    say(f"this device: matmuls in TFLOP/s: {figures}; memory {rates.bandwidth / 1e9:.1f} GB/s")
    return rates


def _warm_up(line: Line, warmup: int, rates: DeviceRates, results: StepResults, say: Say) -> dict[str, TrainingStep]:
    """Everyone that builds and takes its first steps, kept alive."""
    steps: dict[str, TrainingStep] = {}
    for number, contender in enumerate(line.contenders, start=1):
        how = "compiled" if contender.compiled else "eager"
        head = f"warm-up {number}/{len(line.contenders)}: {contender.name} ({contender.precision}, {how})"
        start = time.perf_counter()
        result = ContenderResult(contender)
        try:
            step = TrainingStep(contender)
            result.tokens = step.tokens
            for i in range(warmup):
                seconds, loss = _one_step(step, i)
                result.warmup_seconds.append(seconds)
                result.losses.append(loss)
        except Exception as error:
            results.not_measured[contender.name] = one_line(error)
            say(f"{head}: not measured: {one_line(error)}")
            continue
        parts = predict_step(contender, rates)
        if parts is not None:
            result.predicted_parts, result.predicted_seconds = parts, sum(parts.values())
        steps[contender.name] = step
        results.measured[contender.name] = result
        say(f"{head}: {time.perf_counter() - start:.1f} s, loss {result.losses[-1]:.3f}")
    return steps


def _one_step(step: TrainingStep, number: int) -> tuple[float, float]:
    """Seconds of a step and its loss; its token ids are made, and the loss is read, outside of the time."""
    batches = step.batches(number)
    losses: list[Tensor] = []
    seconds = timed(lambda: losses.append(step.run(number, batches)), step.synchronise)
    return seconds, float(losses[0])


def _alternate(steps: dict[str, TrainingStep], cfg: BenchmarkConfig, results: StepResults, say: Say) -> None:
    def runner(step: TrainingStep) -> Callable[[int], float]:
        return lambda number: _one_step(step, cfg.warmup + number)[0]

    def failed(name: str, error: Exception) -> None:
        results.not_measured[name] = f"stopped after {len(results.measured[name].seconds)} rounds: {one_line(error)}"
        say(f"{name}: {results.not_measured[name]}")
        steps.pop(name)

    def after(number: int) -> None:
        names = [name for name in results.timed if name in steps]
        figures = ", ".join(f"{name} {results.measured[name].tokens_per_second:,.0f}" for name in names)
        say(f"round {number + 1}/{cfg.rounds}: median tokens/s so far: {figures}")

    alternate(
        {name: runner(step) for name, step in steps.items()},
        cfg.rounds,
        lambda name, seconds: results.measured[name].seconds.append(seconds),
        failed,
        after,
    )


def _measure_memory(warmup: int, results: StepResults, say: Say) -> None:
    for name, result in results.timed.items():
        try:
            result.memory = in_child(step_memory, result.contender, warmup)
        except ChildError as error:
            result.no_memory = str(error)
            say(f"memory of {name}: not measured: {error}")
            continue
        peak, own = result.memory.peak / 1e6, result.memory.model / 1e6
        say(f"memory of {name}: peak {peak:,.0f} MB, {own:,.0f} MB of it model and step")


def _profile(warmup: int, results: StepResults, say: Say) -> None:
    for name in PROFILED:
        if name not in results.timed:
            continue
        result = results.timed[name]
        try:
            result.profile = in_child(profile_step, result.contender, warmup)
            say(f"profile of {name}: done")
        except ChildError as error:
            result.no_profile = str(error)
            say(f"profile of {name}: not measured: {error}")
