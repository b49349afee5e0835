"""The Lightning data module of images: batches, and the count of samples consumed."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from bitnet_train.data.images.batches import Batch, SampleNumbers, TrainingImages, in_order
from bitnet_train.data.images.config import ImageDataConfig
from bitnet_train.data.images.sources import ImageSplits
from bitnet_train.training.config import BatchPlan
from bitnet_train.training.datamodule import leave_signals_to_the_run


def _as_it_is(batch: Any) -> Any:
    return batch


class ImageDataModule(L.LightningDataModule):
    """Training and validation images.

    Args:
        cfg: the data settings.
        splits: the images.
        plan: images per optimizer step and per forward.
        seed: chooses the order of the images and their random changes.
    """

    def __init__(self, cfg: ImageDataConfig, splits: ImageSplits, plan: BatchPlan, seed: int) -> None:
        super().__init__()
        self.cfg, self.splits, self.plan, self.seed = cfg, splits, plan, seed
        self.fingerprint = splits.fingerprint
        self.consumed = self._first_step = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(
            TrainingImages(self.splits.train, self.cfg, self.seed),
            batch_sampler=SampleNumbers(self.plan.micro_batch, self.consumed),
            collate_fn=_as_it_is,
            num_workers=self.cfg.workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=leave_signals_to_the_run,
        )

    def validation_batches(self) -> Iterator[Batch]:
        """All validation images in order."""
        return in_order(self.splits.validation, self.cfg)

    def state_dict(self) -> dict[str, Any]:
        # Counted from where this process started: a fork may have begun with another batch.
        step = self.trainer.global_step if self.trainer is not None else self._first_step
        consumed = self.consumed + (step - self._first_step) * self.plan.batch_sequences
        return {"step": step, "consumed": consumed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed, self._first_step = state["consumed"], state["step"]
