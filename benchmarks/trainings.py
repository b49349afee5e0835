"""What the scripts here that train share: starting a run, and reading what it measured."""

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = ("-m", "bitnet_train")


def train(arguments: Sequence[str], log: Path, program: Sequence[str] = PACKAGE) -> int:
    """The exit code of a command line; what it prints goes to ``log``. ``program`` is what Python is told to run."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *program, *arguments]
    with log.open("w") as stream:
        return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ).returncode


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics; none where there is no run."""
    try:
        with (folder / "metrics.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))
    except OSError:
        return []
