"""What the program says on the standard error: one line for one thing that went wrong, from one process."""

import re
import sys
from contextlib import suppress

from bitnet_train.durable import is_environment, reason
from bitnet_train.errors import ConfigError
from bitnet_train.ranks import this_process
from bitnet_train.secrets import masked
from bitnet_train.training.out_of_memory import is_out_of_memory

# The sentence for a command that ran out of memory; training, which knows its batch, has a better one.
OUT_OF_MEMORY = (
    "This machine ran out of memory ({reason}): choose a smaller model, a shorter data.sequence_length or a machine "
    "with more memory; whatever was saved before is intact."
)
TERMINATED = "Terminated; nothing was changed since the last save."


def say(sentence: str) -> None:
    """One line on the standard error, from the first process, without secrets."""
    # An environment that does not tell which process this is must not keep the sentence about that from being said.
    with suppress(ConfigError):
        if not this_process().first:
            return
    # A value of thousands of letters says no more than its beginning.
    short = re.sub(r"\S{400,}", lambda found: f"{found[0][:200]}...", masked(sentence))
    with suppress(OSError):  # nobody can read it
        print(f"bitnet_train: {short}", file=sys.stderr, flush=True)


def of_the_machine(error: Exception) -> str | None:
    """The sentence for an error of the machine, a full memory or disk or a file that cannot be had; None for others."""
    if is_out_of_memory(error):
        return _out_of_memory(error)
    if isinstance(error, OSError) and is_environment(error):
        where = f" {error.filename}" if error.filename else ""
        return f"A file{where} cannot be read or written ({reason(error)}): repair that and give the command again."
    return None


def _out_of_memory(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return OUT_OF_MEMORY.format(reason=lines[0][:160].rstrip(". ") if lines else type(error).__name__)
