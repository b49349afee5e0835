"""What goes wrong with the machine while a run trains, in one sentence that says what is saved and what to do."""

import re
import traceback
from multiprocessing import AuthenticationError

from bitnet_train.durable import is_environment, reason
from bitnet_train.errors import BitnetTrainError, ConfigError
from bitnet_train.training.run_folder import RunFolder

# How torch's DataLoader hands on what a worker raised, and how it says that one is gone.
RAISED_IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.")
WORKER_GONE = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)\s*(exited unexpectedly|is killed by signal: [^.]*)"
)
# What reading from a worker raises when it is killed between offering a batch's memory and handing it over: torch says
# that a worker is gone only where the system has already noticed.
CUT_OFF = (EOFError, ConnectionError, AuthenticationError)


def in_one_sentence(error: Exception, folder: RunFolder, step: int) -> BitnetTrainError | None:
    """The sentence for a fault of the environment in optimizer step ``step`` of the run in ``folder``.

    None for an error that is none: that is a bug, whose traceback is wanted. Running out of memory has sentences of its
    own (``training.out_of_memory``).
    """
    text = str(error)
    if isinstance(error, BitnetTrainError) and RAISED_IN_WORKER.match(text):
        # Of the worker's traceback the last line, without the class: our own sentence.
        return type(error)(f"In step {step}: {text.strip().splitlines()[-1].partition(': ')[2]}")
    gone = WORKER_GONE.search(text)
    if isinstance(error, RuntimeError) and gone:
        return _worker_gone(step, f" ({gone[1].strip()}) {gone[2].strip()}", folder)
    if isinstance(error, CUT_OFF) and _from_a_worker(error):
        return _worker_gone(step, " ended in the middle of a batch", folder)
    if isinstance(error, OSError) and is_environment(error):
        where = f" {error.filename}" if error.filename else ""
        return ConfigError(
            f"In step {step} a file{where} cannot be read or written ({reason(error)}): repair that; {go_on(folder)}."
        )
    return None


def _worker_gone(step: int, what: str, folder: RunFolder) -> ConfigError:
    return ConfigError(
        f"In step {step} a data loader process{what}, which is what the system does when memory runs out: free memory "
        f"or lower data.workers; {go_on(folder)}."
    )


def _from_a_worker(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.utils.data.dataloader" for frame, _ in frames)


def go_on(folder: RunFolder) -> str:
    """What is saved, and how the run goes on from it."""
    last = folder.last_checkpoint
    return "nothing was saved yet" if last is None else f"{last} is intact, and the same command goes on from it"
