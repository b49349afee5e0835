"""What reading a damaged or hostile export may do: load, or refuse in one sentence; nothing else, and at once."""

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.export.writers import load_any_export

# Generous for a machine that does other work; a loop over an invented count takes minutes.
SECONDS = 5.0
# Longest message: a path, a name of the file and a reason.
LONGEST_MESSAGE = 700
# What reading may take at once in Python objects, many times what these small files take.
MOST_BYTES = 64 << 20

Load = Callable[[Path], object]


def is_one_sentence(error: ConfigError) -> bool:
    """Whether a message is one line that a terminal can show."""
    return "\n" not in str(error) and 0 < len(str(error)) < LONGEST_MESSAGE


def refused(folder: Path, pattern: str, load: Load = load_any_export) -> None:
    """The folder is refused in one sentence that matches ``pattern``."""
    started = time.monotonic()
    with pytest.raises(ConfigError, match=pattern) as caught:
        load(folder)
    assert is_one_sentence(caught.value), str(caught.value)
    assert time.monotonic() - started < SECONDS


def loads_or_is_refused(folder: Path, load: Load = load_any_export) -> bool:
    """Whether the folder loads; anything but a sentence is raised, slowness and waste included."""
    refusal: ConfigError | None = None
    started = time.monotonic()
    tracemalloc.start()
    try:
        load(folder)
    except ConfigError as error:
        refusal = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES
    assert time.monotonic() - started < SECONDS
    assert refusal is None or is_one_sentence(refusal), str(refusal)
    return refusal is None
