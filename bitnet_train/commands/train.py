"""``command=train``: prepare the data if need be, claim the run folder, train or continue, say what came of it."""

import gzip
import lzma
import re
from pathlib import Path

from rich.console import Console

from bitnet_train.commands.prepare import ensure_prepared
from bitnet_train.config import Config, check_continuation, to_yaml
from bitnet_train.data.prepare import split_text
from bitnet_train.errors import ConfigError
from bitnet_train.training.run_folder import RunFolder


def run(cfg: Config) -> int:
    """Train; the same command again continues. Returns 0, or 130 or 143 when a signal stopped the run after saving."""
    console = Console()
    assert cfg.run_name is not None
    folder = RunFolder(Path(cfg.paths.runs) / cfg.run_name)
    fork = _fork_source(cfg)
    folder.lock()
    saved = folder.saved_config()
    if saved is not None:
        check_continuation(saved, cfg, folder.config_file)
    shards, manifest = ensure_prepared(cfg, console)

    from bitnet_train.training.run import train

    folder.save_config(to_yaml(cfg))
    start = folder.last_checkpoint or fork
    outcome = train(cfg, folder, cfg.run_name, shards, manifest, start, console)
    if outcome.exit_code:
        console.print(f"stopped at step {outcome.step}, saved in {folder.checkpoints}; the same command continues the run")
        return outcome.exit_code
    if outcome.validation is not None:
        text = split_text(cfg.data, "val").encode() if cfg.data.validation_tokens is None else b""
        console.print(
            f"[bold]{outcome.validation.bits_per_byte:.4f} bits per byte[/bold] on {outcome.validation.bytes:,} held-out bytes"
            + (f" (gzip -9: {compressed(text, 'gzip'):.2f}, xz -9: {compressed(text, 'xz'):.2f} on the same text)" if text else "")
        )
    console.print(f"run folder: {folder.path}; next: python -m bitnet_train command=export run={folder.path}")
    return 0


def compressed(text: bytes, how: str) -> float:
    """Bits per byte that ``gzip -9`` or ``xz -9`` needs for ``text``."""
    packed = gzip.compress(text, 9) if how == "gzip" else lzma.compress(text, preset=9)
    return 8 * len(packed) / len(text)


def _fork_source(cfg: Config) -> Path | None:
    """The checkpoint that ``resume.from=RUN[@STEP]`` names. Raises ConfigError when it does not exist."""
    source = cfg.resume["from"]
    if source is None:
        return None
    run_folder, _, step = str(source).partition("@")
    checkpoints = RunFolder(Path(run_folder)).checkpoints
    if step and not re.fullmatch(r"\d+", step):
        raise ConfigError(f"resume.from={source}: the part after @ must be a step number.")
    path = checkpoints / (f"step-{int(step):08d}.ckpt" if step else "last.ckpt")
    if not path.is_file():
        there = ", ".join(str(int(p.stem[5:])) for p in sorted(checkpoints.glob("step-*.ckpt"))) or "none"
        raise ConfigError(f"resume.from={source}: {path} does not exist; steps saved there: {there}.")
    return path
