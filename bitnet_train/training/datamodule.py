"""The Lightning data module: shards to batches, and the count of samples consumed."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from bitnet_train.data.config import DataConfig
from bitnet_train.data.sampler import ConsumedBatchSampler
from bitnet_train.data.shards import Manifest, TokenArray
from bitnet_train.data.windows import Windows
from bitnet_train.errors import ConfigError

VALIDATION_TOKENS_PER_BATCH = 8192


def leave_signals_to_the_run(_: int) -> None:
    """In a loader process: ignore what a terminal's Ctrl-C or a cluster's SIGTERM sends to the whole process group.

    The run itself stops after its step and saves; it needs its loaders until then, and ends them by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ShardDataModule(L.LightningDataModule):
    """Training and validation windows of prepared shards.

    Args:
        cfg: the data settings.
        folder: the shard folder, with its manifest.
        batch_sequences: sequences per optimizer step.
        micro_batch: sequences per forward.
        seed: chooses the order of the windows.
        resume_at: samples behind which to start, in place of those that a checkpoint says were consumed.
    """

    def __init__(
        self,
        cfg: DataConfig,
        folder: Path,
        manifest: Manifest,
        batch_sequences: int,
        micro_batch: int,
        seed: int,
        resume_at: int | None = None,
    ) -> None:
        super().__init__()
        self.cfg, self.manifest, self.seed = cfg, manifest, seed
        self.batch_sequences, self.micro_batch = batch_sequences, micro_batch
        self.resume_at = resume_at
        self.consumed, self._first_step = resume_at or 0, 0
        self.train_windows = Windows(TokenArray(folder, manifest, "train"), cfg.sequence_length)
        self.val_windows = Windows(
            TokenArray(folder, manifest, "val"), cfg.sequence_length, partial=True, limit=cfg.validation_tokens
        )
        if len(self.train_windows) == 0:
            raise ConfigError(
                f"The training text is {len(self.train_windows.tokens)} tokens, less than one sequence of "
                f"data.sequence_length={cfg.sequence_length}: add text or shorten the sequences."
            )

    def train_dataloader(self) -> DataLoader[Tensor]:
        sampler = ConsumedBatchSampler(len(self.train_windows), self.micro_batch, self.seed, self.consumed)
        return DataLoader(
            self.train_windows,
            batch_sampler=sampler,
            num_workers=self.cfg.workers,
            pin_memory=self._on_cuda(),
            worker_init_fn=leave_signals_to_the_run,
        )

    def val_batches(self) -> list[list[int]]:
        """Window numbers of each validation batch; the short last window is a batch of its own."""
        batch = max(1, VALIDATION_TOKENS_PER_BATCH // self.cfg.sequence_length)
        count = len(self.val_windows)
        full = count if (self.val_windows.end - 1) % self.cfg.sequence_length == 0 else count - 1
        batches = [list(range(i, min(i + batch, full))) for i in range(0, full, batch)]
        return [*batches, [full]] if full < count else batches

    def validation_loader(self) -> DataLoader[Tensor]:
        """All validation windows in order (not ``val_dataloader``: a callback validates, between optimizer steps)."""
        return DataLoader(self.val_windows, batch_sampler=self.val_batches())

    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def state_dict(self) -> dict[str, Any]:
        # Counted from where this process started: a fork may have begun with another batch.
        step = self.trainer.global_step if self.trainer is not None else self._first_step
        consumed = self.consumed + (step - self._first_step) * self.batch_sequences
        return {"step": step, "consumed": consumed, "fingerprint": self.manifest.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"] if self.resume_at is None else self.resume_at
        self._first_step = state["step"]
