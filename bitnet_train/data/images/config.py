"""Where images come from and how they become batches: the ``data`` part of a recipe that classifies images."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from omegaconf import MISSING

from bitnet_train.data.config import DatasetConfig
from bitnet_train.errors import ConfigError


@dataclass
class ImageSourceConfig:
    """Base of the sources of images; every subclass is an option of the ``data/source`` group."""

    name: str = MISSING


@dataclass
class DigitsSource(ImageSourceConfig):
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries: real images without a download."""

    name: str = "digits"
    # Of each digit's images, in their order, the last of every so many is for testing.
    test_every: int = 5


@dataclass
class HubSource(ImageSourceConfig):
    """A data set of the Hugging Face hub, or a local folder of that format, read by ``datasets``."""

    name: str = "image_hub"
    # Hub name such as ylecun/mnist; or a folder with parquet or image files, or one that save_to_disk wrote.
    path: str = ""
    # Name of the subset ("configuration") where the data set has several.
    subset: str | None = None
    # Column that holds the images; null for the one column of images that there is.
    image_field: str | None = None
    # Column that holds the class, a whole number from 0.
    label_field: str = "label"
    # Split to train on.
    train_split: str = "train"
    # Split for validation; null holds out some images of train_split (data.validation_every).
    validation_split: str | None = None
    # Split that command=evaluate measures on.
    test_split: str = "test"


IMAGE_SOURCE_CONFIGS: dict[str, type[ImageSourceConfig]] = {"digits": DigitsSource, "image_hub": HubSource}


@dataclass
class AugmentationConfig:
    """Random changes of training images, as in arXiv 1512.03385, section 4.2; the same ones in a resumed run."""

    # Pixels of black around the image, of which a random crop of the image's own size is taken; 0 for none.
    crop_padding: int = 0
    # Mirror every other image, at random, left to right.
    flip: bool = False


@dataclass
class ImageDataConfig(DatasetConfig):
    """Images with classes. They are kept in memory as bytes, so this is for data sets of up to some gigabytes."""

    name: str = "images"
    # Where the images come from.
    source: ImageSourceConfig = field(default_factory=DigitsSource)
    # Height and width of the images in pixels; others are refused.
    image_size: int = 8
    # Values per pixel that images are converted to: 1 (grey) or 3 (red, green, blue).
    channels: int = 1
    # Number of classes.
    classes: int = 10
    # Images per optimizer step, over all micro-batches (what trainer.batch_tokens is for text).
    batch_size: int = 128
    # Mean of the pixels from 0 to 1, one per channel; subtracted.
    mean: list[float] = field(default_factory=lambda: [0.0])
    # Standard deviation of the pixels, one per channel; divided by.
    std: list[float] = field(default_factory=lambda: [1.0])
    # Random changes of training images.
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    # Of each class's training images, in their order, the last of every so many is for validation (unless the source
    # names a validation split).
    validation_every: int = 10
    # Loader processes; 0 loads in the training process.
    workers: int = 0


def check_images(cfg: ImageDataConfig) -> None:
    """Raises ConfigError when the settings of the images are out of range or contradict themselves."""
    for name in ("image_size", "batch_size"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"data.{name} is {getattr(cfg, name)}; it must be at least 1.")
    if cfg.classes < 2:
        raise ConfigError(f"data.classes is {cfg.classes}; it must be at least 2.")
    if cfg.channels not in (1, 3):
        raise ConfigError(f"data.channels is {cfg.channels}; use 1 (grey) or 3 (red, green, blue).")
    if cfg.workers < 0:
        raise ConfigError(f"data.workers is {cfg.workers}; it must be 0 or more.")
    for name in ("mean", "std"):
        if len(getattr(cfg, name)) != cfg.channels:
            raise ConfigError(
                f"data.{name} has {len(getattr(cfg, name))} numbers for data.channels={cfg.channels}: give one each."
            )
    if min(cfg.std) <= 0:
        raise ConfigError(f"data.std is {cfg.std}; every number must be positive.")
    if cfg.validation_every < 2:
        raise ConfigError(f"data.validation_every is {cfg.validation_every}; it must be at least 2.")
    if not 0 <= cfg.augmentation.crop_padding <= cfg.image_size:
        raise ConfigError(
            f"data.augmentation.crop_padding is {cfg.augmentation.crop_padding}; it must lie between 0 and "
            f"data.image_size={cfg.image_size}."
        )
    if isinstance(cfg.source, DigitsSource):
        if (cfg.image_size, cfg.channels, cfg.classes) != (8, 1, 10):
            raise ConfigError(
                "data/source=digits has grey images of 8 x 8 pixels in 10 classes: set data.image_size=8 "
                "data.channels=1 data.classes=10."
            )
        if cfg.source.test_every < 2:
            raise ConfigError(f"data.source.test_every is {cfg.source.test_every}; it must be at least 2.")


def check_source(cfg: ImageDataConfig) -> None:
    """Raises ConfigError when the images cannot be read: a package, a name or a folder is missing."""
    source = cfg.source
    if isinstance(source, DigitsSource):
        _need({"sklearn": "scikit-learn"}, "data/source=digits")
    if isinstance(source, HubSource):
        _need({"datasets": "datasets", "PIL": "pillow"}, "data/source=image_hub")
        if not source.path:
            raise ConfigError("data.source.path is empty: give a name of the Hugging Face hub or a folder.")
        path = Path(source.path).expanduser()
        if source.path.startswith((".", "~", "/")) and not path.is_dir():
            raise ConfigError(f"data.source.path={source.path} is no folder.")


def _need(packages: dict[str, str], who: str) -> None:
    missing = [name for module, name in packages.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f'{who} needs {" and ".join(missing)}: install with pip install "bitnet-train[vision]".')
