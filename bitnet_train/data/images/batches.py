"""Which image, changed how, is the n-th training sample: a pure function of the seed and n.

As for text, nothing has to be stored or replayed to resume: the state is the number of samples consumed.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bitnet_train.data.images.config import AugmentationConfig, ImageDataConfig
from bitnet_train.data.images.sources import ImageSet
from bitnet_train.data.sampler import ENDLESS, random_words, sample_indices

# What a random word of a training sample is for.
TOP, LEFT, SIDE = 1, 2, 3

# (images float32 (batch, channels, size, size), classes int64 (batch,))
Batch = tuple[Tensor, Tensor]


class SampleNumbers(Sampler[list[int]]):
    """Batches of ``batch`` numbers of training samples, from ``consumed`` on; endless.

    With ``world`` processes, process ``rank`` takes every world-th batch.
    """

    def __init__(self, batch: int, consumed: int, rank: int = 0, world: int = 1) -> None:
        self.batch, self.consumed, self.rank, self.world = batch, consumed, rank, world

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed + self.rank * self.batch
        while True:
            yield list(range(first, first + self.batch))
            first += self.world * self.batch


class TrainingImages(Dataset[Batch]):
    """Item n is the n-th training sample: every epoch visits all images once, in an order of its own.

    A batch of numbers is read at once (``__getitems__``), so the loader has nothing to collate.
    """

    def __init__(self, images: ImageSet, cfg: ImageDataConfig, seed: int) -> None:
        self.images, self.cfg, self.seed = images, cfg, seed

    def __getitems__(self, numbers: list[int]) -> Batch:
        chosen = sample_indices(np.array(numbers), len(self.images), self.seed)
        pixels = augment(self.images.pixels[chosen], self.cfg.augmentation, self.seed, numbers)
        return normalised(pixels, self.cfg), torch.from_numpy(self.images.labels[chosen])

    def __getitem__(self, number: int) -> Batch:
        pixels, labels = self.__getitems__([number])
        return pixels[0], labels[0]


def augment(pixels: np.ndarray, cfg: AugmentationConfig, seed: int, numbers: list[int]) -> np.ndarray:
    """Random crops and mirror images of pixels uint8 (n, size, size, channels), each by its own sample number."""
    if not cfg.crop_padding and not cfg.flip:
        return pixels
    pad, size = cfg.crop_padding, pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    # A word per sample and purpose. Places are few, so the remainder is as good as uniform.
    top, left, side = (random_words(np.array(numbers), seed, purpose) for purpose in (TOP, LEFT, SIDE))
    top, left = (words % np.uint64(2 * pad + 1) for words in (top, left))
    rows = top[:, None].astype(np.int64) + np.arange(size)
    columns = left[:, None].astype(np.int64) + np.arange(size)
    mirrored = (side >> np.uint64(63)).astype(bool) & cfg.flip
    columns[mirrored] = columns[mirrored, ::-1]
    changed: np.ndarray = padded[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return changed


def normalised(pixels: np.ndarray, cfg: ImageDataConfig) -> Tensor:
    """pixels uint8 (n, size, size, channels) as float32 (n, channels, size, size): ``(pixel / 255 - mean) / std``."""
    mean, std = (np.asarray(values, dtype=np.float32) for values in (cfg.mean, cfg.std))
    values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))


def in_order(images: ImageSet, cfg: ImageDataConfig, batch: int = 512) -> Iterator[Batch]:
    """All images of a set in their order, as they are."""
    for first in range(0, len(images), batch):
        part = slice(first, first + batch)
        yield normalised(images.pixels[part], cfg), torch.from_numpy(images.labels[part])
