"""Images with their classes, read into memory: scikit-learn's digits, or a data set in the format of the hub."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_train.data.images.config import DigitsSource, HubSource, ImageDataConfig, ImageSourceConfig, check_source
from bitnet_train.errors import ConfigError


@dataclass(frozen=True)
class ImageSet:
    """Pixels uint8 (n, size, size, channels) and classes int64 (n,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "ImageSet":
        """Those images for which ``chosen`` (n,) is true."""
        return ImageSet(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageSplits:
    """The images to train on, to validate with and to test on, and a digest of the first two and of their order."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    @property
    def fingerprint(self) -> str:
        """A digest of the training and the validation images, which a run is continued with."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(repr(part.pixels.shape).encode())
            digest.update(np.ascontiguousarray(part.pixels).tobytes())
            digest.update(part.labels.tobytes())
        return digest.hexdigest()


def held_out(labels: np.ndarray, every: int) -> np.ndarray:
    """True (n,) for the last of every ``every`` images of each class, in their order: a split that no seed changes."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[every - 1 :: every]] = True
    return chosen


def load_images(cfg: ImageDataConfig) -> ImageSplits:
    """The images of a configuration, checked. Raises ConfigError when they are missing or are not what it says."""
    check_source(cfg)
    train, validation, test = SOURCES[type(cfg.source)](cfg)
    if validation is None:
        chosen = held_out(train.labels, cfg.validation_every)
        train, validation = train.take(~chosen), train.take(chosen)
    splits = ImageSplits(train, validation, test)
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        _check(part, name, cfg)
    return splits


def _check(part: ImageSet, name: str, cfg: ImageDataConfig) -> None:
    if len(part) == 0:
        raise ConfigError(f"data/source={cfg.source.name} gives no {name} images.")
    wanted = (cfg.image_size, cfg.image_size, cfg.channels)
    if part.pixels.shape[1:] != wanted:
        height, width, channels = part.pixels.shape[1:]
        raise ConfigError(
            f"The {name} images are {height} x {width} pixels with {channels} channels, and data.image_size="
            f"{cfg.image_size} data.channels={cfg.channels}: set what they are."
        )
    low, high = int(part.labels.min()), int(part.labels.max())
    if low < 0 or high >= cfg.classes:
        raise ConfigError(
            f"The {name} images have classes from {low} to {high}, and data.classes={cfg.classes} allows 0 to "
            f"{cfg.classes - 1}: set data.classes, or another data.source.label_field."
        )


# (training images, validation images or None to hold some of those out, test images)
Loaded = tuple[ImageSet, ImageSet | None, ImageSet]


def _digits(cfg: ImageDataConfig) -> Loaded:
    """scikit-learn's digits, the test set of UCI's "Optical recognition of handwritten digits"; pixels 0 to 16."""
    from sklearn.datasets import load_digits

    assert isinstance(cfg.source, DigitsSource)
    found = load_digits()
    pixels = np.rint(found.images[..., None] * (255 / 16)).astype(np.uint8)
    everything = ImageSet(pixels, found.target.astype(np.int64))
    test = held_out(everything.labels, cfg.source.test_every)
    return everything.take(~test), None, everything.take(test)


def _hub(cfg: ImageDataConfig) -> Loaded:
    source = cfg.source
    assert isinstance(source, HubSource)
    named = {"train_split": source.train_split, "test_split": source.test_split}
    if source.validation_split is not None:
        named["validation_split"] = source.validation_split
    splits = _open_hub(source)
    missing = next((key for key, name in named.items() if name not in splits), None)
    if missing is not None:
        raise ConfigError(
            f"data.source.path={source.path} has no split '{named[missing]}': set data.source.{missing} to one of "
            f"{', '.join(splits)}."
        )
    parts = {key: _decoded(splits[name], source, cfg) for key, name in named.items()}
    return parts["train_split"], parts.get("validation_split"), parts["test_split"]


def _open_hub(source: HubSource) -> Any:
    """Split name -> table of ``datasets``."""
    import datasets

    folder = Path(source.path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():  # what save_to_disk wrote
            return datasets.load_from_disk(str(folder))
        where = str(folder) if folder.is_dir() else source.path
        return datasets.load_dataset(where, source.subset)
    except Exception as error:  # a network, a damaged file or a name that does not exist: anything
        lines = str(error).strip().splitlines()
        reason = lines[0][:200].rstrip(". ") if lines else type(error).__name__
        raise ConfigError(
            f"data.source.path={source.path} cannot be loaded ({reason}): give a name of the Hugging Face hub, or a "
            "folder of that format."
        ) from None


def _decoded(table: Any, source: HubSource, cfg: ImageDataConfig) -> ImageSet:
    import datasets

    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    field = source.image_field or (columns[0] if len(columns) == 1 else None)
    if field is None:
        raise ConfigError(
            f"data.source.path={source.path} has {len(columns)} columns of images: set data.source.image_field to one "
            f"of {', '.join(columns or table.column_names)}."
        )
    for key, name in (("image_field", field), ("label_field", source.label_field)):
        if name not in table.column_names:
            raise ConfigError(
                f"data.source.path={source.path} has no column '{name}': set data.source.{key} to one of "
                f"{', '.join(table.column_names)}."
            )
    labels = _labels(table, source)
    pixels = np.empty((len(labels), cfg.image_size, cfg.image_size, cfg.channels), dtype=np.uint8)
    for number, image in enumerate(_unpacked(table.select_columns([field]), source)):
        array = _pixels(image[field], cfg.channels)
        if array.shape != pixels.shape[1:]:
            height, width, _ = array.shape
            raise ConfigError(
                f"Image {number} of {source.path} is {height} x {width} pixels, and data.image_size={cfg.image_size}: "
                "set what the images are; they must all be of one size and square."
            )
        pixels[number] = array
    return ImageSet(pixels, labels)


def _unpacked(table: Any, source: HubSource) -> Iterator[Any]:
    """The rows, decoded one by one. Raises ConfigError for a picture that is damaged or unpacks to any size."""
    rows = iter(table)
    for number in range(len(table)):
        try:
            row = next(rows)
        except Exception as error:  # Pillow has many, and one for bombs
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"Image {number} of {source.path} cannot be decoded ({lines[0][:200]}).") from None
        yield row


def _labels(table: Any, source: HubSource) -> np.ndarray:
    """The classes, int64 (n,). Raises ConfigError for a column of anything else."""
    try:
        labels = np.asarray(table.select_columns([source.label_field])[source.label_field][:])
        whole = labels.ndim == 1 and labels.dtype.kind in "iu"
    except ValueError:  # lists of different lengths
        whole = False
    if not whole:
        raise ConfigError(
            f"data.source.label_field={source.label_field} of {source.path} does not hold whole numbers: choose "
            "another column."
        )
    return labels.astype(np.int64)


def _pixels(image: Any, channels: int) -> np.ndarray:
    """An image of PIL, or an array (height, width[, channels]) of bytes, as uint8 (height, width, channels)."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            if array.dtype.kind not in "iu" or array.size == 0 or array.min() < 0 or array.max() > 255:
                raise ConfigError("The images are neither pictures nor arrays of whole numbers from 0 to 255.")
            array = array.astype(np.uint8)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
            raise ConfigError(f"An image is an array of shape {array.shape}: it must be (height, width[, channels]).")
        image = Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)
    converted = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return converted[..., None] if channels == 1 else converted


# Add a source: a dataclass in IMAGE_SOURCE_CONFIGS, and its reader here.
SOURCES: dict[type[ImageSourceConfig], Callable[[ImageDataConfig], Loaded]] = {DigitsSource: _digits, HubSource: _hub}
