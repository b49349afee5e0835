"""What a finished run is written as: the ``export`` part of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

from bitnet_train.errors import ConfigError
from bitnet_train.quant.spec import QuantSpec


class ExportDtype(Enum):
    """Type of the tensors that are not codes: embedding, head, norms, scales."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LinearClass(Enum):
    """How transformers reads packed codes: which class, and so whether it multiplies or divides by the scale."""

    auto = "auto"
    autobitlinear = "autobitlinear"
    bitlinear = "bitlinear"


class EmbeddingType(Enum):
    """Type of the embedding, and of an untied head, in a GGUF file."""

    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"
    q6_k = "q6_k"


class Packing(Enum):
    """How the format ``packed`` stores codes: four to a byte, or five as digits of base three."""

    two_bit = "two_bit"
    base3 = "base3"


@dataclass
class ExportConfig:
    # Names of formats (see --help); null for every format that can hold the model and be verified on this machine.
    formats: list[str] | None = None
    # hf-*, packed: float32 keeps what was trained exactly; bfloat16 halves the embedding, as Microsoft published 2B4T.
    dtype: ExportDtype = ExportDtype.float32
    # hf-packed: autobitlinear multiplies by the scale (2B4T), bitlinear divides by its inverse (Falcon3-1.58,
    # Llama3-8B-1.58); auto is autobitlinear with model.norms=pre_sub and bitlinear with pre.
    linear_class: LinearClass = LinearClass.auto
    # gguf-*: f32, f16, q8_0 (8.5 bits a weight) or q6_k (6.56 bits).
    embedding: EmbeddingType = EmbeddingType.f16
    # packed: two_bit or base3 (1.6 bits a weight).
    packing: Packing = Packing.base3
    # Licence in the model card, as the Hugging Face hub names it (apache-2.0, mit, ...); null leaves it out.
    license: str | None = None
    # Where finished and verified exports are copied to, as TO/<run>/<format>: any URL of fsspec's, such as
    # s3://bucket/exports; null for nowhere.
    to: str | None = None
    # Held-out tokens that verification measures perplexity on.
    verify_tokens: int = 16384


@dataclass
class ConvertConfig:
    """What ``command=convert`` makes of a checkpoint of ``transformers``; how layers are quantised is ``quant``'s."""

    # Folder to write.
    to: str | None = None
    # Layers to convert, patterns of the model's own module names with * and ?.
    include: list[str] = field(default_factory=lambda: ["*"])
    # Layers to leave alone; embeddings and the output head always are.
    exclude: list[str] = field(default_factory=lambda: ["lm_head", "*.lm_head"])
    # Tokens that the model's outputs are compared on before and after.
    tokens: int = 256
    # Text file for perplexity before and after, where the checkpoint has a tokenizer; null for some English prose about
    # Python that comes with it.
    text: str | None = None


# `from` is a keyword in Python, so the field is added here.

# Folder to read: config.json and safetensors.
ConvertConfig.__annotations__["from"] = str | None
setattr(ConvertConfig, "from", field(default=None, init=False, repr=False, compare=False))
ConvertConfig.include = field(default_factory=lambda: ["*"])
ConvertConfig.exclude = field(default_factory=lambda: ["lm_head", "*.lm_head"])
dataclass(ConvertConfig)


def convert_source(cfg: ConvertConfig) -> str | None:
    """``convert.from``."""
    return getattr(cfg, "from")


def check_convert(cfg: ConvertConfig, spec: QuantSpec, progressive: str) -> None:
    """Raises ConfigError when ``command=convert`` cannot start: folders, packages, or quant= settings of training."""
    source = convert_source(cfg)
    if source is None or cfg.to is None:
        missing = "convert.from=FOLDER" if source is None else "convert.to=FOLDER"
        raise ConfigError(f"command=convert needs {missing}: it reads a checkpoint of transformers and writes another.")
    if not spec.quantised:
        raise ConfigError(
            "command=convert with quant=none would convert nothing: choose quant=ternary or quant=binary."
        )
    of_training = {
        "quant.weight.trainable_scale": any(q.trainable_scale for q in (spec.default, *(q for _, q in spec.overrides))),
        "quant.overrides with since": bool(spec.late),
        f"quant/progressive={progressive}": progressive != "none",
    }
    for setting, given in of_training.items():
        if given:
            raise ConfigError(f"command=convert writes master weights and trains nothing: leave out {setting}.")
    folder, to = Path(source).expanduser(), Path(cfg.to).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"convert.from={source} has no config.json: give the folder of a checkpoint of transformers.")
    if to.resolve() == folder.resolve() or folder.resolve() in to.resolve().parents:
        raise ConfigError(f"convert.to={cfg.to} lies in the folder that is read: choose another.")
    if to.exists() and not (to / "bitnet_train.json").is_file() and not (to.is_dir() and not any(to.iterdir())):
        raise ConfigError(f"convert.to={cfg.to} exists and was not written by bitnet_train: choose another folder.")
    if cfg.tokens < 2:
        raise ConfigError(f"convert.tokens is {cfg.tokens}; it must be at least 2.")
    if cfg.text is not None and not Path(cfg.text).expanduser().is_file():
        raise ConfigError(f"convert.text={cfg.text} is no file.")
    missing_packages = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing_packages:
        raise ConfigError(
            f"command=convert reads and writes with {' and '.join(missing_packages)}, not installed here: "
            'pip install "bitnet-train[export]".'
        )
