"""Running out of memory: how it is recognised, and the sentence that says what to change.

No torch here: the command line asks about errors of every command.
"""

import errno
from collections.abc import Iterator

from bitnet_train.training.batch_warmup import BatchPlan

# What PyTorch's CPU allocator, the CUDA libraries (which allocate on their own) and compilers say in a RuntimeError.
PHRASES = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or an error that it was raised from, says that memory ran out."""
    return any(_says_so(one) for one in _causes(error))


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def training_advice(plan: BatchPlan, sequence_length: int, step: int, saved: str | None, learning: bool) -> str:
    """The sentence for a run that ran out of memory in ``step``.

    ``saved`` names the checkpoint that the run goes on from, if there is one; ``learning`` is False when the model was
    being validated or sampled from, which no micro-batch makes smaller.
    """
    there = f"{saved} is intact, and the same command goes on from it" if saved else "nothing was saved yet"
    shorter = f"data.sequence_length={sequence_length // 2} or " if sequence_length > 1 else ""
    anew = f"start a new run with {shorter}a smaller model (model.layers, model.hidden, model.ffn)"
    if not learning:
        return f"Out of memory while validating or sampling after step {step}: {anew}; {there}."
    at_once = plan.sequences_at(step - 1) // plan.pieces
    at = f"Out of memory in step {step} with {at_once} x {sequence_length} tokens at once"
    if plan.micro_batch == 1:
        return f"{at}, a single sequence: {anew}; {there}."
    half = max((n for n in plan.micro_batches() if n <= plan.micro_batch // 2), default=None)
    if half is None:
        return f"{at}, which trainer.batch_warmup lets no smaller trainer.micro_batch cut: {anew}; {there}."
    less = f"set trainer.micro_batch={half} or trainer.micro_batch=auto, which changes nothing but rounding"
    return f"{at}: {less}, and if that is not enough {anew}; {there}."
