"""The folder of one run: what lies where, who may write to it, and what continues it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bitnet_train.durable import check_archive, reason, write_atomically
from bitnet_train.errors import ConfigError
from bitnet_train.training.run_lock import RunLock

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
        self._lock: RunLock | None = None

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint by its name, looked at no further, or None when the run has saved none."""
        return next(iter(self._candidates()), None)

    def _candidates(self) -> list[Path]:
        """The checkpoints in the order in which a run would go on from them.

        last.ckpt comes first, unless a later step was saved after it was written: then the process was killed before
        last.ckpt followed.
        """
        steps = sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)
        last = self.checkpoints / LAST
        if not last.exists():  # a file, or a link to a folder of shards
            return steps
        own = last.stat()
        if steps and steps[0].stat().st_mtime_ns > own.st_mtime_ns:
            return [*steps, last]
        return [last, *(step for step in steps if not step.samefile(last))]

    def good_checkpoint(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole: its checksums hold and it can be read. None when the run has saved none.

        ``say`` is told when it is not the one that last.ckpt should be. Nothing is deleted. Raises ConfigError when
        there are checkpoints and none is whole.
        """
        broken: list[str] = []
        candidates = self._candidates()
        for path in candidates:
            try:
                check_checkpoint(path)
            except (OSError, ValueError) as error:
                broken.append(f"{path.name}: {reason(error) if isinstance(error, OSError) else error}")
                continue
            if broken:
                say(f"WARNING: {self.checkpoints} holds broken checkpoints ({'; '.join(broken)}): using {path.name}")
            elif path.name != LAST:
                gone = "is missing" if not (self.checkpoints / LAST).exists() else "is of an earlier step"
                say(f"WARNING: {self.checkpoints / LAST} {gone}: using {path.name}")
            return path
        if broken:
            raise ConfigError(
                f"Every checkpoint in {self.checkpoints} is broken ({'; '.join(broken)}): restore one from a copy, or "
                "start again with another run_name; nothing was deleted."
            )
        return None

    def lock(self, say: Callable[[str], None] = print) -> None:
        """Claim the folder for this process until :meth:`unlock`, or until it ends, however it ends.

        Raises ConfigError when another process holds it, and when it cannot be written.
        """
        lock = RunLock(self.path, say)
        lock.acquire()
        self._lock = lock

    def unlock(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

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

    def lock(self, say: Callable[[str], None] = print) -> None:
        """The first process holds it."""

    def save_config(self, text: str) -> None:
        """The first process writes it."""

    def add_provenance(self, session: dict[str, Any]) -> None:
        """The first process adds it."""


def check_checkpoint(path: Path) -> None:
    """Raises ValueError, with the reason in words, when ``path`` is no whole checkpoint, OSError when it is unread."""
    from bitnet_train.training.distributed.checkpoint_files import check_folder, read_outline

    (check_folder if path.is_dir() else check_archive)(path)
    try:
        content, _ = read_outline(path)
        int(content["global_step"])
    except OSError:
        raise
    except Exception as error:  # the unpickler raises anything
        raise ValueError(f"it is no checkpoint of a run ({type(error).__name__})") from None
