"""The shape of the decoder and how its weights start: the ``model`` and ``init`` parts of the configuration.

The image classifiers, the other kinds of ``model``, are in :mod:`bitnet_train.nn.vision.config`.
"""

import math
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import II, MISSING

from bitnet_train.errors import ConfigError

MOST_LAYERS = 10_000


class ActivationCheckpointing(Enum):
    """What of a block its backward pass computes again; see :mod:`bitnet_train.nn.recompute`."""

    none = "none"
    selective = "selective"
    full = "full"


class Norms(Enum):
    """Where RMSNorms stand: ``pre_sub`` before attention and FFN and again before o_proj and down_proj, ``pre`` before
    attention and FFN only, or ``inside``: one in every projection, which nothing shares, and none elsewhere."""

    pre_sub = "pre_sub"
    pre = "pre"
    inside = "inside"


class Activation(Enum):
    """The nonlinearity of the gated FFN: squared ReLU or SiLU."""

    relu2 = "relu2"
    silu = "silu"


class ResidualDtype(Enum):
    """The type of the residual stream between blocks."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class ModelConfig:
    """Base of the models; a file of the ``model`` group is of one of its subclasses, by its ``name``."""

    name: str = MISSING


@dataclass
class DecoderConfig(ModelConfig):
    """The language model; the kind of a file that gives no name."""

    name: str = "decoder"
    # Width of the residual stream.
    hidden: int = 256
    # Number of blocks.
    layers: int = 4
    # Query heads.
    heads: int = 4
    # Key and value heads; fewer than heads is grouped-query attention.
    kv_heads: int = 4
    # Width of a head; null for hidden / heads. (Qwen3's is larger.)
    head_width: int | None = None
    # Inner width of the gated FFN.
    ffn: int = 768
    # Longest sequence that positions are defined for, in tokens.
    context: int = 1024
    # Rows of the embedding; follows the tokenizer.
    vocab: int = II("data.tokenizer.vocab_size")
    # RMSNorm placement: pre_sub (BitNet 2B4T and llama.cpp's bitnet), pre (the llama family, TriLM), or inside (one in
    # every projection and none before the blocks: "Tips, Code and FAQ", microsoft/unilm).
    norms: Norms = Norms.pre_sub
    # FFN nonlinearity: relu2 (BitNet 2B4T) or silu (llama.cpp's bitnet, the llama family).
    activation: Activation = Activation.relu2
    # Whether q, k and v have biases (Qwen2).
    attention_bias: bool = False
    # RMSNorm of each head of q and of k, before rotary positions (Qwen3).
    qk_norm: bool = False
    # Whether the output head is the embedding itself.
    tie_embeddings: bool = True
    # Base of the rotary position frequencies.
    rope_theta: float = 500000.0
    # Epsilon of every RMSNorm.
    norm_eps: float = 1e-5
    # Type of the residual stream: float32, bfloat16, or float16 (not with relu2, which overflows it).
    residual_dtype: ResidualDtype = ResidualDtype.float32

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads if self.head_width is None else self.head_width

    @property
    def attention_width(self) -> int:
        """Width of all query heads, which is what o_proj reads."""
        return self.heads * self.head_dim


def shape_fields() -> list[Field[Any]]:
    """The fields that describe a decoder: all but its name, which files of decoders do not hold."""
    return [f for f in fields(DecoderConfig) if f.name != "name"]


def check_layers(layers: int) -> None:
    """Raises ConfigError for a number of layers that only a slip of the hand can mean; patterns go through them all."""
    if layers > MOST_LAYERS:
        raise ConfigError(f"model.layers is {layers}; it must be at most {MOST_LAYERS:,}.")


def check_decoder(cfg: DecoderConfig) -> None:
    """Raises ConfigError when the numbers of ``cfg`` do not make a decoder."""
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "context", "vocab"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"model.{name} is {getattr(cfg, name)}; it must be at least 1.")
    check_layers(cfg.layers)
    if cfg.head_width is not None and cfg.head_width < 1:
        raise ConfigError(f"model.head_width is {cfg.head_width}; it must be at least 1, or null for hidden / heads.")
    if cfg.head_width is None and cfg.hidden % cfg.heads:
        raise ConfigError(
            f"model.heads={cfg.heads} does not divide model.hidden={cfg.hidden}: choose a divisor of {cfg.hidden} "
            "(or give model.head_width)."
        )
    if cfg.heads % cfg.kv_heads:
        raise ConfigError(
            f"model.kv_heads={cfg.kv_heads} does not divide model.heads={cfg.heads}: choose a divisor of {cfg.heads}."
        )
    if cfg.head_dim % 2:
        raise ConfigError(
            f"The head dimension {cfg.head_dim} (model.hidden / model.heads, or model.head_width) is odd; rotary "
            "embeddings need it even."
        )
    if cfg.residual_dtype is ResidualDtype.float16 and cfg.activation is Activation.relu2:
        raise ConfigError(
            "model.residual_dtype=float16 overflows with model.activation=relu2: use bfloat16 or float32, or the silu "
            "activation."
        )
    if cfg.norm_eps <= 0 or cfg.rope_theta <= 0:
        raise ConfigError(f"model.norm_eps={cfg.norm_eps} and model.rope_theta={cfg.rope_theta} must both be positive.")


class SubNorms(Enum):
    """What the gains of sub-norms start at that the weights of ``init.from`` come without."""

    ones = "ones"
    calibrate = "calibrate"


@dataclass
class InitOverride:
    # Module-name pattern with * and ?, for example "layers.*.self_attn.o_proj" or "embed_tokens"; the last match wins.
    pattern: str = MISSING
    # Standard deviation of those weight matrices, in place of what the variant says. Either this or factor.
    std: float | None = None
    # Multiplies the standard deviation that the variant says. (Neither changes the codes of a quantised matrix, which
    # only depend on the ratio of each weight to their mean: it changes the scale that the codes are multiplied by, and
    # how large a step of the optimizer is relative to the weights.)
    factor: float | None = None


@dataclass
class InitConfig:
    """Base of the initialisations; every subclass is an option of the ``init`` group."""

    name: str = MISSING
    # Exceptions by module name: matrices that start with another spread.
    overrides: list[InitOverride] = field(default_factory=list)
    # What the gains of attn_sub_norm and ffn_sub_norm start at (with model.norms=inside those of the norms in o_proj
    # and down_proj). Behind those norms the branches write to the residual stream at full strength from the first step,
    # whatever the spread of o_proj and down_proj; a gain below 1 lets the embedding through. (The other norms' gains
    # start at 1.)
    sub_norm_gain: float = 1.0
    # With model.norms=pre_sub and init.from of a model without sub-norms (llama, qwen), which are put in (BitDistill,
    # arXiv 2510.13998): ones; or calibrate, which null means there: the gains that keep the inputs of o_proj and
    # down_proj closest to what they were, one for a norm or one for each channel, whichever changes the validation loss
    # less. Both losses are printed. Only model.norms=pre keeps such a model's function exactly.
    sub_norms: SubNorms | None = None


# `from` is a keyword in Python, so the field is added here and is not an argument of the constructor. Read a second
# time, the class lacks what the first reading took out of it.

# Folder to start from instead: a run (RUN or RUN@STEP), an export, or a checkpoint of transformers (BitNet, llama,
# Qwen2, Qwen3); such a checkpoint may also be a repository of the Hugging Face hub (OWNER/NAME or OWNER/NAME@REVISION).
# Its weights replace all that the other settings of init say.
InitConfig.__annotations__["from"] = str | None
setattr(InitConfig, "from", field(default=None, init=False, repr=False, compare=False))
InitConfig.overrides = field(default_factory=list)
dataclass(InitConfig)


def initial_source(cfg: InitConfig) -> str | None:
    """``init.from``."""
    return getattr(cfg, "from")


@dataclass
class NormalInit(InitConfig):
    name: str = "normal"
    # Standard deviation of every weight matrix.
    std: float = 0.02
    # Standard deviation of the embedding and of an untied head; null for std.
    embedding_std: float | None = None


@dataclass
class DepthScaledInit(NormalInit):
    """As normal, with std / sqrt(2 * layers) for o_proj and down_proj, which write to the residual stream (GPT-2)."""

    name: str = "depth_scaled"


@dataclass
class FanInInit(InitConfig):
    """normal(0, gain / sqrt(fan-in)): outputs as large as the inputs, whatever the width (LeCun et al. 1998)."""

    name: str = "fan_in"
    # Standard deviation of every weight matrix times the root of its inputs.
    gain: float = 1.0
    # Standard deviation of the embedding and of an untied head; null for gain / sqrt(hidden).
    embedding_std: float | None = None


@dataclass
class SmallInit(InitConfig):
    """sqrt(2 / (5 * hidden)) (Nguyen and Salazar, arXiv 1910.05895); o_proj and down_proj, which write to the residual
    stream, 2 / (layers * sqrt(hidden)) (Wang), as in GPT-NeoX-20B (arXiv 2204.06745, section 2.3.1)."""

    name: str = "small"


@dataclass
class MitchellInit(InitConfig):
    """1 / sqrt(fan-in), o_proj and down_proj of block i (from 0) divided by sqrt(2 * (i + 1)) as well, embedding and
    head 1 / sqrt(hidden); all cut off at three standard deviations (OLMo, arXiv 2402.00838; allenai/OLMo)."""

    name: str = "mitchell"


def check_init(cfg: InitConfig, norms: Norms) -> None:
    """Raises ConfigError for a spread or gain that is not positive, or a gain of norms that the model does not have."""
    if initial_source(cfg) == "":  # what recipes that start from a model say: null would start from nothing
        raise ConfigError("init.from is not set: give the run, export or transformers checkpoint to start from.")
    if cfg.sub_norms is not None and (initial_source(cfg) is None or norms is Norms.pre):
        why = "without init.from" if initial_source(cfg) is None else "with model.norms=pre, which has no sub-norms"
        raise ConfigError(f"init.sub_norms={cfg.sub_norms.value} has no effect {why}: leave it out.")
    for override in cfg.overrides:
        if (override.std is None) == (override.factor is None):
            given = "both std and factor" if override.std is not None else "neither std nor factor"
            raise ConfigError(f"init.overrides: '{override.pattern}' has {given}: give one of them.")
        key = "std" if override.std is not None else "factor"
        value = getattr(override, key)
        if not (0 < value < math.inf):
            raise ConfigError(f"init.overrides: {key} of '{override.pattern}' must be positive, it is {value:g}.")
    if cfg.overrides and initial_source(cfg) is not None:
        raise ConfigError(
            "init.overrides has no effect with init.from, which brings the weights: leave one of them out."
        )
    if cfg.sub_norm_gain <= 0:
        raise ConfigError(f"init.sub_norm_gain must be positive, it is {cfg.sub_norm_gain:g}.")
    if cfg.sub_norm_gain != 1.0 and norms is Norms.pre:
        raise ConfigError("init.sub_norm_gain has no effect with model.norms=pre, which has no sub-norms: set it to 1.")
    if isinstance(cfg, NormalInit) and not (cfg.std > 0 and (cfg.embedding_std is None or cfg.embedding_std > 0)):
        raise ConfigError(
            f"init.std and init.embedding_std must be positive, they are {cfg.std} and {cfg.embedding_std}."
        )

    if isinstance(cfg, FanInInit) and not (cfg.gain > 0 and (cfg.embedding_std is None or cfg.embedding_std > 0)):
        raise ConfigError(
            f"init.gain and init.embedding_std must be positive, they are {cfg.gain} and {cfg.embedding_std}."
        )


INIT_CONFIGS: dict[str, type[InitConfig]] = {
    "normal": NormalInit,
    "depth_scaled": DepthScaledInit,
    "fan_in": FanInInit,
    "small": SmallInit,
    "mitchell": MitchellInit,
}
