"""Weights & Biases, through Lightning's logger."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from bitnet_train.errors import ConfigError
from bitnet_train.training.loggers.config import WandbLogger


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

    class Logger(LightningWandbLogger):
        def finalize(self, status: str) -> None:
            super().finalize(status)
            # Otherwise the next run of this process, a sweep's, would go on in this one's curve.
            self.experiment.finish()

    logger = Logger(
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
    )
    if not offline:
        return logger, f"W&B: project {cfg.project}, run {run_name}"
    why = "logger.offline=true" if cfg.offline else "no API key is configured" if not key else "WANDB_MODE=offline"
    return logger, f"W&B: offline, because {why}; upload later with: wandb sync {folder / 'wandb'}/offline-run-*"
