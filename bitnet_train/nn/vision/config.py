"""The shapes of the image classifiers: the ``model`` part of a recipe that trains on images."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import II, MISSING

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import (
    FanInInit,
    InitConfig,
    ModelConfig,
    NormalInit,
    Norms,
    check_init,
    check_layers,
    initial_source,
)


class PlainActivation(Enum):
    """The nonlinearity of a layer without a gate."""

    relu = "relu"
    relu2 = "relu2"
    gelu = "gelu"
    silu = "silu"


@dataclass
class ClassifierConfig(ModelConfig):
    """Base of the models that map an image to one of ``classes``."""

    # Height and width of the images in pixels; follows the data.
    image_size: int = II("data.image_size")
    # Values per pixel, 1 for grey and 3 for colour; follows the data.
    channels: int = II("data.channels")
    # Number of classes, the rows of the head; follows the data.
    classes: int = II("data.classes")
    # Width of the layers between the first and the last.
    hidden: int = MISSING
    # Depth; what it counts is the model's own.
    layers: int = MISSING
    # Quantise the first and the last linear layer too. They stay floats as a rule, as a language model's embedding and
    # head do: they hold few of the weights and ternary ones cost accuracy there.
    quantise_ends: bool = False
    # Epsilon of every RMSNorm.
    norm_eps: float = 1e-5

    @property
    def pixels(self) -> int:
        """Values of one image."""
        return self.image_size**2 * self.channels


@dataclass
class MlpConfig(ClassifierConfig):
    """Fully connected layers on the flattened image."""

    name: str = "mlp"
    # Width of the layers between the first and the last.
    hidden: int = 512
    # Linear layers, the first (pixels -> hidden) and the last (hidden -> classes) included.
    layers: int = 4
    # Nonlinearity after every layer but the last: relu, relu2, gelu or silu.
    activation: PlainActivation = PlainActivation.relu
    # An RMSNorm before every layer but the first, fused with its input quantiser.
    norm: bool = True


@dataclass
class VitConfig(ClassifierConfig):
    """A vision transformer (arXiv 2010.11929) with RMSNorm, learned positions and mean pooling, without biases."""

    name: str = "vit"
    # Side of the square patches that become tokens, in pixels.
    patch: int = 4
    # Width of the residual stream.
    hidden: int = 128
    # Number of blocks.
    layers: int = 6
    # Attention heads; the head dimension is hidden / heads.
    heads: int = 4
    # Inner width of the FFN.
    ffn: int = 512
    # Nonlinearity of the FFN: relu, relu2, gelu or silu.
    activation: PlainActivation = PlainActivation.gelu
    # RMSNorm placement: pre (before attention and FFN) or pre_sub (again before o_proj and down_proj, as BitNet 2B4T).
    norms: Norms = Norms.pre_sub

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def patch_pixels(self) -> int:
        """Values of one patch."""
        return self.patch**2 * self.channels

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


VISION_CONFIGS: dict[str, type[ClassifierConfig]] = {"mlp": MlpConfig, "vit": VitConfig}


def check_classifier(cfg: ClassifierConfig) -> None:
    """Raises ConfigError when the numbers of ``cfg`` do not make a classifier."""
    names = ("hidden", "layers", "heads", "ffn", "patch", "image_size", "channels", "classes")
    for name in names:
        if getattr(cfg, name, 1) < 1:
            raise ConfigError(f"model.{name} is {getattr(cfg, name)}; it must be at least 1.")
    check_layers(cfg.layers)
    if cfg.classes < 2:
        raise ConfigError("model.classes is 1; there is nothing to tell apart with fewer than 2.")
    if cfg.norm_eps <= 0:
        raise ConfigError(f"model.norm_eps is {cfg.norm_eps}; it must be positive.")
    if isinstance(cfg, MlpConfig) and cfg.layers < 2:
        raise ConfigError("model.layers is 1; the first and the last layer are two.")
    if isinstance(cfg, MlpConfig) and cfg.layers == 2 and not cfg.quantise_ends:
        raise ConfigError(
            "model.layers=2 leaves no layer between the first and the last, which stay floats: use 3 or more, or "
            "model.quantise_ends=true."
        )
    if isinstance(cfg, VitConfig):
        if cfg.norms is Norms.inside:
            raise ConfigError("model.norms=inside is for language models: use pre or pre_sub.")
        if cfg.image_size % cfg.patch:
            raise ConfigError(
                f"model.patch={cfg.patch} does not divide the image size model.image_size={cfg.image_size}: choose a "
                "divisor."
            )
        if cfg.hidden % cfg.heads:
            raise ConfigError(
                f"model.heads={cfg.heads} does not divide model.hidden={cfg.hidden}: choose a divisor of {cfg.hidden}."
            )


def check_classifier_init(init: InitConfig, cfg: ClassifierConfig) -> None:
    """Raises ConfigError for settings of ``init`` that are out of range or do nothing in this classifier."""
    if initial_source(init) is not None:
        raise ConfigError("init.from= reads language models; this recipe trains an image classifier: leave it out.")
    if isinstance(cfg, MlpConfig):
        if type(init) not in (NormalInit, FanInInit):
            raise ConfigError(
                f"init={init.name} scales the layers that write to a residual stream, and model=mlp has none: use "
                "init=normal or init=fan_in."
            )
        if init.sub_norm_gain != 1.0:
            raise ConfigError("init.sub_norm_gain has no effect on an mlp, which has no sub-norms: set it to 1.")
    check_init(init, cfg.norms if isinstance(cfg, VitConfig) else Norms.pre)
