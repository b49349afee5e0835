"""Alternating rounds: what runs side by side under the same conditions is compared, and nothing else."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

# One run of a contender in a round (its number) -> the seconds it took.
Run = Callable[[int], float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of measured values."""

    median: float
    lower: float
    upper: float


def spread(values: list[float]) -> Spread:
    """Median and quartiles, linearly interpolated."""
    lower, median, upper = (float(v) for v in np.percentile(values, (25, 50, 75)))
    return Spread(median, lower, upper)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the reference: of the medians, and the smallest and largest of the paired rounds."""

    of_medians: float
    smallest: float
    largest: float


def ratio(reference: list[float], own: list[float]) -> Ratio:
    """Reference seconds over own seconds; the lists hold the same rounds (a shorter one, the first of them)."""
    paired = [a / b for a, b in zip(reference, own, strict=False)]
    return Ratio(spread(reference).median / spread(own).median, min(paired), max(paired))


def timed(work: Callable[[], object], synchronise: Callable[[], None]) -> float:
    """Wall seconds of ``work``, with the device idle before and after."""
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def alternate(
    runs: Mapping[str, Run],
    rounds: int,
    keep: Callable[[str, float], None],
    failed: Callable[[str, Exception], None],
    after_round: Callable[[int], None],
) -> None:
    """Run everything once per round, starting one further down the list each time.

    ``keep`` receives every figure at once, so that an interruption loses none. What raises is told to ``failed`` and is
    left out from then on.
    """
    alive = dict(runs)
    for number in range(rounds):
        names = list(alive)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            try:
                keep(name, alive[name](number))
            except Exception as error:
                del alive[name]
                failed(name, error)
        after_round(number)


def one_line(error: BaseException) -> str:
    """An error as one line for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
