"""The errors a user can cause or should hear about, each with the exit code the command line answers with."""

import difflib
from collections.abc import Iterable


class BitnetTrainError(Exception):
    """Base of every error that is reported as one sentence and an exit code, never as a traceback."""

    exit_code = 2


class ConfigError(BitnetTrainError):
    """Bad configuration or input: the sentence says what is wrong and what to do."""


class DivergedError(BitnetTrainError):
    """Training stopped on purpose because the loss or the gradient is no longer a finite number."""

    exit_code = 3


class VerificationError(BitnetTrainError):
    """An export does not compute what was trained."""

    exit_code = 4


class ConversionError(BitnetTrainError):
    """A model was not converted: a check failed, and the model is what it was before."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'lr'?"`` when one of ``known`` is close to ``word``, otherwise an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
