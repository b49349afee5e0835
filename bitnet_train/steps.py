"""Places in a run, which settings give as a step or as a share of all steps."""

import math

from bitnet_train.errors import ConfigError


def as_steps(value: float, total: int, key: str = "a setting that takes steps") -> int:
    """A number of steps: ``value`` itself, or below 1 that share of ``total``, rounded.

    Raises ConfigError, which names ``key``, when it is neither, as 1.5 is, of which nobody knows what was meant.
    """
    if not math.isfinite(value) or (value >= 1 and value != round(value)):
        raise ConfigError(
            f"{key} is {value:g}, which is no number of steps: give a whole number of them, or a share of "
            "trainer.max_steps below 1."
        )
    return round(value * total) if value < 1 else round(value)
