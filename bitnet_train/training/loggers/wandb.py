"""Weights & Biases, through Lightning's logger. Nothing that goes wrong with it stops a run."""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from bitnet_train.errors import ConfigError
from bitnet_train.secrets import masked
from bitnet_train.training.loggers.config import WandbLogger

# Seconds to wait for W&B's servers when a run begins and when it ends; what is not sent by then stays on the disk.
INIT_TIMEOUT, FINISH_TIMEOUT = 90.0, 300.0
# Bytes; below that a disk is as good as full.
FULL = 64 << 10


def build_wandb(cfg: WandbLogger, run_name: str, folder: Path, config: dict[str, Any]) -> tuple[Logger, str]:
    """The logger and one line about where the metrics go. The run id is the run's name, so that a continued run
    continues its curve.

    Raises ConfigError when wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            'logger=wandb needs wandb: install it with pip install "bitnet-train[wandb]", or use logger=csv.'
        ) from None
    from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger

    key = os.environ.get("WANDB_API_KEY") or wandb.api.api_key
    offline = cfg.offline or not key or os.environ.get("WANDB_MODE") == "offline"

    class Run(LightningWandbLogger):
        def finalize(self, status: str) -> None:
            super().finalize(status)
            # Otherwise the next run of this process, a sweep's, would go on in this one's curve.
            self.experiment.finish()

    def make(offline: bool) -> Logger:
        return Run(
            project=cfg.project,
            entity=cfg.entity,
            name=run_name,
            id=run_name.replace("/", "-"),
            resume=None if offline else "allow",
            offline=offline,
            # Lightning only sets WANDB_MODE, which wandb has read by now.
            mode="offline" if offline else None,
            save_dir=str(folder),
            tags=list(cfg.tags),
            config=config,
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
        )

    logger, unreachable = make(offline), ""
    try:
        _ = logger.experiment  # type: ignore[attr-defined]  # connects now, and says so in the start-up lines
    except Exception as error:  # wandb's own, and whatever the network raises
        unreachable = _first_line(error)
    if unreachable and not offline:
        offline = True
        wandb.teardown()  # its service holds the run that could not begin
        logger = make(True)
        try:
            _ = logger.experiment  # type: ignore[attr-defined]
            unreachable = f"W&B cannot be reached ({unreachable})"
        except Exception as error:
            return Tolerant(None, folder), f"warning: W&B is left out: {_first_line(error)}"
    elif unreachable:
        return Tolerant(None, folder), f"warning: W&B is left out: {unreachable}"
    if not offline:
        return Tolerant(logger, folder), f"W&B: project {cfg.project}, run {run_name}"
    why = "logger.offline=true" if cfg.offline else "no API key is configured" if not key else "WANDB_MODE=offline"
    sync = f"upload later with: wandb sync {folder / 'wandb'}/offline-run-*"
    return Tolerant(logger, folder), f"W&B: offline, because {unreachable or why}; {sync}"


class Tolerant(Logger):
    """Hands everything on to ``inner`` (None: to nobody) and goes on when that fails, saying so once.

    wandb itself does not say that the disk of ``folder``, where it writes first, is full; this does.
    """

    def __init__(self, inner: Logger | None, folder: Path, say: Callable[[str], None] = print) -> None:
        super().__init__()
        self.inner, self.folder, self.say = inner, folder, say
        self._said: set[str] = set()

    @property
    def name(self) -> str | None:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> Any:
        """The run of wandb."""
        return None if self.inner is None else self.inner.experiment  # type: ignore[attr-defined]

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._try("log_hyperparams", params, *args, **kwargs)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try("log_metrics", metrics, step)
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return
        if free < FULL and self.inner is not None:
            self._say_once("full", "its disk is full, so metrics from here on may be missing there")

    def save(self) -> None:
        self._try("save")

    def finalize(self, status: str) -> None:
        self._try("finalize", status)

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self.inner is None:
            return
        try:
            getattr(self.inner, method)(*args, **kwargs)
        except Exception as error:  # wandb's own, and whatever network and disk raise
            self._say_once("failed", f"it fails ({_first_line(error)})")

    def _say_once(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(f"warning: W&B: {sentence}; training goes on, and metrics.csv has everything")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return masked(lines[0].rstrip(".")) if lines else type(error).__name__
