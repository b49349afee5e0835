"""``command=evaluate`` of an image classifier: loss and accuracy on the test images."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bitnet_train.commands.console import loudly, print_table
from bitnet_train.commands.sources import place, spec_after
from bitnet_train.config import Config
from bitnet_train.data.images.batches import in_order
from bitnet_train.data.images.sources import load_images
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.classification import images_loss
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.vision.model import build_classifier
from bitnet_train.training.distributed.checkpoint_files import read_checkpoint
from bitnet_train.training.loggers.config import WandbLogger
from bitnet_train.training.run import check_start
from bitnet_train.training.run_folder import RunFolder, write_atomically

RESULT_FILE = "evaluation.json"
PREFIX = "classifier."


def evaluate_images(cfg: Config, console: Console) -> int:
    """Measure the last checkpoint of ``run=`` in float32; the figures are also left in its evaluation.json."""
    folder = RunFolder(Path(str(cfg.run)))
    checkpoint = folder.good_checkpoint(loudly(console))
    if checkpoint is None:
        raise ConfigError(f"The run {cfg.run} has saved no checkpoint yet: train it first.")
    splits = load_images(cfg.images)
    # Of other training images, some might be these test images.
    step = check_start(checkpoint, cfg, splits.fingerprint)
    spec = spec_after(cfg, checkpoint, step)
    state = read_checkpoint(checkpoint, weights_only=True)["state_dict"]
    device, backend = place(cfg)
    model = build_classifier(cfg.classifier, spec, cfg.init, cfg.seed, backend)
    model.load_state_dict({k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)})
    model = model.to(device).eval()
    CodeCache(model)
    found = images_loss(model, in_order(splits.test, cfg.images))

    description = f"run {folder.path}, step {step}"
    console.print(f"{description}, float32, on the test images of {cfg.images.source.name}", markup=False)
    table = Table(show_header=False)
    table.add_row("[bold]accuracy[/bold]", f"[bold]{found.accuracy:.2%}[/bold]")
    table.add_row("loss", f"{found.loss:.4f} nats per image")
    table.add_row("images", f"{found.images:,}, {found.correct:,} of them right")
    print_table(console, table)
    figures = {"loss": found.loss, "accuracy": found.accuracy, "images": found.images}
    results = {"model": description, "test": {"name": cfg.images.source.name, **figures}}
    try:
        write_atomically(folder.path / RESULT_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        console.print(f"{folder.path / RESULT_FILE} is not written: {error.strerror}")
    _log(cfg, folder.path, figures, step, console)
    return 0


def _log(cfg: Config, folder: Path, figures: dict[str, Any], step: int, console: Console) -> None:
    """To the run's Weights & Biases curve, when it has one."""
    if not isinstance(cfg.logger, WandbLogger):
        return
    from bitnet_train.training.loggers.wandb import build_wandb

    logger, where = build_wandb(cfg.logger, cfg.run_name or folder.name, folder, {})
    logger.log_metrics({f"evaluate/{key}": figures[key] for key in ("loss", "accuracy")}, step)
    logger.finalize("success")
    console.print(where, markup=False)
