"""Batches of images are pure functions of the seed and the sample number."""

from itertools import islice

import numpy as np
import pytest
import torch

from bitnet_train.data.images.batches import SampleNumbers, TrainingImages, augment, in_order, normalised
from bitnet_train.data.images.config import AugmentationConfig, ImageDataConfig
from bitnet_train.data.images.sources import ImageSet
from bitnet_train.data.sampler import random_words, sample_index, sample_indices

PIXELS = np.random.default_rng(0).integers(0, 256, size=(23, 5, 5, 3), dtype=np.uint8)
IMAGES = ImageSet(PIXELS, np.arange(23) % 4)
PLAIN = ImageDataConfig(image_size=5, channels=3, mean=[0.5, 0.25, 0.0], std=[0.5, 1.0, 2.0])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1302, 54_000])
@pytest.mark.parametrize("seed", [0, 1, 9])
def test_many_indices_at_once_are_the_same_as_one_by_one(size: int, seed: int) -> None:
    numbers = np.concatenate([np.arange(40), np.arange(size - 3, size + 40), 10**9 + np.arange(5)])
    numbers = numbers[numbers >= 0]
    assert sample_indices(numbers, size, seed).tolist() == [sample_index(int(n), size, seed) for n in numbers]


def test_random_words_are_spread_and_their_own() -> None:
    words = random_words(np.arange(4000), 1, 2)
    assert len(set(words.tolist())) == 4000
    counts = np.bincount((words % np.uint64(9)).astype(int), minlength=9)
    assert abs(counts - 4000 / 9).max() < 80
    for other in (random_words(np.arange(4000), 2, 2), random_words(np.arange(4000), 1, 3)):
        assert not set(words.tolist()) & set(other.tolist())
        assert abs(np.corrcoef(words.astype(float), other.astype(float))[0, 1]) < 0.06


def test_an_epoch_is_every_image_once() -> None:
    data = TrainingImages(IMAGES, PLAIN, seed=1)
    batches = islice(SampleNumbers(6, 0), 8)
    labels = torch.cat([data.__getitems__(numbers)[1] for numbers in batches])[:46]
    for epoch in labels.split(23):
        assert sorted(epoch.tolist()) == sorted(IMAGES.labels.tolist())


@pytest.mark.parametrize("augmentation", [AugmentationConfig(), AugmentationConfig(crop_padding=2, flip=True)])
def test_samples_do_not_depend_on_the_batches_they_come_in(augmentation: AugmentationConfig) -> None:
    cfg = ImageDataConfig(**{**vars(PLAIN), "augmentation": augmentation})
    data = TrainingImages(IMAGES, cfg, seed=4)
    first, then = (data.__getitems__(list(range(*span))) for span in ((0, 10), (10, 30)))
    whole = data.__getitems__(list(range(30)))
    assert torch.equal(torch.cat([first[0], then[0]]), whole[0])
    assert torch.equal(torch.cat([first[1], then[1]]), whole[1])
    assert torch.equal(data[17][0], whole[0][17])
    assert next(iter(SampleNumbers(5, 20))) == [20, 21, 22, 23, 24]


def test_crops_and_mirror_images_are_those_of_the_padded_image() -> None:
    numbers = list(range(23))
    changed = augment(PIXELS, AugmentationConfig(crop_padding=1, flip=True), 3, numbers)
    padded = np.pad(PIXELS, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for image, whole in zip(changed, padded, strict=True):
        places = {
            (top, left, side)
            for top in range(3)
            for left in range(3)
            for side in (1, -1)
            if np.array_equal(whole[top : top + 5, left : left + 5][:, ::side], image)
        }
        assert len(places) == 1
        seen |= places
    assert len(seen) > 10
    assert {side for *_, side in seen} == {1, -1}
    assert not np.array_equal(changed, augment(PIXELS, AugmentationConfig(crop_padding=1, flip=True), 4, numbers))
    unmirrored = augment(PIXELS, AugmentationConfig(flip=True), 3, numbers)
    assert {np.array_equal(a, b) for a, b in zip(unmirrored, PIXELS, strict=True)} == {True, False}


def test_pixels_are_normalised_by_channel() -> None:
    values = normalised(PIXELS[:2], PLAIN)
    assert values.shape == (2, 3, 5, 5)
    assert values.dtype is torch.float32
    for channel, (mean, std) in enumerate(zip(PLAIN.mean, PLAIN.std, strict=True)):
        wanted = (PIXELS[:2, :, :, channel] / 255 - mean) / std
        np.testing.assert_allclose(values[:, channel].numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_evaluation_sees_every_image_in_order() -> None:
    labels = torch.cat([labels for _, labels in in_order(IMAGES, PLAIN, batch=10)])
    assert labels.tolist() == IMAGES.labels.tolist()
