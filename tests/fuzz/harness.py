"""The real command line, in this process, with everything that it says kept."""

import logging
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

import torch

from bitnet_train.__main__ import answer
from tests.composing import fresh_recipes


@dataclass
class Ended:
    """How a command line ended: the exit code, or None and the traceback of what it raised."""

    code: int | None
    said: str
    errors: str
    raised: str = ""

    @property
    def sentences(self) -> list[str]:
        """The sentences that it ended with."""
        return [line for line in self.errors.splitlines() if line.startswith("bitnet_train: ")]


def run(line: list[str]) -> Ended:
    """What ``python -m bitnet_train`` does with this command line."""
    out, errors = StringIO(), StringIO()
    code, raised = None, ""
    with fresh_recipes(), redirect_stdout(out), redirect_stderr(errors):
        try:
            code = answer(list(line))
        except BaseException:
            raised = traceback.format_exc()
    logging.disable(logging.NOTSET)
    torch.use_deterministic_algorithms(False)
    return Ended(code, out.getvalue(), errors.getvalue(), raised)


def defect(ended: Ended, codes: tuple[int, ...] = (0, 2)) -> str:
    """What is wrong with how a command line ended; nothing if it is as it should be."""
    if ended.raised:
        return f"raised:\n{ended.raised[-1500:]}"
    if ended.code not in codes:
        return f"exit code {ended.code}"
    if "Traceback" in ended.said + ended.errors:
        return "a traceback was printed"
    if ended.code and not ended.sentences:
        return f"no sentence: {ended.errors[-300:]!r}"
    if not ended.code and ended.sentences:
        return "a complaint, and exit code 0"
    long = [sentence for sentence in ended.sentences if len(sentence) > 1200]
    return f"a sentence of {len(long[0])} characters: {long[0][:200]}" if long else ""
