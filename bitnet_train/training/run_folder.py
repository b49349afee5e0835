"""The folder of one run: what lies where, who may write to it, and what continues it."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import yaml

from bitnet_train.errors import ConfigError

LAST = "last.ckpt"


class RunFolder:
    """``runs/<run_name>/``: config, provenance, tokenizer/, checkpoints/, metrics.csv, samples.md, export/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.provenance_file = path / "provenance.json"
        self.metrics_file = path / "metrics.csv"
        self.layers_file = path / "layers.csv"
        self.samples_file = path / "samples.md"
        self.evaluations_file = path / "evaluations.jsonl"
        self.divergence_file = path / "divergence.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"
        self.exports = path / "export"
        self._lock: Any = None

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, or None when the run has saved none."""
        last = self.checkpoints / LAST
        return last if last.exists() else None

    def lock(self) -> None:
        """Claim the folder for this process until it ends, however it ends.

        A POSIX record lock: the kernel drops it with the process, and loader processes do not inherit it. Raises
        ConfigError when another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise ConfigError(
                f"The run folder {self.path} cannot be written ({error.strerror}): choose another with paths.runs=."
            ) from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise ConfigError(
                f"The run folder {self.path} is in use by {holder}: wait for it to end, or choose another run_name."
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def saved_config(self) -> dict[str, Any] | None:
        """The configuration in config.yaml, or None for a new folder. Raises ConfigError when it is unreadable."""
        if not self.config_file.is_file():
            return None
        try:
            content = yaml.safe_load(self.config_file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.config_file} cannot be read ({error}).") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{self.config_file} is not a configuration.")
        return content

    def save_config(self, text: str) -> None:
        """Write config.yaml."""
        write_atomically(self.config_file, text)

    def add_provenance(self, session: dict[str, Any]) -> None:
        """Append what this process runs on to provenance.json, one entry per start."""
        sessions = []
        if self.provenance_file.is_file():
            try:
                sessions = json.loads(self.provenance_file.read_text())["sessions"]
            except (ValueError, KeyError):
                sessions = []
        write_atomically(self.provenance_file, json.dumps({"sessions": [*sessions, session]}, indent=1) + "\n")


class SilentRunFolder(RunFolder):
    """The run folder for all but the first of the processes that train together: it is read and not written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.layers_file = self.samples_file = self.evaluations_file = Path(os.devnull)

    def lock(self) -> None:
        """The first process holds it."""

    def save_config(self, text: str) -> None:
        """The first process writes it."""

    def add_provenance(self, session: dict[str, Any]) -> None:
        """The first process adds it."""


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` so that a reader or a crash sees the old or the new text, never half of one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
