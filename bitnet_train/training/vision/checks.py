"""Rules that the training of an image classifier must keep. No torch here, so that a mistake is answered at once."""

from bitnet_train.data.images.config import check_images, check_source
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.config import EvaluateConfig
from bitnet_train.nn.config import ActivationCheckpointing
from bitnet_train.nn.layout import check_init_overrides, check_spec
from bitnet_train.nn.vision.config import check_classifier, check_classifier_init
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.config import RunConfig, SamplesConfig
from bitnet_train.training.losses.config import CrossEntropyLoss

# Commands that only a language model has a meaning for, and what stands in their place.
OF_LANGUAGE = {
    "export": "command=evaluate measures its accuracy",
    "verify": "it has no exports",
    "generate": "command=evaluate measures its accuracy",
    "benchmark": "command=estimate says what it costs",
    "convert": "give convert.from= without a recipe",
}
# Commands that read the images.
NEED_IMAGES = ("train", "prepare", "evaluate")


def check_vision(cfg: RunConfig, command: str) -> None:
    """Raises ConfigError when ``cfg``, whose model is a classifier, cannot be trained or has settings that do nothing.

    Also for a ``command`` that works on language models only.
    """
    model, images = cfg.classifier, cfg.images
    if command in OF_LANGUAGE:
        raise ConfigError(
            f"command={command} works on language models; this recipe trains an image classifier: "
            f"{OF_LANGUAGE[command]}."
        )
    check_classifier(model)
    check_images(images)
    for name in ("image_size", "channels", "classes"):
        if getattr(model, name) != getattr(images, name):
            raise ConfigError(
                f"model.{name}={getattr(model, name)} is not data.{name}={getattr(images, name)}: leave it out to "
                "follow the data."
            )
    check_spec(model, build_spec(cfg.quant))
    check_classifier_init(cfg.init, model)
    check_init_overrides(model, cfg.init)
    if command in NEED_IMAGES:
        check_source(images)
    _check_settings_of_text(cfg)


def _check_settings_of_text(cfg: RunConfig) -> None:
    if cfg.trainer.batch_tokens is not None:
        raise ConfigError(
            "trainer.batch_tokens counts tokens of text; images per step are data.batch_size: set "
            "trainer.batch_tokens=null."
        )
    if cfg.trainer.batch_warmup:
        raise ConfigError("trainer.batch_warmup counts tokens of text, and data.batch_size stays: leave it out.")
    if cfg.trainer.activation_checkpointing is not ActivationCheckpointing.none:
        raise ConfigError(
            "trainer.activation_checkpointing is for decoders: leave it out, or use a smaller micro-batch."
        )
    if cfg.trainer.micro_batch == "auto":
        raise ConfigError("trainer.micro_batch=auto is for text: give a number of images, or null for the whole step.")
    if not isinstance(cfg.loss, CrossEntropyLoss):
        raise ConfigError(f"loss={cfg.loss.name} is for language models: use loss=cross_entropy.")
    if cfg.samples not in (SamplesConfig(), SamplesConfig(every_steps=None)):
        raise ConfigError("samples.* writes texts on the way, and an image classifier has none: leave it out.")
    changed = [name for name, value in vars(EvaluateConfig()).items() if getattr(cfg.evaluate, name) != value]
    if changed:
        raise ConfigError(
            f"evaluate.{changed[0]} is for language models; command=evaluate of an image classifier measures the test "
            "images: leave it out."
        )
