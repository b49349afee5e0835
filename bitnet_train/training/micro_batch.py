"""``trainer.micro_batch=auto``: the largest micro-batch that fits into memory, found by trying.

Before training starts, real forward and backward passes of the run's module are made on random ids, in its precision
and with gradients to add to, as in every step but the first. Eager passes over a few small sizes give a line (bytes
whatever the size, bytes per sequence); the largest size that the line lets into the budget is then tried as training
will run it, compiled or not, and corrected from there. The optimizer's state, which does not exist yet, is added.

A GPU says itself when its memory is full. A CPU's process is killed, so there the peak of resident memory is measured,
no size is tried that the sizes before do not vouch for, and less of the memory is used.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from bitnet_train.errors import ConfigError
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.decoder import Decoder
from bitnet_train.planning.fitting import SHARE, MemoryLine, climb, divisors
from bitnet_train.planning.machine_memory import ResidentMemory, available_memory, give_back_free_memory
from bitnet_train.planning.memory import training_memory
from bitnet_train.planning.optimizer_state import optimizer_state
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.config import RunConfig, micro_batches, step_sequences
from bitnet_train.training.device import Choices
from bitnet_train.training.module import PretrainingModule
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.optimizers.config import AdamW8bitConfig
from bitnet_train.training.out_of_memory import is_out_of_memory

# Two sizes whose peaks lie further apart than this make a line; below it is noise (pages, the allocator's arenas).
SIGNIFICANT = 64 * 2**20
# Compiled passes may take more than eager ones: on a CPU the compiler itself holds half a gigabyte, and a graph may
# keep more than eager code does. Where an eager pass over the whole step would fit twice beside a compiler, none is
# compiled to find out.
AMPLE = 2
COMPILER = 2**30


class Meter(Protocol):
    """Measures the memory that something takes."""

    # Bytes that this process can take beyond what it holds.
    available: int
    # How the bytes were found, for the start-up line.
    how: str

    def growth(self, run: Callable[[], None]) -> int:
        """Peak bytes while ``run`` ran, beyond those held when the meter was made."""


class GpuMemory:
    """PyTorch's own count of the bytes that it allocated on the current GPU."""

    how = "measured on the GPU"

    def __init__(self) -> None:
        self._held = torch.cuda.memory_allocated()
        free, _ = torch.cuda.mem_get_info()
        # What PyTorch has reserved and does not use is free for us.
        self.available = free + torch.cuda.memory_reserved() - self._held

    def growth(self, run: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._held


class ProcessMemory:
    """The high-water mark of this process's resident memory. Raises OSError where there is none."""

    how = "measured as resident memory"

    def __init__(self, available: int) -> None:
        self.available = available
        self._memory = ResidentMemory()
        self._held = self._memory.now()

    def growth(self, run: Callable[[], None]) -> int:
        self._memory.reset_peak()
        run()
        return max(0, self._memory.peak() - self._held)


@dataclass(frozen=True)
class MicroBatch:
    """The choice and its reasons. Bytes are those beyond the weights and the program itself."""

    size: int
    sequences: int
    fixed_bytes: int
    bytes_per_sequence: int
    limit_bytes: int
    share: float
    how: str

    def sentence(self) -> str:
        """The start-up line."""
        takes = f"{_megabytes(self.fixed_bytes)} and {_megabytes(self.bytes_per_sequence)} per sequence, {self.how}"
        limit = f"{_megabytes(self.limit_bytes)}, {self.share:.0%} of what is free"
        return f"micro-batch: {self.size} of the step's {self.sequences} sequences (auto; {takes}; limit {limit})"

    def as_dict(self) -> dict[str, object]:
        """For provenance.json."""
        return asdict(self)


def find_micro_batch(
    cfg: RunConfig, decoder: Decoder, choices: Choices, build: Callable[[bool], PretrainingModule]
) -> MicroBatch:
    """The largest number of sequences that divides a step of ``cfg`` and fits into memory.

    ``decoder`` goes to the run's device and is left there with its weights, without codes and gradients; random number
    generators stay where they were. ``build(compiled)`` makes the module around it that training will use. Raises
    ConfigError when not even one sequence fits.
    """
    sequences = step_sequences(cfg.trainer, cfg.text.sequence_length)
    # The smallest sizes show what a sequence takes; a batch warm-up does not let all of them be chosen.
    small, sizes = divisors(sequences), micro_batches(cfg.trainer, cfg.text.sequence_length)
    state = optimizer_bytes(cfg)
    decoder.to(choices.device)
    meter, share = _meter(choices.device), SHARE[choices.device]
    if meter is None:
        return _estimated(cfg, sizes, choices)
    budget = share * meter.available
    # A GPU refuses what it does not have; here it would be the end of the process.
    surely = state + _surely(cfg, choices.precision) if choices.device == "cpu" else 0
    if surely > meter.available:
        raise ConfigError(_too_large(cfg, surely, meter.available, share))
    peaks: dict[int, int] = {}  # bytes of each size, as measured last
    with _rehearsal(cfg, decoder, choices) as rehearse:

        def measure(size: int, compiled: bool = False) -> int | None:
            try:
                peaks[size] = state + rehearse(build(compiled), size, meter, compiled)
                return peaks[size]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            finally:
                if compiled:
                    # The next size must not be taken for one of a changing shape: training's graph would be slower.
                    torch.compiler.reset()
            _free(choices.device)
            return None

        first = measure(1)
        if first is None:
            eager, line = {}, MemoryLine(0.0, budget)  # compiled, one sequence may do
        else:
            known = state + sum(p.nbytes for p in decoder.parameters())
            most = meter.available if choices.device == "cpu" else math.inf
            eager = _few_sizes(small, first, known, most, measure)
            line = MemoryLine.through(eager)
            if sizes[0] not in eager and line.at(sizes[0]) > budget:
                need = round(line.at(sizes[0]))
                raise ConfigError(_too_large(cfg, need, meter.available, share, choices.compile, sizes[0]))
        ample = AMPLE * line.at(sequences) + COMPILER <= budget
        if choices.compile and not ample:
            tried = climb(sizes, line, budget, lambda size: measure(size, True))
        else:
            tried = climb(sizes, line, budget, lambda size: eager[size] if size in eager else measure(size))
    fitting = {size: used for size, used in tried.items() if used is not None}
    if not fitting:
        least = peaks.get(sizes[0])
        raise ConfigError(_too_large(cfg, least, meter.available, share, choices.compile, sizes[0]))
    size = max(fitting)
    per_sequence = max(0.0, (fitting[size] - line.fixed) / size)
    return MicroBatch(size, sequences, round(line.fixed), round(per_sequence), round(budget), share, meter.how)


def optimizer_bytes(cfg: RunConfig) -> int:
    """Bytes of the optimizer's state, by a step of the real optimizer on parameters without storage."""
    if isinstance(cfg.optimizer, AdamW8bitConfig):  # would compile for that step
        return optimizer_state(cfg.optimizer, cfg.model).bytes
    with torch.device("meta"):
        shadow = Decoder(cfg.decoder, build_spec(cfg.quant))
    for parameter in shadow.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = build_optimizer(cfg.optimizer, shadow)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def _few_sizes(
    sizes: list[int], first: int, known: int, most: float, measure: Callable[[int], int | None]
) -> dict[int, int]:
    """Bytes of the smallest sizes, until two lie far enough apart for a line or the next may take more than ``most``.

    ``known`` are bytes that are there whatever the size; the rest of ``first``, the bytes of size 1, is taken for the
    sequence's, which overrates the next size.
    """
    peaks = {1: first}
    for size in sizes[1:]:
        last = max(peaks)
        if peaks[last] - first >= SIGNIFICANT:
            break
        expected = known + (peaks[last] - known) * size / last
        used = measure(size) if expected <= most else None
        if used is None:
            break
        peaks[size] = used
    return peaks


@contextmanager
def _rehearsal(
    cfg: RunConfig, decoder: Decoder, choices: Choices
) -> Iterator[Callable[[PretrainingModule, int, Meter, bool], int]]:
    """A function that makes a pass of a module over so many sequences and returns the bytes it took.

    Gradients are there from the second pass on, codes all the time, as in training; both are gone afterwards.
    """
    device, bf16 = choices.device, choices.precision == "bf16-mixed"
    precision: Precision = MixedPrecision("bf16-mixed", device) if bf16 else Precision()
    generator = torch.Generator().manual_seed(0)
    deterministic, training = torch.are_deterministic_algorithms_enabled(), decoder.training
    cache = CodeCache(decoder)

    def one_pass(module: PretrainingModule, size: int) -> None:
        shape = (size, cfg.text.sequence_length + 1)
        ids = torch.randint(cfg.decoder.vocab, shape, generator=generator).to(device)
        with precision.forward_context():
            loss = module.training_step(ids, 0)
        loss.backward()

    def rehearse(module: PretrainingModule, size: int, meter: Meter, warm_up: bool) -> int:
        # Compiling takes memory of its own, and a pass without gradients to add to takes less.
        if warm_up or any(p.grad is None for p in decoder.parameters()):
            one_pass(module, size)
        return meter.growth(lambda: one_pass(module, size))

    try:
        torch.use_deterministic_algorithms(device == "cpu")  # as the trainer does
        decoder.train()
        with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            yield rehearse
    finally:
        torch.use_deterministic_algorithms(deterministic)
        decoder.train(training)
        decoder.zero_grad(set_to_none=True)
        cache.release()
        _free(device)


def _meter(device: str) -> Meter | None:
    """How memory is measured on ``device``; None where a process cannot measure its own peak."""
    if device == "cuda":
        return GpuMemory()
    try:
        return ProcessMemory(_available())
    except OSError:
        return None


def _available() -> int:
    available = available_memory()
    if available is None:
        raise ConfigError("trainer.micro_batch=auto: this system does not tell how much memory is free; give a number.")
    return available


def _estimated(cfg: RunConfig, sizes: list[int], choices: Choices) -> MicroBatch:
    """The choice by :mod:`bitnet_train.planning.memory`, where nothing can be measured."""
    available, share = _available(), SHARE[choices.device]
    planned = {size: _planned(cfg, size, choices.precision) for size in sizes}
    size = max((size for size, need in planned.items() if need <= share * available), default=None)
    if size is None:
        raise ConfigError(_too_large(cfg, planned[sizes[0]], available, share, size=sizes[0]))
    line, limit = MemoryLine.through(planned), round(share * available)
    return MicroBatch(size, sizes[-1], round(line.fixed), round(line.per_sequence), limit, share, "estimated")


def _planned(cfg: RunConfig, size: int, precision: str) -> int:
    spec, length = build_spec(cfg.quant), cfg.text.sequence_length
    memory = training_memory(
        cfg.decoder, spec, size, length, precision, cfg.optimizer, cfg.trainer.activation_checkpointing
    )
    return memory.total - memory.master_weights


def _surely(cfg: RunConfig, precision: str) -> int:
    """Bytes that an eager pass over one sequence cannot do without, optimizer state and weights not counted.

    The loss's chunk is left out: it is planned for a GPU.
    """
    spec, length = build_spec(cfg.quant), cfg.text.sequence_length
    memory = training_memory(
        cfg.decoder, spec, 1, length, precision, checkpointing=cfg.trainer.activation_checkpointing
    )
    kept = sum(size for part, size in memory.activations.items() if part != "loss chunk")
    return memory.gradients + memory.code_buffers + kept


def _free(device: str) -> None:
    """Give back what nothing refers to any more, to the system too."""
    give_back_free_memory()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _too_large(
    cfg: RunConfig, need: int | None, available: int, share: float, compiled: bool = False, size: int = 1
) -> str:
    takes = "runs out of memory" if need is None else f"takes {_megabytes(need)} with gradients and optimizer state"
    eager = "set trainer.compile=false, " if compiled else ""
    least = "one sequence" if size == 1 else f"the {size} sequences that trainer.batch_warmup asks for"
    return (
        f"Not even {least} fits into memory: a pass over {size} x {cfg.text.sequence_length} tokens {takes}, and "
        f"{share:.0%} of the {_megabytes(available)} that are free may be used: {eager}shorten data.sequence_length, "
        "choose a smaller model (model.layers, model.hidden, model.ffn) or free memory; "
        f"trainer.micro_batch={size} tries anyway."
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
