"""What ``run=`` points at, opened: a run's checkpoint with its tokenizer and held-out text, or an export."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitnet_train.commands.console import loudly, make_console
from bitnet_train.config import Config
from bitnet_train.data.prepare import shard_folder
from bitnet_train.data.shards import MANIFEST, TokenArray, load_manifest, verify_shards
from bitnet_train.data.tokenizer import TextTokenizer, load_tokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import CanonicalCheckpoint, open_checkpoint
from bitnet_train.export.folder import read_step
from bitnet_train.export.held_out import HeldOut
from bitnet_train.export.writers import is_export, load_any_export
from bitnet_train.kernels.backend import Backend, choose_backend
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import block_count
from bitnet_train.quant.progress import quant_state
from bitnet_train.quant.spec import QuantSpec, build_spec
from bitnet_train.training.run_folder import RunFolder


@dataclass(frozen=True)
class OpenedRun:
    """A run's last checkpoint in canonical form, and its tokenizer."""

    folder: RunFolder
    canonical: CanonicalCheckpoint
    tokenizer: TextTokenizer

    def held_out(self, cfg: Config) -> HeldOut:
        """The tokens that verification compares on: the first ``export.verify_tokens`` of the validation shards."""
        ids = self.validation_ids(cfg, cfg.export.verify_tokens)
        return HeldOut(ids, cfg.text.sequence_length, cfg.generate.prompt)

    def validation_ids(self, cfg: Config, limit: int | None) -> Tensor:
        """The first ``limit`` + 1 ids of the validation shards, int64 (n,), so that ``limit`` are predicted; None: all.

        Raises ConfigError when the run's token shards are gone or changed.
        """
        shards = shard_folder(cfg.text, Path(cfg.paths.data))
        if not (shards / MANIFEST).is_file():
            raise ConfigError(
                f"The token shards of {self.folder.path}, {shards}, do not exist: work from the folder that it was "
                "trained in, give paths.data=FOLDER, or make them again with command=prepare."
            )
        manifest = load_manifest(shards)
        if self.canonical.fingerprint not in (None, manifest.fingerprint):
            raise ConfigError(
                f"{shards} does not hold the token shards that {self.folder.path} was trained on (fingerprints differ)."
            )
        verify_shards(shards, manifest, cfg.text.verify)
        tokens = TokenArray(shards, manifest, "val")
        return torch.from_numpy(tokens.slice(0, len(tokens) if limit is None else min(limit + 1, len(tokens))))

    def at_step_of(self, export: Path, cfg: Config) -> CanonicalCheckpoint:
        """The checkpoint that ``export`` says it was made from; the last one when it does not say.

        Raises ConfigError when the run no longer keeps that step.
        """
        step = read_step(export)
        if step is None or step == self.canonical.step:
            return self.canonical
        path = self.folder.checkpoints / f"step-{step:08d}.ckpt"
        if not path.is_file():
            raise ConfigError(
                f"{export} was made from step {step}, whose checkpoint {self.folder.path} no longer keeps "
                f"(its last one is step {self.canonical.step}): export again."
            )
        return _open(path, cfg)


def open_run(cfg: Config) -> OpenedRun:
    """The run at ``cfg.run``. Raises ConfigError when it has no checkpoint or no tokenizer."""
    assert cfg.run is not None
    folder = RunFolder(Path(cfg.run))
    if not folder.config_file.is_file():
        inside = folder.path.parent.parent
        hint = f"; the run is {inside}" if is_export(folder.path) and (inside / "config.yaml").is_file() else ""
        raise ConfigError(f"run={cfg.run} is no run folder (it has no config.yaml){hint}.")
    checkpoint = folder.good_checkpoint(loudly(make_console()))
    if checkpoint is None:
        raise ConfigError(f"The run {cfg.run} has saved no checkpoint yet: train it first.")
    canonical = _open(checkpoint, cfg)
    return OpenedRun(folder, canonical, load_tokenizer(folder.tokenizer))


def _open(path: Path, cfg: Config) -> CanonicalCheckpoint:
    """The checkpoint of a run as its last step computed. Raises ConfigError while its weights are not quantised yet."""
    return open_checkpoint(path, cfg.decoder, build_spec(cfg.quant), lambda step: spec_after(cfg, path, step))


def spec_after(cfg: Config, path: Path, step: int) -> QuantSpec:
    """What the last of ``step`` steps, that checkpoint ``path`` is of, computed with.

    Raises ConfigError while the weights are not quantised yet.
    """
    total = max(1, cfg.trainer.max_steps)
    spec, blocks = build_spec(cfg.quant), block_count(cfg.model)
    state = quant_state(cfg.quant.progressive, spec, max(0, step - 1), total, blocks)
    if not state.complete:
        raise ConfigError(
            f"{path} is of step {step}, where the weights are still on their way to codes "
            f"(quant.progressive={cfg.quant.progressive.name}): train the run to its end."
        )
    return state.spec


@dataclass(frozen=True)
class LoadedModel:
    """A float32 model that is ready to evaluate and to generate, its tokenizer, and what it is, in words."""

    decoder: Decoder
    tokenizer: TextTokenizer
    description: str
    # None for an export.
    run: OpenedRun | None


def load_model(cfg: Config) -> LoadedModel:
    """The model of ``cfg.run``, which is a run's folder (its last checkpoint) or an export's. Raises ConfigError."""
    assert cfg.run is not None
    folder = Path(cfg.run)
    device, backend = place(cfg)
    if is_export(folder):
        decoder, tokenizer = load_any_export(folder, device, backend)
        return LoadedModel(decoder, tokenizer, f"export {folder}", None)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"run={cfg.run} is neither a run (no config.yaml) nor an export (no config.json, no GGUF file)."
        )
    run = open_run(cfg)
    description = f"run {folder}, step {run.canonical.step}"
    return LoadedModel(run.canonical.decoder(device, backend), run.tokenizer, description, run)


def place(cfg: Config) -> tuple[torch.device, Backend]:
    """Where models run, the GPU if there is one, and the kernel backend of the configuration for it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, choose_backend(device, cfg.kernels.backend).backend


def read_text(path: Path, key: str) -> str:
    """The content of a UTF-8 text file. Raises ConfigError, naming ``key``, for a missing, empty or other file."""
    try:
        # Bytes first: reading as text would turn \\r\\n into \\n, which is one byte less to predict.
        text = path.expanduser().read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error.strerror}.") from None
    if not text:
        raise ConfigError(f"{key}={path} is empty.")
    return text
