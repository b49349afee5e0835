"""The Lightning data module of images: batches, and the count of samples consumed."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from bitnet_train.data.images.batches import Batch, SampleNumbers, TrainingImages, in_order
from bitnet_train.data.images.config import ImageDataConfig
from bitnet_train.data.images.sources import ImageSplits
from bitnet_train.data.sampler import sample_index
from bitnet_train.training.batch_warmup import BatchPlan
from bitnet_train.training.datamodule import leave_signals_to_the_run
from bitnet_train.training.distributed import group


def _as_it_is(batch: Any) -> Any:
    return batch


class ImageDataModule(L.LightningDataModule):
    """Training and validation images.

    Args:
        cfg: the data settings.
        splits: the images.
        plan: images per optimizer step and per forward.
        seed: chooses the order of the images and their random changes.
        resume_at: samples behind which to start, in place of those that a checkpoint says were consumed.
    """

    def __init__(
        self, cfg: ImageDataConfig, splits: ImageSplits, plan: BatchPlan, seed: int, resume_at: int | None = None
    ) -> None:
        super().__init__()
        self.cfg, self.splits, self.plan, self.seed = cfg, splits, plan, seed
        self.fingerprint = splits.fingerprint
        self.resume_at = resume_at
        self.consumed, self._first_step = resume_at or 0, 0

    def samples_before(self, step: int) -> int:
        """Training samples before optimizer step ``step`` (from 0)."""
        # Counted from where this process started: a fork may have begun with another batch.
        return self.consumed + self.plan.consumed(step) - self.plan.consumed(self._first_step)

    def place_of(self, sample: int) -> dict[str, Any]:
        """The number of a training sample's image among the training images, and its class."""
        image = sample_index(sample, len(self.splits.train), self.seed)
        return {"image": image, "class": int(self.splits.train.labels[image])}

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(
            TrainingImages(self.splits.train, self.cfg, self.seed),
            batch_sampler=SampleNumbers(self.plan.micro_batch, self.consumed, group.rank(), group.world()),
            collate_fn=_as_it_is,
            num_workers=self.cfg.workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=leave_signals_to_the_run,
        )

    def validation_batches(self) -> Iterator[Batch]:
        """All validation images in order."""
        return in_order(self.splits.validation, self.cfg)

    def state_dict(self) -> dict[str, Any]:
        step = self.trainer.global_step if self.trainer is not None else self._first_step
        return {"step": step, "consumed": self.samples_before(step), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"] if self.resume_at is None else self.resume_at
        self._first_step = state["step"]
