"""A workspace whose commands run in the test's own process: a tenth of the time where many are run."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from bitnet_train.__main__ import answer
from tests.training.conftest import Workspace


class InProcess(Workspace):
    """As :class:`Workspace`; what a run sets for the whole process is put back."""

    def run(self, *arguments: str) -> tuple[int, str]:
        before, threads, output = Path.cwd(), torch.get_num_threads(), io.StringIO()
        os.chdir(self.folder)
        torch.set_num_threads(1)
        try:
            with redirect_stdout(output), redirect_stderr(output):
                code = answer(self.command(*arguments)[3:])
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
        return code, output.getvalue()
