"""Which samples a bad step was made of, so that someone can look at them."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, Protocol

from bitnet_train.durable import append_whole
from bitnet_train.training.distributed import group

# Samples of a step that are listed one by one; the others follow from their numbers.
LISTED = 16


class KnowsItsSamples(Protocol):
    """A data module that can say what it read for a step."""

    def samples_before(self, step: int) -> int:
        """Training samples before optimizer step ``step`` (from 0)."""

    def place_of(self, sample: int) -> dict[str, Any]:
        """Where training sample number ``sample`` lies: file, offset and the like."""


def batch_of(data: KnowsItsSamples, step: int) -> dict[str, Any]:
    """The samples of optimizer step ``step`` (from 1): the first number, how many, and where the first few lie."""
    first, end = data.samples_before(step - 1), data.samples_before(step)
    listed = [{"sample": n, **data.place_of(n)} for n in range(first, min(end, first + LISTED))]
    return {"first_sample": first, "samples": end - first, "batch": listed}


def sentence(batch: dict[str, Any], file: Path) -> str:
    """Which samples, in words; ``file`` lists where each of them lies."""
    first, count = batch["first_sample"], batch["samples"]
    place = ", ".join(f"{key} {value}" for key, value in batch["batch"][0].items() if key not in ("sample", "text"))
    more = "" if count == 1 else f" to {first + count - 1:,}"
    return f"sample{'s' if count > 1 else ''} {first:,}{more} (the first: {place}; more in {file})"


def note(file: Path, event: str, step: int, loss: float, norm: float, batch: dict[str, Any]) -> None:
    """Append a line to divergence.jsonl, in the first process.

    A disk that does not take it is no reason to lose the message itself.
    """
    if not group.first():
        return
    figures = {"loss": _plain(loss), "grad_norm": _plain(norm)}
    line = json.dumps({"event": event, "step": step, **figures, **batch}, ensure_ascii=False)
    with contextlib.suppress(OSError):
        append_whole(file, line + "\n")


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
