"""Sources of images: the digits, and folders in the format of the hub."""

from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from bitnet_train.data.images import config as config_module
from bitnet_train.data.images.config import (
    AugmentationConfig,
    DigitsSource,
    HubSource,
    ImageDataConfig,
    check_images,
    check_source,
)
from bitnet_train.data.images.sources import held_out, load_images
from bitnet_train.errors import ConfigError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def arrays(count: int, size: int, channels: int) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    return [
        random.integers(0, 256, (size, size, channels)[: 2 if channels == 1 else 3], np.uint8) for _ in range(count)
    ]


def table(count: int, size: int = 6, channels: int = 1, image: str = "image", label: str = "label") -> Any:
    pictures = [Image.fromarray(array) for array in arrays(count, size, channels)]
    features = datasets.Features({image: datasets.Image(), label: datasets.Value("int64")})
    return datasets.Dataset.from_dict({image: pictures, label: [i % 4 for i in range(count)]}, features=features)


Make = Callable[..., ImageDataConfig]


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    """Writes train (40 images) and test (12) as parquet files; the configuration that reads them."""

    def make(
        channels: int = 1, image: str = "image", label: str = "label", size: int = 6, **changes: Any
    ) -> ImageDataConfig:
        path = tmp_path / "set"
        path.mkdir(exist_ok=True)
        for split, count in (("train", 40), ("test", 12)):
            table(count, size, channels, image, label).to_parquet(path / f"{split}-00000-of-00001.parquet")
        source = {"path": str(path), "label_field": label, **changes.pop("source", {})}
        fields = {"image_size": size, "channels": channels, "classes": 4, "validation_every": 5, **changes}
        many = {"mean": [0.5] * fields["channels"], "std": [0.5] * fields["channels"]}
        return ImageDataConfig(source=HubSource(**source), **{**many, **fields})

    return make


def test_the_digits_are_split_the_same_for_everybody() -> None:
    cfg = ImageDataConfig(source=DigitsSource())
    splits = load_images(cfg)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1302, 140, 355)
    assert splits.train.pixels.shape[1:] == (8, 8, 1)
    assert splits.train.pixels.max() == 255
    for part in (splits.train, splits.validation, splits.test):
        counts = np.bincount(part.labels, minlength=10)
        assert counts.min() >= 0.9 * counts.max()
    seen = {
        image.tobytes() + bytes([label]) for image, label in zip(splits.train.pixels, splits.train.labels, strict=True)
    }
    others = [
        image.tobytes() + bytes([label]) for image, label in zip(splits.test.pixels, splits.test.labels, strict=True)
    ]
    assert not seen & set(others)
    assert splits.fingerprint == load_images(cfg).fingerprint
    assert splits.fingerprint != load_images(ImageDataConfig(validation_every=9)).fingerprint


def test_held_out_images_are_the_last_of_each_round_of_a_class() -> None:
    labels = np.array([0, 1, 0, 0, 1, 0, 0, 1, 1, 2])
    assert held_out(labels, 2).nonzero()[0].tolist() == [2, 4, 5, 8]


@pytest.mark.parametrize(("channels", "image", "label"), [(1, "image", "label"), (3, "img", "fine_label")])
def test_parquet_files_of_a_folder_are_read_as_they_are(folder: Make, channels: int, image: str, label: str) -> None:
    splits = load_images(folder(channels, image, label))
    wanted = np.stack(arrays(12, 6, channels)).reshape(12, 6, 6, channels)
    assert np.array_equal(splits.test.pixels, wanted)
    assert splits.test.labels.tolist() == [i % 4 for i in range(12)]
    assert (len(splits.train), len(splits.validation)) == (32, 8)


def test_what_save_to_disk_wrote_and_a_validation_split_are_read(tmp_path: Path) -> None:
    parts = {"learn": table(20), "look": table(8), "test": table(4)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = HubSource(path=str(tmp_path / "saved"), train_split="learn", validation_split="look")
    splits = load_images(ImageDataConfig(source=source, image_size=6, classes=4))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 8, 4)


def test_arrays_of_numbers_are_images_too(tmp_path: Path) -> None:
    kind = datasets.Array2D((6, 6), "uint8")
    features = datasets.Features({"image": kind, "label": datasets.Value("int64")})
    rows = {"image": [a.tolist() for a in arrays(20, 6, 1)], "label": [i % 4 for i in range(20)]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    source = HubSource(path=str(tmp_path / "saved"), image_field="image")
    splits = load_images(ImageDataConfig(source=source, image_size=6, classes=4, validation_every=5))
    assert np.array_equal(splits.test.pixels[..., 0], np.stack(arrays(20, 6, 1)))


def test_colour_becomes_grey(folder: Make) -> None:
    colour = load_images(folder(3)).test.pixels
    assert colour.shape[-1] == 3
    cfg = folder(3)
    cfg.channels, cfg.mean, cfg.std = 1, [0.5], [0.5]
    expected = np.asarray(Image.fromarray(colour[0]).convert("L"))
    assert np.array_equal(load_images(cfg).test.pixels[0, :, :, 0], expected)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"image_size": 7}, "6 x 6 pixels"),
        ({"classes": 3}, "classes from 0 to 3"),
        ({"source": {"label_field": "lable"}}, "no column 'lable'"),
        ({"source": {"label_field": "image"}}, "does not hold whole numbers"),
        ({"source": {"image_field": "picture"}}, "no column 'picture'"),
        ({"source": {"test_split": "exam"}}, "no split 'exam'"),
        ({"source": {"train_split": "exam"}}, "data.source.train_split"),
        ({"source": {"subset": "large"}}, "cannot be loaded"),
        ({"source": {"path": "/nowhere/at/all"}}, "is no folder"),
        ({"source": {"path": ""}}, "is empty"),
    ],
)
def test_images_that_are_not_as_the_configuration_says_are_refused(
    folder: Make, changes: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_images(folder(**changes))


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [
        (ImageDataConfig(batch_size=0), "data.batch_size is 0"),
        (ImageDataConfig(channels=2, mean=[0.0] * 2, std=[1.0] * 2), "data.channels is 2"),
        (ImageDataConfig(mean=[0.0, 1.0]), "data.mean has 2 numbers"),
        (ImageDataConfig(std=[0.0]), "data.std"),
        (ImageDataConfig(validation_every=1), "data.validation_every is 1"),
        (ImageDataConfig(augmentation=AugmentationConfig(crop_padding=9)), "crop_padding is 9"),
        (ImageDataConfig(image_size=28), "grey images of 8 x 8"),
        (ImageDataConfig(source=DigitsSource(test_every=1)), "data.source.test_every is 1"),
        (ImageDataConfig(workers=-1), "data.workers is -1"),
        (ImageDataConfig(classes=1), "data.classes is 1"),
    ],
)
def test_settings_out_of_range_are_refused(cfg: ImageDataConfig, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        check_images(cfg)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "find_spec", lambda name: None if name == "sklearn" else util.find_spec(name))
    with pytest.raises(ConfigError, match=r'needs scikit-learn: install with pip install "bitnet-train\[vision\]"'):
        check_source(ImageDataConfig())
